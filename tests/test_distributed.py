"""Two gloo processes do what one does: the same gradients, the same evaluation files."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from annexe.build import load_config
from annexe.distributed import SharedGradients
from annexe.evaluator import evaluate
from annexe.trainer import train
from tests.conftest import ROOT, SMALLEST, TINY, assert_same_but_for_rounding
from tests.forked import run_together
from tests.test_training import COMPARABLE, gradients_of_first_step, lines_of_log

pytestmark = pytest.mark.slow  # every test starts processes


def in_process(rank: int, world_size: int, port: int, work, arguments: tuple) -> None:
    """What each spawned process runs; the environment is torchrun's."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    work(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_distributed(work, *arguments, world_size: int = 2) -> None:
    """Run ``work(*arguments)`` in ``world_size`` processes; a failure in any fails."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    run_together(in_process, (world_size, port, work, arguments), world_size)


def save_gradients(config, path: Path) -> None:
    gradients = gradients_of_first_step(config)
    if os.environ["RANK"] == "0":
        torch.save(gradients, path)


def test_gradients_equal_those_of_one_process(make_config, tmp_path):
    one = make_config(*COMPARABLE, "run.batch_size=4", f"run.output_dir={tmp_path / 'one'}")
    two = make_config(*COMPARABLE, "run.batch_size=2", f"run.output_dir={tmp_path / 'two'}")
    expected = gradients_of_first_step(one)
    run_distributed(save_gradients, two, tmp_path / "gradients.pt")
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert_same_but_for_rounding(gradients, expected)


@pytest.fixture
def trained_by_two(make_config, tmp_path) -> Path:
    """A run of two steps by two processes, validation included."""
    folder = tmp_path / "trained"
    config = make_config(
        "run.max_steps=2",
        "run.validate_every=2",
        "run.validation_images=3",
        f"run.output_dir={folder}",
    )
    run_distributed(train, config)
    return folder


def test_evaluation_files_equal_those_of_one_process(trained_by_two, make_config, tmp_path):
    """Five images in batches of two: sizes that do not divide, so padding or repeats would show."""
    # Only one rank writes the log
    lines = (trained_by_two / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 2]

    for name in ("one", "two"):
        config = make_config(
            f"run.checkpoint={trained_by_two}",
            f"run.output_dir={tmp_path / name}",
            "run.batch_size=2",
        )
        if name == "one":
            evaluate(config)
        else:
            run_distributed(evaluate, config)
    for name in ("predictions.jsonl", "metrics.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    # Every image and question once
    lines = (tmp_path / "two" / "predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    keys = [(r["image"], r["annotation"], r["query_id"]) for r in records if r["kind"] == "query"]
    assert len(keys) == len(set(keys))
    assert sum(record["kind"] == "image" for record in records) == 5
    files = {path.name for path in (tmp_path / "two").iterdir()}
    results = {"metrics.json", "timing.json", "predictions.jsonl", "report", "report.html"}
    assert files == results | {".lock"}


FSDP = (
    "run.parallel=fsdp",
    "run.optimizer=adamw",
    "model.language_model.lora.rank=4",
    "model.language_model.lora.dropout=0",
)


def test_fsdp_trains_validates_and_resumes_as_one_process_does(make_config, tmp_path):
    """Weights sharded, generation in the middle, checkpoints that any number of processes reads."""

    def config(name, batch_size, *options):
        return make_config(
            *FSDP,
            f"run.batch_size={batch_size}",
            f"run.output_dir={tmp_path / name}",
            "run.max_steps=4",
            "run.checkpoint_every=2",
            "run.validate_every=2",
            "run.validation_images=3",
            *options,
        )

    # One process and two, then both from the middle of the two's run
    train(config("one", 4))
    run_distributed(train, config("two", 1, "run.gradient_accumulation=2"))
    halfway = tmp_path / "two" / "checkpoints" / "step-00000002"
    train(config("after", 4, f"run.resume={halfway}"))
    run_distributed(train, config("again", 2, f"run.resume={halfway}"))

    losses = {}
    for name in ("one", "two", "after", "again"):
        losses[name] = [line["loss"] for line in lines_of_log(tmp_path / name)]
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)
    assert losses["after"] == pytest.approx(losses["one"][2:], rel=1e-4)
    assert losses["again"] == pytest.approx(losses["one"][2:], rel=1e-4)
    validations = lines_of_log(tmp_path / "two", "validation")
    assert [line["step"] for line in validations] == [2, 4]

    weights = {}
    for name in ("one", "two"):
        folder = tmp_path / name / "checkpoints" / "step-00000004"
        weights[name] = load_file(folder / "model.safetensors")
    assert_same_but_for_rounding(weights["two"], weights["one"], atol=2e-4)


def test_a_killed_rank_ends_the_job_and_a_restart_goes_on(scenes, tmp_path):
    """torchrun with one restart, whose store still has the keys of the group that died."""

    def options(folder):
        return [
            *SMALLEST,
            f"datasets.ego_irgbench.data_root={scenes}",
            f"run.output_dir={folder}",
            "run.max_steps=30",
            "run.checkpoint_every=5",
            "run.resume=auto",
            "run.batch_size=1",
        ]

    # A run to compare with
    straight = tmp_path / "straight"
    run_distributed(train, load_config(TINY, options(straight)))

    # Another one, of which a rank is killed between two checkpoints
    broken = tmp_path / "broken"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node", "2", "--max-restarts", "1", str(ROOT / "train.py")]
    agent = subprocess.Popen(
        [*torchrun, "--cfg-path", str(TINY), "--options", *options(broken)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    log = broken / "log.jsonl"
    while agent.poll() is None and not (log.exists() and log.read_text().count("\n") >= 8):
        time.sleep(0.01)
    list_children = ["ps", "-o", "pid=", "--ppid", str(agent.pid)]
    children = subprocess.run(list_children, capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    output = agent.communicate()[0].decode()
    assert agent.returncode == 0, output[-2000:]
    assert re.search(r"step (5|10|15|20|25) of 30", output), "it did not go on from a checkpoint"
    losses = [[line["loss"] for line in lines_of_log(folder)] for folder in (straight, broken)]
    assert len(losses[0]) == 30
    assert losses[1] == losses[0]


def sum_gradients(path: Path) -> None:
    """Gradients of both ranks, which find them summed; one parameter is laid out channels-last."""
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    convolution = torch.nn.Conv2d(3, 5, 2).to(memory_format=torch.channels_last)
    linear = torch.nn.Linear(4, 2).double()
    parameters = [*convolution.parameters(), *linear.parameters()]
    shared = SharedGradients(parameters)
    for _ in range(2):  # two passes of a step
        for index, parameter in enumerate(parameters):
            factor = torch.arange(parameter.numel()).reshape(parameter.shape)
            (parameter * factor * (index + 1) * (rank + 1)).sum().backward()
    shared.sum_over_ranks()
    if rank == 1:
        torch.save([parameter.grad for parameter in parameters], path)


def test_gradients_are_summed_where_they_lie(tmp_path: Path):
    run_distributed(sum_gradients, tmp_path / "gradients.pt")
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert gradients[0].is_contiguous(memory_format=torch.channels_last)
    for index, gradient in enumerate(gradients):
        factor = torch.arange(gradient.numel()).reshape(gradient.shape)
        assert torch.equal(gradient, (2 * (1 + 2) * (index + 1) * factor).to(gradient.dtype))


def test_training_and_evaluation_start_without_warnings(scenes: Path, tmp_path: Path):
    """With adapters and recomputed activations, by two processes and by one."""
    folder = tmp_path / "run"
    data = f"datasets.ego_irgbench.data_root={scenes}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    train_options = [
        *SMALLEST,
        data,
        f"run.output_dir={folder}",
        "run.max_steps=2",
        "model.language_model.lora.rank=4",
        "model.language_model.checkpointed_blocks=1",
    ]
    training = [*torchrun, "2", "train.py", "--cfg-path", str(TINY), "--options", *train_options]
    evaluation = [*torchrun, "1", "eval_scripts/eval_egoirgbench.py", "--cfg-path"]
    evaluation += ["eval_configs/annexe_tiny.yaml", "--options", data, f"run.checkpoint={folder}"]
    evaluation += [f"run.output_dir={tmp_path / 'eval'}", "run.device=cpu", "run.num_workers=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    for command in (training, evaluation):
        ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert ended.returncode == 0, ended.stderr
        assert "Warning" not in ended.stderr + ended.stdout
        records = [line for line in ended.stdout.splitlines() if " INFO " in line]
        assert records and all(re.match(r"\d{4}-\d\d-\d\d ", line) for line in records)
        if command is training:
            assert f"2 process(es) on cpu:0, under '{folder}'" in records[0]  # in one line
