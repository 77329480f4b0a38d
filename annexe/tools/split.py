"""`annexe split`: new train, val and test lists that share no video, object instance or room."""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from pathlib import Path

from annexe.datasets.image_names import (
    GROUPS,
    SPLITS,
    annotation_folders,
    category,
    fields,
    leaks,
    read_stems,
)
from annexe.datasets.shares import share_out
from annexe.errors import UserError
from annexe.files import replaced
from annexe.terminal import say, table

_EXAMPLES = """\
example:
  annexe split data/synthetic --by sequence --out data/clean_split
      lists of stems, which the setting split_dir of a data set takes

The data themselves are not changed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.epilog = _EXAMPLES
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder that holds dataset_split/")
    parser.add_argument("--by", choices=GROUPS, required=True, help="what no two splits may share")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to make, for train.txt, val.txt and test.txt",
    )
    parser.add_argument(
        "--val",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of the images in val (default %(default)s)",
    )
    parser.add_argument(
        "--test",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="share of the images in test (default %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="the same seed gives the same lists (default %(default)s)",
    )
    parser.add_argument(
        "--exclude",
        type=Path,
        metavar="FILE",
        help="stems to leave out, or a report of annexe doctor",
    )


def run(arguments: argparse.Namespace) -> None:
    """Read the stems, share them out, and write the lists.

    Raises:
        UserError: for wrong arguments, a folder without data, or a split that would be empty.
    """
    # Check the arguments
    out = arguments.out
    if out.exists():
        raise UserError(f"'{out}' exists; name a folder that does not, so that no list is replaced")
    train_share = 1 - arguments.val - arguments.test
    is_possible = min(arguments.val, arguments.test, arguments.seed) >= 0
    if not (is_possible and arguments.val + arguments.test < 1):  # written so that NaN is refused
        raise UserError(
            f"cannot split with --val {arguments.val}, --test {arguments.test}, "
            f"--seed {arguments.seed}: give shares from 0 that leave something to train, "
            "and a seed from 0 on"
        )

    # Every image once, whichever folder holds it
    stems = sorted(set().union(*annotation_folders(arguments.root).values()))
    if arguments.exclude:
        folder = arguments.root / "dataset_split"
        excluded = set(read_stems(arguments.exclude, "--exclude", set(stems), folder))
        stems = [stem for stem in stems if stem not in excluded]
    if not stems:
        raise UserError(
            f"'{arguments.root / 'dataset_split'}' holds no SPLIT/*.json; "
            "give the folder that holds RGB/"
        )

    # Share out and write
    shares = {"train": train_share, "val": arguments.val, "test": arguments.test}
    lists = split(stems, arguments.by, shares, arguments.seed)
    show(lists)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaced(out) as part:
        part.mkdir()
        for name, listed in lists.items():
            text = "".join(f"{stem}\n" for stem in listed)
            (part / f"{name}.txt").write_text(text, encoding="utf-8")


def split(stems: list[str], by: str, shares: dict[str, float], seed: int) -> dict[str, list[str]]:
    """Share out groups of stems, largest first, each to the split that lacks its categories most.

    Args:
        stems: all images.
        by: what the images of a group have in common: ``sequence``, ``instance`` or ``room``.
        shares: split -> share of the images it should get; a split with share 0 gets no list.
        seed: settles the order of groups of one size.

    Returns:
        Split -> sorted stems.

    Raises:
        UserError: a stem does not follow HOI4D's pattern, or a split would be empty.
    """
    # Groups that stay together
    strange = [stem for stem in stems if fields(stem) is None]
    if strange:
        raise UserError(
            f"{len(strange)} stems do not follow HOI4D's pattern, such as '{strange[0]}'; "
            "rename them or --exclude them"
        )
    groups: dict[str, list[str]] = defaultdict(list)
    for stem in stems:
        parts = fields(stem)
        assert parts is not None
        groups[parts[by]].append(stem)
    wanted = [name for name in SPLITS if shares[name] > 0]
    if len(groups) < len(wanted):
        raise UserError(
            f"split '{wanted[len(groups)]}' would be empty: the images show {len(groups)} "
            f"different {by}s for {len(wanted)} splits; split by something finer, "
            "or set --val or --test to 0"
        )

    return share_out(groups, {name: shares[name] for name in wanted}, seed)


def show(lists: dict[str, list[str]]) -> None:
    """Print sizes by category, and what val and test still share with train."""
    counts = {name: Counter(map(category, stems)) for name, stems in lists.items()}
    total = sum(counts.values(), Counter())

    # A row for each category, and one for all of them
    rows = []
    for kind in sorted(total):
        rows.append(_row(kind, [counts[name][kind] for name in lists]))
    rows.append(_row("all", [counts[name].total() for name in lists]))
    table(["category", *lists, "all"], rows, has_total=True)

    for name, shared in leaks(lists).items():
        shown = ", ".join(f"the {group} of {shared[group]:.1%}" for group in GROUPS)
        say(f"{name}: train shows {shown} of its images too")


def _row(name: str, counts: list[int]) -> list[str]:
    total = sum(counts)
    shares = [f"{count} ({count / total:.0%})" for count in counts]
    return [name, *shares, str(total)]
