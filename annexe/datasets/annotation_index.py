"""The index: all annotations of a folder in one file outside the data root, mapped into memory.

Opening 20,000 annotation files one by one takes seconds and a gigabyte in every process. The index is written once;
afterwards an image's annotations are decoded when they are asked for, and all processes share the file's pages.

The file holds, one after the other: every annotation as a JSON record; where each record ends; the first record of
each image; the slots each image uses; a JSON footer; and a trailer with the footer's length and a checksum.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import struct
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import track

from annexe.datasets.annotations import Annotation, read_annotations
from annexe.errors import UserError

log = logging.getLogger(__name__)

_VERSION = 1  # raise it when records change, so that older files are not read
_TRAILER = struct.Struct("<8sQI")  # mark, bytes of the footer, CRC-32 of all before the trailer
_MARK = b"annexe\x00\x01"


class Index:
    """Annotations of the images of one folder.

    Args:
        path: a file that `open_index` wrote.
        folder: the annotation files.
        state: what `folder_state` says of the folder; an index of another state is refused.

    Raises:
        StaleIndex: the file belongs to another state of the folder.
        ValueError: the file is damaged.
    """

    def __init__(self, path: Path, folder: Path, state: str) -> None:
        self.path, self.folder, self.state = path, folder, state
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size - _TRAILER.size
            checksum = _checksum(file, max(length, 0))
            mark, footer_length, expected = _TRAILER.unpack(
                file.read(_TRAILER.size).ljust(_TRAILER.size)
            )
            if mark != _MARK or checksum != expected:
                raise ValueError("it was cut short or changed")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        footer = json.loads(self._data[length - footer_length : length])
        if footer["state"] != state:
            raise StaleIndex(
                f"the annotation files of '{folder}' changed while they were in use; start again"
            )
        self.stems: list[str] = footer["stems"]
        lengths = footer["num_records"] + 1, len(self.stems) + 1, len(self.stems)
        numbers = np.frombuffer(self._data, np.int64, sum(lengths), footer["numbers_at"])
        self._ends, self._first, self.num_slots = np.split(numbers, np.cumsum(lengths)[:2])
        self._last: tuple[int, list[Annotation]] = (-1, [])

    def __reduce__(self) -> tuple[type[Index], tuple[Path, Path, str]]:
        return Index, (self.path, self.folder, self.state)  # a loader worker maps the same file

    def places(self) -> dict[str, tuple[Index, int]]:
        """Stem -> this index and the row of the image."""
        return {stem: (self, row) for row, stem in enumerate(self.stems)}

    def num_annotations(self, row: int) -> int:
        """Annotations of the image in ``row``; 0 where its file cannot be read."""
        return int(self._first[row + 1] - self._first[row])

    def annotations(self, row: int) -> list[Annotation]:
        """All annotations of the image in ``row``; asked again at once they are the same objects."""
        if self._last[0] != row:
            self._last = (
                row,
                [self._record(number) for number in range(self._first[row], self._first[row + 1])],
            )
        return self._last[1]

    def annotation(self, row: int, number: int) -> Annotation:
        """One annotation of the image in ``row``."""
        if not 0 <= number < self.num_annotations(row):
            raise IndexError(f"'{self.stems[row]}' has no annotation {number}")
        return self._record(self._first[row] + number)

    def _record(self, number: int) -> Annotation:
        *values, questions = json.loads(self._data[self._ends[number] : self._ends[number + 1]])
        return Annotation(
            *values, [{"query": q, "id": i, "is_sentence": s} for q, i, s in questions]
        )


class StaleIndex(UserError):
    """The folder changed after its index was written."""


class Annotations(Sequence):
    """Annotations of chosen images, a list for each, decoded when asked for."""

    def __init__(self, places: Iterable[tuple[Index, int]]) -> None:
        self._places = list(places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> list[Annotation]:
        index, row = self._places[number]
        return index.annotations(row)


def open_index(folder: Path) -> Index:
    """Index of a folder of annotation files: the one on disk if it fits, else one made now.

    Any number of processes may do this at once: each that finds none writes its own and renames it into place.
    """
    state, path = folder_state(folder), index_file(folder)
    try:
        return Index(path, folder, state)
    except (FileNotFoundError, StaleIndex):
        pass
    except (OSError, ValueError) as error:
        log.warning("index '%s' is damaged (%s) and made again", path, error)
    try:
        _build(folder, state, path)
    except OSError as error:
        raise UserError(
            f"cannot write the index of '{folder}' to '{path.parent}' ({error.strerror}); "
            "set ANNEXE_CACHE to a folder that can be written and has room"
        ) from None
    return Index(path, folder, state)


def index_file(folder: Path) -> Path:
    """Where the index of a folder is kept: data roots are often read-only, so it is among the user's own files."""
    place = os.environ.get("ANNEXE_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "annexe"
    )
    folder = folder.resolve()
    key = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return Path(place).expanduser() / "index" / f"{folder.name}-{key}.index"


def folder_state(folder: Path) -> str:
    """Hash of name, size and time of every annotation file in ``folder``."""
    stats = [
        (entry.name, _stat(entry)) for entry in os.scandir(folder) if entry.name.endswith(".json")
    ]
    lines = sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    return hashlib.sha256(f"{_VERSION} {lines!a}".encode()).hexdigest()


def _stat(entry: os.DirEntry) -> os.stat_result:
    try:
        return entry.stat()
    except OSError:  # a link to nowhere
        return entry.stat(follow_symlinks=False)


def _checksum(file: BinaryIO, length: int) -> int:
    """CRC-32 of the next ``length`` bytes, read in pieces: mapped pages would count as this process's memory."""
    checksum = 0
    while length > 0 and (piece := file.read(min(length, 1 << 20))):
        checksum, length = zlib.crc32(piece, checksum), length - len(piece)
    return checksum


def _build(folder: Path, state: str, path: Path) -> None:
    """Write the index under another name and rename it when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with open(descriptor, "wb") as file:
            _write(file, sorted(folder.glob("*.json")), state)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def _write(file: BinaryIO, paths: list[Path], state: str) -> None:
    at, checksum = 0, 0

    def write(content: bytes) -> None:
        nonlocal at, checksum
        file.write(content)
        at, checksum = at + len(content), zlib.crc32(content, checksum)

    console = Console(stderr=True)
    ends, first, num_slots = [0], [0], []
    for image in track(
        map(_read, paths),
        f"indexing {paths[0].parent if paths else 'nothing'}",
        len(paths),
        console=console,
        transient=True,
        disable=not console.is_terminal or os.environ.get("RANK", "0") != "0",
    ):
        for annotation in image:
            write(_encode(annotation))
            ends.append(at)
        first.append(len(ends) - 1)
        num_slots.append(max((slot + 1 for a in image for slot in a.slots), default=0))
    write(b" " * (-at % 8))
    numbers_at = at
    write(np.array([*ends, *first, *num_slots], np.int64).tobytes())
    stems = [path.stem for path in paths]
    footer = {
        "state": state,
        "num_records": len(ends) - 1,
        "numbers_at": numbers_at,
        "stems": stems,
    }
    write(content := json.dumps(footer).encode())
    file.write(_TRAILER.pack(_MARK, len(content), checksum))


def _read(path: Path) -> list[Annotation]:
    try:
        return read_annotations(path)
    except (
        UserError
    ):  # left for those who open a split that holds the image: it may be excluded there
        return []


def _encode(annotation: Annotation) -> bytes:
    questions = [[q["query"], q["id"], q["is_sentence"]] for q in annotation.questions]
    values = (
        annotation.caption,
        annotation.answer,
        annotation.tokens,
        annotation.masks_idx,
        annotation.with_mask,
    )
    return json.dumps([*values, questions], separators=(",", ":")).encode()
