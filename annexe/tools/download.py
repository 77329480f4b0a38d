"""`annexe download`: data, public weights and pushed runs from the Hugging Face Hub."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from annexe.doctor.problems import ERROR
from annexe.doctor.survey import survey
from annexe.errors import UserError, unknown_name_error
from annexe.hub.catalog import ITEMS, Item, find_item
from annexe.hub.client import (
    NoConnection,
    RemoteFile,
    Repository,
    gated_error,
    has_token,
    list_files,
)
from annexe.hub.dataset import fetch_dataset, require_complete
from annexe.hub.runs import files_of_run, is_hub_name
from annexe.hub.transfer import fetch, is_whole, read_record, total_size
from annexe.terminal import say, table
from annexe.tools.doctor import show, verdict_of
from annexe.workers import num_cores

log = logging.getLogger(__name__)

_EXAMPLES = """\
examples:
  annexe download --list
  annexe download ego-irgbench
      the data set, unpacked into data/ego-irgbench and checked
  annexe download eva-clip-g
      weights/eva-clip-g, with the lines for a configuration
  annexe download user/repo runs/theirs
      a run that 'annexe push' wrote

A call that was interrupted goes on where it was when it is repeated. A call for what is there
checks it. HF_TOKEN or 'hf auth login' opens gated and private repositories.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="a name of --list, or user/repo of a pushed run"
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        metavar="DIR",
        help="where it goes (default: data/NAME, weights/NAME or runs/REPO)",
    )
    parser.add_argument(
        "--revision", metavar="REV", help="a branch, tag or commit (default: the main branch)"
    )
    parser.add_argument(
        "--list", action="store_true", help="list all names with size, license and gate"
    )


def run(arguments: argparse.Namespace) -> None:
    """Fetch what is named, and print where it is.

    Raises:
        UserError: for an unknown name, and for all that the parts of `annexe.hub` refuse.
        SystemExit: with code 1, if the doctor finds errors in data.
    """
    if arguments.list:
        list_items()
        return
    name = arguments.name
    if name is None:
        raise UserError("no name was given; 'annexe download --list' shows all")
    item = find_item(name)
    if item is None and not is_hub_name(name):
        raise unknown_name_error("download", name, [item.name for item in ITEMS])
    if item is None:
        download_run(name, arguments.folder, arguments.revision)
    elif item.is_data:
        download_data(item, arguments.folder or item.folder, arguments.revision)
    else:
        download_weights(item, arguments.folder or item.folder, arguments.revision)


def list_items() -> None:
    """Print all names, with sizes where the hub can be asked."""
    rows = []
    is_reached = True
    for item in ITEMS:
        size = "?"
        try:
            if is_reached:
                repository = list_files(item.repository, item.kind)
                size = total_size(_files_of(item, repository))
        except NoConnection as error:
            is_reached = False
            log.warning("sizes are not known: %s", error)
        except UserError as error:
            log.warning("%s", error)
        gate = "login and consent" if item.is_gated else ""
        rows.append([item.name, size, item.license, gate, item.repository])
    table(["name", "size", "license", "gate", "repository"], rows)


def _files_of(item: Item, repository: Repository) -> Sequence[RemoteFile]:
    """The files of a repository that make an item."""
    return repository.files if item.is_data else item.chosen(repository)


def download_data(item: Item, root: Path, revision: str | None) -> None:
    """Fetch a data set, unpack it and check it.

    Raises:
        UserError: see `fetch_dataset`.
        SystemExit: with code 1, if there are errors in the data.
    """
    repository = _look(item.repository, item.kind, revision, root, item)
    if repository is None:
        require_complete(root, None)
    elif fetch_dataset(repository, root):
        result = survey(root, num_cores())
        show(result)
        say(verdict_of(result))
        _say_settings(item, root)
        if any(problem.severity == ERROR for problem in result.problems):
            sys.exit(1)
        return
    say(f"'{root}' is complete; 'annexe doctor {root}' checks every file of it")
    _say_settings(item, root)


def download_weights(item: Item, folder: Path, revision: str | None) -> None:
    """Fetch public weights, and print the settings that use them.

    Raises:
        UserError: see `fetch`.
    """
    repository = _look(item.repository, item.kind, revision, folder, item)
    if repository is not None:
        _fetch(repository, item.chosen(repository), folder)
    _say_settings(item, folder)


def download_run(name: str, folder: Path | None, revision: str | None) -> None:
    """Fetch a run that was pushed.

    Raises:
        UserError: see `fetch`, and for a repository that holds no run.
    """
    repository_name, _, named_revision = name.partition("@")
    folder = folder or Path("runs", repository_name.rpartition("/")[2])
    revision = revision or named_revision or None
    repository = _look(repository_name, "model", revision, folder, None)
    if repository is not None:
        _fetch(repository, files_of_run(repository), folder)
    say(f"use it: annexe predict {folder} PHOTO --out DIR, or model.init_from: {folder}")


def _look(
    name: str, kind: str, revision: str | None, folder: Path, item: Item | None
) -> Repository | None:
    """Ask for a repository and say what it is, before anything is fetched.

    Returns:
        The repository; None where the hub does not answer and what is here is whole.

    Raises:
        UserError: for a gate without a login, or no answer and nothing here.
    """
    try:
        repository = list_files(name, kind, revision)
    except NoConnection:
        record = read_record(folder)
        is_data = item is not None and item.is_data
        if record.get("repository") != name or not (is_data or is_whole(folder)):
            raise
        log.warning("the hub cannot be reached; checked what is in '%s' alone", folder)
        return None
    except UserError as error:
        if item is not None and item.instead and item.is_gated is False:
            raise UserError(f"{error}. {item.instead[0].upper()}{item.instead[1:]}") from None
        raise

    license = repository.license or (item.license if item is not None else "not named")
    gate = "; gated: the owners ask for a login and consent" if repository.gated else ""
    say(f"{repository.page} at {repository.commit[:12]}; license: {license}{gate}")
    if repository.gated and not has_token():
        raise gated_error(name)
    return repository


def _fetch(repository: Repository, files: Sequence[RemoteFile], folder: Path) -> None:
    """Fetch files, say how large they are before and what happened after.

    Raises:
        UserError: see `fetch`.
    """
    say(f"{len(files)} files, {total_size(files)}, to '{folder}'")
    num_fetched = fetch(repository, files, folder)
    what = f"{num_fetched} files fetched" if num_fetched else "all files were here"
    say(f"'{folder}' is complete: {what}, every checksum is right")


def _say_settings(item: Item, folder: Path) -> None:
    """Print the lines of a configuration that use what was fetched."""
    say("for the configuration:")
    say(item.settings(folder))
