"""Which training samples a process takes, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
        batches_per_step: micro-batches of each rank between two updates of the weights.
        num_queries: of a sample. With it, ranks share out the samples of every step so that each
            has about as many queries. The samples of a step stay the same.
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
        batches_per_step: int = 1,
        num_queries: Callable[[Draw], int] | None = None,
    ) -> None:
        self.mixture = mixture
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.first_image = first_image
        self.rank = rank
        self.world_size = world_size
        self.batches_per_step = batches_per_step
        self.num_queries = num_queries

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[Draw]]:
        if self.num_queries is not None and self.world_size > 1:
            yield from self._even_batches(self.num_queries)
            return
        for step in range(self.num_batches):
            # Ranks take turns, batch by batch
            shard = step * self.world_size + self.rank
            first = self.first_image + shard * self.batch_size
            yield self.mixture.order(first, first + self.batch_size)

    def _even_batches(self, num_queries: Callable[[Draw], int]) -> Iterator[list[Draw]]:
        """Batches that are shared out step by step."""
        num_own = self.batch_size * self.batches_per_step
        num_images = num_own * self.world_size
        for step in range(self.num_batches // self.batches_per_step):
            first = self.first_image + step * num_images
            draws = self.mixture.order(first, first + num_images)
            counts = [num_queries(draw) for draw in draws]
            own = share_out(counts, self.world_size)[self.rank]
            for start in range(0, num_own, self.batch_size):
                yield [draws[index] for index in own[start : start + self.batch_size]]


def share_out(sizes: list[int], num_shares: int) -> list[list[int]]:
    """Indices of things in shares of equal number and of about equal size.

    The largest that is left goes to the smallest share that has room (Graham, Bounds on
    multiprocessing timing anomalies, SIAM Journal on Applied Mathematics 17, 1969).

    Args:
        sizes: of the things, as many as ``num_shares`` divides.
    """
    room = len(sizes) // num_shares
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    totals = [0] * num_shares
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        open_shares = [share for share in range(num_shares) if len(shares[share]) < room]
        smallest = min(open_shares, key=lambda share: totals[share])
        shares[smallest].append(index)
        totals[smallest] += sizes[index]
    return shares
