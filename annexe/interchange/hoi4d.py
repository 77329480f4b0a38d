"""HOI4D (Liu et al., CVPR 2022): colored masks of hands and of the things of a task.

The facts are from github.com/leolyliu/HOI4D-Instructions: README.md, utils/color_map.py,
definitions/motion segmentation/label.csv and prepare_4Dseg/utils.py. What a color means depends on
the category of the clip. Contact is not labeled: the events of action/color.json say neither which
hand acts nor on which thing.

Legend: H, W height and width of a photo.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from annexe.datasets.photos import photo_size
from annexe.datasets.pixels import read_image
from annexe.errors import UserError
from annexe.interchange.labels import ImportReport, LabeledImage, ReadOptions, Region
from annexe.rle import encode

NO_PHOTO = "masks without a photo"
FEW_PIXELS = "masks with a few pixels in colors without a meaning, taken as background"

_MAX_STRAY = 20  # pixels of a mask that may have other colors
_NUM_COLORS = 7  # background and six labels
_SHIFTED = ("shift_mask", "mask")
_MASK_FOLDERS = {"ZY20210800001": ("mask", "shift_mask")}
"""Where the masks of a camera are, the right folder first; `_SHIFTED` for all other cameras."""

_CLIP = re.compile(
    r"(?P<camera>ZY\d+)/H\d+/C(?P<category>\d+)/N\d+/S\d+/s\d+/T\d+", re.ASCII | re.IGNORECASE
)
_RIGHT = "right hand"
_LEFT = "left hand"

# Label 1, 2, ... of every category; parts of one thing have one name, and a number tells a second
# thing of the same name
_LABELS = {
    1: ("toy car", _RIGHT),
    2: ("mug", _RIGHT, "mug 2"),
    3: ("laptop", _RIGHT, "laptop"),
    4: ("storage furniture", _RIGHT, "storage furniture", "storage furniture", "bottle"),
    5: ("bottle", _RIGHT, "mug"),
    6: ("safe", _RIGHT, "safe", "bottle"),
    7: ("bowl", _RIGHT, "ball"),
    8: ("bucket", _RIGHT, "bucket", "bucket 2", "bucket 2", _LEFT),
    9: ("scissors", _RIGHT, "scissors"),
    11: ("pliers", _RIGHT, "pliers"),
    12: ("kettle", _RIGHT, "mug"),
    13: ("knife", _RIGHT, "apple"),
    14: ("trash can", _RIGHT, "trash can", "bottle"),
    17: ("lamp", _RIGHT, "lamp", "lamp", "lamp", _LEFT),
    18: ("stapler", _RIGHT, "stapler", "stapler", "paper"),
    20: ("chair", _RIGHT, _LEFT),
}


@dataclass(frozen=True)
class _Clip:
    """One clip.

    Attributes:
        name: fields joined as in the stems of Ego-IRGBench, without the frame.
        labels: folder of its labels.
        videos: folder of its videos and frames.
        camera: name of the camera.
        category: of HOI4D.
    """

    name: str
    labels: Path
    videos: Path
    camera: str
    category: int


def read(
    source: Path, options: ReadOptions, report: ImportReport
) -> Iterator[LabeledImage | UserError]:
    """Frames of all clips in a folder that have masks: see `labels.Reader`."""
    folders = sorted(path.parent for path in source.absolute().rglob("2Dseg") if path.is_dir())
    if not folders:
        raise UserError(
            f"'{source}' holds no folder ZY*/H*/C*/N*/S*/s*/T*/2Dseg; give the folder of the "
            "annotations of HOI4D"
        )
    if options.is_complete:
        report.note("--complete has no effect: HOI4D labels only the things of a task")
    for folder in folders:
        try:
            yield from _read_clip(_clip(folder, options), report)
        except UserError as error:
            yield error


def _clip(folder: Path, options: ReadOptions) -> _Clip:
    """The clip of a folder, by its path.

    Raises:
        UserError: the path is none of HOI4D, or of a category without labels.
    """
    path = "/".join(folder.parts[-7:])
    match = _CLIP.fullmatch(path)
    if match is None:
        raise UserError(
            f"'{folder}' is no path ZY*/H*/C*/N*/S*/s*/T*, whose fields tell what masks mean; "
            "keep the folders of HOI4D"
        )
    category = int(match["category"])
    if category not in _LABELS:
        raise UserError(f"'{folder}' is of category C{category}, which HOI4D does not describe")
    videos = folder if options.images is None else options.images / path
    return _Clip("_".join(folder.parts[-7:]), folder, videos, match["camera"], category)


def _read_clip(clip: _Clip, report: ImportReport) -> Iterator[LabeledImage | UserError]:
    """Frames of a clip, in their order.

    Raises:
        UserError: the clip has no masks, or no frames.
    """
    # Files by the number of their frame
    masks = _frames(_mask_folder(clip, report), ".png")
    photos = _frames(clip.videos / "align_rgb", ".jpg", ".png")
    depths = _frames(clip.videos / "align_depth", ".png")
    if not masks:
        raise UserError(f"'{clip.labels / '2Dseg'}' holds no masks 00000.png, 00001.png, ...")
    if not photos:
        raise _no_frames(clip)
    video = clip.videos / "align_depth" / "depth_video.avi"
    if not depths and video.is_file():
        command = _decoding(video, "png")
        report.note(f"some clips have depth as a video alone, which was not taken: {command}")

    # Every mask with its photo
    for frame, mask in sorted(masks.items()):
        if frame not in photos:
            report.leave_out(NO_PHOTO, f"'{mask}'")
            continue
        try:
            regions, absent = _read_mask(mask, photos[frame], clip, report)
        except UserError as error:
            yield error
            continue
        yield LabeledImage(
            name=f"{clip.name}_{frame:05d}.jpg",
            photo=photos[frame],
            size=photo_size(photos[frame]),
            where=f"'{mask}'",
            regions=regions,
            absent_hands=absent,
            depth=depths.get(frame),
            sequence=clip.name,
        )


def _mask_folder(clip: _Clip, report: ImportReport) -> Path:
    """The folder with the masks of a clip that fit its frames."""
    wanted, other = _MASK_FOLDERS.get(clip.camera, _SHIFTED)
    folder = clip.labels / "2Dseg" / wanted
    if not folder.is_dir() and (clip.labels / "2Dseg" / other).is_dir():
        report.note(
            f"some clips of camera {clip.camera} have masks in 2Dseg/{other} alone and not in "
            f"2Dseg/{wanted}; look whether they fit the photos, such as those of {clip.name}"
        )
        return clip.labels / "2Dseg" / other
    return folder


def _frames(folder: Path, *endings: str) -> dict[int, Path]:
    """Files of a folder by the number of their frame: 00012.jpg and 12.jpg are frame 12."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix.lower() in endings and re.fullmatch(r"[0-9]{1,9}", path.stem):
            found[int(path.stem)] = path
    return found


def _no_frames(clip: _Clip) -> UserError:
    """The error for a clip without photos, with the command that makes them."""
    folder = clip.videos / "align_rgb"
    video = folder / "image.mp4"
    if video.is_file():
        return UserError(f"'{folder}' holds a video and no frames; {_decoding(video, 'jpg')}")
    return UserError(
        f"'{folder}' holds no frames 00000.jpg, 00001.jpg, ...; name the folder of the videos, "
        "which has the same folders as that of the annotations (--images DIR)"
    )


def _decoding(video: Path, ending: str) -> str:
    """How to turn a video into frames."""
    frames = video.parent / f"%05d.{ending}"
    quality = "-qscale:v 2 " if ending == "jpg" else ""
    return (
        f"decode such videos first: ffmpeg -i '{video}' -start_number 0 -vf fps=15 "
        f"{quality}'{frames}'"
    )


# Masks


def _read_mask(
    path: Path, photo: Path, clip: _Clip, report: ImportReport
) -> tuple[list[Region], frozenset[str]]:
    """Regions of a mask, things before hands, and sides of the hands that are not in it.

    Raises:
        UserError: it is damaged, of another size than the photo, or has other colors.
    """
    # Labels as indices
    image = read_image(path, fix="restore it from HOI4D")
    size = photo_size(photo)
    if (image.height, image.width) != size:
        raise UserError(
            f"'{path}' is {image.width} x {image.height}, its photo '{photo}' is "
            f"{size[1]} x {size[0]}; take both from HOI4D"
        )
    if len(image.getbands()) == 1 and image.mode != "P":
        raise UserError(
            f"'{path}' has one channel without colors (mode {image.mode}); "
            "take the colored masks of HOI4D"
        )
    labels = _LABELS[clip.category]
    indices = _indices(np.asarray(image.convert("RGB")))
    is_stray = (indices < 0) | (indices > len(labels))
    num_stray = int(np.count_nonzero(is_stray))
    if num_stray > _MAX_STRAY:
        row, column = np.argwhere(is_stray)[0]
        color = image.convert("RGB").getpixel((int(column), int(row)))
        raise UserError(
            f"'{path}' has {num_stray:,} pixels in colors that mean nothing in category "
            f"C{clip.category}, such as {color}; restore it from HOI4D"
        )
    if num_stray:
        report.leave_out(FEW_PIXELS, f"'{path}'")

    # Parts of one thing are one region
    masks: dict[str, np.ndarray] = {}
    for index, label in enumerate(labels, start=1):
        mask = indices == index
        if mask.any():
            masks[label] = masks[label] | mask if label in masks else mask
    hands = {_RIGHT: "right", _LEFT: "left"}
    names = {label: label.removesuffix(" 2") for label in masks}
    counts = Counter(names.values())
    regions = []
    for label in sorted(masks, key=lambda each: (each in hands, labels.index(each))):
        name = names[label]
        region = Region(encode(masks[label]), name, hands.get(name), counts[name] == 1)
        regions.append(region)
    absent = {side for name, side in hands.items() if name in labels and name not in masks}
    return regions, frozenset(absent)


def _indices(colors: np.ndarray) -> np.ndarray:
    """Indices of PASCAL VOC's palette, int16[H, W], of uint8[H, W, 3]; -1 for other colors."""
    indices = np.full(colors.shape[:2], -1, np.int16)
    packed = colors.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    for index in range(_NUM_COLORS):
        # Bit j of the index is the high bit of channel j, for indices below 8
        red, green, blue = (128 * (index >> channel & 1) for channel in range(3))
        indices[packed == (red << 16 | green << 8 | blue)] = index
    return indices
