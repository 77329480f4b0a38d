"""Where time goes, on a CPU or a GPU, and the most memory that it takes on the way.

Records are plain nested dicts of numbers, to be written as JSON; units stand in the names, GB are 1e9 bytes.
"""

from __future__ import annotations

import resource
import sys
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from annexe.benchmarks.memory import GB

Record = dict[str, Any]
Mark = Any  # a CUDA event, or seconds

_CEILING_REPEATS = 10


class Timeline:
    """Puts all time from a first moment to a last down to named sections, each of which lasts until the next.

    On a GPU the moments are events in its stream: sections are what the GPU spent, or waited, between them.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.marks: list[tuple[str, Mark]] = []

    def enter(self, section: str) -> None:
        """From here on time belongs to ``section``."""
        self.marks.append((section, self._now()))

    def sections(self) -> dict[str, float]:
        """Seconds of every section, in the order of their first moments; the last moment only ends the one before."""
        seconds: dict[str, float] = {}
        for (section, start), (_, stop) in pairwise(self.marks):
            seconds[section] = seconds.get(section, 0) + self._between(start, stop)
        return seconds

    def laps(self, section: str) -> list[float]:
        """Seconds from each moment at which ``section`` began to the next, and from the last one to the end."""
        starts = [mark for name, mark in self.marks[:-1] if name == section]
        return [
            self._between(start, stop) for start, stop in pairwise([*starts, self.marks[-1][1]])
        ]

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


def in_sections(timeline: Timeline, number: int) -> Record:
    """Time by section, as ms for each of ``number`` rounds and as shares of all."""
    seconds = timeline.sections()
    seconds["all"] = sum(seconds.values())
    return {
        name: {"ms": 1000 * own / number, "share": own / seconds["all"]}
        for name, own in seconds.items()
    }


def reset_peak(device: torch.device) -> None:
    """Begin a new peak of memory; where a system does not let the CPU's be reset, it is that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> Record:
    """Most memory in GB since `reset_peak`: tensors and what the allocator held on a GPU, else the process's."""
    if device.type == "cuda":
        held = {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
        }
        return {name: size / GB for name, size in held.items()}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB}


def memory_of(process: psutil.Process) -> float:
    """GB of a process; what it shares with others counts in part (PSS), or not at all where that is unknown."""
    info = process.memory_full_info()
    return getattr(info, "pss", info.uss) / GB


class SampledMemory:
    """The most memory of this process and all its children together, looked at while the block runs.

    Attributes:
        peak: GB.
    """

    def __init__(self, every: float = 0.2) -> None:
        self.every, self.peak = every, 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> SampledMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while True:
            total = 0.0
            for process in [own, *own.children(recursive=True)]:
                with suppress(psutil.Error):  # it may have ended
                    total += memory_of(process)
            self.peak = max(self.peak, total)
            if self._done.wait(self.every):
                break


def ceiling(device: torch.device) -> float:
    """TFLOP/s of a matrix product: bfloat16 of 8192 x 8192 matrices on a GPU, float32 of 1024 x 1024 on a CPU."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    timeline = Timeline(device)
    for number in range(3 + _CEILING_REPEATS):
        timeline.enter("product" if number >= 3 else "warm-up")
        a @ b
    timeline.enter("end")
    return 2 * side**3 / float(np.median(timeline.laps("product"))) / 1e12
