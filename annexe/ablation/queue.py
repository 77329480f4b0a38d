"""Runs worked off, several at a time."""

from __future__ import annotations

import json
import os
import queue
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from rich.console import Console

from annexe.ablation.rows import TRAIN, Run, Stage
from annexe.checkpoints.run_folder import find_checkpoint, load_progress
from annexe.errors import UserError
from annexe.files import write_json


def devices(asked: list[int] | None) -> list[str | None]:
    """Values of CUDA_VISIBLE_DEVICES to start runs with; [None] is the CPU."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    there = named.split(",")[:count] if named else [str(number) for number in range(count)]
    for number in asked or ():
        if not 0 <= number < count:
            raise UserError(
                f"--gpus {number}: this machine has {count} CUDA devices; name those, or leave --gpus out"
            )
    return [
        there[number] for number in (range(count) if asked is None else dict.fromkeys(asked))
    ] or [None]


def work_off(
    groups: list[list[Run]],
    slots: list[str | None],
    console: Console,
    after_each: Callable[[], None],
) -> list[str]:
    """Do what is missing of groups with one training each, one a slot at a time; gives the runs that failed."""
    missing = [[each for each in group if not each.metrics.is_file()] for group in groups]
    total, left, failed = sum(map(len, groups)), sum(map(len, missing)), []
    if left < total:
        console.print(f"{total - left} of {total} runs are finished already")
    children: list[subprocess.Popen] = []
    free = queue.SimpleQueue()
    for slot in slots:
        free.put(slot)

    def work(group: list[Run]) -> list[tuple[Run, Path | None]]:
        gpu, training = free.get(), group[0].training
        try:
            checkpoint = find_checkpoint(training.folder)
            is_trained = (
                checkpoint is not None and load_progress(checkpoint).step >= group[0].max_steps
            )
            lost = None if is_trained else execute(training, gpu, children)
            return [(each, lost or execute(each.evaluation, gpu, children)) for each in group]
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(len(slots)) as pool:
        futures = [pool.submit(work, group) for group in missing if group]
        try:
            for future in as_completed(futures):
                for each, output in future.result():
                    left, name = left - 1, f"{each.row}, seed {each.seed}"
                    told = f"is finished: '{each.metrics.parent / 'report.html'}'"
                    if output is not None:
                        failed.append(name)
                        lines = output.read_text(errors="replace").splitlines()[-12:]
                        told = "\n    ".join([f"FAILED; '{output}' ends:", *lines])
                    console.print(f"{total - left} of {total}: {name} {told}")
                after_each()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(
                future.done() for future in futures
            ):  # one may just be starting its next child
                for child in children:
                    child.terminate()
                time.sleep(0.1)
            raise
    return failed


def execute(stage: Stage, gpu: str | None, children: list[subprocess.Popen]) -> Path | None:
    """Run a stage's command as a further child; gives the file of its output where it failed."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    write_json(stage.folder / "ablation.json", stage.made_from)
    cache = stage.folder / "cache"
    if stage.command[1] == TRAIN and not os.path.lexists(cache):
        cache.symlink_to(
            Path("..", "..", "cache")
        )  # resized pixels, which keep data roots and sizes apart themselves
    path, command = stage.folder / "output.txt", [sys.executable, *stage.command[1:]]
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    with path.open("a") as output:
        output.write(f"$ {shlex.join(stage.command)}\n")
        output.flush()
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        child = subprocess.Popen(command, env=environment, **streams)
    children.append(child)
    return None if child.wait() == 0 else path


def _took(log: Path) -> tuple[float, float]:
    """Minutes and highest GPU memory of a training, over all of its starts."""
    text = log.read_text() if log.is_file() else ""
    lines = [line for line in map(json.loads, text.splitlines()) if line["kind"] == "train"]
    before = [0, *(line["images"] for line in lines)]
    seconds = [
        (line["images"] - n) / line["images_per_second"]
        for line, n in zip(lines, before, strict=False)
    ]
    return sum(seconds) / 60, max((line.get("gpu_memory", 0) for line in lines), default=0)
