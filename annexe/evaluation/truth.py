"""What is right: annotations and true masks of a data set."""

from __future__ import annotations

from pathlib import Path

from annexe.datasets.annotations import Annotation
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.pixels import image_size, read_id_map, require_ids
from annexe.errors import UserError
from annexe.rle import Rle, area, encode_ids


class Truth:
    """What a data set says is right, by stem and annotation number; masks as RLE at the original size."""

    def __init__(self, dataset: EgoIRGBench) -> None:
        self.dataset = dataset
        self._index = {stem: number for number, stem in enumerate(dataset.stems)}
        self.known: dict[str, dict[int, Rle]] = {}  # stem -> masks that were read before
        self._sizes: dict[str, tuple[int, int]] = {}

    def annotations(self, stem: str) -> list[Annotation]:
        """Annotations of an image of the split."""
        if stem not in self._index:
            raise UserError(
                f"predicted image '{stem}' is not in split '{self.dataset.split}'; choose the right split and data root"
            )
        return self.dataset.annotations[self._index[stem]]

    def masks(self, stem: str) -> dict[int, Rle]:
        """Mask id -> RLE, for every id that an annotation of the image names."""
        if stem not in self.known:
            self.known[stem] = _true_masks(self.id_map(stem), self.named(stem))
        return self.known[stem]

    def named(self, stem: str) -> list[int]:
        """Ids that an annotation of the image names."""
        return sorted(
            {
                mask_id
                for annotation in self.annotations(stem)
                for mask_id in annotation.slots.values()
            }
        )

    def id_map(self, stem: str) -> Path:
        return self.dataset.pixels.files(stem)[2]

    def size(self, stem: str) -> tuple[int, int]:
        """Height and width of an image."""
        if stem not in self._sizes:
            self._sizes[stem] = image_size(self.id_map(stem))
        return self._sizes[stem]


def _true_masks(id_map: Path, named: list[int]) -> dict[int, Rle]:
    """Mask id -> RLE; every id that an annotation names has to be in the map, as for training."""
    masks = encode_ids(read_id_map(id_map), named)
    require_ids({mask_id for mask_id, rle in masks.items() if not area([rle])}, id_map)
    return masks
