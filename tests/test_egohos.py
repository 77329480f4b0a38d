"""EgoHOS: reading, IoU of its categories against a plain loop, evaluation, and bad input."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from annexe import cli
from annexe.build import build_dataset, load_config
from annexe.datasets.egohos import CATEGORIES, EgoHOS
from annexe.doctor.egohos_survey import survey_egohos
from annexe.doctor.problems import ERROR
from annexe.errors import UserError
from annexe.evaluation.records import PredictedMask, QueryRecord, read_records, split_kinds
from annexe.evaluation.scoring import score_all
from annexe.evaluation.truth import Truth
from annexe.evaluator import evaluate
from annexe.rle import decode, encode
from annexe.synthetic.render import render
from annexe.synthetic.scene import HAND_IDS, Scene, draw_scene
from annexe.trainer import train
from tests.conftest import ROOT, SMALLEST
from tests.test_training import lines_of_log

SIZES = ((360, 640), (480, 480), (300, 533), (540, 960))  # height, width: they vary in EgoHOS
NAMES = [category.name for category in CATEGORIES.values()]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A data root with four photos in one split."""
    root = tmp_path_factory.mktemp("egohos")
    draw_split(root / "test_indomain")
    return root


def draw_split(folder: Path) -> None:
    """Four drawn scenes as EgoHOS would label them, one with a second-order object."""
    for name in ("image", "label"):
        (folder / name).mkdir(parents=True)
    for index, (height, width) in enumerate(SIZES):
        rng = np.random.default_rng([7, index])
        scene = draw_scene(rng, unseen_pair=False)
        picture = render(scene, rng, height=540)
        label = egohos_label(scene, picture.ids)
        if index == 0:
            label[:20, :30] = 7
        photo = Image.fromarray(np.ascontiguousarray(picture.image[..., ::-1]))
        photo.resize((width, height), Image.Resampling.BILINEAR).save(
            folder / "image" / f"{index:04d}.jpg"
        )
        Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST).save(
            folder / "label" / f"{index:04d}.png"
        )


def egohos_label(scene: Scene, ids: np.ndarray) -> np.ndarray:
    """The id map of a drawn scene as EgoHOS would have it."""
    label = np.zeros_like(ids)
    label[ids == HAND_IDS["left"]] = 1
    label[ids == HAND_IDS["right"]] = 2
    for interaction in scene.interactions:
        (side, *others) = interaction.sides
        category = 5 if others else {"left": 3, "right": 4}[side]
        label[ids == interaction.identity] = category
    return label


def labels(root: Path) -> dict[str, np.ndarray]:
    paths = sorted((root / "test_indomain" / "label").glob("*.png"))
    return {path.stem: np.asarray(Image.open(path)) for path in paths}


def opened(root: Path, split: str = "test_indomain") -> EgoHOS:
    return EgoHOS(split, 112, 0, None, data_root=str(root))


def test_every_photo_is_asked_for_every_category(root):
    dataset = opened(root)
    assert 0 < sum(a.with_mask for image in dataset.annotations for a in image) < 5 * len(dataset)
    for index, (stem, label) in enumerate(labels(root).items()):
        sample = dataset.evaluation_sample(index)
        assert sample.stem == stem and sample.original_size == label.shape == SIZES[index]
        queries = [category.query for category in CATEGORIES.values()]
        assert [turn.query for turn in sample.turns] == queries
        present = [mask_id if mask_id in label else 0 for mask_id in CATEGORIES]
        assert [turn.slot_ids for turn in sample.turns] == [[mask_id] for mask_id in present]
        found = set(np.unique(sample.target_ids))
        assert found <= {0, *present}, "second-order objects are background"
        assert sample.image.shape == (112, 112, 3) and not sample.depth.any()
    assert 7 in labels(root)["0000"]


def hand_made(root: Path) -> list[QueryRecord]:
    """Masks shifted, missing, and where there is nothing."""
    random = np.random.default_rng(6)
    records = []
    for stem, label in labels(root).items():
        for index, mask_id in enumerate(CATEGORIES):
            shifted = np.roll(label == mask_id, random.integers(0, 30, 2), (0, 1))
            nothing = np.zeros_like(shifted)
            elsewhere = random.random(label.shape) < 0.02
            mask = (shifted, nothing, elsewhere)[random.choice(3, p=[0.6, 0.1, 0.3])]
            masks = [PredictedMask(slot=0, score=1.0, rle=encode(mask))] if mask.any() else []
            records.append(
                QueryRecord(
                    image=stem, annotation=index, query_id=0, answer="", presence=1.0, masks=masks
                )
            )
    return records


def test_scores_equal_a_plain_loop(root):
    # Count pixels and decisions one by one
    records = hand_made(root)
    true_labels = labels(root)
    intersections = np.zeros(5, int)
    unions = np.zeros(5, int)
    ious = []
    with_target = []  # was the query answered?
    without_target = []  # was it refused?
    for record in records:
        true = true_labels[record.image] == list(CATEGORIES)[record.annotation]
        mask = decode(record.masks[0].rle) if record.masks else np.zeros_like(true)
        intersection = (true & mask).sum()
        union = (true | mask).sum()
        intersections[record.annotation] += intersection
        unions[record.annotation] += union
        ious.append(intersection / union if union else 1.0)
        if true.any():
            with_target.append(mask.any())
        else:
            without_target.append(not mask.any())

    scores = score_all(records, Truth(opened(root))).metrics["standard"]
    per_category = intersections / unions
    assert len(set(per_category.round(3))) == 5, "the example has to tell the categories apart"
    assert [scores[f"egohos/iou_{name}"] for name in NAMES] == pytest.approx(per_category)
    assert scores["egohos/iou_mean"] == pytest.approx(per_category.mean())
    assert scores["grounding/ciou"] == pytest.approx(intersections.sum() / unions.sum())
    assert scores["grounding/giou"] == pytest.approx(np.mean(ious))
    assert scores["grounding/t_acc"] == pytest.approx(np.mean(with_target))
    assert scores["grounding/n_acc"] == pytest.approx(np.mean(without_target))
    assert 0 < scores["grounding/t_acc"] < 1 and 0 < scores["grounding/n_acc"] < 1
    assert not text_scores(scores)


def text_scores(scores: dict[str, float]) -> list[str]:
    return [name for name in scores if name.startswith(("analysis", "answer", "depth"))]


def test_a_category_nobody_has_or_predicts_has_no_iou(root):
    records = [record for record in hand_made(root) if record.annotation != 4]
    scores = score_all(records, Truth(opened(root))).metrics["standard"]
    assert "egohos/iou_both_object" not in scores
    others = [scores[f"egohos/iou_{name}"] for name in NAMES[:4]]
    assert scores["egohos/iou_mean"] == pytest.approx(np.mean(others))


def test_evaluation_end_to_end(root, make_config, tmp_path):
    train(make_config("run.max_steps=1", "run.warmup_steps=0"))
    options = [option for option in SMALLEST if option.startswith("run.")]
    out = tmp_path / "eval"
    options += [
        f"datasets.egohos.data_root={root}",
        f"run.checkpoint={tmp_path / 'run'}",
        f"run.output_dir={out}",
    ]
    config = load_config(ROOT / "eval_configs" / "egohos.yaml", options, onto_checkpoint=True)
    metrics = evaluate(config)
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert metrics["meta"]["num_queries"] == metrics["standard"]["num_queries"] == 5 * len(SIZES)
    constant = metrics["baselines"]["constant"]["egohos/iou_mean"]
    assert metrics["baselines"]["reject"]["egohos/iou_mean"] == 0 < constant

    # Every photo was asked for every category
    records = read_records(out / "predictions.jsonl")
    _, queries = split_kinds(records)
    expected = []
    for stem in labels(root):
        for index, category in enumerate(CATEGORIES.values()):
            expected.append((stem, index, category.query))
    assert [(query.image, query.annotation, query.query) for query in queries] == expected

    del metrics["meta"]
    assert score_all(records, Truth(opened(root))).metrics == metrics
    assert not text_scores(metrics["standard"])
    assert "<html" in (out / "report.html").read_text()


def label_of(height: int, width: int, value: int) -> Callable[[Path], None]:
    """Replaces the label of photo 1 by one with a single id."""
    ids = np.full((height, width), value, np.uint8)
    return lambda folder: Image.fromarray(ids).save(folder / "label" / "0001.png")


def label_in_grays(folder: Path) -> None:
    """Label 1 as the grays of a palette, in descending order."""
    ids = np.asarray(Image.open(folder / "label" / "0001.png"))
    image = Image.fromarray(8 - ids).convert("P")
    image.putpalette(np.repeat(np.arange(8, -1, -1), 3).tolist())
    image.save(folder / "label" / "0001.png")


def rename(folder: str, ending: str) -> Callable[[Path], object]:
    """Another ending for file 1 of a folder."""
    names = {"image": "0001.jpg", "label": "0001.png"}
    return lambda split: (split / folder / names[folder]).rename(split / folder / f"0001{ending}")


def huge_photo(folder: Path) -> None:
    """The header of a photo of 20000 x 20000 pixels."""
    path = folder / "image" / "0001.jpg"
    head, mark, tail = path.read_bytes().partition(b"\xff\xc0\x00\x11\x08")
    path.write_bytes(head + mark + (20000).to_bytes(2, "big") * 2 + tail[4:])


DAMAGES = {
    "large-image": (huge_photo, ("0001.jpg", "million pixels", "scale it down")),
    "missing-photo": (
        lambda folder: (folder / "image" / "0001.jpg").unlink(),
        ("missing file", "0001.jpg", "exclude"),
    ),
    "extension": (rename("image", ".JPG"), ("missing file", "0001.jpg", "'0001.JPG' is there")),
    "missing-mask": (rename("label", ".tif"), ("missing file", "0001.png", "exclude")),
    "unreadable-image": (
        lambda folder: (folder / "image" / "0001.jpg").write_bytes(b"no photo"),
        ("cannot read image", "0001.jpg", "not an image", "exclude"),
    ),
    "empty-file": (
        lambda folder: (folder / "label" / "0001.png").write_bytes(b""),
        ("cannot read image", "0001.png", "empty", "exclude"),
    ),
    "mask-size": (label_of(20, 30, 0), ("0001.png", "30 x 20", "480 x 480")),
    "mask-unknown-ids": (label_of(480, 480, 9), ("0001.png", "id 9", "0 to 8")),
    "mask-palette": (label_in_grays, ("0001.png", "palette")),
}
"""Problem -> what makes it in the folder of a split, and words of the reader's message."""


@pytest.mark.parametrize("code", DAMAGES)
def test_doctor_finds_what_the_reader_refuses(code, root, tmp_path, monkeypatch):
    shutil.copytree(root / "test_indomain", tmp_path / "test_outdomain")
    damage, parts = DAMAGES[code]
    damage(tmp_path / "test_outdomain")
    with pytest.raises(UserError) as caught:
        opened(tmp_path, "test_outdomain")
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)

    # The doctor names it, and its report as `exclude` leaves it out
    report = tmp_path / "report.json"
    monkeypatch.setattr(
        sys, "argv", ["annexe", "doctor", str(tmp_path), "--json", str(report), "--workers", "1"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    found = json.loads(report.read_text())
    assert (code, "0001") in {(problem["code"], problem["stem"]) for problem in found["problems"]}
    assert found["quarantine"] == ["0001"]
    dataset = EgoHOS("test_outdomain", 112, 0, None, data_root=str(tmp_path), exclude=str(report))
    assert dataset.stems == ["0000", "0002", "0003"]


def test_name_that_is_not_utf_8(root, tmp_path, capsys, monkeypatch):
    shutil.copytree(root / "test_indomain", tmp_path / "test_indomain")
    for folder, ending in (("image", ".jpg"), ("label", ".png")):
        path = tmp_path / "test_indomain" / folder / f"0001{ending}"
        path.rename(path.with_name(f"caf\udce9{ending}"))
    with pytest.raises(UserError, match="is not UTF-8; rename it"):
        opened(tmp_path)
    monkeypatch.setattr(sys, "argv", ["annexe", "doctor", str(tmp_path), "--workers", "1"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1 and "name-not-utf-8" in capsys.readouterr().out


def test_doctor_on_sound_data(root):
    found = survey_egohos(root, 1)
    codes = {(problem.code, problem.stem) for problem in found.problems}
    missing = ("train", "val", "test_outdomain")
    assert codes == {
        ("split-size", "test_indomain"),
        *(("missing-split", name) for name in missing),
    }
    assert not any(problem.severity == ERROR for problem in found.problems)
    assert found.counts["size"]["test_indomain"]["images"] == len(SIZES)
    dataset = opened(root)
    for index, name in enumerate(NAMES):
        num_images = sum(image[index].with_mask for image in dataset.annotations)
        assert found.counts["targets"]["test_indomain"][name] == num_images
    assert found.as_dict()["leaks"] == {}


def test_what_is_not_read_is_told(root, tmp_path, caplog):
    folder = tmp_path / "test_outdomain"
    shutil.copytree(root / "test_indomain", folder)
    shutil.copyfile(folder / "image" / "0001.jpg", folder / "image" / "more.jpeg")
    with caplog.at_level(logging.WARNING):
        assert len(opened(tmp_path, "test_outdomain")) == 4
    assert "4 photos, the published split has 500" in caplog.text
    assert "1 files that do not end in .jpg ignored, such as 'more.jpeg'" in caplog.text


def test_wrong_exclude(root, tmp_path):
    path = tmp_path / "list.txt"
    for content, part in (("0009\n", "names 1 images"), ("0000\n0001\n0002\n0003", "is empty")):
        path.write_text(content)
        with pytest.raises(UserError, match=part):
            EgoHOS("test_indomain", 112, 0, None, data_root=str(root), exclude=str(path))


def test_fingerprint_covers_contents(root, tmp_path):
    shutil.copytree(root / "test_indomain", tmp_path / "test_indomain")
    first = opened(tmp_path).fingerprint()
    assert first == opened(root).fingerprint()
    path = tmp_path / "test_indomain" / "label" / "0002.png"
    ids = np.array(Image.open(path))
    ids[0, 0] = 5 - ids[0, 0]
    Image.fromarray(ids).save(path)
    assert opened(tmp_path).fingerprint() != first


def test_folder_without_the_split(root):
    with pytest.raises(UserError, match="data_root: no photos") as caught:
        opened(root, "test_outdomain")
    assert "test_outdomain/image" in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_split_is_refused(root):
    with pytest.raises(UserError, match="Did you mean 'test_indomain'"):
        opened(root, "test_indomains")


def test_it_trains_on_its_questions_alone(root, make_config, tmp_path):
    """A tokenizer of its own included; there is nothing to learn of analyses and of depth."""
    shutil.copytree(root / "test_indomain", tmp_path / "train")
    config = make_config("run.max_steps=2")
    config.datasets = {"egohos": {"data_root": str(tmp_path)}}
    dataset = build_dataset(config, "train")
    sample = dataset[3, 1]
    assert [turn.query for turn in sample.turns] == [c.query for c in CATEGORIES.values()]
    used = {mask_id for turn in sample.turns for mask_id in turn.slot_ids if mask_id}
    assert sample.object_phrases == {mask_id: CATEGORIES[mask_id].phrase for mask_id in used}
    assert set(CATEGORIES[2]) - {"right_hand"} <= set(dataset.texts())

    train(config)
    last = lines_of_log(tmp_path / "run")[-1]
    assert last["loss/analysis"] == last["loss/depth"] == 0 < last["loss/answer"]
    assert last["queries"] == 5 * last["images"]
