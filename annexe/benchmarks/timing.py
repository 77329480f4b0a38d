"""Time by section, on a CPU or a GPU, and the peak of memory."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from annexe.benchmarks.units import GB, TERA, Record

Mark = Any  # a CUDA event, or seconds

_CEILING_REPEATS = 10
_CEILING_WARMUP = 3


class Timeline:
    """Puts all time from a first moment to a last down to named sections.

    Each section lasts until the next begins. On a GPU the moments are events in its stream:
    sections are what the GPU spent, or waited, between them.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.marks: list[tuple[str, Mark]] = []

    def enter(self, section: str) -> None:
        """From here on time belongs to ``section``."""
        self.marks.append((section, self._now()))

    def sections(self) -> dict[str, float]:
        """Seconds of every section, in the order of their first moments.

        The last moment only ends the section before it.
        """
        seconds: dict[str, float] = {}
        for (section, start), (_, stop) in pairwise(self.marks):
            seconds[section] = seconds.get(section, 0) + self._between(start, stop)
        return seconds

    def laps(self, section: str) -> list[float]:
        """Seconds from each start of ``section`` to the next, and from the last one to the end."""
        starts = [mark for name, mark in self.marks[:-1] if name == section]
        end = self.marks[-1][1]
        return [self._between(start, stop) for start, stop in pairwise([*starts, end])]

    @contextmanager
    def timing_method(
        self,
        owner: Any,
        name: str,
        *,
        during: str,
        after: str,
        on_result: Callable[[Any], None] | None = None,
    ) -> Iterator[None]:
        """While the block runs, let a method of ``owner`` enter a section, and another at its end.

        The method is replaced in this object alone, and restored at the end of the block.

        Args:
            during, after: the sections.
            on_result: called with what each call of the method returns.
        """
        method = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            self.enter(during)
            result = method(*arguments, **options)
            self.enter(after)
            if on_result is not None:
                on_result(result)
            return result

        # An attribute of the object hides the method of its class
        setattr(owner, name, timed)
        try:
            yield
        finally:
            delattr(owner, name)

    def _now(self) -> Mark:
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Mark, stop: Mark) -> float:
        if not self.is_cuda:
            return stop - start
        stop.synchronize()
        return start.elapsed_time(stop) / 1000


def percentiles(seconds: list[float]) -> Record:
    """p50, p90, p99, smallest and largest of some times, in ms."""
    ms = np.array(seconds) * 1000
    quantiles = {f"p{q}": float(np.percentile(ms, q)) for q in (50, 90, 99)}
    return quantiles | {"min": float(ms.min()), "max": float(ms.max())}


def time_by_section(timeline: Timeline, num_rounds: int) -> Record:
    """Time by section, as ms a round and as a share of all."""
    seconds = timeline.sections()
    seconds["all"] = sum(seconds.values())
    record = {}
    for section, duration in seconds.items():
        ms = 1000 * duration / num_rounds
        record[section] = {"ms": ms, "share": duration / seconds["all"]}
    return record


def reset_peak(device: torch.device) -> None:
    """Begin a new peak of memory.

    Where a system does not let the CPU's be reset, it is that of the process since its start.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> Record:
    """Most memory in GB since `reset_peak`.

    On a GPU it is that of tensors and that of the allocator, on a CPU that of the process.
    """
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.max_memory_allocated() / GB,
            "reserved": torch.cuda.max_memory_reserved() / GB,
        }
    unit = 1 if sys.platform == "darwin" else 1024
    return {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB}


def memory_of(process: psutil.Process) -> float:
    """GB of a process.

    What it shares with others counts in part (PSS), or not at all where that is unknown.
    """
    info = process.memory_full_info()
    return getattr(info, "pss", info.uss) / GB


class SampledMemory:
    """The most memory of this process and all its children together, sampled while a block runs.

    Args:
        interval: seconds from one sample to the next.

    Attributes:
        peak: GB.
    """

    def __init__(self, interval: float = 0.2) -> None:
        self.interval = interval
        self.peak = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> SampledMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        this_process = psutil.Process()
        while True:
            total = 0.0
            for process in [this_process, *this_process.children(recursive=True)]:
                with suppress(psutil.Error):  # it may have ended
                    total += memory_of(process)
            self.peak = max(self.peak, total)
            if self._done.wait(self.interval):
                break


def ceiling(device: torch.device) -> float:
    """TFLOP/s of a matrix product.

    On a GPU it is one of bfloat16 matrices of 8192 x 8192, on a CPU of float32 and 1024 x 1024.
    """
    on_gpu = device.type == "cuda"
    side = 8192 if on_gpu else 1024
    dtype = torch.bfloat16 if on_gpu else torch.float32
    # Repeat the product; the first ones warm the device up
    a = torch.randn(side, side, device=device, dtype=dtype)
    b = torch.randn(side, side, device=device, dtype=dtype)
    timeline = Timeline(device)
    for repeat in range(_CEILING_WARMUP + _CEILING_REPEATS):
        timeline.enter("warm-up" if repeat < _CEILING_WARMUP else "product")
        a @ b
    timeline.enter("end")
    return 2 * side**3 / float(np.median(timeline.laps("product"))) / TERA
