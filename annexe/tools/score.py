"""`annexe score`: scores a predictions file, of this system or any other, without a model or a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.errors import UserError
from annexe.evaluation.records import read_predictions, require_complete
from annexe.evaluation.scoring import PROTOCOLS, score_all
from annexe.evaluation.truth import Truth
from annexe.files import require_writable, write_json
from annexe.workers import num_cores

HELP = "score a predictions file of any system"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("predictions", type=Path, help="predictions.jsonl")
    add_data_arguments(parser)
    parser.add_argument(
        "--protocol",
        choices=(*PROTOCOLS, "all"),
        default="all",
        help="standard scores, those of an earlier publication, or all, each under its name (default %(default)s)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write metrics.json there")
    parser.add_argument(
        "--complete",
        action="store_true",
        help="demand a prediction for every annotation of the split",
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What names the truth, for every command that scores."""
    parser.add_argument("--data-root", required=True, metavar="DIR", help="folder that holds RGB/")
    parser.add_argument("--split", required=True, help="split that was predicted")
    parser.add_argument(
        "--split-dir", metavar="DIR", help="lists of the splits, as the evaluation had them"
    )
    parser.add_argument(
        "--exclude", metavar="FILE", help="images left out, as the evaluation left them out"
    )
    parser.add_argument(
        "--answer-format",
        default="sentence",
        choices=("sentence", "phrases"),
        help="what answers are compared with: the sentence, or the phrases of the targets (default %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, default=num_cores(), help="processes (default: all cores)"
    )


def truth_of(arguments: argparse.Namespace) -> Truth:
    """The data set that the arguments name."""
    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers} must be at least 1")
    named = {
        name: getattr(arguments, name)
        for name in ("data_root", "answer_format", "split_dir", "exclude")
    }
    return Truth(
        EgoIRGBench(arguments.split, 1, 0, None, **named)
    )  # the size and the seed are a model's: none is here


def run(arguments: argparse.Namespace) -> None:
    if arguments.out is not None:
        require_writable(arguments.out)
    truth = truth_of(arguments)
    records = read_predictions(arguments.predictions, truth)
    if arguments.complete:
        require_complete(records, truth)
    protocols = PROTOCOLS if arguments.protocol == "all" else (arguments.protocol,)
    metrics = score_all(
        records, truth, protocols=protocols, workers=arguments.workers, progress=True
    )
    metrics["meta"] = {
        "predictions": str(arguments.predictions),
        "data_root": arguments.data_root,
        "split": arguments.split,
        "split_dir": arguments.split_dir,
        "exclude": arguments.exclude,
        "answer_format": arguments.answer_format,
        "data_fingerprint": truth.dataset.fingerprint(),
    }
    if arguments.out is not None:
        write_json(arguments.out, metrics)
    show(metrics)


def show(metrics: dict[str, Any]) -> None:
    """Print a table per protocol, the standard one with intervals and baselines."""
    console = Console()
    if "standard" in metrics:
        table = Table(
            Column("standard", overflow="fold"), "score", "95 % interval", *metrics["baselines"]
        )
        for name, value in metrics["standard"].items():
            if name.count("/") < 2:
                interval = metrics["intervals"].get(name)
                others = [baseline.get(name) for baseline in metrics["baselines"].values()]
                table.add_row(
                    name,
                    _number(value),
                    " to ".join(map(_number, interval or ())),
                    *map(_number, others),
                )
        console.print(table)
    for protocol in PROTOCOLS[1:]:
        if protocol in metrics:
            table = Table(protocol, "score")
            for name, value in metrics[protocol].items():
                table.add_row(name, _number(value))
            console.print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else f"{value:,}"
