"""`annexe synth`: draws a synthetic data set in the layout of Ego-IRGBench."""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path

from annexe.datasets.image_names import SPLITS
from annexe.errors import UserError
from annexe.synthetic.canvas import HEIGHT
from annexe.synthetic.generate import generate
from annexe.terminal import say

log = logging.getLogger(__name__)


_EXAMPLES = """\
example:
  annexe synth data/synthetic --images 3400 --seed 1
      data/synthetic with RGB/, depth/, mask/ and dataset_split/, as a training reads them

A call that was interrupted goes on where it was when it is repeated.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder to make")

    # how many images, and of what
    in_all = "images in train, val and test together"
    add("--images", type=int, required=True, metavar="N", help=in_all)
    add("--seed", type=int, required=True, metavar="N", help="the same seed gives the same bytes")
    share = "share of the images in {}, or from 1 on their number (default %(default)s)"
    add("--val", type=float, default=0.05, metavar="SHARE", help=share.format("val"))
    add("--test", type=float, default=0.15, metavar="SHARE", help=share.format("test"))
    hard = "look-alikes, hidden parts, and questions that tell apart"
    add("--hard", action="store_true", help=hard)

    # how they are drawn
    height = "rows of a picture, 16:9: the same scenes in less time (default %(default)s)"
    add("--height", type=int, default=HEIGHT, metavar="N", help=height)
    add("--workers", type=int, metavar="N", help="processes (default: all cores)")


def run(arguments: argparse.Namespace) -> None:
    """Draws the data set and prints how many images each split holds."""
    out = arguments.out
    existed = out.exists()
    generate(
        out,
        num_images=arguments.images,
        seed=arguments.seed,
        val_fraction=_share("--val", arguments.val, arguments.images),
        test_fraction=_share("--test", arguments.test, arguments.images),
        hard=arguments.hard,
        height=arguments.height,
        num_workers=arguments.workers,
    )

    # what is there now
    sizes = {}
    for split in SPLITS:
        sizes[split] = len(list((out / "dataset_split" / split).iterdir()))
    counts = ", ".join(f"{size:,} {split}" for split, size in sizes.items())
    note = ", some or all there before" if existed else ""
    message = f"images in '{out}'{note}: {counts}"
    say(message)
    if not all(sizes.values()):
        log.warning(
            "a split is empty: ask for more images, or larger --val and --test, "
            "to train with validation"
        )


def _share(option: str, value: float, num_images: int) -> float:
    """The share that an option gives, below 1 as such and from 1 on as a number of images.

    Raises:
        UserError: for what is neither.
    """
    if not 0 <= value < math.inf or (value > 1 and value != round(value)):  # nor NaN
        raise UserError(f"{option} is {value:g}; give a share from 0 on, or a number of images")
    return value if value < 1 else value / max(num_images, 1)
