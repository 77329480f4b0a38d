"""Results of an ablation as one table, with the commands that made each row."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from annexe.ablation.rows import Ablation, Row, Run


def summary(ablation: Ablation, runs: list[Run]) -> dict[str, Any]:
    """All that the table shows, of the runs that are finished."""
    rows = {}
    for name in ablation.rows:
        finished = [run for run in runs if run.row == name and run.metrics.is_file()]
        if finished:
            rows[name] = _row_summary(ablation.row(name), finished, ablation.metrics)
    return asdict(ablation) | {"spread": "half of highest - lowest", "rows": rows}


def _row_summary(row: Row, runs: list[Run], metrics: list[str]) -> dict[str, Any]:
    """A row over its seeds; ``runs`` are those that are finished."""
    scores = [json.loads(run.metrics.read_text()) for run in runs]
    minutes = []
    memory = []
    for run in runs:
        run_minutes, run_memory = _minutes_and_memory(run.training.folder / "log.jsonl")
        minutes.append(run_minutes)
        memory.append(run_memory)
    return asdict(row) | {
        "seeds": [run.seed for run in runs],
        "steps": runs[0].max_steps,
        "evaluated_steps": [score["meta"]["step"] for score in scores],
        "minutes": sum(minutes) / len(minutes) or None,
        "gpu_memory": max(memory) or None,
        "metrics": {metric: _over_seeds(scores, metric) for metric in metrics},
        "train": shlex.join(runs[0].training.command),
        "evaluate": shlex.join(runs[0].evaluation.command),
    }


def _over_seeds(scores: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """A metric, of a subset where one stands before its colon; None where there is no value."""
    subset, _, key = metric.rpartition(":")
    values = []
    for score in scores:
        group = score["subsets"].get(subset, {}) if subset else score["standard"]
        values.append(group.get(key))
    # Mean, and half of the distance between the extremes
    measured = [value for value in values if value is not None]
    mean = sum(measured) / len(measured) if measured else None
    spread = (max(measured) - min(measured)) / 2 if len(measured) > 1 else None
    return {"mean": mean, "spread": spread, "values": values}


def _minutes_and_memory(log: Path) -> tuple[float, float]:
    """Minutes and highest GPU memory in GB of a training, over all of its starts."""
    seconds = 0.0
    memory = 0.0
    images_before = 0
    for text in log.read_text().splitlines() if log.is_file() else ():
        line = json.loads(text)
        if line["kind"] == "train":
            seconds += (line["images"] - images_before) / line["images_per_second"]
            images_before = line["images"]
            memory = max(memory, line.get("gpu_memory", 0))
    return seconds / 60, memory


def markdown(record: dict[str, Any]) -> str:
    """A summary as a page: what every row scored and took, then what it is and its commands."""
    headers = ["row", *record["metrics"], "seeds", "minutes", "GB"]
    lines = [headers, ["---"] * len(headers)]
    commands = []
    for name, row in record["rows"].items():
        # The line of the table
        cells = [name]
        for metric in row["metrics"].values():
            cells.append(_decimal(metric["mean"], 3, metric["spread"]))
        cells.append(str(len(row["seeds"])))
        cells += [_decimal(row["minutes"], 1), _decimal(row["gpu_memory"], 1)]
        lines.append(cells)

        # What it is, and its commands
        note = " ".join(row["note"].split())
        commands.append("\n".join([f"# {name}: {note}", row["train"], row["evaluate"], ""]))
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return _PAGE.format(table=table, commands="\n".join(commands), **record)


def _decimal(value: float | None, digits: int, spread: float | None = None) -> str:
    text = "–" if value is None else f"{value:.{digits}f}"
    return text if spread is None else f"{text} ± {spread:.{digits}f}"


_PAGE = """\
Ablation of `{config}`, evaluated with `{evaluate}`.

{table}

Mean over seeds ± half the distance between the lowest and the highest; a single seed has no ±. \
Minutes: wall time of
the training steps, with the loading, validation and saving on the way; runs that share a device \
slow each other down.
GB: the most that tensors took on the GPU.

The commands of each row's first seed; other seeds differ in `run.seed` and the folder.

```bash
{commands}```
"""
