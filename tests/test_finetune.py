"""Fine-tuning: a model of a run or an export trains on, on other photos."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from annexe import cli
from annexe.build import load_config
from annexe.checkpoints.run_folder import find_checkpoint
from annexe.checkpoints.training_state import trained_tensors
from annexe.config import Config
from annexe.errors import UserError
from annexe.evaluator import evaluate
from annexe.inference.predictor import Predictor
from annexe.tools.weights import export_run
from annexe.trainer import set_up, train
from tests.conftest import ROOT, SMALLEST, TINY

FINETUNE = ROOT / "train_configs" / "finetune.yaml"
SHORT = (
    "run.max_steps=1",
    "run.warmup_steps=0",
    "run.batch_size=2",
    "run.num_workers=0",
    "run.device=cpu",
    "run.validate_every=0",
    "run.max_new_tokens=8",
)
MakeConfig = Callable[..., Config]


@pytest.fixture
def finetune(trained: Path, scenes: Path, tmp_path: Path) -> MakeConfig:
    """Loads finetune.yaml with further ``a.b=c`` options; it starts from the fixture's run."""

    def make(*options: str) -> Config:
        own = (
            f"model.init_from={trained}",
            f"datasets.ego_irgbench.data_root={scenes}",
            f"run.output_dir={tmp_path / 'mine'}",
        )
        return load_config(FINETUNE, [*own, *SHORT, *options])

    return make


@pytest.fixture(scope="module")
def adapted(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step with adapters on a frozen language model, and a frozen encoder."""
    folder = tmp_path_factory.mktemp("adapted")
    options = (
        *SMALLEST,
        f"datasets.ego_irgbench.data_root={scenes}",
        f"run.output_dir={folder}",
        "run.max_steps=1",
        "run.warmup_steps=0",
        "model.rgb_encoder.frozen=true",
        "model.language_model.lora.rank=2",
    )
    train(load_config(TINY, options))
    return folder


def saved(run: Path) -> dict[str, torch.Tensor]:
    folder = find_checkpoint(run)
    assert folder is not None
    return load_file(folder / "model.safetensors")


def test_the_model_is_that_of_the_start(finetune: MakeConfig, trained: Path) -> None:
    config = finetune("model.pixel_decoder.num_layers=1", "model.presence_threshold=0.4")
    before = load_config(trained / "config.yaml").require_model()
    after = config.require_model()
    assert after["init_from"] == str(trained) and after["init"] is None
    for part in ("rgb_encoder", "depth_branch", "language_model"):
        assert after[part] == before[part]
    assert after["pixel_decoder"] == before["pixel_decoder"] | {"num_layers": 1}
    assert after["image_token_head"] is True and after["presence_threshold"] == 0.4


def test_a_part_of_another_type_takes_nothing_from_the_start(finetune: MakeConfig) -> None:
    decoder = finetune("model.pixel_decoder.type=deconv").require_model()["pixel_decoder"]
    assert decoder["type"] == "deconv" and "num_layers" not in decoder


def test_a_file_that_describes_all_parts_stays_as_it_is(
    make_config: MakeConfig, trained: Path
) -> None:
    start = ("model.init=null", f"model.init_from={trained}")
    model = make_config(*start, "model.image_token_head=false").require_model()
    assert model["image_token_head"] is False


@pytest.mark.parametrize("which", ["run", "checkpoint", "file"])
def test_it_starts_with_weights_and_words_of_the_start(
    finetune: MakeConfig, trained: Path, tmp_path: Path, which: str
) -> None:
    checkpoint = find_checkpoint(trained)
    assert checkpoint is not None
    place = {"run": trained, "checkpoint": checkpoint, "file": checkpoint / "model.safetensors"}
    started = set_up(finetune(f"model.init_from={place[which]}"))
    tensors = trained_tensors(started.model)
    for name, tensor in saved(trained).items():
        assert torch.equal(tensors[name], tensor), name
    started.model.language_model.tokenizer.save(tmp_path / "its")
    its = (tmp_path / "its" / "tokenizer.json").read_bytes()
    assert its == (checkpoint / "tokenizer" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("kind", ["trained", "adapted"])
def test_an_export_starts_as_its_run_does(
    finetune: MakeConfig, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(kind)
    export_run(str(run), tmp_path / "export", merge=False)
    started = set_up(finetune(f"model.init_from={tmp_path / 'export'}"))
    tensors = trained_tensors(started.model)
    expected = saved(run)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def test_a_fine_tuned_run_answers_without_its_start(
    finetune: MakeConfig, trained: Path, scenes: Path, tmp_path: Path
) -> None:
    start = shutil.copytree(trained, tmp_path / "start")
    train(finetune(f"model.init_from={start}"))
    shutil.rmtree(start)
    photo = next((scenes / "RGB").iterdir())
    (result,) = Predictor.from_run(tmp_path / "mine").predict(photo, "Show me the held object.")
    assert result.answers
    before = saved(trained)
    assert any(not torch.equal(t, before[name]) for name, t in saved(tmp_path / "mine").items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8"])
def test_adapters_on_a_run_that_was_trained_whole(finetune: MakeConfig, dtype: str) -> None:
    """They start as a product of zero, above the weights of the run."""
    options = ("model.language_model.lora.rank=2", f"model.language_model.dtype={dtype}")
    model = set_up(finetune(*options)).model
    start = set_up(finetune()).model
    layer = model.language_model.base.model.layers[0].self_attn.q_proj
    weight = start.language_model.base.model.layers[0].self_attn.q_proj.weight.float()
    x = torch.randn(8, weight.shape[1])
    output = layer(x.to(torch.float32 if dtype == "float32" else torch.bfloat16)).float()
    tolerance = {"float32": 1e-5, "bfloat16": 0.02, "float8": 0.1}[dtype]
    expected = x @ weight.t()
    assert (output - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_weights_of_a_run_are_not_put_into_quantized_layers(
    finetune: MakeConfig, dtype: str
) -> None:
    pytest.importorskip("bitsandbytes")
    options = ("model.language_model.lora.rank=2", f"model.language_model.dtype={dtype}")
    with pytest.raises(UserError, match=r"q_proj.weight itself, .* to bfloat16 or float8"):
        set_up(finetune(*options))


def test_frozen_weights_that_are_not_those_of_the_start(
    finetune: MakeConfig, adapted: Path
) -> None:
    set_up(finetune(f"model.init_from={adapted}"))
    with pytest.raises(UserError, match="frozen weights of rgb_encoder are not those"):
        set_up(finetune(f"model.init_from={adapted}", "run.seed=1"))


def test_wrong_starts_are_refused(finetune: MakeConfig, trained: Path, tmp_path: Path) -> None:
    def refusal(start: Path, *options: str) -> str:
        with pytest.raises(UserError) as caught:
            finetune(f"model.init_from={start}", *options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    # Nothing, a public checkpoint, and a run without a checkpoint
    nothing = tmp_path / "nothing"
    assert f"nothing at '{nothing}'" in refusal(nothing)
    public = tmp_path / "minigpt.safetensors"
    save_file({"llama_proj.weight": torch.zeros(2, 2)}, public)
    assert "is no run and no export" in refusal(public) and "annexe.yaml" in refusal(public)
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    shutil.copy(trained / "config.yaml", empty)
    assert "no complete checkpoint" in refusal(empty)

    # An export of an older version
    export = tmp_path / "export"
    export_run(str(trained), export, merge=False)
    (export / "frozen.json").unlink()
    assert "export its run again" in refusal(export)

    # A setting that no part has
    message = refusal(trained, "model.pixel_decoder.num_layer=1")
    assert "model.pixel_decoder.num_layer:" in message and "num_layers" in message


def test_weights_of_a_frozen_part_that_moved_are_named(
    finetune: MakeConfig, adapted: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(adapted, tmp_path / "run")
    folder = find_checkpoint(run)
    assert folder is not None
    sizes = json.loads((folder / "files.json").read_text())
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("path: null", "path: /moved/llama"))
    (folder / "files.json").write_text(json.dumps(sizes | {"config.yaml": config.stat().st_size}))
    with pytest.raises(UserError, match=r"model\.language_model\.path=PATH"):
        finetune(f"model.init_from={run}")


PAGE = ROOT / "docs" / "your_data.md"
_BLOCK = re.compile(r"test_finetune\.py runs.*?```bash\n(.*?)```", re.S)


def run_block(text: str, *, short: tuple[str, ...]) -> None:
    """Run the commands of a block of the page in this process.

    Args:
        short: options put behind those of trainings and evaluations.
    """
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        if not words:
            continue
        if words[0] == "annexe":
            sys.argv = words
            cli.main()
            continue
        assert words[:4] == ["torchrun", "--standalone", "--nproc_per_node", "1"]
        script, cfg_path, path, option_sign, *options = words[4:]
        assert (cfg_path, option_sign) == ("--cfg-path", "--options")
        is_training = script == "train.py"
        assert is_training or script == "eval_scripts/eval_egoirgbench.py"
        config = load_config(path, [*options, *short], onto_checkpoint=not is_training)
        train(config) if is_training else evaluate(config)


@pytest.mark.slow
def test_the_commands_of_the_page(
    trained: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder like that of the repository, in which the demo was made
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    for name in ("train_configs", "eval_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs").mkdir()
    shutil.copytree(trained, tmp_path / "runs" / "demo")
    (tmp_path / "runs" / "demo" / "data").symlink_to(scenes)

    # From drawn scenes to a report
    own, mixed = _BLOCK.findall(PAGE.read_text())
    fewer = own.replace("--images 50 --val 5 --test 15", "--images 10 --val 2 --test 3")
    assert fewer != own
    run_block(fewer, short=SHORT)
    scores = json.loads((tmp_path / "runs" / "mine" / "eval" / "metrics.json").read_text())
    assert scores["standard"]["num_images"] == 3
    assert (tmp_path / "runs" / "mine" / "eval" / "report.html").is_file()
    photo = next((tmp_path / "my_data" / "RGB").iterdir())
    predictor = Predictor.from_run("runs/mine")
    assert predictor.predict(photo, "Where is the left hand?")[0].answers

    # Beside the data that the demo was trained on
    run_block(mixed, short=SHORT)
    datasets = load_config("runs/mixed/config.yaml").datasets
    assert {name: spec["ratio"] for name, spec in datasets.items()} == {
        "ego_irgbench": 1,
        "original": 1,
    }
