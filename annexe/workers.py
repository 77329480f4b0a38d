"""Work that takes no GPU, spread over processes or threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

import cv2

Job = TypeVar("Job")
Item = TypeVar("Item")
Result = TypeVar("Result")


def num_cores() -> int:
    """Cores this process may use; not every system can tell it from the cores there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    work: Callable[[Job], Result], jobs: Iterable[Job], num_workers: int
) -> Iterator[Result]:
    """``work`` on every job, results in order, by ``num_workers`` processes of one thread each; one works right here.

    Processes are started anew, for a fork would copy one that may hold threads and a GPU.
    """
    if num_workers <= 1:
        yield from map(work, jobs)
        return
    spawn = get_context("spawn")
    with ProcessPoolExecutor(
        num_workers, mp_context=spawn, initializer=cv2.setNumThreads, initargs=(0,)
    ) as pool:
        yield from pool.map(work, jobs, chunksize=4)


def in_threads(
    work: Callable[[Item], Result], groups: Iterable[Iterable[Item]], num_threads: int
) -> Iterator[list[Result]]:
    """``work`` on each item, results in order and by group; groups are drawn while threads work on those before.

    A group waits as long as those before it hold at most two items a thread; an error of ``work`` comes up in the place
    of its group. Threads, not processes: upsampling and run-length encoding release the interpreter's lock. Each keeps
    to one core, as do threads that the process starts later.
    """
    if not num_threads:
        yield from (list(map(work, group)) for group in groups)
        return
    import torch  # here: the processes of `annexe synth` and `annexe score` do without

    waiting: deque[list[Future[Result]]] = deque()
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for group in groups:
            waiting.append([pool.submit(work, item) for item in group])
            while len(waiting) > 1 and sum(map(len, waiting)) > 2 * num_threads:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
