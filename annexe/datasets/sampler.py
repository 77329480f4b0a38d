"""Which training samples a process takes, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator

from annexe.datasets.mixture import Draw, Mixture


class MicroBatches:
    """Batch sampler of one rank: its share of every micro-batch that is left.

    Args:
        mixture: the order of all samples.
        batch_size: images of a micro-batch on one rank.
        num_batches: micro-batches that are left for each rank.
        first_image: samples that all ranks took before, in the steps that are done.
        rank: index of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        batch_size: int,
        num_batches: int,
        first_image: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.mixture = mixture
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.first_image = first_image
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.num_batches):
            # Ranks take turns, batch by batch
            shard = step * self.world_size + self.rank
            first = self.first_image + shard * self.batch_size
            yield self.mixture.order(first, first + self.batch_size)
