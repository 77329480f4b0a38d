"""Data sets: importing this package registers them."""

from __future__ import annotations

from pathlib import Path

from annexe.config import Config
from annexe.datasets import egohos  # noqa: F401  (it registers)
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.errors import UserError
from annexe.registry import build


def build_dataset(config: Config, split: str, *, cached: bool = True) -> EgoIRGBench:
    """The configuration's data set in one of its splits; ``cached`` keeps resized pixels under ``run.output_dir``."""
    if len(config.datasets) != 1:
        raise UserError(f"datasets names {len(config.datasets)} data sets; name one, such as ego_irgbench")
    if config.model is None:
        raise UserError("the configuration has no model block; take one from train_configs/, such as annexe_tiny.yaml")
    ((name, spec),) = config.datasets.items()
    image_size = config.model["rgb_encoder"]["image_size"]
    cache = Path(config.run.output_dir) / "cache" if cached else None
    return build("dataset", {"type": name, **spec}, split, image_size, config.run.seed, cache)
