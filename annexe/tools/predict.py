"""`annexe predict`: ask a trained model about photos of one's own, and draw what it answers."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track

from annexe.checkpoint import require_checkpoint, saved_config, without_sources
from annexe.config import load_config
from annexe.datasets.photos import Photos, photo_files, read_photo
from annexe.distributed import make_accelerator
from annexe.errors import UserError
from annexe.evaluator import plan_batches, predict, restored, write_records
from annexe.metrics import decode
from annexe.scoring import Record

HELP = "analyse photos of your own, answer questions about them, and draw the masks"
# What a training may have set and a few photos do not need.
_PLAIN = ("run.compile=false", "run.cuda_graphs=false", "run.num_workers=0", "run.batch_size=4", "run.parallel=ddp")

SLOT_COLOURS = ("#ff2d95", "#00b8f5", "#ffc400", "#8f6bff", "#2fd0a5", "#ff7a2f")  # the report's
PICTURE_SIDE = 1280  # of the longer side of a photo in a picture
_FILLED, _FONT, _GAP = 0.42, 26, 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="run", help="run folder, or one of its checkpoints")
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO", help="image files, or folders of them")
    parser.add_argument("--ask", nargs="+", required=True, metavar="QUESTION", help="asked of every photo")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where predictions.jsonl and the pictures go"
    )
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="A.B=C",
        help="settings put over those of the run, such as run.device=cpu model.presence_threshold=0.3",
    )


def run(arguments: argparse.Namespace) -> None:
    checkpoint, out = require_checkpoint(arguments.run_folder, "best"), arguments.out
    files = photo_files(arguments.photos)
    if (out / "predictions.jsonl").exists():
        raise UserError(f"'{out}' holds predictions already; choose another --out, or remove it")
    if any(not question.strip() for question in arguments.ask):
        raise UserError("--ask has an empty question; write one, in quotes")
    ((_, trained_on),) = saved_config(checkpoint)["datasets"].items()
    config = load_config(checkpoint / "config.yaml", [f"run.output_dir={out}", *_PLAIN, *arguments.options])
    config = replace(config, model=without_sources(config.model, checkpoint))
    image_size = config.model["rgb_encoder"]["image_size"]
    photos = Photos(files, arguments.ask, image_size, trained_on.get("answer_format"))
    accelerator = make_accelerator(config.run)
    batches = plan_batches(len(photos), config.run.batch_size)
    predicted = predict(
        restored(config, checkpoint, accelerator),
        photos,
        batches,
        queries_per_annotation=1,
        max_new_tokens=config.run.max_new_tokens,
        num_workers=config.run.num_workers,
        device=accelerator.device,
        autocast=accelerator.autocast,
    )
    console = Console(soft_wrap=True, markup=False, highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    records: list[Record] = []
    for batch in track(predicted, "predicting", total=len(batches), console=console):
        records += batch
    by_stem = {file.stem: file for file in files}
    for record in records:
        file = by_stem[record["image"]]
        if record["kind"] == "image":
            console.print(f"{file}: {record['analysis']}", style="bold")
            continue
        picture = out / f"{file.stem}-{record['annotation'] + 1}.jpg"
        answer_picture(read_photo(file), record).save(picture, quality=90)
        console.print(f"  {record['query']}\n    {record['answer']}  (presence {record['presence']:.2f}, {picture})")
    write_records(out / "predictions.jsonl", records)  # last: where it is, everything is


def answer_picture(photo: Image.Image, record: Record) -> Image.Image:
    """A photo under the masks of a query line, and below it the question, the answer and what each colour is."""
    scale = min(1.0, PICTURE_SIDE / max(photo.size))
    pixels = np.asarray(photo.resize((max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))))
    for mask in record["masks"]:
        pixels = _tinted(pixels, decode(mask["rle"]), SLOT_COLOURS[mask["slot"] % len(SLOT_COLOURS)])
    lines = list(_caption(record, pixels.shape[1]))
    height = pixels.shape[0]
    picture = Image.new("RGB", (pixels.shape[1], height + len(lines) * (_FONT + _GAP) + 2 * _GAP), "white")
    picture.paste(Image.fromarray(pixels))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT)
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
    tinted = np.where(mask[..., None] > 0, (1 - _FILLED) * pixels + _FILLED * np.array(rgb), pixels).astype(np.uint8)
    outlines = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
    return cv2.drawContours(np.ascontiguousarray(tinted), outlines, -1, rgb, 2, cv2.LINE_AA)


def _caption(record: Record, width: int) -> Iterator[tuple[str, str | None]]:
    """Lines of text below a picture, each with the colour of its mask, if it names one."""
    for text in (record["query"], record["answer"]):
        for line in textwrap.wrap(text, max(20, width * 2 // _FONT)):
            yield line, None
    for mask in record["masks"]:
        name = f"<MSK_{mask['slot']}> {mask['phrase']} ({mask['score']:.2f})"
        yield name, SLOT_COLOURS[mask["slot"] % len(SLOT_COLOURS)]
