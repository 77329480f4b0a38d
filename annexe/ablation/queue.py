"""Runs the trainings and evaluations of an ablation as child processes, several at a time."""

from __future__ import annotations

import os
import queue
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from annexe import terminal
from annexe.ablation.rows import TRAIN, Run, Stage
from annexe.checkpoints.run_folder import find_checkpoint, load_progress
from annexe.errors import UserError
from annexe.files import write_json

Job = list[Run]  # runs that share a training
Slot = str | None  # value of CUDA_VISIBLE_DEVICES; None is the CPU

_SHOWN_LINES = 12  # of the output of a run that failed


def jobs_of(runs: list[Run]) -> list[Job]:
    """Runs grouped by the training that they share, in the order of the first of each."""
    jobs: dict[Path, Job] = {}
    for run in runs:
        jobs.setdefault(run.training.folder, []).append(run)
    return list(jobs.values())


def devices(chosen: list[int] | None) -> list[Slot]:
    """A slot for each GPU, or one for the CPU where there is none.

    Args:
        chosen: indices of the GPUs to use (default: all).

    Raises:
        UserError: for an index that this machine does not have.
    """
    count = torch.cuda.device_count()
    for index in chosen or ():
        if not 0 <= index < count:
            raise UserError(
                f"--gpus {index}: this machine has {count} CUDA devices; "
                "name those, or leave --gpus out"
            )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    indices = range(count) if chosen is None else dict.fromkeys(chosen)
    return [names[index] for index in indices] or [None]


def run_all(jobs: list[Job], slots: list[Slot], after_each: Callable[[], None]) -> list[str]:
    """Run what is missing of all jobs, one a slot at a time.

    A run that fails stops no other. An interrupt ends all children.

    Args:
        after_each: called when a job is done.

    Returns:
        The names of the runs that failed.
    """
    # What an earlier call finished is not run again
    missing = [[run for run in job if not run.metrics.is_file()] for job in jobs]
    num_runs = sum(map(len, jobs))
    num_done = num_runs - sum(map(len, missing))
    if num_done:
        terminal.say(f"{num_done} of {num_runs} runs are finished already")

    children: list[subprocess.Popen] = []
    free_slots: queue.SimpleQueue[Slot] = queue.SimpleQueue()
    for slot in slots:
        free_slots.put(slot)

    def run_in_free_slot(job: Job) -> list[tuple[Run, Path | None]]:
        slot = free_slots.get()
        try:
            return run_job(job, slot, children)
        finally:
            free_slots.put(slot)

    # Threads wait for the children; this one reports
    failed: list[str] = []
    with ThreadPoolExecutor(len(slots)) as pool:
        futures = [pool.submit(run_in_free_slot, job) for job in missing if job]
        try:
            for future in as_completed(futures):
                for run, output in future.result():
                    num_done += 1
                    if output is not None:
                        failed.append(run.name)
                    terminal.say(f"{num_done} of {num_runs}: {_outcome(run, output)}")
                after_each()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            _terminate(children, futures)
            raise
    return failed


def run_job(
    job: Job, slot: Slot, children: list[subprocess.Popen]
) -> list[tuple[Run, Path | None]]:
    """Train, if that is not done yet, then evaluate every run.

    Returns:
        Each run with the file of its output where it failed.
    """
    training = job[0].training
    checkpoint = find_checkpoint(training.folder)
    is_trained = checkpoint is not None and load_progress(checkpoint).step >= job[0].max_steps
    failure = None if is_trained else execute(training, slot, children)
    return [(run, failure or execute(run.evaluation, slot, children)) for run in job]


def execute(stage: Stage, slot: Slot, children: list[subprocess.Popen]) -> Path | None:
    """Run a stage's command as a further child.

    Returns:
        The file of its output where it failed.
    """
    # Its folder, with what it is made from
    stage.folder.mkdir(parents=True, exist_ok=True)
    write_json(stage.folder / "ablation.json", stage.made_from)

    # All trainings share resized pixels, which are stored by data root and size
    cache = stage.folder / "cache"
    if stage.command[1] == TRAIN and not os.path.lexists(cache):
        cache.symlink_to(Path("..", "..", "cache"))

    # The child
    environment = dict(os.environ)
    if slot is not None:
        environment["CUDA_VISIBLE_DEVICES"] = slot
    path = stage.folder / "output.txt"
    with path.open("a") as output:
        output.write(f"$ {shlex.join(stage.command)}\n")
        output.flush()
        child = subprocess.Popen(
            [sys.executable, *stage.command[1:]],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    children.append(child)
    return None if child.wait() == 0 else path


def _outcome(run: Run, output: Path | None) -> str:
    """A line on a run that is finished, or the end of its output where it failed."""
    if output is None:
        return f"{run.name} is finished: '{run.metrics.parent / 'report.html'}'"
    lines = output.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
    return "\n    ".join([f"{run.name} FAILED; '{output}' ends:", *lines])


def _terminate(children: list[subprocess.Popen], futures: list[Future]) -> None:
    """End all children, and those that are started meanwhile."""
    while not all(future.done() for future in futures):
        for child in children:
            child.terminate()
        time.sleep(0.1)
