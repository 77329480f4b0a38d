"""`annexe convert-predictions`: mask images and a table of answers to a predictions file."""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from annexe.datasets.pixels import read_image
from annexe.errors import UserError
from annexe.files import require_writable, write_text
from annexe.rle import Rle, encode
from annexe.terminal import say, track

HELP = "make predictions.jsonl of mask images and a table of answers"

REQUIRED = ("image", "annotation", "query_id", "answer")
_NAME = re.compile(r"(?P<annotation>\d+)_(?P<query_id>.+)_(?P<slot>\d+)\.png")

Key = tuple[str, int, str]  # image, annotation, query id as text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "masks",
        type=Path,
        help="folder of IMAGE/ANNOTATION_QUERY_SLOT.png, 0 = outside of the mask",
    )
    parser.add_argument(
        "answers",
        type=Path,
        help=f"rows of {', '.join(REQUIRED)}, optionally presence and analysis: "
        ".tsv with a header, or .jsonl",
    )
    parser.add_argument("out", type=Path, help="predictions.jsonl to write")


def run(arguments: argparse.Namespace) -> None:
    require_writable(arguments.out)
    masks = find_masks(arguments.masks)
    lines, analyses = read_answers(arguments.answers, masks)
    if masks:
        path = next(iter(next(iter(masks.values())).values()))
        raise UserError(
            f"no row of '{arguments.answers}' belongs to mask '{path}'; add one, or rename the file"
        )

    # The mask images, last because they take the longest
    for line in track(lines, "reading masks", transient=True):
        for mask in line["masks"]:
            mask["rle"] = read_mask(mask["rle"])

    # Lines of photos, then those of queries
    images = []
    for image, analysis in analyses.items():
        images.append({"kind": "image", "image": image, "analysis": analysis})
    text = [json.dumps(line, ensure_ascii=False) + "\n" for line in (*images, *lines)]
    write_text(arguments.out, "".join(text))
    num_masks = sum(len(line["masks"]) for line in lines)
    say(f"{len(lines):,} queries with {num_masks:,} masks in '{arguments.out}'")


def find_masks(folder: Path) -> dict[Key, dict[int, Path]]:
    """Query -> slot -> mask file of every PNG below the folder.

    Raises:
        UserError: there is no such folder, or a file has another name.
    """
    if not folder.is_dir():
        raise UserError(
            f"no folder '{folder}'; give the one that holds IMAGE/ANNOTATION_QUERY_SLOT.png"
        )
    masks: dict[Key, dict[int, Path]] = {}
    for path in sorted(folder.rglob("*.png")):
        match = _NAME.fullmatch(path.name)
        if not match or path.parent.parent != folder:
            raise UserError(
                f"mask '{path}' is not named IMAGE/ANNOTATION_QUERY_SLOT.png; "
                "rename it or take it away"
            )
        key = (path.parent.name, int(match["annotation"]), match["query_id"])
        masks.setdefault(key, {})[int(match["slot"])] = path
    return masks


def read_answers(
    path: Path, masks: dict[Key, dict[int, Path]]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Read a table of answers.

    Args:
        path: the table.
        masks: query -> slot -> mask file. Queries that the table has are taken out.

    Returns:
        The query lines, in which files stand in for masks, and image -> analysis.

    Raises:
        UserError: a row is damaged, stands twice, or has another analysis than an earlier one.
    """
    seen: set[Key] = set()
    analyses: dict[str, str] = {}
    lines: list[dict[str, Any]] = []
    for where, row in read_rows(path):
        key = (row["image"], row["annotation"], str(row["query_id"]))
        if key in seen:
            raise UserError(
                f"{where}: query {row['query_id']!r} of this annotation stands further up; "
                "keep one row"
            )
        seen.add(key)
        line = {"kind": "query", **{name: row[name] for name in REQUIRED}, "masks": []}
        for slot, file in sorted(masks.pop(key, {}).items()):
            line["masks"].append({"slot": slot, "rle": file})
        if row.get("presence") is not None:
            line["presence"] = row["presence"]
        lines.append(line)

        # Every row may have the analysis of its photo
        analysis = row.get("analysis")
        if analysis is not None and analyses.setdefault(row["image"], analysis) != analysis:
            raise UserError(
                f"{where}: image '{row['image']}' has another analysis further up; "
                "give one per image"
            )
    return lines, analyses


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the rows of a table of answers; in a TSV, numbers are read as such.

    Yields:
        Where the row is, for messages, and the row.

    Raises:
        UserError: the table cannot be read, or a row is damaged or incomplete.
    """
    # The lines of the file
    try:
        with path.open(encoding="utf-8-sig") as file:  # a spreadsheet program puts a mark in front
            lines = list(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read answers '{path}' ({error}); give a .tsv or .jsonl file"
        ) from None
    if path.suffix not in (".tsv", ".jsonl"):
        raise UserError(
            f"answers '{path}' are neither .tsv (with a header) nor .jsonl; "
            "save them as one of these"
        )

    # Row by row
    is_table = path.suffix == ".tsv"
    csv.field_size_limit(sys.maxsize)
    rows: Iterable[Any] = lines
    if is_table:
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    for line_number, line in enumerate(rows, start=2 if is_table else 1):
        where = f"'{path}', line {line_number}"
        try:
            row = _typed(line) if is_table else json.loads(line)
            missing = [name for name in REQUIRED if row.get(name) is None]
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no character
            if not missing and not isinstance(row["image"], str):
                raise ValueError("image must be a string")
            if not missing and not isinstance(row["annotation"], int):
                raise ValueError("annotation must be a number")
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{where} is wrong ({error}); fix it or remove it") from None
        if missing:
            raise UserError(
                f"{where} has no {', '.join(missing)}; a row needs {', '.join(REQUIRED)}"
            )
        yield where, row


def read_mask(path: Path) -> Rle:
    """RLE of the pixels that are not 0, in any channel but alpha.

    Raises:
        UserError: the file is no image.
    """
    image = read_image(path)
    inside = np.asarray(image) > 0
    if inside.ndim == 3:
        num_colors = len(image.getbands()) - ("A" in image.getbands())
        inside = np.any(inside[..., :num_colors], axis=2)
    return encode(inside)


def _typed(row: dict[str, str]) -> dict[str, Any]:
    """A row of text with its numbers as numbers; empty fields are left out."""
    typed: dict[str, Any] = {name: text for name, text in row.items() if text or name == "answer"}
    if row.get("annotation"):
        typed["annotation"] = int(row["annotation"])
    if (row.get("query_id") or "").isdecimal():
        typed["query_id"] = int(row["query_id"])
    if row.get("presence"):
        typed["presence"] = float(row["presence"])
    return typed
