"""EgoHOS: reading it, its categories' IoU against a plain loop, an evaluation end to end, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from annexe.build import build_dataset, load_config
from annexe.datasets.egohos import CATEGORIES, EgoHOS
from annexe.errors import UserError
from annexe.evaluation.scoring import scores_of
from annexe.evaluation.truth import Truth
from annexe.evaluator import evaluate
from annexe.rle import decode, encode
from annexe.synthetic.render import render
from annexe.synthetic.scene import HAND_IDS, draw_scene
from annexe.trainer import train
from tests.conftest import ROOT, SMALLEST

SIZES = ((360, 640), (480, 480), (300, 533), (1080, 1920))  # height, width: they vary in EgoHOS
NAMES = [name for name, _, _ in CATEGORIES.values()]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Four drawn scenes as EgoHOS would label them, one with a second-order object."""
    root = tmp_path_factory.mktemp("egohos")
    for name in ("image", "label"):
        (root / "test_indomain" / name).mkdir(parents=True)
    for number, (height, width) in enumerate(SIZES):
        rng = np.random.default_rng([7, number])
        scene = draw_scene(rng, unseen_pair=False)
        picture = render(scene, rng)
        label = np.zeros_like(picture.ids)
        for side, hand in (("left", 1), ("right", 2)):
            label[picture.ids == HAND_IDS[side]] = hand
        for interaction in scene.interactions:
            both = len(interaction.sides) == 2
            label[picture.ids == interaction.identity] = (
                5 if both else {"left": 3, "right": 4}[interaction.sides[0]]
            )
        if number == 0:
            label[:40, :60] = 7
        for name, array, resample in (
            ("image", picture.image[..., ::-1], Image.Resampling.BILINEAR),
            ("label", label, Image.Resampling.NEAREST),
        ):
            resized = Image.fromarray(np.ascontiguousarray(array)).resize((width, height), resample)
            resized.save(
                root
                / "test_indomain"
                / name
                / f"{number:04d}.{'jpg' if name == 'image' else 'png'}"
            )
    return root


def labels(root: Path) -> dict[str, np.ndarray]:
    return {
        path.stem: np.asarray(Image.open(path))
        for path in sorted((root / "test_indomain/label").glob("*.png"))
    }


def opened(root: Path, split: str = "test_indomain") -> EgoHOS:
    return EgoHOS(split, 112, 0, None, data_root=str(root))


def test_every_photo_is_asked_for_every_category(root):
    dataset = opened(root)
    assert 0 < sum(a.with_mask for image in dataset.annotations for a in image) < 5 * len(dataset)
    for index, (stem, label) in enumerate(labels(root).items()):
        sample = dataset.evaluation_sample(index)
        assert sample.stem == stem and sample.original_size == label.shape == SIZES[index]
        assert [turn.query for turn in sample.turns] == [
            query for _, _, query in CATEGORIES.values()
        ]
        present = [number if number in label else 0 for number in CATEGORIES]
        assert [turn.slot_ids for turn in sample.turns] == [[number] for number in present]
        assert set(np.unique(sample.target_ids)) <= {0, *present}, (
            "second-order objects are background"
        )
        assert sample.image.shape == (112, 112, 3) and not sample.depth.any()
    assert 7 in labels(root)["0000"]


def hand_made(root: Path) -> list[dict]:
    """Masks shifted, missing, and where there is nothing."""
    rng = np.random.default_rng(6)
    records = []
    for stem, label in labels(root).items():
        for number, identity in enumerate(CATEGORIES):
            shifted = np.roll(label == identity, rng.integers(0, 30, 2), (0, 1))
            mask = [shifted, np.zeros_like(shifted), rng.random(label.shape) < 0.02][
                rng.choice(3, p=[0.6, 0.1, 0.3])
            ]
            masks = (
                [{"slot": 0, "phrase": "", "score": 1.0, "rle": encode(mask)}] if mask.any() else []
            )
            records.append(
                {"kind": "query", "image": stem, "annotation": number, "query_id": 0, "query": "", "answer": "",
                 "presence": 1.0, "masks": masks}
            )  # fmt: skip
    return records


def test_scores_equal_a_plain_loop(root):
    records, truth = hand_made(root), Truth(opened(root))
    shared, either, ious = np.zeros(5, int), np.zeros(5, int), []
    hits = {True: [], False: []}  # by whether there is a target: was that right?
    for record in records:
        true = labels(root)[record["image"]] == list(CATEGORIES)[record["annotation"]]
        mask = decode(record["masks"][0]["rle"]) if record["masks"] else np.zeros_like(true)
        i, u = (true & mask).sum(), (true | mask).sum()
        shared[record["annotation"]] += i
        either[record["annotation"]] += u
        ious.append(i / u if u else 1.0)
        hits[bool(true.any())].append(mask.any() == true.any())
    scores = scores_of(records, truth)["standard"]
    per_category = shared / either
    assert len(set(per_category.round(3))) == 5, "the example has to tell the categories apart"
    assert [scores[f"egohos/iou_{name}"] for name in NAMES] == pytest.approx(per_category)
    assert scores["egohos/iou_mean"] == pytest.approx(per_category.mean())
    assert scores["grounding/ciou"] == pytest.approx(shared.sum() / either.sum())
    assert scores["grounding/giou"] == pytest.approx(np.mean(ious))
    assert (
        scores["grounding/t_acc"] == pytest.approx(np.mean(hits[True]))
        and 0 < scores["grounding/t_acc"] < 1
    )
    assert (
        scores["grounding/n_acc"] == pytest.approx(np.mean(hits[False]))
        and 0 < scores["grounding/n_acc"] < 1
    )
    assert not [name for name in scores if name.startswith(("analysis", "answer", "depth"))]


def test_a_category_nobody_has_or_predicts_has_no_iou(root):
    records = [r for r in hand_made(root) if r["annotation"] != 4]
    scores = scores_of(records, Truth(opened(root)))["standard"]
    assert "egohos/iou_both_object" not in scores
    assert scores["egohos/iou_mean"] == pytest.approx(
        np.mean([scores[f"egohos/iou_{name}"] for name in NAMES[:4]])
    )


def test_evaluation_end_to_end(root, make_config, tmp_path):
    train(make_config("run.max_steps=1", "run.warmup_steps=0"))
    options = [option for option in SMALLEST if option.startswith("run.")]
    config = load_config(
        ROOT / "eval_configs" / "egohos.yaml",
        [*options, f"datasets.egohos.data_root={root}", f"run.checkpoint={tmp_path / 'run'}",
         f"run.output_dir={tmp_path / 'eval'}"],
        onto_checkpoint=True,
    )  # fmt: skip
    metrics = evaluate(config)
    assert metrics == json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["meta"]["num_queries"] == metrics["standard"]["num_queries"] == 5 * len(SIZES)
    assert (
        metrics["baselines"]["reject"]["egohos/iou_mean"]
        == 0
        < metrics["baselines"]["constant"]["egohos/iou_mean"]
    )
    records = [
        json.loads(line)
        for line in (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()
    ]
    queries = [(r["image"], r["annotation"], r["query"]) for r in records if r["kind"] == "query"]
    asked = [query for _, _, query in CATEGORIES.values()]
    assert queries == [
        (stem, number, query) for stem in labels(root) for number, query in enumerate(asked)
    ]
    assert scores_of(records, Truth(opened(root))) == {
        k: v for k, v in metrics.items() if k != "meta"
    }
    assert not [
        name for name in metrics["standard"] if name.startswith(("analysis", "answer", "depth"))
    ]
    assert "<html" in (tmp_path / "eval" / "report.html").read_text()


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda folder: shutil.rmtree(folder), ("data_root", "test_outdomain")),
        (lambda folder: (folder / "label" / "0001.png").unlink(), ("missing file", "0001.png")),
        (
            lambda folder: (folder / "image" / "0001.jpg").write_bytes(b"no photo"),
            ("cannot read image", "0001.jpg"),
        ),
        (
            lambda folder: Image.fromarray(np.zeros((20, 30), np.uint8)).save(
                folder / "label" / "0001.png"
            ),
            ("0001.png", "30 x 20", "480 x 480"),
        ),
        (
            lambda folder: Image.fromarray(np.full((480, 480), 9, np.uint8)).save(
                folder / "label" / "0001.png"
            ),
            ("0001.png", "id 9", "0 to 8"),
        ),
    ],
)
def test_bad_input_gives_one_clear_error(root, tmp_path, spoil, parts):
    shutil.copytree(root / "test_indomain", tmp_path / "test_outdomain")
    assert len(opened(tmp_path, "test_outdomain")) == 4
    spoil(tmp_path / "test_outdomain")
    with pytest.raises(UserError) as caught:
        opened(tmp_path, "test_outdomain")
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)


def test_unknown_split_and_training_are_refused(root, make_config, tmp_path):
    with pytest.raises(UserError, match="Did you mean 'test_indomain'"):
        opened(root, "test_indomains")
    shutil.copytree(root / "test_indomain", tmp_path / "train")
    config = make_config("run.max_steps=1", "run.warmup_steps=0")
    config.datasets = {"egohos": {"data_root": str(tmp_path)}}
    assert len(build_dataset(config, "train")) == 4
    with pytest.raises(UserError, match="train on ego_irgbench"):
        train(config)
