"""Predictions, and the truth of a data root, as photos with labeled regions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pycocotools import mask as coco_mask

from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.image_names import CATEGORIES, SPLITS, annotation_folders
from annexe.datasets.photos import photo_size
from annexe.datasets.pixels import PIXEL_FILES, image_size
from annexe.datasets.target_groups import HANDS, OTHER, target_group
from annexe.errors import UserError
from annexe.evaluation.records import PredictedMask, QueryRecord, Record, read_records, split_kinds
from annexe.evaluation.truth import Truth
from annexe.interchange.labels import (
    LEADING_ARTICLE,
    GivenQuestion,
    ImportReport,
    LabeledImage,
    Region,
)
from annexe.interchange.photo_search import photos_below
from annexe.prompts import phrases_of
from annexe.rle import Rle, area, validate
from annexe.terminal import track

NAMES = ("phrases", "categories")
"""What regions are called: as annotations or answers call them, or hands and HOI4D's categories."""

_MERGED = "of a thing that another answer gives the same name"
_SAME = 0.5  # masks of one name with at least this IoU are of one thing
_CATEGORY_OF_GROUP = {name.replace(" ", "_"): name for name in CATEGORIES.values()}


def name_of_target(phrases: Iterable[str], stem: str, names: str = "phrases") -> str | None:
    """What a target is called, without article.

    Args:
        phrases: of all its mentions.
        stem: name of its photo, whose category counts where no phrase names a kind of thing.
        names: one of `NAMES`.

    Returns:
        The most frequent phrase that names a hand or a category, the shortest of several; else the
        category of the stem; else the most frequent phrase. With ``categories``, the hand or the
        category of that phrase where it has one. None without phrases and category.
    """
    # Phrases by what they name
    counts = Counter(LEADING_ARTICLE.sub("", phrase.strip(), count=1) for phrase in phrases)
    counts.pop("", None)
    telling = [phrase for phrase in counts if target_group(phrase, "") != OTHER]
    chosen = min(telling or counts, key=lambda each: (-counts[each], len(each)), default="")
    group = target_group(chosen, stem)

    named = _CATEGORY_OF_GROUP.get(group, group.replace("_", " ") if group in HANDS else None)
    if names == "categories" or not telling:
        return named or chosen or None
    return chosen


def hand_of_target(phrases: Iterable[str]) -> str | None:
    """The side of the hand that phrases name; ``unknown`` where they name none, None for things."""
    groups = {target_group(phrase, "") for phrase in phrases} & set(HANDS)
    sides = [group.removesuffix("_hand") for group in HANDS if group in groups]
    if not sides:
        return None
    return sides[0] if sides[0] in ("right", "left") else "unknown"


# Truth


def read_truth(
    root: Path,
    splits: Sequence[str] | None,
    report: ImportReport,
    *,
    names: str = "phrases",
    with_text: bool = False,
) -> list[LabeledImage]:
    """The annotated things of a data root.

    Args:
        root: the data root.
        splits: which of its splits; None = all of train, val and test that it has.
        report: takes what is left out.
        names: one of `NAMES`.
        with_text: take analysis sentences and questions along.

    Raises:
        UserError: there is no such data, or a file of it is damaged.
    """
    # The splits
    found = annotation_folders(root)
    wanted = splits or [split for split in SPLITS if found.get(split)]
    if not wanted:
        raise UserError(
            f"'{root}' has no annotations in dataset_split/; give a data root, the folder that "
            "holds RGB/ and dataset_split/"
        )

    # Their photos
    images = []
    for split in wanted:
        dataset = EgoIRGBench(split, 1, 0, None, data_root=str(root), cache=False)
        truth = Truth(dataset)
        for stem in track(dataset.stems, f"reading {split}", transient=True, stderr=True):
            images.append(_true_image(truth, stem, names, with_text))

    # Those with targets
    for image in images:
        if not image.regions:
            report.leave_out("photos without any target", image.where)
    return [image for image in images if image.regions]


def _true_image(truth: Truth, stem: str, names: str, with_text: bool) -> LabeledImage:
    """One photo of a data root with the things that its annotations name."""
    # Everything that is said of each id
    annotations = truth.annotations(stem)
    phrases: dict[int, list[str]] = defaultdict(list)
    for annotation in annotations:
        for slot, mask_id in annotation.slots.items():
            phrases[mask_id].append(annotation.phrase(slot))

    # Regions, and questions about them
    regions: list[Region] = []
    index_of = {}
    for mask_id, rle in truth.masks(stem).items():
        index_of[mask_id] = len(regions)
        said = phrases[mask_id]
        regions.append(Region(rle, name_of_target(said, stem, names), hand_of_target(said)))
    questions = []
    for annotation in annotations if with_text else ():
        queries = tuple(question["query"] for question in annotation.questions)
        targets = tuple(index_of[mask_id] for mask_id in annotation.slots.values())
        questions.append(GivenQuestion(queries, targets, annotation.answer))
    photo, depth, _ = truth.dataset.pixels.files(stem)
    return LabeledImage(
        name=photo.name,
        photo=photo,
        size=truth.size(stem),
        where=f"'{truth.dataset.root}', photo '{stem}'",
        regions=regions,
        caption=annotations[0].caption if with_text else None,
        questions=questions,
        depth=depth,
        split=truth.dataset.split,
    )


# Predictions


@dataclass(frozen=True)
class Predictions:
    """What a predictions file says.

    Attributes:
        path: the file.
        queries: photo -> answers, in the order of the file.
        analyses: photo -> analysis sentence.
        sizes: photo -> height and width, of the photos of which any mask is there.
    """

    path: Path
    queries: dict[str, list[QueryRecord]]
    analyses: dict[str, str]
    sizes: dict[str, tuple[int, int]]

    @property
    def names(self) -> list[str]:
        """All photos, each once, in the order of the file."""
        return list(dict.fromkeys([*self.queries, *self.analyses]))


def read_predicted(source: Path) -> Predictions:
    """A predictions file, or that in the folder of an evaluation, checked by itself.

    Raises:
        UserError: it is missing or empty, a line is no record, a mask is damaged, or two masks of
            a photo have different sizes.
    """
    path = source / "predictions.jsonl" if source.is_dir() else source
    try:
        records: list[Record] = read_records(path)
    except FileNotFoundError:
        raise UserError(
            f"no predictions '{path}'; give a predictions.jsonl, or the folder that holds it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read predictions '{path}' ({error}); give a predictions.jsonl"
        ) from None
    if not records:
        raise UserError(f"'{path}' holds no predictions; give a file with one JSON object per line")

    # By photo
    image_records, query_records = split_kinds(records)
    analyses = {record.image: record.analysis for record in image_records}
    queries: dict[str, list[QueryRecord]] = defaultdict(list)
    sizes: dict[str, tuple[int, int]] = {}
    for record in query_records:
        queries[record.image].append(record)
        for mask in record.masks:
            size = _size_of(mask.rle, f"'{path}', {_name(record)}, slot {mask.slot}")
            if sizes.setdefault(record.image, size) != size:
                raise UserError(
                    f"'{path}': masks of photo '{record.image}' are of {_shown(size)} and of "
                    f"{_shown(sizes[record.image])} pixels; give all at the size of the photo"
                )
    return Predictions(path, dict(queries), analyses, sizes)


def predicted_images(
    predictions: Predictions,
    photos: PhotosByStem | None,
    report: ImportReport,
    *,
    names: str = "phrases",
    keep_all: bool = False,
) -> list[LabeledImage]:
    """The photos of a predictions file with the masks of their answers.

    Several answers may name one thing. Masks of one name that overlap by an IoU of 0.5 are taken
    for one, and the one with the highest score is kept.

    Args:
        predictions: of the file.
        photos: where the photos are; None = they are only named, and their size is that of the
            masks.
        report: takes what is left out.
        names: one of `NAMES`.
        keep_all: keep the mask of every answer.

    Raises:
        UserError: a photo is missing or of another size than its masks.
    """
    images = []
    for stem in predictions.names:
        where = f"'{predictions.path}', photo '{stem}'"

        # The photo, and the size that its masks have
        size = predictions.sizes.get(stem)
        photo = Path(f"{stem}.jpg")
        if photos is not None:
            photo = photos.find(stem, where)
            sizes = (photo_size(photo), image_size(photo))  # upright, and as it is stored
            size = size or sizes[0]
            if size not in sizes:
                raise UserError(
                    f"{where}: its masks are of {_shown(size)} pixels, '{photo}' of "
                    f"{_shown(sizes[0])}; name the photos that were predicted"
                )
        if size is None:
            report.leave_out("photos without a mask, whose size only the photos could tell", where)
            continue

        # Its regions and questions
        queries = predictions.queries.get(stem, [])
        regions, questions = _regions_of(queries, stem, names, keep_all, report, where)
        image = LabeledImage(
            name=photo.name,
            photo=photo,
            size=size,
            where=where,
            regions=regions,
            caption=predictions.analyses.get(stem),
            questions=questions,
        )
        images.append(image)
    if report.taken[_MERGED]:
        report.note(
            f"{report.taken[_MERGED]:,} masks are {_MERGED}; the one with the highest score stands "
            "for it (--all-masks keeps them)"
        )
    return images


def _regions_of(
    queries: Sequence[QueryRecord],
    stem: str,
    names: str,
    keep_all: bool,
    report: ImportReport,
    where: str,
) -> tuple[list[Region], list[GivenQuestion]]:
    """Regions of the answers about a photo, and what was asked and answered."""
    regions: list[Region] = []
    questions = []
    for record in queries:
        targets = []
        for mask in record.masks:
            region = _region_of(record, mask, stem, names)
            if not area([region.rle]):
                report.leave_out("masks without a pixel", f"{where}, {_name(record)}")
                continue
            same = None if keep_all else _same_thing(region, regions)
            if same is None:
                targets.append(len(regions))
                regions.append(region)
                continue
            report.taken[_MERGED] += 1
            targets.append(same)
            if (region.score or 0) > (regions[same].score or 0):
                regions[same] = region
        asked = (record.query,) if record.query else ()
        questions.append(GivenQuestion(asked, tuple(targets), record.answer))
    return regions, questions


def _region_of(record: QueryRecord, mask: PredictedMask, stem: str, names: str) -> Region:
    """A mask of an answer with the name that the answer gives it."""
    phrase = mask.phrase or phrases_of(record.answer).get(mask.slot, "")
    name = name_of_target([phrase], stem, names) or "object"
    return Region(mask.rle, name, hand_of_target([phrase]), score=mask.score)


def _same_thing(region: Region, regions: Sequence[Region]) -> int | None:
    """Index of the region of the same name that overlaps most, if it is enough."""
    best = None
    best_iou = _SAME
    for index, other in enumerate(regions):
        if other.name == region.name:
            overlap = float(coco_mask.iou([region.rle], [other.rle], [0])[0, 0])
            if overlap >= best_iou:
                best = index
                best_iou = overlap
    return best


class PhotosByStem:
    """Finds photos by the name without ending, as predictions have it.

    Args:
        folder: a data root, or a folder of photos.

    Raises:
        UserError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"no folder '{folder}'; give the one that holds RGB/, or the photos")
        photos, _ = PIXEL_FILES[0]
        self.folder = folder / photos if (folder / photos).is_dir() else folder
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in photos_below(self.folder):
            self._by_stem[path.stem].append(path)

    def find(self, stem: str, where: str) -> Path:
        """The photo of a stem.

        Raises:
            UserError: there is none, or several.
        """
        found = self._by_stem.get(stem, [])
        if not found:
            raise UserError(f"{where} is not in '{self.folder}'; name the folder of the photos")
        if len(found) > 1:
            raise UserError(f"{where} may be '{found[0]}' or '{found[1]}'; take one of them away")
        return found[0]


def _size_of(rle: Rle, where: str) -> tuple[int, int]:
    """Height and width of a mask whose code is sound.

    Raises:
        UserError: it is not.
    """
    size = rle["size"]
    if len(size) != 2 or min(size) < 1:
        raise UserError(f"{where}: size {size} is no height and width; make the mask again")
    try:
        validate(rle)
    except ValueError as error:
        raise UserError(f"{where}: the run-length code {error}; make it again") from None
    return size[0], size[1]


def _name(record: QueryRecord) -> str:
    """An answer, for messages."""
    return f"query {record.query_id!r} of annotation {record.annotation} of '{record.image}'"


def _shown(size: Sequence[int]) -> str:
    """Width and height, in the order in which programs give them."""
    return " x ".join(str(side) for side in reversed(size))
