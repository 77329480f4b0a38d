"""`annexe predict`: ask a trained model about photos of one's own, and draw what it answers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from annexe.build import load_config, restore_model
from annexe.checkpoints.run_folder import require_checkpoint, without_sources
from annexe.config import device_settings
from annexe.datasets.photos import Photos, photo_files, read_photo
from annexe.distributed import make_accelerator
from annexe.errors import UserError
from annexe.evaluation.predict import plan_batches, predict
from annexe.evaluation.records import ImageRecord, QueryRecord, Record, write_records
from annexe.models.language_model.tokenizer import PLACEHOLDER, TEMPLATE_TOKENS
from annexe.rle import decode
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
    parser.add_argument("run_folder", metavar="run", help="run folder, or one of its checkpoints")
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
        help="new folder for predictions.jsonl and the pictures",
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
    # The photos and the settings
    check_questions(arguments.ask)
    files = photo_files(arguments.photos)
    out = arguments.out
    checkpoint = require_checkpoint(arguments.run_folder, "best")
    options = [f"run.output_dir={out}", *_SIMPLE, *arguments.options]
    config = load_config(checkpoint / "config.yaml", options)
    config = replace(config, model=without_sources(config.require_model(), checkpoint))
    (data,) = config.datasets.values()
    image_size = config.require_model()["rgb_encoder"]["image_size"]
    photos = Photos(files, arguments.ask, image_size, data.get("answer_format"))
    make_folder(out)

    # The model
    run = config.run
    accelerator = make_accelerator(**device_settings(run))
    batches = plan_batches(len(photos), run.batch_size)
    predicted = predict(
        restore_model(config, checkpoint, accelerator),
        photos,
        batches,
        queries_per_annotation=1,
        max_new_tokens=run.max_new_tokens,
        num_workers=run.num_workers,
        device=accelerator.device,
        autocast=accelerator.autocast,
    )

    # Every batch is written as soon as it is done
    records: list[Record] = []
    files_by_stem = {file.stem: file for file in files}
    try:
        for batch in track(predicted, "predicting", len(batches)):
            records += batch
            write_records(out / "predictions.jsonl", records)
            for record in batch:
                show(record, files_by_stem[record.image], out)
    except KeyboardInterrupt:
        say(f"stopped; what is done is in '{out}'")
        sys.exit(130)


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


def make_folder(out: Path) -> None:
    """Make the folder ``out``. One with files in it is refused, because they could be photos.

    Raises:
        UserError: the folder cannot be made or is not empty.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        is_empty = not any(out.iterdir())
    except OSError as error:
        raise UserError(
            f"cannot make folder '{out}' ({error.strerror}); choose another --out"
        ) from None
    if not is_empty:
        raise UserError(f"'{out}' is not empty; choose another --out, or remove it")


def show(record: Record, file: Path, out: Path) -> None:
    """Print a record of the photo ``file``, and draw the answer if it is one."""
    if isinstance(record, ImageRecord):
        say(f"{file}: {record.analysis}", style="bold")
        return
    picture = out / f"{file.stem}-{record.annotation + 1}.jpg"
    draw_answer(read_photo(file), record).save(picture, quality=90)
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
