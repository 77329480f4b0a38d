"""Synthetic egocentric scenes on disk, in exactly the layout of Ego-IRGBench.

The pictures stand in for the real data in demos and tests: drawn hands act on drawn objects, with the same
files, fields and kinds of question. The same settings always give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from rich.progress import track

from annexe.datasets.image_names import SPLITS
from annexe.errors import UserError
from annexe.files import write_json
from annexe.workers import in_processes, num_cores
from annexe.synthetic.hard_language import hard_annotations
from annexe.synthetic.hard_scene import draw_hard_scene, place
from annexe.synthetic.language import annotations
from annexe.synthetic.render import Picture, paint, render
from annexe.synthetic.scene import KINDS, VERBS, Scene, draw_scene

_UNSEEN_EVERY = 5  # one in so many val and test images shows a pair that train never shows
HARD_LISTS = ("unseen_pairs", "unseen_wordings", "unseen_layouts", "ordinary")
_HARD_EVERY, _HARD_TURNS = 8, {0: "unseen_pairs", 3: "unseen_wordings", 6: "unseen_layouts"}
_DRAWING_VERSION = 3  # raise it when the same seed draws other bytes, so that old folders are not reused
_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]  # a third of the time
_FINISHED, _UNFINISHED = "synthetic.json", "synthetic.unfinished.json"


@dataclass(frozen=True)
class Settings:
    """All that the bytes of a synthetic data set depend on."""

    num_images: int
    seed: int
    val_fraction: float
    test_fraction: float
    hard: bool = False
    drawing_version: int = _DRAWING_VERSION

    def split_sizes(self) -> tuple[int, int, int]:
        num_val, num_test = (
            round(self.num_images * self.val_fraction),
            round(self.num_images * self.test_fraction),
        )
        return self.num_images - num_val - num_test, num_val, num_test


@dataclass(frozen=True)
class _Job:
    """One image to make: `index` counts within the split, `number` over the whole set."""

    out: Path
    seed: int
    split: str
    index: int
    number: int
    hard: bool

    @property
    def subset(self) -> str | None:
        """The list that this image is on; easy ones name the unseen pairs of val and test, hard ones all of test."""
        if not self.hard:
            return "unseen_pairs" if self.split != "train" and self.index % _UNSEEN_EVERY == 0 else None
        return _HARD_TURNS.get(self.index % _HARD_EVERY, "ordinary") if self.split == "test" else None


def generate(
    out: Path,
    *,
    num_images: int,
    seed: int,
    val_fraction: float = 0.05,
    test_fraction: float = 0.15,
    hard: bool = False,
    num_workers: int | None = None,
) -> None:
    """Writes a synthetic data set, or returns at once if `out` holds this very one.

    Args:
        out: the data root to make.
        num_images: images in train, val and test together.
        seed: settles every byte, together with the other settings but not `num_workers`.
        val_fraction: share of the images in val.
        test_fraction: share of the images in test.
        hard: whether things look alike, lie anywhere, hide each other, and questions tell them apart.
        num_workers: processes; all cores if None.

    Raises:
        UserError: the numbers make no sense, or `out` holds anything else.
    """
    settings = Settings(num_images, seed, val_fraction, test_fraction, hard)
    sizes = settings.split_sizes()
    if num_images < 1 or seed < 0 or min(sizes) < 0 or (num_workers or 1) < 1:
        raise UserError(
            f"Cannot make {num_images} images, {sizes[1]} of them for val and {sizes[2]} for test, with seed {seed}: "
            "give at least one image and worker, a seed from 0 on, and val and test that fit into all images."
        )
    if _is_complete(out, settings):
        return
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / _UNFINISHED, asdict(settings))
    for folder in ("RGB", "depth", "mask", "subsets", *(f"dataset_split/{split}" for split in SPLITS)):
        (out / folder).mkdir(parents=True, exist_ok=True)
    jobs = list(_jobs(out, settings))
    drawn = in_processes(_make, jobs, min(num_workers or num_cores(), len(jobs)))
    stems = list(track(drawn, description="Drawing scenes", total=len(jobs)))
    for name in HARD_LISTS if hard else HARD_LISTS[:1]:
        listed = [stem for stem, job in zip(stems, jobs, strict=True) if job.subset == name]
        (out / "subsets" / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in listed))
    (out / _UNFINISHED).replace(out / _FINISHED)


def _is_complete(out: Path, settings: Settings) -> bool:
    """Whether `out` holds this very data set; refuses a folder that holds something else."""
    for name in (_FINISHED, _UNFINISHED):
        if (out / name).exists():
            try:
                found, asked = dict(json.loads((out / name).read_text())), asdict(settings)
            except (ValueError, TypeError):
                raise UserError(f"'{out / name}' is damaged: delete '{out}', or name another folder.") from None
            other = [f"{key} is {found.get(key)}, not {asked[key]}" for key in asked if found.get(key) != asked[key]]
            if other:
                raise UserError(
                    f"{out} holds synthetic scenes made with other settings ({', '.join(other)}): "
                    "name another folder or delete it."
                )
            return name == _FINISHED
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty and holds no synthetic scenes: name a new or an empty folder.")
    return False


def _jobs(out: Path, settings: Settings) -> Iterator[_Job]:
    number = 0
    for split, size in zip(SPLITS, settings.split_sizes(), strict=True):
        for index in range(size):
            number += 1
            yield _Job(out, settings.seed, split, index, number, settings.hard)


def _make(job: _Job) -> str:
    """Draws, describes and writes one scene; returns its stem."""
    rng = np.random.default_rng([job.seed, SPLITS.index(job.split), job.index])
    scene, picture, language = _hard_image(job.subset, rng) if job.hard else _easy_image(job, rng)
    stem = _stem(job, scene)
    _write_image(job.out / "RGB" / f"{stem}.jpg", picture.image, [cv2.IMWRITE_JPEG_QUALITY, 90])
    for folder, image in (("depth", picture.depth), ("mask", picture.ids)):
        _write_image(job.out / folder / f"{stem}.png", image, _PNG)
    (job.out / "dataset_split" / job.split / f"{stem}.json").write_text(json.dumps(language, indent=1) + "\n")
    return stem


def _easy_image(job: _Job, rng: np.random.Generator) -> tuple[Scene, Picture, list[dict]]:
    scene = draw_scene(rng, unseen_pair=job.subset is not None)
    picture = render(scene, rng)
    return scene, picture, annotations(scene, rng, allow_held_out=job.split != "train")


def _hard_image(subset: str | None, rng: np.random.Generator) -> tuple[Scene, Picture, list[dict]]:
    unseen_pair, crossed = subset == "unseen_pairs", subset == "unseen_layouts"
    scene = draw_hard_scene(rng, unseen_pair=unseen_pair, one_hand=crossed)
    picture = paint(scene, place(scene, rng, crossed=crossed), rng)
    kept = subset == "unseen_wordings"
    return scene, picture, hard_annotations(scene, picture.ids, rng, allow_held_out=unseen_pair, kept_wordings=kept)


def _write_image(path: Path, image: np.ndarray, parameters: list[int]) -> None:
    """Like `cv2.imwrite`, but a full disk raises instead of returning False."""
    path.write_bytes(cv2.imencode(path.suffix, image, parameters)[1].tobytes())


def _stem(job: _Job, scene: Scene) -> str:
    """HOI4D's pattern: camera, human, category, instance, room, layout, task, frame."""
    verb, item = scene.interactions[0].verb, scene.interactions[0].item
    room, layout, task = scene.table + 1, KINDS.index(scene.kind) + 1, VERBS.index(verb) + 1
    camera = (job.seed * len(SPLITS) + SPLITS.index(job.split) + 1) % 100000
    return (
        f"ZY202108{camera:05d}_H{scene.human + 1}_C{item.category:02d}_N{item.instance:02d}"
        f"_S{room:03d}_s{layout:02d}_T{task}_{job.number:05d}"
    )
