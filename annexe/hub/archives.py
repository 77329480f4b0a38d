"""Archives of a data set into its layout: everything that can go wrong is refused before a write.

``zipfile`` repairs names that lead outside instead of refusing them, follows links that lie in the
target, and finds wrong contents after they were written. So the directory of an archive is read and
checked first, and each file is then written by ourselves and renamed when it is complete.
"""

from __future__ import annotations

import io
import logging
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from annexe.errors import UserError
from annexe.files import in_units, replaced, require_room
from annexe.hub.transfer import Counter, require_safe_name

log = logging.getLogger(__name__)

# What a data root consists of
FOLDERS = ("RGB", "depth", "mask", "dataset_split", "subsets")
ENDINGS = (".jpg", ".jpeg", ".png", ".json", ".txt")
_ARCHIVE = re.compile(r"(?i)(.+?\.(?:zip|tar|tar\.gz|tgz))(\.\d{2,4})?")
_SPANNED = re.compile(r"(?i)(.+)\.z\d{2,3}")  # all but the last part of `zip -s`

_MAX_GROWTH = 100  # times the size of its archives is the most that a data set unpacks to,
_FREE_GROWTH = 100_000_000  # bytes aside: photos do not shrink, annotations do about 20 times
_CHUNK = 1 << 20
_DAMAGED = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    tarfile.TarError,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    UnicodeDecodeError,
    ValueError,
)


@dataclass(frozen=True)
class Archive:
    """An archive, which may come in several parts whose bytes are joined.

    Attributes:
        name: without the number of a part.
        parts: in order.
    """

    name: str
    parts: tuple[str, ...]


def find_archives(names: Sequence[str]) -> tuple[list[Archive], list[str]]:
    """Archives among names of files, and the other names.

    Raises:
        UserError: for archives that `zip -s` cut, and for parts of which one is missing.
    """
    parts: dict[str, list[str]] = {}
    others = []
    for name in sorted(names):
        if spanned := _SPANNED.fullmatch(name):
            raise _spanned_error(f"{spanned[1]}.zip")
        found = _ARCHIVE.fullmatch(name)
        if found is None:
            others.append(name)
        else:
            parts.setdefault(found[1], []).append(name)

    archives = []
    for name, names_of_parts in parts.items():
        _require_all_parts(name, names_of_parts)
        archives.append(Archive(name, tuple(names_of_parts)))
    return archives, others


def _require_all_parts(name: str, parts: list[str]) -> None:
    """Refuse parts that are not numbered one by one, from 0 or 1."""
    if parts == [name]:
        return
    numbers = [int(part.rpartition(".")[2]) for part in parts if part != name]
    first = numbers[0] if numbers else 0
    is_complete = numbers == list(range(first, first + len(parts))) and first in (0, 1)
    if not is_complete:
        raise UserError(
            f"'{name}' comes in parts of which some are missing: there are {', '.join(parts[:5])}"
        )


def _spanned_error(name: str) -> UserError:
    """The error for an archive that `zip -s` cut, whose parts cannot be joined as they are."""
    return UserError(
        f"'{name}' was cut by zip into .z01, .z02 and so on; fetch its parts by hand, join them "
        f"with 'zip -s 0 {Path(name).name} --out whole.zip', and unpack that"
    )


def layout_name(archive: str, name: str) -> str | None:
    """Where a file of an archive goes in the layout; None for what is not part of a data set.

    Folders around the layout are dropped: ``Ego/RGB/a.jpg`` is ``RGB/a.jpg``. An archive named
    like a folder of the layout is that folder: ``a.jpg`` of ``RGB.zip``.
    """
    parts = name.split("/")
    is_hidden = any(part.startswith((".", "__MACOSX")) for part in parts)
    if is_hidden or not name.lower().endswith(ENDINGS):
        return None
    for index, part in enumerate(parts[:-1]):
        if part in FOLDERS:
            return "/".join(parts[index:])
    stem = Path(archive).name.partition(".")[0]
    return f"{stem}/{name}" if stem in FOLDERS else None


@dataclass
class Unpacker:
    """Writes the files of archives into one folder.

    Attributes:
        folder: that of the data, to which nobody else writes.
        taken: names that earlier archives gave, folded, with those archives.
        left_out: number of files that are not part of a data set.
    """

    folder: Path
    taken: dict[str, str] = field(default_factory=dict)
    left_out: int = 0

    def unpack(self, name: str, parts: Sequence[Path], count: Counter | None = None) -> int:
        """Write the files of an archive; those that are there, with the same content, are kept.

        Args:
            name: of the archive, for messages.
            parts: its files in order.
            count: is told how many bytes were written.

        Returns:
            The number of its files.

        Raises:
            UserError: for an archive that is damaged, encrypted or cut by zip; for names outside
                of the folder, links, and names that stand twice; for sizes that the disk does not
                take or no data set has. Nothing of it was written then, unless a content turns out
                to be damaged.
        """
        packed = sum(part.stat().st_size for part in parts)
        with _refusing_damage(name), io.BufferedReader(_Joined(parts)) as joined:
            # All that is refused is refused before anything is written
            read = _read_zip if name.lower().endswith(".zip") else _read_tar
            wanted = self._choose(name, read(name, joined, packed))
            num_bytes = sum(member.size for _, member in wanted)
            if num_bytes > _MAX_GROWTH * packed + _FREE_GROWTH:
                raise UserError(
                    f"'{name}' of {in_units(packed)} would unpack to {in_units(num_bytes)}, which "
                    "no data set does; it was not unpacked"
                )
            there = [member.size for target, member in wanted if (self.folder / target).is_file()]
            require_room(self.folder, num_bytes - sum(there))

            for target, member in wanted:
                self._write(name, self.folder / target, member, count)
        return len(wanted)

    def _choose(self, name: str, members: list[_Member]) -> list[tuple[str, _Member]]:
        """The files that belong to the layout, with their names there.

        Raises:
            UserError: for two of one name, also where only case tells them apart.
        """
        wanted = []
        for member in members:
            target = layout_name(name, member.name)
            if target is None:
                self.left_out += 1
                continue
            folded = target.casefold()
            if folded in self.taken:
                raise UserError(f"'{target}' stands twice: in '{name}' and {self.taken[folded]}")
            self.taken[folded] = f"'{name}'"
            wanted.append((target, member))

        # A name that is a file cannot be a folder as well
        for target, _ in wanted:
            for parent in Path(target.casefold()).parents:
                if str(parent) in self.taken:
                    raise UserError(f"'{name}' has a file and a folder of one name, '{parent}'")
        return wanted

    def _write(self, name: str, target: Path, member: _Member, count: Counter | None) -> None:
        """Write one file, unless it is there."""
        tell = count or (lambda _: None)
        if member.is_in(target):
            tell(member.size)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with replaced(target) as part, member.open() as source, part.open("xb") as file:
            size = 0
            while content := source.read(min(_CHUNK, member.size - size + 1)):
                size += len(content)
                if size > member.size:
                    break
                file.write(content)
                tell(len(content))
            if size != member.size:
                raise zipfile.BadZipFile(f"{member.name} is not of the size that is named")


@dataclass(frozen=True)
class _Member:
    """A file of an archive.

    Attributes:
        crc: checksum of its content, where the archive has one.
        open: gives its content as a stream.
    """

    name: str
    size: int
    crc: int | None
    open: Callable[[], IO[bytes]]

    def is_in(self, target: Path) -> bool:
        """Whether a file has its content already, as far as the archive tells."""
        if not target.is_file() or target.stat().st_size != self.size:
            return False
        if self.crc is None:
            return True
        crc = 0
        with target.open("rb") as stream:
            while content := stream.read(_CHUNK):
                crc = zlib.crc32(content, crc)
        return crc == self.crc


@contextmanager
def _refusing_damage(name: str) -> Iterator[None]:
    """Say in one line what the libraries say of a damaged archive."""
    try:
        yield
    except UserError:
        raise
    except _DAMAGED as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"'{name}' is damaged or no archive ({reason}); remove it and repeat the command"
        ) from None


def _read_zip(name: str, file: IO[bytes], packed: int) -> list[_Member]:
    """All files of a zip, after everything odd was refused.

    Args:
        file: the archive.
        packed: its size in bytes.
    """
    archive = zipfile.ZipFile(file)
    members = []
    for info in archive.infolist():
        require_safe_name(info.orig_filename, f"'{name}'")
        mode = info.external_attr >> 16
        kind = stat.S_IFMT(mode)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise UserError(
                f"'{name}' holds a link or device, '{info.filename}'; nothing of it was written"
            )
        if info.flag_bits & 1:
            raise UserError(f"'{name}' is encrypted ('{info.filename}'); it cannot be unpacked")
        if info.volume:
            raise _spanned_error(name)
        if not info.is_dir():
            opened = _opener(archive.open, info)
            members.append(_Member(info.filename, info.file_size, info.CRC, opened))
    return members


def _read_tar(name: str, file: IO[bytes], packed: int) -> list[_Member]:
    """As `_read_zip`, for a tar, compressed or not."""
    archive = tarfile.open(fileobj=file, mode="r:*")  # noqa: SIM115 (our caller closes the file)
    limit = _MAX_GROWTH * packed + _FREE_GROWTH
    total = 0
    members = []
    for info in archive:
        if info.isdir() and info.name == ".":
            continue

        # Names and kinds
        inside = info.name.removeprefix("./")
        require_safe_name(inside, f"'{name}'")
        if not (info.isreg() or info.isdir()):
            raise UserError(
                f"'{name}' holds a link or device, '{info.name}'; nothing of it was written"
            )

        # Sizes
        total += info.size
        if total > limit:  # the rest would have to be unpacked to be listed
            raise UserError(
                f"'{name}' of {in_units(packed)} would unpack to more than "
                f"{in_units(limit)}, which no data set does; it was not unpacked"
            )
        if info.isreg():
            opened = _opener(archive.extractfile, info)
            members.append(_Member(inside, info.size, None, opened))
    return members


def _opener(open_member: Callable[[Any], Any], info: Any) -> Callable[[], IO[bytes]]:
    """A function that opens one file of an archive."""
    return lambda: open_member(info)


class _Joined(io.RawIOBase):
    """Several files as one that can be read from any place."""

    def __init__(self, parts: Sequence[Path]) -> None:
        super().__init__()
        self._files = [part.open("rb") for part in parts]
        self._sizes = [part.stat().st_size for part in parts]
        self._position = 0
        self._size = sum(self._sizes)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError("a place before the beginning")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read from the part at which we are, at most to its end."""
        start = 0
        for file, size in zip(self._files, self._sizes, strict=True):
            if self._position < start + size:
                file.seek(self._position - start)
                content = file.read(min(len(buffer), start + size - self._position))
                buffer[: len(content)] = content
                self._position += len(content)
                return len(content)
            start += size
        return 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()
