"""What the machine does not give ends in one line in time, and costs no result."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from annexe.distributed import make_accelerator
from annexe.errors import UserError
from annexe.files import append_text, write_text
from tests.conftest import ROOT

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
WHOLE = dict(zip(TORCHRUN, ("1", "2", "1", "2", "localhost", "29400"), strict=True))


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond ``num_bytes``, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# The environment of torchrun


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "RANK=0, WORLD_SIZE=2 without LOCAL_RANK; start with"),
        ({"RANK": "1"}, "RANK=1 without WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 without RANK"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', which is no number"),
        (WHOLE | {"MASTER_ADDR": ""}, "without MASTER_ADDR"),
        (WHOLE | {"RANK": "2"}, "RANK is 2 of 2 processes"),
        (WHOLE | {"LOCAL_RANK": "2"}, "LOCAL_RANK is 2 of 2 processes"),
    ],
)
def test_a_part_of_torchruns_environment_is_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as caught:
        make_accelerator(device="cpu", mixed_precision="auto", timeout_minutes=1)
    assert "\n" not in str(caught.value)


def test_one_process_of_a_cluster_needs_no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": ""}.items():
        monkeypatch.setenv(name, value)
    made = make_accelerator(device="cpu", mixed_precision="auto", timeout_minutes=1)
    assert made.num_processes == 1


@pytest.mark.slow
def test_processes_that_do_not_come_are_one_line() -> None:
    code = (
        "from annexe.cli import exit_on_user_error; "
        "from annexe.distributed import make_accelerator; "
        "exit_on_user_error(lambda: make_accelerator(device='cpu', mixed_precision='auto', "
        "timeout_minutes=0.02))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "2"}
    environment |= {"LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "process 0 of 2 cannot meet the others" in done.stderr
    assert "Traceback" not in done.stderr


# The command


@pytest.mark.slow
@pytest.mark.parametrize("module", ["annexe", "annexe.cli"])
def test_the_command_is_also_a_module(module: str) -> None:
    command = [sys.executable, "-m", module, "score", "nothing.jsonl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--data-root" in done.stderr


# A full disk


def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with full_disk(1000), pytest.raises(OSError, match="too large") as caught:
        write_text(path, "new" * 1000)
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_text(path, "first\n")
    with full_disk(1000), pytest.raises(OSError, match="too large") as caught:
        append_text(path, "ä" * 1000)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(path)
    append_text(path, "second\n")
    assert path.read_text() == "first\nsecond\n"
