"""Lines about the frames of a clip, and the file in which they are kept as they are made."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from annexe.errors import UserError
from annexe.evaluation.records import ImageRecord, QueryRecord, line_of
from annexe.files import append_text, write_text
from annexe.inference.results import PhotoResult

_END = b'{"kind": "end"'  # how the last line begins


class FrameImageRecord(ImageRecord, kw_only=True, tag_field="kind", tag="image"):
    """What was predicted for one frame of which nothing was asked."""

    frame: int  # in the clip, from 0
    time: float  # seconds since the first frame


class FrameQueryRecord(
    QueryRecord, kw_only=True, omit_defaults=True, tag_field="kind", tag="query"
):
    """The answer to one question about one frame."""

    frame: int  # in the clip, from 0
    time: float  # seconds since the first frame
    analysis: str  # of the frame


FrameRecord = FrameImageRecord | FrameQueryRecord
"""A line about a frame. A frame with questions has one for each of them, another has one."""


def records_of_frame(result: PhotoResult, frame: int, time: float) -> list[FrameRecord]:
    """The lines about one frame.

    Args:
        result: what the model says about it.
        frame: its index in the clip.
        time: seconds since the first frame.
    """
    place: dict[str, Any] = {"frame": frame, "time": round(time, 6)}
    if not result.answers:
        return [FrameImageRecord(**msgspec.structs.asdict(result.record), **place)]
    records: list[FrameRecord] = []
    for answer in result.answers:
        fields = msgspec.structs.asdict(answer.record)
        records.append(FrameQueryRecord(**fields, **place, analysis=result.analysis))
    return records


def read_lines(path: Path, num_records: int, num_skipped: int = 0) -> Iterator[list[FrameRecord]]:
    """Read lines frame by frame.

    Args:
        path: the file.
        num_records: lines of every frame.
        num_skipped: lines before those of the first frame.

    Raises:
        UserError: naming the first line that is no record.
    """
    decode = msgspec.json.Decoder(FrameRecord).decode
    records: list[FrameRecord] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number <= num_skipped or line.startswith(_END):
                continue
            try:
                records.append(decode(line))
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise UserError(
                    f"'{path}', line {number}: {error}; remove the file, and predict anew"
                ) from None
            if len(records) == num_records:
                yield records
                records = []


class FinishedFrames:
    """What the model said about a clip: a file that grows frame by frame.

    Its first line says what the answers depend on, and its last one that nothing is missing. What
    a kill left half written does not count.

    Args:
        path: the file. It is made with the first frame.
        made_from: all that the answers depend on.
        num_records: lines of every frame.

    Attributes:
        num_frames: whose lines are there.
        is_complete: no frame is missing.
        damage: why the frames after the last one cannot be read, if they cannot.
    """

    def __init__(self, path: Path, made_from: dict[str, Any], num_records: int) -> None:
        self.path = path
        self.made_from = json.loads(json.dumps(made_from))  # as it is read again
        self.num_records = num_records
        self.num_frames = 0
        self.is_complete = False
        self.damage: str | None = None

    def open(self) -> None:
        """Take up what an earlier call did, if there was one.

        Raises:
            UserError: if the file has answers to something else.
        """
        if not self.path.exists():
            return
        num_lines = 0
        lengths: list[int] = []  # bytes of the lines of a frame that is not complete yet
        with self.path.open("rb") as file:
            size = self._read_first(file.readline())
            for line in file:
                if not line.endswith(b"\n"):
                    break
                if line.startswith(_END) and not lengths:
                    self.is_complete = True
                    self.damage = json.loads(line)["damage"]
                    size += len(line)
                    break
                lengths.append(len(line))
                if len(lengths) == self.num_records:
                    size += sum(lengths)
                    num_lines += len(lengths)
                    lengths = []
        os.truncate(self.path, size)
        self.num_frames = num_lines // self.num_records

    def _read_first(self, line: bytes) -> int:
        """Check the first line, and give its length."""
        try:
            found = json.loads(line)["made_from"]
        except (ValueError, LookupError, TypeError):
            raise UserError(
                f"'{self.path}' is damaged; remove it, or choose another folder"
            ) from None
        for name in dict.fromkeys([*self.made_from, *found]):
            there = found.get(name)
            here = self.made_from.get(name)
            if there != here:
                raise UserError(
                    f"'{self.path}' holds answers with {name} {reprlib.repr(there)}, which is now "
                    f"{reprlib.repr(here)}; repeat the command as it was, choose another folder, "
                    "or remove the file"
                )
        return len(line)

    def read(self) -> Iterator[list[FrameRecord]]:
        """The lines that are there, frame by frame."""
        if self.num_frames:
            yield from read_lines(self.path, self.num_records, num_skipped=1)

    def add(self, records: list[FrameRecord]) -> None:
        """Append the lines of the next frame."""
        self._require_first()
        append_text(self.path, "".join(map(line_of, records)))
        self.num_frames += 1

    def finish(self, damage: str | None) -> None:
        """Note that there are no more frames, or why they cannot be read."""
        end = {"kind": "end", "frames": self.num_frames, "damage": damage}
        append_text(self.path, json.dumps(end) + "\n")
        self.is_complete = True
        self.damage = damage

    def _require_first(self) -> None:
        if not self.num_frames and not self.path.exists():
            write_text(self.path, json.dumps({"made_from": self.made_from}) + "\n")
