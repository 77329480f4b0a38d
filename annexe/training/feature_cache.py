"""Patches of a frozen RGB encoder on disk, so that training does not encode every photo in every epoch.

Legend: P patches of a photo, E width of the encoder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.errors import UserError
from annexe.files import locked

log = logging.getLogger(__name__)


class IndexedPhotos(Dataset):
    """The photos of a data set alone, each with its index, uint8[3, S, S]."""

    def __init__(self, dataset: EgoIRGBench) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, torch.from_numpy(self.dataset.evaluation_sample(index).image).permute(2, 0, 1)


class StoredPatches:
    """One file with the patches of every photo of a split, bfloat16[P, E] each, in the order of the split."""

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self.path, self.shape, self.size = path, shape, math.prod(shape)

    def __getitem__(self, index: int) -> Tensor:
        values = np.fromfile(self.path, np.int16, self.size, offset=2 * index * self.size)
        return torch.from_numpy(values).view(torch.bfloat16).view(self.shape)


def stored_patches(
    encoder: nn.Module,
    dataset: EgoIRGBench,
    folder: Path,
    accelerator: Accelerator,
    *,
    settings: dict[str, Any],
    batch_size: int,
    num_workers: int,
) -> StoredPatches:
    """The patches that ``encoder`` makes of every photo of ``dataset``, from ``folder`` or written there now.

    The file's name is a hash of the data set's files, the encoder's ``settings``, the precision and some of its
    weights. Every process writes its share; another run that stores in the same folder is waited for.

    Raises:
        UserError: if the encoder is trained, or the disk has no room.
    """
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        raise UserError(
            "run.store_patches needs model.rgb_encoder.frozen=true: patches of a trained encoder change"
        )
    shape = (encoder.grid**2, encoder.embed_dim)
    name = _name(encoder, dataset, {**settings, "precision": accelerator.mixed_precision})
    path, needed = folder / f"{name}.patches", 2 * math.prod(shape) * len(dataset)
    with locked(folder, wait=True) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        if not (path.is_file() and path.stat().st_size == needed):
            _store(
                encoder,
                dataset,
                path,
                needed,
                accelerator,
                batch_size=batch_size,
                num_workers=num_workers,
            )
    return StoredPatches(path, shape)


def _store(
    encoder: nn.Module,
    dataset: EgoIRGBench,
    path: Path,
    needed: int,
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_workers: int,
) -> None:
    """Write the ``needed`` bytes of all patches to ``path``, whole or not at all."""
    folder, part, device = path.parent, path.with_suffix(".part"), accelerator.device
    if accelerator.is_main_process:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise UserError(
                f"run.store_patches: {needed / 1e9:.1f} GB are needed in '{folder}' and {free / 1e9:.1f} GB are free; "
                "set another folder, or null"
            )
        log.info(
            "storing the patches of %d photos, %.1f GB, in '%s'", len(dataset), needed / 1e9, path
        )
        with part.open("wb") as file:
            file.truncate(needed)
    accelerator.wait_for_everyone()
    own = Subset(
        IndexedPhotos(dataset),
        range(accelerator.process_index, len(dataset), accelerator.num_processes),
    )
    loader = DataLoader(
        own, batch_size=batch_size, num_workers=num_workers, generator=torch.Generator()
    )
    with part.open("r+b") as file, torch.no_grad(), accelerator.autocast():
        for indices, photos in track(
            loader, "storing patches", disable=not accelerator.is_main_process
        ):
            patches = encoder(photos.to(device).float() / 255).to(torch.bfloat16).cpu().contiguous()
            for index, values in zip(
                indices.tolist(), patches.view(torch.int16).numpy(), strict=True
            ):
                os.pwrite(file.fileno(), values.tobytes(), index * values.nbytes)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        part.replace(path)
    accelerator.wait_for_everyone()


def _name(encoder: nn.Module, dataset: EgoIRGBench, settings: dict[str, Any]) -> str:
    """What patches depend on, as a file name."""
    weights = [
        float(parameter.detach().flatten()[:64].double().sum())
        for parameter in encoder.parameters()
    ]
    made_from = [dataset.fingerprint(), settings, weights]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
