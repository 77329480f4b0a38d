"""A run's folder: its checkpoints by step, their settings, and how far the run is.

Paths and JSON alone; nothing here loads a model.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from annexe.checkpoints.saved_settings import upgraded
from annexe.config import to_plain
from annexe.errors import UserError
from annexe.registry import import_plugins
from annexe.settings import read_yaml

log = logging.getLogger(__name__)

MANIFEST = "files.json"  # of a checkpoint: every file's size in bytes; written last

# What torch.load and safetensors raise on a file of weights that is damaged or cut short
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


@dataclass
class Progress:
    """Where training stands.

    Attributes:
        step: optimizer steps done.
        images, queries, tokens: what was trained on so far, over all ranks.
        best_score: the validation score of the best checkpoint, which ``best_step`` wrote.
        thresholds: presence above which each slot has a target, as calibrated on val.
    """

    step: int = 0
    images: int = 0
    queries: int = 0
    tokens: int = 0
    best_score: float | None = None
    best_step: int | None = None
    thresholds: list[float] = field(default_factory=list)


def read_saved(file: Path, load: Callable[[Path], Any]) -> Any:
    """What ``load`` gives for a file of a checkpoint.

    Raises:
        UserError: saying what to do about its damage.
    """
    try:
        return load(file)
    except (*DAMAGED, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"'{file}' is damaged ({reason}); remove its folder to go on from the checkpoint before"
        ) from None


def read_saved_json(file: Path) -> Any:
    """The content of a JSON file of a checkpoint; errors are those of `read_saved`."""
    return read_saved(file, lambda path: json.loads(path.read_text(encoding="utf-8")))


def load_progress(folder: Path) -> Progress:
    """Where training stood when the checkpoint in ``folder`` was written.

    Raises:
        UserError: for a damaged file.
    """
    return read_saved(
        folder / "state.json", lambda path: Progress(**json.loads(path.read_text(encoding="utf-8")))
    )


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run_folder / "checkpoints" / f"step-{step:08d}"


def checkpoints_by_step(folder: Path) -> list[Path]:
    """Folders of checkpoints by step; whatever else a user keeps beside them does not count."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def is_complete(folder: Path) -> bool:
    """Whether every file that was written is there in full length."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, json.JSONDecodeError):
        return False


def find_checkpoint(where: Path, which: str = "latest") -> Path | None:
    """The complete checkpoint that ``where`` means, or None.

    Of a run, a warning names those that are not complete.

    Args:
        where: a checkpoint's folder, or that of a run.
        which: of a run's checkpoints the ``latest`` or the ``best``.
    """
    if (where / MANIFEST).is_file() or where.name.startswith("step-"):
        return where if is_complete(where) else None
    found = []
    for path in checkpoints_by_step(where / "checkpoints"):
        if is_complete(path):
            found.append(path)
        else:
            _warn_of_incomplete(path)
    if not found:
        return None
    best = checkpoint_folder(where, load_progress(found[-1]).best_step or 0)
    return best if which == "best" and best in found else found[-1]


@cache
def _warn_of_incomplete(folder: Path) -> None:
    """Say once that a checkpoint does not count."""
    log.warning("checkpoint '%s' is cut short or damaged, and does not count", folder)


def require_checkpoint(where: str, which: str) -> Path:
    """As `find_checkpoint`, for a checkpoint the user asked for.

    Raises:
        UserError: if there is none.
    """
    folder = find_checkpoint(Path(where), which)
    if folder is None:
        raise UserError(
            f"no complete checkpoint at '{where}'; give a run folder or a checkpoints/step-* folder"
        )
    return folder


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint belongs to; itself, if it was published alone."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


def evaluation_of(run_folder: Path) -> dict[str, Any]:
    """What an evaluation under a run's folder wrote; empty if there is none that can be read."""
    for file in (run_folder / "eval" / "metrics.json", run_folder / "metrics.json"):
        try:
            metrics = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(metrics, dict) and isinstance(metrics.get("standard"), dict):
            return metrics
    return {}


def is_of_run(path: Path) -> bool:
    """Whether a file is the configuration that a run or one of its checkpoints was saved with."""
    folder = path.parent
    is_saved = (folder / MANIFEST).is_file() or (folder / "checkpoints").is_dir()
    return path.name == "config.yaml" and is_saved


def saved_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration of a checkpoint or run; its plug-ins are imported.

    One that an older version wrote gets today's names.

    Raises:
        UserError: for a damaged file, a plug-in that cannot be imported, or a setting that is gone.
    """
    file = folder / "config.yaml"
    saved = upgraded(to_plain(read_yaml(file)), file)
    import_plugins(saved["imports"])
    return saved


def without_sources(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The ``model`` block ``spec`` without the files of weights that a checkpoint makes needless.

    Those of a part that was trained whole are, and so is a ``model.init_from`` that is neither
    there nor beside the checkpoint, as `annexe push` puts it: `load_weights` then checks that
    frozen weights are the right ones all the same.

    Args:
        folder: of the checkpoint.

    Raises:
        UserError: for a file that is needed and not there, with the setting that takes its place.
    """
    frozen = {name.partition(".")[0] for name in read_saved_json(folder / "frozen.json")}
    spec = {key: dict(value) if isinstance(value, dict) else value for key, value in spec.items()}

    # All weights of a trained encoder are in the checkpoint
    for part in ("rgb_encoder", "depth_branch"):
        if spec[part].get("weights") is not None and part not in frozen:
            spec[part] |= {"weights": None, "init": "random"}
    if spec["rgb_encoder"].get("path") is not None and "rgb_encoder" not in frozen:
        spec["rgb_encoder"] |= {"path": str(folder / "rgb_encoder"), "init": "random"}

    # What the run started from is needed for frozen weights alone
    init_from = spec.get("init_from")
    if init_from is not None and (folder / init_from).exists():
        spec |= {"init_from": str(folder / init_from)}
    elif init_from is not None and not Path(init_from).exists():
        message = "model.init_from '%s' is not here; what was trained from it is in '%s'"
        log.warning(message, init_from, folder)
        spec |= {"init_from": None, "init": "random"}

    # Every other file has to be there
    sources = [("rgb_encoder", "weights"), ("rgb_encoder", "path")]
    sources += [("depth_branch", "weights"), ("language_model", "path")]
    for part, setting in sources:
        path = spec[part].get(setting)
        if path is not None and not Path(path).exists():
            raise UserError(
                f"model.{part}.{setting}: '{path}' is not here, and the checkpoint '{folder}' "
                f"cannot do without it; say where it is: --options model.{part}.{setting}=PATH"
            )
    return spec
