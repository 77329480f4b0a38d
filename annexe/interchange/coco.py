"""COCO's instance annotations (T.-Y. Lin et al., ECCV 2014; cocodataset.org/#format-data).

A file holds photos, categories, and annotations that are polygons, run lengths or boxes. Run
lengths go down the columns. Polygons are filled as pycocotools fills them: the parts of one
annotation are united, and a ring within another makes no hole.

Legend: H, W height and width of a photo.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from annexe.datasets.photos import photo_size
from annexe.errors import UserError, shown
from annexe.files import new_folder, write_json
from annexe.interchange.labels import (
    ImportReport,
    LabeledImage,
    ReadOptions,
    Region,
    hand_of,
    mark_unique,
)
from annexe.interchange.photo_search import PhotoSearch, name_of_photo
from annexe.rle import Rle, area, bounding_box, validate

DATA_FILE = "annotations/instances_default.json"  # where datumaro and CVAT look for it
RESULTS_FILE = "results.json"
PHOTO_FOLDER = "images"

CROWDS = "crowds, which are several things that nobody told apart"
NO_MASK = "annotations without a mask, such as boxes and keypoints"
EMPTY = "masks without a pixel"
THIN = "parts of polygons with fewer than three corners"
CAPTIONS = "captions beside the first one of a photo"

_UNNAMED = "object"  # category of exported regions that have no name
_TOLERANCE = 1  # pixels by which a corner may lie outside of its photo
_MIN_NUMBERS = 6  # of a polygon: three corners
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON writes it
_NO_LICENSE = {"name": "", "id": 0, "url": ""}  # of datumaro
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


# Reading


def read(
    source: Path, options: ReadOptions, report: ImportReport
) -> Iterator[LabeledImage | UserError]:
    """Photos of an annotation file, or of all of them in a folder: see `labels.Reader`."""
    if not source.is_dir():
        yield from _FileReader(source, options, report).read()
        return

    # Files of a folder are splits where their names say so
    files = _annotation_files(source)
    for path in files:
        reader = _FileReader(path, options, report)
        if len(files) > 1:
            reader.split = _split_of(path.relative_to(source))
            reader.prefix = _prefix_of(path.relative_to(source))
        yield from reader.read()


def _annotation_files(folder: Path) -> list[Path]:
    """JSON files of a folder and of the folders in it; those about instances where there are any.

    Raises:
        UserError: if there is none.
    """
    found = sorted([*folder.glob("*.json"), *folder.glob("*/*.json")])
    found = [path for path in found if not path.name.startswith(".")]
    about_instances = [path for path in found if path.name.startswith("instances")]
    if not found:
        raise UserError(f"'{folder}' holds no annotation file of COCO; give a .json file")
    return about_instances or found


def _split_of(path: Path) -> str | None:
    """The split that the words of a path name, such as ``valid/_annotations.coco.json``."""
    for word in reversed(re.findall("[a-z]+", str(path.with_suffix("")).lower())):
        if word in _SPLIT_WORDS:
            return _SPLIT_WORDS[word]
    return None


def _prefix_of(path: Path) -> str:
    """What stands in front of the names of photos, so that those of two files are told apart."""
    is_in_own_folder = path.parent.name not in ("", "annotations")
    return path.parent.name if is_in_own_folder else path.stem


@dataclass
class _FileReader:
    """Reads one file of annotations.

    Attributes:
        path: the file.
        options: what the user says.
        report: takes what is left out.
        split: of all photos, None where nobody says.
        prefix: in front of the names of photos.
        names: category id -> name.
        takes_crowds: whether crowds are single things, because the file says crowd of all masks.
    """

    path: Path
    options: ReadOptions
    report: ImportReport
    split: str | None = None
    prefix: str = ""
    names: dict[Any, str] = field(default_factory=dict)
    takes_crowds: bool = False

    def read(self) -> Iterator[LabeledImage | UserError]:
        """Photos of the file, in its order, and errors in their places.

        Raises:
            UserError: it is no annotation file of COCO, or has no photo.
        """
        # The file as a whole
        content = read_json(self.path)
        images, annotations = self._parts(content)
        self.takes_crowds = self._says_crowd_of_all(content, annotations)

        # Annotations by photo
        by_image: dict[Any, list[tuple[int, dict]]] = defaultdict(list)
        for index, annotation in enumerate(annotations):
            by_image[_key(annotation.get("image_id"))].append((index, annotation))

        # Photo by photo
        search = PhotoSearch(self._folders())
        seen: set[Any] = set()
        for index, image in enumerate(images):
            where = f"'{self.path}', image {shown(image.get('id', f'number {index + 1}'))}"
            key = _key(image.get("id"))
            try:
                if "id" not in image or not isinstance(image["id"], int | str):
                    raise UserError(f"{where} has no id; give it a number of its own")
                if key in seen:
                    raise UserError(f"{where} stands twice; give every image an id of its own")
                seen.add(key)
                yield self._image(image, by_image.pop(key, []), where, search)
            except UserError as error:
                yield error

        # Annotations of other photos
        for group in by_image.values():
            where = self._where(*group[0])
            image_id = shown(group[0][1].get("image_id"))
            yield UserError(
                f"{where} is of image {image_id}, which 'images' does not have; "
                "add the image or remove its annotations"
            )

    def _parts(self, content: Any) -> tuple[list[dict], list[dict]]:
        """Images and annotations of a file; sets the names of categories.

        Raises:
            UserError: the file is of another kind, or empty.
        """
        # Other kinds of file
        kind = kind_of(content)
        if kind is not None:
            raise UserError(f"'{self.path}' is no instance annotation file of COCO: {kind}")
        parts = []
        for name in ("images", "annotations", "categories"):
            entries = content.get(name, [])
            if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
                raise UserError(f"'{self.path}': '{name}' is no list of objects; export it again")
            parts.append(entries)
        images, annotations, categories = parts
        if not images or not annotations:
            missing = "images" if not images else "annotations"
            raise UserError(f"'{self.path}' has no {missing}; export labels that have some")

        # Categories
        for index, category in enumerate(categories):
            where = f"'{self.path}', category {index + 1}"
            name = category.get("name")
            if "id" not in category or not isinstance(name, str) or not name.strip():
                raise UserError(f"{where} has no id or no name; give it both")
            key = _key(category["id"])
            if self.names.setdefault(key, name) != name:
                raise UserError(
                    f"{where}: id {shown(key)} is {self.names[key]!r} and {name!r}; give each "
                    "category an id of its own"
                )
        return images, annotations

    def _says_crowd_of_all(self, content: dict, annotations: list[dict]) -> bool:
        """Whether "crowd" says nothing, because the program that wrote the file says it of all.

        datumaro marks every run-length mask so, and CVAT exports by it. Their files are known by a
        license without a name.
        """
        masks = [each for each in annotations if each.get("segmentation")]
        num_crowds = sum(_is_crowd(each) for each in masks)
        is_of_datumaro = content.get("licenses") == [_NO_LICENSE]
        if not num_crowds or not (is_of_datumaro or num_crowds == len(masks)):
            return False
        self.report.note(
            f"'{self.path}': {num_crowds:,} of {len(masks):,} masks are marked as crowds, which "
            "datumaro and CVAT do to every run-length mask; they were taken as single things"
        )
        return True

    def _folders(self) -> list[Path]:
        """Where photos are looked for: first in the folder that belongs to the file."""
        own = self.path.stem.removeprefix("instances_")
        parent = self.path.parent
        if self.options.images is not None:
            return [self.options.images / own, self.options.images]
        if parent.name == "annotations":
            parent = parent.parent
        return [parent / "images" / own, parent / own, parent / "images", parent]

    def _where(self, index: int, annotation: dict) -> str:
        """An annotation, for messages."""
        return f"'{self.path}', annotation {shown(annotation.get('id', f'number {index + 1}'))}"

    def _image(
        self,
        image: dict,
        annotations: list[tuple[int, dict]],
        where: str,
        search: PhotoSearch,
    ) -> LabeledImage:
        """One photo with its regions.

        Raises:
            UserError: its file is missing, or an annotation is damaged.
        """
        # The photo; LVIS has an address in place of a name
        name = image.get("file_name") or image.get("coco_url")
        if not isinstance(name, str):
            raise UserError(f"{where} has no file_name; add it")
        photo = search.find(name, where)
        size = self._size(image, photo, where)

        # Its annotations
        regions: list[Region] = []
        captions: list[str] = []
        unmasked: set[str] = set()
        is_complete = self.options.is_complete
        for index, annotation in annotations:
            place = self._where(index, annotation)
            if isinstance(annotation.get("caption"), str):
                captions.append(annotation["caption"].strip())
                if len(captions) > 1:
                    self.report.leave_out(CAPTIONS, place)
                continue
            region = self._region(annotation, size, place)
            if region is None:
                unmasked.add(self._name(annotation, place))
                is_complete = False
            else:
                regions.append(region)

        path = name_of_photo(name)
        return LabeledImage(
            name=f"{self.prefix}/{path}" if self.prefix else path,
            photo=photo,
            size=size,
            where=where,
            regions=mark_unique(regions, unmasked),
            is_complete=is_complete,
            unmasked_names=frozenset(unmasked),
            caption=captions[0] if captions and captions[0] else None,
            split=self.split,
        )

    def _size(self, image: dict, photo: Path, where: str) -> tuple[int, int]:
        """Height and width of an image, of its photo where the file has none."""
        height = image.get("height")
        width = image.get("width")
        if height is None and width is None:
            return photo_size(photo)
        for side in (height, width):
            if not isinstance(side, int) or isinstance(side, bool) or side < 1:
                raise UserError(f"{where} is {shown(width)} x {shown(height)}; give it its size")
        assert isinstance(height, int) and isinstance(width, int)
        return height, width

    def _name(self, annotation: dict, where: str) -> str:
        """Name of an annotation's category."""
        key = _key(annotation.get("category_id"))
        if key not in self.names:
            raise UserError(
                f"{where} has category {shown(annotation.get('category_id'))}, which 'categories' "
                "does not have; add it"
            )
        return self.names[key]

    def _region(self, annotation: dict, size: tuple[int, int], where: str) -> Region | None:
        """The region of an annotation; None where it cannot be used, which the report then says.

        Raises:
            UserError: it is damaged.
        """
        name = self._name(annotation, where)
        segmentation = annotation.get("segmentation")
        if segmentation is None or segmentation == []:
            self.report.leave_out(NO_MASK, where)
            return None
        if _is_crowd(annotation) and not self.takes_crowds:
            self.report.leave_out(CROWDS, where)
            return None

        # The mask
        if isinstance(segmentation, list):
            rle = self._fill(segmentation, size, where)
        else:
            rle = checked_rle(segmentation, size, where)
        if rle is None or not area([rle]):
            self.report.leave_out(EMPTY, where)
            return None
        score = annotation.get("score")
        if not isinstance(score, int | float) or not 0 <= score <= 1:
            score = None
        return Region(rle, name, hand_of(name), score=score)

    def _fill(self, parts: list, size: tuple[int, int], where: str) -> Rle | None:
        """The union of polygons; None where none has three corners.

        Raises:
            UserError: a part is no list of corners, or lies outside of the photo.
        """
        polygons = []
        for part in parts:
            check_polygon(part, size, where)
            if len(part) < _MIN_NUMBERS:
                self.report.leave_out(THIN, where)
            else:
                polygons.append([float(number) for number in part])
        return fill_polygons(polygons, size) if polygons else None


def read_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8.

    Raises:
        UserError: it cannot be read, or is no JSON.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except UnicodeEncodeError:
        reason = "half of a surrogate pair in it is no character"
    except OSError as error:
        reason = error.strerror or str(error)
    except UnicodeDecodeError as error:
        is_archive = zipfile.is_zipfile(path)
        reason = "a ZIP archive, unpack it" if is_archive else f"byte {error.start} is not UTF-8"
    except (ValueError, RecursionError) as error:
        reason = f"it is no JSON: {error}" if path.stat().st_size else "it is empty"
    raise UserError(f"cannot read '{path}' ({reason}); export it again")


def kind_of(content: Any) -> str | None:
    """Which other kind of file this is, and what to do with it; None for instances of COCO."""
    # Lists
    if isinstance(content, list):
        first = content[0] if content and isinstance(content[0], dict) else {}
        if "image_id" in first:
            return "it is a list of results; take the file with 'images' and 'categories'"
        if "data" in first or "annotations" in first:
            return "it is of Label Studio; import it as label-studio"
        return "it is a list; take the file with 'images', 'annotations' and 'categories'"

    # Objects
    if not isinstance(content, dict):
        return "it holds a single value; take the file with 'images' and 'annotations'"
    if "video_annotations" in content:
        return "it is of VISOR; import it as visor"
    if "shapes" in content and "imagePath" in content:
        return "it is of labelme; convert it to COCO"
    if "videos" in content:
        return "it is of videos; export frames and their labels"
    if "images" not in content or "annotations" not in content:
        missing = "images" if "images" not in content else "annotations"
        return f"it has no '{missing}'; take the file of the data set, not that of the results"
    annotations = content["annotations"]
    if not isinstance(annotations, list):
        return "its 'annotations' are no list; export it again"
    annotations = [each for each in annotations if isinstance(each, dict)]
    if any("segments_info" in each for each in annotations):
        return "it is panoptic; convert it to instances"
    if not annotations or any(each.get("segmentation") for each in annotations):
        return None
    if all("caption" in each for each in annotations):
        return "it has captions alone; put them into the file of the masks"
    if any("keypoints" in each for each in annotations):
        return "it has keypoints and no masks; label masks"
    return "it has boxes and no masks; label masks"


def checked_rle(segmentation: Any, size: tuple[int, int], where: str) -> Rle:
    """A mask in run lengths, compressed or not.

    pycocotools reads memory of others where runs do not fill the mask, so it is not asked.

    Raises:
        UserError: it is no such code, of another size, or its runs do not fill the mask.
    """
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise UserError(
            f"{where}: its segmentation is {shown(segmentation)}; expected polygons "
            "or an object with size and counts"
        )
    if segmentation["size"] != list(size):
        raise UserError(
            f"{where}: its mask is of size {shown(segmentation['size'])} (height, width), its "
            f"image of {list(size)}; export masks at the size of the photo"
        )

    # A text is the compressed form
    counts = segmentation["counts"]
    height, width = size
    if isinstance(counts, str):
        rle = Rle(size=[height, width], counts=counts)
        try:
            validate(rle)
        except ValueError as error:
            raise UserError(f"{where}: the run-length code {error}; export it again") from None
        return rle

    # A list has the runs themselves
    are_runs = isinstance(counts, list) and all(type(run) is int and run >= 0 for run in counts)
    if not are_runs or sum(counts) != height * width:
        raise UserError(
            f"{where}: its counts are no runs that add up to {height} x {width} pixels; export it "
            "again"
        )
    code = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return Rle(size=[height, width], counts=code["counts"].decode("ascii"))


def check_polygon(part: Any, size: tuple[int, int], where: str) -> None:
    """Check that ``part`` is a list of corners x, y, x, y within the photo.

    Raises:
        UserError: it is none, or a corner lies more than a pixel outside.
    """
    are_numbers = isinstance(part, list) and all(type(each) in (int, float) for each in part)
    if not are_numbers or len(part) % 2 or not all(math.isfinite(each) for each in part):
        raise UserError(
            f"{where}: a part of its polygon is {shown(part)}, no list of corners x, y, x, y; "
            "export it again"
        )
    height, width = size
    for x, y in zip(part[::2], part[1::2], strict=True):
        is_inside = -_TOLERANCE <= x <= width + _TOLERANCE
        if not is_inside or not -_TOLERANCE <= y <= height + _TOLERANCE:
            raise UserError(
                f"{where}: corner ({x:g}, {y:g}) of its polygon lies outside of the image of "
                f"{width} x {height}; export polygons in pixels of the photo"
            )


def fill_polygons(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> Rle:
    """The union of polygons as pycocotools fills them.

    Args:
        polygons: corners x, y, x, y in pixels, at least three of each.
        size: height and width.
    """
    height, width = size
    code = coco_mask.merge(coco_mask.frPyObjects([list(each) for each in polygons], height, width))
    return Rle(size=[height, width], counts=code["counts"].decode("ascii"))


def _is_crowd(annotation: dict) -> bool:
    return annotation.get("iscrowd") in (1, True)


def _key(value: Any) -> Any:
    """An id to look up; what is no id is not found."""
    return value if isinstance(value, int | str) else repr(value)


# Writing


def write(images: list[LabeledImage], out: Path) -> None:
    """Write ``annotations/instances_default.json``, and ``results.json`` where regions have scores.

    Both are what pycocotools reads: masks are compressed run lengths, and ids start at 1, because
    pycocotools takes an annotation of id 0 for a miss. The empty folder ``images`` is for the
    photos, which are not copied; datumaro opens no data set without it.

    Args:
        images: photos; several regions may overlap.
        out: a new folder.

    Raises:
        UserError: two photos have one name, or the folder holds anything.
    """
    # Categories by name
    names = {category_of(region) for image in images for region in image.regions}
    category_ids = {name: number for number, name in enumerate(sorted(names), start=1)}

    # Photos and annotations
    photos: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    for image_id, image in enumerate(images, start=1):
        if seen.setdefault(image.name, image.where) != image.where:
            raise UserError(
                f"{image.where}: photo {image.name!r} is also that of "
                f"{seen[image.name]}; export one of them"
            )
        height, width = image.size
        photos.append({"id": image_id, "file_name": image.name, "width": width, "height": height})
        for region in image.regions:
            category_id = category_ids[category_of(region)]
            mask = _mask_fields(region, image_id, category_id)
            annotations.append({"id": len(annotations) + 1, **mask, "iscrowd": 0})
            if region.score is not None:
                annotations[-1]["score"] = region.score
                results.append({**mask, "score": region.score})

    # Files
    categories = [{"id": number, "name": name} for name, number in category_ids.items()]
    content = {
        "info": {"description": "written by annexe"},
        "licenses": [],
        "images": photos,
        "categories": categories,
        "annotations": annotations,
    }
    with new_folder(out) as part:
        (part / PHOTO_FOLDER).mkdir()
        write_json(part / DATA_FILE, content)
        if results:
            write_json(part / RESULTS_FILE, results)


def category_of(region: Region) -> str:
    """Name of the category of a region, which has to have one."""
    side = f"{region.hand} hand" if region.hand in ("left", "right") else region.hand and "hand"
    return region.name or side or _UNNAMED


def _mask_fields(region: Region, image_id: int, category_id: int) -> dict[str, Any]:
    """What annotations and results have in common."""
    left, top, right, bottom = bounding_box(region.rle)
    return {
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": region.rle,
        "area": area([region.rle]),
        "bbox": [left, top, right - left, bottom - top],
    }
