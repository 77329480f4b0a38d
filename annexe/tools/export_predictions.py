"""`annexe export-predictions`: predictions in the format of another tool."""

from __future__ import annotations

import argparse
from pathlib import Path

from annexe.errors import UserError
from annexe.files import new_folder
from annexe.interchange.answer_files import write_mask_images, write_results
from annexe.interchange.labels import ImportReport
from annexe.interchange.predictions import (
    PhotosByStem,
    Predictions,
    predicted_images,
    read_predicted,
)
from annexe.terminal import say
from annexe.tools.export_data import FORMATS as DATA_FORMATS
from annexe.tools.export_data import add_writing_arguments, show_export, writer_of

FORMATS = (*DATA_FORMATS, "png")


_EXAMPLES = """\
examples:
  annexe export-predictions label-studio predictions.jsonl tasks --data-root data/synthetic
      tasks that people correct, with the photos
  annexe export-predictions png predictions.jsonl answers
      a table of answers, and a mask file for each target
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.epilog = _EXAMPLES
    parser.add_argument("format", choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument(
        "predictions",
        type=Path,
        metavar="PRED",
        help="predictions.jsonl, or the folder that holds it",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder to write")
    photos = parser.add_mutually_exclusive_group()
    photos.add_argument(
        "--data-root", type=Path, metavar="DIR", help="folder whose RGB/ holds the photos"
    )
    photos.add_argument("--images", type=Path, metavar="DIR", help="folder of the photos")
    add_writing_arguments(parser)
    parser.add_argument(
        "--all-masks",
        action="store_true",
        help="keep the mask of every answer (default: of masks of one name that overlap by an IoU "
        "of 0.5, the one with the highest score)",
    )
    parser.add_argument(
        "--model-version",
        default="annexe",
        metavar="NAME",
        help="label-studio: what pre-annotations are called (default %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Read the predictions, write the export, and say what is in it.

    Raises:
        UserError: for wrong arguments, or predictions or photos that cannot be used.
    """
    if arguments.format == "png":
        predictions = read_predicted(arguments.predictions)
        with new_folder(arguments.out) as part:
            count = write_mask_images(predictions, part)
        say(f"{count:,} masks of {_num_queries(predictions):,} answers in '{arguments.out}'")
        return

    # Photos with regions
    writer = writer_of(arguments, arguments.model_version)
    predictions = read_predicted(arguments.predictions)
    folder = arguments.data_root or arguments.images
    photos = PhotosByStem(folder) if folder else None
    report = ImportReport()
    images = predicted_images(
        predictions,
        photos,
        report,
        names=arguments.names,
        keep_all=arguments.all_masks,
    )
    if not images:
        raise UserError(
            f"'{arguments.predictions}' has no mask, and only photos could tell their size; name "
            "their folder by --data-root or --images"
        )
    if photos is None:
        report.note("photos are only named: give --data-root or --images to have them looked up")

    # Files; results of COCO also answer by answer
    with new_folder(arguments.out) as part:
        writer(images, part)
        if arguments.format == "coco":
            write_results(predictions, part)
    show_export(images, report, arguments.out)


def _num_queries(predictions: Predictions) -> int:
    return sum(len(records) for records in predictions.queries.values())
