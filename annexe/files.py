"""Files written whole or not at all, folders that one process at a time may write to."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from annexe.errors import UserError

log = logging.getLogger(__name__)


def require_writable(path: Path) -> None:
    """Make the folder of a file that is written at the end of long work, and refuse a folder in its place.

    Raises:
        UserError: naming what is in the way.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK)
    except OSError as error:
        raise UserError(f"cannot write '{path}' ({error.strerror}); name another file") from None
    if path.is_dir() or not writable:
        raise UserError(
            f"cannot write '{path}' ({'a folder' if writable else 'no permission'}); name another file"
        )


def write_text(path: Path, text: str) -> None:
    """Write ``text`` under another name, then rename: a kill in between leaves what was there before."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=1) + "\n")


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of ``folder`` by a lock on its file ``.lock``, which dies with this process.

    It is a POSIX record lock: processes forked from this one do not hold it. The file stays; only the lock counts.
    With ``wait`` the lock is waited for.

    Raises:
        UserError: naming the process that holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            if not wait:
                raise UserError(
                    f"'{folder}' is being written to by {holder}; wait for it, end it, or set another run.output_dir"
                ) from None
            log.info("waiting for %s, which writes to '%s'", holder, folder)
            fcntl.lockf(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
