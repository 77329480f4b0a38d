"""Several nodes, each with a torchrun of its own, do what one process does."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from annexe.build import load_config
from annexe.config import device_settings
from annexe.distributed import (
    agree_on_attempt,
    make_accelerator,
    require_same_settings,
    require_shared,
)
from annexe.errors import UserError
from annexe.evaluator import evaluate
from annexe.trainer import set_up, train
from tests.conftest import ROOT, SMALLEST, TINY
from tests.test_distributed import run_distributed
from tests.test_predict import annexe
from tests.test_training import lines_of_log

# What each process runs one after the other: scripts and modules with their command lines
COMMANDS = """\
import json, runpy, sys
for words in json.load(open(sys.argv[1])):
    sys.argv = words[1:] if words[0] == "-m" else words
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__")
    else:
        runpy.run_path(words[0], run_name="__main__")
"""


class Node:
    """One of two nodes: a torchrun with one process."""

    def __init__(self, printed: Path, endpoint: str, is_host: bool, *words: Path) -> None:
        """Start it at once.

        Args:
            printed: file that takes what the torchrun and its process print.
            endpoint: where the nodes meet.
            is_host: whether that is at this node.
            words: what each process runs.
        """
        self._printed = printed
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        torchrun += ["--nproc_per_node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
        torchrun += ["--rdzv-id", "annexe", "--rdzv-endpoint", endpoint, "--rdzv-conf"]
        torchrun += [f"is_host={int(is_host)},keep_alive_interval=1", *map(str, words)]
        with printed.open("w") as file:
            self.agent = subprocess.Popen(torchrun, stdout=file, stderr=subprocess.STDOUT)

    def printed(self) -> str:
        """All that was printed so far."""
        return self._printed.read_text()


@pytest.mark.slow
def test_a_node_is_lost_and_comes_back(scenes, tmp_path, monkeypatch, capsys):
    """Training, evaluation and prediction by two nodes, of which one is killed."""
    data = f"datasets.ego_irgbench.data_root={scenes}"
    photos = sorted((scenes / "RGB").iterdir())[:5]

    def training(folder: Path, batch_size: int) -> list[str]:
        own = [data, f"run.output_dir={folder}", f"run.batch_size={batch_size}"]
        return [*SMALLEST, *own, "run.max_steps=16", "run.checkpoint_every=5", "run.resume=auto"]

    def evaluation(folder: Path) -> list[str]:
        own = [data, f"run.checkpoint={tmp_path / 'two'}", f"run.output_dir={folder}"]
        return [*own, "run.device=cpu", "run.num_workers=0", "run.batch_size=1", "run.report=false"]

    def predicting(folder: Path) -> list[str]:
        given = ["predict", str(tmp_path / "two"), *map(str, photos), "--ask", "Where is the mug?"]
        return [*given, "--out", str(folder), "--batch-size", "1", "--save", "jsonl"]

    # Two nodes, the second of which is killed between two checkpoints and started again
    commands = tmp_path / "commands.json"
    train_words = [str(ROOT / "train.py"), "--cfg-path", str(TINY)]
    eval_words = [str(ROOT / "eval_scripts" / "eval_egoirgbench.py"), "--cfg-path"]
    eval_words += [str(ROOT / "eval_configs" / "annexe_tiny.yaml")]
    jobs = [
        [*train_words, "--options", *training(tmp_path / "two", 1)],
        [*eval_words, "--options", *evaluation(tmp_path / "two-scores")],
        ["-m", "annexe", *predicting(tmp_path / "two-answers")],
    ]
    commands.write_text(json.dumps(jobs))
    script = tmp_path / "commands.py"
    script.write_text(COMMANDS)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = [Node(tmp_path / "node-0.txt", endpoint, True, script, commands)]
    nodes.append(Node(tmp_path / "node-1.txt", endpoint, False, script, commands))
    log = tmp_path / "two" / "log.jsonl"
    try:
        while nodes[0].agent.poll() is None and not (
            log.exists() and log.read_text().count("\n") > 6
        ):
            time.sleep(0.01)
        (left_behind,) = psutil.Process(nodes[1].agent.pid).children()
        nodes[1].agent.kill()
        nodes[1].agent.wait()
        psutil.wait_procs([left_behind], timeout=20)
        assert not left_behind.is_running()  # with its torchrun
        nodes[1] = Node(tmp_path / "node-1-again.txt", endpoint, False, script, commands)
        for node in nodes:
            assert node.agent.wait(300) == 0, node.printed()
    finally:
        for node in nodes:
            node.agent.kill()
    first = nodes[0].printed()
    assert "has lost another one" in first and "Traceback" not in first
    assert re.search(r"step (5|10) of 16", first + nodes[1].printed())

    # The same samples and losses as one process
    train(load_config(TINY, training(tmp_path / "one", 2)))
    one = lines_of_log(tmp_path / "one")
    two = lines_of_log(tmp_path / "two")
    assert len(one) == len(two) == 16
    for key in ("step", "images", "queries", "tokens"):
        assert [line[key] for line in two] == [line[key] for line in one]
    losses = [line["loss"] for line in one]
    assert [line["loss"] for line in two] == pytest.approx(losses, rel=1e-4)

    # The same files of what they trained
    evaluate(load_config(eval_words[-1], evaluation(tmp_path / "one-scores")))
    annexe(monkeypatch, *predicting(tmp_path / "one-answers"))
    for name in ("scores/predictions.jsonl", "scores/metrics.json", "answers/predictions.jsonl"):
        expected = (tmp_path / f"one-{name}").read_bytes()
        assert (tmp_path / f"two-{name}").read_bytes() == expected


def test_processes_agree_without_those_that_died():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def join(rank: int, seconds: float = 20) -> str:
        store = dist.TCPStore("127.0.0.1", server.port, is_master=False)
        return agree_on_attempt(store, rank, 3, timedelta(seconds=seconds))

    with ThreadPoolExecutor() as pool:
        # Two processes write that they are there and give up, since there is no third one
        for died in [pool.submit(join, rank, 0.2) for rank in (0, 1)]:
            with pytest.raises(dist.DistStoreError, match="not all of 3 processes"):
                died.result()

        # All come, in any order; then all come again
        for order in ((2, 1, 0), (0, 1, 2)):
            joined = []
            for rank in order:
                joined.append(pool.submit(join, rank))
                time.sleep(0.1)
            assert len({process.result() for process in joined}) == 1


def refuse_to_differ(config, folder: Path) -> None:
    """Two nodes without a common folder, then with other settings."""
    rank = int(os.environ["RANK"])
    own = folder / f"node-{rank}"
    own.mkdir()
    os.chdir(own)
    accelerator = make_accelerator(**device_settings(config.run))
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    with pytest.raises(UserError, match="process 1 of 2 does not see 'runs'"):
        require_shared(accelerator, Path("runs"), "run.output_dir")
    require_shared(accelerator, folder, "run.output_dir")
    if rank == 0:  # which removes what it wrote
        assert sorted(path.name for path in folder.iterdir()) == ["node-0", "node-1"]

    settings = {"run.max_steps": 7, "datasets.ego.data_root": f"/node-{rank}/data"}
    require_same_settings(accelerator, settings)
    settings["run.max_steps"] += rank
    message = "process 1 has run.max_steps=8, and the main process 7"
    with pytest.raises(UserError, match=message):
        require_same_settings(accelerator, settings)


def count_exchanges(config, path: Path) -> None:
    """A step of three micro-batches."""
    trainer = set_up(config)
    micro_batches = list(trainer.batches(trainer.progress))[:3]
    with CommDebugMode() as counted:
        trainer.train_step(micro_batches)
    names = {str(name): count for name, count in counted.get_comm_counts().items()}
    if os.environ["RANK"] == "1":
        path.write_text(json.dumps(names))


@pytest.mark.slow
def test_nodes_are_refused_and_gradients_exchanged_once(make_config, tmp_path):
    (tmp_path / "nodes").mkdir()
    run_distributed(refuse_to_differ, make_config(), tmp_path / "nodes")
    options = ("run.gradient_accumulation=3", "run.batch_size=1", "run.max_steps=1")
    run_distributed(
        count_exchanges, make_config(*options, "run.warmup_steps=0"), tmp_path / "c.json"
    )
    # Units of losses before the passes, gradients behind the last one
    assert json.loads((tmp_path / "c.json").read_text()) == {"c10d.allreduce_": 2}
