"""`annexe predict`: ask a trained model about photos of one's own, and draw what it answers."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import reprlib
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from annexe.build import load_config, restore_model
from annexe.checkpoints.run_folder import require_checkpoint, without_sources
from annexe.checkpoints.saved_settings import flatten
from annexe.config import Config, as_dict, device_settings
from annexe.datasets.photos import Photos, photo_files, read_photo, refused_photos
from annexe.distributed import make_accelerator
from annexe.errors import UserError
from annexe.evaluation.predict import Answers, plan_batches, predict, require_records
from annexe.evaluation.records import ImageRecord, QueryRecord, Record, line_of
from annexe.files import append_text, locked, part_of, replaced, write_text
from annexe.models.language_model.tokenizer import PLACEHOLDER, TEMPLATE_TOKENS
from annexe.rle import decode
from annexe.settings import as_option
from annexe.terminal import say, track

HELP = "analyze photos of your own, answer questions about them, and draw the masks"
# What a training may have set and a few photos do not need
_SIMPLE = (
    "run.compile=false",
    "run.cuda_graphs=false",
    "run.num_workers=0",
    "run.batch_size=4",
    "run.parallel=ddp",
)

SLOT_COLORS = ("#ff2d95", "#00b8f5", "#ffc400", "#8f6bff", "#2fd0a5", "#ff7a2f")  # the report's
MAX_PHOTO_SIDE = 1280  # of a photo in a picture, in pixels
MIN_CAPTION_WIDTH = 640
_OPACITY = 0.42  # of a mask
_FONT_SIZE = 26
_GAP = 10  # around lines of text

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_folder",
        metavar="run",
        type=os.path.expanduser,
        help="run folder, or one of its checkpoints",
    )
    parser.add_argument(
        "photos",
        nargs="+",
        type=Path,
        metavar="PHOTO",
        help="image files, or folders with .jpg, .png or .webp",
    )
    parser.add_argument(
        "--ask", nargs="+", required=True, metavar="QUESTION", help="asked of every photo"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for predictions.jsonl and the pictures; with what the same command left in "
        "it, it goes on",
    )
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="A.B=C",
        help="settings put over those of the run, "
        "such as run.device=cpu model.presence_threshold=0.3",
    )


def run(arguments: argparse.Namespace) -> None:
    """Answer, draw and write batch by batch; what earlier calls of the same command did stays.

    Raises:
        UserError: for wrong arguments, and where no photo can be read.
        SystemExit: with code 2, if a photo could not be read, and 130, if it was interrupted.
    """
    # The photos and the settings
    check_questions(arguments.ask)
    files = photo_files(arguments.photos)
    reasons = refused_photos(files)
    if len(reasons) == len(files):
        raise UserError(reasons[files[0]])
    out = arguments.out
    checkpoint = require_checkpoint(arguments.run_folder, "best")
    options = [as_option("run.output_dir", out), *_SIMPLE, *arguments.options]
    config = load_config(checkpoint / "config.yaml", options)
    readable = [file for file in files if file not in reasons]
    batches = plan_batches(len(readable), config.run.batch_size)

    # What is done already
    require_free(out)
    with locked(out, setting="--out"):
        finished = FinishedBatches(out, made_from(arguments.ask, files, checkpoint, config))
        num_done = finished.open()
        if num_done:
            say(f"going on after {num_done} of {len(batches)} batches, which are in '{out}'")

        # Every batch is written as soon as it is done
        todo = batches[num_done:]
        try:
            with closing(answer(config, checkpoint, readable, arguments.ask, todo)) as answered:
                for batch, images in zip(todo, answered, strict=True):
                    records, unreadable = show([readable[index] for index in batch], images, out)
                    finished.add(records, unreadable)
        except KeyboardInterrupt:
            say(f"stopped; what is done is in '{out}', and the same command goes on")
            sys.exit(130)

    # What has no answers
    for file in readable:
        if file.name in finished.unreadable:
            reasons[file] = finished.unreadable[file.name]
    if reasons:
        counts = f"{len(files) - len(reasons)} of {len(files)} photos were answered, not"
        say(f"{counts} these {len(reasons)}:", style="red", stderr=True)
        for file in files:
            if file in reasons:
                say(f"  {reasons[file]}", style="red", stderr=True)
        sys.exit(2)


def answer(
    config: Config,
    checkpoint: Path,
    files: list[Path],
    questions: list[str],
    batches: list[list[int]],
) -> Generator[list[Answers], None, None]:
    """Ask the model of a checkpoint about photos, batch by batch, as `predict` does."""
    if not batches:
        return
    run = config.run
    accelerator = make_accelerator(**device_settings(run))
    (data,) = config.datasets.values()
    image_size = config.require_model()["rgb_encoder"]["image_size"]
    config = replace(config, model=without_sources(config.require_model(), checkpoint))
    predicted = predict(
        restore_model(config, checkpoint, accelerator),
        Photos(files, questions, image_size, data.get("answer_format")),
        batches,
        queries_per_annotation=1,
        max_new_tokens=run.max_new_tokens,
        num_workers=run.num_workers,
        device=accelerator.device,
        autocast=accelerator.autocast,
    )
    yield from track(predicted, "predicting", len(batches))


def check_questions(questions: list[str]) -> None:
    """Refuse what is no question, and what would end the prompt before its end.

    Raises:
        UserError: naming the question.
    """
    for question in questions:
        try:
            question.encode()
        except UnicodeEncodeError:
            raise UserError(f"question {question!r} is not UTF-8; write it again") from None
        if not question.strip():
            raise UserError("--ask has an empty question; write one, in quotes")
        if PLACEHOLDER.search(question) or any(token in question for token in TEMPLATE_TOKENS):
            raise UserError(
                f"question '{question}' holds a token of the prompt, such as <MSK_0> or [INST]; "
                "leave it out"
            )


def require_free(out: Path) -> None:
    """Refuse a folder with files that are not of this command, because they could be photos.

    Raises:
        UserError: it is such a folder, or cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in out.iterdir()}
    except OSError as error:
        raise UserError(
            f"cannot make folder '{out}' ({error.strerror}); choose another --out"
        ) from None
    journal = out / FinishedBatches.JOURNAL
    is_ours = journal.name in names
    if not is_ours and names - {".lock", part_of(journal).name}:
        raise UserError(f"'{out}' is not empty; choose another --out, or remove it")


def made_from(
    questions: list[str], files: list[Path], checkpoint: Path, config: Config
) -> dict[str, Any]:
    """All that the answers depend on, by a name for each."""
    # Photos are known by name, size and time
    photos = []
    for file in files:
        stat = file.stat()
        photos.append([os.fsencode(file.name).hex(), stat.st_size, stat.st_mtime_ns])
    weights = (checkpoint / "model.safetensors").stat()
    result = {
        "--ask": questions,
        "photos": hashlib.sha256(json.dumps(photos).encode()).hexdigest()[:16],
        "checkpoint": [checkpoint.name, weights.st_size, weights.st_mtime_ns],
    }

    # Where and with how many processes they were made does not matter
    for name, value in flatten(as_dict(config)).items():
        if name not in ("run.output_dir", "run.num_workers"):
            result[name] = value
    return result


class FinishedBatches:
    """predictions.jsonl, to which every batch is appended, and progress.jsonl beside it.

    The first line of progress.jsonl says what the answers depend on. A line follows for every
    batch that is done: how long predictions.jsonl is with it, and the photos of the batch that
    cannot be read. What a kill left behind that is in no such line does not count.

    Args:
        folder: of both files.
        made_from: all that the answers depend on.

    Attributes:
        unreadable: name of a photo -> why it cannot be read, of all batches that are done.
    """

    JOURNAL = "progress.jsonl"

    def __init__(self, folder: Path, made_from: dict[str, Any]) -> None:
        self.folder = folder
        self.predictions = folder / "predictions.jsonl"
        self.journal = folder / self.JOURNAL
        self.made_from = json.loads(json.dumps(made_from))  # as it is read again
        self.unreadable: dict[str, str] = {}

    def open(self) -> int:
        """Take up what earlier calls did, or start.

        Returns:
            How many batches are done.

        Raises:
            UserError: if the folder has answers to something else.
        """
        if not self.journal.exists() or not self.journal.stat().st_size:
            write_text(self.journal, json.dumps(self.made_from) + "\n")
        with self.journal.open("rb") as file:
            first, *others = file.readlines()
        try:
            self._require_same(json.loads(first))
            num_done, size = self._count(others)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"'{self.journal}' is damaged; choose another --out, or remove '{self.folder}'"
            ) from None

        # Drop what is half written
        self.predictions.touch()
        os.truncate(self.predictions, size)
        os.truncate(self.journal, len(first) + sum(map(len, others[:num_done])))
        return num_done

    def _count(self, lines: list[bytes]) -> tuple[int, int]:
        """How many batches are done, and how long predictions.jsonl is with them."""
        length = self.predictions.stat().st_size if self.predictions.exists() else 0
        num_done = 0
        size = 0
        for line in lines:
            if not line.endswith(b"\n"):
                break
            entry = json.loads(line)
            if entry["size"] > length:
                break
            self.unreadable |= entry["unreadable"]
            size = entry["size"]
            num_done += 1
        return num_done, size

    def add(self, records: list[Record], unreadable: dict[str, str]) -> None:
        """Append the records of a batch, and the photos of it that cannot be read."""
        append_text(self.predictions, "".join(map(line_of, records)))
        entry = {"size": self.predictions.stat().st_size, "unreadable": unreadable}
        append_text(self.journal, json.dumps(entry) + "\n")
        self.unreadable |= unreadable

    def _require_same(self, found: dict[str, Any]) -> None:
        """Refuse to go on with answers that depend on something else."""
        for name in dict.fromkeys([*self.made_from, *found]):
            there = found.get(name)
            here = self.made_from.get(name)
            if there == here:
                continue
            what = f"{name} {reprlib.repr(there)}, which is now {reprlib.repr(here)}"
            if name == "photos":
                what = "other photos, or one of them has changed"
            raise UserError(
                f"'{self.folder}' holds answers with {what}; "
                "repeat the command as it was, choose another --out, or remove it"
            )


def show(
    files: list[Path], images: list[Answers], out: Path
) -> tuple[list[Record], dict[str, str]]:
    """Draw and print the answers about the photos of a batch.

    Returns:
        Their records; and the photos that cannot be read, by name, with the reasons.
    """
    records: list[Record] = []
    unreadable: dict[str, str] = {}
    for file, answers in zip(files, images, strict=True):
        try:
            of_photo = require_records([answers])
            show_photo(of_photo, file, out)
            records += of_photo
        except UserError as error:
            unreadable[file.name] = str(error)
    return records, unreadable


def show_photo(records: list[Record], file: Path, out: Path) -> None:
    """Draw the answers about the photo ``file``, and print them.

    Raises:
        UserError: if the photo cannot be read any more.
    """
    photo = read_photo(file)
    for record in records:
        if isinstance(record, ImageRecord):
            say(f"{file}: {record.analysis}", style="bold")
            continue
        picture = out / f"{file.stem}-{record.annotation + 1}.jpg"
        with replaced(picture) as part:
            draw_answer(photo, record).save(part, "JPEG", quality=90)
        say(f"  {record.query}")
        say(f"    {record.answer}  (presence {record.presence:.2f}, {picture})")


def draw_answer(photo: Image.Image, record: QueryRecord) -> Image.Image:
    """A photo under the masks of an answer, and a caption.

    The caption has the question, the answer and the phrase of each mask beside its color.
    """
    # The photo under its masks
    scale = min(1.0, MAX_PHOTO_SIDE / max(photo.size))
    size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    pixels = np.asarray(photo.resize(size))
    for mask in record.masks:
        pixels = _tinted(pixels, decode(mask.rle), _slot_color(mask.slot))

    # Room for the caption
    height = pixels.shape[0]
    width = max(pixels.shape[1], MIN_CAPTION_WIDTH)
    font = ImageFont.load_default(_FONT_SIZE)
    lines = list(_caption(record, width - 2 * _GAP, font))
    line_height = _FONT_SIZE + _GAP
    picture = Image.new("RGB", (width, height + len(lines) * line_height + 2 * _GAP), "white")
    picture.paste(Image.fromarray(pixels))

    # The caption
    draw = ImageDraw.Draw(picture)
    top = height + _GAP
    for text, color in lines:
        left = _GAP
        if color is not None:
            box = (left, top + 6, left + _FONT_SIZE - 8, top + _FONT_SIZE - 2)
            draw.rectangle(box, fill=color)
            left += _FONT_SIZE
        draw.text((left, top), text, fill="black", font=font)
        top += line_height
    return picture


def _slot_color(slot: int) -> str:
    return SLOT_COLORS[slot % len(SLOT_COLORS)]


def _tinted(pixels: np.ndarray, mask: np.ndarray, color: str) -> np.ndarray:
    """``pixels``, uint8[h, w, 3], with a mask of the photo, bool[H, W], filled and outlined."""
    rgb = tuple(int(color[first : first + 2], 16) for first in (1, 3, 5))
    mask = cv2.resize(mask.astype(np.uint8), pixels.shape[1::-1], interpolation=cv2.INTER_AREA)
    filled = (1 - _OPACITY) * pixels + _OPACITY * np.array(rgb)
    tinted = np.where(mask[..., None] > 0, filled, pixels).astype(np.uint8)
    outlines = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
    return cv2.drawContours(np.ascontiguousarray(tinted), outlines, -1, rgb, 2, cv2.LINE_AA)


def _caption(record: QueryRecord, width: int, font: Font) -> Iterator[tuple[str, str | None]]:
    """Lines of text below a picture, at most ``width`` pixels wide.

    Yields:
        A line, and the color of the mask where the line begins with its name.
    """
    for text in (record.query or "", record.answer):
        for line in _wrapped(text, width, font):
            yield line, None
    for mask in record.masks:
        name = f"<MSK_{mask.slot}> {mask.phrase} ({mask.score:.2f})"
        first, *others = _wrapped(name, width - _FONT_SIZE, font)
        yield first, _slot_color(mask.slot)
        for line in others:
            yield line, None


def _wrapped(text: str, width: int, font: Font) -> list[str]:
    """A text in lines of at most ``width`` pixels; a longer word has a line of its own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
