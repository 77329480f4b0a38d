"""Pictures of answers: a photo under its masks, and a caption below.

Legend: H x W photo, h x w picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from annexe.evaluation.records import QueryRecord
from annexe.rle import decode

SLOT_COLORS = ("#ff2d95", "#00b8f5", "#ffc400", "#8f6bff", "#2fd0a5", "#ff7a2f")  # the report's
MAX_PHOTO_SIDE = 1280  # of a photo in a picture, in pixels
MIN_CAPTION_WIDTH = 640
_OPACITY = 0.42  # of a mask
_FONT_SIZE = 26
_GAP = 10  # around lines of text

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_answer(photo: Image.Image, record: QueryRecord) -> Image.Image:
    """A photo under the masks of an answer, and a caption.

    The caption has the question, the answer and the phrase of each mask beside its color.
    """
    # The photo under its masks
    scale = min(1.0, MAX_PHOTO_SIDE / max(photo.size))
    size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    masks = [(decode(mask.rle), slot_color(mask.slot)) for mask in record.masks]
    pixels = tint(np.asarray(photo.resize(size)), masks)

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


def slot_color(slot: int) -> str:
    """Color of a slot's mask, as ``#rrggbb``."""
    return SLOT_COLORS[slot % len(SLOT_COLORS)]


def tint(pixels: np.ndarray, masks: Iterable[tuple[np.ndarray, str]]) -> np.ndarray:
    """Fill and outline masks in a picture.

    Args:
        pixels: uint8[h, w, 3], RGB; it stays as it is.
        masks: each with its color ``#rrggbb``; bool[H, W], of any size.

    Returns:
        uint8[h, w, 3].
    """
    for mask, color in masks:
        pixels = _tinted(pixels, mask, color)
    return pixels


def _tinted(pixels: np.ndarray, mask: np.ndarray, color: str) -> np.ndarray:
    """``pixels``, uint8[h, w, 3], with a mask of the photo, bool[H, W], filled and outlined."""
    rgb = tuple(int(color[first : first + 2], 16) for first in (1, 3, 5))
    mask = cv2.resize(mask.astype(np.uint8), pixels.shape[1::-1], interpolation=cv2.INTER_AREA)
    # What each value of each channel becomes under the mask
    table = (1 - _OPACITY) * np.arange(256)[:, None] + _OPACITY * np.array(rgb)  # [256, 3]
    filled = cv2.LUT(pixels, table.astype(np.uint8)[:, None])
    tinted = np.where(mask[..., None] > 0, filled, pixels)
    outlines = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]
    return cv2.drawContours(np.ascontiguousarray(tinted), outlines, -1, rgb, 2, cv2.LINE_AA)


def _caption(record: QueryRecord, width: int, font: Font) -> Iterator[tuple[str, str | None]]:
    """Lines of text below a picture, at most ``width`` pixels wide.

    Yields:
        A line, and the color of the mask where the line begins with its name.
    """
    for text in filter(None, (record.query, record.answer)):
        for line in _wrapped(text, width, font):
            yield line, None
    for mask in record.masks:
        name = f"<MSK_{mask.slot}> {mask.phrase} ({mask.score:.2f})"
        first, *others = _wrapped(name, width - _FONT_SIZE, font)
        yield first, slot_color(mask.slot)
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
