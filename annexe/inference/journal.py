"""What is done of a job of many photos, written so that a kill at any moment costs one batch."""

from __future__ import annotations

import json
import os
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from annexe.errors import UserError
from annexe.files import append_text, part_of, write_text


@dataclass(frozen=True)
class _Entry:
    """Where the records of a batch are in predictions.jsonl, and what of it has none."""

    start: int  # bytes
    end: int
    unreadable: dict[str, str] = field(default_factory=dict)


class FinishedBatches:
    """predictions.jsonl, to which every batch is appended, and progress.jsonl beside it.

    The first line of progress.jsonl says what the answers depend on. A line follows for every
    batch that is done: its number, how long predictions.jsonl is with it, and the photos of the
    batch that cannot be read. What a kill left behind that is in no such line does not count.

    Args:
        folder: of both files.
        made_from: all that the answers depend on.
    """

    PREDICTIONS = "predictions.jsonl"
    JOURNAL = "progress.jsonl"

    def __init__(self, folder: Path, made_from: dict[str, Any]) -> None:
        self.folder = folder
        self.predictions = folder / self.PREDICTIONS
        self.journal = folder / self.JOURNAL
        self.made_from = json.loads(json.dumps(made_from))  # as it is read again
        self._entries: dict[int, _Entry] = {}

    def __contains__(self, batch: int) -> bool:
        return batch in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def unreadable(self) -> dict[str, str]:
        """Name of a photo -> why it cannot be read, of all batches that are done."""
        reasons: dict[str, str] = {}
        for entry in self._entries.values():
            reasons |= entry.unreadable
        return reasons

    def open(self) -> int:
        """Take up what earlier calls did, or start where they did nothing.

        Returns:
            How many batches are done.

        Raises:
            UserError: if the folder has answers to something else.
        """
        if not self.has_batches():
            write_text(self.journal, json.dumps(self.made_from) + "\n")
        length = self.read()

        # Drop what is half written
        self.predictions.touch()
        os.truncate(self.predictions, max((e.end for e in self._entries.values()), default=0))
        os.truncate(self.journal, length)
        return len(self)

    def has_batches(self) -> bool:
        """Whether anything stands in progress.jsonl behind what the answers depend on."""
        if not self.journal.exists():
            return False
        with self.journal.open("rb") as file:
            file.readline()
            return bool(file.read(1))

    def read(self) -> int:
        """Read what earlier calls did, and change nothing.

        Returns:
            Bytes of progress.jsonl that count.

        Raises:
            UserError: if the folder has answers to something else.
        """
        with self.journal.open("rb") as file:
            first, *others = file.readlines()
        try:
            self._require_same(json.loads(first))
            self._entries = self._read_entries(others)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"'{self.journal}' is damaged; choose another --out, or remove '{self.folder}'"
            ) from None
        return len(first) + sum(map(len, others[: len(self)]))

    def _read_entries(self, lines: list[bytes]) -> dict[int, _Entry]:
        """The batches whose records are there in full length."""
        length = self.predictions.stat().st_size if self.predictions.exists() else 0
        entries: dict[int, _Entry] = {}
        start = 0
        for line in lines:
            if not line.endswith(b"\n"):
                break
            values = json.loads(line)
            end = values["size"]
            if end > length:
                break
            if values["batch"] in entries:
                raise ValueError("a batch stands twice")
            entries[values["batch"]] = _Entry(start, end, dict(values["unreadable"]))
            start = end
        return entries

    def add(self, batch: int, lines: str, unreadable: dict[str, str]) -> None:
        """Append a batch.

        Args:
            batch: its number.
            lines: its records.
            unreadable: name of each photo of it that cannot be read -> why.
        """
        start = self.predictions.stat().st_size
        append_text(self.predictions, lines)
        end = self.predictions.stat().st_size
        entry = {"batch": batch, "size": end, "unreadable": unreadable}
        append_text(self.journal, json.dumps(entry) + "\n")
        self._entries[batch] = _Entry(start, end, unreadable)

    def copy_to(self, other: FinishedBatches, batch: int) -> None:
        """Append a batch of this folder to another one."""
        entry = self._entries[batch]
        with self.predictions.open("rb") as file:
            file.seek(entry.start)
            lines = file.read(entry.end - entry.start)
        other.add(batch, lines.decode(), entry.unreadable)

    def _require_same(self, found: dict[str, Any]) -> None:
        """Refuse to go on with answers that depend on something else."""
        for name in dict.fromkeys([*self.made_from, *found]):
            there = found.get(name)
            here = self.made_from.get(name)
            if there == here:
                continue
            what = f"{name} {reprlib.repr(there)}, which is now {reprlib.repr(here)}"
            other = "another --out"
            if name == "photos":
                what = "other photos, or one of them has changed"
                other += " and name there the new and mended photos alone"
            raise UserError(
                f"'{self.folder}' holds answers with {what}; "
                f"repeat the command as it was, choose {other}, or remove it"
            )


def require_free(out: Path) -> None:
    """Refuse a folder with files that are not of this command, because they could be photos.

    It is made if it does not exist.

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
