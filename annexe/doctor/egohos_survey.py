"""A whole folder of EgoHOS: every photo and label checked and counted."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from annexe.datasets.egohos import CATEGORIES, KNOWN_IDS, PIXEL_FILES, SPLITS, stems_of
from annexe.datasets.image_names import is_utf8
from annexe.doctor.image_checks import check_mask, check_photo
from annexe.doctor.problems import ImageReport
from annexe.doctor.survey import Survey, check_folder, check_images


def is_egohos(root: Path) -> bool:
    """Whether a folder holds a split of EgoHOS rather than annotations of Ego-IRGBench."""
    if (root / "dataset_split").exists():
        return False
    folders = [root / split / folder for split in SPLITS for folder, _ in PIXEL_FILES]
    return any(folder.is_dir() for folder in folders)


def survey_egohos(root: Path, num_workers: int) -> Survey:
    """Check everything under a folder of EgoHOS, pixels included, and collect all that is wrong.

    Args:
        root: folder with a folder of each split.
        num_workers: processes; any number finds the same.
    """
    # Splits and names
    splits = {split: stems_of(root, split) for split in SPLITS}
    result = Survey({split: stems for split, stems in splits.items() if stems}, has_videos=False)
    for split, num_published in SPLITS.items():
        stems = splits[split]
        if not stems:
            result.add("missing-split", split, split)
        elif len(stems) != num_published:
            found = f"{len(stems)} photos, published were {num_published}"
            result.add("split-size", split, found, split)
        for stem in stems:
            if not is_utf8(stem):
                result.add("name-not-utf-8", stem, ascii(stem), split)
        for folder, ending in PIXEL_FILES:
            path = root / split / folder
            check_folder(path, f"{split}/{folder}", ending, set(stems), result)

    # Photos and labels
    images = [(split, stem) for split, stems in splits.items() for stem in stems]
    check_images(partial(_check_photo_and_label, root), images, num_workers, result)
    return result


def _check_photo_and_label(root: Path, split: str, stem: str) -> ImageReport:
    """Check both files of a photo; nothing is raised for what is wrong with them."""
    report = ImageReport(split, stem)
    photo, label = (root / split / folder / f"{stem}{ending}" for folder, ending in PIXEL_FILES)
    check_photo(photo, report)
    present = check_mask(label, report, known=KNOWN_IDS)
    for mask_id, category in CATEGORIES.items():
        report.targets[category.name] += mask_id in (present or ())
    report.num_annotations = report.num_queries = len(CATEGORIES)
    return report
