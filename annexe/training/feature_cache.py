"""Patches of a frozen RGB encoder on disk, so that no photo is encoded in every epoch.

Legend: B photos of a batch, P patches of a photo, E width of the encoder, S image side.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import BatchSampler, Dataset

from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.loader import make_loader
from annexe.distributed import require_shared
from annexe.errors import UserError
from annexe.files import locked, named, part_of, replaced
from annexe.terminal import track

log = logging.getLogger(__name__)

_BYTES = 2  # of a bfloat16 value


class PatchEncoder(Protocol):
    """A frozen RGB encoder, as far as its patches are stored; an ``nn.Module``.

    Attributes:
        grid: patches a side.
        embed_dim: E.
    """

    grid: int
    embed_dim: int

    def __call__(self, images: Tensor) -> Tensor:
        """Encode float[B, 3, S, S] in [0, 1] to float[B, P, E]."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights."""


class IndexedPhotos(Dataset):
    """The photos of a data set, uint8[3, S, S], each with its index."""

    def __init__(self, dataset: EgoIRGBench) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        image = self.dataset.evaluation_sample(index).image  # uint8[S, S, 3]
        return index, torch.tensor(image).permute(2, 0, 1)


class StoredPatches(Sequence[Tensor]):
    """One file with the patches of every photo of a split, bfloat16[P, E], in its order.

    Args:
        path: the file.
        shape: P and E.
    """

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self.path = path
        self.shape = shape
        self.size = math.prod(shape)

    def __len__(self) -> int:
        return self.path.stat().st_size // (_BYTES * self.size)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # no slices
        start = index * _BYTES * self.size
        values = np.fromfile(self.path, np.int16, self.size, offset=start)
        return torch.from_numpy(values).view(torch.bfloat16).view(self.shape)


def stored_patches(
    encoder: PatchEncoder,
    dataset: EgoIRGBench,
    folder: Path,
    accelerator: Accelerator,
    *,
    settings: dict[str, Any],
    batch_size: int,
    num_workers: int,
) -> StoredPatches:
    """The patches that a frozen encoder makes of every photo, from ``folder`` or written there now.

    The name of the file is a hash of the data set's files, the encoder's settings, the precision
    and some of its weights. Every process writes its share. If another run stores patches in the
    same folder, this one waits for it.

    Args:
        encoder: makes the patches.
        dataset: the photos.
        folder: where files of patches are stored.
        accelerator: the processes that share the work.
        settings: of the encoder.
        batch_size: photos that are encoded at once.
        num_workers: processes that read photos.

    Raises:
        UserError: if the encoder is trained, or the disk has no room.
    """
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        raise UserError(
            "run.store_patches needs model.rgb_encoder.frozen=true (trained=none of types other "
            "than eva_vit): patches of a trained encoder change"
        )
    # Behind the patches there may be further levels of the encoder
    shape = (encoder.grid**2, getattr(encoder, "num_channels", encoder.embed_dim))
    num_bytes = _BYTES * math.prod(shape) * len(dataset)
    settings = {**settings, "precision": accelerator.mixed_precision}
    path = folder / f"{_name(encoder, dataset, settings)}.patches"

    # One run at a time; its main process holds the lock for all of its processes
    with locked(folder, wait=True) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        require_shared(accelerator, folder, "run.store_patches")
        if not (path.is_file() and path.stat().st_size == num_bytes):
            if accelerator.is_main_process:
                _require_room(folder, num_bytes)
                log.info(
                    "storing the patches of %d photos, %.1f GB, in '%s'",
                    len(dataset),
                    num_bytes / 1e9,
                    path,
                )
            _store(encoder, dataset, path, num_bytes, accelerator, batch_size, num_workers)
    return StoredPatches(path, shape)


def _require_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"run.store_patches: {num_bytes / 1e9:.1f} GB are needed in '{folder}' and "
            f"{free / 1e9:.1f} GB are free; set another folder, or null"
        )


def _store(
    encoder: PatchEncoder,
    dataset: EgoIRGBench,
    path: Path,
    num_bytes: int,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int,
) -> None:
    """Write the patches of all photos to ``path``, all of them or nothing."""
    is_main = accelerator.is_main_process
    with replaced(path) if is_main else nullcontext(part_of(path)) as part:
        # The main process makes the file at its full size
        if is_main:
            with part.open("wb") as file:
                file.truncate(num_bytes)
        accelerator.wait_for_everyone()

        # Every process writes the patches of its photos to their places
        of_process = range(accelerator.process_index, len(dataset), accelerator.num_processes)
        loader = make_loader(
            IndexedPhotos(dataset),
            BatchSampler(of_process, batch_size, drop_last=False),
            _stack,
            num_workers=num_workers,
            device=accelerator.device,
        )
        with named(path), part.open("r+b") as file, torch.no_grad(), accelerator.autocast():
            for indices, batch in track(loader, "storing patches", disable=not is_main):
                patches = encoder(batch.to(accelerator.device).float() / 255)
                values = patches.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy()
                for index, photo in zip(indices, values, strict=True):
                    file.seek(index * photo.nbytes)
                    file.write(photo.tobytes())
        accelerator.wait_for_everyone()
    accelerator.wait_for_everyone()  # until the main process has renamed the file


def _stack(items: list[tuple[int, Tensor]]) -> tuple[list[int], Tensor]:
    """Photos with their indices to a batch: uint8[B, 3, S, S]."""
    return [index for index, _ in items], torch.stack([photo for _, photo in items])


def _name(encoder: PatchEncoder, dataset: EgoIRGBench, settings: dict[str, Any]) -> str:
    """Hash of everything that the patches depend on."""
    weights = []
    for parameter in encoder.parameters():
        weights.append(float(parameter.detach().flatten()[:64].double().sum()))
    made_from = [dataset.fingerprint(), settings, weights]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
