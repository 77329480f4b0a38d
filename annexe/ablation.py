"""An ablation: rows that each change some settings of one recipe, every row trained with several seeds.

Every (row, seed) is a run of its own folder, ``OUT/ROW/seed-S``, with the evaluation in ``eval/`` and the settings
that it was made with in ``ablation.json``.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from annexe.checkpoint import find_checkpoint, load_progress
from annexe.config import as_dict, load_config, read_yaml
from annexe.errors import UserError, refused, unknown
from annexe.files import write_text
from annexe.report.tables import GROUPS, MEAN_ACCURACY

TRAIN, EVALUATE = "train.py", "eval_scripts/eval_egoirgbench.py"
TITLES = {metric.key: metric.name for group in GROUPS.values() for metric in group if metric.key != MEAN_ACCURACY}
_MORE_METRICS = (
    *("grounding/slot_ciou", "grounding/num_target_queries", "grounding/num_no_target_queries"),
    *(f"grounding/slot_precision@0.{tenth}" for tenth in range(5, 10)),
    *(f"presence/risk@{coverage}" for coverage in (0.5, 0.7, 0.8, 0.9, 1.0)),
    *("calibration/confidence", "calibration/accuracy", "paraphrase/num_questions"),
    *("consistency/contradictions", "consistency/num_hand_and_object_queries", "num_queries", "num_images"),
)
_OWN = ("run.output_dir", "run.seed", "run.resume"), ("run.output_dir", "run.checkpoint")
_DATA = ("data_root", "answer_format", "exclude", "split_dir")  # an evaluation follows its training in these
_FREE = ("run.output_dir", "run.seed", "run.resume", "run.checkpoint", "run.num_workers")  # change no result of a run


@dataclass
class Row:
    """What a row changes; with ``same_run_as`` it evaluates the run of another row in another way."""

    note: str = ""
    options: list[str] = field(default_factory=list)
    evaluation_options: list[str] = field(default_factory=list)
    same_run_as: str | None = None


@dataclass
class Ablation:
    """A file of rows; the row's own options stand over these."""

    config: str = MISSING
    evaluate: str = MISSING
    metrics: list[str] = MISSING
    rows: dict[str, Row | None] = MISSING  # nothing behind a name: a row without changes
    options: list[str] = field(default_factory=list)
    evaluation_options: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """One row with one seed.

    Attributes:
        trained: folder of the run that is evaluated: its own, or that of ``same_run_as``.
        settings: everything that shapes its result, under dotted keys that begin with ``training`` or ``evaluation``.
    """

    row: str
    seed: int
    folder: Path
    trained: Path
    train: list[str]
    evaluate: list[str]
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @property
    def metrics(self) -> Path:
        return self.folder / "eval" / "metrics.json"

    @property
    def is_finished(self) -> bool:
        return self.metrics.is_file()

    @property
    def is_trained(self) -> bool:
        checkpoint = find_checkpoint(self.trained)
        return checkpoint is not None and load_progress(checkpoint).step >= self.settings["training.run.max_steps"]

    def save_settings(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "ablation.json", json.dumps(self.settings, indent=1))

    def share_cache(self) -> None:
        """All runs read resized pixels from one folder, which keeps data roots and sizes apart by itself."""
        shared, own = self.folder.parent.parent / "cache", self.folder / "cache"
        shared.mkdir(exist_ok=True)
        if not os.path.lexists(own):
            own.symlink_to(Path("..", "..", "cache"))

    def changes(self) -> list[str]:
        """What of today's settings is not as in the work that the folder holds."""
        begun = self.folder == self.trained and find_checkpoint(self.folder) is not None
        if not (begun or self.is_finished):
            return []
        file = self.folder / "ablation.json"
        if not file.is_file():
            return [f"'{file}' is missing"]
        saved = json.loads(file.read_text())
        return [
            f"{key} is {json.dumps(self.settings.get(key))} and was {json.dumps(saved.get(key))}"
            for key in sorted({*saved, *self.settings})
            if saved.get(key) != self.settings.get(key) and (self.is_finished or key.startswith("training."))
        ]

    def require_unchanged(self) -> None:
        changes = self.changes()
        if changes:
            alone = all(change.startswith("evaluation.") for change in changes)
            raise UserError(
                f"'{self.folder}' was made with other settings ({'; '.join(changes[:3])}); take them back, remove "
                f"'{self.metrics.parent if alone else self.folder}', or choose another --out"
            )


def read_ablation(path: Path, options: list[str] = (), evaluation_options: list[str] = ()) -> Ablation:
    """Read a file of rows, put further options behind its own, and check all but the options themselves.

    Raises:
        UserError: for a key, type, row or metric that does not exist or does not fit.
    """
    if not path.is_file():
        raise UserError(f"no file of rows '{path}'; give one such as train_configs/grounding_ablation.yaml")
    given = read_yaml(path)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Ablation), given)
        ablation = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {refused('', error)}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}; it must be a block with config and rows") from None
    if not ablation.rows or not ablation.metrics:
        raise UserError(f"{path}: rows and metrics need one entry at least")
    ablation.rows = {name: row or Row() for name, row in ablation.rows.items()}
    ablation.options += options
    ablation.evaluation_options += evaluation_options
    for name, row in ablation.rows.items():
        _check_row(name, row, ablation)
    for kind, own in zip(("options", "evaluation_options"), _OWN, strict=True):
        for option in (o for part in (ablation, *ablation.rows.values()) for o in getattr(part, kind)):
            if not isinstance(option, str):
                raise UserError(f"{path}: {kind} hold {option}; write it as a.b=c")
            if option.partition("=")[0] in own:
                raise UserError(f"option '{option}' is set by annexe ablate itself, from --out and --seeds; remove it")
    known = {*TITLES, *_MORE_METRICS}
    for metric in ablation.metrics:
        key = metric.rpartition(":")[2]
        if key not in known and not key.startswith("grounding/miou/"):
            raise unknown("metric", key, known)
    return ablation


def _check_row(name: str, row: Row, ablation: Ablation) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == "cache":
        raise UserError(f"row '{name}' names a folder: take letters, digits, '-', '_' and '.', and not 'cache'")
    if row.same_run_as is None:
        return
    if row.same_run_as not in ablation.rows:
        raise unknown(f"row in same_run_as of row '{name}':", row.same_run_as, ablation.rows)
    if ablation.rows[row.same_run_as].same_run_as is not None:
        raise UserError(f"row '{name}': same_run_as '{row.same_run_as}' trains nothing itself; name the row that does")
    if row.options:
        raise UserError(f"row '{name}' trains nothing, so its options do nothing; make them evaluation_options")


def runs_of(ablation: Ablation, out: Path, name: str, seeds: Iterable[int]) -> list[Run]:
    """The runs of a row, one a seed; all of its settings are checked.

    An evaluation takes the data that its training took, unless its options name another.
    """
    row, base = ablation.rows[name], ablation.rows[name].same_run_as or name
    options = [*ablation.options, *ablation.rows[base].options]
    config = load_config(ablation.config, options)
    if config.model is None or len(config.datasets) != 1:
        raise UserError(f"config '{ablation.config}' is of no training run; it needs one model and one data set")
    ((dataset, own),) = config.datasets.items()
    evaluation = load_config(ablation.evaluate, ["model=null"])
    if dataset not in evaluation.datasets:
        raise unknown(f"data set in evaluate '{ablation.evaluate}':", dataset, evaluation.datasets)
    there = evaluation.datasets[dataset]
    asked = [f"datasets.{dataset}.{k}={_plain(own[k])}" for k in _DATA if k in own and own[k] != there[k]]
    asked += [*ablation.evaluation_options, *row.evaluation_options]
    of_model = [option for option in asked if option.startswith("model.")]
    others = [option for option in asked if option not in of_model]
    evaluation = as_dict(load_config(ablation.evaluate, [*others, "model=null"]))
    model = load_config(ablation.config, [*options, *of_model]).model
    settings = _flat({"training": as_dict(config), "evaluation": evaluation | {"model": model}})
    settings = {key: value for key, value in settings.items() if key.partition(".")[2] not in _FREE}
    runs = []
    for seed in dict.fromkeys(seeds):
        folder, trained = (out / part / f"seed-{seed}" for part in (name, base))
        train = ["python", TRAIN, "--cfg-path", ablation.config, "--options", *options]
        train += [f"run.seed={seed}", f"run.output_dir={trained}", "run.resume=auto"]
        evaluate = ["python", EVALUATE, "--cfg-path", ablation.evaluate, "--dataset", dataset, "--options"]
        evaluate += [f"run.checkpoint={trained}", f"run.output_dir={folder / 'eval'}", *asked]
        runs.append(Run(name, seed, folder, trained, train, evaluate, settings))
    return runs


def _plain(value: object) -> object:
    return "null" if value is None else value


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested blocks as one, under dotted keys."""
    if not isinstance(value, dict):
        return {key: json.loads(json.dumps(value))}
    return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{key}.{name}".strip(".")).items()}


# The table


def summary(ablation: Ablation, runs: list[Run]) -> dict[str, Any]:
    """All that the table shows, of the runs that are finished."""
    rows = {}
    for name, row in ablation.rows.items():
        own = sorted((run for run in runs if run.row == name and run.is_finished), key=lambda run: run.seed)
        if not own:
            continue
        scores = [json.loads(run.metrics.read_text()) for run in own]
        minutes, memory = zip(*(_took(run.trained / "log.jsonl") for run in own), strict=True)
        rows[name] = asdict(row) | {
            "seeds": [run.seed for run in own],
            "steps": own[0].settings["training.run.max_steps"],
            "evaluated_steps": [score["meta"]["step"] for score in scores],
            "minutes": _over_seeds(minutes)["mean"],
            "gpu_memory": max(filter(None, memory), default=None),
            "metrics": {
                metric: _over_seeds([_value(score, metric) for score in scores]) for metric in ablation.metrics
            },
            "train": shlex.join(own[0].train),
            "evaluate": shlex.join(own[0].evaluate),
        }
    return asdict(ablation) | {"spread": "half of highest - lowest", "rows": rows}


def markdown(record: dict[str, Any]) -> str:
    """A summary as a page: scores, what the rows are and took, commands."""
    rows, metrics = record["rows"], record["metrics"]
    scores = [[name, *(_score(row["metrics"][metric]) for metric in metrics)] for name, row in rows.items()]
    about = []
    for name, row in rows.items():
        took = [f"{row['steps']:,}", _decimal(row["minutes"], 1), _decimal(row["gpu_memory"], 1)]
        about.append([name, row["note"], _changes(row), str(len(row["seeds"])), *took])
    commands = [f"# {name}\n{_folded(row['train'])}\n{_folded(row['evaluate'])}\n" for name, row in rows.items()]
    return _PAGE.format(
        config=record["config"],
        evaluate=record["evaluate"],
        scores=_table(["row", *_titles(metrics)], scores, num_words=1),
        about=_table(["row", "what it is", "options", "seeds", "steps", "minutes", "GB"], about, num_words=3),
        commands="\n".join(commands),
    )


_PAGE = """\
Ablation of `{config}`, evaluated with `{evaluate}`.

{scores}

Mean over seeds ± half the distance between the lowest and the highest; a single seed has no ±.

{about}

Minutes: wall time of the training steps on one device, with the loading, validation and saving on the way; mean over
seeds. Runs that share a device slow each other down. GB: the most that tensors took on the GPU.

The commands of each row's first seed; other seeds differ in `run.seed` and the folder.

```bash
{commands}```
"""


def _took(path: Path) -> tuple[float | None, float | None]:
    """Minutes and highest GPU memory of a training, over all of its starts."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    lines = [line for line in lines if line["kind"] == "train"]
    seconds, before = 0.0, 0
    for line in lines:
        seconds += (line["images"] - before) / line["images_per_second"]
        before = line["images"]
    memory = [line["gpu_memory"] for line in lines if "gpu_memory" in line]
    return seconds / 60 if lines else None, max(memory, default=None)


def _value(scores: dict[str, Any], metric: str) -> float | None:
    """A metric, of a subset where one stands before its colon; None where there was nothing to measure."""
    subset, _, key = metric.rpartition(":")
    return (scores["subsets"].get(subset, {}) if subset else scores["standard"]).get(key)


def _over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    measured = [value for value in values if value is not None]
    return {
        "mean": sum(measured) / len(measured) if measured else None,
        "spread": (max(measured) - min(measured)) / 2 if len(measured) > 1 else None,
        "values": list(values),
    }


def _decimal(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    text = f"{value:,.{digits}f}"
    return text.removeprefix("0") if digits == 3 and text.startswith("0.") else text


def _score(metric: dict[str, Any]) -> str:
    return _decimal(metric["mean"]) + (f" ± {_decimal(metric['spread'])}" if metric["spread"] is not None else "")


def _changes(row: dict[str, Any]) -> str:
    options = [f"`{option}`" for option in (*row["options"], *row["evaluation_options"])]
    if row["same_run_as"] is None:
        return " ".join(options) or "–"
    return " ".join([f"run of {row['same_run_as']}, evaluated with", *options])


def _titles(metrics: list[str]) -> list[str]:
    """Heads of columns; a metric whose short name is not its own keeps its key."""
    titles = []
    for metric in metrics:
        subset, _, key = metric.rpartition(":")
        title = TITLES.get(key) or key.rpartition("/")[2].replace("_", " ")
        titles.append(f"{title}, {subset.replace('_', ' ')}" if subset else title)
    return [t if titles.count(t) == 1 else metric for t, metric in zip(titles, metrics, strict=True)]


def _table(heads: list[str], rows: list[list[str]], *, num_words: int) -> str:
    """A Markdown table; columns behind the first ``num_words`` hold numbers."""
    rules = ["---" if column < num_words else "---:" for column in range(len(heads))]
    lines = [heads, rules, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _folded(command: str, width: int = 116) -> str:
    """A shell command over several lines."""
    lines = [""]
    for word in map(shlex.quote, shlex.split(command)):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append(" ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)
