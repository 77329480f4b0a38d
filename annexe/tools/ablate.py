"""`annexe ablate`: train and evaluate every row of an ablation, and put all of them into one table.

A file of rows names a recipe and what each row changes of it. Every (row, seed) is a run of its own folder,
``OUT/ROW/seed-S``, with its evaluation in ``eval/``. All work is done by the two torchrun scripts, as child processes.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING, OmegaConf
from rich.console import Console

from annexe.checkpoint import find_checkpoint, load_progress
from annexe.config import load_config, read_yaml
from annexe.errors import UserError, over_defaults, unknown
from annexe.files import write_json, write_text
from annexe.report.tables import GROUPS, MEAN_ACCURACY

HELP = "train and evaluate every row of an ablation, and write one table"
TRAIN, EVALUATE = "train.py", "eval_scripts/eval_egoirgbench.py"
METRICS = {
    *(metric.key for group in GROUPS.values() for metric in group if metric.key != MEAN_ACCURACY),
    *("consistency/contradictions", "calibration/confidence", "calibration/accuracy", "grounding/slot_ciou"),
    *(f"grounding/slot_precision@0.{tenth}" for tenth in range(5, 10)),
    *(f"presence/risk@{coverage}" for coverage in (0.5, 0.7, 0.8, 0.9, 1.0)),
}
_OWN = ("run.output_dir", "run.seed", "run.resume", "run.checkpoint")
_FREE = (*_OWN, "run.num_workers")  # a run is the same whatever they are; its folder names its seed
_DATA = ("data_root", "answer_format", "exclude", "split_dir")  # an evaluation follows its training in these


@dataclass
class Row:
    """What a row changes; with ``same_run_as`` it evaluates the run of another row in another way."""

    note: str = ""
    options: list[str] = field(default_factory=list)
    evaluation_options: list[str] = field(default_factory=list)
    same_run_as: str | None = None


@dataclass
class Ablation:
    """A file of rows; a row's own options stand over these."""

    config: str = MISSING
    evaluate: str = MISSING
    metrics: list[str] = MISSING
    rows: dict[str, Row | None] = MISSING  # nothing behind a name: a row without changes
    options: list[str] = field(default_factory=list)
    evaluation_options: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """A training or an evaluation: its command, and all options and lines of YAML files that it is made from."""

    folder: Path
    command: list[str]
    made_from: list[str]

    def require_unchanged(self) -> None:
        """Refuse to go on with, or to show, work that was made from other settings."""
        file = self.folder / "ablation.json"
        then = json.loads(file.read_text()) if file.is_file() else []
        holds_work = find_checkpoint(self.folder) or (self.folder / "metrics.json").is_file()
        if holds_work and then != self.made_from:
            differ = [part.strip() for part in (*self.made_from, *then) if (part in then) != (part in self.made_from)]
            reason = ", ".join(differ[:3]) or "their order" if then else f"all that '{file}' should hold"
            raise UserError(
                f"'{self.folder}' was made from settings that differ in {reason}; take them back, remove this folder, "
                "or choose another --out"
            )


@dataclass(frozen=True)
class Run:
    """One row with one seed; rows with ``same_run_as`` share a training."""

    row: str
    seed: int
    training: Stage
    evaluation: Stage
    max_steps: int
    data_root: Path  # of the evaluation

    @property
    def metrics(self) -> Path:
        return self.evaluation.folder / "metrics.json"


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
    if not (Path(TRAIN).is_file() and Path(EVALUATE).is_file()):
        raise UserError(f"{TRAIN} and {EVALUATE} are not here; change to the top folder of a checkout of annexe")
    ablation = read_ablation(arguments.file, arguments.options, arguments.evaluation_options)
    names, seeds, out = set(arguments.rows or ablation.rows), arguments.seeds, arguments.out
    for name in names - ablation.rows.keys():
        raise unknown("row", name, ablation.rows)
    if min(seeds) < 0 or arguments.jobs_per_gpu < 1:
        raise UserError("--seeds takes numbers from 0 on, --jobs-per-gpu from 1 on")
    known = []  # the runs that are asked for, and those of earlier calls
    for name in ablation.rows:
        earlier = [path.name.removeprefix("seed-") for path in (out / name).glob("seed-*")]
        own = {*(seeds if name in names else ()), *(int(seed) for seed in earlier if seed.isdigit())}
        try:
            known += runs_of(ablation, out, name, sorted(own)) if own else []
        except UserError as error:
            raise UserError(f"row '{name}': {error}") from None
    chosen = [each for each in known if each.row in names and each.seed in seeds]
    chosen.sort(key=lambda each: seeds.index(each.seed))  # a first seed of every row before a second one of any
    groups: dict[Path, list[Run]] = {}
    for each in chosen:
        groups.setdefault(each.training.folder, []).append(each)
    console = Console(soft_wrap=True, markup=False, highlight=False)
    if arguments.dry_run:
        for group in groups.values():
            for stage in (group[0].training, *(each.evaluation for each in group)):
                console.print(shlex.join(stage.command))
        return
    slots = devices(arguments.gpus) * arguments.jobs_per_gpu
    require_data({each.data_root for each in chosen}, ablation.metrics)
    for each in known:
        each.training.require_unchanged()
        each.evaluation.require_unchanged()

    def write_table() -> None:
        record = summary(ablation, known)
        write_json(out / "table.json", record)
        write_text(out / "table.md", markdown(record))

    (out / "cache").mkdir(parents=True, exist_ok=True)
    write_table()
    try:
        failed = work_off(list(groups.values()), slots, console, write_table)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on")
        sys.exit(130)
    console.print(f"table: '{out / 'table.md'}'")
    if failed:
        console.print(f"failed: {'; '.join(failed)}; the same command tries them again")
        sys.exit(1)


def read_ablation(path: Path, options: Iterable[str] = (), evaluation_options: Iterable[str] = ()) -> Ablation:
    """Read a file of rows, put further options behind its own, and check all but the options' values."""
    if not path.is_file():
        raise UserError(f"no file of rows '{path}'; give one such as train_configs/grounding_ablation.yaml")
    given = read_yaml(path)
    try:
        ablation = over_defaults(Ablation, given)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}; it must be a block with config and rows") from None
    if not ablation.rows or not ablation.metrics:
        raise UserError(f"{path}: rows and metrics need one entry at least")
    ablation.rows = rows = {name: row or Row() for name, row in ablation.rows.items()}
    ablation.options += options
    ablation.evaluation_options += evaluation_options
    for name, row in rows.items():
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == "cache":
            raise UserError(f"row '{name}' names a folder: take letters, digits, '-', '_' and '.', and not 'cache'")
        if row.same_run_as not in (None, *rows):
            raise unknown(f"row in same_run_as of row '{name}':", row.same_run_as, rows)
        if row.same_run_as and (row.options or rows[row.same_run_as].same_run_as):
            raise UserError(f"row '{name}': same_run_as needs a row that trains, and takes evaluation_options alone")
    for part in (ablation, *rows.values()):
        for option in (*part.options, *part.evaluation_options):
            if not isinstance(option, str):
                raise UserError(f"{path}: there is an option {option}; write it as a.b=c")
            if option.partition("=")[0] in _OWN:
                raise UserError(f"option '{option}': annexe ablate itself sets {', '.join(_OWN)}; remove it")
    for key in (metric.rpartition(":")[2] for metric in ablation.metrics):
        if key not in METRICS and not key.startswith("grounding/miou/"):
            raise unknown("metric", key, METRICS)
    return ablation


def runs_of(ablation: Ablation, out: Path, name: str, seeds: Iterable[int]) -> list[Run]:
    """The runs of a row, its settings checked; an evaluation takes its training's data, unless options say else."""
    row, base = ablation.rows[name], ablation.rows[name].same_run_as or name
    options = [*ablation.options, *ablation.rows[base].options]
    config = load_config(ablation.config, options)
    if config.model is None or len(config.datasets) != 1:
        raise UserError(f"config '{ablation.config}' is of no training run; it needs one model and one data set")
    ((dataset, own),) = config.datasets.items()
    asked = [f"datasets.{dataset}.{k}={'null' if own[k] is None else own[k]}" for k in _DATA if k in own]
    asked += [*ablation.evaluation_options, *row.evaluation_options]
    of_model = [option for option in asked if option.startswith("model.")]
    load_config(ablation.config, [*options, *of_model])  # they stand over the trained model's
    datasets = load_config(ablation.evaluate, [*(o for o in asked if o not in of_model), "model=null"]).datasets
    data_root = Path(datasets[dataset]["data_root"])

    def made_from(command: list[str]) -> list[str]:
        words = [word for word in command if word.partition("=")[0] not in _FREE]
        return [*words, *OmegaConf.to_yaml(read_yaml(Path(command[3]))).splitlines()]

    runs = []
    for seed in seeds:
        trained, folder = out / base / f"seed-{seed}", out / name / f"seed-{seed}" / "eval"
        train = ["python", TRAIN, "--cfg-path", ablation.config, "--options", *options]
        train += [f"run.seed={seed}", f"run.output_dir={trained}", "run.resume=auto"]
        training = Stage(trained, train, made_from(train))
        evaluate = ["python", EVALUATE, "--cfg-path", ablation.evaluate, "--dataset", dataset, "--options"]
        evaluate += [f"run.checkpoint={trained}", f"run.output_dir={folder}", *asked]
        evaluation = Stage(folder, evaluate, [*training.made_from, *made_from(evaluate)])
        runs.append(Run(name, seed, training, evaluation, config.run.max_steps, data_root))
    return runs


def devices(asked: list[int] | None) -> list[str | None]:
    """Values of CUDA_VISIBLE_DEVICES to start runs with; [None] is the CPU."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    there = named.split(",")[:count] if named else [str(number) for number in range(count)]
    for number in asked or ():
        if not 0 <= number < count:
            raise UserError(f"--gpus {number}: this machine has {count} CUDA devices; name those, or leave --gpus out")
    return [there[number] for number in (range(count) if asked is None else dict.fromkeys(asked))] or [None]


def require_data(roots: set[Path], metrics: list[str]) -> None:
    """Data roots have to be there, with the lists of stems that metrics are asked of."""
    for root in sorted(roots):
        if not root.is_dir():
            raise UserError(
                f"no data root '{root}'; name another by --options, such as datasets.ego_irgbench.data_root=DIR"
            )
        there = {path.stem for path in (root / "subsets").glob("*.txt")}
        for subset, _, metric in (metric.rpartition(":") for metric in metrics):
            if subset not in ("", *there):
                raise unknown(f"subset of '{root}' in metric '{metric}':", subset, there)


def work_off(
    groups: list[list[Run]], slots: list[str | None], console: Console, after_each: Callable[[], None]
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
            is_trained = checkpoint is not None and load_progress(checkpoint).step >= group[0].max_steps
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
            while not all(future.done() for future in futures):  # one may just be starting its next child
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
        cache.symlink_to(Path("..", "..", "cache"))  # resized pixels, which keep data roots and sizes apart themselves
    path, command = stage.folder / "output.txt", [sys.executable, *stage.command[1:]]
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    with path.open("a") as output:
        output.write(f"$ {shlex.join(stage.command)}\n")
        output.flush()
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        child = subprocess.Popen(command, env=environment, **streams)
    children.append(child)
    return None if child.wait() == 0 else path


def summary(ablation: Ablation, runs: list[Run]) -> dict[str, Any]:
    """All that the table shows, of the runs that are finished."""
    rows = {}
    for name, row in ablation.rows.items():
        own = [run for run in runs if run.row == name and run.metrics.is_file()]
        if not own:
            continue
        scores = [json.loads(run.metrics.read_text()) for run in own]
        minutes, memory = zip(*(_took(run.training.folder / "log.jsonl") for run in own), strict=True)
        rows[name] = asdict(row) | {
            "seeds": [run.seed for run in own],
            "steps": own[0].max_steps,
            "evaluated_steps": [score["meta"]["step"] for score in scores],
            "minutes": sum(minutes) / len(minutes) or None,
            "gpu_memory": max(memory) or None,
            "metrics": {metric: _over_seeds(scores, metric) for metric in ablation.metrics},
            "train": shlex.join(own[0].training.command),
            "evaluate": shlex.join(own[0].evaluation.command),
        }
    return asdict(ablation) | {"spread": "half of highest - lowest", "rows": rows}


def _took(log: Path) -> tuple[float, float]:
    """Minutes and highest GPU memory of a training, over all of its starts."""
    text = log.read_text() if log.is_file() else ""
    lines = [line for line in map(json.loads, text.splitlines()) if line["kind"] == "train"]
    before = [0, *(line["images"] for line in lines)]
    seconds = [(line["images"] - n) / line["images_per_second"] for line, n in zip(lines, before, strict=False)]
    return sum(seconds) / 60, max((line.get("gpu_memory", 0) for line in lines), default=0)


def _over_seeds(scores: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """A metric, of a subset where one stands before its colon; None where there was nothing to measure."""
    subset, _, key = metric.rpartition(":")
    values = [(score["subsets"].get(subset, {}) if subset else score["standard"]).get(key) for score in scores]
    measured = [value for value in values if value is not None]
    return {
        "mean": sum(measured) / len(measured) if measured else None,
        "spread": (max(measured) - min(measured)) / 2 if len(measured) > 1 else None,
        "values": values,
    }


def markdown(record: dict[str, Any]) -> str:
    """A summary as a page: what every row scored and took, then what it is and its commands."""
    heads = ["row", *record["metrics"], "seeds", "minutes", "GB"]
    table, commands = [heads, ["---"] * len(heads)], []
    for name, row in record["rows"].items():
        scores = [_decimal(metric["mean"], 3, metric["spread"]) for metric in row["metrics"].values()]
        took = [str(len(row["seeds"])), _decimal(row["minutes"], 1), _decimal(row["gpu_memory"], 1)]
        table.append([name, *scores, *took])
        commands.append("\n".join([f"# {name}: {' '.join(row['note'].split())}", row["train"], row["evaluate"], ""]))
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    return _PAGE.format(table=lines, commands="\n".join(commands), **record)


def _decimal(value: float | None, digits: int, spread: float | None = None) -> str:
    text = "–" if value is None else f"{value:.{digits}f}"
    return text if spread is None else f"{text} ± {spread:.{digits}f}"


_PAGE = """\
Ablation of `{config}`, evaluated with `{evaluate}`.

{table}

Mean over seeds ± half the distance between the lowest and the highest; a single seed has no ±. Minutes: wall time of
the training steps, with the loading, validation and saving on the way; runs that share a device slow each other down.
GB: the most that tensors took on the GPU.

The commands of each row's first seed; other seeds differ in `run.seed` and the folder.

```bash
{commands}```
"""
