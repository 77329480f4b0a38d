"""`annexe score`: scores a predictions file of any system, without a model or a GPU."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.errors import UserError
from annexe.evaluation.records import read_predictions, require_complete
from annexe.evaluation.scoring import PROTOCOLS, score_all
from annexe.evaluation.truth import Truth
from annexe.files import require_writable, write_json
from annexe.terminal import table
from annexe.workers import num_cores

_DATA = ("data_root", "answer_format", "split_dir", "exclude")  # arguments that the data set takes
_SETTING = re.compile(r"datasets\.ego_irgbench\.(\w+)")


_EXAMPLES = """\
example:
  annexe score predictions.jsonl --data-root data/synthetic --split test --out metrics.json
      a table of scores, and the same numbers as JSON

Neither a model nor a GPU is needed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    parser.add_argument("predictions", type=Path, metavar="PRED", help="predictions.jsonl")
    add_data_arguments(parser)
    parser.add_argument(
        "--protocol",
        choices=(*PROTOCOLS, "all"),
        default="all",
        help="standard scores, those of an earlier publication, or all, each under its name "
        "(default %(default)s)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write metrics.json there")
    parser.add_argument(
        "--complete",
        action="store_true",
        help="demand a prediction for every annotation of the split",
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What names the truth, for every command that scores."""
    # Data and split
    path = os.path.expanduser
    parser.add_argument(
        "--data-root", required=True, type=path, metavar="DIR", help="folder that holds RGB/"
    )
    parser.add_argument("--split", required=True, metavar="NAME", help="split that was predicted")
    parser.add_argument(
        "--split-dir",
        type=path,
        metavar="DIR",
        help="lists of the splits, as the evaluation had them",
    )
    parser.add_argument(
        "--exclude",
        type=path,
        metavar="FILE",
        help="images left out, as the evaluation left them out",
    )
    parser.add_argument(
        "--answer-format",
        default="sentence",
        choices=("sentence", "phrases"),
        help="what answers are compared with: the sentence, or the phrases of the targets "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=num_cores(),
        metavar="N",
        help="processes (default: all cores)",
    )


def truth_of(arguments: argparse.Namespace) -> Truth:
    """The data set that the arguments name.

    Raises:
        UserError: there is no such data, or no worker.
    """
    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers} must be at least 1")
    settings = {name: getattr(arguments, name) for name in _DATA}

    # Image size and seed are a model's, and there is none here
    try:
        dataset = EgoIRGBench(arguments.split, image_size=1, seed=0, cache_dir=None, **settings)
    except UserError as error:
        # It speaks of its settings, which are options here
        raise UserError(_SETTING.sub(_as_option, str(error))) from None
    return Truth(dataset)


def _as_option(setting: re.Match[str]) -> str:
    return "--" + setting[1].replace("_", "-")


def require_output(path: Path, *inputs: Path) -> None:
    """Check that a result can be written, and not over what it is made of.

    Raises:
        UserError: naming what is in the way.
    """
    require_writable(path)
    if path.exists() and any(file.exists() and path.samefile(file) for file in inputs):
        raise UserError(f"'{path}' is read, and would be written over; name another file")


def run(arguments: argparse.Namespace) -> None:
    if arguments.out is not None:
        require_output(arguments.out, arguments.predictions)

    # Read and check
    truth = truth_of(arguments)
    records = read_predictions(arguments.predictions, truth)
    if arguments.complete:
        require_complete(records, truth)

    # Score
    protocols = PROTOCOLS if arguments.protocol == "all" else (arguments.protocol,)
    scores = score_all(
        records, truth, protocols=protocols, workers=arguments.workers, progress=True
    )
    metrics = scores.metrics
    metrics["meta"] = {
        "predictions": str(arguments.predictions),
        "data_root": arguments.data_root,
        "split": arguments.split,
        "split_dir": arguments.split_dir,
        "exclude": arguments.exclude,
        "answer_format": arguments.answer_format,
        "data_fingerprint": truth.dataset.fingerprint(),
    }

    # Shown first: a full disk costs no result
    show(metrics)
    if arguments.out is not None:
        write_json(arguments.out, metrics)


def show(metrics: dict[str, Any]) -> None:
    """Print a table for each protocol, the standard one with intervals and baselines."""
    if "standard" in metrics:
        baselines = metrics["baselines"]
        rows = []
        for name, value in metrics["standard"].items():
            if name.count("/") < 2:
                ends = metrics["intervals"].get(name, ())
                others = [_text(baseline.get(name)) for baseline in baselines.values()]
                rows.append([name, _text(value), " to ".join(map(_text, ends)), *others])
        table(["standard", "score", "95 % interval", *baselines], rows)
    for protocol in PROTOCOLS[1:]:
        if protocol in metrics:
            scores = metrics[protocol].items()
            table([protocol, "score"], [[name, _text(value)] for name, value in scores])


def _text(value: float | None) -> str:
    """A score or a count as the table shows it."""
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"
