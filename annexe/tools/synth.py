"""`annexe synth`: draws a synthetic data set in the layout of Ego-IRGBench."""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path

from rich.console import Console

from annexe.datasets.image_names import SPLITS
from annexe.errors import UserError
from annexe.synthetic.generate import generate

log = logging.getLogger(__name__)

HELP = "draw synthetic scenes in the layout of Ego-IRGBench"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument(
        "--images", type=int, required=True, help="images in train, val and test together"
    )
    parser.add_argument(
        "--seed", type=int, required=True, help="the same seed gives the same bytes"
    )
    share = "share of the images in {}, or from 1 on their number (default %(default)s)"
    parser.add_argument("--val", type=float, default=0.05, help=share.format("val"))
    parser.add_argument("--test", type=float, default=0.15, help=share.format("test"))
    parser.add_argument(
        "--hard",
        action="store_true",
        help="look-alikes, hidden parts, and questions that tell apart",
    )
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")


def run(arguments: argparse.Namespace) -> None:
    there, images = arguments.out.exists(), max(arguments.images, 1)
    if not all(0 <= given < math.inf for given in (arguments.val, arguments.test)):  # nor NaN
        raise UserError(
            f"--val {arguments.val} --test {arguments.test}: give shares or numbers from 0 on"
        )
    val, test = (
        given if given < 1 else given / images for given in (arguments.val, arguments.test)
    )
    generate(
        arguments.out,
        num_images=arguments.images,
        seed=arguments.seed,
        val_fraction=val,
        test_fraction=test,
        hard=arguments.hard,
        num_workers=arguments.workers,
    )
    sizes = {
        split: len(list((arguments.out / "dataset_split" / split).iterdir())) for split in SPLITS
    }
    counted = ", ".join(f"{number:,} {split}" for split, number in sizes.items())
    Console(soft_wrap=True).print(
        f"images in '{arguments.out}'{', some or all there before' * there}: {counted}",
        markup=False,
        highlight=False,
    )
    if not all(sizes.values()):
        log.warning(
            "a split is empty: ask for more images, or larger --val and --test, to train with validation"
        )
