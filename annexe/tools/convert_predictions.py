"""`annexe convert-predictions`: masks and a table of answers to a predictions file.

Masks are images, or results of COCO that name the question that they answer.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct
from PIL import Image

from annexe.datasets.image_names import warn_of_ignored
from annexe.datasets.pixels import read_image
from annexe.errors import UserError, explain_mismatch
from annexe.evaluation.records import PredictedMask, unique_keys
from annexe.files import read_text, write_text
from annexe.interchange.answer_files import QuestionKey, read_results
from annexe.rle import Rle, encode
from annexe.terminal import say, track
from annexe.tools.score import require_output

log = logging.getLogger(__name__)

REQUIRED = ("image", "annotation", "query_id", "answer")
OPTIONAL = ("query", "presence", "analysis")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_PATTERN = "IMAGE/ANNOTATION_QUERY_SLOT.png"
_NAME = re.compile(
    r"(?P<annotation>\d+)_(?P<query_id>.+)_(?P<slot>\d+)\.png", re.ASCII | re.IGNORECASE
)
_NAME_OF_MASK = re.compile(r"\d+_.+_\d+(\..*)?", re.ASCII)  # in whatever format

Masks = dict[QuestionKey, dict[int, Path | PredictedMask]]
"""Question -> slot -> mask, or the file that holds it."""


class _Row(Struct):
    """The types in a row of a table."""

    image: str
    annotation: Annotated[int, Meta(ge=0)]
    query_id: int | str
    answer: str
    query: str | None = None
    presence: Annotated[float, Meta(ge=0, le=1)] | None = None
    analysis: str | None = None


_EXAMPLES = """\
examples:
  annexe convert-predictions masks answers.tsv predictions.jsonl
      a file that score, compare and export-predictions read
  annexe convert-predictions results.json answers.tsv predictions.jsonl --dataset questions.json
      the same of results of COCO
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "masks",
        metavar="MASKS",
        type=Path,
        help="folder of IMAGE/ANNOTATION_QUERY_SLOT.png, 0 = outside of the mask; or .json with "
        "results of COCO that have annotation and query_id",
    )
    parser.add_argument(
        "answers",
        metavar="ANSWERS",
        type=Path,
        help=f"rows of {', '.join(REQUIRED)}, optionally query, presence and analysis: "
        ".tsv with a header, or .jsonl",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="predictions.jsonl to write")
    parser.add_argument(
        "--dataset",
        type=Path,
        metavar="FILE",
        help="results of COCO: the data set whose images the numbers in image_id mean",
    )


def run(arguments: argparse.Namespace) -> None:
    # Arguments
    has_results = arguments.masks.suffix.lower() == ".json" and not arguments.masks.is_dir()
    inputs = [path for path in (arguments.answers, arguments.dataset) if path is not None]
    require_output(arguments.out, *inputs, *([arguments.masks] if has_results else []))
    if arguments.dataset is not None and not has_results:
        raise UserError("--dataset is for results of COCO (.json); leave it out with mask images")

    # Answers with their masks
    masks: Masks = {}
    if has_results:
        for key, results in read_results(arguments.masks, arguments.dataset).items():
            masks[key] = dict(results)
    else:
        for key, files in find_masks(arguments.masks).items():
            masks[key] = dict(files)
    lines, analyses = read_answers(arguments.answers, masks)
    if not lines:
        raise UserError(f"'{arguments.answers}' has no rows; give one for each answer")
    _require_used(masks, arguments.answers)

    # The mask images, last because they take the longest
    graded = []
    for line in track(lines, "reading masks", transient=True):
        for mask in line["masks"]:
            source = mask.pop("source")
            if isinstance(source, Path):
                mask["rle"], is_graded = read_mask(source)
                if is_graded:
                    graded.append(source)
            else:
                mask.update(msgspec.to_builtins(source))
    if graded:
        log.warning(
            "mask '%s'%s has several values beside 0: every pixel that is not 0 is inside",
            graded[0],
            _number(len(graded)),
        )

    # Lines of photos, then those of queries
    images = []
    for image, analysis in analyses.items():
        images.append({"kind": "image", "image": image, "analysis": analysis})
    text = [json.dumps(line, ensure_ascii=False) + "\n" for line in (*images, *lines)]
    write_text(arguments.out, "".join(text))
    num_masks = sum(len(line["masks"]) for line in lines)
    say(f"{len(lines):,} queries with {num_masks:,} masks in '{arguments.out}'")


# Masks


def _require_used(masks: Masks, answers: Path) -> None:
    """Refuse masks that belong to no row of the table.

    Raises:
        UserError: naming the first of them.
    """
    if not masks:
        return
    key, slots = next(iter(masks.items()))
    first = next(iter(slots.values()))
    name = f"'{first}'"
    fix = "rename the file"
    if not isinstance(first, Path):
        name = f"of query {key[2]!r} of annotation {key[1]} of '{key[0]}'"
        fix = "remove the entry"
    num_unused = sum(map(len, masks.values()))
    raise UserError(
        f"no row of '{answers}' belongs to mask {name}{_number(num_unused)}; add one, or {fix}"
    )


def find_masks(folder: Path) -> dict[QuestionKey, dict[int, Path]]:
    """Query -> slot -> mask file of every PNG below the folder; other files are counted and named.

    Raises:
        UserError: there is no such folder, an image or mask is no PNG or has another name, or two
            images are of one slot.
    """
    if not folder.is_dir():
        raise UserError(f"no folder '{folder}'; give the one that holds {_PATTERN}")
    masks: dict[QuestionKey, dict[int, Path]] = {}
    ignored: list[str] = []
    no_png: list[Path] = []
    misnamed: list[Path] = []
    for path in _files_below(folder):
        # Files that are no image, and those that programs hide
        parts = path.relative_to(folder).parts
        is_hidden = any(part[0] == "." for part in parts)
        is_image = path.suffix.lower() in IMAGE_ENDINGS
        if is_hidden or not (is_image or _NAME_OF_MASK.fullmatch(path.name)):
            ignored.append(str(Path(*parts)))
            continue

        # Images, and masks of other formats
        match = _NAME.fullmatch(path.name)
        if path.suffix.lower() != ".png":
            no_png.append(path)
        elif match is None or len(parts) != 2:
            misnamed.append(path)
        else:
            key = (parts[0], int(match["annotation"]), match["query_id"])
            other = masks.setdefault(key, {}).setdefault(int(match["slot"]), path)
            if other != path:
                raise UserError(f"'{other}' and '{path}' are of one slot; keep one")
    if no_png:
        raise UserError(
            f"mask '{no_png[0]}'{_number(len(no_png))} is no PNG; save masks as PNG, for "
            "JPEG changes them along their borders"
        )
    if misnamed:
        raise UserError(
            f"mask '{misnamed[0]}' is not named {_PATTERN}{_number(len(misnamed))}; "
            "rename it or take it away"
        )
    warn_of_ignored(f"'{folder}'", "files that are no images", ignored)
    return masks


def read_mask(path: Path) -> tuple[Rle, bool]:
    """The mask in an image: the pixels that are not 0, or not black.

    Returns:
        The mask, and whether the image has shades, as a map of probabilities has.

    Raises:
        UserError: the file is no PNG, or may be read in two ways.
    """
    image = read_image(path, fix="make it again, or take it away to refuse the question")
    if image.format != "PNG":
        raise UserError(f"mask '{path}' is {image.format}, not PNG; save it as PNG")
    if image.mode == "P":
        return encode(_inside_of_palette(image, path)), False
    pixels = np.asarray(image)  # [H, W] or [H, W, channels]
    inside = pixels > 0
    is_graded = False
    if inside.ndim == 3:
        # Transparent pixels could be inside as well as outside
        num_colors = len(image.getbands()) - ("A" in image.getbands())
        if (pixels[..., num_colors:] != np.iinfo(pixels.dtype).max).any():
            raise UserError(f"mask '{path}' is transparent; save it in gray, with 0 outside")
        inside = np.any(inside[..., :num_colors], axis=2)
    elif inside.any():
        is_graded = bool(pixels[inside].min() != pixels.max())
    return encode(inside), is_graded


def _files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and the folders in it, in order."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files_below(path)
        else:
            yield path


def _inside_of_palette(image: Image.Image, path: Path) -> np.ndarray:
    """The mask in an image with a palette, bool[H, W].

    Index 0 is outside if it is black and the others are not. In a palette with white first it is
    the other way round.

    Raises:
        UserError: colors and indices tell different masks.
    """
    indices = np.asarray(image)
    colors = np.reshape(image.getpalette("RGB") or [], (-1, 3))
    is_lit = np.zeros(256, bool)
    is_lit[: len(colors)] = colors.any(axis=1)
    used = np.unique(indices)
    if np.array_equal(is_lit[used], used > 0):
        return indices > 0
    if is_lit[0] and not is_lit[1:].any():
        return indices == 0
    raise UserError(
        f"mask '{path}' has a palette in which 0 is not the one black color; "
        "save it in gray, with 0 outside"
    )


def _number(count: int) -> str:
    """How many masks a message is about, where it is more than the one that it names."""
    return f" ({count:,} such masks)" if count > 1 else ""


# Answers


def read_answers(path: Path, masks: Masks) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Read a table of answers.

    Args:
        path: the table.
        masks: query -> slot -> mask, or its file. Queries that the table has are taken out.

    Returns:
        The query lines, in which masks are a slot and its ``source``, and image -> analysis.

    Raises:
        UserError: a row is damaged, stands twice, or has another analysis than an earlier one.
    """
    seen: set[QuestionKey] = set()
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
        for slot, source in sorted(masks.pop(key, {}).items()):
            line["masks"].append({"slot": slot, "source": source})
        for name in ("query", "presence"):
            if row.get(name) is not None:
                line[name] = row[name]
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
    # The kind of table
    ending = path.suffix.lower()
    if ending not in (".tsv", ".jsonl"):
        raise UserError(
            f"answers '{path}' are neither .tsv (with a header) nor .jsonl; "
            "save them as one of these"
        )
    lines = _read_lines(path)
    rows: Iterator[tuple[int, Any]] = _tsv_rows(path, lines)
    parse: Callable[[Any], Any] = _typed
    if ending == ".jsonl":
        rows = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
        parse = partial(json.loads, object_pairs_hook=unique_keys)

    # Row by row
    ignored: set[str] = set()
    for line_number, line in rows:
        where = f"'{path}', line {line_number}"
        try:
            row = parse(line)
            missing = [name for name in REQUIRED if row.get(name) is None]
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no character
            if not missing:
                msgspec.convert(row, _Row)
        except msgspec.ValidationError as error:
            reason = " ".join(explain_mismatch(str(error), row))
            raise UserError(f"{where} is wrong ({reason}); fix it or remove it") from None
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{where} is wrong ({error}); fix it or remove it") from None
        if missing:
            raise UserError(
                f"{where} has no {', '.join(missing)}; a row needs {', '.join(REQUIRED)}"
            )
        ignored.update(row.keys() - {*REQUIRED, *OPTIONAL})
        yield where, row
    warn_of_ignored(f"'{path}'", "columns", ignored)


def _read_lines(path: Path) -> list[str]:
    """The lines of a text in UTF-8 or UTF-16, with any line ends.

    Raises:
        UserError: the file cannot be read, or is no such text.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot read answers '{path}' ({reason}); give a .tsv or .jsonl file in UTF-8"
        ) from None
    return list(io.StringIO(text, newline=None))  # only line ends split, no other separators


def _tsv_rows(path: Path, lines: list[str]) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Line number and cells by column of every row below the header.

    Raises:
        UserError: a column is missing or stands twice, or a row has more cells than there are
            columns.
    """
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    header = [name.strip() for name in next(reader, [])]
    named = [name for name in header if name]
    missing = [name for name in REQUIRED if name not in named]
    if missing:
        raise UserError(
            f"'{path}', line 1 has no column {', '.join(missing)}; the table needs a header with "
            f"{', '.join(REQUIRED)}, separated by tabs"
        )
    for name in named:
        if named.count(name) > 1:
            raise UserError(f"'{path}' has the column '{name}' twice; keep one")
    quoted = []
    for cells in reader:
        if not any(cells):
            continue

        # A tab in a cell would push all others to the right
        num_cells = max(number for number, cell in enumerate(cells, start=1) if cell)
        if num_cells > len(header):
            raise UserError(
                f"'{path}', line {reader.line_num} has {num_cells} cells for {len(header)} "
                "columns; give answers with tabs as .jsonl"
            )
        row: dict[str, str | None] = dict.fromkeys(named)
        row.update((name, cell) for name, cell in zip(header, cells, strict=False) if name)
        if any(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells):
            quoted.append(reader.line_num)
        yield reader.line_num, row
    if quoted:
        log.warning(
            "'%s': %d rows have cells in quotation marks, the first in line %d; they are kept as "
            "they are: if a program put them there, give .jsonl",
            *(path, len(quoted), quoted[0]),
        )


def _typed(row: dict[str, str | None]) -> dict[str, Any]:
    """A row of text with its numbers as numbers; empty fields are left out, but for the answer.

    Raises:
        ValueError: a number is none.
    """
    typed: dict[str, Any] = {name: text for name, text in row.items() if text or name == "answer"}
    annotation = typed.get("annotation")
    if annotation:
        if not (annotation.isascii() and annotation.strip().isdigit()):
            raise ValueError(f"annotation {annotation!r} is no number")
        typed["annotation"] = int(annotation)
    query_id = typed.get("query_id", "")
    if query_id.isascii() and query_id.isdigit():
        typed["query_id"] = int(query_id)
    if "presence" in typed:
        typed["presence"] = float(typed["presence"])
    return typed
