"""`annexe bench`: how fast this machine trains, generates, reads data and scores, and what takes the time."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from annexe import __version__
from annexe.benchmarks.generation_speed import Generation, measure_generation
from annexe.benchmarks.loading_speed import measure_loading
from annexe.benchmarks.random_model import free
from annexe.benchmarks.scoring_speed import measure_scoring
from annexe.benchmarks.timing import Record
from annexe.benchmarks.training_speed import Training, measure_training
from annexe.build import load_config
from annexe.config import Config
from annexe.errors import UserError
from annexe.files import require_writable, write_json
from annexe.training.run_log import git_commit
from annexe.workers import num_cores

HELP = "measure training, generation, loading or scoring on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="WHAT")
    about = "time the training step of a configuration on made-up batches with random weights, or on its own"
    train = actions.add_parser("train", help=about, description=about)
    _add_configuration(train, against=True)
    train.add_argument("--queries", type=int, metavar="N", help="questions an image (default 1)")
    train.add_argument("--tokens", type=int, metavar="N", help="packed tokens of an image in all, prefix included "
                       "(default: 430 with one question and 76 more with each further one)")  # fmt: skip
    train.add_argument(
        "--steps", type=int, default=20, metavar="N", help="steps that count (default %(default)s)"
    )
    train.add_argument(
        "--warmup", type=int, default=5, metavar="N", help="steps before them (default %(default)s)"
    )
    train.add_argument(
        "--real",
        action="store_true",
        help="the configured data and weights, read by its own loader",
    )
    train.add_argument(
        "--stored",
        action="store_true",
        help="patches come with the batch, as with run.store_patches",
    )
    about = "time the answers to made-up prompts, masks at full size and encoded included"
    answers = actions.add_parser("generate", help=about, description=about)
    _add_configuration(answers, against=True)
    for name, default, note in (
        ("queries", 1, "questions an image"),
        ("batch-size", None, "images a batch (default: run.batch_size)"),
        ("new-tokens", 50, "tokens of every response"),
        ("batches", 5, "batches that count"),
        ("warmup", 1, "batches before them"),
        ("height", 1080, "of the photos whose masks are made, in pixels"),
        ("width", 1920, "of the photos whose masks are made, in pixels"),
    ):
        note += "" if default is None else " (default %(default)s)"
        answers.add_argument(f"--{name}", type=int, default=default, metavar="N", help=note)
    answers.add_argument(
        "--real", action="store_true", help="the configured weights in place of random ones"
    )
    about = "time the training loader on a data root, with an empty cache of resized pixels and with a filled one"
    data = actions.add_parser("data", help=about, description=about)
    _add_configuration(data)
    data.add_argument(
        "--workers", type=int, nargs="+", metavar="N", help="processes (default: run.num_workers)"
    )
    data.add_argument(
        "--images", type=int, default=256, metavar="N", help="images to read (default %(default)s)"
    )
    about = "time the scoring of made-up predictions on drawn scenes"
    metrics = actions.add_parser("metrics", help=about, description=about)
    metrics.add_argument(
        "--queries", type=int, default=1000, metavar="N", help="questions (default %(default)s)"
    )
    metrics.add_argument(
        "--workers",
        type=int,
        default=num_cores(),
        metavar="N",
        help="processes (default: all cores)",
    )
    metrics.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")


def _add_configuration(parser: argparse.ArgumentParser, *, against: bool = False) -> None:
    parser.add_argument(
        "--cfg-path", required=True, metavar="YAML", help="configuration file with a model block"
    )
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="A.B=C", help="settings put over the file"
    )
    if against:
        parser.add_argument(
            "--against",
            nargs="+",
            metavar="A.B=C",
            help="measure once more with these settings put over the others",
        )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")


def run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    if arguments.json is not None:
        require_writable(arguments.json)
    report: dict[str, Any] = {"what": arguments.action, "machine": machine()}
    if arguments.action == "metrics":
        report["measured"] = measure_scoring(arguments.queries, arguments.workers)
        columns = {"": report["measured"]}
    else:
        report |= {"config": arguments.cfg_path, "options": arguments.options}
        config = load_config(arguments.cfg_path, arguments.options)
        if arguments.action == "data":
            report["measured"] = measure_loading(config, arguments.workers, arguments.images)
            columns = {f"{number} workers": record for number, record in report["measured"].items()}
        else:
            columns = _compare(arguments, config, report)
    show(report, columns)
    if arguments.json is not None:
        write_json(arguments.json, report)


def _check(arguments: argparse.Namespace) -> None:
    """Numbers that make no sense end here."""
    for name, value in vars(arguments).items():
        least = 0 if name in ("warmup", "workers") else 1
        if arguments.action == "metrics":
            least = 1
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and not isinstance(number, bool) and number < least:
                raise UserError(f"--{name.replace('_', '-')} {number} must be at least {least}")
    if (
        arguments.action == "train"
        and arguments.real
        and (arguments.queries or arguments.tokens or arguments.stored)
    ):
        raise UserError(
            "--queries, --tokens and --stored are of made-up batches; leave them out, or --real"
        )


def _compare(
    arguments: argparse.Namespace, config: Config, report: dict[str, Any]
) -> dict[str, Record]:
    """Measure the configuration, and that of ``--against`` after it; gives the columns of the table."""
    configs = {"measured": config}
    if arguments.against:
        configs["against"] = load_config(
            arguments.cfg_path, [*arguments.options, *arguments.against]
        )
    since_start = time.time() - psutil.Process().create_time()
    report |= {"against_options": arguments.against, "notes": [], "against": None, "ratio": None}
    for name, one in configs.items():
        if arguments.action == "train":
            queries = arguments.queries or 1
            tokens = arguments.tokens or 430 + round((queries - 1) * 533 / 7)  # 963 with eight
            work = Training(
                queries, tokens, arguments.steps, arguments.warmup, arguments.real, arguments.stored
            )
            report[name], notes = measure_training(one, work, since_start)
        else:
            if arguments.batch_size is not None:
                one = replace(one, run=replace(one.run, batch_size=arguments.batch_size))
            size = (arguments.height, arguments.width)
            asked = arguments.queries, arguments.new_tokens, arguments.batches, arguments.warmup
            report[name], notes = measure_generation(one, Generation(*asked, size, arguments.real))
        free()
        report["notes"] += [note for note in notes if note not in report["notes"]]
    if not arguments.against:
        return {"": report["measured"]}
    report["ratio"] = ratio(report["measured"], report["against"])
    report["notes"].append(
        f"against: the same with {' '.join(arguments.against)}, measured afterwards"
    )
    return {name: report[name] for name in ("measured", "against", "ratio")}


def ratio(measured: Record, against: Record) -> Record:
    """Every number of one record divided by that of the other, where both have it and neither is 0."""
    both = [(key, value, against[key]) for key, value in measured.items() if against.get(key)]
    return {key: ratio(a, b) if isinstance(a, dict) else a / b for key, a, b in both if a}


def machine() -> dict[str, Any]:
    """What the numbers were measured on and with."""
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cpu": _processor(),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "annexe": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _processor() -> str:
    """Name of the CPU; Linux keeps it where no library looks."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def show(report: dict[str, Any], columns: dict[str, Record]) -> None:
    """Print the numbers, a column a record, and what was measured on; what is split by part has a table of its own."""
    console, on = Console(soft_wrap=True), report["machine"]
    place = on["gpu"] or f"{on['cpu']}, {on['threads']} threads"
    table = Table(
        "", *columns, title=f"annexe bench {report['what']} on {place}, torch {on['torch']}"
    )
    flat = [dict(_flat(record)) for record in columns.values()]
    for label in dict.fromkeys(label for record in flat for label in record):
        table.add_row(label, *(_number(record.get(label)) for record in flat))
    console.print(table)
    records = {name: record for name, record in columns.items() if name != "ratio"}
    for key in (key for key, value in next(iter(records.values())).items() if _is_split(value)):
        kinds = list(next(iter(records.values()))[key]["all"])
        table = Table(
            "", *(f"{kind} {name}".strip() for name in records for kind in kinds), title=_words(key)
        )
        for part in dict.fromkeys(part for record in records.values() for part in record[key]):
            values = (
                record[key].get(part, {}).get(kind) for record in records.values() for kind in kinds
            )
            table.add_row(_words(part), *map(_number, values))
        console.print(table)
    for note in report.get("notes", ()):
        console.print(f"- {note}", markup=False, highlight=False)


def _is_split(value: Any) -> bool:
    return isinstance(value, dict) and "all" in value


def _flat(record: Record) -> Iterator[tuple[str, float | None]]:
    """Label and value of every number that is not split by part."""
    for key, value in record.items():
        if not isinstance(value, dict):
            yield _words(key), value
        elif not _is_split(value):
            yield from (
                (f"{_words(key)}: {_words(name)}", number) for name, number in value.items()
            )


def _words(key: str) -> str:
    return key.replace("_", " ")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
