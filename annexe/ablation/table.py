"""Results of an ablation as a table."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from typing import Any

from annexe.ablation.queue import _took
from annexe.ablation.rows import Ablation, Run


def summary(ablation: Ablation, runs: list[Run]) -> dict[str, Any]:
    """All that the table shows, of the runs that are finished."""
    rows = {}
    for name, row in ablation.rows.items():
        own = [run for run in runs if run.row == name and run.metrics.is_file()]
        if not own:
            continue
        scores = [json.loads(run.metrics.read_text()) for run in own]
        minutes, memory = zip(
            *(_took(run.training.folder / "log.jsonl") for run in own), strict=True
        )
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


def _over_seeds(scores: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """A metric, of a subset where one stands before its colon; None where there was nothing to measure."""
    subset, _, key = metric.rpartition(":")
    values = [
        (score["subsets"].get(subset, {}) if subset else score["standard"]).get(key)
        for score in scores
    ]
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
        scores = [
            _decimal(metric["mean"], 3, metric["spread"]) for metric in row["metrics"].values()
        ]
        took = [str(len(row["seeds"])), _decimal(row["minutes"], 1), _decimal(row["gpu_memory"], 1)]
        table.append([name, *scores, *took])
        commands.append(
            "\n".join(
                [f"# {name}: {' '.join(row['note'].split())}", row["train"], row["evaluate"], ""]
            )
        )
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
