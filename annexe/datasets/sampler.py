"""Which training sample comes when: a function of seed and position, so that runs repeat and resume exactly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from annexe.config import RunConfig


def sample_order(seed: int, num_images: int, first: int, last: int) -> list[tuple[int, int]]:
    """(epoch, image) of the training samples ``first`` to ``last``: every epoch is a permutation of its own."""
    order = []
    for epoch in range(first // num_images, (last - 1) // num_images + 1):
        permutation = np.random.default_rng([seed, epoch]).permutation(num_images).tolist()
        start = epoch * num_images
        order += [
            (epoch, permutation[i - start])
            for i in range(max(first, start), min(last, start + num_images))
        ]
    return order


class MicroBatches:
    """Batch sampler of one rank: its share of every micro-batch that is left.

    Args:
        step: optimizer steps done.
        first_image: samples that all ranks took in them.
    """

    def __init__(
        self,
        run: RunConfig,
        num_images: int,
        *,
        step: int,
        first_image: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.run, self.num_images, self.first_image = run, num_images, first_image
        self.rank, self.world_size = rank, world_size
        self.num_batches = (run.max_steps - step) * run.gradient_accumulation

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.run.batch_size
        for number in range(self.num_batches):
            first = self.first_image + (number * self.world_size + self.rank) * size
            yield sample_order(self.run.seed, self.num_images, first, first + size)
