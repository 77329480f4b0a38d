"""Images shared out to splits, group by group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from annexe.datasets.image_names import category


def share_out(
    groups: Mapping[str, list[str]],
    shares: Mapping[str, float],
    seed: int,
    kind_of: Callable[[str], str] = category,
) -> dict[str, list[str]]:
    """Share out groups of images, largest first, each to the split that lacks its kinds most.

    Args:
        groups: name -> images that stay together; at least as many groups as there are shares.
        shares: split -> share of the images it should get, above 0.
        seed: settles the order of groups of one size.
        kind_of: kind of an image, of which every split gets its share.

    Returns:
        Split -> sorted images; none is empty.
    """
    # What every split lacks of each kind, in images
    sizes = Counter(kind_of(image) for group in groups.values() for image in group)
    lacking: dict[str, dict[str, float]] = {}
    for name, share in shares.items():
        lacking[name] = {kind: share * size for kind, size in sizes.items()}

    # Largest groups first; the last ones go to splits that are still empty
    lists: dict[str, list[str]] = {name: [] for name in shares}
    shuffled = np.random.default_rng(seed).permutation(sorted(groups)).tolist()
    by_size = sorted(shuffled, key=lambda key: -len(groups[key]))
    for num_placed, key in enumerate(by_size):
        counts = Counter(kind_of(image) for image in groups[key])
        empty = [name for name in shares if not lists[name]]
        candidates = empty if len(groups) - num_placed == len(empty) else list(shares)
        lacks = [_lack(lacking[name], counts, sizes) for name in candidates]
        chosen = candidates[lacks.index(max(lacks))]
        lists[chosen] += groups[key]
        for kind, count in counts.items():
            lacking[chosen][kind] -= count
    return {name: sorted(chosen) for name, chosen in lists.items()}


def _lack(lacking: dict[str, float], counts: Counter, sizes: Counter) -> float:
    """How much a split lacks the images of a group.

    Args:
        lacking: kind -> images that the split lacks.
        counts: kind -> images of the group.
        sizes: kind -> all images.

    Returns:
        What it lacks of the group's kinds, and of images at all, each as a share of what there is.
    """
    of_its_kind = sum(count * lacking[kind] / sizes[kind] for kind, count in counts.items())
    return of_its_kind / counts.total() + sum(lacking.values()) / sizes.total()
