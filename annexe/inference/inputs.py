"""What is predicted: photos and videos, folders of them, and patterns."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from annexe.datasets.photos import ENDINGS
from annexe.errors import UserError
from annexe.inference import video

log = logging.getLogger(__name__)

_FIX = "give image or video files, folders of them, or a pattern such as 'photos/**/*.jpg'"


@dataclass(frozen=True)
class Inputs:
    """Photos and videos, each file once."""

    photos: list[Path]
    videos: list[Path]


def find_inputs(paths: Iterable[Path], leave_out: Path | None = None) -> Inputs:
    """The photos and videos that files, folders and patterns name.

    A folder means the photos and videos that lie in it, not those of folders in it; a warning
    counts its other files, which may be photos of a format that is not read. A pattern
    means what a shell makes of it, and `**` folders of any depth; files in it that are neither
    photo nor video by their ending do not count.

    Args:
        paths: as they were named.
        leave_out: folder whose files no pattern means, because they are made from the photos.

    Raises:
        UserError: for a path or a pattern that names nothing, and two files of one name.
    """
    # Every file once, however it was named
    found: dict[Path, Path] = {}
    for path in paths:
        for file in _files_of(path, leave_out):
            found[_real(file)] = file

    # By their endings
    photos: list[Path] = []
    videos: list[Path] = []
    for file in found.values():
        kind = videos if video.is_video(file) else photos
        kind.append(file)
    _require_own_names(photos)
    _require_own_names(videos)
    return Inputs(photos, videos)


def _files_of(path: Path, leave_out: Path | None) -> list[Path]:
    """The files that one argument means.

    Raises:
        UserError: there is none.
    """
    if path.is_dir():
        files = _files_in(path)
        if not files:
            endings = ", ".join(ENDINGS)
            raise UserError(f"no {endings} and no video in folder '{path}'; {_FIX}")
        _warn_of_others(path)
        return files
    if path.exists():
        return [path]
    if not glob.has_magic(str(path)):
        raise UserError(f"no photo or video '{path}'; {_FIX}")

    # A pattern that a shell did not expand, because it was quoted or matches nothing
    files = []
    for match in sorted(map(Path, glob.glob(str(path), recursive=True))):
        if leave_out is not None and _lies_in(match, leave_out):
            continue
        if match.is_dir():
            files += _files_in(match)
        elif _has_known_ending(match):
            files.append(match)
    if not files:
        raise UserError(f"no photo or video matches '{path}'; {_FIX}")
    return files


def _files_in(folder: Path) -> list[Path]:
    """The photos and videos of a folder, sorted, without hidden ones.

    Links to what is gone are among them, so that they are refused by their names.
    """
    paths = sorted(folder.glob("[!.]*"))
    return [path for path in paths if _has_known_ending(path) and _is_file_or_lost_link(path)]


def _is_file_or_lost_link(path: Path) -> bool:
    return path.is_file() or (path.is_symlink() and not path.exists())


def _warn_of_others(folder: Path) -> None:
    """Count the files of a folder that are left out, and name one."""
    paths = sorted(folder.glob("[!.]*"))
    others = [path for path in paths if path.is_file() and not _has_known_ending(path)]
    if others:
        log.warning(
            "files in '%s' that are neither photo nor video by their ending are left out: %d, "
            "such as '%s'",
            folder,
            len(others),
            others[0].name,
        )


def _has_known_ending(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS or video.is_video(path)


def _lies_in(path: Path, folder: Path) -> bool:
    return _real(path).is_relative_to(_real(folder))


def _real(path: Path) -> Path:
    """A path without links; a link to itself stays, where `Path.resolve` may raise an error."""
    return Path(os.path.realpath(path))


def _require_own_names(files: list[Path]) -> None:
    """Refuse files that differ in nothing but folder or ending: results have no more of the name.

    Raises:
        UserError: naming the first two.
    """
    by_stem: dict[str, Path] = {}
    for file in files:
        other = by_stem.setdefault(file.stem, file)
        if other != file:
            raise UserError(
                f"'{other}' and '{file}' have one name; rename one, or predict them apart"
            )
