"""The photos that a format names, found among the user's files.

Tools name a photo by its path, by a path below a folder that only they know, or by an address.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from annexe.datasets.photos import ENDINGS
from annexe.errors import UserError

_ENDING = re.compile(r"\.(jpe?g|png|webp|bmp|tiff?|gif)$", re.IGNORECASE)
# Label Studio's upload puts eight digits in front of a name
_UPLOADED = re.compile(r"[0-9a-f]{8}-(?=.)")


def name_of_photo(name: str) -> str:
    """The path of a photo in the name that a tool gives it.

    Of an address only the path is kept, of a path of Label Studio's local files what stands behind
    ``?d=``, and of an absolute path or an upload the name of the file.
    """
    text = name.strip().replace("\\", "/")
    address = urlsplit(text)
    is_local = address.path.endswith("/local-files/")
    if is_local and "d" in parse_qs(address.query):
        text = parse_qs(address.query)["d"][0]
    elif "://" in text:
        text = PurePosixPath(unquote(address.path)).name
    if re.match(r"/|[A-Za-z]:/", text) and not is_local:
        text = PurePosixPath(text).name
    parts = [part for part in PurePosixPath(text.lstrip("/")).parts if part not in (".", "..")]
    return "/".join(parts)


def without_ending(name: str) -> str:
    """The name of an image file without its ending; a point elsewhere is no ending."""
    return _ENDING.sub("", name)


class PhotoSearch:
    """Finds photos by name in some folders and in the folders below them.

    Args:
        folders: the first one that has a file of the very path wins.
        option: what the user can set to name another folder, for messages.
    """

    def __init__(self, folders: Sequence[Path], option: str = "--images DIR") -> None:
        self.folders = [folder for folder in folders if folder.is_dir()]
        self.option = option
        self._by_base: dict[str, list[Path]] | None = None

    def find(self, name: str, where: str) -> Path:
        """The file of a photo.

        Args:
            name: as the format has it.
            where: file and entry that name it, for messages.

        Raises:
            UserError: there is no such file, or several could be meant.
        """
        # The very path
        wanted = name_of_photo(name)
        if not wanted:
            raise UserError(f"{where} names no photo ({name!r}); give it the name of a file")
        for folder in self.folders:
            if (folder / wanted).is_file():
                return folder / wanted

        # Otherwise the file that has most of the path in common, from its end on
        base = PurePosixPath(wanted).name
        found = self._files(base) or self._files(_UPLOADED.sub("", base))
        lengths = [_num_common(path, wanted) for path in found]
        longest = max(lengths, default=0)
        best = [path for path, length in zip(found, lengths, strict=True) if length == longest]
        if len(best) == 1:
            return best[0]
        if best:
            raise UserError(
                f"{where}: photo {name!r} may be '{best[0]}' or '{best[1]}'; "
                f"name the folder of the right one ({self.option})"
            )
        folders = " or ".join(f"'{folder}'" for folder in self.folders) or "any folder"
        raise UserError(
            f"{where}: photo {name!r} is not in {folders}; name the folder of the photos "
            f"({self.option})"
        )

    def _files(self, base: str) -> list[Path]:
        """Photos of a base name in the folders and below, each once."""
        if self._by_base is None:
            self._by_base = defaultdict(list)
            for path in photos_below(*self.folders):
                self._by_base[path.name].append(path)
        return self._by_base.get(base, [])


def photos_below(*folders: Path) -> list[Path]:
    """All photos in some folders and below them, in order, each once.

    Whether a file is a photo is told by its ending. Hidden files and folders are passed over, and
    so are data roots below, which hold copies of photos that were imported.
    """
    found: dict[Path, None] = {}
    for top in folders:
        for folder, below, names in os.walk(top):
            if "dataset_split" in below and folder != os.fspath(top):
                below.clear()
                continue
            below[:] = sorted(name for name in below if not name.startswith("."))
            for name in sorted(names):
                is_photo = os.path.splitext(name)[1].lower() in ENDINGS
                if is_photo and not name.startswith("."):
                    found[Path(folder, name)] = None
    return list(found)


def _num_common(path: Path, wanted: str) -> int:
    """How many parts two paths have in common, from the end on."""
    count = 0
    pairs = zip(reversed(path.parts), reversed(PurePosixPath(wanted).parts), strict=False)
    for part, other in pairs:
        if part != other:
            break
        count += 1
    return count
