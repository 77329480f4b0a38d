"""Files and folders that appear complete or not at all, and locks on folders."""

from __future__ import annotations

import codecs
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import filesize

from annexe.errors import UserError

log = logging.getLogger(__name__)

# Bytes at either end of a file by which it is told from others
_HEAD = 1024
_TAIL = 1024  # programs put dates and other texts behind the pixels of a PNG
# How files begin whose size or end changes with their pixels
_COMPRESSED = (b"\x89PNG", b"\xff\xd8")

_ROOM = 1.02  # of what is written has to be free

# How libraries say which error of the system it was: those in Rust, and Python
_ERROR_NUMBER = re.compile(r"(?:\bos error |\[Errno )(\d+)[)\]]")
# What the system says of a disk that takes no more
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def require_writable(path: Path) -> None:
    """Check that a file can be written, before the long work whose result it will hold.

    The folder of the file is made.

    Raises:
        UserError: naming what is in the way: a folder of that name, or a missing permission.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(path.parent, os.W_OK)
    except OSError as error:
        raise UserError(f"cannot write '{path}' ({error.strerror}); name another file") from None
    if path.is_dir() or not is_writable:
        reason = "a folder" if is_writable else "no permission"
        raise UserError(f"cannot write '{path}' ({reason}); name another file")


def part_of(path: Path) -> Path:
    """The name under which `replaced` lets ``path`` be written, unless it is ``concurrent``."""
    return path.with_name(f"{path.name}.part")


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Name ``path`` in the errors of its disk, which name a part of it, or a source, or nothing.

    safetensors and tokenizers, written in Rust, have errors of their own for them.

    Raises:
        OSError: the error of the disk, about ``path``.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        code = _ERROR_NUMBER.search(str(error))
        number = int(code[1]) if code else None
        is_read = number == errno.EIO and getattr(error, "filename", None) is not None
        if number in FULL_DISK and not is_read:
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


@contextmanager
def replaced(path: Path, *, concurrent: bool = False) -> Iterator[Path]:
    """Write a file or a folder under another name, and rename it at the end.

    A kill at any moment leaves what was at ``path`` before. An exception inside the block removes
    the part and leaves ``path`` as it was. What an earlier, killed process left is removed first.

        with replaced(path) as part:
            part.write_text("all of it")

    Args:
        path: what is made or replaced; its folder has to exist. A file replaces a file, and a
            folder replaces a folder.
        concurrent: several processes may do this to one ``path`` at once. Each then writes a part
            of its own name, and the last one to finish counts.

    Yields:
        The part: a path in the same folder at which nothing exists yet.

    Raises:
        OSError: naming the file, for a disk that takes no more; and if a file would replace a
            folder, or a folder a file.
    """
    # What is written has a name of its own until it is whole
    part = part_of(path)
    if concurrent:
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with named(path):
            remove(part)
            yield part
            _rename_over(part, path)
    except BaseException:
        remove(part)
        raise


def require_new_folder(path: Path) -> None:
    """Check that `new_folder` can make a folder, before the long work whose result it will hold.

    Raises:
        UserError: there is a file of this name, or a folder that holds anything.
    """
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"'{path}' is not empty; name a new folder")
    if path.exists() and not path.is_dir():
        raise UserError(f"'{path}' is a file; name a new folder")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder that appears complete or not at all, like `replaced`, and replaces no files.

    Yields:
        The part: a folder without files.

    Raises:
        UserError: there is a file of this name, or a folder that holds anything.
        OSError: naming the file, for a disk that takes no more.
    """
    require_new_folder(path)
    path = Path(os.path.abspath(path))  # "." has no name to put ".part" behind
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as part:
        part.mkdir()
        yield part


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; nothing happens where there is neither."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _rename_over(part: Path, path: Path) -> None:
    """Give ``part`` the name ``path``."""
    if not (part.is_dir() and path.is_dir()):
        os.replace(part, path)
        return

    # A folder that is not empty cannot be replaced in one step
    old = path.with_name(f"{path.name}.old")
    remove(old)
    path.rename(old)
    part.rename(path)
    remove(old)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with the byte order mark that Windows writes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such text; the message is a clause that says why.
    """
    content = path.read_bytes()
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not {error.encoding.upper()}") from None
    if "\0" in text:
        raise ValueError("it holds zero bytes")
    return text


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8, all of it or nothing: see `replaced`."""
    with replaced(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, all of it or nothing; the folder of ``path`` is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=1) + "\n")


def append_text(path: Path, text: str) -> None:
    """Append ``text`` in UTF-8 to a file, which is made if it does not exist.

    An error or an interruption leaves the file as it was. A kill can leave the first part of
    ``text``.

    Raises:
        OSError: naming the file.
    """
    unwritten = memoryview(text.encode())
    # Without a buffer, which would try once more when the file is closed
    with named(path), path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            while unwritten:
                unwritten = unwritten[file.write(unwritten) :]
        except BaseException:
            file.truncate(size)
            raise


def digest_of_file(path: str | Path) -> bytes:
    """Hash of a file's size, beginning and end, for images that are too many to be read.

    A PNG ends with a checksum of all its pixels, and begins with its palette. A JPEG with other
    pixels is almost always of another size. Files of other formats are read as a whole.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(_HEAD)
        if content.startswith(_COMPRESSED):
            file.seek(max(size - _TAIL, 0))
            content += file.read(_TAIL)
        else:
            content += file.read()
    return hashlib.sha256(size.to_bytes(8, "little") + content).digest()


def cache_folder(name: str) -> Path:
    """Where annexe keeps what it can make or fetch again; nothing is made here.

    It is a folder of ``$ANNEXE_CACHE``, else of ``$XDG_CACHE_HOME/annexe``, else of
    ``~/.cache/annexe``.
    """
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache = Path(os.environ.get("ANNEXE_CACHE") or Path(cache_home, "annexe")).expanduser()
    return cache / name


def require_room(folder: Path, num_bytes: int) -> None:
    """Check that a disk takes what is about to be written, and 2 % for what surrounds it.

    Args:
        folder: it need not exist yet.

    Raises:
        UserError: with what is needed and what is free.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    needed = round(num_bytes * _ROOM)
    if needed > free:
        raise UserError(
            f"the disk of '{existing}' has {in_units(free)} free and {in_units(needed)} are "
            "needed; make room, or name a folder on another disk"
        )


def in_units(num_bytes: float) -> str:
    """A number of bytes for people, such as 4.1 GB."""
    return filesize.decimal(round(num_bytes))


@contextmanager
def locked(folder: Path, *, wait: bool = False, setting: str = "run.output_dir") -> Iterator[None]:
    """Keep other processes out of ``folder`` by a lock on its file ``.lock``.

    It is a POSIX record lock: it ends with this process, and processes forked from this one do not
    hold it. The file itself stays; only the lock counts.

    Args:
        folder: it is made if it does not exist.
        wait: wait for a lock that another process holds, instead of raising.
        setting: which one names another folder, for the message.

    Raises:
        UserError: naming the process that holds the lock, or for a disk without locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        # Take the lock, or say who has it
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            if not wait:
                raise UserError(
                    f"'{folder}' is being written to by {holder}; "
                    f"wait for it, end it, or set another {setting}"
                ) from None
            log.info("waiting for %s, which writes to '%s'", holder, folder)
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"cannot lock '{folder}' ({error.strerror}); choose a folder on a disk with locks"
            ) from None

        # Leave a name for the next process that comes
        name = f"process {os.getpid()} on {socket.gethostname()}\n"
        with named(folder):
            file.truncate(0)
            os.write(file.fileno(), name.encode())
        yield
