"""The processes of a job: one, or as many as torchrun started, on one machine or several."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from annexe.config import RunConfig, device_settings
from annexe.distributed import make_accelerator, require_shared

Value = TypeVar("Value")

# How long a process that is done waits for the others, whose shares may take longer. One that dies
# ends the wait at once
_PATIENCE = timedelta(days=7)


class Processes:
    """This process and the others of its job.

    Args:
        run: device, precision, and how long a process waits for the others to come.

    Attributes:
        rank: of this process; the main one is 0.
        count: of all processes.

    Raises:
        UserError: if there is no such device, or the others do not come.
    """

    def __init__(self, run: RunConfig) -> None:
        self._accelerator = make_accelerator(**device_settings(run))
        self.rank: int = self._accelerator.process_index
        self.count: int = self._accelerator.num_processes
        # On the host: a GPU has nothing to do with what is exchanged
        self._group: Any = None
        if self.count > 1:
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    @property
    def is_main(self) -> bool:
        """Whether this process plans the work and joins the results."""
        return self.rank == 0

    def from_main(self, work: Callable[[], Value]) -> Value:
        """What ``work`` returns on the main process, on every process.

        An error of ``work`` is raised on the main process; the others end with exit code 2 and say
        nothing.
        """
        if self.count == 1:
            return work()
        returned: list[Any] = [None]
        try:
            if self.is_main:
                returned = [(work(),)]
        finally:
            dist.broadcast_object_list(returned, src=0, group=self._group)
        if returned[0] is None:
            # torchrun ends the others after the first one: the main process speaks before that
            with suppress(RuntimeError):
                dist.barrier(group=self._group)
            sys.exit(2)
        return returned[0][0]

    def share(self, items: list[Value]) -> list[Value]:
        """The items of this process: together all processes have each of them once."""
        return items[self.rank :: self.count]

    def gather(self, items: list[Value]) -> list[Value]:
        """The items of all processes in rank order, on every process.

        It waits until every process has come to this point.
        """
        if self.count == 1:
            return items
        lists: list[list[Value]] = [[] for _ in range(self.count)]
        dist.all_gather_object(lists, items, group=self._group)
        return list(chain.from_iterable(lists))

    def require_shared(self, folder: Path, setting: str) -> None:
        """As `annexe.distributed.require_shared`."""
        require_shared(self._accelerator, folder, setting)

    def leave(self) -> None:
        """End the group of processes."""
        if self.count > 1:
            dist.destroy_process_group()
