"""How fast an evaluation was, and what its time went into."""

from __future__ import annotations

import time
from typing import Any

import psutil

from annexe.config import RunConfig


class Clock:
    """Takes the time of one call of an evaluation, from the start of this process on.

    Args:
        num_batches_of_start: first batches that count as start-up. With torch.compile the second
            does too: blocks are compiled for its shape, and with it for those of all others.

    Attributes:
        num_photos: that all processes predict after their start-up.
    """

    def __init__(self, num_batches_of_start: int) -> None:
        self.num_batches_of_start = num_batches_of_start
        self.num_photos = 0
        since_start = time.time() - psutil.Process().create_time()
        self._started = time.perf_counter() - since_start
        self._ends: list[float] = []  # when each batch was predicted
        self._waiting: list[float] = []  # seconds that the model waited for each
        self._generating: list[float] = []  # seconds that the model took for each
        self._scored = 0.0
        self._reported = 0.0

    def predicted(self, waiting: float, generating: float) -> None:
        """A batch was predicted; arguments as of `annexe.evaluation.predict.BatchListener`."""
        self._ends.append(time.perf_counter())
        self._waiting.append(waiting)
        self._generating.append(generating)

    def scored(self) -> None:
        """All batches are predicted and scored."""
        self._scored = time.perf_counter()

    def reported(self) -> None:
        """The report is drawn."""
        self._reported = time.perf_counter()

    def record(self) -> dict[str, Any]:
        """What timing.json holds; nothing where no batch was predicted.

        Rates and shares are of the time from the end of the start-up to the scores.
        """
        if not self._ends:
            return {}

        # From the end of the start-up on
        num_started = min(self.num_batches_of_start, len(self._ends))
        first = self._ends[num_started - 1]
        last = self._ends[-1]
        seconds = self._scored - first

        # Where the time went
        waiting = sum(self._waiting[num_started:])
        generating = sum(self._generating[num_started:])
        parts = {
            "generation": generating,
            "waiting_for_photos": waiting,
            "between_batches": last - first - waiting - generating,
            "behind_the_last_batch": self._scored - last,
        }
        return {
            "seconds_to_first_batch": self._ends[0] - self._started,
            "seconds_of_start_up": first - self._started,
            "seconds_after_start_up": seconds,
            "photos_after_start_up": self.num_photos,
            "photos_per_second": self.num_photos / seconds,
            "share_of_time": {name: part / seconds for name, part in parts.items()},
            "seconds_of_batches": self._generating,
            "seconds_of_report": self._reported - self._scored,
        }

    def summary(self) -> str:
        """The record in a line."""
        record = self.record()
        if not record:
            return "no batch was left to predict"
        if not self.num_photos:
            return f"all photos came with the start-up of {record['seconds_of_start_up']:.1f} s"
        return (
            f"first batch after {record['seconds_to_first_batch']:.1f} s; after the start-up "
            f"{record['photos_per_second']:.2f} photos/s until all was scored; generation took "
            f"{record['share_of_time']['generation']:.0%} of that time"
        )


def num_batches_of_start(run: RunConfig) -> int:
    """First batches of an evaluation that count as its start-up, as `Clock` takes it."""
    return 2 if run.compile else 1
