"""Data and weights that `annexe download` knows by name, and the settings that take them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from annexe.errors import UserError
from annexe.hub.client import RemoteFile, Repository


@dataclass(frozen=True)
class Item:
    """Something to download.

    Attributes:
        name: for people.
        repository: on the hub.
        kind: of the repository.
        files: patterns of what is taken; () takes all of a data set.
        license: as published, in a few words.
        setting: takes its path.
        others: further settings that go with it.
        instead: where else it is, for a repository that is gone.
    """

    name: str
    repository: str
    kind: str
    files: tuple[str, ...]
    license: str
    setting: str
    others: Mapping[str, Any] = field(default_factory=dict)
    is_gated: bool = False
    instead: str = ""

    @property
    def is_data(self) -> bool:
        """Whether it is a data set, which is unpacked."""
        return not self.files

    @property
    def folder(self) -> Path:
        """Where it goes unless another folder is named, in the folder of the command."""
        return Path("data" if self.is_data else "weights", self.name)

    def chosen(self, repository: Repository) -> list[RemoteFile]:
        """The files of its repository that are taken.

        Raises:
            UserError: if a pattern matches none.
        """
        chosen: dict[str, RemoteFile] = {}
        for pattern in self.files:
            found = [file for file in repository.files if fnmatch.fnmatch(file.name, pattern)]
            if not found:
                advice = f"; {self.instead}" if self.instead else ""
                raise UserError(f"'{repository.name}' has no file {pattern} any more{advice}")
            chosen |= {file.name: file for file in found}
        return list(chosen.values())

    def settings(self, folder: Path) -> str:
        """The lines of a configuration that use what lies in ``folder``."""
        is_file = len(self.files) == 1
        path = folder / self.files[0] if is_file else folder
        block = OmegaConf.create()
        for name, value in {self.setting: str(path), **self.others}.items():
            OmegaConf.update(block, name, value)
        return OmegaConf.to_yaml(block).rstrip()


def _depth_anything(size: str, folder: str, license: str) -> Item:
    return Item(
        name=f"depth-anything-v2-{folder.lower()}",
        repository=f"depth-anything/Depth-Anything-V2-{folder}",
        kind="model",
        files=(f"depth_anything_v2_{size}.pth",),
        license=license,
        setting="model.depth_branch.weights",
        others={"model.depth_branch.size": size},
    )


ITEMS = (
    Item(
        name="ego-irgbench",
        repository="yuki3585/Ego-IEGBench",
        kind="dataset",
        files=(),
        license="as its page says",
        setting="datasets.ego_irgbench.data_root",
    ),
    Item(
        name="eva-clip-g",
        repository="timm/eva_giant_patch14_clip_224.laion400m",
        kind="model",
        files=("model.safetensors",),
        license="MIT",
        setting="model.rgb_encoder.weights",
        instead="eva_vit_g.pth of LAVIS holds the same model",
    ),
    _depth_anything("vits", "Small", "Apache 2.0"),
    _depth_anything("vitb", "Base", "CC BY-NC 4.0"),
    _depth_anything("vitl", "Large", "CC BY-NC 4.0"),
    Item(
        name="minigpt-v2",
        repository="Vision-CAIR/MiniGPT-v2",
        kind="space",
        files=("minigptv2_checkpoint.pth",),
        license="BSD 3-Clause, on Llama 2",
        setting="model.init_from",
        instead="the README of github.com/Vision-CAIR/MiniGPT-4 links to it",
    ),
    Item(
        name="llama-2-7b-chat",
        repository="meta-llama/Llama-2-7b-chat-hf",
        kind="model",
        files=("config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*"),
        license="Llama 2 Community License",
        is_gated=True,
        setting="model.language_model.path",
    ),
)


def find_item(name: str) -> Item | None:
    """What a name means, whatever its case; None if it is in no catalog."""
    found = [item for item in ITEMS if item.name == name.lower()]
    return found[0] if found else None


def public_path(path: str, items: Sequence[Item] = ITEMS) -> str:
    """A path of public weights without the folders of the machine where they lie.

    Files and folders that the catalog knows get the place that `annexe download` gives them.
    """
    last = Path(path).name
    for item in items:
        if item.is_data:
            continue
        folder_names = (item.name, Path(item.repository).name)
        if len(item.files) == 1 and last == item.files[0] and last != "model.safetensors":
            return str(item.folder / last)
        if last == "model.safetensors" and Path(path).parent.name in folder_names:
            return str(item.folder / last)
        if len(item.files) > 1 and last in folder_names:
            return str(item.folder)
    return f"path/to/{last}"
