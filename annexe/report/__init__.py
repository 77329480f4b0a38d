"""The HTML report of a run: metrics beside baselines, curves, and examples good and bad, in one file."""

from __future__ import annotations

import datetime
from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from annexe.files import write_text
from annexe.report.curves import read_curves
from annexe.report.gallery import FAILURES, GROUPS, VERDICTS, build_cards
from annexe.report.tables import bars, columns, headline, table
from annexe.scoring import Record, Truth

__all__ = ["write_report"]


def write_report(
    path: Path,
    *,
    title: str,
    metrics: dict[str, Any],
    records: list[Record],
    truth: Truth,
    log: Path | None,
    num_examples: int = 60,
) -> None:
    """Write one self-contained HTML page, whole or not at all.

    Args:
        path: the HTML file; its folder exists.
        title: heading of the page.
        metrics: the content of ``metrics.json``: ``standard`` and, if there, ``baselines``, ``subsets`` and
            ``meta``. Of ``meta``, ``step`` and ``date`` stand at the top, all of it at the bottom.
        records: lines of ``predictions.jsonl``.
        truth: the data set that was predicted.
        log: ``log.jsonl`` of the training run; without one the page has no curves.
        num_examples: queries in the gallery; about 80 kB of page each.

    Raises:
        UserError: the records do not fit the truth, or a photo cannot be read.
    """
    environment = Environment(
        loader=PackageLoader("annexe.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    meta = {"date": datetime.date.today().isoformat()} | metrics.get("meta", {})
    all_columns = columns(metrics)
    groups = table(all_columns)
    cards = build_cards(records, truth, num_examples)
    page = environment.get_template("template.html").render(
        title=title,
        facts=_facts(metrics["standard"], meta),
        meta=meta,
        columns=all_columns,
        groups=groups,
        headline=headline(groups),
        bars=bars(metrics),
        curves=read_curves(log) if log else {},
        cards=cards,
        num_queries=sum(record["kind"] == "query" for record in records),
        group_names=GROUPS,
        group_counts=Counter(card.example.group for card in cards),
        num_failures=sum(card.is_failure for card in cards),
        verdicts=VERDICTS,
        failures=FAILURES,
    )
    write_text(path, page)


def _facts(standard: dict[str, Any], meta: dict[str, Any]) -> list[str]:
    """What was measured, and when, in a few words each."""
    counts = {"num_images": "{:,} images", "num_queries": "{:,} queries"}
    facts = [text.format(standard[key]) for key, text in counts.items() if key in standard]
    if meta.get("step") is not None:
        facts.append(f"checkpoint at step {meta['step']:,}")
    return [*facts, str(meta["date"])]
