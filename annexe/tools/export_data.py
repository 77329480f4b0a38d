"""`annexe export-data`: the labels of a data root in the format of another tool."""

from __future__ import annotations

import argparse
from functools import partial
from importlib import import_module
from pathlib import Path

from annexe.datasets.image_names import SPLITS
from annexe.errors import UserError
from annexe.files import require_new_folder
from annexe.interchange.labels import ImportReport, LabeledImage, Writer
from annexe.interchange.predictions import NAMES, read_truth
from annexe.terminal import say, table

FORMATS = ("coco", "label-studio", "cvat", "id-png")
_SHOWN = 3  # entries that are named of each reason


_EXAMPLES = """\
example:
  annexe export-data label-studio data/synthetic labels --split train
      photos and labels of one split, in a folder that Label Studio imports
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.epilog = _EXAMPLES
    parser.add_argument("format", choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder that holds RGB/")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder to write")
    parser.add_argument(
        "--split", choices=SPLITS, action="append", help="one of its splits (default: all)"
    )
    add_writing_arguments(parser)
    parser.add_argument(
        "--text",
        action="store_true",
        help="also analysis sentences and questions, as far as the format holds them",
    )


def add_writing_arguments(parser: argparse.ArgumentParser) -> None:
    """What says how regions and photos are called."""
    parser.add_argument(
        "--names",
        choices=NAMES,
        default="phrases",
        help="what things are called: as the texts call them, or hands and categories "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--photo-prefix",
        metavar="TEXT",
        help="label-studio: what stands before the name of a photo, such as s3://bucket/; photos "
        "are not copied then (default: served from the folder OUT)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Read the data, write the export, and say what is in it.

    Raises:
        UserError: for wrong arguments, or data that cannot be read or written so.
    """
    writer = writer_of(arguments)
    report = ImportReport()
    images = read_truth(
        arguments.root,
        arguments.split,
        report,
        names=arguments.names,
        with_text=arguments.text,
    )
    if not images:
        raise UserError(f"no photo of '{arguments.root}' has a target; there is nothing to export")
    writer(images, arguments.out)
    show_export(images, report, arguments.out)


def writer_of(arguments: argparse.Namespace, model_version: str | None = None) -> Writer:
    """The writer of the format, after a look at what can be wrong with the arguments.

    Args:
        arguments: of a command with `add_writing_arguments`.
        model_version: regions are predictions of this model.

    Raises:
        UserError: an option is of another format, or the folder is not new.
    """
    require_new_folder(arguments.out)
    module = import_module(f"annexe.interchange.{arguments.format.replace('-', '_')}")
    if arguments.format == "label-studio":
        prefix = arguments.photo_prefix
        return partial(module.write, model_version=model_version, photo_prefix=prefix)
    if arguments.photo_prefix is not None:
        raise UserError(
            f"--photo-prefix is for label-studio alone; leave it out with {arguments.format}"
        )
    write: Writer = module.write
    return write


def show_export(images: list[LabeledImage], report: ImportReport, out: Path) -> None:
    """Say what was written, and what was left out and why."""
    if report.left_out:
        rows = []
        for reason, entries in report.left_out.items():
            more = f"; and {len(entries) - _SHOWN:,} more" if len(entries) > _SHOWN else ""
            rows.append([reason, f"{len(entries):,}", "; ".join(entries[:_SHOWN]) + more])
        table(["left out", "number", "such as"], rows)
    for note in report.notes:
        say(f"note: {note}")
    num_regions = sum(len(image.regions) for image in images)
    say(f"{len(images):,} photos with {num_regions:,} masks in '{out}'")
