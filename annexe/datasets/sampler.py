"""Which training sample comes when.

The order is a function of the seed and the position, so runs repeat and resume exactly.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def sample_order(seed: int, num_images: int, first: int, last: int) -> list[tuple[int, int]]:
    """The training samples ``first`` to ``last - 1`` of a run, as pairs of epoch and image index.

    Every epoch is a permutation of its own of all ``num_images`` images.
    """
    order = []
    for epoch in range(first // num_images, (last - 1) // num_images + 1):
        permutation = np.random.default_rng([seed, epoch]).permutation(num_images).tolist()
        start = epoch * num_images
        # Those of this epoch
        for position in range(max(first, start), min(last, start + num_images)):
            order.append((epoch, permutation[position - start]))
    return order


class MicroBatches:
    """Batch sampler of one rank: its share of every micro-batch that is left.

    Args:
        num_images: images of the data set.
        seed: of the order.
        batch_size: images of a micro-batch on one rank.
        num_batches: micro-batches that are left for each rank.
        first_image: samples that all ranks took before, in the steps that are done.
        rank: index of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        num_images: int,
        *,
        seed: int,
        batch_size: int,
        num_batches: int,
        first_image: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_images = num_images
        self.seed = seed
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.first_image = first_image
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.num_batches):
            # Ranks take turns, batch by batch
            shard = step * self.world_size + self.rank
            first = self.first_image + shard * self.batch_size
            yield sample_order(self.seed, self.num_images, first, first + self.batch_size)
