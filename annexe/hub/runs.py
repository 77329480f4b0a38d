"""Runs by name: a folder here, or a repository of the hub that `annexe push` wrote.

A fetched run lies in ``$ANNEXE_CACHE/hub/user--repo@COMMIT`` (see `annexe.files.cache_folder`).
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from annexe.checkpoints.run_folder import require_checkpoint
from annexe.errors import UserError
from annexe.files import cache_folder
from annexe.hub.client import NoConnection, RemoteFile, Repository, list_files
from annexe.hub.transfer import RECORD, fetch, is_whole, read_record

log = logging.getLogger(__name__)

# What a pushed run consists of, and nothing else of its repository is fetched
START = "start"  # folder of the run that it started from, where its frozen weights are needed
_FILES = re.compile(
    rf"({START}/)*((config\.yaml|model\.safetensors)"
    r"|(files|frozen|state|manifest|metrics)\.json|README\.md"
    r"|(adapter|tokenizer|\w+_encoder)/[\w.-]+\.(json|safetensors|model|txt|jinja))"
)
_NEEDED = ("config.yaml", "files.json", "frozen.json", "model.safetensors", "state.json")

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_FILES_OF_WEIGHTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".yaml", ".json")
_LENGTH_OF_COMMIT = 12  # digits in the name of a folder


def require_run(where: str | Path, which: str = "best") -> Path:
    """The checkpoint that a run means, which may be one of the hub.

    Every command that takes a run finds it here.

    Args:
        where: folder of a run or checkpoint, else ``user/repo`` or ``user/repo@revision``.
        which: of a run's checkpoints the ``latest`` or the ``best``.

    Raises:
        UserError: where there is no such folder and no such repository.
    """
    return require_checkpoint(local_run(where), which)


def local_run(where: str | Path) -> str:
    """The path of a run; one of the hub is fetched into the cache.

    What exists here always counts first, and so does what cannot be a repository: it is given back
    as it is.

    Raises:
        UserError: where a name is neither a folder here nor a run on the hub.
    """
    text = os.path.expanduser(where)
    if Path(text).exists() or not is_hub_name(text):
        return text
    try:
        return str(_cached(text))
    except UserError as error:
        raise UserError(f"there is no folder '{text}' here, and on the hub: {error}") from None
    except OSError as error:
        raise UserError(
            f"cannot keep '{text}' in '{cache_folder('hub')}' ({error.strerror}); set "
            "ANNEXE_CACHE to a folder that can be written"
        ) from None


def is_hub_name(text: str) -> bool:
    """Whether a text has the form ``user/repo`` or ``user/repo@revision``."""
    return _NAME.fullmatch(text) is not None and not text.endswith(_FILES_OF_WEIGHTS)


def _cached(text: str) -> Path:
    """The folder of a run of the hub, fetched unless it is there."""
    name, _, revision = text.partition("@")
    hub = cache_folder("hub")
    stem = name.replace("/", "--")
    try:
        repository = list_files(name, "model", revision or None)
    except NoConnection:
        there = _kept(hub, stem, revision)
        if there is None:
            raise
        log.warning("the hub cannot be reached; taking '%s', fetched before", there)
        return there

    files = files_of_run(repository)
    folder = hub / f"{stem}@{repository.commit[:_LENGTH_OF_COMMIT]}"
    if fetch(repository, files, folder, wait=True):
        log.info("'%s' is now in '%s'", text, folder)
    return folder


def files_of_run(repository: Repository) -> list[RemoteFile]:
    """The files of a repository that make a run.

    Raises:
        UserError: if it holds none.
    """
    files = [file for file in repository.files if _FILES.fullmatch(file.name)]
    names = {file.name for file in files}
    for name in _NEEDED:
        if name not in names:
            raise UserError(
                f"'{repository.name}' holds no run of annexe (it has no {name}); name one that "
                "'annexe push' wrote"
            )
    return files


def _kept(hub: Path, stem: str, revision: str) -> Path | None:
    """The run that was fetched last, whole, and of the revision if that is a commit."""
    found = sorted(hub.glob(f"{stem}@*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for folder in found:
        commit = str(read_record(folder).get("commit", ""))
        is_asked = not revision or (commit != "" and commit.startswith(revision))
        if is_asked and (folder / RECORD).is_file() and is_whole(folder):
            return folder
    return None


def name_on_hub(folder: str | Path) -> str | None:
    """Where a folder of the cache was fetched from, as ``user/repo@commit``; else None."""
    content = read_record(Path(folder))
    if content.get("kind") != "model" or "repository" not in content:
        return None
    return f"{content['repository']}@{content['commit']}"
