"""Work that takes no GPU, spread over processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

import cv2

Job, Result = TypeVar("Job"), TypeVar("Result")


def num_cores() -> int:
    """Cores this process may use; not every system can tell it from the cores there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(work: Callable[[Job], Result], jobs: Iterable[Job], num_workers: int) -> Iterator[Result]:
    """``work`` on every job, results in order, by ``num_workers`` processes of one thread each; one works right here.

    Processes are started anew, for a fork would copy one that may hold threads and a GPU.
    """
    if num_workers <= 1:
        yield from map(work, jobs)
        return
    spawn = get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=cv2.setNumThreads, initargs=(0,)) as pool:
        yield from pool.map(work, jobs, chunksize=4)
