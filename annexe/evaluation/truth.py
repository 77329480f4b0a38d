"""What is right: annotations and true masks of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from annexe.datasets.annotations import Annotation
from annexe.datasets.pixels import image_size, read_id_map, require_ids
from annexe.errors import UserError
from annexe.rle import Rle, area, encode_ids
from annexe.structures.sample import Sample


class ImageFiles(Protocol):
    """Where the files of an image are."""

    def files(self, stem: str) -> tuple[Path, Path | None, Path]:
        """Photo, depth map if there is one, and id map."""


class LabeledDataset(Protocol):
    """One split of a data set, as evaluation and scoring use it.

    Attributes:
        root: the data root.
        split: name of the split.
        stems: names of its images.
        has_text: whether analyses and answers are scored.
    """

    root: Path
    split: str
    stems: list[str]
    has_text: bool

    @property
    def answer_format(self) -> str | None:
        """``sentence`` or ``phrases``; None where answers are not scored."""

    @property
    def annotations(self) -> Sequence[list[Annotation]]:
        """Annotations of every image, in the order of the stems."""

    @property
    def pixels(self) -> ImageFiles:
        """Where the files of an image are."""

    def __len__(self) -> int:
        """Number of images."""

    def evaluation_sample(self, index: int, queries_per_annotation: int | str) -> Sample:
        """An image with its questions."""

    def annotations_of(self, split: str) -> Sequence[list[Annotation]]:
        """Annotations of another split; none where it has no texts."""

    def reference(self, annotation: Annotation) -> str:
        """The true answer."""

    def label(self, stem: str, phrase: str) -> str:
        """Group of the target that is called ``phrase``."""

    def extra_scores(self, overlaps: Iterable[tuple[int, int, int]]) -> dict[str, float]:
        """Scores of this data set alone.

        Args:
            overlaps: of every query the index of its annotation, and intersection and union of its
                predicted and true masks, in pixels.
        """

    def fingerprint(self) -> str:
        """Hash of the data: it changes with what predictions and scores depend on."""


class ImageTexts(NamedTuple):
    """The true texts of an image."""

    caption: str
    references: list[str]  # the true answer of each annotation
    has_target: list[bool]  # of each annotation


class Truth:
    """Annotations and true masks by stem; masks as RLE at the size of the photo.

    Attributes:
        dataset: the data set.
        mask_cache: stem -> masks by id, of the images that were read before.
    """

    def __init__(self, dataset: LabeledDataset) -> None:
        self.dataset = dataset
        self.mask_cache: dict[str, dict[int, Rle]] = {}
        self._index = {stem: index for index, stem in enumerate(dataset.stems)}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._texts: dict[str, ImageTexts] = {}
        self._latest: tuple[str, list[Annotation]] = ("", [])

    def annotations(self, stem: str) -> list[Annotation]:
        """Annotations of an image.

        Raises:
            UserError: the split does not have the image.
        """
        if stem not in self._index:
            raise UserError(
                f"predicted image '{stem}' is not in split '{self.dataset.split}'; "
                "choose the right split and data root"
            )
        # Decoded anew at every access, and asked for query by query
        if stem != self._latest[0]:
            self._latest = (stem, self.dataset.annotations[self._index[stem]])
        return self._latest[1]

    def texts(self, stem: str) -> ImageTexts:
        """The true texts of an image; kept, because every score asks for them.

        Raises:
            UserError: the split does not have the image.
        """
        if stem not in self._texts:
            annotations = self.annotations(stem)
            self._texts[stem] = ImageTexts(
                caption=annotations[0].caption,
                references=[self.dataset.reference(annotation) for annotation in annotations],
                has_target=[bool(annotation.slots) for annotation in annotations],
            )
        return self._texts[stem]

    def masks(self, stem: str) -> dict[int, Rle]:
        """Mask id -> RLE, of every id that an annotation of the image names.

        Raises:
            UserError: the id map cannot be read, is not of the photo's size, or lacks one of them.
        """
        if stem not in self.mask_cache:
            self.mask_cache[stem] = read_true_masks(
                self.id_map(stem), self.named_ids(stem), self.size(stem)
            )
        return self.mask_cache[stem]

    def named_ids(self, stem: str) -> list[int]:
        """Ids that an annotation of the image names, in ascending order."""
        named: set[int] = set()
        for annotation in self.annotations(stem):
            named.update(annotation.slots.values())
        return sorted(named)

    def id_map(self, stem: str) -> Path:
        """The image file with the ids of all objects."""
        return self.dataset.pixels.files(stem)[2]

    def size(self, stem: str) -> tuple[int, int]:
        """Height and width of a photo as it is stored, whatever its EXIF orientation.

        Raises:
            UserError: the photo cannot be read.
        """
        if stem not in self._sizes:
            self._sizes[stem] = image_size(self.dataset.pixels.files(stem)[0])
        return self._sizes[stem]


def read_true_masks(id_map: Path, ids: list[int], size: tuple[int, int]) -> dict[int, Rle]:
    """The masks of some ids of a map.

    Args:
        id_map: the file.
        ids: those that annotations name.
        size: height and width of the photo.

    Returns:
        Mask id -> RLE.

    Raises:
        UserError: the id map cannot be read, is not of the photo's size, or an id has no pixel in
            it, as in training.
    """
    masks = encode_ids(read_id_map(id_map, ids, photo_size=size[::-1]), ids)
    require_ids({mask_id for mask_id, rle in masks.items() if not area([rle])}, id_map)
    return masks
