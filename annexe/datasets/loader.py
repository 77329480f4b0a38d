"""Batches that processes make ahead of the device."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable
from io import BytesIO
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from annexe.errors import UserError
from annexe.workers import SHARED_MEMORY, free_shared_memory

_PLENTY = 2**30  # bytes of shared memory, with which a batch is not measured
_FIX = (
    "give it room (docker run --shm-size=8g, or --ipc=host), or load in the main process: "
    "run.num_workers=0"
)


class OneLineErrors(Dataset):
    """The items of a data set; a file that cannot be used is a `UserError`.

    Of another exception of a worker only the text reaches the main process.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except OSError as error:
            if error.filename is None:
                raise
            raise UserError(
                f"cannot use '{error.filename}' ({error.strerror}); "
                "check the file, its rights and the room on its disk"
            ) from error


def make_loader(
    dataset: Any,
    batches: Iterable[list],
    collate: Callable[[list], Any],
    *,
    num_workers: int,
    device: torch.device,
) -> DataLoader:
    """The batches of a data set in order, loaded ahead of ``device``.

    Args:
        dataset: gives an item for each index.
        batches: indices of the items of each batch. They are iterated over more than once.
        collate: makes a batch of its items.
        num_workers: this many processes make batches; with 0 the main process does.
        device: that the batches go to.

    Raises:
        UserError: if the shared memory cannot take the batches of so many processes.
    """
    loader = DataLoader(
        OneLineErrors(dataset),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=report_unsent if num_workers else None,
        generator=torch.Generator(),  # for the workers' seed: the run's random state stays as it is
    )
    if num_workers:
        _require_room(loader)
    return loader


def _require_room(loader: DataLoader) -> None:
    """Check that shared memory, by which workers hand batches over, has room for what they load."""
    free = free_shared_memory()
    if free is None or free >= _PLENTY:
        return
    first = next(iter(loader.batch_sampler or []), None)
    if first is None:
        return

    # Every worker loads some batches ahead, and the main process holds one
    batch = loader.collate_fn([loader.dataset[index] for index in first])
    num_batches = loader.num_workers * (loader.prefetch_factor or 0) + 1
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    needed = num_ranks * num_batches * num_bytes(batch)
    if needed > free:
        raise UserError(
            f"run.num_workers={loader.num_workers} needs {needed / 1e6:.0f} MB in "
            f"'{SHARED_MEMORY}' and {free / 1e6:.0f} MB are free; {_FIX}"
        )


def num_bytes(batch: Any) -> int:
    """Bytes of all tensors in a batch, whatever it is made of."""
    sizes = []

    class Measure(pickle.Pickler):
        """Goes through all that a batch is made of."""

        def reducer_override(self, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return NotImplemented
            sizes.append(value.untyped_storage().nbytes())
            return int, ()

    Measure(BytesIO()).dump(batch)
    return sum(sizes)


def report_unsent(_: int) -> None:
    """Have a worker send the error in place of a batch that it cannot hand over.

    A batch goes into shared memory in a thread, whose errors Python prints and forgets: the main
    process would wait for that batch for ever.
    """
    Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]


def _send_error(queue: Queue, error: Exception, item: tuple[int, Any]) -> None:
    """Put an error into the queue of results, as a `DataLoader` has it.

    Args:
        queue: of results.
        error: why ``item`` could not be sent.
        item: number of the batch, and the batch.
    """
    reason = " ".join(str(error).split())
    try:
        raise UserError(
            f"a worker cannot hand over its batch ({reason}): '{SHARED_MEMORY}' is full, "
            f"or too many files are open (ulimit -n); {_FIX}"
        )
    except UserError:
        queue.put((item[0], ExceptionWrapper(where="in a DataLoader worker")))
