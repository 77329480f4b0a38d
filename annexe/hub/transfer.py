"""Files of a repository into a folder: checked by their hashes, and resumed where they stopped.

The bytes of a file that is not complete lie in ``.download`` of the folder, under a name with the
hash of the content, so that a file that has changed on the hub starts anew. A complete file is
renamed into its place after its hash was compared.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from annexe.errors import UserError
from annexe.files import FULL_DISK, in_units, locked, named, remove, require_room, write_json
from annexe.hub.client import (
    RemoteFile,
    Repository,
    connected,
    gated_error,
    has_token,
    may_pass,
    one_line,
)
from annexe.terminal import counting_bytes

log = logging.getLogger(__name__)

PARTS = ".download"  # folder for what is not complete
RECORD = ".annexe-download.json"  # what a folder was fetched from; written last
_CHUNK = 1 << 20  # bytes that are hashed at a time
_SMALL = 10_000_000  # bytes of the largest file that comes together with others,
_NUM_THREADS = 8  # so many at a time,
_GROUP = 64  # and at most so many are waited for after an error
_TRIES = 3  # in a row that bring nothing
_PAUSE = 1.0  # seconds before the second try; then twice as long each time

Counter = Callable[[int], None]


def fetch(
    repository: Repository, files: Sequence[RemoteFile], folder: Path, *, wait: bool = False
) -> int:
    """Bring files of a repository to ``folder``; those that are there are checked and kept.

    Room on the disk is checked first. An interruption at any moment costs nothing: the same call
    goes on where it was.

    Args:
        files: some of the repository's.
        wait: for another process that fetches to the same folder, instead of raising.

    Returns:
        How many had to be fetched.

    Raises:
        UserError: for a gate that is closed, a full disk, a wrong hash, a hub that does not answer,
            and for files of the same names that come from elsewhere.
    """
    for file in files:
        require_safe_name(file.name, f"repository '{repository.name}'")
    with locked(folder, wait=wait, setting="folder"):
        try:
            return _fetch(repository, files, folder)
        except BaseException:
            remove_if_empty(folder)
            raise


def _fetch(repository: Repository, files: Sequence[RemoteFile], folder: Path) -> int:
    """As `fetch`, while nobody else writes to ``folder``."""
    missing = _missing(files, folder)
    if missing and repository.gated and not has_token():
        raise gated_error(repository.name)

    # What is there in part need not be fetched again
    num_bytes = 0
    for file in missing:
        num_bytes += file.size - min(_size_of(_part_of(file, folder)), file.size)
    require_room(folder, num_bytes)

    large = [file for file in missing if file.size > _SMALL]
    small = [file for file in missing if file.size <= _SMALL]
    description = f"fetching {repository.name}"
    with connected(), counting_bytes(description, num_bytes) as count:
        for file in large:
            fetch_file(repository, file, folder, count)

        # Of many small files most time is that of waiting for answers
        def fetch_small(file: RemoteFile) -> None:
            fetch_file(repository, file, folder, count)

        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            for first in range(0, len(small), _GROUP):
                list(pool.map(fetch_small, small[first : first + _GROUP]))
    remove(folder / PARTS)
    record(repository, files, folder)
    return len(missing)


def fetch_file(repository: Repository, file: RemoteFile, folder: Path, count: Counter) -> None:
    """Bring one file to ``folder``, whole and with the right hash, while `connected`.

    Args:
        count: is told how many bytes came.

    Raises:
        UserError: as `fetch` says.
    """
    # Bytes that are missing
    what = f"{repository.name}/{file.name}"
    target = folder / file.name
    path = _part_of(file, folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with one_line(what), named(path), _Part(path, file) as part:
            _receive_all(repository.address(file), part, count)
            digest = part.hash.hexdigest()
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise UserError(
            f"the disk takes no more of '{what}' ({error.strerror}); make room and repeat the "
            "command, which goes on where it was"
        ) from None

    # Under its name only with the right hash
    if digest != file.digest:
        remove(path)
        raise UserError(
            f"'{what}' arrived with another checksum ({digest[:12]}, the hub names "
            f"{file.digest[:12]}) and was removed; repeat the command"
        )
    os.replace(path, target)


class _Part:
    """The file of what has come so far, with the hash of its content.

    Args:
        path: it is made if it does not exist.
        file: what it will be.
    """

    def __init__(self, path: Path, file: RemoteFile) -> None:
        self.file = file
        self.stream = path.open("r+b" if path.is_file() else "x+b", buffering=0)
        self.size = 0
        self.hash = file.new_hash()
        while content := self.stream.read(_CHUNK):
            self.hash.update(content)
            self.size += len(content)
        if self.size > file.size:
            self.restart()

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def append(self, content: bytes) -> None:
        """Add what came next.

        Raises:
            OSError: for a disk that takes no more; what it took counts.
        """
        unwritten = memoryview(content)
        while unwritten:
            num_written = self.stream.write(unwritten)
            self.hash.update(unwritten[:num_written])
            self.size += num_written
            unwritten = unwritten[num_written:]

    def restart(self) -> None:
        """Forget all content."""
        self.stream.seek(0)
        self.stream.truncate()
        self.size = 0
        self.hash = self.file.new_hash()


def _receive_all(address: str, part: _Part, count: Counter) -> None:
    """Fill a part, with new requests for the rest where one breaks off.

    Raises:
        Exception: the last error, after several tries in a row that brought nothing.
    """
    num_tries = 0
    while part.size < part.file.size:
        before = part.size
        error: Exception | None = None
        try:
            _receive(address, part, count)
        except Exception as caught:
            if not may_pass(caught):
                raise
            error = caught

        # A try that brought something starts the count anew
        num_tries = 1 if part.size > before else num_tries + 1
        if part.size < part.file.size and num_tries == _TRIES:
            raise error or UserError(
                f"'{part.file.name}' stops after {part.size} of {part.file.size} bytes each time; "
                "repeat the command later"
            )
        if error is not None:
            time.sleep(_PAUSE * 2 ** (num_tries - 1))


def _receive(address: str, part: _Part, count: Counter) -> None:
    """One request for what a part lacks.

    Raises:
        Exception: those of huggingface_hub, and of the disk.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    # Ask for what is behind the bytes that are there
    headers = build_hf_headers()
    headers["Accept-Encoding"] = "identity"  # else the bytes are not those of the file
    if part.size:
        headers["Range"] = f"bytes={part.size}-"
    seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
    session = get_session()
    with session.stream(
        "GET", address, headers=headers, timeout=seconds, follow_redirects=True
    ) as response:
        if response.status_code == 416:  # nothing behind what we have
            part.restart()
            return
        hf_raise_for_status(response)

        # Is it that, and no more or less?
        if part.size and not _continues(response, part.size):
            part.restart()
        announced = int(response.headers.get("Content-Length", part.file.size - part.size))
        if announced != part.file.size - part.size:
            part.restart()
            raise UserError(
                f"'{part.file.name}' comes with {announced} bytes and the hub names "
                f"{part.file.size}; check HF_ENDPOINT and the proxy, or repeat the command"
            )

        # Keep it
        for content in response.iter_bytes():
            if part.size + len(content) > part.file.size:
                part.restart()
                raise UserError(
                    f"'{part.file.name}' is longer than the {part.file.size} bytes that the hub "
                    "names; repeat the command"
                )
            part.append(content)
            count(len(content))


def _continues(response: Any, size: int) -> bool:
    """Whether an answer begins behind the first ``size`` bytes."""
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return response.status_code == 206 and found is not None and int(found[1]) == size


# What is there already


def has_content(path: Path, file: RemoteFile, count: Counter | None = None) -> bool:
    """Whether a file on disk is that of the hub, by its hash."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    digest = file.new_hash()
    with path.open("rb") as stream:
        while content := stream.read(_CHUNK):
            digest.update(content)
            if count is not None:
                count(len(content))
    return digest.hexdigest() == file.digest


def _missing(files: Iterable[RemoteFile], folder: Path) -> list[RemoteFile]:
    """The files that are not in ``folder`` as the hub has them.

    Raises:
        UserError: for one that is there and came from elsewhere.
    """
    ours = read_record(folder).get("files", {})
    there = [file for file in files if (folder / file.name).exists()]
    missing = [file for file in files if not (folder / file.name).exists()]
    with counting_bytes("checking what is there", sum(file.size for file in there)) as count:
        for file in there:
            if has_content(folder / file.name, file, count):
                continue
            if file.name not in ours:
                raise UserError(
                    f"'{folder / file.name}' is there, and is not the file that the hub has; "
                    "name another folder, or remove it"
                )
            log.warning("'%s' is damaged or of another version", folder / file.name)
            missing.append(file)
    return missing


def record(repository: Repository, files: Iterable[RemoteFile], folder: Path) -> None:
    """Write down what a folder holds of a repository."""
    content: dict[str, Any] = {
        "repository": repository.name,
        "kind": repository.kind,
        "commit": repository.commit,
        "files": {},
    }
    for file in files:
        content["files"][file.name] = [file.size, file.digest, file.is_large]
    if read_record(folder) != content:
        write_json(folder / RECORD, content)


def read_record(folder: Path) -> dict[str, Any]:
    """What `record` wrote; empty where there is nothing to read."""
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_whole(folder: Path) -> bool:
    """Whether a folder holds what its record says, by the hashes of all files."""
    files = read_record(folder).get("files", {})
    for name, (size, digest, is_large) in files.items():
        if not has_content(folder / name, RemoteFile(name, size, digest, is_large)):
            return False
    return bool(files)


def _part_of(file: RemoteFile, folder: Path) -> Path:
    """Where the bytes of a file lie until it is complete."""
    which = zlib.crc32(file.name.encode())  # files of the same content may come at once
    return folder / PARTS / f"{file.digest}-{which:08x}.part"


def remove_if_empty(folder: Path) -> None:
    """Leave no folder behind in which nothing has arrived, but for the lock that we hold."""
    for part in (folder / PARTS).glob("*.part"):
        if not part.stat().st_size:
            part.unlink()
    for path in (folder / PARTS, folder):
        if path.is_dir() and {each.name for each in path.iterdir()} <= {".lock"}:
            remove(path)


def _size_of(path: Path) -> int:
    """The size of a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def require_safe_name(name: str, where: str) -> None:
    """Refuse a name under which a file could land outside of its folder, on any system.

    Args:
        where: it comes from, for the message.

    Raises:
        UserError: naming it.
    """
    parts = name.rstrip("/").split("/")
    has_odd_characters = any(character in name for character in "\\:\0")
    if has_odd_characters or any(part in ("", ".", "..") for part in parts):
        raise UserError(
            f"{where} has a file named {name!r}, which would not lie inside its folder; "
            "nothing of it was written"
        )


def total_size(files: Iterable[RemoteFile]) -> str:
    """The size of all files, for people."""
    return in_units(sum(file.size for file in files))
