"""Labeled photos of any format to a data root as docs/data.md describes it.

All is made in a folder beside the data root and moved there at the end, so that an error or a kill
leaves no half of it.

Legend: H, W height and width of a photo.
"""

from __future__ import annotations

import filecmp
import io
import json
import os
import re
import shutil
import zlib
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from annexe.datasets.annotations import MAX_ID
from annexe.datasets.image_files import UnreadableImage, check_depth, opened, report_faults
from annexe.datasets.image_names import SPLITS, annotation_folders, fields
from annexe.datasets.photos import check_header, read_photo
from annexe.datasets.pixels import PIXEL_FILES, read_image
from annexe.datasets.shares import share_out
from annexe.errors import UserError
from annexe.files import named, part_of, remove, replaced
from annexe.interchange.labels import LEADING_ARTICLE, ImportReport, LabeledImage
from annexe.interchange.photo_search import without_ending
from annexe.interchange.questions import write_annotations
from annexe.rle import decode
from annexe.terminal import track
from annexe.workers import in_processes

NOTHING_TO_ASK = "photos about which nothing can be asked"

_JPEG_QUALITY = 95
_MAX_STEM = 150  # bytes, so that files named after a photo and an answer have names, too
_ORIENTATION = 0x0112  # tag of EXIF
_FIRST_TRANSPOSED = 5  # from this orientation on width and height change places
_LAST_ORIENTATION = 8

# What file names and lines of lists cannot hold, on any system
_UNUSABLE = re.compile(r'[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff<>:"/\\|?*]+')


@dataclass(frozen=True)
class LayoutOptions:
    """How photos become a data root.

    Attributes:
        split: all photos go to it; None = as the format says, else by shares.
        shares: split -> share of the photos whose split the format does not say.
        seed: settles questions and shares.
        automatic: write questions from masks and roles, beside those that the format has.
        skip_bad: leave out photos with an error instead of stopping at the first.
        num_workers: processes; any number makes the same files.
    """

    split: str | None = None
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    seed: int = 0
    automatic: bool = True
    skip_bad: bool = False
    num_workers: int = 1


@dataclass
class Layout:
    """What was written.

    Attributes:
        splits: split -> stems.
        counts: split -> what -> how many.
        renamed: name of a photo -> its stem, where that is not the name of the file.
    """

    splits: dict[str, list[str]]
    counts: dict[str, Counter[str]]
    renamed: dict[str, str]


def collect(
    entries: Iterable[LabeledImage | UserError], report: ImportReport, *, skip_bad: bool
) -> list[LabeledImage]:
    """The photos that a reader yields, each checked against its file.

    Args:
        entries: of a reader.
        report: takes what is left out.
        skip_bad: leave out entries with an error instead of raising the first one.

    Raises:
        UserError: for the first entry with an error, or if no entry is left.
    """
    images: list[LabeledImage] = []
    by_name: dict[str, LabeledImage] = {}
    by_file: dict[Path, LabeledImage] = {}
    for entry in entries:
        try:
            if isinstance(entry, UserError):
                raise entry
            is_upright_needed(entry)
            _require_new(entry, by_name.get(entry.name) or by_file.get(entry.photo.resolve()))
        except UserError as error:
            _leave_out_bad(error, report, skip_bad)
            continue
        images.append(entry)
        by_name[entry.name] = by_file[entry.photo.resolve()] = entry
    if not images:
        raise _nothing_left("the source has no photo with usable labels", report)
    return images


def check_target(out: Path) -> None:
    """Check that ``out`` can become a data root or be added to.

    Raises:
        UserError: it is a file, or a folder that holds something else.
    """
    if out.is_dir():
        others = [path for path in out.iterdir() if not path.name.startswith(".")]
        if others and not (out / "dataset_split").is_dir():
            raise UserError(
                f"'{out}' is not empty and no data root; name a new folder, or one that holds "
                "dataset_split/ to add photos to it"
            )
    elif out.exists():
        raise UserError(f"'{out}' is a file; name a new folder")


def write_layout(
    images: Sequence[LabeledImage], out: Path, options: LayoutOptions, report: ImportReport
) -> Layout:
    """Write photos, id maps, depth maps and annotations of a data root, or add to one.

    Args:
        images: as `collect` gives them.
        out: a folder that does not exist, an empty one, or a data root. A root gets further
            photos; annotations are moved last, so that what a kill leaves is no photo of the data.
        options: splits, questions, and what happens to bad photos.
        report: takes what is left out and what was converted.

    Raises:
        UserError: ``out`` holds something else, or photos of these names; a photo is damaged or
            has more regions than ids; or no photo is left. Nothing was written then.
    """
    # Names, before the long work
    out = Path(os.path.abspath(out))  # "." has no name to put ".part" behind
    check_target(out)
    stems = stems_of(images)
    is_added = (out / "dataset_split").is_dir()
    if is_added:
        _require_free(out, stems, images)

    # Files, in a folder beside the data root
    out.parent.mkdir(parents=True, exist_ok=True)
    with _part_beside(out) if is_added else replaced(out) as part:
        for folder, _ in PIXEL_FILES:
            (part / folder).mkdir(parents=True)
        kept, counts = _write_photos(images, stems, part, options, report)

        # Splits, of the photos that are left
        splits = _splits([images[index] for index in kept], [stems[i] for i in kept], options)
        is_shared = not options.split and any(images[index].split is None for index in kept)
        if is_shared and len([name for name in SPLITS if splits[name]]) == 1:
            report.note(
                f"all photos are in train, for there are fewer than {len(SPLITS)} sequences to "
                "share out; training with validation needs photos of its own (--split val)"
            )
        _sort_annotations(part, splits)
        if is_added:
            _move_into(part, out)

    # What is there now
    split_of = {stem: split for split, listed in splits.items() for stem in listed}
    by_split: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    for index in kept:
        by_split[split_of[stems[index]]].update(counts[index])
    report.taken.update(sum(by_split.values(), Counter()))
    return Layout(splits, by_split, _renamed(images, stems))


# Photos and their files


def is_upright_needed(image: LabeledImage) -> bool:
    """Whether a photo has to be turned upright, as its camera says, to fit its labels.

    Raises:
        UserError: the photo cannot be read, has another size than its labels, or its size does not
            tell whether its labels are upright.
    """
    # Size as stored, and how the camera was held
    try:
        width, height = check_header(image.photo)
        with opened(image.photo) as header:
            orientation = header.getexif().get(_ORIENTATION, 1)
    except UserError as error:
        raise UserError(f"{image.where}: {error}") from None
    except UnreadableImage as error:
        problem = error.fault.problem
        raise UserError(
            f"{image.where}: cannot read photo '{image.photo}' ({problem}); save it again"
        ) from None

    # The size of the labels tells which of the two they mean
    stored = (height, width)
    is_turned = isinstance(orientation, int) and 1 < orientation <= _LAST_ORIENTATION
    upright = (width, height) if is_turned and orientation >= _FIRST_TRANSPOSED else stored
    if image.size not in (stored, upright):
        raise UserError(
            f"{image.where}: the labels are of {_shown(image.size)} pixels, photo '{image.photo}' "
            f"of {_shown(stored)}; name the photo that was labeled"
        )
    if is_turned and stored == upright:
        raise UserError(
            f"{image.where}: photo '{image.photo}' is turned by its EXIF data (orientation "
            f"{orientation}), and its size does not tell whether the labels are too; save it "
            "without EXIF data, in the way that the labels fit"
        )
    return is_turned and image.size == upright


def flatten(image: LabeledImage) -> tuple[np.ndarray, list[int], int]:
    """One id map of all regions, in which later regions lie on top.

    Returns:
        Ids, uint16[H, W]: region i has the id i + 1. The id of every region, 0 for one of which no
        pixel is left. The number of pixels that regions lose to those on top of them.
    """
    ids = np.zeros(image.size, np.uint16)
    num_labeled = 0
    for index, region in enumerate(image.regions):
        assert tuple(region.rle["size"]) == image.size, image.where
        mask = decode(region.rle)
        num_labeled += int(np.count_nonzero(mask))
        ids[mask] = index + 1
    left = np.bincount(ids.ravel(), minlength=len(image.regions) + 1)[1:]
    mask_ids = [index + 1 if count else 0 for index, count in enumerate(left)]
    return ids, mask_ids, num_labeled - int(left.sum())


@dataclass(frozen=True)
class _Job:
    """One photo to write.

    Attributes:
        image: it.
        stem: name of its files.
        folder: of all files.
        vocabulary: names of all things in the source.
        options: of the import.
    """

    image: LabeledImage
    stem: str
    folder: Path
    vocabulary: tuple[str, ...]
    options: LayoutOptions


@dataclass
class _Written:
    """What a process tells of a photo.

    Attributes:
        counts: what -> how many; empty where nothing was written.
        left_out: reason and entry.
        converted: what the photo was that is a JPEG now; None where it was copied.
        error: why the photo cannot be used.
    """

    counts: Counter[str] = field(default_factory=Counter)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    converted: str | None = None
    error: str | None = None


def _write_photos(
    images: Sequence[LabeledImage],
    stems: list[str],
    folder: Path,
    options: LayoutOptions,
    report: ImportReport,
) -> tuple[list[int], dict[int, Counter[str]]]:
    """Write the files of all photos; annotations go to ``folder / "annotations"``.

    Returns:
        Indices of the photos that were written, and what is counted of each.
    """
    # Every photo by itself, in several processes
    (folder / "annotations").mkdir()
    labels = {region.name for image in images for region in image.regions}
    vocabulary = tuple(sorted(set(filter(None, map(phrase_of, labels)))))
    jobs = [
        _Job(image, stem, folder, vocabulary, options)
        for image, stem in zip(images, stems, strict=True)
    ]
    written = in_processes(_write, jobs, min(options.num_workers, len(jobs)))
    assert isinstance(written, Generator)
    counts: dict[int, Counter[str]] = {}
    converted: Counter[str] = Counter()
    with closing(written):  # after an error no process writes on into a folder that goes away
        for index, result in enumerate(track(written, "writing photos", len(jobs), stderr=True)):
            for reason, where in result.left_out:
                report.leave_out(reason, where)
            if result.error is not None:
                _leave_out_bad(UserError(result.error), report, options.skip_bad)
            if result.counts:
                counts[index] = result.counts
            if result.converted:
                converted[result.converted] += 1

    # What holds for all of them
    if not counts:
        raise _nothing_left("no photo is left that questions can be asked about", report)
    if converted:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in converted.most_common())
        report.note(f"photos saved as JPEG (quality {_JPEG_QUALITY}, 4:4:4): {kinds}")
    return list(counts), counts


def _write(job: _Job) -> _Written:
    """Write the files of one photo, unless nothing can be asked about it."""
    result = _Written()
    image = job.image
    try:
        # Id map
        if len(image.regions) > MAX_ID:
            raise UserError(
                f"{image.where}: photo {image.name!r} has {len(image.regions)} regions, and an id "
                f"map holds {MAX_ID}; remove some"
            )
        ids, mask_ids, num_hidden = flatten(image)
        for index, mask_id in enumerate(mask_ids):
            if not mask_id:
                where = f"{image.where}, region {index + 1} ({image.regions[index].name!r})"
                result.left_out.append(("regions that lie wholly under others", where))

        # Questions
        rng = np.random.default_rng([job.options.seed, zlib.crc32(job.stem.encode())])
        annotations = write_annotations(
            with_phrases(image), mask_ids, job.vocabulary, rng, automatic=job.options.automatic
        )
        if not annotations:
            result.left_out.append((NOTHING_TO_ASK, image.where))
            return result

        # Files
        result.converted = _write_photo(image, job.folder / "RGB" / f"{job.stem}.jpg")
        _write_depth(image, job.folder / "depth" / f"{job.stem}.png")
        mask_path = job.folder / "mask" / f"{job.stem}.png"
        Image.fromarray(ids.astype(np.uint8)).save(mask_path)
        path = job.folder / "annotations" / f"{job.stem}.json"
        text = json.dumps(annotations, indent=1, ensure_ascii=False)
        path.write_text(f"{text}\n", encoding="utf-8")
    except UserError as error:
        result.error = str(error)
        return result

    # What is counted
    result.counts["photos"] = 1
    result.counts["regions"] = sum(mask_id > 0 for mask_id in mask_ids)
    result.counts["questions"] = len(annotations)
    result.counts["questions without target"] = sum(not each["with_mask"] for each in annotations)
    result.counts["wordings"] = sum(len(each["questions"]) for each in annotations)
    result.counts["pixels under others"] = num_hidden
    return result


def _write_photo(image: LabeledImage, path: Path) -> str | None:
    """Copy an upright JPEG in RGB, and save any other photo as such.

    Returns:
        What the photo was, such as "PNG in RGBA"; None where it was copied.
    """
    is_turned = is_upright_needed(image)
    try:
        with opened(image.photo) as header:
            kind = f"{header.format} in {header.mode}"
            orientation = header.getexif().get(_ORIENTATION, 1)
        if kind == "JPEG in RGB" and orientation == 1:
            read_image(image.photo, "RGB", at_least=1)  # to its end
            shutil.copyfile(image.photo, path)
            return None
        photo = read_photo(image.photo) if is_turned else read_image(image.photo, "RGB")
    except UnreadableImage as error:
        problem = error.fault.problem
        raise UserError(f"{image.where}: cannot read photo '{image.photo}' ({problem})") from None
    except UserError as error:
        raise UserError(f"{image.where}: {error}") from None
    photo.save(path, quality=_JPEG_QUALITY, subsampling=0)  # without EXIF data and profile
    return f"{kind}, turned by EXIF data" if orientation != 1 else kind


def _write_depth(image: LabeledImage, path: Path) -> None:
    """Copy a depth map, or write one in which nothing was measured."""
    if image.depth is None:
        path.write_bytes(_no_depth(*image.size))
        return
    try:
        report_faults("depth map", image.depth, check_depth(read_image(image.depth)))
    except UserError as error:
        raise UserError(f"{image.where}: {error}") from None
    shutil.copyfile(image.depth, path)


@lru_cache(maxsize=4)
def _no_depth(height: int, width: int) -> bytes:
    """A PNG of 16 bits that is 0 everywhere."""
    content = io.BytesIO()
    Image.fromarray(np.zeros((height, width), np.uint16)).save(content, "PNG")
    return content.getvalue()


def _shown(size: tuple[int, int]) -> str:
    """Width and height, in the order in which programs give them."""
    return f"{size[1]} x {size[0]}"


# Names of things


def with_phrases(image: LabeledImage) -> LabeledImage:
    """A photo whose labels are noun phrases, as questions need them."""
    regions = [replace(region, name=phrase_of(region.name)) for region in image.regions]
    unmasked = frozenset(filter(None, map(phrase_of, image.unmasked_names)))
    return replace(image, regions=regions, unmasked_names=unmasked)


def phrase_of(name: str | None) -> str | None:
    """A label as a noun phrase without article: "Coffee_mug" is "coffee mug".

    Words with capitals behind their first letter stay, such as "TV".
    """
    words = []
    for word in re.sub(r"[_<>\s]+", " ", name or "").split():
        words.append(word if any(letter.isupper() for letter in word[1:]) else word.lower())
    return LEADING_ARTICLE.sub("", " ".join(words), count=1) or None


# Names of files


def stems_of(images: Sequence[LabeledImage]) -> list[str]:
    """A stem for every photo: the name of its file, with its folder where two would be the same.

    Characters that cannot stand in names of files or in lists of stems become an underscore.
    """
    stems = [_usable(PurePosixPath(image.name).name) for image in images]
    counts = Counter(stems)
    taken: set[str] = set()
    for index, image in enumerate(images):
        if counts[stems[index]] > 1:
            stems[index] = _usable(image.name.replace("/", "_"))
        stem = stems[index]
        number = 1
        while stem in taken or (number > 1 and stem in counts):
            number += 1
            stem = f"{stems[index]}_{number}"
        stems[index] = stem
        taken.add(stem)
    return stems


def _usable(name: str) -> str:
    """A name of a photo as a stem."""
    stem = _UNUSABLE.sub("_", without_ending(name)).strip()
    stem = re.sub(r"^\.+", "_", stem)
    # From the end, where the number of a frame is
    while len(stem.encode()) > _MAX_STEM:
        stem = stem[1:].lstrip()
    return stem or "photo"


def _renamed(images: Sequence[LabeledImage], stems: list[str]) -> dict[str, str]:
    """Photos whose stem is not the name of their file."""
    renamed = {}
    for image, stem in zip(images, stems, strict=True):
        if without_ending(PurePosixPath(image.name).name) != stem:
            renamed[image.name] = stem
    return renamed


def _require_new(image: LabeledImage, other: LabeledImage | None) -> None:
    """Refuse a photo that stands twice in a source."""
    if other is not None:
        raise UserError(
            f"{image.where}: photo {image.name!r} ('{image.photo}') is that of {other.where}, too; "
            "keep one of them"
        )


def _require_free(out: Path, stems: list[str], images: Sequence[LabeledImage]) -> None:
    """Refuse photos whose stems a data root has already."""
    known = set().union(*annotation_folders(out).values())
    clashes = [index for index, stem in enumerate(stems) if stem in known]
    if clashes:
        first = images[clashes[0]]
        raise UserError(
            f"{first.where}: '{out}' has photo '{stems[clashes[0]]}' already ({len(clashes)} such "
            "photos); import into a folder of its own"
        )


# Splits


def _splits(
    images: list[LabeledImage], stems: list[str], options: LayoutOptions
) -> dict[str, list[str]]:
    """Split -> stems; frames of one sequence are never parted."""
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    sequences: dict[str, list[str]] = defaultdict(list)
    for image, stem in zip(images, stems, strict=True):
        split = options.split or image.split
        if split is not None:
            splits[split].append(stem)
        else:
            parts = fields(stem) or {}
            alone = f"\n{stem}"  # no name of a sequence
            sequences[image.sequence or parts.get("sequence") or alone].append(stem)

    # Shares of what is left; too few sequences make no three splits
    shares = dict(zip(SPLITS, options.shares, strict=True))
    wanted = {split: share for split, share in shares.items() if share > 0}
    if len(sequences) < len(SPLITS):
        wanted = {max(wanted, key=lambda split: wanted[split]): 1.0}
    if sequences:
        shared = share_out(sequences, wanted, options.seed, lambda stem: "photo")
        for split, listed in shared.items():
            splits[split] += listed
    return {split: sorted(listed) for split, listed in splits.items()}


def _sort_annotations(part: Path, splits: dict[str, list[str]]) -> None:
    """Move annotation files to the folders of their splits."""
    for split, stems in splits.items():
        folder = part / "dataset_split" / split
        folder.mkdir(parents=True)
        for stem in stems:
            (part / "annotations" / f"{stem}.json").rename(folder / f"{stem}.json")
    (part / "annotations").rmdir()


# A data root that is added to


@contextmanager
def _part_beside(out: Path) -> Iterator[Path]:
    """A new folder beside ``out``, which goes away in the end."""
    part = part_of(out)
    remove(part)
    part.mkdir()
    try:
        with named(out):
            yield part
    finally:
        remove(part)


def _move_into(part: Path, out: Path) -> None:
    """Move the files of a part to a data root, annotations last.

    Raises:
        UserError: the root has another file of one of these names. Nothing was moved then.
    """
    # Files in a fixed order; what a killed import left of the same bytes is no hindrance
    folders = [folder for folder, _ in PIXEL_FILES]
    folders += [f"dataset_split/{split}" for split in SPLITS]
    moves = []
    for folder in folders:
        moves += [(path, out / folder / path.name) for path in sorted((part / folder).iterdir())]
    for path, target in moves:
        if target.exists() and not filecmp.cmp(path, target, shallow=False):
            raise UserError(
                f"'{target}' is there already and no photo of the data; take it away, or import "
                "into a folder of its own"
            )

    for path, target in moves:
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


# Errors


def _leave_out_bad(error: UserError, report: ImportReport, skip_bad: bool) -> None:
    """Note an error, or raise it with the way around it."""
    if not skip_bad:
        raise UserError(f"{error} (or leave out such photos: --skip-bad)") from None
    report.leave_out("photos with an error", str(error))


def _nothing_left(message: str, report: ImportReport) -> UserError:
    """The error for an import without photos, with the reason that holds most often."""
    if report.left_out:
        reason = max(report.left_out, key=lambda each: len(report.left_out[each]))
        entries = report.left_out[reason]
        message += f": {len(entries):,} {reason}, such as {entries[0]}"
    return UserError(f"{message}; import labels with masks")
