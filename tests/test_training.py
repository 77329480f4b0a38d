"""Training as users run it: it learns, it accumulates exactly, it survives a kill, it validates, it keeps records."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from annexe.build import load_config
from annexe.checkpoints.run_folder import MANIFEST, find_checkpoint, is_complete, load_progress
from annexe.datasets.sampler import sample_order
from annexe.errors import UserError
from annexe.trainer import Trainer, train
from annexe.training.optimizer import Muon, build_optimizer, learning_rate, orthogonal
from tests.conftest import ROOT, SMALLEST, TINY, assert_same_but_for_rounding


def log_of(folder, kind="train"):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_it_learns_validates_and_keeps_records(make_config, tmp_path):
    config = make_config(
        "run.max_steps=24", "run.validate_every=12", "run.validation_images=2", "run.learning_rate=3e-3",
        "run.checkpoint_every=4", "run.keep_checkpoints=2",
    )  # fmt: skip
    train(config)
    run = tmp_path / "run"
    lines = log_of(run)
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert sum(x["loss"] for x in lines[-4:]) < 0.8 * sum(x["loss"] for x in lines[:4])
    assert {
        f"loss/{name}" for name in ("analysis", "answer", "depth", "presence", "mask", "dice")
    } <= set(lines[0])
    assert (
        lines[-1]["images"] == 48
        and lines[-1]["epoch"] == 4.0
        and lines[-1]["tokens"] > lines[-1]["queries"] > 48
    )
    validations = log_of(run, "validation")
    assert [v["step"] for v in validations] == [12, 24]
    assert {"grounding/ciou", "analysis/cider", "answer/exact_match", "depth/mae"} <= set(
        validations[0]
    )
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    best = find_checkpoint(run, "best")
    assert set(kept) == {"step-00000020", "step-00000024", best.name} and best.name in {
        "step-00000012",
        "step-00000024",
    }
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["progress"]["images"] == 48 and len(manifest["data_fingerprint"]) == 64
    assert torch.__version__.startswith(manifest["packages"]["torch"])
    assert manifest["config"]["run"]["max_steps"] == 24


def gradients(config) -> dict[str, torch.Tensor]:
    """Gradients of the first step, as they reach the optimizer."""
    trainer = Trainer(config)
    taken = {}
    trainer.optimizer.step = lambda: taken.update(
        {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    )
    batches = iter(trainer._loader())
    trainer.train_step([next(batches) for _ in range(config.run.gradient_accumulation)])
    return taken


FREE = (
    "run.clip_norm=1e9",
    "model.language_model.lora.rank=4",
    "model.language_model.lora.dropout=0",
)


def test_accumulation_equals_one_large_batch(make_config, tmp_path):
    whole = gradients(make_config(*FREE, "run.batch_size=4", f"run.output_dir={tmp_path / 'a'}"))
    split = gradients(
        make_config(
            *FREE,
            "run.batch_size=1",
            "run.gradient_accumulation=4",
            f"run.output_dir={tmp_path / 'b'}",
        )
    )
    assert_same_but_for_rounding(split, whole)


def test_a_recipe_for_a_gpu_says_so_on_a_cpu(make_config, caplog, monkeypatch):
    config = make_config("run.validate_every=0")
    trainer = Trainer(config)
    trainer._announce()
    assert "no GPU" not in caplog.text
    monkeypatch.setattr("annexe.trainer._MUCH_FOR_A_CPU", 1e3)
    trainer._announce()
    assert "no GPU is in use" in caplog.text and "annexe_tiny.yaml" in caplog.text


def test_every_epoch_is_a_permutation_of_its_own():
    order = sample_order(seed=1, num_images=5, first=0, last=10)
    assert [epoch for epoch, _ in order] == [0] * 5 + [1] * 5
    first, second = [i for _, i in order[:5]], [i for _, i in order[5:]]
    assert sorted(first) == sorted(second) == list(range(5)) and first != second
    assert sample_order(1, 5, 3, 8) == order[3:8]


def test_learning_rate_warms_up_and_falls(make_config):
    run = make_config("run.max_steps=100", "run.warmup_steps=10").run
    rates = [learning_rate(step, run) for step in range(101)]
    assert rates[0] == run.warmup_learning_rate and rates[10] == run.learning_rate == max(rates)
    assert rates[100] == pytest.approx(run.min_learning_rate) and rates[10:] == sorted(
        rates[10:], reverse=True
    )


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8)])
def test_orthogonalised_matrices_keep_their_singular_vectors(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    diagonal = left.mT @ orthogonal(matrices) @ right.mT
    values = diagonal.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6 and values.max() < 1.25
    torch.testing.assert_close(diagonal, torch.diag_embed(values), atol=1e-5, rtol=0)


def test_muon_moves_as_that_of_torch_does_and_the_rest_as_adamw():
    """PyTorch's takes matrix by matrix, no convolutions, and orthogonalises in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 20), (20, 8), (8, 20), (6, 4, 3, 3)]
    weights, vector = [torch.randn(shape, generator=generator) for shape in shapes], torch.ones(5)
    ours = [nn.Parameter(each.clone()) for each in (*weights, vector)]
    theirs = [nn.Parameter(each.flatten(1).clone()) for each in weights] + [
        nn.Parameter(vector.clone())
    ]
    rate = {"lr": 0.1, "weight_decay": 0.05}
    muon = Muon(
        [{"params": ours[4:]}, {"params": ours[:4], "orthogonal": True}], **rate, fused=True
    )
    others = [
        torch.optim.Muon(theirs[:4], **rate, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(theirs[4:], **rate, fused=True),
    ]
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.view_as(other).clone()
        for optimizer in (muon, *others):
            optimizer.step()
    for one, other, before in zip(ours[:4], theirs[:4], weights, strict=True):
        assert (one.view_as(other) - other).norm() < 0.02 * (one - before).norm()
    assert torch.equal(ours[4], theirs[4]) and not torch.equal(ours[4], vector)


def test_muon_takes_the_weights_of_layers(make_parts, make_config):
    model = make_parts()[0]
    groups = build_optimizer(model, make_config("run.optimizer=muon").run).param_groups
    names = {p: name for name, p in model.named_parameters()}
    moved, rest = (
        [names[p] for group in own for p in group["params"]] for own in (groups[2:], groups[:2])
    )
    assert sorted(moved + rest) == sorted(
        name for name, p in model.named_parameters() if p.requires_grad
    )
    embeddings = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    of_words = {
        name for name in names.values() if name in embeddings or name.endswith("lm_head.weight")
    }
    assert of_words <= {*rest} and all(name.endswith(".weight") for name in moved)
    assert {
        name for name in rest if name.endswith(".weight") and model.get_parameter(name).ndim > 1
    } == of_words


def test_killed_at_a_random_step_it_resumes_bit_for_bit(scenes, tmp_path):
    """With LoRA dropout on, so that the random state matters; also a checkpoint cut short is passed over."""

    def command(folder):
        options = [
            *SMALLEST, f"datasets.ego_irgbench.data_root={scenes}", f"run.output_dir={folder}", "run.max_steps=14",
            "run.checkpoint_every=3", "run.resume=auto", "model.language_model.lora.rank=4",
            "model.language_model.lora.dropout=0.2",
        ]  # fmt: skip
        return [
            sys.executable,
            str(ROOT / "train.py"),
            "--cfg-path",
            str(TINY),
            "--options",
            *options,
        ]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    subprocess.run(command(straight), check=True, env=environment, capture_output=True)
    step = random.SystemRandom().randrange(4, 13)
    process = subprocess.Popen(
        command(broken), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = broken / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= step):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    last = find_checkpoint(broken)
    torn = last.with_name("step-00000099")
    torn.mkdir()
    for path in last.iterdir():
        if path.is_file():
            (torn / path.name).write_bytes(path.read_bytes())
    (torn / "optimizer.pt").write_bytes((last / "optimizer.pt").read_bytes()[:-100])
    assert not is_complete(torn) and find_checkpoint(broken) == last
    subprocess.run(command(broken), check=True, env=environment, capture_output=True)
    keys = ("step", "loss", "gradient_norm", "tokens")
    expected = [[line[key] for key in keys] for line in log_of(straight)]
    assert [[line[key] for key in keys] for line in log_of(broken)] == expected, (
        f"killed at step {step}"
    )
    for name in ("model.safetensors", "optimizer.pt"):
        written = [
            (folder / "checkpoints" / "step-00000014" / name).read_bytes()
            for folder in (straight, broken)
        ]
        assert written[0] == written[1], name


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
    assert [line["step"] for line in log_of(tmp_path / "other")] == [3, 4]


def test_another_validation_metric_finds_a_best_step_of_its_own(make_config, tmp_path):
    options = ("run.validate_every=2", "run.validation_images=2", "run.resume=auto")
    train(make_config(*options, "run.max_steps=2", "run.validation_metric=answer/cider"))
    progress = load_progress(find_checkpoint(tmp_path / "run"))
    assert progress.best_step == 2
    file = tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json"
    text = file.read_text().replace(f'"best_score": {progress.best_score}', '"best_score": 9.5')
    assert "9.5" in text
    file.write_text(text)  # a CIDEr that no cIoU reaches
    sizes = file.with_name(MANIFEST)
    sizes.write_text(json.dumps(json.loads(sizes.read_text()) | {"state.json": len(text)}))
    train(make_config(*options, "run.max_steps=4", "run.validation_metric=grounding/ciou"))
    progress = load_progress(find_checkpoint(tmp_path / "run"))
    assert progress.best_step == 4 and progress.best_score <= 1


def test_a_folder_that_is_being_trained_into_is_left_alone(make_config, tmp_path):
    hold = "import sys; from pathlib import Path; from annexe.files import locked\n"
    hold += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path / "run"], cwd=ROOT, **streams
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"is being written to by process {holder.pid}"):
            train(make_config("run.resume=auto"))
        holder.stdin.close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_wandb_works_offline_without_an_account(make_config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(make_config("run.max_steps=2", "run.wandb.enabled=true", "run.wandb.mode=offline"))
    assert list((tmp_path / "run").glob("wandb/offline-run-*"))


def test_the_resolved_configuration_is_saved_and_loads_again(make_config, tmp_path):
    train(make_config("run.max_steps=1", "run.warmup_steps=0"))
    saved = load_config(tmp_path / "run" / "config.yaml")
    assert saved.run.max_steps == 1 and saved.run.batch_size == 2
