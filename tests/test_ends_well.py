"""What the machine does not give ends in one line in time, and costs no result."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from annexe import workers
from annexe.cli import exit_on_user_error, main
from annexe.datasets import loader
from annexe.datasets.loader import make_loader, num_bytes
from annexe.datasets.pixels import PixelReader
from annexe.distributed import make_accelerator
from annexe.errors import UserError
from annexe.files import append_text, replaced, write_text
from annexe.trainer import train
from annexe.workers import in_processes
from tests.conftest import ROOT, SMALLEST, TINY
from tests.forked import Command
from tests.test_training import lines_of_log

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
def test_processes_that_do_not_come_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "meet.py"
    script.write_text(
        "from annexe.cli import exit_on_user_error\n"
        "from annexe.distributed import make_accelerator\n"
        "settings = dict(device='cpu', mixed_precision='auto', timeout_minutes=0.02)\n"
        "exit_on_user_error(lambda: make_accelerator(**settings))\n"
    )
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    for name, value in {**variables, "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    process = Command(script, folder=tmp_path)
    assert process.wait() == 2
    assert "process 0 of 2 cannot meet the others" in process.errors()
    assert "Traceback" not in process.errors()


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


def test_errors_of_libraries_in_rust_are_named_too(tmp_path: Path) -> None:
    def write() -> None:
        with full_disk(1000), replaced(tmp_path / "file") as part:
            save_file({"weight": torch.zeros(1000)}, part)

    with pytest.raises(OSError, match="too large") as caught:
        write()
    assert caught.value.filename == str(tmp_path / "file")
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_a_training_in_one_line(
    make_config: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = make_config("run.max_steps=3", "run.checkpoint_every=1")
    train(config)
    log = (tmp_path / "run" / "log.jsonl").read_text()
    more = make_config("run.max_steps=6", "run.resume=auto", "run.checkpoint_every=100")
    with full_disk(len(log) + 100), pytest.raises(SystemExit, match="2"):
        exit_on_user_error(lambda: train(more))
    error = capsys.readouterr().err
    assert f"cannot use '{tmp_path / 'run'}" in error
    assert "File too large" in error
    assert (tmp_path / "run" / "log.jsonl").read_text() == log

    # A checkpoint that does not fit says what is left
    more.run.checkpoint_every = 1
    smallest = min((tmp_path / "run" / "checkpoints").rglob("model.safetensors")).stat().st_size
    with full_disk(smallest - 1), pytest.raises(UserError, match="before it are intact") as caught:
        train(more)
    assert "File too large" in str(caught.value)
    assert not list(tmp_path.rglob("*.part"))

    # With room it goes on
    train(more)
    assert [line["step"] for line in lines_of_log(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_an_error_of_the_disk_without_a_name_is_one_line(capsys: pytest.CaptureFixture) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit, match="2"):
        exit_on_user_error(fail)
    assert "the disk takes no more (No space left on device)" in capsys.readouterr().err


# Workers and what they share


class Numbers:
    """A data set of which each item is its index."""

    def __getitem__(self, index: int) -> int:
        return index


class Killed(Numbers):
    """Its third item ends the process that reads it, as a system without memory does."""

    def __getitem__(self, index: int) -> int:
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


class Gone(Numbers):
    """Its third item is a file that cannot be opened any more."""

    def __getitem__(self, index: int) -> int:
        if index == 3:
            raise PermissionError(errno.EACCES, "Permission denied", "photo.jpg")
        return index


def unsendable(items: list[int]) -> object:
    """A batch, of which the second cannot be sent from one process to another."""
    return (lambda: items) if 3 in items else items


def load(dataset: Numbers, collate: Callable, num_workers: int = 1) -> list:
    batches = [[0, 1], [2, 3], [4, 5]]
    device = torch.device("cpu")
    return list(make_loader(dataset, batches, collate, num_workers=num_workers, device=device))


@pytest.mark.slow
def test_a_batch_that_cannot_be_handed_over_is_one_line_in_time() -> None:
    assert load(Numbers(), list) == [[0, 1], [2, 3], [4, 5]]
    started = time.perf_counter()
    with pytest.raises(
        UserError, match=r"cannot hand over its batch .*run\.num_workers=0"
    ) as caught:
        load(Numbers(), unsendable)
    assert time.perf_counter() - started < 30
    for part in ("'/dev/shm' is full", "--shm-size", "--ipc=host", "ulimit -n"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_worker_that_dies_is_one_line_in_time(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        exit_on_user_error(lambda: load(Killed(), list))
    error = capsys.readouterr().err
    assert "a process that loads batches is gone" in error
    assert "--shm-size" in error and "run.num_workers" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_file_that_turns_bad_on_the_way_is_one_line(num_workers: int) -> None:
    with pytest.raises(UserError, match=r"^cannot use 'photo.jpg' \(Permission denied\)"):
        load(Gone(), list, num_workers)


def test_shared_memory_is_measured_before_work_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def collate(items: list[int]) -> dict[str, object]:
        return {"images": torch.zeros(len(items), 1000), "more": [torch.zeros(500)]}

    size = 4 * (2 * 1000 + 500)
    assert num_bytes(collate([0, 1])) == size

    # Two workers load two batches ahead each, and the main process holds one
    monkeypatch.setattr(loader, "free_shared_memory", lambda: 5 * size)
    batches = [[0, 1]]
    arguments = {"num_workers": 2, "device": torch.device("cpu")}
    make_loader(Numbers(), batches, collate, **arguments)
    for free, ranks in ((5 * size - 1, "1"), (5 * size, "2"), (0, "1")):
        monkeypatch.setattr(loader, "free_shared_memory", lambda free=free: free)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        with pytest.raises(UserError, match=r"run\.num_workers=2 needs .* --shm-size"):
            make_loader(Numbers(), batches, collate, **arguments)
    make_loader(Numbers(), batches, collate, num_workers=0, device=torch.device("cpu"))


def end(_: int) -> None:
    os._exit(9)


@pytest.mark.slow
def test_a_process_that_dies_is_one_line() -> None:
    with pytest.raises(UserError, match="one of 2 processes was ended from outside"):
        list(in_processes(end, range(4), 2))


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from annexe.workers import processes\n"
        # No Ctrl-C reaches a process, not even while it imports this file
        "if __name__ != '__main__':\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "if __name__ == '__main__':\n"
        "    with processes(2) as submit:\n"
        "        print(*[submit(os.getpid).result() for _ in range(2)], flush=True)\n"
        "        submit(time.sleep, 600)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL
    pids = set(map(int, killed.stdout.split()))
    deadline = time.monotonic() + 30
    while pids and time.monotonic() < deadline:
        pids = set(filter(is_running, pids))
        time.sleep(0.05)
    assert killed.stdout and not pids


def test_not_even_the_first_process_is_ended_by_an_interruption(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal\n"
        "from annexe.workers import Spawn\n"
        "if __name__ != '__main__':\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "if __name__ == '__main__':\n"
        "    process = Spawn().Process(target=print, args=('done',))\n"
        "    process.start()\n"
        "    process.join()\n"
    )
    ended = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == "done\n", ended.stderr


def test_without_room_for_locks_one_process_does_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "free_shared_memory", lambda: 0)
    assert list(in_processes(lambda job: job + os.getpid(), [1, 2], 2)) == [
        1 + os.getpid(),
        2 + os.getpid(),
    ]
    assert "is full: one process does the work of 2" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("measured", [True, False])
def test_a_training_with_little_shared_memory_names_the_fix(
    measured: bool, scenes: Path, tmp_path: Path
) -> None:
    """In a mount namespace of its own; with and without the check before the start."""
    in_namespace = ["unshare", "--mount", "bash", "-c"]
    mount = "mount -t tmpfs -o size=4m tmpfs /dev/shm"
    if subprocess.run([*in_namespace, mount], capture_output=True).returncode:
        pytest.skip("this user may not mount in a namespace")
    options = [
        *SMALLEST,
        f"datasets.ego_irgbench.data_root={scenes}",
        f"run.output_dir={tmp_path / 'run'}",
        "run.max_steps=6",
        "run.num_workers=3",
        "run.batch_size=8",
        "model.rgb_encoder.image_size=336",
    ]
    code = (
        "import sys; from annexe.cli import run_script; from annexe.datasets import loader; "
        "from annexe.trainer import train; "
        f"loader._PLENTY *= {int(measured)}; run_script(train, 'train')"
    )
    words = [sys.executable, "-c", code, "--cfg-path", str(TINY), "--options", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*in_namespace, f'{mount} && exec "$@"', "bash", *words],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,  # half a minute where nothing else runs
    )
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    expected = "run.num_workers=3 needs" if measured else "a worker cannot hand over its batch"
    assert expected in line
    for fix in ("--shm-size", "--ipc=host", "run.num_workers=0"):
        assert fix in line
    assert "Traceback" not in done.stderr


# Caches and lists


def test_a_cache_that_is_full_costs_time_alone(
    scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reader = PixelReader(scenes, 32, tmp_path)
    stems = sorted(path.stem for path in (scenes / "RGB").iterdir())[:2]
    with full_disk(1000):
        pixels = [reader.read(stem, []) for stem in stems]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "File too large): from here on files are resized anew" in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    expected = PixelReader(scenes, 32, None)
    for stem, found in zip(stems, pixels, strict=True):
        assert (found.image == expected.read(stem, []).image).all()


def test_lists_of_a_split_are_written_all_or_none(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "lists"
    words = ["annexe", "split", str(scenes), "--out", str(out), "--by", "instance", "--seed", "0"]
    monkeypatch.setattr(sys, "argv", [*words, "--val", "0.3", "--test", "0.3"])
    with full_disk(60), pytest.raises(SystemExit, match="2"):
        main()
    printed = capsys.readouterr()
    assert f"cannot use '{out}' (File too large)" in printed.err
    assert "train" in printed.out
    assert os.listdir(tmp_path) == []
