"""Run folders outlive upgrades: tensors and moments by our names, settings compared with theirs."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import annexe.trainer
from annexe import cli
from annexe.build import check_start, load_config
from annexe.checkpoints import training_state
from annexe.checkpoints.names import in_first_order, our_name
from annexe.checkpoints.run_folder import find_checkpoint, saved_config
from annexe.config import Config
from annexe.distributed import make_accelerator
from annexe.errors import UserError
from annexe.evaluation.records import read_records
from annexe.evaluator import evaluate
from annexe.models.depth_branch import SIZES, Size
from annexe.trainer import set_up, train
from tests.conftest import assert_same_but_for_rounding

OLD_RUN = Path(__file__).parent / "run_of_0_1"
LORA = ("model.language_model.lora.rank=2", "model.language_model.lora.dropout=0")
MakeConfig = Callable[..., Config]

# Names that transformers gave the attention of DINOv2 before 5.24
OLDER_ATTENTION = {
    "q_proj": ("attention", "query"),
    "k_proj": ("attention", "key"),
    "v_proj": ("attention", "value"),
    "o_proj": ("output", "dense"),
}

# What a block of each library has, by our names
OUR_BLOCKS = {
    "rgb_encoder.vit.blocks.0.": """
        norm1.weight norm1.bias attn.q_bias attn.v_bias attn.qkv.weight
        attn.proj.weight attn.proj.bias norm2.weight norm2.bias
        mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias""",
    "depth_branch.backbone.blocks.0.": """
        norm1.weight norm1.bias attention.query.weight attention.query.bias
        attention.key.weight attention.key.bias attention.value.weight attention.value.bias
        attention.out.weight attention.out.bias layer_scale1.lambda1 norm2.weight norm2.bias
        mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias layer_scale2.lambda1""",
    "language_model.llama.layers.0.": """
        self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight
        self_attn.o_proj.weight mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight
        input_layernorm.weight post_attention_layernorm.weight""",
}


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run of three steps by annexe 0.1 with transformers 5.17."""
    monkeypatch.setitem(SIZES, "smallest", Size(8, 4, 2, (1, 2, 3, 4), (4, 4, 8, 8), 4, 4))
    return shutil.copytree(OLD_RUN, tmp_path / "old")


@pytest.fixture
def old_config(old_run: Path, scenes: Path) -> Callable[..., Config]:
    """Loads the configuration in the old run's folder, to go on with it."""

    def make(*options: str) -> Config:
        own = (
            f"datasets.ego_irgbench.data_root={scenes}",
            f"run.output_dir={old_run}",
            "run.validate_every=0",
            "run.resume=auto",
            "run.max_steps=5",
        )
        return load_config(old_run / "config.yaml", [*own, *options])

    return make


def moments_of(trainer: annexe.trainer.Trainer) -> dict[tuple[str, str], float]:
    """Norms of the optimizer's moments by our name of their parameter and their own."""
    norms = {}
    for name, parameter in trainer.model.named_parameters():
        for moment, value in trainer.optimizer.state.get(parameter, {}).items():
            if value.ndim:
                norms[our_name(name), moment] = float(value.double().norm())
    return norms


def old_moments() -> Any:
    """The norms that annexe 0.1 had, to compare with."""
    norms = {}
    for name, moments in json.loads((OLD_RUN / "moments.json").read_text()).items():
        for moment, norm in moments.items():
            norms[our_name(name), moment] = norm
    return pytest.approx(norms, abs=0)


def permute(model: nn.Module) -> nn.Module:
    """Turn the order of parameters round in every module of a library."""
    roots = (model.rgb_encoder.vit, model.depth_branch.model, model.language_model.model)
    for root in roots:
        for module in root.modules():
            if not isinstance(module, nn.ModuleList | nn.Sequential):
                module._modules = dict(reversed(module._modules.items()))
            module._parameters = dict(reversed(module._parameters.items()))
    return model


def rename(model: nn.Module) -> nn.Module:
    """Give the attention of DINOv2 its older names; the model does not run any more."""
    for block in model.depth_branch.model.backbone.encoder.layer:
        attention = block.attention
        for name, (outer, inner) in OLDER_ATTENTION.items():
            if hasattr(attention, name):
                if not hasattr(attention, outer):
                    attention.add_module(outer, nn.Module())
                getattr(attention, outer).add_module(inner, getattr(attention, name))
                delattr(attention, name)
    return model


# Names


@pytest.mark.parametrize("options", [(), LORA])
def test_our_names_are_these_whatever_the_libraries_say(make_parts, options):
    """If this fails after an upgrade, a library renames parameters: add a rule for its names."""
    names = [our_name(name) for name, _ in make_parts(*options)[0].named_parameters()]
    assert len(set(names)) == len(names)
    assert [our_name(name) for name in names] == names
    assert in_first_order(names) == names, "the library's order has changed: keep `_FIRST_ORDER`"
    for block, expected in OUR_BLOCKS.items():
        found = [name.removeprefix(block) for name in names if name.startswith(block)]
        assert [name for name in found if "lora_" not in name] == expected.split()
    adapters = {"lora_A.weight", "lora_B.weight"} if options else set()
    assert {name.rpartition("_proj.")[2] for name in names if "lora_" in name} == adapters
    others = {"embed_tokens.weight", "norm.weight", "lm_head.weight"}
    llama = "language_model.llama."
    assert others == {
        name.removeprefix(llama)
        for name in names
        if name.startswith(llama) and not name.startswith(f"{llama}layers.")
    }


def test_files_do_not_depend_on_the_names_of_libraries(make_parts, make_config, tmp_path):
    """A model with the names of an older release reads and writes the same files."""
    config = make_config()
    accelerator = make_accelerator(device="cpu", mixed_precision="fp32", timeout_minutes=1)
    states = {}
    for name in ("newer", "older"):
        model = make_parts(num_images=1)[0]
        if name == "older":
            rename(model)
            assert any("attention.attention.query" in each for each, _ in model.named_parameters())
        optimizer = annexe.trainer.build_optimizer(model, config.run)
        training_state.save_checkpoint(
            tmp_path / name,
            model,
            optimizer,
            training_state.names_of_groups(model, optimizer),
            progress=annexe.trainer.Progress(),
            config={},
            frozen=training_state.frozen_fingerprint(model),
            manifest={},
            accelerator=accelerator,
            keep=1,
        )
        folder = find_checkpoint(tmp_path / name)
        states[name] = load_file(folder / "model.safetensors")
        for file in ("model.safetensors", "optimizer.pt", "frozen.json"):
            assert (folder / file).read_bytes() == (
                find_checkpoint(tmp_path / "newer") / file
            ).read_bytes()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            training_state.load_weights(find_checkpoint(tmp_path / "newer"), model)
        for each, tensor in training_state.trained_tensors(model).items():
            assert torch.equal(tensor, states["newer"][each]), each


# A run of annexe 0.1 and transformers 5.17


def test_an_old_run_goes_on(old_run, old_config, caplog):
    saved = load_file(find_checkpoint(old_run) / "model.safetensors")
    trainer = set_up(old_config())

    # Its weights and moments are where they were
    weights = training_state.trained_tensors(trainer.model)
    assert {our_name(name) for name in saved} == weights.keys()
    for name, tensor in saved.items():
        assert torch.equal(weights[our_name(name)], tensor), name
    assert moments_of(trainer) == old_moments()

    # It goes on, and tells what changed
    trainer.train()
    message = next(line for line in caplog.messages if "goes on with changes" in line)
    assert "annexe 0.1.0 -> " in message and "run.max_steps 3 -> 5" in message
    assert len(message.splitlines()) == 1
    log = [json.loads(line) for line in (old_run / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in log if line["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5]
    manifest = json.loads((old_run / "manifest.json").read_text())
    (entry,) = manifest["history"]
    before = json.loads((OLD_RUN / "manifest.json").read_text())
    assert entry["step"] == 3
    assert entry["changed"]["data_fingerprint"][0] == before["data_fingerprint"]
    assert entry["changed"]["annexe"][0] == "0.1.0"

    # What it writes has our names
    folder = find_checkpoint(old_run)
    assert folder.name == "step-00000005"
    names = load_file(folder / "model.safetensors").keys()
    assert all(our_name(name) == name for name in names)
    moments = torch.load(folder / "optimizer.pt", weights_only=True)
    assert moments["state"].keys() == names
    assert saved_config(folder)["model"]["pixel_decoder"]["presence_from_prompt"] is True


def test_an_old_run_is_evaluated_and_asked(old_run, old_config, scenes, tmp_path, monkeypatch):
    options = (f"run.checkpoint={old_run}", f"run.output_dir={tmp_path / 'eval'}")
    config = old_config(*options, "run.split=val", "run.report=false", "run.resume=null")
    metrics = evaluate(config)
    assert metrics["meta"]["step"] == 3

    # The settings of the checkpoint itself, without a model block
    config.model = None
    config.run.output_dir = str(tmp_path / "again")
    assert evaluate(config)["standard"] == metrics["standard"]

    # Photos
    photo = sorted((scenes / "RGB").iterdir())[0]
    words = ["annexe", "predict", old_run, photo, "--ask", "Where is the mug?"]
    words += ["--out", tmp_path / "out", "--options", "run.device=cpu"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    cli.main()
    assert len(read_records(tmp_path / "out" / "predictions.jsonl")) == 2


def test_a_run_starts_from_an_old_one(old_run, old_config, tmp_path):
    start = (f"model.init_from={old_run}", "model.init=null", "run.resume=null")
    trainer = set_up(old_config(*start, f"run.output_dir={tmp_path / 'next'}"))
    saved = load_file(find_checkpoint(old_run) / "model.safetensors")
    weights = training_state.trained_tensors(trainer.model)
    for name, tensor in saved.items():
        assert torch.equal(weights[our_name(name)], tensor), name


def test_an_old_run_is_exported(old_run, tmp_path, monkeypatch):
    words = ["annexe", "weights", "export", str(old_run), str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    cli.main()
    saved = load_file(find_checkpoint(old_run) / "model.safetensors")
    heads = load_file(tmp_path / "out" / "heads.safetensors")
    llama = load_file(tmp_path / "out" / "llama" / "model.safetensors")
    assert not any(name.startswith("language_model.llama.") for name in heads)
    assert len(heads) + len(llama) == len(saved)
    expected = saved["language_model.model.model.layers.0.self_attn.v_proj.weight"]
    assert torch.equal(llama["model.layers.0.self_attn.v_proj.weight"], expected)


def test_a_setting_that_is_gone_is_named(old_run, old_config):
    for file in (old_run / "config.yaml", find_checkpoint(old_run) / "config.yaml"):
        text = file.read_text()
        assert "words: false" in text
        file.write_text(text.replace("words: false", "words: true "))
    with pytest.raises(UserError, match=r"sets model\.pixel_decoder\.words, which no model has"):
        old_config()


# Orders of parameters


def permuted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of trainings have their parameters in another order."""
    build = annexe.trainer.build_model

    def build_permuted(*arguments: Any, **settings: Any) -> nn.Module:
        return permute(build(*arguments, **settings))

    monkeypatch.setattr(annexe.trainer, "build_model", build_permuted)


def test_a_permuted_order_does_not_mix_up_moments(make_config, tmp_path, monkeypatch):
    options = (*LORA, "run.max_steps=4", "run.checkpoint_every=2", "run.keep_checkpoints=2")
    train(make_config(*options))
    step = tmp_path / "run" / "checkpoints" / "step-00000002"
    expected = load_file(find_checkpoint(tmp_path / "run") / "model.safetensors")

    permuted(monkeypatch)
    other = (f"run.resume={step}", f"run.output_dir={tmp_path / 'other'}")
    trainer = set_up(make_config(*options, *other))
    names = [our_name(name) for name, _ in trainer.model.named_parameters()]
    assert names != in_first_order(names)
    saved = torch.load(step / "optimizer.pt", weights_only=True)["state"]
    for (name, moment), norm in moments_of(trainer).items():
        assert norm == float(saved[name][moment].double().norm()), name
    trainer.train()
    weights = load_file(find_checkpoint(tmp_path / "other") / "model.safetensors")
    assert_same_but_for_rounding(weights, expected, atol=1e-5)


def test_a_permuted_order_does_not_mix_up_moments_by_position(old_config, monkeypatch):
    permuted(monkeypatch)
    assert moments_of(set_up(old_config())) == old_moments()


def test_moments_by_position_of_an_unknown_order_are_refused(old_config, monkeypatch):
    monkeypatch.delitem(training_state.in_first_order.__globals__["_RANKS"], "fc1")
    with pytest.raises(
        UserError, match=r"order is not certain; it was written with annexe 0\.1\.0"
    ):
        set_up(old_config())


def test_moments_of_other_shapes_are_refused(old_run, old_config):
    file = find_checkpoint(old_run) / "optimizer.pt"
    saved = torch.load(file, weights_only=True)
    moments = saved["state"][0]
    moments["exp_avg"] = moments["exp_avg"][None]
    size = file.stat().st_size
    torch.save(saved, file)
    sizes = json.loads(file.with_name("files.json").read_text())
    assert sizes["optimizer.pt"] == size
    sizes["optimizer.pt"] = file.stat().st_size
    file.with_name("files.json").write_text(json.dumps(sizes))
    with pytest.raises(UserError, match=r"optimizer\.pt' does not fit: moments and weights of"):
        set_up(old_config())


def test_a_checkpoint_that_does_not_fit_names_the_versions(old_run, old_config, monkeypatch):
    rule = training_state.our_name

    def rule_for_most(name: str) -> str:
        return name if "attention.query.weight" in name else rule(name)

    monkeypatch.setattr(training_state, "our_name", rule_for_most)
    with pytest.raises(UserError) as caught:
        set_up(old_config())
    message = str(caught.value)
    assert "another model" in message and "written with annexe 0.1.0 (here " in message
    assert len(message.splitlines()) == 1


# Settings


MEANING = (
    "model.rgb_encoder.num_heads=4",
    "model.rgb_encoder.statistics=imagenet",
    "model.depth_branch.statistics=clip",
    "model.language_model.num_heads=2",
    "model.language_model.lora.alpha=64",
    "model.pixel_decoder.num_heads=2",
    "model.pixel_decoder.masked_attention=true",
    "model.pixel_decoder.conditioning=answer",
    "model.image_token_head=false",
    "model.depth_branch.trained=dpt",
    "model.rgb_encoder.frozen=true",
    "datasets.ego_irgbench.answer_format=phrases",
    "run.seed=1",
    "run.optimizer=adamw",
)


@pytest.fixture(scope="session")
def adapted(scenes: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step with adapters; tests read it and write elsewhere."""
    folder = tmp_path_factory.mktemp("adapted")
    options = (*LORA, f"run.output_dir={folder}", "run.max_steps=1", "run.warmup_steps=0")
    train(load_config(trained / "config.yaml", options))
    return folder


def on(run: Path, *options: str) -> Config:
    """The configuration of a run, with other settings."""
    return load_config(run / "config.yaml", options)


@pytest.mark.parametrize("option", MEANING)
def test_what_changes_meaning_is_refused(adapted, option, tmp_path):
    name, _, value = option.partition("=")
    resume = (f"run.resume={adapted}", f"run.output_dir={tmp_path / 'next'}")
    with pytest.raises(UserError) as caught:
        set_up(on(adapted, *resume, option))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    found = re.search(
        rf"{re.escape(name)} is {value} here and (\S+) there; set (\S+) as in", message
    )
    assert found, message
    assert found[2] == f"{name}={found[1]}"
    set_up(on(adapted, *resume, option, found[2]))


def test_what_may_be_meant_is_told_and_kept(adapted, scenes, tmp_path, caplog):
    run = shutil.copytree(adapted, tmp_path / "run")
    root = shutil.copytree(scenes, tmp_path / "scenes")
    options = [
        "run.resume=auto",
        f"run.output_dir={run}",
        f"datasets.ego_irgbench.data_root={root}",
        "run.batch_size=3",
        "run.learning_rate=1e-4",
        "model.language_model.lora.dropout=0.5",
        "run.max_steps=2",
    ]
    train(on(adapted, *options))
    messages = [line for line in caplog.messages if "goes on with changes" in line]
    assert len(messages) == 1 and len(messages[0].splitlines()) == 1
    told = {
        "run.batch_size": [2, 3],
        "run.learning_rate": [0.0012, 0.0001],
        "model.language_model.lora.dropout": [0.0, 0.5],
        "run.max_steps": [1, 2],
        "datasets.ego_irgbench.data_root": [str(scenes), str(root)],
    }
    manifest = json.loads((run / "manifest.json").read_text())
    (entry,) = manifest["history"]
    assert entry["step"] == 1
    for name, values in told.items():
        assert name in messages[0]
        if name != "run.learning_rate":
            assert entry["changed"][name] == values, name
    before = json.loads((adapted / "manifest.json").read_text())
    assert manifest["data_fingerprint"] == before["data_fingerprint"]

    # Other data the next time: the first entry and the old fingerprint stay
    file = next((root / "dataset_split" / "train").iterdir())
    text = file.read_text()
    file.write_text(text.replace("hand", "paw"))
    assert file.read_text() != text
    train(on(run, *options, "run.max_steps=3"))
    history = json.loads((run / "manifest.json").read_text())["history"]
    assert history[0] == entry and history[1]["step"] == 2
    assert history[1]["changed"]["data_fingerprint"][0] == before["data_fingerprint"]


def test_a_run_that_goes_on_unchanged_tells_nothing(adapted, tmp_path, caplog):
    run = shutil.copytree(adapted, tmp_path / "run")
    train(on(adapted, "run.resume=auto", f"run.output_dir={run}"))
    assert not any("goes on with changes" in line for line in caplog.messages)


@pytest.mark.parametrize("option", MEANING[:8])
def test_an_evaluation_under_other_settings_is_refused(adapted, tmp_path, option):
    config = on(adapted, f"run.checkpoint={adapted}", f"run.output_dir={tmp_path}", option)
    with pytest.raises(UserError, match=re.escape(option.replace("=", " is ")) + " here and"):
        evaluate(config)


UNSEEN = (*MEANING[:5], "model.pixel_decoder.num_heads=2")


@pytest.mark.parametrize("option", UNSEEN)
def test_a_run_does_not_start_from_weights_of_another_meaning(adapted, option):
    name = option.partition("=")[0]
    for place in (adapted, find_checkpoint(adapted) / "model.safetensors"):
        start = (f"model.init_from={place}", "model.init=null")
        check_start(on(adapted, *start).require_model())
        with pytest.raises(UserError, match=rf"init_from: .* {re.escape(name)} is .*; set {name}="):
            check_start(on(adapted, *start, option).require_model())


def test_a_start_with_other_parts_is_told(adapted, caplog):
    start = (f"model.init_from={adapted}", "model.init=null")
    check_start(on(adapted, *start, "model.pixel_decoder.conditioning=answer").require_model())
    assert "conditioning prompt -> answer" in caplog.text
    caplog.clear()
    check_start(on(adapted, *start, "model.pixel_decoder.type=deconv").require_model())
    check_start(on(adapted, *start, "model.presence_threshold=0.3").require_model())
    assert not caplog.text


def test_adapters_whose_file_does_not_say_their_scale(adapted, tmp_path, caplog):
    file = tmp_path / "minigpt.pth"
    start = (f"model.init_from={file}", "model.init=null")
    check_start(on(adapted, *start).require_model())
    assert not caplog.text
    check_start(on(adapted, *start, "model.language_model.lora.alpha=64").require_model())
    assert "lora.alpha is 64" in caplog.text and "with 16" in caplog.text
