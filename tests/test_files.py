"""Files and folders are replaced as a whole; locks keep other processes out."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from annexe.errors import UserError
from annexe.files import digest_of_file, locked, part_of, replaced, write_json, write_text

KILLED_WHILE_WRITING = """
import os, sys
from pathlib import Path
from annexe.files import replaced
with replaced(Path(sys.argv[1])) as part:
    part.write_text("half")
    os._exit(9)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, *files: str) -> None:
    folder.mkdir()
    for name in files:
        (folder / name).write_text(name)


def test_a_file_is_there_at_the_end_of_the_block_alone(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    for text in ("first", "second"):
        with replaced(path) as part:
            part.write_text(text)
            assert part == part_of(path) and part.parent == tmp_path
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert names(tmp_path) == ["file.txt"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with replaced(path) as part:
        fill(part, "a", "b")
    with replaced(path) as part:
        fill(part, "c")
        assert names(path) == ["a", "b"]
    assert names(path) == ["c"] and names(tmp_path) == ["folder"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("is_folder", [False, True])
def test_an_error_leaves_what_was_there(
    is_folder: bool, error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "name"
    if is_folder:
        fill(path, "old")
    else:
        path.write_text("old")

    def write_and_fail() -> None:
        with replaced(path) as part:
            if is_folder:
                fill(part, "new")
            else:
                part.write_text("new")
            raise error

    with pytest.raises(error):
        write_and_fail()
    assert names(tmp_path) == ["name"]
    assert (names(path) == ["old"]) if is_folder else (path.read_text() == "old")


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replaced(tmp_path / "file"):
        pass
    assert names(tmp_path) == []


def test_a_file_never_replaces_a_folder_nor_a_folder_a_file(tmp_path: Path) -> None:
    fill(tmp_path / "folder", "precious")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OSError, match="directory"), replaced(tmp_path / "folder") as part:
        part.write_text("new")
    with pytest.raises(OSError, match="directory"), replaced(tmp_path / "file") as part:
        fill(part, "new")
    assert names(tmp_path) == ["file", "folder"] and names(tmp_path / "folder") == ["precious"]
    assert (tmp_path / "file").read_text() == "precious"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(path)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == 9
    assert path.read_text() == "old" and part_of(path).read_text() == "half"
    write_text(path, "new")
    assert path.read_text() == "new" and names(tmp_path) == ["file.txt"]

    fill(part_of(tmp_path / "folder"), "stale")
    with replaced(tmp_path / "folder") as part:
        fill(part, "fresh")
    assert names(tmp_path / "folder") == ["fresh"] and names(tmp_path) == ["file.txt", "folder"]


def _write_often(path: Path, letter: str) -> None:
    for _ in range(200):
        with replaced(path, concurrent=True) as part:
            part.write_text(letter * 10_000)
        text = path.read_text()
        assert len(text) == 10_000 and len(set(text)) == 1


def test_processes_may_write_one_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with get_context("fork").Pool(3) as pool:
        pool.starmap(_write_often, [(path, letter) for letter in "abc"], chunksize=1)
    assert names(tmp_path) == ["file.txt"]


def test_json_makes_its_folder(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b.json", {"key": [1]})
    assert (tmp_path / "a" / "b.json").read_text() == '{\n "key": [\n  1\n ]\n}\n'
    assert names(tmp_path / "a") == ["b.json"]


def _take(folder: Path) -> str:
    try:
        with locked(folder):
            return "taken"
    except UserError as error:
        return str(error)


def test_a_lock_keeps_other_processes_out(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with get_context("spawn").Pool(1) as pool:
        with locked(folder):
            message = pool.apply(_take, (folder,))
        assert f"'{folder}' is being written to by process {os.getpid()} on" in message
        assert "\n" not in message
        assert pool.apply(_take, (folder,)) == "taken"
    assert names(folder) == [".lock"]


# Hashes


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "BMP"])
def test_a_digest_tells_images_of_one_size_apart(image_format: str, tmp_path: Path) -> None:
    """One pixel in the middle differs; in the PNG there are notes behind the pixels."""
    notes = PngInfo()
    notes.add(b"noTe", b"date:modify 2026-11-28" * 10, after_idat=True)
    options = {"pnginfo": notes, "compress_level": 0} if image_format == "PNG" else {}
    path = tmp_path / "image.png"
    sizes, digests = set(), set()
    for value in (1, 2):
        pixels = np.zeros((100, 100), np.uint8)
        pixels[50, 50] = value
        Image.fromarray(pixels).save(path, image_format, **options)
        sizes.add(path.stat().st_size)
        digests.add(digest_of_file(path))
    assert (len(sizes), len(digests)) == (1, 2)
    if options:
        assert b"date:modify" in path.read_bytes()[-64:]
