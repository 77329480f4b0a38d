"""`annexe ablate`: train and evaluate every row of an ablation, and put all of them into one table."""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from annexe.ablation import EVALUATE, TRAIN, Ablation, Run, markdown, read_ablation, runs_of, summary
from annexe.errors import UserError, unknown
from annexe.files import write_text

HELP = "train and evaluate every row of an ablation, and write one table"
_NUM_LINES = 12  # shown of the log of a failed run

log = logging.getLogger(__name__)


class Children:
    """Processes that several threads start and wait for, and that can all be ended."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: set[subprocess.Popen] = set()
        self.stopped = False

    def run(self, command: list[str], output: Path, gpu: str | None) -> bool:
        """Run a command, its output behind what ``output`` holds; whether it succeeded.

        The child keeps a lock on ``output`` as long as it lives, so nothing else can write to its folder even after
        this process was killed.
        """
        environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        with output.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.error("'%s' is being written to by another process; wait for it or end it", output)
                return False
            file.write(f"$ {shlex.join(command)}\n")
            file.flush()
            with self.lock:
                if self.stopped:
                    return False
                process = subprocess.Popen(
                    [sys.executable, *command[1:]],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
                self.running.add(process)
        code = process.wait()
        with self.lock:
            self.running.remove(process)
        return code == 0

    def stop(self) -> None:
        """End every process and start none any more."""
        with self.lock:
            self.stopped = True
            running = list(self.running)
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="ROWS.yaml", help="configurations, metrics and rows")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where runs and table go")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these alone (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default: 0")
    parser.add_argument("--gpus", nargs="+", type=int, metavar="N", help="GPUs to use (default: all)")
    parser.add_argument("--jobs-per-gpu", type=int, default=1, metavar="N", help="at a time (default %(default)s)")
    parser.add_argument("--options", nargs="+", default=[], metavar="A.B=C", help="settings of every training")
    parser.add_argument("--evaluation-options", nargs="+", default=[], metavar="A.B=C", help="and of every evaluation")
    parser.add_argument("--dry-run", action="store_true", help="print all commands and run none")


def run(arguments: argparse.Namespace) -> None:
    for script in (TRAIN, EVALUATE):
        if not Path(script).is_file():
            raise UserError(f"there is no {script} here; change to the top folder of a checkout of annexe")
    ablation = read_ablation(arguments.file, arguments.options, arguments.evaluation_options)
    names, seeds, out = arguments.rows or list(ablation.rows), arguments.seeds, arguments.out
    for name in names:
        if name not in ablation.rows:
            raise unknown("row", name, ablation.rows)
    if min(seeds) < 0 or arguments.jobs_per_gpu < 1:
        raise UserError("--seeds takes numbers from 0 on, --jobs-per-gpu from 1 on")
    chosen = [each for name in dict.fromkeys(names) for each in runs_of(ablation, out, name, seeds)]
    chosen.sort(key=lambda each: seeds.index(each.seed))  # a first seed of every row before a second one of any
    groups = grouped(ablation, out, chosen)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    if arguments.dry_run:
        for base, runs in groups:
            for command in (base.train, *(each.evaluate for each in runs)):
                console.print(shlex.join(command))
        return
    slots = devices(arguments.gpus) * arguments.jobs_per_gpu
    require_subsets(ablation, chosen)
    for base, runs in groups:
        for each in (base, *runs):
            each.require_unchanged()
    shown = [*chosen, *others(ablation, out, chosen)]

    def write_table() -> None:
        record = summary(ablation, shown)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "table.json", json.dumps(record, indent=1))
        write_text(out / "table.md", markdown(record))

    try:
        failed = work_off(groups, slots, console, write_table)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on")
        sys.exit(130)
    write_table()
    console.print(f"table: '{out / 'table.md'}'")
    if failed:
        console.print(f"failed: {'; '.join(failed)}; the same command tries them again")
        sys.exit(1)


def grouped(ablation: Ablation, out: Path, chosen: list[Run]) -> list[tuple[Run, list[Run]]]:
    """Every run that is trained with those of the chosen ones that evaluate it."""
    groups: dict[Path, list[Run]] = {}
    for each in chosen:
        groups.setdefault(each.trained, []).append(each)
    known = {each.folder: each for each in chosen}
    for folder in groups.keys() - known.keys():
        (known[folder],) = runs_of(ablation, out, folder.parent.name, [groups[folder][0].seed])
    return [(known[folder], runs) for folder, runs in groups.items()]


def others(ablation: Ablation, out: Path, chosen: list[Run]) -> list[Run]:
    """Finished runs from earlier calls that were not asked for now, for the table."""
    found, asked = [], {each.folder for each in chosen}
    for name in ablation.rows:
        seeds = [int(path.name[5:]) for path in (out / name).glob("seed-[0-9]*") if path not in asked]
        for each in runs_of(ablation, out, name, seeds) if seeds else ():
            changes = each.changes()
            if changes:
                log.warning("'%s' has other settings and is left out of the table: %s", each.folder, changes[0])
            else:
                found.append(each)
    return found


def devices(asked: list[int] | None) -> list[str | None]:
    """Values of CUDA_VISIBLE_DEVICES to start runs with; [None] is the CPU."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    there = named.split(",")[:count] if named else [str(number) for number in range(count)]
    for number in asked or ():
        if not 0 <= number < count:
            raise UserError(f"--gpus {number}: this machine has {count} CUDA devices; name those, or leave --gpus out")
    return [there[number] for number in (range(count) if asked is None else dict.fromkeys(asked))] or [None]


def require_subsets(ablation: Ablation, runs: list[Run]) -> None:
    """Lists of stems that metrics are asked of have to be in every data root."""
    setting = ("evaluation.datasets.", ".data_root")
    roots = {v for r in runs for k, v in r.settings.items() if k.startswith(setting[0]) and k.endswith(setting[1])}
    for root in sorted(roots):
        if not Path(root).is_dir():
            raise UserError(f"no data root '{root}'; set --options datasets.NAME.data_root=DIR")
        there = {path.stem for path in Path(root, "subsets").glob("*.txt")}
        for metric in ablation.metrics:
            subset = metric.rpartition(":")[0]
            if subset and subset not in there:
                raise unknown(f"subset of '{root}' in metric '{metric}':", subset, there)


def work_off(
    groups: list[tuple[Run, list[Run]]], slots: list[str | None], console: Console, after_each: Callable[[], None]
) -> list[str]:
    """Do all that is missing, as many groups at a time as there are slots.

    Returns:
        The runs that failed.
    """
    total = sum(len(runs) for _, runs in groups)
    missing = [(base, [each for each in runs if not each.is_finished]) for base, runs in groups]
    done, failed = total - sum(len(runs) for _, runs in missing), []
    if done:
        console.print(f"{done} of {total} runs are finished already")
    children, free = Children(), queue.SimpleQueue()
    for slot in slots:
        free.put(slot)

    def work(base: Run, runs: list[Run]) -> list[tuple[Run, Path | None]]:
        slot = free.get()
        ended = [*attempt(children, base, runs, slot)]
        free.put(slot)
        return ended

    with ThreadPoolExecutor(len(slots)) as pool, terminated_as_interrupted():
        try:
            for future in as_completed([pool.submit(work, *group) for group in missing if group[1]]):
                for each, log_of_failure in future.result():
                    done += 1
                    console.print(f"{done} of {total}: {told(each, log_of_failure)}")
                    if log_of_failure:
                        failed.append(each.name)
                after_each()
        except BaseException:
            children.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def attempt(children: Children, base: Run, runs: list[Run], gpu: str | None) -> Iterator[tuple[Run, Path | None]]:
    """Train ``base`` unless that is done, evaluate ``runs`` of it; gives each with the log of its failure, if any."""
    output = base.folder / "output.txt"
    if children.stopped:
        return
    if not base.is_trained:
        base.save_settings()
        base.share_cache()
        if not children.run(base.train, output, gpu):
            yield from ((each, output) for each in runs)
            return
    for each in runs:
        each.save_settings()
        output = each.folder / "output.txt"
        yield each, None if children.run(each.evaluate, output, gpu) else output


def told(run: Run, log_of_failure: Path | None) -> str:
    """A line for a finished run, the last lines of its log for a failed one."""
    if log_of_failure is None:
        return f"{run.name} is finished: '{run.metrics.parent / 'report.html'}'"
    lines = log_of_failure.read_text(errors="replace").splitlines()[-_NUM_LINES:]
    return "\n".join([f"{run.name} FAILED; '{log_of_failure}' ends:", *(f"    {line}" for line in lines)])


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
