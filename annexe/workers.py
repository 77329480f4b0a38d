"""Work that takes no GPU, spread over processes or threads."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import parent_process, resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import cv2

from annexe.errors import UserError

log = logging.getLogger(__name__)

Job = TypeVar("Job")
Item = TypeVar("Item")
Result = TypeVar("Result")
Submit = Callable[..., Future[Any]]
"""Takes a function and its arguments; what it returns has the result, now or later."""

SHARED_MEMORY = Path("/dev/shm")  # of Linux, for what processes share
_JOBS_AT_ONCE = 4  # that a process gets in one message
_BYTES_OF_LOCKS = 2**20  # more than the locks of a pool take


def num_cores() -> int:
    """Cores this process may use; not every system can tell it from the cores there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_shared_memory() -> int | None:
    """Bytes that processes can still share, 0 if they may not; None where no limit is known."""
    if not SHARED_MEMORY.is_dir():
        return None
    is_writable = os.access(SHARED_MEMORY, os.W_OK)
    return shutil.disk_usage(SHARED_MEMORY).free if is_writable else 0


def in_processes(
    work: Callable[[Job], Result], jobs: Iterable[Job], num_workers: int
) -> Iterator[Result]:
    """``work`` on every job, results in order.

    Args:
        work: a function that can be pickled.
        jobs: its arguments.
        num_workers: processes of one thread each; with one or none the work is done right here,
            and also where shared memory has no room for the locks of processes.

    Raises:
        UserError: if a process dies.
    """
    with _pool(num_workers if num_workers > 1 else 0) as pool:
        if pool is None:
            yield from map(work, jobs)
        else:
            yield from pool.map(work, jobs, chunksize=_JOBS_AT_ONCE)


@contextmanager
def processes(num_workers: int) -> Iterator[Submit]:
    """Processes that work beside this one for as long as the block runs.

        with processes(4) as submit:
            future = submit(work, job)
            ...
            result = future.result()

    They start when there is work for them. At the end of the block they finish what they were
    given; after an exception they leave out what they have not begun.

    Args:
        num_workers: processes of one thread each; with none the work is done right here, when it is
            submitted, and also where shared memory has no room for the locks of processes.

    Yields:
        A function that takes another, which can be pickled, and its arguments, and returns a
        future.

    Raises:
        UserError: if a process dies.
    """
    with _pool(num_workers) as pool:
        yield do_right_here if pool is None else pool.submit


def do_right_here(work: Callable[..., Result], /, *arguments: Any) -> Future[Result]:
    """What `processes` gives without any: the work is done before this returns."""
    future: Future[Result] = Future()
    try:
        future.set_result(work(*arguments))
    except Exception as error:
        future.set_exception(error)
    return future


@contextmanager
def _pool(num_workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """So many processes, or None where there are none."""
    free = free_shared_memory()
    if num_workers and free is not None and free < _BYTES_OF_LOCKS:
        log.warning("'%s' is full: one process does the work of %d", SHARED_MEMORY, num_workers)
        num_workers = 0
    if not num_workers:
        yield None
        return

    try:
        with ProcessPoolExecutor(num_workers, mp_context=Spawn(), initializer=_begin) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {num_workers} processes was ended from outside, most likely for want of "
            "memory; take fewer (--workers or run.num_workers, or the cores that taskset gives)"
        ) from error


class _Uninterrupted(SpawnProcess):
    """A process that no Ctrl-C ends: one that started it gets it too, and answers.

    Not even in its first seconds, in which it imports: it inherits that the signal is blocked.
    """

    def start(self) -> None:
        # Python 3.10 and 3.11 start it with the first process, and unblock the signal for that one
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Spawn(SpawnContext):
    """Starts processes from scratch, which no Ctrl-C ends.

    A fork would copy this process, which may hold threads and a GPU.
    """

    Process = _Uninterrupted  # type: ignore[assignment]


def _begin() -> None:
    """Prepare a process: one thread, and an end together with the process that started it."""
    cv2.setNumThreads(0)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End at once when the process that started this one is gone, be it by `kill -9`."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def in_threads(
    work: Callable[[Item], Result], groups: Iterable[Iterable[Item]], num_threads: int
) -> Iterator[list[Result]]:
    """``work`` on each item, results in order and by group.

    The next groups are drawn while threads work on those before. At most two items a thread wait,
    beside one group. An error of ``work`` is raised in place of its group.

    Threads are enough, because upsampling and run-length encoding release the interpreter's lock.
    Each uses one core, as do threads that the process starts later.

    Args:
        work: what is done to an item.
        groups: items that belong together.
        num_threads: with 0 the work is done right here.
    """
    if not num_threads:
        for group in groups:
            yield [work(item) for item in group]
        return

    # Here, so that the processes of `annexe synth` and `annexe score` do without torch
    import torch

    waiting: deque[list[Future[Result]]] = deque()

    def results() -> list[Result]:
        return [future.result() for future in waiting.popleft()]

    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for group in groups:
            waiting.append([pool.submit(work, item) for item in group])
            while len(waiting) > 1 and sum(map(len, waiting)) > 2 * num_threads:
                yield results()
        while waiting:
            yield results()
