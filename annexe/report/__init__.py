"""The report of a run: a page with metrics beside baselines and curves, and a browser of queries.

``report.html`` is the page. The folder ``report`` beside it holds the browser of every query, its
data and small pictures. Both work from disk and from any web server.
"""

from __future__ import annotations

import datetime
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from annexe.evaluation.records import Record
from annexe.evaluation.scoring import Scores
from annexe.evaluation.truth import Truth
from annexe.files import remove, replaced, write_text
from annexe.report.breakdowns import COLUMNS as BREAKDOWN_COLUMNS
from annexe.report.breakdowns import breakdowns
from annexe.report.browser import DETAILS_PER_FILE, Browser, choose_pictured, judge_all
from annexe.report.curves import read_curves
from annexe.report.examples import choose, show
from annexe.report.pictures import OUTLINE_WIDTH
from annexe.report.published import comparison
from annexe.report.tables import bars, columns, headline, table
from annexe.report.verdicts import RIGHT, VERDICTS
from annexe.workers import num_cores

__all__ = ["write_report"]

NUM_EXAMPLES = 12


def write_report(
    path: Path,
    *,
    title: str,
    scores: Scores,
    records: list[Record],
    truth: Truth,
    log: Path | None,
    max_pictures: int = 2000,
    num_workers: int | None = None,
) -> None:
    """Write the page and, beside it, the folder of the same name without ``.html``.

    Both are made under other names and renamed at the end, so that an older report is replaced as
    a whole. The page comes last: where it is, its folder is too.

    Args:
        path: the HTML file; its folder exists.
        title: heading of the pages.
        scores: of the records, query by query, and the content of ``metrics.json``: ``standard``
            and, if there, ``baselines``, ``subsets``, ``meta`` and the scores by other protocols.
            Of ``meta``, ``step`` and ``date`` stand at the top, all of it at the bottom.
        records: lines of ``predictions.jsonl``.
        truth: the data set that was predicted.
        log: ``log.jsonl`` of the training run; without one the page has no curves.
        max_pictures: queries that get pictures; the others are listed without. It bounds the time
            that drawing takes, and the size of the folder.
        num_workers: processes; all cores if None.

    Raises:
        UserError: the records do not fit the truth, or a photo cannot be read.
    """
    folder = path.with_suffix("")
    remove(folder.with_name(f"{folder.name}.old"))  # which a kill may have left
    num_workers = num_workers or num_cores()
    with replaced(folder) as part:
        # The browser's data and pictures
        part.mkdir()
        examples = judge_all(records, scores.queries, truth, num_workers)
        browser = Browser(part, examples, choose_pictured(examples, max_pictures), truth, records)
        num_files = browser.write(num_workers)

        # The pages
        shared = {
            "title": title,
            "report_name": path.name,
            "folder": folder.name,
            "verdicts": _verdicts(browser),
            "picture_note": _picture_note(browser),
        }
        for name, text in _browser_files(num_files, shared).items():
            (part / name).write_text(text, encoding="utf-8")
        page = _page(scores.metrics, log, browser, shared)

        # A kill from here on leaves no page rather than half a report
        path.unlink(missing_ok=True)
        if folder.is_file():
            folder.unlink()
    write_text(path, page)


def _page(
    metrics: dict[str, Any], log: Path | None, browser: Browser, shared: dict[str, Any]
) -> str:
    """The summary."""
    # What is shown
    meta = {"date": datetime.date.today().isoformat()} | metrics.get("meta", {})
    all_columns = columns(metrics)
    groups = table(all_columns, metrics.get("intervals", {}))
    examples = choose(browser.examples, browser.pictured, NUM_EXAMPLES)

    # The page
    template = _environment().get_template("template.html")
    return template.render(
        **shared,
        facts=_facts(metrics["standard"], meta),
        meta=meta,
        columns=all_columns,
        groups=groups,
        headline=headline(groups),
        bars=bars(metrics),
        breakdown_columns=list(BREAKDOWN_COLUMNS.values()),
        breakdowns=breakdowns(metrics),
        published=comparison(metrics, meta),
        is_drawn=(browser.truth.dataset.root / "synthetic.json").is_file(),
        curves=read_curves(log) if log else {},
        num_queries=len(browser.examples),
        examples=[show(browser, index) for index in examples],
        outline_width=OUTLINE_WIDTH,
    )


def _browser_files(num_files: dict[str, int], shared: dict[str, Any]) -> dict[str, str]:
    """Name -> text of the browser's page and of what it loads besides data."""
    page = {
        "files": num_files,
        "detailsPerFile": DETAILS_PER_FILE,
        "verdicts": shared["verdicts"],
        "pictureNote": shared["picture_note"],
    }
    template = _environment().get_template("browser.html")
    texts = {"queries.html": template.render(**shared, page=page)}
    for name in ("browser.js", "browser.css"):
        texts[name] = resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
    return texts


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("annexe.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _verdicts(browser: Browser) -> list[dict[str, Any]]:
    """Every verdict with its definition, its color, and how many queries have it."""
    counts = Counter(example.judgement.verdict for example in browser.examples)
    tones = dict.fromkeys(VERDICTS, "bad") | {"boundary": "rough"} | dict.fromkeys(RIGHT, "good")
    return [
        {"name": name, "meaning": meaning, "tone": tones[name], "count": counts[name]}
        for name, meaning in VERDICTS.items()
    ]


def _picture_note(browser: Browser) -> str:
    """Which queries have pictures, in a sentence."""
    num_queries = len(browser.examples)
    num_pictured = len(browser.pictured)
    num_right = sum(example.is_right for example in browser.examples)
    num_errors = num_queries - num_right
    if num_pictured == num_queries:
        return "Every query has pictures."
    if num_pictured < num_errors:
        chosen = f"a fixed choice of the {num_errors:,} errors and none of the others"
    else:
        num_others = num_pictured - num_errors
        others = f"{num_others:,} of the {num_right:,} others"
        chosen = f"all {num_errors:,} errors and a fixed choice of {others}"
    return f"{num_pictured:,} of {num_queries:,} queries have pictures: {chosen}."


def _facts(standard: dict[str, Any], meta: dict[str, Any]) -> list[str]:
    """What was measured, and when, in a few words each."""
    counts = {"num_images": "{:,} images", "num_queries": "{:,} queries"}
    facts = [text.format(standard[key]) for key, text in counts.items() if key in standard]
    if meta.get("step") is not None:
        facts.append(f"checkpoint at step {meta['step']:,}")
    return [*facts, str(meta["date"])]
