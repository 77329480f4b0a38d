"""Synthetic egocentric scenes on disk, in exactly the layout of Ego-IRGBench.

The pictures stand in for the real data in demos and tests: drawn hands act on drawn objects, with
the same files, fields and kinds of question. The same settings always give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np

from annexe.datasets.image_names import SPLITS
from annexe.errors import UserError
from annexe.files import require_room, write_json
from annexe.synthetic.canvas import HEIGHT
from annexe.synthetic.hard_language import hard_annotations
from annexe.synthetic.hard_scene import draw_hard_scene, lay_out
from annexe.synthetic.language import easy_annotations
from annexe.synthetic.render import Picture, id_map, paint, render
from annexe.synthetic.scene import KINDS, VERBS, Scene, draw_scene
from annexe.terminal import track
from annexe.workers import in_processes, num_cores

MIN_HEIGHT = 90
HARD_LISTS = ("unseen_pairs", "unseen_wordings", "unseen_layouts", "ordinary")

_UNSEEN_EVERY = 5  # one in so many val and test images shows a pair that train never shows
# The lists of hard test images, by index modulo _HARD_EVERY; the others are ordinary.
_HARD_EVERY = 8
_HARD_TURNS = {0: "unseen_pairs", 3: "unseen_wordings", 6: "unseen_layouts"}
# Raise it when the same seed draws other bytes, so that old folders are not reused.
_DRAWING_VERSION = 3

_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 90]
# A third of the time of the default, for files a little larger.
_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]
# Bytes of all files of a scene for each pixel of its picture: .21 at full height, more at others
_MIN_BYTES_OF_PIXEL = 0.2
_FINISHED = "synthetic.json"
_UNFINISHED = "synthetic.unfinished.json"


@dataclass(frozen=True)
class Settings:
    """All that the bytes of a synthetic data set depend on."""

    num_images: int
    seed: int
    val_fraction: float
    test_fraction: float
    hard: bool = False
    height: int = HEIGHT
    drawing_version: int = _DRAWING_VERSION

    def split_sizes(self) -> tuple[int, int, int]:
        num_val = round(self.num_images * self.val_fraction)
        num_test = round(self.num_images * self.test_fraction)
        return self.num_images - num_val - num_test, num_val, num_test

    def as_recorded(self) -> dict[str, Any]:
        """What a folder's file records: a height only if it is not the full one."""
        recorded = asdict(self)
        if self.height == HEIGHT:
            del recorded["height"]
        return recorded


@dataclass(frozen=True)
class _Job:
    """One image to make.

    Attributes:
        out: the data root.
        settings: of the data set.
        split: its split.
        index: its position in the split, from 0 on.
        frame: its position in the data set, from 1 on.
    """

    out: Path
    settings: Settings
    split: str
    index: int
    frame: int

    @property
    def subset(self) -> str | None:
        """The list that this image is on.

        Easy images name the unseen pairs of val and test, hard ones all of test.
        """
        if self.settings.hard:
            if self.split != "test":
                return None
            return _HARD_TURNS.get(self.index % _HARD_EVERY, "ordinary")
        is_unseen = self.split != "train" and self.index % _UNSEEN_EVERY == 0
        return "unseen_pairs" if is_unseen else None


def generate(
    out: Path,
    *,
    num_images: int,
    seed: int,
    val_fraction: float = 0.05,
    test_fraction: float = 0.15,
    hard: bool = False,
    height: int = HEIGHT,
    num_workers: int | None = None,
) -> None:
    """Writes a synthetic data set, or returns at once if `out` holds this very one.

    Args:
        out: the data root to make.
        num_images: images in train, val and test together.
        seed: settles every byte, together with the other settings but not `num_workers`.
        val_fraction: share of the images in val.
        test_fraction: share of the images in test.
        hard: whether things look alike, lie anywhere, hide each other, and questions tell them
            apart.
        height: rows of a picture, whose width is 16/9 of it. Names and questions are the same at
            every height, and the pictures show the same.
        num_workers: processes; all cores if None.

    Raises:
        UserError: the numbers make no sense, `out` holds anything else, or its disk is too small.
    """
    settings = Settings(num_images, seed, val_fraction, test_fraction, hard, height)
    _require_sound(settings, num_workers)
    if _is_complete(out, settings):
        return
    if not (out / _UNFINISHED).exists():
        pixels_of_picture = height**2 * 16 // 9
        require_room(out, round(num_images * pixels_of_picture * _MIN_BYTES_OF_PIXEL))

    # folders, and a note that the data set is unfinished
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / _UNFINISHED, settings.as_recorded())
    splits = [f"dataset_split/{split}" for split in SPLITS]
    for folder in ("RGB", "depth", "mask", "subsets", *splits):
        (out / folder).mkdir(parents=True, exist_ok=True)

    # images
    jobs = list(_jobs(out, settings))
    drawn = in_processes(_make, jobs, min(num_workers or num_cores(), len(jobs)))
    stems = list(track(drawn, "Drawing scenes", len(jobs)))

    # lists
    for name in HARD_LISTS if hard else HARD_LISTS[:1]:
        listed = []
        for stem, job in zip(stems, jobs, strict=True):
            if job.subset == name:
                listed.append(f"{stem}\n")
        (out / "subsets" / f"{name}.txt").write_text("".join(listed))
    (out / _UNFINISHED).replace(out / _FINISHED)


def _require_sound(settings: Settings, num_workers: int | None) -> None:
    """Refuse numbers out of range.

    Raises:
        UserError: naming the option of `annexe synth`.
    """
    if settings.num_images < 1:
        raise UserError(f"--images is {settings.num_images}; give at least 1")
    if settings.seed < 0:
        raise UserError(f"--seed is {settings.seed}; give a number from 0 on")
    if num_workers is not None and num_workers < 1:
        raise UserError(f"--workers is {num_workers}; give at least 1")
    if not MIN_HEIGHT <= settings.height <= HEIGHT:
        raise UserError(f"--height is {settings.height}; give {MIN_HEIGHT} to {HEIGHT} rows")
    sizes = settings.split_sizes()
    if min(sizes) < 0:
        raise UserError(
            f"--val and --test take {sizes[1]} and {sizes[2]} of {settings.num_images} images; "
            "give smaller ones, or more --images"
        )


def _is_complete(out: Path, settings: Settings) -> bool:
    """Whether `out` holds this very data set.

    Raises:
        UserError: it holds something else.
    """
    for name in (_FINISHED, _UNFINISHED):
        if (out / name).exists():
            _require_same(out, name, settings)
            return name == _FINISHED
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"'{out}' is not empty and holds no synthetic scenes; name a new or an empty folder"
        )
    return False


def _require_same(out: Path, name: str, settings: Settings) -> None:
    """Refuses a folder whose file records other settings, or cannot be read."""
    try:
        found = {"height": HEIGHT} | json.loads((out / name).read_text())
    except (ValueError, TypeError):
        raise UserError(
            f"'{out / name}' is damaged; delete '{out}', or name another folder"
        ) from None
    others = []
    for key, value in asdict(settings).items():
        if found.get(key) != value:
            others.append(f"{key} is {found.get(key)}, not {value}")
    if others:
        raise UserError(
            f"'{out}' holds synthetic scenes made with other settings ({', '.join(others)}); "
            "name another folder or delete it"
        )


def _jobs(out: Path, settings: Settings) -> Iterator[_Job]:
    frame = 0
    for split, size in zip(SPLITS, settings.split_sizes(), strict=True):
        for index in range(size):
            frame += 1
            yield _Job(out, settings, split, index, frame)


def _make(job: _Job) -> str:
    """Draws, describes and writes one scene; returns its stem."""
    settings = job.settings
    rng = np.random.default_rng([settings.seed, SPLITS.index(job.split), job.index])
    make_image = _hard_image if settings.hard else _easy_image
    scene, picture, records = make_image(job, rng)

    stem = _stem(job, scene)
    _write_image(job.out / "RGB" / f"{stem}.jpg", picture.image, _JPEG)
    _write_image(job.out / "depth" / f"{stem}.png", picture.depth, _PNG)
    _write_image(job.out / "mask" / f"{stem}.png", picture.ids, _PNG)
    path = job.out / "dataset_split" / job.split / f"{stem}.json"
    # as `json.dumps(records, indent=1)` has it, in a fifth of the time
    text = msgspec.json.format(msgspec.json.encode(records), indent=1)
    path.write_bytes(text + b"\n")
    return stem


def _easy_image(job: _Job, rng: np.random.Generator) -> tuple[Scene, Picture, list[dict]]:
    scene = draw_scene(rng, unseen_pair=job.subset is not None)
    picture = render(scene, rng, job.settings.height)
    records = easy_annotations(scene, rng, allow_held_out=job.split != "train")
    return scene, picture, records


def _hard_image(job: _Job, rng: np.random.Generator) -> tuple[Scene, Picture, list[dict]]:
    unseen_pair = job.subset == "unseen_pairs"
    crossed = job.subset == "unseen_layouts"
    scene = draw_hard_scene(rng, unseen_pair=unseen_pair, one_hand=crossed)
    layout = lay_out(scene, rng, crossed=crossed)
    height = job.settings.height
    picture = paint(scene, layout, rng, height)

    # What is asked depends on what is visible where: at full size, so that it is always the same.
    ids = picture.ids if height == HEIGHT else id_map(layout)
    records = hard_annotations(
        scene,
        ids,
        rng,
        allow_held_out=unseen_pair,
        held_out_wordings=job.subset == "unseen_wordings",
    )
    return scene, picture, records


def _write_image(path: Path, image: np.ndarray, parameters: list[int]) -> None:
    """Like `cv2.imwrite`, but a full disk raises instead of returning False."""
    path.write_bytes(cv2.imencode(path.suffix, image, parameters)[1].tobytes())


def _stem(job: _Job, scene: Scene) -> str:
    """HOI4D's pattern: camera, human, category, instance, room, layout, task, frame."""
    act = scene.interactions[0]
    camera = (job.settings.seed * len(SPLITS) + SPLITS.index(job.split) + 1) % 100000
    parts = (
        f"ZY202108{camera:05d}",
        f"H{scene.human + 1}",
        f"C{act.item.category:02d}",
        f"N{act.item.instance:02d}",
        f"S{scene.table + 1:03d}",
        f"s{KINDS.index(scene.kind) + 1:02d}",
        f"T{VERBS.index(act.verb) + 1}",
        f"{job.frame:05d}",
    )
    return "_".join(parts)
