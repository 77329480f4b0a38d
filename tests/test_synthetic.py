"""Synthetic scenes: same seed same bytes, the layout of Ego-IRGBench, held-out pairs, heights."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from annexe.datasets.image_names import CATEGORIES, SPLITS
from annexe.errors import UserError
from annexe.prompts import NO_TARGET_ANSWER
from annexe.synthetic.canvas import HEIGHT, Canvas, picture_width, silhouette
from annexe.synthetic.generate import generate
from annexe.synthetic.language import NUM_SLOTS, caption, easy_annotations
from annexe.synthetic.render import item_patches, render
from annexe.synthetic.scene import (
    COLORS,
    HAND_IDS,
    NUM_VARIANTS,
    Item,
    Scene,
    draw_scene,
    held_out_color,
)
from annexe.tools import synth

SMALL = HEIGHT // 4  # what needs no full size is drawn at a quarter of it
SETTINGS = {"num_images": 20, "seed": 3, "val_fraction": 0.25, "test_fraction": 0.25}
FEW = {"num_images": 3, "seed": 3, "val_fraction": 0.0, "test_fraction": 0.4, "num_workers": 1}
STEM = re.compile(r"ZY\d{11}_H\d_C\d\d_N\d\d_S\d{3}_s\d\d_T\d_\d{5}")
HELD_OUT_NAMES = [f"{held_out_color(index)} {noun}" for index, noun in CATEGORIES.items()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty small scenes."""
    out = tmp_path_factory.mktemp("synthetic") / "data"
    generate(out, **SETTINGS, height=SMALL, num_workers=1)
    return out


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few scenes of the usual height."""
    out = tmp_path_factory.mktemp("full_size") / "data"
    generate(out, **FEW)
    return out


@pytest.fixture(scope="module")
def described() -> list[tuple[Scene, list[dict]]]:
    """Four hundred scenes with what is said about them, without pictures."""
    return [
        (scene, easy_annotations(scene, rng, allow_held_out=False))
        for scene, rng in random_scenes(400)
    ]


def load(root: Path, split: str) -> dict[str, list[dict]]:
    paths = sorted((root / "dataset_split" / split).glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def files_of(root: Path) -> list[Path]:
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())


def read(root: Path, kind: str, stem: str) -> np.ndarray:
    ending = "jpg" if kind == "RGB" else "png"
    return cv2.imread(str(root / kind / f"{stem}.{ending}"), cv2.IMREAD_UNCHANGED)


def random_scenes(
    num: int, *, unseen_pair: bool = False
) -> list[tuple[Scene, np.random.Generator]]:
    generators = [np.random.default_rng([11, index]) for index in range(num)]
    return [(draw_scene(rng, unseen_pair=unseen_pair), rng) for rng in generators]


def test_bytes_do_not_depend_on_workers(root: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    generate(again, **SETTINGS, height=SMALL, num_workers=2)
    assert files_of(root) == files_of(again)
    for name in files_of(root):
        assert (root / name).read_bytes() == (again / name).read_bytes(), name


def test_layout_on_disk(root: Path) -> None:
    stems = [stem for split in SPLITS for stem in load(root, split)]
    assert [len(load(root, split)) for split in SPLITS] == [10, 5, 5]
    assert len({stem[-5:] for stem in stems}) == 20
    for stem in stems:
        check_pictures(root, stem, SMALL)


def test_pictures_are_of_full_size_unless_told_otherwise(full_size: Path) -> None:
    for split in ("train", "test"):
        for stem in load(full_size, split):
            check_pictures(full_size, stem, 1080)


def check_pictures(root: Path, stem: str, height: int) -> None:
    assert STEM.fullmatch(stem)
    depth = read(root, "depth", stem)
    mask = read(root, "mask", stem)
    size = (height, height * 16 // 9)
    assert read(root, "RGB", stem).shape == (*size, 3)
    assert (depth.shape, depth.dtype) == (size, np.uint16)
    assert (mask.shape, mask.dtype) == (size, np.uint8)
    assert (depth[: 8 * height // 1080] == 0).all()
    assert 0.01 < (depth == 0).mean() < 0.15
    assert depth[depth > 0].min() > 150
    assert depth.max() <= 1500


@pytest.mark.parametrize("height", [540, SMALL, 271])
def test_smaller_pictures_show_the_same(full_size: Path, tmp_path: Path, height: int) -> None:
    small = tmp_path / "small"
    generate(small, **FEW, height=height)
    width = picture_width(height)
    assert width == round(height * 16 / 9)
    names = set(files_of(full_size))
    assert names == set(files_of(small))
    for name in names - {Path("synthetic.json")}:
        if name.suffix in (".json", ".txt"):
            assert (small / name).read_bytes() == (full_size / name).read_bytes()
            continue
        pixels = cv2.imread(str(small / name), cv2.IMREAD_UNCHANGED)
        full = cv2.imread(str(full_size / name), cv2.IMREAD_UNCHANGED)
        assert pixels.shape[:2] == (height, width)
        shrunk = cv2.resize(full, (width, height), interpolation=cv2.INTER_NEAREST)
        if name.parent.name == "mask":
            assert set(np.unique(pixels)) == set(np.unique(full))
            assert (pixels == shrunk).mean() > 0.97
        elif name.parent.name == "depth":
            distances = np.abs(pixels.astype(float) - shrunk)[(pixels > 0) & (shrunk > 0)]
            assert np.mean(distances < 5) > 0.97
            assert abs((pixels == 0).mean() - (full == 0).mean()) < 0.01
        else:
            shrunk = cv2.resize(full, (width, height), interpolation=cv2.INTER_AREA)
            assert np.abs(shrunk.astype(float) - pixels).mean() < 10
            assert abs(shrunk.mean() - pixels.mean()) < 2


def test_annotations_fit_the_mask(root: Path) -> None:
    for split in SPLITS:
        for stem, records in load(root, split).items():
            mask = read(root, "mask", stem)
            shares = np.bincount(mask.ravel(), minlength=8) / mask.size
            assert len({record["caption"] for record in records}) == 1
            questions = [question for record in records for question in record["questions"]]
            assert [question["id"] for question in questions] == list(range(len(questions)))
            assert len({question["query"] for question in questions}) == len(questions)
            for record in records:
                check_record(record)
                for identity in filter(None, record["masks_idx"]):
                    min_pixels = 20_000 if identity in HAND_IDS.values() else 60_000
                    assert shares[identity] > min_pixels / (1080 * 1920)


def check_record(record: dict) -> None:
    used = [identity for identity in record["masks_idx"] if identity]
    assert len(record["masks_idx"]) == len(record["tokens"]) == NUM_SLOTS
    assert record["masks_idx"][: len(used)] == used
    assert record["with_mask"] == int(bool(used))
    slots = [str(slot) for slot in range(len(used))]
    assert re.findall(r"<MSK_(\d)>", record["answer"]) == slots
    assert 5 <= len(record["questions"]) <= 10
    assert {question["is_sentence"] for question in record["questions"]} <= {0, 1}
    assert all(token == "" for token in record["tokens"][max(len(used), 1) :])
    if not used:
        assert record["answer"] == NO_TARGET_ANSWER
        assert record["tokens"][0] == "none"
        return
    assert used == sorted(used, key=[2, 3, 1, 4].index)
    answer = record["answer"].replace("The mask", "the mask")
    for slot, (identity, token) in enumerate(zip(used, record["tokens"], strict=False)):
        assert f"the mask of {token} is <MSK_{slot}>" in answer
        assert (token == "the right hand") == (identity == 2)
        assert (token == "the left hand") == (identity == 3)


def test_training_never_meets_a_held_out_pair(
    root: Path, described: list[tuple[Scene, list[dict]]]
) -> None:
    texts = json.dumps(load(root, "train"))
    for scene, records in described:
        for item in (*scene.active_items, *scene.distractors):
            assert item.color != held_out_color(item.category)
        texts += json.dumps(records)
    assert not [name for name in HELD_OUT_NAMES if name in texts]


def test_unseen_pairs_are_listed(root: Path) -> None:
    listed = (root / "subsets" / "unseen_pairs.txt").read_text().split()
    assert len(listed) == 2
    for split in ("val", "test"):
        for stem, records in load(root, split).items():
            shown = any(name in records[0]["caption"] for name in HELD_OUT_NAMES)
            assert shown == (stem in listed)


def test_share_of_questions(described: list[tuple[Scene, list[dict]]]) -> None:
    images = [records for _, records in described]
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
            assert f"{act.verb}ing" in sentence
            assert act.item.name in sentence
        assert not [item for item in scene.distractors if item.name in sentence]


def test_every_category_is_drawn_in_every_color() -> None:
    shapes: dict[tuple[int, int], np.ndarray] = {}
    for category in CATEGORIES:
        for variant in range(NUM_VARIANTS):
            means = []
            for color in COLORS:
                item = Item(category, color, variant)
                patches = item_patches(item, center=(400, 400), area=2e5, max_side=640)
                size = (SMALL, picture_width(SMALL))
                canvas = Canvas(np.full((*size, 3), 140, np.uint8), np.zeros(size, np.float32))
                canvas.paint(patches, identity=1, near=500)
                seen = canvas.ids == 1
                means.append(canvas.image[seen].mean(axis=0))
            assert seen.mean() > 0.04
            differences = np.asarray(means)[:, None] - np.asarray(means)
            distances = np.linalg.norm(differences, axis=-1)
            assert distances[~np.eye(len(COLORS), dtype=bool)].min() > 25
            shapes[category, variant] = silhouette(patches)[::4, ::4]
    for first, shape in shapes.items():
        for second, other in shapes.items():
            if first < second:
                assert (shape & other).sum() / (shape | other).sum() < 0.97, (first, second)


def test_hands_hide_little_of_an_object() -> None:
    for scene, rng in random_scenes(12, unseen_pair=True):
        ids = render(scene, rng, SMALL).ids
        for act in scene.interactions:
            rows, columns = np.nonzero(ids == act.identity)
            assert len(rows) > 0.04 * ids.size
            assert max(np.ptp(rows), np.ptp(columns)) > 300 * SMALL / HEIGHT
        visible = {HAND_IDS[side] for side in scene.visible_sides}
        assert visible == set(np.unique(ids)) & {2, 3}


def test_finished_folder_is_reused_and_others_are_refused(root: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    generate(root, **SETTINGS, height=SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    with pytest.raises(UserError, match="other settings"):
        generate(root, **(SETTINGS | {"seed": 4}), height=SMALL)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        generate(tmp_path, **SETTINGS)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "synthetic.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        generate(tmp_path / "cut", **SETTINGS)
    with pytest.raises(UserError, match="--val and --test take 3 and 3 of"):
        generate(tmp_path / "new", num_images=4, seed=0, val_fraction=0.8, test_fraction=0.8)


def test_a_folder_of_another_height_is_refused(root: Path, full_size: Path) -> None:
    with pytest.raises(UserError, match=rf"\(height is {SMALL}, not 1080\)"):
        generate(root, **SETTINGS)
    with pytest.raises(UserError, match=r"\(height is 1080, not 540\)") as error:
        generate(full_size, **FEW, height=540)
    assert "\n" not in str(error.value)
    # a folder of full size records no height, as before there was a choice
    assert json.loads((root / "synthetic.json").read_text())["height"] == SMALL
    assert "height" not in json.loads((full_size / "synthetic.json").read_text())


@pytest.mark.parametrize("height", [0, 89, 1081])
def test_impossible_heights_are_refused(tmp_path: Path, height: int) -> None:
    with pytest.raises(UserError, match=f"--height is {height}; give 90 to 1080 rows"):
        generate(tmp_path / "new", **FEW, height=height)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--val=1.5", "--val is 1.5; give a share from 0 on, or a number of images"),
        ("--test=nan", "--test is nan; give a share"),
        ("--val=-1", "--val is -1; give a share"),
        ("--images=0", "--images is 0; give at least 1"),
        ("--seed=-1", "--seed is -1; give a number from 0 on"),
        ("--workers=0", "--workers is 0; give at least 1"),
        ("--images=99999999999999", "the disk of '"),
    ],
)
def test_a_wrong_number_is_named(tmp_path: Path, option: str, message: str) -> None:
    parser = argparse.ArgumentParser()
    synth.add_arguments(parser)
    words = [str(tmp_path / "new"), "--images=4", "--seed=0", option]
    with pytest.raises(UserError) as caught:
        synth.run(parser.parse_args(words))
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "new").exists()


def test_command_draws_at_a_height(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    synth.add_arguments(parser)
    options = ["--images", "1", "--seed", "0", "--val", "0", "--test", "0", "--workers", "1"]
    synth.run(parser.parse_args([str(tmp_path / "small"), *options, "--height", "90"]))
    (stem,) = load(tmp_path / "small", "train")
    check_pictures(tmp_path / "small", stem, 90)
    assert parser.parse_args([str(tmp_path), *options]).height == 1080


def test_interrupted_run_is_redone(tmp_path: Path) -> None:
    settings = {"num_images": 2, "seed": 0, "val_fraction": 0.0, "test_fraction": 0.0}
    generate(tmp_path, **settings, height=SMALL, num_workers=1)
    photo = next((tmp_path / "RGB").iterdir())
    content = photo.read_bytes()
    photo.write_bytes(content[:100])
    (tmp_path / "synthetic.json").rename(tmp_path / "synthetic.unfinished.json")
    generate(tmp_path, **settings, height=SMALL, num_workers=1)
    assert photo.read_bytes() == content
    assert (tmp_path / "synthetic.json").exists()
    assert not (tmp_path / "synthetic.unfinished.json").exists()
