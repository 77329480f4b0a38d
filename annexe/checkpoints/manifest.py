"""Manifests: with what a run was trained, and what changed whenever it went on."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from pathlib import Path
from typing import Any

from annexe import __version__

MANIFEST_FILE = "manifest.json"  # of a run and of each of its checkpoints
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "timm",
    "accelerate",
    "omegaconf",
    "numpy",
    "pycocotools",
    "nltk",
)
# Packages whose modules the model wraps, and ours
_NAMING_PACKAGES = ("annexe", "transformers", "timm", "peft")
_DIGEST_LENGTH = 12  # characters of a hash in a message

Changes = dict[str, tuple[Any, Any]]  # by name, what was and what is


def make_manifest(fingerprint: str, history: list[dict[str, Any]]) -> dict[str, Any]:
    """What is needed to tell with what a run goes on from now.

    Args:
        fingerprint: a hash of the data.
        history: what changed before, as `with_changes` gives it.
    """
    return {
        "annexe": __version__,
        "git_commit": git_commit(),
        "packages": installed_packages(),
        "data_fingerprint": fingerprint,
        "history": history,
    }


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, or of its run; empty where there is none to read."""
    for folder in (checkpoint, checkpoint.parent.parent):
        try:
            manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(manifest, dict):
            return manifest
    return {}


def changes_since(saved: dict[str, Any], fingerprint: str) -> Changes:
    """What differs from a ``saved`` manifest: versions, and the data.

    Args:
        saved: as `read_manifest` gives it; what it lacks did not change.
        fingerprint: a hash of the data as it is.
    """
    changes: Changes = {}
    before = _versions_of(saved)
    for name, version in installed_versions().items():
        if before.get(name, version) != version:
            changes[name] = (before[name], version)
    known = saved.get("data_fingerprint", fingerprint)
    if known != fingerprint:
        changes["data_fingerprint"] = (known, fingerprint)
    return changes


def with_changes(saved: dict[str, Any], step: int, changes: Changes) -> list[dict[str, Any]]:
    """The history of a run that goes on from ``step``: that of the ``saved`` manifest and more."""
    history = list(saved.get("history", []))
    if changes:
        changed = {name: list(values) for name, values in changes.items()}
        history.append({"step": step, "changed": changed})
    return history


def describe_changes(changes: Changes) -> str:
    """All changes in one line."""
    parts = []
    for name, (before, after) in changes.items():
        if name == "data_fingerprint":
            before = before[:_DIGEST_LENGTH]
            after = after[:_DIGEST_LENGTH]
            if "annexe" in changes:
                after += " (another version of annexe may hash the same data otherwise)"
        parts.append(f"{name} {shown(before)} -> {shown(after)}")
    return ", ".join(parts)


def explain_versions(checkpoint: Path) -> str:
    """A clause on libraries of other versions than a checkpoint was written with, or ''."""
    saved = _versions_of(read_manifest(checkpoint))
    installed = installed_versions()
    others = []
    for name in _NAMING_PACKAGES:
        if saved.get(name, installed[name]) != installed[name]:
            others.append(f"{name} {saved[name]} (here {installed[name]})")
    return f"; it was written with {', '.join(others)}" if others else ""


def shown(value: object) -> str:
    """A value of a setting as it stands in YAML."""
    if isinstance(value, str):
        return value
    is_whole = isinstance(value, float) and value.is_integer()
    return f"{value:.0f}" if is_whole else json.dumps(value)


def installed_packages() -> dict[str, str]:
    """Versions of the packages that a run depends on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def installed_versions() -> dict[str, str]:
    """Versions of annexe and of the packages that a run depends on."""
    return {**installed_packages(), "annexe": __version__}


def _versions_of(manifest: dict[str, Any]) -> dict[str, str]:
    """Versions of annexe and of the packages in a manifest, as far as they are there."""
    versions = dict(manifest.get("packages", {}))
    if "annexe" in manifest:
        versions["annexe"] = manifest["annexe"]
    return versions


def git_commit() -> str | None:
    """Commit of the source tree, where it is a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
