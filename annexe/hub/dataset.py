"""A data set of the hub, unpacked into the layout of a data root.

All work happens in a folder beside the data root, which gets its name once everything is in it.
Archives are fetched, unpacked and removed one after another; what is done is written down, so that
an interrupted call goes on where it was.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from annexe.errors import UserError
from annexe.files import locked, remove, require_room, write_json
from annexe.hub.archives import FOLDERS, Archive, Unpacker, find_archives, layout_name
from annexe.hub.client import RemoteFile, Repository
from annexe.hub.transfer import PARTS, RECORD, fetch, read_record, remove_if_empty
from annexe.terminal import counting_bytes

log = logging.getLogger(__name__)

_NEEDED = ("RGB", "depth", "mask", "dataset_split")  # folders without which there are no data
_DONE = "done.json"  # which archives are unpacked, by their digests, and of which commit


def staging_folder(root: Path) -> Path:
    """Where a data root is made until it is complete."""
    root = root.absolute()
    return root.with_name(f"{root.name}.download")


def fetch_dataset(repository: Repository, root: Path) -> int:
    """Fetch a data set and unpack it into ``root``.

    Returns:
        The number of files that are new; 0 where ``root`` holds this commit, which is checked by
        the sizes of all files.

    Raises:
        UserError: for a folder that holds something else, and for all that `fetch` and `Unpacker`
            refuse. ``root`` does not exist then.
    """
    # What is there already is checked alone
    if root.exists() and any(root.iterdir()):
        require_complete(root, repository)
        return 0

    # What the repository has for us
    by_name = {file.name: file for file in repository.files}
    archives, others = find_archives(list(by_name))
    plain = [by_name[name] for name in others if layout_name("", name) is not None]
    if not archives and not plain:
        raise UserError(
            f"'{repository.name}' holds no archives and none of the folders {', '.join(FOLDERS)}; "
            "look at its page, and fetch it by hand"
        )

    # A folder of its own, which a later call goes on with
    staging = staging_folder(root)
    with locked(staging, setting="folder"):
        try:
            num_files = _make(repository, archives, plain, staging, root)
        except BaseException:
            remove_if_empty(staging)
            raise
    remove(staging)
    return num_files


def _make(
    repository: Repository,
    archives: Sequence[Archive],
    plain: Sequence[RemoteFile],
    staging: Path,
    root: Path,
) -> int:
    """Fetch, unpack, and give the data their folder, while nobody else writes to ``staging``."""
    done = _read_done(staging, repository.commit)
    by_name = {file.name: file for file in repository.files}
    _require_room(staging, archives, plain, by_name, done)
    write_json(staging / _DONE, {"commit": repository.commit, "archives": done})
    unpacker = Unpacker(staging / "data")
    for archive in archives:
        files = [by_name[part] for part in archive.parts]
        _add(repository, archive, files, staging, unpacker, done)
    _fetch_plain(repository, plain, staging)
    if unpacker.left_out:
        log.info("left out: %d files that are not part of the layout", unpacker.left_out)
    return _finish(repository, staging, root)


def require_complete(root: Path, repository: Repository | None) -> None:
    """Check that a data root is what was fetched from a repository, by the sizes of its files.

    Args:
        repository: as it is now; None if the hub cannot be asked.

    Raises:
        UserError: for a folder from elsewhere, of another commit, or with files missing.
    """
    # Where it is from
    content = read_record(root)
    if not content:
        raise UserError(
            f"'{root}' holds something else than a data set that was downloaded; name another "
            "folder, or remove it"
        )
    if repository is not None and content.get("repository") != repository.name:
        raise UserError(
            f"'{root}' was downloaded from '{content.get('repository')}'; name another folder"
        )
    if repository is not None and content.get("commit") != repository.commit:
        raise UserError(
            f"'{root}' is of commit {str(content.get('commit'))[:12]} and the hub has "
            f"{repository.commit[:12]}; name another folder for that, or --revision for this"
        )

    # Its files
    wrong = []
    for name, size in content["sizes"].items():
        path = root / name
        if not path.is_file() or path.stat().st_size != size:
            wrong.append(name)
    if wrong:
        raise UserError(
            f"'{root}' is not complete any more: {len(wrong)} files are missing or of another "
            f"size, such as {wrong[0]}; remove the folder and download again"
        )


def _read_done(staging: Path, commit: str) -> list[str]:
    """Digests of the archives that an earlier call unpacked; what is of another commit is removed.

    Files that come again are still known by their hashes.
    """
    try:
        content = json.loads((staging / _DONE).read_text(encoding="utf-8"))
        if content["commit"] == commit:
            return list(content["archives"])
    except (OSError, ValueError, TypeError, KeyError):
        pass
    remove(staging / "data")
    return []


def _require_room(
    staging: Path,
    archives: Sequence[Archive],
    plain: Sequence[RemoteFile],
    by_name: dict[str, RemoteFile],
    done: Sequence[str],
) -> None:
    """Check that the disk takes all files, and the largest archive beside them.

    Photos and maps are compressed already, so archives are about as large as their content. Each
    archive is looked at again before it is unpacked.

    Raises:
        UserError: with what is needed and what is free.
    """
    sizes = []
    for archive in archives:
        files = [by_name[part] for part in archive.parts]
        if files[0].digest not in done:
            sizes.append(sum(file.size for file in files))
    needed = sum(sizes) + max(sizes, default=0) + sum(file.size for file in plain)
    in_part = sum(part.stat().st_size for part in staging.rglob(f"{PARTS}/*.part"))
    require_room(staging, max(needed - in_part, 0))


def _add(
    repository: Repository,
    archive: Archive,
    files: Sequence[RemoteFile],
    staging: Path,
    unpacker: Unpacker,
    done: list[str],
) -> None:
    """Fetch, unpack and remove one archive, unless that is done."""
    downloads = staging / "downloads"
    if files[0].digest in done:
        return
    fetch(repository, files, downloads)
    parts = [downloads / file.name for file in files]
    with counting_bytes(f"unpacking {archive.name}", sum(file.size for file in files)) as count:
        unpacker.unpack(archive.name, parts, count)
    done.append(files[0].digest)
    write_json(staging / _DONE, {"commit": repository.commit, "archives": done})
    for part in parts:
        part.unlink()


def _fetch_plain(repository: Repository, files: Sequence[RemoteFile], staging: Path) -> None:
    """Fetch files that lie in the repository as they are, and put them into the layout."""
    downloads = staging / "plain"
    if not files:
        return
    fetch(repository, files, downloads)
    for file in files:
        name = layout_name("", file.name)
        assert name is not None
        target = staging / "data" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (downloads / file.name).replace(target)


def _finish(repository: Repository, staging: Path, root: Path) -> int:
    """Give the data their folder, with a record of all files.

    Raises:
        UserError: if they are not a data set.
    """
    # All folders of a data set
    data = staging / "data"
    missing = [name for name in _NEEDED if not (data / name).is_dir()]
    if missing:
        raise UserError(
            f"'{repository.name}' has no folder {', '.join(missing)}; what there is lies in "
            f"'{data}', see docs/data.md for the layout"
        )

    # The record
    sizes = {}
    for path in sorted(data.rglob("*")):
        if path.is_file():
            sizes[str(path.relative_to(data))] = path.stat().st_size
    content = {
        "repository": repository.name,
        "kind": repository.kind,
        "commit": repository.commit,
        "sizes": sizes,
    }
    write_json(data / RECORD, content)

    # In its place
    if root.is_dir():
        root.rmdir()  # empty
    root.parent.mkdir(parents=True, exist_ok=True)
    data.rename(root)
    return len(sizes)
