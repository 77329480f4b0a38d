"""What a run starts from (``model.init_from``): a run or an export of ours, or a public checkpoint.

Runs and exports bring settings, a tokenizer, and a few values of the weights that were frozen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from annexe.checkpoints.run_folder import find_checkpoint, require_checkpoint, saved_config
from annexe.checkpoints.tensor_files import HEADS
from annexe.errors import UserError


def folder_of_start(path: Path) -> Path | None:
    """The folder with the settings that belong to ``path``: of a checkpoint or an export.

    Args:
        path: run, checkpoint or export, or a file of weights in one of the last two.

    Returns:
        The folder; of a run that of its best checkpoint. None where ``path`` is none of these.
    """
    folder = find_checkpoint(path, "best")
    if folder is not None:
        return folder
    folder = path.parent if path.suffix == ".safetensors" else path
    is_export = (folder / HEADS).is_file()
    is_ours = (folder / "config.yaml").is_file() and (is_export or folder != path)
    return folder if is_ours else None


def settings_of_start(start: str) -> dict[str, Any]:
    """The ``model`` block of what ``model.init_from`` names, without where its weights came from.

    Raises:
        UserError: for anything but a run or an export, and for an incomplete one.
    """
    path = Path(start)
    if not path.exists():
        raise UserError(f"model.init_from: there is nothing at '{path}'; give a run or an export")
    folder = folder_of_start(path)
    if folder is None and (path / "checkpoints").is_dir():
        folder = require_checkpoint(start, "best")
    if folder is None:
        raise UserError(
            f"model.init_from: '{path}' is no run and no export of annexe, so it does not say what "
            "model it is of; describe every part under model, as train_configs/annexe.yaml does"
        )
    if not (folder / "frozen.json").is_file():
        raise UserError(
            f"model.init_from: the export '{folder}' has no frozen.json, which older versions did "
            "not write; export its run again"
        )
    settings = saved_config(folder)["model"]
    del settings["init_from"], settings["init"]
    return settings
