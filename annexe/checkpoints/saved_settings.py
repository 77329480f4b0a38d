"""Settings of a checkpoint beside those of today: older names, and what a difference means."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from annexe.checkpoints.manifest import Changes, shown
from annexe.errors import UserError

# Settings that 0.1 had under another name
_RENAMED = {
    "model.bind_answers": "model.constrain_answers",
    "model.merge": "model.projector.patches_per_token",
    "model.name_patches": "model.image_token_head",
    "model.pixel_decoder.focused": "model.pixel_decoder.masked_attention",
    "model.pixel_decoder.reads": "model.pixel_decoder.conditioning",
    "model.patches_per_token": "model.projector.patches_per_token",
    "model.pixel_decoder.told_presence": "model.pixel_decoder.presence_from_prompt",
    "run.loss_weights.patch_phrase": "run.loss_weights.image_token_labels",
    "run.loss_weights.points": "run.loss_weights.hard_pixel",
}
# Settings that are gone, with the value that every model has now
_REMOVED = {
    "model.pixel_decoder.words": False,
    "model.pixel_decoder.pixels": "both",
    "model.pixel_decoder.supervised_layers": True,
    "model.pixel_decoder.language_gradients": True,
}

# Settings of the model, by the last part of their name, that trained weights do not depend on:
# where weights come from, precision, memory, what is dropped in training, how answers are given
_FREE = (
    *("init", "init_from", "weights", "path", "initializer_range"),
    *("dtype", "checkpointed_blocks", "dropout", "max_position_embeddings"),
    *("presence_threshold", "constrain_answers"),
)
# Settings of a Llama that its folder replaces
_SIZES_OF_LLAMA = ("hidden_size", "num_layers", "num_heads", "mlp_dim")
# Settings of the model that change what weights compute and not their shapes
_UNSEEN_IN_SHAPES = ("num_heads", "statistics", "alpha", "version")
# Settings that mean the same where they are null
_SAME_AS_NULL = {"model.depth_branch.version": "v2"}
# Settings of a run that fix its random numbers, what the optimizer keeps, or what is trained
_FIXED_OF_RUN = ("run.seed", "run.optimizer", "run.objective")
# Settings that say where a run is, not what it is
_PLACES = ("run.resume", "run.output_dir", "run.checkpoint")
_MAX_SHOWN = 3  # settings in a message


def upgraded(settings: dict[str, Any], where: object) -> dict[str, Any]:
    """A saved configuration of this or an older version, with today's names.

    Args:
        where: the file, for messages.

    Raises:
        UserError: for a setting that is gone, with a value that nothing computes any more.
    """
    flat = flatten(settings)
    for name, value in _REMOVED.items():
        if flat.pop(name, value) != value:
            raise UserError(
                f"'{where}' sets {name}, which no model has any more; use annexe 0.1 for this run"
            )
    renamed = {_RENAMED.get(name, name): value for name, value in flat.items()}
    if "model.projector.patches_per_token" in renamed:
        renamed.setdefault("model.projector.type", "concat")  # before it had a type
    return _nested(renamed)


def flatten(block: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """All values in a nest of blocks, by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in block.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `flatten`."""
    settings: dict[str, Any] = {}
    for name, value in flat.items():
        *blocks, key = name.split(".")
        block = settings
        for each in blocks:
            block = block.setdefault(each, {})
        block[key] = value
    return settings


def changed_settings(saved: Mapping[str, Any], here: Mapping[str, Any]) -> Changes:
    """Settings that differ, each with the saved value and that of here; None where it has none."""
    before = flatten(saved)
    after = flatten(here)
    changes: Changes = {}
    for name in [*before, *(name for name in after if name not in before)]:
        null = _SAME_AS_NULL.get(name)
        old = null if before.get(name) is None else before[name]
        new = null if after.get(name) is None else after[name]
        if old != new and name not in _PLACES:
            changes[name] = (old, new)
    return changes


def require_same_meaning(
    checkpoint: Path, saved: Mapping[str, Any], here: Mapping[str, Any]
) -> Changes:
    """Compare the settings of here with those that a checkpoint was trained with.

    Args:
        saved: a configuration, or a part of one; blocks of the model with every default filled in.
        here: the same of today.

    Returns:
        All differences that a user may have meant.

    Raises:
        UserError: for settings that change what the trained weights mean.
    """
    changes = changed_settings(saved, here)
    fixed: Changes = {}
    for name, values in changes.items():
        if _is_fixed(name, values, here):
            fixed[name] = values
    if fixed:
        is_model = any(name.startswith("model.") for name in fixed)
        raise UserError(
            f"checkpoint '{checkpoint}' is of another {'model' if is_model else 'run'}: "
            f"{_compared(fixed)}; set {_options(fixed)} as in its config.yaml"
        )
    return changes


def _is_fixed(name: str, values: tuple[Any, Any], here: Mapping[str, Any]) -> bool:
    """Whether a setting may not differ from that of the checkpoint."""
    if name in _FIXED_OF_RUN:
        return True
    if name.startswith("datasets."):
        return name.endswith(".answer_format") and None not in values
    return name.startswith("model.") and _has_meaning(name, here["model"])


def _has_meaning(name: str, model: Mapping[str, Any]) -> bool:
    """Whether a setting of the model changes what its trained weights mean."""
    block, _, last = name.rpartition(".")
    if block == "model.language_model" and model["language_model"].get("path") is not None:
        return last not in (*_FREE, *_SIZES_OF_LLAMA)
    return last not in _FREE


def compare_start(folder: Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> Changes:
    """Compare a ``model`` block with that of the run that it starts from (``model.init_from``).

    Tensors that do not fit show themselves when they are loaded, and a part of another type takes
    none. What is compared is what their shapes do not tell.

    Args:
        folder: the checkpoint to start from.
        saved: its ``model`` block, with every default filled in.
        here: that of the new run.

    Returns:
        Other differences in parts of the same type.

    Raises:
        UserError: for settings with which the loaded weights compute something else.
    """
    # Parts of another type take none of the weights
    others = [
        part
        for part, block in here.items()
        if isinstance(block, Mapping) and block.get("type") != saved.get(part, {}).get("type")
    ]

    # What shapes do not tell is refused, the rest is told
    fixed: Changes = {}
    told: Changes = {}
    for name, values in changed_settings({"model": saved}, {"model": here}).items():
        part, _, last = name.removeprefix("model.").rpartition(".")
        if part.partition(".")[0] in others or not _has_meaning(name, here):
            continue
        changes = fixed if last in _UNSEEN_IN_SHAPES else told
        changes[name] = values
    if fixed:
        raise UserError(
            f"model.init_from: '{folder}' was trained with other settings, under which its weights "
            f"mean something else: {_compared(fixed)}; set {_options(fixed)}"
        )
    return told


def _compared(changes: Changes) -> str:
    parts = []
    for name, (saved, here) in list(changes.items())[:_MAX_SHOWN]:
        parts.append(f"{name} is {shown(here)} here and {shown(saved)} there")
    if len(changes) > _MAX_SHOWN:
        parts.append(f"{len(changes) - _MAX_SHOWN} more differ")
    return ", ".join(parts)


def _options(changes: Changes) -> str:
    shown_first = list(changes.items())[:_MAX_SHOWN]
    return " ".join(f"{name}={shown(saved)}" for name, (saved, _) in shown_first)
