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
from rich.console import Console
from rich.progress import track

from annexe.build import load_config, restore_model
from annexe.checkpoints.run_folder import require_checkpoint, without_sources
from annexe.config import device_settings
from annexe.datasets.photos import Photos, photo_files, read_photo
from annexe.distributed import make_accelerator
from annexe.errors import UserError
from annexe.evaluation.predict import plan_batches, predict
from annexe.evaluation.records import Record, write_records
from annexe.models.language_model.tokenizer import PLACEHOLDER, TEMPLATE_TOKENS
from annexe.rle import decode

HELP = "analyse photos of your own, answer questions about them, and draw the masks"
# What a training may have set and a few photos do not need.
_PLAIN = (
    "run.compile=false",
    "run.cuda_graphs=false",
    "run.num_workers=0",
    "run.batch_size=4",
    "run.parallel=ddp",
)

SLOT_COLOURS = ("#ff2d95", "#00b8f5", "#ffc400", "#8f6bff", "#2fd0a5", "#ff7a2f")  # the report's
PICTURE_SIDE, CAPTION_WIDTH = (
    1280,
    640,
)  # the most of a photo's longer side in a picture, the least below it
_FILLED, _FONT, _GAP = 0.42, 26, 10


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
        help="settings put over those of the run, such as run.device=cpu model.presence_threshold=0.3",
    )


def run(arguments: argparse.Namespace) -> None:
    check_questions(arguments.ask)
    files, out = photo_files(arguments.photos), arguments.out
    checkpoint = require_checkpoint(arguments.run_folder, "best")
    config = load_config(
        checkpoint / "config.yaml", [f"run.output_dir={out}", *_PLAIN, *arguments.options]
    )
    config = replace(config, model=without_sources(config.model, checkpoint))
    (data,) = config.datasets.values()
    photos = Photos(
        files, arguments.ask, config.model["rgb_encoder"]["image_size"], data.get("answer_format")
    )
    make_folder(out)
    accelerator = make_accelerator(**device_settings(config.run))
    batches = plan_batches(len(photos), config.run.batch_size)
    predicted = predict(
        restore_model(config, checkpoint, accelerator),
        photos,
        batches,
        queries_per_annotation=1,
        max_new_tokens=config.run.max_new_tokens,
        num_workers=config.run.num_workers,
        device=accelerator.device,
        autocast=accelerator.autocast,
    )
    console = Console(soft_wrap=True, markup=False, highlight=False)
    records: list[Record] = []
    by_stem = {file.stem: file for file in files}
    try:
        for batch in track(predicted, "predicting", total=len(batches), console=console):
            records += batch
            write_records(out / "predictions.jsonl", records)
            for record in batch:
                tell(record, by_stem[record["image"]], out, console)
    except KeyboardInterrupt:
        console.print(f"stopped; what is done is in '{out}'")
        sys.exit(130)


def check_questions(questions: list[str]) -> None:
    """Refuse what is no question, and what would end the prompt before its end."""
    for question in questions:
        try:
            question.encode()
        except UnicodeEncodeError:
            raise UserError(f"question {question!r} is not UTF-8; write it anew") from None
        if not question.strip():
            raise UserError("--ask has an empty question; write one, in quotes")
        if PLACEHOLDER.search(question) or any(token in question for token in TEMPLATE_TOKENS):
            raise UserError(
                f"question '{question}' holds a token of the prompt; leave it out, such as <MSK_0> or [INST]"
            )


def make_folder(out: Path) -> None:
    """Make the folder ``out``; one with files in it is refused, for they could be photos."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        is_empty = not any(out.iterdir())
    except OSError as error:
        raise UserError(
            f"cannot make folder '{out}' ({error.strerror}); choose another --out"
        ) from None
    if not is_empty:
        raise UserError(f"'{out}' is not empty; choose another --out, or remove it")


def tell(record: Record, file: Path, out: Path, console: Console) -> None:
    """Print a record of ``file``, and draw the answer if it is one."""
    if record["kind"] == "image":
        console.print(f"{file}: {record['analysis']}", style="bold")
        return
    picture = out / f"{file.stem}-{record['annotation'] + 1}.jpg"
    answer_picture(read_photo(file), record).save(picture, quality=90)
    console.print(
        f"  {record['query']}\n    {record['answer']}  (presence {record['presence']:.2f}, {picture})"
    )


def answer_picture(photo: Image.Image, record: Record) -> Image.Image:
    """A photo under the masks of a query line, and below it the question, the answer and what each colour is."""
    scale = min(1.0, PICTURE_SIDE / max(photo.size))
    pixels = np.asarray(
        photo.resize((max(1, round(photo.width * scale)), max(1, round(photo.height * scale))))
    )
    for mask in record["masks"]:
        pixels = _tinted(
            pixels, decode(mask["rle"]), SLOT_COLOURS[mask["slot"] % len(SLOT_COLOURS)]
        )
    height, width = pixels.shape[0], max(pixels.shape[1], CAPTION_WIDTH)
    font = ImageFont.load_default(_FONT)
    lines = list(_caption(record, width - 2 * _GAP, font))
    picture = Image.new("RGB", (width, height + len(lines) * (_FONT + _GAP) + 2 * _GAP), "white")
    picture.paste(Image.fromarray(pixels))
    draw = ImageDraw.Draw(picture)
    for number, (text, colour) in enumerate(lines):
        top = height + _GAP + number * (_FONT + _GAP)
        if colour is not None:
            draw.rectangle((_GAP, top + 6, _GAP + _FONT - 8, top + _FONT - 2), fill=colour)
        draw.text((_GAP + (_FONT if colour else 0), top), text, fill="black", font=font)
    return picture


def _tinted(pixels: np.ndarray, mask: np.ndarray, colour: str) -> np.ndarray:
    """``pixels`` uint8[h, w, 3] with a mask, bool[H, W] of the whole photo, filled and outlined."""
    rgb = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    mask = cv2.resize(mask.astype(np.uint8), pixels.shape[1::-1], interpolation=cv2.INTER_AREA)
    tinted = np.where(
        mask[..., None] > 0, (1 - _FILLED) * pixels + _FILLED * np.array(rgb), pixels
    ).astype(np.uint8)
    outlines = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
    return cv2.drawContours(np.ascontiguousarray(tinted), outlines, -1, rgb, 2, cv2.LINE_AA)


def _caption(
    record: Record, width: int, font: ImageFont.FreeTypeFont
) -> Iterator[tuple[str, str | None]]:
    """Lines of text below a picture, at most ``width`` wide; where one begins with a mask's name, its colour."""
    for text in (record["query"], record["answer"]):
        yield from ((line, None) for line in _wrapped(text, width, font))
    for mask in record["masks"]:
        name = f"<MSK_{mask['slot']}> {mask['phrase']} ({mask['score']:.2f})"
        first, *others = _wrapped(name, width - _FONT, font)
        yield first, SLOT_COLOURS[mask["slot"] % len(SLOT_COLOURS)]
        yield from ((line, None) for line in others)


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
