"""Training as users run it: it learns, validates, keeps records, and survives a kill."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from annexe.build import load_config
from annexe.checkpoints.run_folder import MANIFEST, find_checkpoint, is_complete, load_progress
from annexe.config import Config
from annexe.datasets.mixture import Mixture
from annexe.errors import UserError
from annexe.trainer import announce, set_up, train
from annexe.training.optimizer import (
    MuonAdamW,
    build_optimizer,
    learning_rate,
    newton_schulz,
)
from tests.conftest import ROOT, SMALLEST, TINY, assert_same_but_for_rounding
from tests.forked import Command

# Options of runs whose gradients are compared: nothing is clipped or dropped
COMPARABLE = (
    "run.clip_norm=1e9",
    "model.language_model.lora.rank=4",
    "model.language_model.lora.dropout=0",
)


def lines_of_log(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of one kind in a run's log."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_it_learns_validates_and_keeps_records(make_config, tmp_path):
    config = make_config(
        "run.max_steps=24",
        "run.validate_every=12",
        "run.validation_images=2",
        "run.learning_rate=3e-3",
        "run.checkpoint_every=4",
        "run.keep_checkpoints=2",
    )
    train(config)
    run = tmp_path / "run"

    # It learns
    lines = lines_of_log(run)
    assert [line["step"] for line in lines] == list(range(1, 25))
    losses = [line["loss"] for line in lines]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    terms = ("analysis", "answer", "depth", "presence", "mask", "dice")
    assert {f"loss/{name}" for name in terms} <= lines[0].keys()
    last = lines[-1]
    assert last["images"] == 48
    assert last["epoch"] == 4.0
    assert last["tokens"] > last["queries"] > 48

    # It validates
    validations = lines_of_log(run, "validation")
    assert [line["step"] for line in validations] == [12, 24]
    metrics = {"grounding/ciou", "analysis/cider", "answer/exact_match", "depth/mae"}
    assert metrics <= validations[0].keys()

    # It keeps the last two checkpoints and the best one
    names = {path.name for path in (run / "checkpoints").iterdir()}
    best = find_checkpoint(run, "best").name
    assert best in {"step-00000012", "step-00000024"}
    assert names == {"step-00000020", "step-00000024", best}

    # The manifest
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["progress"]["images"] == 48
    assert len(manifest["data_fingerprint"]) == 64
    assert torch.__version__.startswith(manifest["packages"]["torch"])
    assert manifest["config"]["run"]["max_steps"] == 24


def gradients_of_first_step(config: Config) -> dict[str, torch.Tensor]:
    """Gradients as they reach the optimizer, by the parameter's name."""
    trainer = set_up(config)
    gradients = {}

    def record_gradients() -> None:
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                gradients[name] = parameter.grad.clone()

    trainer.optimizer.step = record_gradients
    batches = iter(trainer.batches(trainer.progress))
    trainer.train_step([next(batches) for _ in range(config.run.gradient_accumulation)])
    return gradients


def test_accumulation_equals_one_large_batch(make_config, tmp_path):
    together = make_config(*COMPARABLE, "run.batch_size=4", f"run.output_dir={tmp_path / 'a'}")
    apart = make_config(
        *COMPARABLE,
        "run.batch_size=1",
        "run.gradient_accumulation=4",
        f"run.output_dir={tmp_path / 'b'}",
    )
    expected = gradients_of_first_step(together)
    assert_same_but_for_rounding(gradients_of_first_step(apart), expected)


def test_a_recipe_for_a_gpu_says_so_on_a_cpu(make_config, caplog, monkeypatch):
    config = make_config("run.validate_every=0")
    trainer = set_up(config)
    announce(trainer)
    assert "no GPU" not in caplog.text
    monkeypatch.setattr("annexe.trainer._MANY_PARAMETERS_FOR_A_CPU", 1e3)
    announce(trainer)
    assert "no GPU is in use" in caplog.text and "annexe_tiny.yaml" in caplog.text


def test_every_epoch_is_a_permutation_of_its_own():
    mixture = Mixture([5], ["all"], seed=1)
    order = mixture.order(0, 10)
    assert [draw.epoch for draw in order] == [0] * 5 + [1] * 5
    images = [draw.image for draw in order]
    first = images[:5]
    second = images[5:]
    assert sorted(first) == sorted(second) == list(range(5))
    assert first != second
    assert mixture.order(3, 8) == order[3:8]


def test_learning_rate_falls_linearly_where_asked(make_config):
    options = ("run.warmup_steps=10", "run.max_steps=110", "run.learning_rate_decay=linear")
    run = make_config(*options).run
    halfway = learning_rate(60, run)
    assert halfway == pytest.approx((run.learning_rate + run.min_learning_rate) / 2)
    assert learning_rate(110, run) == pytest.approx(run.min_learning_rate)


def test_learning_rate_warms_up_and_falls(make_config):
    run = make_config("run.max_steps=100", "run.warmup_steps=10").run
    rates = [learning_rate(step, run) for step in range(101)]
    assert rates[0] == run.warmup_learning_rate
    assert rates[10] == run.learning_rate == max(rates)
    assert rates[100] == pytest.approx(run.min_learning_rate)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8)])
def test_orthogonalized_matrices_keep_their_singular_vectors(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    diagonal = left.mT @ newton_schulz(matrices) @ right.mT
    values = diagonal.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6
    assert values.max() < 1.25
    torch.testing.assert_close(diagonal, torch.diag_embed(values), atol=1e-5, rtol=0)


SHAPES = [(8, 20), (20, 8), (8, 20), (6, 4, 3, 3), (5,)]


def parameters_and_optimizer(rate: dict[str, Any]) -> tuple[list[nn.Parameter], MuonAdamW]:
    """Four weights that Muon moves and a vector that AdamW moves, always the same."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    groups = [
        {"params": parameters[4:], "kind": "adamw"},
        {"params": parameters[:4], "kind": "muon"},
    ]
    return parameters, MuonAdamW(groups, **rate)


def set_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_moves_as_that_of_torch_does_and_the_rest_as_adamw():
    """PyTorch's takes matrix by matrix, no convolutions, and orthogonalizes in bfloat16."""
    rate = {"lr": 0.1, "weight_decay": 0.05}
    ours, optimizer = parameters_and_optimizer(rate)
    before = [parameter.detach().clone() for parameter in ours]
    theirs = [nn.Parameter(parameter.flatten(1).clone()) for parameter in before[:4]]
    theirs.append(nn.Parameter(before[4].clone()))
    optimizers = [
        optimizer,
        torch.optim.Muon(theirs[:4], **rate, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(theirs[4:], **rate, fused=True),
    ]
    for step in range(3):
        set_gradients(ours, seed=step)
        for our, their in zip(ours, theirs, strict=True):
            their.grad = our.grad.view_as(their).clone()
        for each in optimizers:
            each.step()
    for our, their, start in zip(ours[:4], theirs[:4], before[:4], strict=True):
        assert (our.view_as(their) - their).norm() < 0.02 * (our - start).norm()
    assert torch.equal(ours[4], theirs[4])
    assert not torch.equal(ours[4], before[4])


def test_muon_moves_once_in_a_period_and_by_all_of_it():
    rate = {"lr": 0.1, "weight_decay": 0.05}
    rare, rarely = parameters_and_optimizer({**rate, "muon_period": 3})
    often, every_step = parameters_and_optimizer(rate)
    for step in range(3):
        before = [parameter.detach().clone() for parameter in rare]
        set_gradients(rare, seed=step)
        rarely.step()
        moved = [not torch.equal(a, b) for a, b in zip(rare, before, strict=True)]
        assert moved == [step == 2] * 4 + [True]

    # The move is that of a step at three times the rate with the same momenta
    for step in range(3):
        for parameter, start in zip(often, before, strict=True):
            parameter.data.copy_(start)
        set_gradients(often, seed=step)
        every_step.param_groups[1]["lr"] = 0.3
        every_step.step()
    for parameter, source in zip(rare[:4], often[:4], strict=True):
        assert torch.equal(parameter, source)


@pytest.mark.parametrize("period", [1, 3])
def test_muon_goes_on_from_its_state_bit_for_bit(period: int):
    rate = {"lr": 0.1, "weight_decay": 0.05, "muon_period": period}
    expected, optimizer = parameters_and_optimizer(rate)
    resumed, other = parameters_and_optimizer(rate)
    for step in range(4):
        if step == 2:
            state = copy.deepcopy(optimizer.state_dict())
            assert [group.get("orthogonal") for group in state["param_groups"]] == [None, True]
            assert not any("kind" in group for group in state["param_groups"])
            other.load_state_dict(state)
            for parameter, source in zip(resumed, expected, strict=True):
                parameter.data.copy_(source.data)
        set_gradients(expected, seed=step)
        optimizer.step()
        if step >= 2:
            set_gradients(resumed, seed=step)
            other.step()
    for parameter, source in zip(resumed, expected, strict=True):
        assert torch.equal(parameter, source)
    groups = [list(each.state_dict()["param_groups"][1]) for each in (optimizer, other)]
    assert groups[0] == groups[1]


def test_muon_takes_the_weights_of_layers(make_parts, make_config):
    model = make_parts()[0]
    optimizer = build_optimizer(model, make_config("run.optimizer=muon").run)
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    by_kind: dict[str, list[str]] = {"adamw": [], "muon": []}
    for group in optimizer.param_groups:
        by_kind[group["kind"]] += [name_of[parameter] for parameter in group["params"]]

    # Every trained parameter is moved once
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(by_kind["muon"] + by_kind["adamw"]) == sorted(trained)

    # Of the weights that are no vectors, AdamW moves embeddings and the head of words alone
    of_words = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or name.endswith("lm_head"):
            of_words.add(f"{name}.weight")
    of_words &= set(name_of.values())
    assert all(name.endswith(".weight") for name in by_kind["muon"])
    matrices = set()
    for name in by_kind["adamw"]:
        if name.endswith(".weight") and model.get_parameter(name).ndim > 1:
            matrices.add(name)
    assert matrices == of_words


@pytest.mark.slow
def test_killed_at_a_random_step_it_resumes_bit_for_bit(scenes, tmp_path):
    """With LoRA dropout on, so that the random state matters.

    Also a checkpoint that was cut short is passed over.
    """

    def options(folder: Path) -> list[str]:
        return [
            *SMALLEST,
            f"datasets.ego_irgbench.data_root={scenes}",
            f"run.output_dir={folder}",
            "run.max_steps=14",
            "run.checkpoint_every=3",
            "run.resume=auto",
            "model.language_model.lora.rank=4",
            "model.language_model.lora.dropout=0.2",
        ]

    # One run straight through, another killed on the way
    straight = tmp_path / "straight"
    broken = tmp_path / "broken"
    train(load_config(TINY, options(straight)))
    step = random.SystemRandom().randrange(4, 13)
    words = (ROOT / "train.py", "--cfg-path", TINY, "--options", *options(broken))
    command = Command(*words, folder=tmp_path)
    log = broken / "log.jsonl"
    while command.is_running() and not (log.exists() and log.read_text().count("\n") >= step):
        time.sleep(0.005)
    command.kill()

    # A later checkpoint whose last file is cut short
    last = find_checkpoint(broken)
    torn = last.with_name("step-00000099")
    torn.mkdir()
    for path in last.iterdir():
        if path.is_file():
            (torn / path.name).write_bytes(path.read_bytes())
    (torn / "optimizer.pt").write_bytes((last / "optimizer.pt").read_bytes()[:-100])
    assert not is_complete(torn)
    assert find_checkpoint(broken) == last

    # The log and the last checkpoint are the same
    train(load_config(TINY, options(broken)))
    steps = {}
    for folder in (straight, broken):
        keys = ("step", "loss", "gradient_norm", "tokens")
        steps[folder] = [[line[key] for key in keys] for line in lines_of_log(folder)]
    assert steps[broken] == steps[straight], f"killed at step {step}"
    for name in ("model.safetensors", "optimizer.pt"):
        path = Path("checkpoints", "step-00000014", name)
        assert (broken / path).read_bytes() == (straight / path).read_bytes(), name


def test_going_back_does_not_overwrite_what_came_after(make_config, tmp_path):
    options = ("run.max_steps=4", "run.checkpoint_every=2", "run.keep_checkpoints=2")
    train(make_config(*options))
    first = tmp_path / "run" / "checkpoints" / "step-00000002"
    with pytest.raises(UserError, match="not the last checkpoint"):
        train(make_config(*options, f"run.resume={first}"))
    with pytest.raises(UserError, match=r"set run\.seed=0"):
        train(make_config(*options, "run.resume=auto", "run.seed=1"))
    with pytest.raises(UserError, match=r"set run\.optimizer=muon"):
        train(make_config(*options, "run.resume=auto", "run.optimizer=adamw"))
    train(make_config(*options, f"run.resume={first}", f"run.output_dir={tmp_path / 'other'}"))
    assert [line["step"] for line in lines_of_log(tmp_path / "other")] == [3, 4]


def test_another_validation_metric_finds_a_best_step_of_its_own(make_config, tmp_path):
    options = ("run.validate_every=2", "run.validation_images=2", "run.resume=auto")
    train(make_config(*options, "run.max_steps=2", "run.validation_metric=answer/cider"))
    progress = load_progress(find_checkpoint(tmp_path / "run"))
    assert progress.best_step == 2

    # A CIDEr that no cIoU reaches, in a checkpoint that is still complete
    file = tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json"
    text = file.read_text().replace(f'"best_score": {progress.best_score}', '"best_score": 9.5')
    assert "9.5" in text
    file.write_text(text)
    manifest = file.with_name(MANIFEST)
    sizes = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**sizes, "state.json": len(text)}))

    train(make_config(*options, "run.max_steps=4", "run.validation_metric=grounding/ciou"))
    progress = load_progress(find_checkpoint(tmp_path / "run"))
    assert progress.best_step == 4
    assert progress.best_score <= 1


# Locks the folder that it is given until its input is closed
HOLD_LOCK = """
import sys
from pathlib import Path
from annexe.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_folder_that_is_being_trained_into_is_left_alone(make_config, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-c", HOLD_LOCK, run]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **streams) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"is being written to by process {holder.pid}"):
            train(make_config("run.resume=auto"))
        holder.stdin.close()
    assert [path.name for path in run.iterdir()] == [".lock"]


def test_wandb_works_offline_without_an_account(make_config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(make_config("run.max_steps=2", "run.wandb.enabled=true", "run.wandb.mode=offline"))
    assert list((tmp_path / "run").glob("wandb/offline-run-*"))


def test_the_resolved_configuration_is_saved_and_loads_again(make_config, tmp_path):
    train(make_config("run.max_steps=1", "run.warmup_steps=0"))
    saved = load_config(tmp_path / "run" / "config.yaml")
    assert saved.run.max_steps == 1 and saved.run.batch_size == 2
