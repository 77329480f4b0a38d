"""The machine that is measured: what it is, a scratch folder on it, its memory given back."""

from __future__ import annotations

import gc
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from annexe import __version__
from annexe.benchmarks.units import Record
from annexe.checkpoints.manifest import git_commit
from annexe.inference.processes import Processes
from annexe.workers import num_cores


def describe_machine() -> Record:
    """What numbers were measured on and with."""
    has_cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if has_cuda else None,
        "cpu": cpu_name(),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "annexe": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def cpu_name() -> str:
    """Name of the CPU; Linux has it in a file that no library reads."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextmanager
def scratch_folder(*, with_index_cache: bool) -> Iterator[Path]:
    """A folder that is removed with its content at the end of the block.

    Args:
        with_index_cache: indexes of data sets that are made in the block are kept there too.
    """
    before = os.environ.get("ANNEXE_CACHE")
    with tempfile.TemporaryDirectory(prefix="annexe-bench-", ignore_cleanup_errors=True) as folder:
        if with_index_cache:
            os.environ["ANNEXE_CACHE"] = str(Path(folder) / "cache")
        try:
            yield Path(folder)
        finally:
            os.environ.pop("ANNEXE_CACHE", None)
            if before is not None:
                os.environ["ANNEXE_CACHE"] = before


@contextmanager
def shared_folder(processes: Processes, *, with_index_cache: bool) -> Iterator[Path]:
    """As `scratch_folder`, one for all processes of a job.

    Raises:
        UserError: on several nodes, if not all see the TMPDIR of the first one.
    """
    if processes.is_main:
        with scratch_folder(with_index_cache=with_index_cache) as folder:
            processes.from_main(lambda: folder)
            processes.require_shared(folder, "TMPDIR")
            yield folder
            processes.gather([])  # nobody needs it any more
        return
    folder = processes.from_main(lambda: Path())
    processes.require_shared(folder, "TMPDIR")
    if with_index_cache:
        os.environ["ANNEXE_CACHE"] = str(folder / "cache")
    yield folder
    processes.gather([])


def release_memory() -> None:
    """Free what a measurement left, so that the next one starts in the same state."""
    # Precision and device are chosen once a process otherwise
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
