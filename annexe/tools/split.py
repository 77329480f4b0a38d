"""`annexe split`: new train, val and test lists that share no video, object instance or room."""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from annexe.datasets.image_names import (
    GROUPS,
    SPLITS,
    annotation_folders,
    category,
    check_known,
    fields,
    leaks,
    read_list,
)
from annexe.errors import UserError

HELP = "write split lists that share no video, object instance or room"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", type=Path, help="folder that holds dataset_split/")
    parser.add_argument("--by", choices=GROUPS, required=True, help="what no two splits may share")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder to make, for train.txt, val.txt and test.txt",
    )
    parser.add_argument(
        "--val", type=float, default=0.1, help="share of the images in val (default %(default)s)"
    )
    parser.add_argument(
        "--test", type=float, default=0.2, help="share of the images in test (default %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="the same seed gives the same lists (default %(default)s)",
    )
    parser.add_argument(
        "--exclude",
        type=Path,
        metavar="FILE",
        help="stems to leave out, or a report of annexe doctor",
    )


def run(arguments: argparse.Namespace) -> None:
    out = arguments.out
    if out.exists():
        raise UserError(f"'{out}' exists; name a folder that does not, so that no list is replaced")
    if not (
        min(arguments.val, arguments.test, arguments.seed) >= 0
        and arguments.val + arguments.test < 1
    ):  # or NaN
        raise UserError(
            f"cannot split with --val {arguments.val}, --test {arguments.test}, --seed {arguments.seed}: "
            "give shares from 0 that leave something to train, and a seed from 0 on"
        )
    stems = sorted(
        {stem for stems in annotation_folders(arguments.root).values() for stem in stems}
    )
    if arguments.exclude:
        excluded = set(read_list(arguments.exclude, "--exclude"))
        check_known(excluded, stems, arguments.exclude, arguments.root)
        stems = [stem for stem in stems if stem not in excluded]
    if not stems:
        raise UserError(
            f"'{arguments.root / 'dataset_split'}' holds no SPLIT/*.json; give the folder that holds RGB/"
        )
    shares = {
        "train": 1 - arguments.val - arguments.test,
        "val": arguments.val,
        "test": arguments.test,
    }
    lists = split(stems, arguments.by, shares, arguments.seed)
    out.mkdir(parents=True)
    for name, own in lists.items():
        (out / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in own), encoding="utf-8")
    show(lists)


def split(stems: list[str], by: str, shares: dict[str, float], seed: int) -> dict[str, list[str]]:
    """Share out groups of stems, largest first, each to the split that lacks its categories most.

    Args:
        by: what the images of a group have in common: ``sequence``, ``instance`` or ``room``.
        shares: split -> share of the images it should get; a split with share 0 gets no list.
        seed: settles the order of groups of one size.

    Raises:
        UserError: a stem does not follow HOI4D's pattern, or a split would be empty.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    strange = [stem for stem in stems if fields(stem) is None]
    if strange:
        raise UserError(
            f"{len(strange)} stems do not follow HOI4D's pattern, such as '{strange[0]}'; rename them or --exclude them"
        )
    for stem in stems:
        groups[fields(stem)[by]].append(stem)
    wanted = [name for name in SPLITS if shares[name] > 0]
    if len(groups) < len(wanted):
        raise UserError(
            f"split '{wanted[len(groups)]}' would be empty: the images show {len(groups)} different {by}s for "
            f"{len(wanted)} splits; split by something finer, or set --val or --test to 0"
        )
    sizes = Counter(category(stem) for stem in stems)
    lacking = {name: {kind: shares[name] * size for kind, size in sizes.items()} for name in wanted}
    lists: dict[str, list[str]] = {name: [] for name in wanted}
    order = np.random.default_rng(seed).permutation(sorted(groups)).tolist()
    for position, key in enumerate(sorted(order, key=lambda key: -len(groups[key]))):
        own = Counter(category(stem) for stem in groups[key])
        empty = [name for name in wanted if not lists[name]]
        free = empty if len(groups) - position == len(empty) else wanted
        chosen = max(free, key=lambda name: _lack(lacking[name], own, sizes))
        lists[chosen] += groups[key]
        for kind, number in own.items():
            lacking[chosen][kind] -= number
    return {name: sorted(own) for name, own in lists.items()}


def _lack(lacking: dict[str, float], group: Counter, sizes: Counter) -> float:
    """How much a split lacks the categories of a group, and images at all, each as a share of what there is."""
    of_its_kind = (
        sum(number * lacking[kind] / sizes[kind] for kind, number in group.items()) / group.total()
    )
    return of_its_kind + sum(lacking.values()) / sizes.total()


def show(lists: dict[str, list[str]]) -> None:
    """Print sizes by category, and what val and test still share with train."""
    counts = {name: Counter(map(category, own)) for name, own in lists.items()}
    total = sum(counts.values(), Counter())
    table = Table("category", *lists, "all")
    for kind in [*sorted(total), None]:
        row = [counts[name][kind] if kind else counts[name].total() for name in lists]
        shares = (f"{number} ({number / sum(row):.0%})" for number in row)
        table.add_row(kind or "all", *shares, str(sum(row)), end_section=kind == max(total))
    console = Console(soft_wrap=True)
    console.print(table)
    for name, own in leaks(lists).items():
        shown = ", ".join(f"the {group} of {own[group]:.1%}" for group in GROUPS)
        console.print(
            f"{name}: train shows {shown} of its images too", markup=False, highlight=False
        )
