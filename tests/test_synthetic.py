"""Synthetic scenes: same seed same bytes, the layout of Ego-IRGBench, and pairs that training never shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from annexe.datasets.image_names import CATEGORIES, SPLITS
from annexe.errors import UserError
from annexe.prompts import NO_TARGET_ANSWER
from annexe.synthetic.canvas import HEIGHT, WIDTH, Canvas, silhouette
from annexe.synthetic.generate import generate
from annexe.synthetic.language import NUM_SLOTS, annotations, caption
from annexe.synthetic.render import item_patches, render
from annexe.synthetic.scene import (
    COLOURS,
    HAND_IDS,
    NUM_VARIANTS,
    Item,
    Scene,
    draw_scene,
    held_out_colour,
)

SETTINGS = {"num_images": 20, "seed": 3, "val_fraction": 0.25, "test_fraction": 0.25}
STEM = re.compile(r"ZY\d{11}_H\d_C\d\d_N\d\d_S\d{3}_s\d\d_T\d_\d{5}")
HELD_OUT_NAMES = [f"{held_out_colour(number)} {noun}" for number, noun in CATEGORIES.items()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "data"
    generate(out, **SETTINGS, num_workers=1)
    return out


def load(root: Path, split: str) -> dict[str, list[dict]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((root / "dataset_split" / split).glob("*.json"))}


def random_scenes(num: int, *, unseen_pair: bool = False) -> list[tuple[Scene, np.random.Generator]]:
    generators = [np.random.default_rng([11, index]) for index in range(num)]
    return [(draw_scene(rng, unseen_pair=unseen_pair), rng) for rng in generators]


def test_bytes_do_not_depend_on_workers(root: Path, tmp_path: Path) -> None:
    generate(tmp_path / "again", **SETTINGS, num_workers=2)
    files = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    again = tmp_path / "again"
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for name in files:
        assert (root / name).read_bytes() == (again / name).read_bytes(), name


def test_layout_on_disk(root: Path) -> None:
    stems = [stem for split in SPLITS for stem in load(root, split)]
    assert [len(load(root, split)) for split in SPLITS] == [10, 5, 5]
    assert len({stem[-5:] for stem in stems}) == 20
    for stem in stems:
        assert STEM.fullmatch(stem)
        image = cv2.imread(str(root / "RGB" / f"{stem}.jpg"), cv2.IMREAD_UNCHANGED)
        depth = cv2.imread(str(root / "depth" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
        mask = cv2.imread(str(root / "mask" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
        assert image.shape == (HEIGHT, WIDTH, 3)
        assert (depth.shape, depth.dtype) == ((HEIGHT, WIDTH), np.uint16)
        assert (mask.shape, mask.dtype) == ((HEIGHT, WIDTH), np.uint8)
        assert (depth[:8] == 0).all() and 0.01 < (depth == 0).mean() < 0.15
        assert depth[depth > 0].min() > 150 and depth.max() <= 1500


def test_annotations_fit_the_mask(root: Path) -> None:
    for split in SPLITS:
        for stem, records in load(root, split).items():
            mask = cv2.imread(str(root / "mask" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
            sizes = np.bincount(mask.ravel(), minlength=8)
            assert len({record["caption"] for record in records}) == 1
            questions = [question for record in records for question in record["questions"]]
            assert [question["id"] for question in questions] == list(range(len(questions)))
            assert len({question["query"] for question in questions}) == len(questions)
            for record in records:
                check_record(record)
                for identity in filter(None, record["masks_idx"]):
                    assert sizes[identity] > (20_000 if identity in HAND_IDS.values() else 60_000)


def check_record(record: dict) -> None:
    used = [identity for identity in record["masks_idx"] if identity]
    assert len(record["masks_idx"]) == len(record["tokens"]) == NUM_SLOTS
    assert record["masks_idx"][: len(used)] == used
    assert record["with_mask"] == int(bool(used))
    assert re.findall(r"<MSK_(\d)>", record["answer"]) == [str(slot) for slot in range(len(used))]
    assert 5 <= len(record["questions"]) <= 10
    assert {question["is_sentence"] for question in record["questions"]} <= {0, 1}
    assert all(token == "" for token in record["tokens"][max(len(used), 1) :])
    if not used:
        assert record["answer"] == NO_TARGET_ANSWER
        assert record["tokens"][0] == "none"
        return
    assert used == sorted(used, key=[2, 3, 1, 4].index)
    for slot, (identity, token) in enumerate(zip(used, record["tokens"], strict=False)):
        assert f"the mask of {token} is <MSK_{slot}>" in record["answer"].replace("The mask", "the mask")
        assert (token == "the right hand") == (identity == 2)
        assert (token == "the left hand") == (identity == 3)


def test_training_never_meets_a_held_out_pair(root: Path) -> None:
    texts = json.dumps(load(root, "train"))
    for scene, rng in random_scenes(400):
        items = [*(act.item for act in scene.interactions), *scene.distractors]
        assert all(item.colour != held_out_colour(item.category) for item in items)
        texts += json.dumps(annotations(scene, rng, allow_held_out=False))
    assert not [name for name in HELD_OUT_NAMES if name in texts]


def test_unseen_pairs_are_listed(root: Path) -> None:
    listed = (root / "subsets" / "unseen_pairs.txt").read_text().split()
    assert len(listed) == 2
    for split in ("val", "test"):
        for stem, records in load(root, split).items():
            shown = any(name in records[0]["caption"] for name in HELD_OUT_NAMES)
            assert shown == (stem in listed)


def test_share_of_questions() -> None:
    images = [annotations(scene, rng, allow_held_out=False) for scene, rng in random_scenes(400)]
    records = [record for image in images for record in image]
    num_queries = sum(len(record["questions"]) for record in records)
    assert 0.30 < np.mean([not record["with_mask"] for record in records]) < 0.38
    assert 75 < num_queries / len(images) < 82
    assert 9 < len(records) / len(images) < 10
    for record in records:
        check_record(record)


def test_caption_follows_from_the_scene() -> None:
    for scene, _ in random_scenes(100):
        sentence = caption(scene)
        for act in scene.interactions:
            assert f"{act.verb}ing" in sentence and act.item.name in sentence
        assert not [item for item in scene.distractors if item.name in sentence]


def test_every_category_is_drawn_in_every_colour() -> None:
    shapes: dict[tuple[int, int], np.ndarray] = {}
    for category in CATEGORIES:
        for variant in range(NUM_VARIANTS):
            means = []
            for colour in COLOURS:
                patches = item_patches(Item(category, colour, variant), centre=(400, 400), area=2e5, longest=640)
                canvas = Canvas(np.full((HEIGHT, WIDTH, 3), 140, np.uint8), np.zeros((HEIGHT, WIDTH)))
                canvas.paint(patches, identity=1, near=500)
                seen = canvas.ids == 1
                means.append(canvas.image[seen].mean(axis=0))
            assert seen.mean() > 0.04
            distances = np.linalg.norm(np.subtract.outer(means, means).diagonal(axis1=1, axis2=3), axis=-1)
            assert distances[~np.eye(len(COLOURS), dtype=bool)].min() > 25
            shapes[category, variant] = silhouette(patches)[::4, ::4]
    for first, shape in shapes.items():
        for second, other in shapes.items():
            if first < second:
                assert (shape & other).sum() / (shape | other).sum() < 0.97, (first, second)


def test_hands_hide_little_of_an_object() -> None:
    for scene, rng in random_scenes(12, unseen_pair=True):
        ids = render(scene, rng).ids
        for act in scene.interactions:
            rows, columns = np.nonzero(ids == act.identity)
            assert len(rows) > 0.04 * HEIGHT * WIDTH
            assert max(np.ptp(rows), np.ptp(columns)) > 300
        assert {HAND_IDS[side] for side in scene.visible_sides} == set(np.unique(ids)) & {2, 3}


def test_finished_folder_is_reused_and_others_are_refused(root: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    generate(root, **SETTINGS)
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    with pytest.raises(UserError, match="other settings"):
        generate(root, **(SETTINGS | {"seed": 4}))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        generate(tmp_path, **SETTINGS)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "synthetic.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        generate(tmp_path / "cut", **SETTINGS)
    with pytest.raises(UserError, match="3 of them for val and 3 for test"):
        generate(tmp_path / "new", num_images=4, seed=0, val_fraction=0.8, test_fraction=0.8)


def test_interrupted_run_is_redone(root: Path, tmp_path: Path) -> None:
    settings = {"num_images": 2, "seed": 0, "val_fraction": 0.0, "test_fraction": 0.0, "num_workers": 1}
    generate(tmp_path, **settings)
    photo = next((tmp_path / "RGB").iterdir())
    whole = photo.read_bytes()
    photo.write_bytes(whole[:100])
    (tmp_path / "synthetic.json").rename(tmp_path / "synthetic.unfinished.json")
    generate(tmp_path, **settings)
    assert photo.read_bytes() == whole
    assert (tmp_path / "synthetic.json").exists() and not (tmp_path / "synthetic.unfinished.json").exists()
