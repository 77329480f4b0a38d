"""A run's folder: its checkpoints by step, what they hold, how far the run is. Paths and JSON alone."""

from __future__ import annotations

import json
import logging
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors import SafetensorError

from annexe.errors import UserError
from annexe.registry import import_plugins

log = logging.getLogger(__name__)

MANIFEST = "files.json"


@dataclass
class Progress:
    """Where training stands; images, queries and tokens count what was trained on so far, over all ranks."""

    step: int = 0
    images: int = 0
    queries: int = 0
    tokens: int = 0
    best_score: float | None = None
    best_step: int | None = None
    thresholds: list[float] = field(
        default_factory=list
    )  # of each slot's presence, as calibrated on val


def is_complete(folder: Path) -> bool:
    """Whether every file that was written is there in full length."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, json.JSONDecodeError):
        return False


def find_checkpoint(where: Path, which: str = "latest") -> Path | None:
    """The checkpoint folder meant by ``where``: itself, or the ``latest`` or ``best`` complete one of a run folder."""
    if (where / MANIFEST).is_file() or where.name.startswith("step-"):
        return where if is_complete(where) else None
    found = [path for path in _by_step(where / "checkpoints") if is_complete(path)]
    if not found:
        return None
    best = json.loads((found[-1] / "state.json").read_text())["best_step"]
    named = where / "checkpoints" / f"step-{best or 0:08d}"
    return named if which == "best" and named in found else found[-1]


def require_checkpoint(where: str, which: str) -> Path:
    """As `find_checkpoint`, for a checkpoint the user asked for."""
    folder = find_checkpoint(Path(where), which)
    if folder is None:
        raise UserError(
            f"no complete checkpoint at '{where}'; give a run folder or a checkpoints/step-* folder"
        )
    return folder


def saved_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration that a checkpoint was trained with; plug-ins it names are imported."""
    saved = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    import_plugins(saved["imports"])
    return saved


def without_sources(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The ``model`` block ``spec`` without the files of weights that the checkpoint in ``folder`` makes needless.

    Those of a part that was trained whole are, and so is a ``model.init_from`` that is not there: `load_weights`
    then checks that frozen weights are the right ones all the same.

    Raises:
        UserError: for a file that is needed and not there, with the setting that takes its new place.
    """
    frozen = {name.partition(".")[0] for name in json.loads((folder / "frozen.json").read_text())}
    spec = {key: dict(value) if isinstance(value, dict) else value for key, value in spec.items()}
    for part in ("rgb_encoder", "depth_branch"):
        if spec[part].get("weights") is not None and part not in frozen:
            spec[part] |= {"weights": None, "init": "random"}
    if spec.get("init_from") is not None and not Path(spec["init_from"]).exists():
        log.warning(
            "model.init_from '%s' is not here; what was trained from it is in '%s'",
            spec["init_from"],
            folder,
        )
        spec |= {"init_from": None, "init": "random"}
    for part, setting in (
        ("rgb_encoder", "weights"),
        ("depth_branch", "weights"),
        ("language_model", "path"),
    ):
        path = spec[part].get(setting)
        if path is not None and not Path(path).exists():
            raise UserError(
                f"model.{part}.{setting}: '{path}' is not here, and the checkpoint '{folder}' cannot do "
                f"without it; say where it is: --options model.{part}.{setting}=PATH"
            )
    return spec


def load_progress(folder: Path) -> Progress:
    """Where training stood."""
    return Progress(**json.loads((folder / "state.json").read_text()))


def _by_step(folder: Path) -> list[Path]:
    """Folders of checkpoints by step; whatever else a user keeps beside them does not count."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


# What reading a damaged file of weights raises
DAMAGED = (
    OSError,
    RuntimeError,
    EOFError,
    KeyError,
    ValueError,
    AttributeError,
    pickle.UnpicklingError,
    SafetensorError,
)
