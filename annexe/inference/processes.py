"""The processes of a job: one, or as many as torchrun started, on one machine or several."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import torch.distributed as dist

from annexe.config import RunConfig, device_settings
from annexe.distributed import make_accelerator
from annexe.errors import UserError

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
        accelerator = make_accelerator(**device_settings(run))
        self.rank: int = accelerator.process_index
        self.count: int = accelerator.num_processes
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
            self._exchange(lambda: dist.broadcast_object_list(returned, src=0, group=self._group))
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

        Raises:
            UserError: if another one has ended.
        """
        if self.count == 1:
            return items
        lists: list[list[Value]] = [[] for _ in range(self.count)]
        self._exchange(lambda: dist.all_gather_object(lists, items, group=self._group))
        return list(chain.from_iterable(lists))

    def leave(self) -> None:
        """End the group of processes."""
        if self.count > 1:
            dist.destroy_process_group()

    def _exchange(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except RuntimeError as error:  # gloo knows of a process that died by its connection alone
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"process {self.rank} of {self.count} has lost another one ({reason}); see above "
                "why that ended, and repeat the command: it goes on where it was"
            ) from error
