"""Downloads and uploads against a hub on this machine, with the faults of networks and servers."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from omegaconf import OmegaConf
from rich import get_console

from annexe import Predictor
from annexe.build import load_config
from annexe.checkpoints.run_folder import require_checkpoint
from annexe.checkpoints.training_state import seal
from annexe.config import Config
from annexe.errors import UserError
from annexe.evaluation.records import write_records
from annexe.hub import archives, client, runs, transfer
from annexe.hub.archives import Unpacker, find_archives, layout_name
from annexe.hub.catalog import ITEMS, find_item, public_path
from annexe.hub.client import list_files
from annexe.hub.publish import _is_private, publish
from annexe.synthetic.generate import generate
from annexe.tools import download, push
from annexe.trainer import train
from tests.conftest import ROOT
from tests.hub_server import Hub, running_hub
from tests.test_ends_well import full_disk

NO_SERVER = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub, no token, a cache of its own, and no patience."""
    with running_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.address)
        monkeypatch.setenv("ANNEXE_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.5)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
        monkeypatch.setattr(client, "_SECONDS_OF_SILENCE", 0.5)
        monkeypatch.setattr(transfer, "_PAUSE", 0.01)
        yield running


def noise(num_bytes: int) -> bytes:
    """Bytes that no compression makes smaller."""
    return np.random.default_rng(num_bytes).bytes(num_bytes)


def fetch_all(name: str, folder: Path) -> int:
    """Fetch every file of a repository."""
    repository = list_files(name)
    return transfer.fetch(repository, repository.files, folder)


def left_in(folder: Path) -> list[str]:
    """Names of all files under a folder, which need not exist, but for locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return sorted(str(path.relative_to(folder)) for path in files)


def refusal(work: Callable[[], object]) -> str:
    """The one line with which something is refused."""
    with pytest.raises(UserError) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message
    return message


def call(tool: Any, *words: str) -> None:
    """A command, without its process."""
    parser = argparse.ArgumentParser()
    tool.add_arguments(parser)
    tool.run(parser.parse_args(words))


# Files


def test_an_interrupted_download_goes_on_and_ends_with_the_same_bytes(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = noise(900_000)
    hub.add("user/model", {"large.bin": content, "small.json": b"{}"})
    monkeypatch.setattr(transfer, "_TRIES", 1)  # a break ends the call, as a kill does
    monkeypatch.setattr(transfer, "_SMALL", 1000)  # the large file comes first
    for num_stopped in range(1, 4):
        hub.faults.break_after = 200_000
        hub.faults.num_breaks = 1
        refusal(lambda: fetch_all("user/model", tmp_path / "out"))
        (part,) = (tmp_path / "out" / transfer.PARTS).glob("*.part")
        assert part.read_bytes() == content[: num_stopped * 200_000]
        assert left_in(tmp_path / "out") == [f"{transfer.PARTS}/{part.name}"]

    assert fetch_all("user/model", tmp_path / "out") == 2
    assert (tmp_path / "out" / "large.bin").read_bytes() == content
    assert hub.ranges == [f"bytes={count}-" for count in (200_000, 400_000, 600_000)]
    assert hub.num_bytes == len(content) + 2  # none came twice
    assert left_in(tmp_path / "out") == [transfer.RECORD, "large.bin", "small.json"]


@pytest.mark.slow
def test_a_download_that_is_killed_goes_on(hub: Hub, tmp_path: Path) -> None:
    content = noise(6_000_000)
    (file,) = find_item("depth-anything-v2-base").files
    hub.add("depth-anything/Depth-Anything-V2-Base", {file: content})
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.address}
    command = [sys.executable, "-m", "annexe", "download", "depth-anything-v2-base", "out"]
    hub.faults.seconds_per_mb = 0.5
    for _ in range(2):
        sent = hub.num_bytes
        process = subprocess.Popen(command, env=environment, cwd=tmp_path)
        while hub.num_bytes < sent + 2_000_000:
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert not (tmp_path / "out" / file).exists()

    hub.faults.seconds_per_mb = 0
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    assert (tmp_path / "out" / file).read_bytes() == content
    assert len(hub.ranges) == 2
    assert hub.num_bytes < len(content) + 2_000_000  # what was on its way when it was killed


def test_breaks_within_a_call_are_taken_up_at_once(hub: Hub, tmp_path: Path) -> None:
    content = noise(500_000)
    hub.add("user/model", {"large.bin": content})
    hub.faults.break_after = 100_000
    hub.faults.num_breaks = 4
    assert fetch_all("user/model", tmp_path / "out") == 1
    assert (tmp_path / "out" / "large.bin").read_bytes() == content
    assert hub.num_bytes == len(content)


def test_a_server_without_ranges_and_a_part_that_is_too_long_start_anew(
    hub: Hub, tmp_path: Path
) -> None:
    content = noise(50_000)
    hub.add("user/model", {"large.bin": content})
    (file,) = list_files("user/model").files
    for before in (content[:20_000], content + b"more"):
        hub.faults.ignore_range = True
        part = transfer._part_of(file, tmp_path / "out")
        part.parent.mkdir(parents=True)
        part.write_bytes(before)
        assert fetch_all("user/model", tmp_path / "out") == 1
        assert (tmp_path / "out" / "large.bin").read_bytes() == content
        shutil.rmtree(tmp_path / "out")


def test_a_new_version_of_a_file_does_not_continue_the_old_one(hub: Hub, tmp_path: Path) -> None:
    repo = hub.add("user/model", {"large.bin": noise(60_000)})
    hub.faults.break_after = 30_000
    hub.faults.num_breaks = 1
    hub.faults.status = None
    assert fetch_all("user/model", tmp_path / "out") == 1
    repo.files["large.bin"] = noise(60_001)
    assert fetch_all("user/model", tmp_path / "out") == 1
    assert (tmp_path / "out" / "large.bin").read_bytes() == noise(60_001)


def test_a_second_call_checks_every_byte_and_mends_what_is_damaged(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add("user/model", {"large.bin": noise(50_000), "small.json": b"{}"})
    assert fetch_all("user/model", tmp_path / "out") == 2
    sent = hub.num_bytes
    assert fetch_all("user/model", tmp_path / "out") == 0
    assert hub.num_bytes == sent

    damaged = tmp_path / "out" / "large.bin"
    damaged.write_bytes(noise(50_000)[:-1] + b"?")  # of the same size
    assert fetch_all("user/model", tmp_path / "out") == 1
    assert damaged.read_bytes() == noise(50_000)


def test_a_token_stays_at_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.add("user/model", {"large.bin": noise(40_000)}, private=True)
    hub.faults.elsewhere = True
    hub.faults.break_after = 10_000
    hub.faults.num_breaks = 1
    assert fetch_all("user/model", tmp_path / "out") == 1
    assert (tmp_path / "out" / "large.bin").read_bytes() == noise(40_000)
    assert hub.tokens_elsewhere == [None, None]
    assert hub.ranges == ["bytes=10000-"]


def test_many_small_files_come_together(hub: Hub, tmp_path: Path) -> None:
    files = {f"folder/{index}.json": str(index % 7).encode() for index in range(40)}
    hub.add("user/model", files)
    assert fetch_all("user/model", tmp_path / "out") == 40
    for name, content in files.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    assert list((tmp_path / "out").glob(f"{transfer.PARTS}/*")) == []


def test_a_file_from_elsewhere_is_not_replaced(hub: Hub, tmp_path: Path) -> None:
    hub.add("user/model", {"config.json": b"{}"})
    (tmp_path / "config.json").write_text("mine")
    message = refusal(lambda: fetch_all("user/model", tmp_path))
    assert "config.json' is there, and is not the file that the hub has" in message
    assert (tmp_path / "config.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"spoil": True}, "arrived with another checksum"),
        ({"silent": True}, "cannot reach http://127.0.0.1"),
        ({"status": 503}, "the hub answered 503"),
        ({"not_the_hub": True}, "does not answer as the hub does"),
    ],
)
@pytest.mark.parametrize("is_late", [False, True])
def test_faults_end_in_one_line_and_leave_nothing(
    hub: Hub, tmp_path: Path, fault: dict[str, Any], expected: str, is_late: bool
) -> None:
    hub.add("user/model", {"large.bin": noise(30_000)})
    repository = list_files("user/model")
    for name, value in fault.items():
        setattr(hub.faults, name, value)
    if is_late or "spoil" in fault:  # while files are fetched
        files = repository.files
        message = refusal(lambda: transfer.fetch(repository, files, tmp_path / "out"))
        if "not_the_hub" in fault:
            expected = "comes with 41 bytes and the hub names 30000"
    else:
        message = refusal(lambda: fetch_all("user/model", tmp_path / "out"))
    assert expected in message
    assert not (tmp_path / "out").exists()


def test_no_network_is_one_line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NO_SERVER)
    message = refusal(lambda: call(download, "eva-clip-g", str(tmp_path / "out")))
    assert message.startswith(f"cannot reach {NO_SERVER} for 'timm/eva_giant")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("address", ["not an address", "http://[::1", "ftp://hub", "http://a:b"])
def test_an_address_that_is_none_is_one_line(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert f"HF_ENDPOINT is '{address}'" in refusal(lambda: list_files("user/model"))


def test_a_full_disk_is_one_line_before_and_during_a_download(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("user/model", {"large.bin": noise(300_000)})
    with monkeypatch.context() as patched:
        usage = shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)
        patched.setattr(shutil, "disk_usage", lambda _: usage)
        message = refusal(lambda: fetch_all("user/model", tmp_path / "out"))
    assert "has 1.0 kB free and 306.0 kB are needed; make room" in message
    assert not (tmp_path / "out").exists()

    # A disk that fills up on the way; what it took is not lost
    real_append = transfer._Part.append

    def append(part: transfer._Part, content: bytes) -> None:
        if part.size > 100_000:
            raise OSError(28, os.strerror(28))
        real_append(part, content)

    with monkeypatch.context() as patched:
        patched.setattr(transfer._Part, "append", append)
        message = refusal(lambda: fetch_all("user/model", tmp_path / "out"))
    assert "the disk takes no more of 'user/model/large.bin'" in message
    assert not (tmp_path / "out" / "large.bin").exists()
    assert fetch_all("user/model", tmp_path / "out") == 1
    assert hub.num_bytes < 2 * 300_000 and hub.ranges


def test_a_gate_is_named_before_anything_is_written(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json": b"{}", "model.safetensors": noise(9000), "tokenizer.json": b"{}"}
    files["model.safetensors.index.json"] = b"{}"
    hub.add("meta-llama/Llama-2-7b-chat-hf", files, gated=True)
    message = refusal(lambda: call(download, "llama-2-7b-chat", str(tmp_path / "out")))
    assert "is gated: accept its license at" in message and "HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = refusal(lambda: call(download, "llama-2-7b-chat", str(tmp_path / "out")))
    assert "is gated, and your account has no access" in message
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_TOKEN", hub.token)
    call(download, "llama-2-7b-chat", str(tmp_path / "out"))
    assert left_in(tmp_path / "out") == sorted([transfer.RECORD, *files])


def test_names_and_revisions_that_are_not_there_are_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.add("user/model", {"a": b"a"})
    hub.add("user/odd", {"../outside": b"a"})
    hub.add("user/hidden", {"a": b"a"}, private=True)
    assert "the hub shows no 'user/other'" in refusal(lambda: list_files("user/other"))
    assert "the hub shows no 'user/hidden'" in refusal(lambda: list_files("user/hidden"))
    message = refusal(lambda: list_files("user/model", revision="old"))
    assert "'user/model' has no such revision" in message
    message = refusal(lambda: fetch_all("user/odd", tmp_path / "out"))
    assert "would not lie inside its folder" in message
    message = refusal(lambda: call(download, "eva-clip"))
    assert "unknown download 'eva-clip'. Did you mean 'eva-clip-g'?" in message
    assert "no run of annexe (it has no config.yaml)" in refusal(
        lambda: call(download, "user/model", str(tmp_path / "out"))
    )


# Archives


def zip_of(files: dict[str, bytes], **how: Any) -> bytes:
    """A zip; ``how`` are arguments of `ZipFile`."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **how) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, archive.compression)
    return stream.getvalue()


def link_in_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        info = zipfile.ZipInfo("RGB/link.jpg")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    return stream.getvalue()


def marked(content: bytes, offset: int, value: int) -> bytes:
    """A zip with two bytes of its first directory entry set."""
    start = content.index(b"PK\x01\x02") + offset
    return content[:start] + value.to_bytes(2, "little") + content[start + 2 :]


def tar_of(name: str, kind: bytes = tarfile.REGTYPE, mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        info = tarfile.TarInfo(name)
        info.type = kind
        info.linkname = "/etc/passwd"
        info.size = 3 if kind == tarfile.REGTYPE else 0
        archive.addfile(info, io.BytesIO(b"abc"))
    return stream.getvalue()


ONE = {"RGB/a.jpg": b"abc"}
BAD_ARCHIVES = {
    "outside.zip": (zip_of({"RGB/a.jpg": b"a", "../RGB/b.jpg": b"b"}), "not lie inside its folder"),
    "absolute.zip": (zip_of({"/RGB/b.jpg": b"b"}), "not lie inside its folder"),
    "drive.zip": (zip_of({"C:/RGB/b.jpg": b"b"}), "not lie inside its folder"),
    "backslash.zip": (zip_of({"RGB\\b.jpg": b"b"}), "not lie inside its folder"),
    "nul.zip": (
        zip_of({"RGB/bXjpg.jpg": b"b"}).replace(b"RGB/bX", b"RGB/b\0"),
        "not lie inside its folder",
    ),
    "link.zip": (link_in_zip(), "holds a link or device, 'RGB/link.jpg'"),
    "encrypted.zip": (marked(zip_of(ONE), 8, 1), "is encrypted"),
    "spanned.zip": (marked(zip_of(ONE), 34, 1), "zip -s 0 spanned.zip"),
    "case.zip": (zip_of({"RGB/a.jpg": b"a", "RGB/A.jpg": b"b"}), "stands twice"),
    "both.zip": (zip_of({"RGB/a.jpg": b"a", "RGB/a.jpg/b.jpg": b"b"}), "a file and a folder"),
    "bomb.zip": (
        zip_of({"RGB/a.jpg": bytes(2_000_000)}, compression=zipfile.ZIP_DEFLATED),
        "no data set does",
    ),
    "page.zip": (b"<html>log in</html>", "damaged or no archive"),
    "cut.zip": (zip_of(ONE)[:-10], "damaged or no archive"),
    "crc.zip": (zip_of({"RGB/a.jpg": b"abcdefgh"}).replace(b"abcdefgh", b"abcdefgX"), "damaged"),
    "outside.tar": (tar_of("../RGB/a.jpg"), "not lie inside its folder"),
    "link.tar": (tar_of("RGB/a.jpg", tarfile.SYMTYPE), "holds a link or device"),
    "hard_link.tar": (tar_of("RGB/a.jpg", tarfile.LNKTYPE), "holds a link or device"),
    "device.tar": (tar_of("RGB/a.jpg", tarfile.CHRTYPE), "holds a link or device"),
    "cut.tar.gz": (tar_of("RGB/a.jpg", mode="w:gz")[:-20], "damaged or no archive"),
}


@pytest.mark.parametrize("name", BAD_ARCHIVES)
def test_archives_that_are_dangerous_or_damaged_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_FREE_GROWTH", 100_000)
    content, expected = BAD_ARCHIVES[name]
    (tmp_path / name).write_bytes(content)
    target = tmp_path / "data"
    message = refusal(lambda: Unpacker(target).unpack(name, [tmp_path / name]))
    assert expected in message and name in message
    assert left_in(target) == []
    assert left_in(tmp_path) == [name]


def test_sizes_that_lie_are_refused(tmp_path: Path) -> None:
    content = zip_of({"RGB/a.jpg": b"abcdefgh"})
    (tmp_path / "a.zip").write_bytes(marked(content, 24, 3))  # says 3 bytes, holds 8
    message = refusal(lambda: Unpacker(tmp_path / "data").unpack("a.zip", [tmp_path / "a.zip"]))
    assert "'a.zip' is damaged" in message
    assert left_in(tmp_path / "data") == []


def test_parts_are_joined_and_folders_around_the_layout_dropped(tmp_path: Path) -> None:
    photo = noise(5000)
    whole = zip_of({"Ego/RGB/a.jpg": photo, "Ego/read.me": b"", "__MACOSX/RGB/._a.jpg": b""})
    names = []
    for index in range(4):
        names.append(f"all.zip.{index + 1:03}")
        (tmp_path / names[-1]).write_bytes(whole[index * 1500 : (index + 1) * 1500])
    (archive,), others = find_archives([*names, "README.md"])
    assert archive.parts == tuple(names) and others == ["README.md"]
    unpacker = Unpacker(tmp_path / "data")
    assert unpacker.unpack("all.zip", [tmp_path / name for name in names]) == 1
    assert (tmp_path / "data" / "RGB" / "a.jpg").read_bytes() == photo
    assert unpacker.left_out == 2

    # What is there already is not written again
    before = (tmp_path / "data" / "RGB" / "a.jpg").stat().st_mtime_ns
    Unpacker(tmp_path / "data").unpack("all.zip", [tmp_path / name for name in names])
    assert (tmp_path / "data" / "RGB" / "a.jpg").stat().st_mtime_ns == before

    assert "some are missing" in refusal(lambda: find_archives(["a.zip.001", "a.zip.003"]))
    assert "zip -s 0 a.zip" in refusal(lambda: find_archives(["a.z01", "a.zip"]))
    assert layout_name("mask.zip", "a.png") == "mask/a.png"
    assert layout_name("x.zip", "a.png") is None


# Data


@pytest.fixture
def small_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with three train, one val and two test scenes in small pictures."""
    root = tmp_path_factory.mktemp("small")
    shares = {"val_fraction": 0.2, "test_fraction": 0.3}
    generate(root, num_images=6, seed=3, height=180, num_workers=1, **shares)
    return root


def packed_scenes(scenes: Path, *, num_parts: int) -> dict[str, bytes]:
    """A data root as a repository: a zip in parts, a tar, and a plain folder."""
    files: dict[str, bytes] = {"README.md": b"# data"}
    photos = {f"RGB/{path.name}": path.read_bytes() for path in (scenes / "RGB").iterdir()}
    whole = zip_of(photos)
    step = -(-len(whole) // num_parts)
    for index in range(num_parts):
        name = f"RGB.zip.{index + 1:03}" if num_parts > 1 else "RGB.zip"
        files[name] = whole[index * step : (index + 1) * step]
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as archive:
        archive.add(scenes, ".", recursive=False)
        for name in ("depth", "mask"):
            archive.add(scenes / name, f"./Ego-IRGBench/{name}")
    files["maps.tar.gz"] = stream.getvalue()
    for path in (scenes / "dataset_split").rglob("*.json"):
        files[str(path.relative_to(scenes))] = path.read_bytes()
    return files


def test_the_data_set_is_unpacked_checked_and_resumed(
    hub: Hub,
    tmp_path: Path,
    small_scenes: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = packed_scenes(small_scenes, num_parts=3)
    monkeypatch.setattr(download, "num_cores", lambda: 1)
    item = find_item("Ego-IRGBench")
    hub.add(item.repository, files, "dataset", license="cc-by-nc-4.0")
    root = tmp_path / "ego"

    # Stopped in the first archive, in the second, and in the plain files
    with monkeypatch.context() as patched:
        patched.setattr(transfer, "_TRIES", 1)
        for name in ("RGB.zip.002", "maps.tar.gz", "dataset_split/test"):
            hub.faults.break_in = name
            hub.faults.break_after = 100
            hub.faults.num_breaks = 1
            refusal(lambda: call(download, "ego-irgbench", str(root)))
            assert not root.exists()
    assert hub.num_bytes < sum(map(len, files.values()))
    call(download, "ego-irgbench", str(root))
    printed = capsys.readouterr().out
    assert "license: cc-by-nc-4.0" in printed
    assert "sound: 6 images, 0 errors" in printed
    assert f"ego_irgbench:\n    data_root: {root}" in printed
    assert sorted(os.listdir(tmp_path)) == ["ego"]
    for name in ("RGB", "depth", "mask", "dataset_split"):
        assert left_in(root / name) == left_in(small_scenes / name)
        for file in left_in(small_scenes / name):
            assert (root / name / file).read_bytes() == (small_scenes / name / file).read_bytes()

    # Again: nothing is fetched, without a network too
    sent = hub.num_bytes
    call(download, "ego-irgbench", str(root))
    assert hub.num_bytes == sent
    assert "is complete" in capsys.readouterr().out
    monkeypatch.setenv("HF_ENDPOINT", NO_SERVER)
    call(download, "ego-irgbench", str(root))
    next((root / "RGB").iterdir()).unlink()
    message = refusal(lambda: call(download, "ego-irgbench", str(root)))
    assert "1 files are missing or of another size" in message


def test_repositories_that_are_no_data_are_refused(hub: Hub, tmp_path: Path) -> None:
    item = find_item("ego-irgbench")
    repo = hub.add(item.repository, {"README.md": b"moved"}, "dataset")
    fetch = lambda: call(download, "ego-irgbench", str(tmp_path / "ego"))  # noqa: E731
    assert "holds no archives and none of the folders" in refusal(fetch)
    repo.files = {"RGB.zip": zip_of(ONE)}
    assert "has no folder depth, mask, dataset_split" in refusal(fetch)

    # What an earlier commit left beside it does not get in
    staged = tmp_path / "ego.download" / "data" / "RGB"
    assert left_in(staged) == ["a.jpg"]
    repo.files = {"RGB.zip": zip_of({"RGB/b.jpg": b"abc"})}
    refusal(fetch)
    assert left_in(staged) == ["b.jpg"]

    (tmp_path / "ego").mkdir()
    (tmp_path / "ego" / "notes.txt").write_text("mine")
    assert "holds something else than a data set" in refusal(fetch)
    assert left_in(tmp_path / "ego") == ["notes.txt"]


# The catalog


def test_weights_by_name_give_lines_for_the_configuration(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(get_console(), "_width", 200)  # or names are wrapped
    for item in ITEMS:
        names = [pattern.replace("*", "x") for pattern in item.files] or ["RGB/a.jpg"]
        hub.add(item.repository, {name: noise(3000) for name in names}, item.kind)
    call(download, "--list")
    listed = capsys.readouterr().out
    assert all(item.name in listed for item in ITEMS)
    assert "CC BY-NC 4.0" in listed and "3.0 kB" in listed

    for item in ITEMS:
        if item.is_data:
            continue
        call(download, item.name)
        printed = capsys.readouterr().out
        assert "every checksum is right" in printed
        lines = printed.partition("for the configuration:\n")[2]
        path = Path(OmegaConf.select(OmegaConf.create(lines), item.setting))
        assert path.exists() and path.is_relative_to(Path("weights", item.name))
    call(download, "eva-clip-g")
    assert "all files were here" in capsys.readouterr().out


def test_places_of_public_weights_tell_nothing_of_a_machine() -> None:
    home = "/home/someone/secret"
    expected = {
        f"{home}/depth_anything_v2_vitb.pth": (
            "weights/depth-anything-v2-base/depth_anything_v2_vitb.pth"
        ),
        f"{home}/eva-clip-g/model.safetensors": "weights/eva-clip-g/model.safetensors",
        f"{home}/Llama-2-7b-chat-hf": "weights/llama-2-7b-chat",
        f"{home}/Llama-2-7b-chat-hf/": "weights/llama-2-7b-chat",
        f"{home}/eva_vit_g.pth": "path/to/eva_vit_g.pth",
    }
    assert {path: public_path(path) for path in expected} == expected


# Runs


def lines_of(predictor: Predictor, photo: Path, file: Path) -> bytes:
    """The lines of predictions.jsonl that a predictor writes of a photo."""
    (result,) = predictor.predict(photo, ["Where is the left hand?", "Show the mug."])
    write_records(file, result.to_records())
    return file.read_bytes()


def first_photo(scenes: Path) -> Path:
    return min((scenes / "RGB").iterdir())


def test_a_pushed_run_gives_the_same_predictions_byte_for_byte(
    hub: Hub,
    trained: Path,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no token" in refusal(lambda: call(push, str(trained), "user/tiny"))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not know the token" in refusal(lambda: call(push, str(trained), "user/tiny"))
    monkeypatch.setenv("HF_TOKEN", hub.token)
    call(push, str(trained), "user/tiny", "--private", "--license", "mit")
    printed = capsys.readouterr()
    assert "pushed: http://127.0.0.1" in printed.out
    assert printed.err == ""
    files = hub.repos["model", "user/tiny"].files
    assert hub.repos["model", "user/tiny"].private
    assert "optimizer.pt" not in files and "rng-0.pt" not in files

    # Nothing that goes out names a place or an account of here
    secrets = [str(trained), str(scenes), str(Path.home()), str(tmp_path)]
    for name, content in files.items():
        for secret in secrets:
            assert secret.encode() not in content, (name, secret)
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: annexe\n") and "license: mit" in card
    assert "comes without an evaluation" in card

    # The same answers, from the cache without a network too
    photo = first_photo(scenes)
    expected = lines_of(Predictor.from_run(trained, device="cpu"), photo, tmp_path / "here")
    predictor = Predictor.from_run("user/tiny", device="cpu")
    assert lines_of(predictor, photo, tmp_path / "there") == expected
    sent = hub.num_bytes
    monkeypatch.setenv("HF_ENDPOINT", NO_SERVER)
    assert runs.require_run("user/tiny") == Path(predictor.about["checkpoint"])
    with monkeypatch.context() as patched:
        patched.setenv("HF_ENDPOINT", hub.address)
        patched.setattr(constants, "HF_HUB_OFFLINE", True)
        assert runs.require_run("user/tiny") == Path(predictor.about["checkpoint"])
    assert hub.num_bytes == sent

    # What is neither a folder nor a repository, or a folder of that name
    message = refusal(lambda: Predictor.from_run("user/other"))
    assert message.startswith("there is no folder 'user/other' here, and on the hub: cannot reach")
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    message = refusal(lambda: Predictor.from_run("user/other"))
    assert "and on the hub: the hub shows no 'user/other'" in message
    shutil.copytree(trained, tmp_path / "user" / "tiny")
    num_requests = len(hub.requests)
    assert runs.require_run("user/tiny").parent.parent == Path("user/tiny")
    assert len(hub.requests) == num_requests


def test_a_download_of_a_run_is_a_run(
    hub: Hub, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.chdir(tmp_path)
    call(push, str(trained), "user/tiny", "--checkpoint", "latest")
    commit = hub.repos["model", "user/tiny"].commit
    call(download, f"user/tiny@{commit}")
    assert require_checkpoint("runs/tiny", "best") == Path("runs/tiny")
    call(push, "runs/tiny", "user/again", "--out", "again")  # what was pushed can be pushed
    pushed = hub.repos["model", "user/tiny"].files
    config = ROOT / "eval_configs" / "annexe_tiny.yaml"
    options = ["run.checkpoint=user/tiny", "model.presence_threshold=0.4"]
    evaluated = load_config(config, options, onto_checkpoint=True)
    assert evaluated.require_model()["rgb_encoder"]["embed_dim"] == 32  # of the run
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == pushed["model.safetensors"]
    assert "exists already" in refusal(lambda: call(push, "runs/tiny", "u/a", "--out", "again"))
    assert "is no name of a repository" in refusal(lambda: call(push, "runs/tiny", "tiny"))


@pytest.mark.slow
def test_a_training_starts_from_a_run_of_the_hub(
    hub: Hub, trained: Path, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    call(push, str(trained), "user/tiny")
    short = ("model.init=null", "run.max_steps=1", "run.warmup_steps=0")
    config = make_config("model.init_from=user/tiny", *short)
    train(config)
    saved = OmegaConf.load(Path(config.run.output_dir) / "config.yaml")
    start = Path(saved.model.init_from)
    assert start.name.startswith("user--tiny@")
    assert runs.name_on_hub(start) == f"user/tiny@{hub.repos['model', 'user/tiny'].commit}"

    # Its card names where it started, not the cache
    folder = Path(config.run.output_dir).parent / "published"
    published = publish(require_checkpoint(config.run.output_dir, "best"), folder, "second")
    assert published.started_from == runs.name_on_hub(start)
    assert str(start.parent) not in (folder / "config.yaml").read_text()


@pytest.mark.slow
def test_frozen_weights_of_a_start_are_published_beside_the_run(
    hub: Hub, trained: Path, scenes: Path, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    options = ("model.init=null", "run.max_steps=1", "run.warmup_steps=0")
    frozen = "model.rgb_encoder.frozen=true"
    config = make_config(f"model.init_from={trained}", frozen, *options)
    train(config)
    photo = first_photo(scenes)
    expected = lines_of(
        Predictor.from_run(config.run.output_dir, device="cpu"), photo, tmp_path / "here"
    )

    folder = tmp_path / "published"
    published = publish(require_checkpoint(config.run.output_dir, "best"), folder, "second")
    assert published.has_start
    hub.add("user/second", {str(name): (folder / name).read_bytes() for name in left_in(folder)})
    moved = trained.with_name("moved")
    trained.rename(moved)
    try:
        predictor = Predictor.from_run("user/second", device="cpu")
        assert lines_of(predictor, photo, tmp_path / "there") == expected
    finally:
        moved.rename(trained)


def test_a_card_tells_scores_needs_and_what_was_replaced(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    checkpoint = require_checkpoint(run, "best")
    metrics = {
        "standard": {"grounding/ciou": 0.5, "num_images": 5},
        "intervals": {"grounding/ciou": [0.4, 0.6]},
        "meta": {"dataset": "ego_irgbench", "split": "test", "step": 1, "checkpoint": "/secret/x"},
    }
    (run / "eval").mkdir()
    (run / "eval" / "metrics.json").write_text(json.dumps(metrics))
    saved = OmegaConf.load(checkpoint / "config.yaml")
    saved.run.wandb.name = "secret"
    saved.model.language_model.path = "/secret/Llama-2-7b-chat-hf"
    OmegaConf.save(saved, checkpoint / "config.yaml")
    (checkpoint / "files.json").unlink()
    seal(checkpoint)

    call(push, str(run), "user/tiny", "--out", str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| cIoU | 0.500 | 0.400 to 0.600 |" in card
    assert "`model.language_model.path`: `weights/llama-2-7b-chat` (`annexe download" in card
    assert "`run.wandb`" in card and "`datasets.ego_irgbench.data_root`" in card
    for name in left_in(tmp_path / "out"):
        assert b"secret" not in (tmp_path / "out" / name).read_bytes(), name

    # Scores of another step are not this checkpoint's
    metrics["meta"]["step"] = 2
    (run / "eval" / "metrics.json").write_text(json.dumps(metrics))
    call(push, str(run), "user/tiny", "--out", str(tmp_path / "other"))
    assert "without an evaluation" in (tmp_path / "other" / "README.md").read_text()


@pytest.mark.parametrize("command", ["push", "weights"])
def test_errors_name_files_of_the_run_and_not_their_copies(
    trained: Path,
    tmp_path: Path,
    command: str,
    command_line: Callable[..., tuple[int, str, str]],
) -> None:
    run = tmp_path / "run"
    out = tmp_path / "out"
    shutil.copytree(trained, run)
    words = {"push": [run, "user/tiny", "--out", out], "weights": ["export", run, out]}
    with full_disk(1000):
        code, _, error = command_line(command, *words[command])
    assert code == 2 and error.startswith(f"error: cannot use '{out}' (File too large)")

    damaged = require_checkpoint(run, "best") / "tokenizer" / "tokenizer.json"
    damaged.write_text("{" + " " * (damaged.stat().st_size - 1))
    code, _, error = command_line(command, *words[command])
    assert code == 2 and error.startswith("error: ") and str(damaged.parent) in error
    assert not list(tmp_path.glob("out*"))


def test_paths_are_private_and_names_of_models_are_not() -> None:
    private = {
        "datasets.mine.data_root": "data",
        "datasets.mine.exclude": "report.json",
        "datasets.mine.other": "some/folder",
        "model.rgb_encoder.other": "/home/someone/file",
    }
    public = {
        "model.rgb_encoder.model": "hf-hub:timm/vit_tiny_patch16_224",
        "model.rgb_encoder.weights": "path/to/eva_vit_g.pth",
        "datasets.mine.answer_format": "phrases",
    }
    assert all(_is_private(place, value) for place, value in private.items())
    assert not any(_is_private(place, value) for place, value in public.items())


def test_what_is_a_name_on_the_hub() -> None:
    names = {
        "user/repo": True,
        "user/repo@v1": True,
        "runs/demo/checkpoints": False,
        "./run": False,
        "/run/x": False,
        "weights/minigptv2_checkpoint.pth": False,
        "run": False,
    }
    assert {name: runs.is_hub_name(name) for name in names} == names
