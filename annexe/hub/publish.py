"""A checkpoint as it is given to others: what answers need, without what tells of its machine.

A published folder is a checkpoint that `annexe.checkpoints.run_folder` reads. The optimizer's
moments and random states are left out, paths are replaced, and README.md is its model card.
"""

from __future__ import annotations

import shutil
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors import safe_open

from annexe.checkpoints.manifest import MANIFEST_FILE, read_manifest
from annexe.checkpoints.run_folder import (
    evaluation_of,
    find_checkpoint,
    load_progress,
    read_saved,
    read_saved_json,
    run_of,
    saved_config,
)
from annexe.checkpoints.training_state import seal
from annexe.config import RunConfig, WandbConfig
from annexe.files import write_json
from annexe.hub.catalog import public_path
from annexe.hub.client import connected, one_line
from annexe.hub.runs import START, name_on_hub
from annexe.hub.transfer import PARTS
from annexe.settings import PathSetting

CARD = "README.md"
_FILES = ("model.safetensors", "state.json", "frozen.json")
_SCORES = ("standard", "intervals")
# What shaped an evaluation; other entries of its meta tell of a machine
_PROTOCOL = (
    *("dataset", "split", "queries_per_annotation", "answer_format", "seed", "step"),
    *("batch_size", "max_new_tokens", "presence_thresholds", "data_fingerprint"),
    *("num_queries", "num_annotations"),
)
_SOURCES = (
    ("rgb_encoder", "weights"),
    ("rgb_encoder", "path"),
    ("depth_branch", "weights"),
    ("language_model", "path"),
)
_DATA_ROOT = "path/to/data"


@dataclass
class Published:
    """What a published checkpoint is, for its card.

    Attributes:
        settings: the configuration, without paths of the machine.
        needed: by setting, public weights that the checkpoint does not hold.
        started_from: what the training started from, if the run or file has a name.
        has_start: the run that it started from lies beside it.
        manifest: versions and hash of the data.
        scores: of an evaluation of this checkpoint; empty without one.
        replaced: settings whose value was a path, or private.
    """

    settings: dict[str, Any]
    manifest: dict[str, Any]
    progress: dict[str, Any]
    needed: dict[str, str] = field(default_factory=dict)
    started_from: str | None = None
    has_start: bool = False
    scores: dict[str, Any] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)


def publish(checkpoint: Path, folder: Path, name: str) -> Published:
    """Write what others need of a checkpoint to a new ``folder``, all but its card.

    Args:
        name: that the run gets, such as that of its repository.

    Raises:
        UserError: for damaged files, or a configuration that this version does not know.
    """
    # Files as they are, if the weights can be read
    read_saved(checkpoint / "model.safetensors", _num_tensors)
    folder.mkdir(parents=True)
    for file in _FILES:
        shutil.copyfile(checkpoint / file, folder / file)
    for path in sorted(checkpoint.glob("*/**/*")):
        inner = path.relative_to(checkpoint)
        if path.is_file() and inner.parts[0] not in (START, PARTS):
            _copy_without_paths(path, folder / inner)

    # What is said of them, without paths of the machine
    published = Published(
        settings=saved_config(checkpoint),
        manifest=_public_manifest(checkpoint),
        progress=asdict(load_progress(checkpoint)),
        scores=_public_scores(checkpoint),
    )
    _replace_weights(published, checkpoint, folder)
    _replace_paths(published, name)

    # Written and sealed
    OmegaConf.save(OmegaConf.create(published.settings), folder / "config.yaml")
    write_json(folder / MANIFEST_FILE, published.manifest)
    if published.scores:
        write_json(folder / "metrics.json", published.scores)
    seal(folder)  # the card comes later, since people edit cards
    return published


def _num_tensors(file: Path) -> int:
    """How many tensors the header of a safetensors file names."""
    with safe_open(file, "pt") as weights:
        return len(weights.keys())


def _public_manifest(checkpoint: Path) -> dict[str, Any]:
    """Versions and hash of the data; the history of a run has its paths in it."""
    manifest = read_manifest(checkpoint)
    kept = ("annexe", "git_commit", "packages", "data_fingerprint")
    return {key: manifest[key] for key in kept if key in manifest}


def _public_scores(checkpoint: Path) -> dict[str, Any]:
    """The scores of an evaluation of this very checkpoint; empty if there is none."""
    metrics = evaluation_of(run_of(checkpoint))
    meta = metrics.get("meta", {})
    if meta.get("step") != load_progress(checkpoint).step:
        return {}
    scores = {key: metrics[key] for key in _SCORES if key in metrics}
    scores["meta"] = {key: meta[key] for key in _PROTOCOL if key in meta}
    return scores


def _replace_weights(published: Published, checkpoint: Path, folder: Path) -> None:
    """Name public weights by where others find them, and leave out what the checkpoint holds."""
    model = published.settings["model"]
    frozen = read_saved_json(checkpoint / "frozen.json")
    frozen_parts = {name.partition(".")[0] for name in frozen}
    for part, setting in _SOURCES:
        path = model.get(part, {}).get(setting)
        is_encoder = part != "language_model"
        if path is None:
            continue
        if is_encoder and part not in frozen_parts and setting == "weights":
            model[part] |= {"weights": None, "init": "random"}
            continue
        model[part][setting] = public_path(path)
        if part in frozen_parts or not is_encoder:
            published.needed[f"model.{part}.{setting}"] = model[part][setting]

    # What it started from matters for frozen weights alone
    start = model.get("init_from")
    if start is None:
        return
    published.started_from = name_on_hub(start) or public_path(start)
    beside = checkpoint / start
    earlier = find_checkpoint(beside if beside.exists() else Path(start), "best")
    if not frozen:
        model |= {"init_from": None, "init": "random"}
    elif earlier is not None:
        publish(earlier, folder / START, START)
        published.has_start = True
        model["init_from"] = START
    else:
        model["init_from"] = public_path(start)
        published.needed["model.init_from"] = model["init_from"]


def _replace_paths(published: Published, name: str) -> None:
    """Replace all other paths, and the names of an account, by values that say nothing."""
    settings = published.settings
    for key, value in settings["run"].items():
        if _is_path_setting(key) and value not in (None, "auto"):
            settings["run"][key] = f"runs/{name}" if key == "output_dir" else None
            published.replaced.append(f"run.{key}")
    if settings["run"].get("wandb") not in (None, asdict(WandbConfig())):
        settings["run"]["wandb"] = asdict(WandbConfig())
        published.replaced.append("run.wandb")
    _walk(settings["datasets"], "datasets", published)
    _walk(settings["model"], "model", published)


def _is_path_setting(name: str) -> bool:
    """Whether a setting of a run is a path."""
    hint = typing.get_type_hints(RunConfig, include_extras=True).get(name)
    return PathSetting in (hint, *typing.get_args(hint))


def _walk(block: Any, where: str, published: Published) -> None:
    """Replace the paths in a block of settings, and in blocks and lists in it."""
    items = list(block.items()) if isinstance(block, dict) else list(enumerate(block))
    for key, value in items:
        place = f"{where}.{key}"
        if isinstance(value, dict | list):
            _walk(value, place, published)
        elif isinstance(value, str) and _is_private(place, value):
            is_root = str(key).endswith("root")
            block[key] = _DATA_ROOT if is_root else None
            published.replaced.append(place)


def _is_private(place: str, value: str) -> bool:
    """Whether a setting is a path that was not replaced yet."""
    if place in [f"model.{part}.{setting}" for part, setting in _SOURCES]:
        return False  # replaced before
    if place == "model.init_from":
        return False
    if place.startswith("model."):
        return value.startswith(("/", "~", "\\"))  # names of models on the hub have a slash, too
    is_path = place.endswith(("root", ".exclude", ".split_dir"))
    return is_path or "/" in value or "\\" in value or value.startswith("~")


def _copy_without_paths(file: Path, copy: Path) -> None:
    """Copy a file of a library, of an adapter, a tokenizer or an encoder, without paths in it."""
    if file.name == CARD:
        return  # peft's card of an adapter
    copy.parent.mkdir(parents=True, exist_ok=True)
    content: Any = read_saved_json(file) if file.suffix == ".json" else None
    is_changed = False
    for key, value in content.items() if isinstance(content, dict) else ():
        if key.endswith("name_or_path") and isinstance(value, str) and "/" in value:
            content[key] = public_path(value)
            is_changed = True
    if is_changed:
        write_json(copy, content)
    else:
        shutil.copyfile(file, copy)


@contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """No bars of the library in a file or a log."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    is_quiet = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if is_quiet:
        disable_progress_bars()
    try:
        yield
    finally:
        if is_quiet:
            enable_progress_bars()


def upload(folder: Path, name: str, *, private: bool, message: str) -> str:
    """Make a repository hold the files of a folder, in one commit.

    Files that it had before and that are not in ``folder`` stay, but for those of a run.

    Args:
        name: such as ``user/repo``; it is made if it does not exist.
        private: for one that is made.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        UserError: for a name that cannot be, a missing login or right, and a hub that does not
            answer.
    """
    of_a_run = [*_FILES, "config.yaml", "files.json", MANIFEST_FILE, "metrics.json"]
    of_a_run += [f"{path.name}/*" for path in folder.iterdir() if path.is_dir()]
    of_a_run += ["adapter/*", f"{START}/*"]
    with one_line(name), connected() as api, _quiet_unless_terminal():
        api.create_repo(name, repo_type="model", private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            repo_type="model",
            folder_path=folder,
            commit_message=message,
            delete_patterns=of_a_run,
        )
    return str(commit.commit_url)
