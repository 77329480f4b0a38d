"""The index: all annotations of a folder in one file outside the data root, mapped into memory.

Opening 20,000 annotation files one by one takes seconds and a gigabyte in every process. The index
is written once; afterwards an image's annotations are decoded when they are needed, and all
processes share the pages of the file:

    records      one JSON line for each annotation, image by image
    int64[A + 1] where each of the A records starts, and where the last one ends
    int64[I + 1] first record of each of the I images, and A
    int64[I]     slots that each image uses
    footer       JSON: stems, number of records, where the integers start, state of the folder,
                 wordings that cannot be told from others
    trailer      a mark, the length of the footer, a CRC-32 of all before the trailer
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from annexe.datasets.annotations import Annotation, read_annotations
from annexe.datasets.image_names import annotation_files, is_annotation_file
from annexe.errors import UserError
from annexe.files import cache_folder, replaced
from annexe.terminal import track

log = logging.getLogger(__name__)

_VERSION = 2  # raise it when records or checks change, so that older files are not read
_TRAILER = struct.Struct("<8sQI")  # mark, bytes of the footer, CRC-32 of all before the trailer
_MARK = b"annexe\x00\x01"
_CHUNK = 1 << 20  # bytes that are read at once


class StaleIndex(UserError):
    """The folder changed after its index was written."""


class Index:
    """Annotations of the images of one folder; every image is a row.

    Args:
        path: a file that `open_index` wrote.
        folder: the annotation files.
        state: what `folder_state` says of the folder; an index of another state is refused.

    Attributes:
        stems: names of the images, in the order of the rows.
        num_slots: int64[I], slots that each image uses.
        repeated_ids: stem -> wordings whose id an earlier wording of their annotation has, of the
            images with any.

    Raises:
        StaleIndex: the file belongs to another state of the folder.
        ValueError: the file is damaged.
    """

    def __init__(self, path: Path, folder: Path, state: str) -> None:
        self.path = path
        self.folder = folder
        self.state = state
        self._last: tuple[int, list[Annotation]] = (-1, [])  # the row that was asked for last

        # Check all bytes, then map them
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size - _TRAILER.size
            checksum = _checksum(file, max(length, 0))
            trailer = file.read(_TRAILER.size).ljust(_TRAILER.size)
            mark, footer_length, expected = _TRAILER.unpack(trailer)
            if mark != _MARK or checksum != expected:
                raise ValueError("it was cut short or changed")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

        footer = json.loads(self._data[length - footer_length : length])
        if footer["state"] != state:
            raise StaleIndex(
                f"the annotation files of '{folder}' changed while they were in use; start again"
            )
        self.stems: list[str] = footer["stems"]
        self.repeated_ids: dict[str, int] = footer["repeated_ids"]

        # Three arrays of integers, one behind the other
        num_images = len(self.stems)
        lengths = [footer["num_records"] + 1, num_images + 1, num_images]
        integers = np.frombuffer(self._data, np.int64, sum(lengths), footer["numbers_at"])
        self._starts, self._first, self.num_slots = np.split(integers, np.cumsum(lengths)[:2])

    def __reduce__(self) -> tuple[type[Index], tuple[Path, Path, str]]:
        return Index, (self.path, self.folder, self.state)  # a loader worker maps the same file

    def rows(self) -> dict[str, ImageRow]:
        """Stem -> this index and the row of the image."""
        return {stem: (self, row) for row, stem in enumerate(self.stems)}

    def num_annotations(self, row: int) -> int:
        """Annotations of the image in ``row``; 0 where its file cannot be read."""
        return int(self._first[row + 1] - self._first[row])

    def annotations(self, row: int) -> list[Annotation]:
        """All annotations of the image in ``row``; the same objects when called again at once."""
        if self._last[0] != row:
            records = range(self._first[row], self._first[row + 1])
            self._last = (row, [self._decode(record) for record in records])
        return self._last[1]

    def content(self, row: int) -> bytes:
        """All annotations of the image in ``row`` in one form, whatever the form of their file."""
        start, end = self._starts[[self._first[row], self._first[row + 1]]]
        return self._data[start:end]

    def annotation(self, row: int, annotation: int) -> Annotation:
        """One annotation of the image in ``row``; the others are not decoded.

        Raises:
            IndexError: if the image has no such annotation.
        """
        if not 0 <= annotation < self.num_annotations(row):
            raise IndexError(f"'{self.stems[row]}' has no annotation {annotation}")
        return self._decode(self._first[row] + annotation)

    def _decode(self, record: int) -> Annotation:
        start = self._starts[record]
        end = self._starts[record + 1]
        *values, wordings = json.loads(self._data[start:end])
        questions = []
        for query, query_id, is_sentence in wordings:
            questions.append({"query": query, "id": query_id, "is_sentence": is_sentence})
        values.append(questions)
        return Annotation(*values)


ImageRow = tuple[Index, int]
"""Where the annotations of an image are: an index and the row of the image there."""


class Annotations(Sequence[list[Annotation]]):
    """Annotations of chosen images, a list for each, decoded when they are asked for."""

    def __init__(self, rows: Iterable[ImageRow]) -> None:
        self._rows = list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, image: int) -> list[Annotation]:  # type: ignore[override]  # no slices
        index, row = self._rows[image]
        return index.annotations(row)


def open_index(folder: Path) -> Index:
    """Index of a folder of annotation files: the one on disk if it is up to date, else a new one.

    Any number of processes may do this at once. Each that finds none writes one and renames it.

    Raises:
        UserError: if the index cannot be written.
    """
    state = folder_state(folder)
    path = index_file(folder)
    try:
        return Index(path, folder, state)
    except (FileNotFoundError, StaleIndex):
        pass
    except (OSError, ValueError) as error:
        log.warning("index '%s' is damaged (%s) and made again", path, error)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path, concurrent=True) as part, part.open("wb") as file:
            _write(file, [folder / name for name in annotation_files(folder)], state)
    except OSError as error:
        raise UserError(
            f"cannot write the index of '{folder}' to '{path.parent}' ({error.strerror}); "
            "set ANNEXE_CACHE to a folder that can be written and has room"
        ) from None
    return Index(path, folder, state)


def index_file(folder: Path) -> Path:
    """Where the index of a folder is stored: among the user's own files.

    Data roots are often read-only.
    """
    folder = folder.resolve()
    key = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return cache_folder("index") / f"{folder.name}-{key}.index"


def folder_state(folder: Path) -> str:
    """Hash of name, size and time of every annotation file in ``folder``."""
    files = []
    for entry in os.scandir(folder):
        if is_annotation_file(entry.name):
            stat = _stat(entry)
            files.append((entry.name, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(f"{_VERSION} {sorted(files)!a}".encode()).hexdigest()


def _stat(entry: os.DirEntry) -> os.stat_result:
    try:
        return entry.stat()
    except OSError:  # a link to nowhere
        return entry.stat(follow_symlinks=False)


def _checksum(file: BinaryIO, length: int) -> int:
    """CRC-32 of the next ``length`` bytes.

    They are read in chunks: mapped pages would count as memory of this process.
    """
    checksum = 0
    while length > 0:
        chunk = file.read(min(length, _CHUNK))
        if not chunk:
            break
        checksum = zlib.crc32(chunk, checksum)
        length -= len(chunk)
    return checksum


class _CountedFile:
    """Counts the bytes that are written to a file, and their CRC-32."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.length = 0
        self.checksum = 0

    def write(self, content: bytes) -> None:
        self.file.write(content)
        self.length += len(content)
        self.checksum = zlib.crc32(content, self.checksum)


def _write(file: BinaryIO, paths: list[Path], state: str) -> None:
    """Write the index of the annotation files ``paths``: the module describes the layout."""
    counted = _CountedFile(file)

    # Records
    starts = [0]
    first = [0]
    num_slots = []
    repeated_ids = {}
    bar = track(
        map(_read, paths),
        f"indexing {paths[0].parent if paths else 'nothing'}",
        len(paths),
        transient=True,
        disable=os.environ.get("RANK", "0") != "0",
        stderr=True,
    )
    for path, image_annotations in zip(paths, bar, strict=True):
        last_slot = -1
        num_repeated = 0
        for annotation in image_annotations:
            counted.write(_encode(annotation))
            starts.append(counted.length)
            last_slot = max(last_slot, *annotation.slots, -1)
            num_repeated += len(annotation.repeated_ids)
        first.append(len(starts) - 1)
        num_slots.append(last_slot + 1)
        if num_repeated:
            repeated_ids[path.stem] = num_repeated

    # Integers, at a multiple of their size
    counted.write(b" " * (-counted.length % 8))
    integers_at = counted.length
    counted.write(np.array([*starts, *first, *num_slots], np.int64).tobytes())

    # Footer and trailer
    footer = {
        "state": state,
        "num_records": len(starts) - 1,
        "numbers_at": integers_at,
        "stems": [path.stem for path in paths],
        "repeated_ids": repeated_ids,
    }
    content = json.dumps(footer).encode()
    counted.write(content)
    file.write(_TRAILER.pack(_MARK, len(content), counted.checksum))


def _read(path: Path) -> list[Annotation]:
    """Annotations of one file; none where it is damaged.

    A split that holds the image says what is wrong with it, unless the image is excluded there.
    """
    try:
        return read_annotations(path)
    except UserError:
        return []


def _encode(annotation: Annotation) -> bytes:
    questions = [[q["query"], q["id"], q["is_sentence"]] for q in annotation.questions]
    record = [
        annotation.caption,
        annotation.answer,
        annotation.tokens,
        annotation.masks_idx,
        annotation.with_mask,
        questions,
    ]
    return json.dumps(record, separators=(",", ":")).encode()
