"""Pictures of answered frames, all of one size, as a video needs them.

Legend: H x W frame, h x w picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from annexe.evaluation.records import PredictedMask
from annexe.inference.drawing import slot_color, tint
from annexe.inference.video.records import FrameQueryRecord, FrameRecord
from annexe.rle import decode

MIN_WIDTH = 640  # pixels, for the caption
MAX_SIDE = 1280  # of a frame in a picture
_FONT_SIZE = 22
_LINE = 30  # height of a line of text
_GAP = 10  # around the text
_NUM_QUESTION_LINES = 1
_NUM_ANSWER_LINES = 3
_NUM_PHRASE_LINES = 2
_NUM_LINES = 1 + _NUM_QUESTION_LINES + _NUM_ANSWER_LINES + _NUM_PHRASE_LINES


class FramePictures:
    """Draws answers on the frames of one clip, with a caption below.

    The caption has room for the time, the question, three lines of the answer and two of phrases;
    what is longer is cut and ends with dots. So all pictures have the size of the first one.

    Args:
        height: of a frame.
        width: of a frame.

    Attributes:
        size: height and width of a picture.
    """

    def __init__(self, height: int, width: int) -> None:
        scale = min(max(1.0, MIN_WIDTH / width), MAX_SIDE / max(height, width))
        self.frame_size = (max(1, round(height * scale)), max(1, round(width * scale)))
        caption = _NUM_LINES * _LINE + 2 * _GAP
        self.size = (self.frame_size[0] + caption, max(self.frame_size[1], MIN_WIDTH))
        self._font = ImageFont.load_default(_FONT_SIZE)

    def draw(self, pixels: np.ndarray, record: FrameRecord) -> np.ndarray:
        """The picture of an answer, or of an analysis.

        Args:
            pixels: uint8[H, W, 3], the frame.
            record: what is said about it.

        Returns:
            uint8[h, w, 3].
        """
        # The frame under its masks
        height, width = self.frame_size
        resized = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        if isinstance(record, FrameQueryRecord):
            masks = [(decode(mask.rle), slot_color(mask.slot)) for mask in record.masks]
            resized = tint(resized, masks)
        picture = Image.new("RGB", self.size[::-1], "white")
        picture.paste(Image.fromarray(resized))

        # The caption
        draw = ImageDraw.Draw(picture)
        top = height + _GAP
        heading = f"{record.time:.2f} s"
        if not isinstance(record, FrameQueryRecord):
            self._write(draw, [heading], top, "dimgray")
            num_lines = _NUM_LINES - 1
            self._write(draw, self._fitted(record.analysis, num_lines), top + _LINE, "black")
            return np.asarray(picture)
        if record.presence is not None:
            heading += f"    presence {record.presence:.2f}"
        question = self._fitted(record.query or "", _NUM_QUESTION_LINES)
        answer = self._fitted(record.answer, _NUM_ANSWER_LINES)
        top = self._write(draw, [heading], top, "dimgray")
        top = self._write(draw, question, top, "dimgray")
        top = self._write(draw, answer, top, "black")
        self._write_phrases(draw, record.masks, top)
        return np.asarray(picture)

    def _write(self, draw: ImageDraw.ImageDraw, lines: Sequence[str], top: int, color: str) -> int:
        """Write lines below each other.

        Returns:
            Where the next line begins.
        """
        for line in lines:
            draw.text((_GAP, top), line, fill=color, font=self._font)
            top += _LINE
        return top

    def _write_phrases(
        self, draw: ImageDraw.ImageDraw, masks: Sequence[PredictedMask], top: int
    ) -> None:
        """Write the phrase of every mask behind a square of its color, as many as fit."""
        left = _GAP
        bottom = self.size[0] - _GAP
        square = _FONT_SIZE - 6
        room = self.size[1] - 3 * _GAP - square
        for mask in masks:
            name = f"<MSK_{mask.slot}> {mask.phrase or ''}"
            text = self._cut(name, room)
            width = square + _GAP + round(self._font.getlength(text))
            if left > _GAP and left + width > self.size[1] - _GAP:
                left = _GAP
                top += _LINE
            if top + _LINE > bottom:
                return
            box = (left, top + 5, left + square, top + 5 + square)
            draw.rectangle(box, fill=slot_color(mask.slot))
            draw.text((left + square + _GAP, top), text, fill="black", font=self._font)
            left += width + 2 * _GAP

    def _fitted(self, text: str, num_lines: int) -> list[str]:
        """A text in so many lines of a caption, or fewer; dots stand for what has no room."""
        room = self.size[1] - 2 * _GAP
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and self._font.getlength(longer) > room and len(lines) < num_lines:
                lines.append(word)
            else:
                lines[-1] = longer
        return [self._cut(line, room) for line in lines]

    def _cut(self, text: str, room: float) -> str:
        """The beginning of a text that fits, and dots if that is not all of it."""
        if self._font.getlength(text) <= room:
            return text
        while text and self._font.getlength(f"{text}...") > room:
            text = text[:-1]
        return f"{text}..."
