"""`annexe import-data`: labels of other tools and data sets to a data root."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

from annexe.datasets.image_names import SPLITS
from annexe.doctor.problems import ERROR
from annexe.doctor.survey import survey
from annexe.errors import UserError
from annexe.files import require_writable, write_json
from annexe.interchange.labels import FORMATS, ImportReport, LabeledImage, Reader, ReadOptions
from annexe.interchange.layout import Layout, LayoutOptions, check_target, collect, write_layout
from annexe.terminal import say, table, track
from annexe.tools.doctor import show, verdict_of
from annexe.workers import num_cores

_SHOWN = 3  # entries that are named of each reason
_FEW_REFUSALS = 0.1  # share of the questions


_EXAMPLES = """\
examples:
  annexe import-data coco labels/annotations.json data/mine --images labels/photos
      data/mine with photos, masks and questions, as a training reads them
  annexe import-data cvat export.zip data/mine --split test
      further photos for the same folder, all of them in test

Everything that was left out is named.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.epilog = _EXAMPLES
    add = parser.add_argument
    add("format", choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    add("source", type=Path, metavar="SRC", help="annotation file or folder")
    add("out", type=Path, metavar="OUT", help="data root to make or to add photos to")

    # what is read
    add("--images", type=Path, metavar="DIR", help="folder of the photos (default: beside SRC)")
    everything = "all things of the labeled categories are labeled: absent ones may be asked about"
    add("--complete", action="store_true", help=everything)
    add("--skip-bad", action="store_true", help="leave out photos with an error")

    # what is written
    automatic = "auto: also questions about masks and roles; none: only those that SRC has"
    add("--questions", choices=("auto", "none"), default="auto", help=automatic)
    add("--split", choices=SPLITS, help="of all photos (default: as SRC says, else by share)")
    share = "share of the photos in {} where SRC has no splits (default %(default)s)"
    add("--val", type=float, default=0.1, metavar="SHARE", help=share.format("val"))
    add("--test", type=float, default=0.1, metavar="SHARE", help=share.format("test"))
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="settles questions and shares (default %(default)s)",
    )
    add("--report", type=Path, metavar="FILE", help="write what was taken and left out as JSON")
    add("--workers", type=int, metavar="N", help="processes (default: all cores)")


def run(arguments: argparse.Namespace) -> None:
    """Read, write, report, and check the result.

    Raises:
        UserError: for wrong arguments, or labels or photos that cannot be used.
        SystemExit: with code 1, if the doctor finds errors.
    """
    # Arguments
    num_workers = _num_workers(arguments)
    shares = _shares(arguments)
    check_target(arguments.out)
    if arguments.report is not None:
        require_writable(arguments.report)
    if not arguments.source.exists():
        raise UserError(f"no file or folder '{arguments.source}'; give the labels to import")
    if arguments.images is not None and not arguments.images.is_dir():
        raise UserError(f"--images: no folder '{arguments.images}'; give the one of the photos")

    # Labels and photos
    report = ImportReport()
    options = LayoutOptions(
        split=arguments.split,
        shares=shares,
        seed=arguments.seed,
        automatic=arguments.questions == "auto",
        skip_bad=arguments.skip_bad,
        num_workers=num_workers,
    )
    try:
        images = read_images(arguments, report)
        layout = write_layout(images, arguments.out, options, report)
    except UserError as error:
        raise UserError(report.as_given(str(error))) from None
    note_missing_hands(images, report)
    if not arguments.complete:
        _note_few_refusals(layout, report)

    # What was done, and whether it is sound
    show_report(layout, report)
    result = survey(arguments.out, num_workers)
    verdict = verdict_of(result)
    has_errors = any(problem.severity == ERROR for problem in result.problems)
    if has_errors:
        show(result)
    say(f"doctor of '{arguments.out}': {verdict}")
    if arguments.report is not None:
        content = {"format": arguments.format, "source": str(arguments.source)}
        write_json(arguments.report, {**content, **as_dict(layout, report), "doctor": verdict})
    if has_errors:
        sys.exit(1)


def read_images(arguments: argparse.Namespace, report: ImportReport) -> list[LabeledImage]:
    """The photos of the source, checked."""
    name = arguments.format.replace("-", "_")
    read: Reader = import_module(f"annexe.interchange.{name}").read
    options = ReadOptions(images=arguments.images, is_complete=arguments.complete)
    entries = track(read(arguments.source, options, report), "reading labels", stderr=True)
    return collect(entries, report, skip_bad=arguments.skip_bad)


def _num_workers(arguments: argparse.Namespace) -> int:
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers is {arguments.workers}; give at least 1")
    return arguments.workers or num_cores()


def _shares(arguments: argparse.Namespace) -> tuple[float, float, float]:
    """Shares of train, val and test."""
    val = arguments.val
    test = arguments.test
    is_possible = min(val, test, arguments.seed) >= 0 and val + test < 1
    if not is_possible:  # written so that NaN is refused
        raise UserError(
            f"cannot share out photos with --val {val}, --test {test}, --seed {arguments.seed}: "
            "give shares from 0 that leave something to train, and a seed from 0 on"
        )
    return 1 - val - test, val, test


def note_missing_hands(images: list[LabeledImage], report: ImportReport) -> None:
    """Say it where no label means a hand, as when hands are called "LH" and "RH"."""
    regions = [region for image in images for region in image.regions]
    if not regions or any(region.hand for region in regions):
        return
    names = list(dict.fromkeys(region.name for region in regions if region.name))
    called = ", ".join(f"'{name}'" for name in names[:_SHOWN])
    more = ", ..." if len(names) > _SHOWN else ""
    report.note(
        f"no region is a hand, so no question is asked about one (regions are called {called}"
        f"{more}); call hands 'left hand' and 'right hand'"
    )


def _note_few_refusals(layout: Layout, report: ImportReport) -> None:
    """Say it where a model would hardly learn that a question can have no target."""
    counts = sum(layout.counts.values(), Counter())
    share = counts["questions without target"] / counts["questions"]
    if share < _FEW_REFUSALS:
        report.note(
            f"{share:.0%} of the questions have no target, so that a model learns little of "
            "refusing; if everything of the labeled categories is labeled, say so by --complete"
        )


# The report


def show_report(layout: Layout, report: ImportReport) -> None:
    """Print what was taken by split, what was left out and why, and what else is to be known."""
    counts = {**layout.counts, "all": sum(layout.counts.values(), Counter())}
    rows = []
    for what in counts["all"]:
        rows.append([what, *(f"{count[what]:,}" for count in counts.values())])
    without = "questions without target"
    shares = [_share(count[without], count["questions"]) for count in counts.values()]
    rows.append([f"share of {without}", *shares])
    table(["taken", *counts], rows)

    if report.left_out:
        rows = []
        for reason, entries in report.left_out.items():
            named = "; ".join(entries[:_SHOWN])
            more = len(entries) - _SHOWN
            shown = f"{named}; and {more:,} more" if more > 0 else named
            rows.append([reason, f"{len(entries):,}", shown])
        table(["left out", "number", "such as"], rows)
    for note in report.notes:
        say(f"note: {note}")
    if layout.renamed:
        name, stem = next(iter(layout.renamed.items()))
        say(f"note: {len(layout.renamed):,} photos have other names now: '{name}' is '{stem}'")


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def as_dict(layout: Layout, report: ImportReport) -> dict[str, object]:
    """All of the report in plain containers."""
    return {
        "splits": layout.counts,
        "taken": report.taken,
        "left_out": report.left_out,
        "notes": report.notes,
        "renamed": layout.renamed,
    }
