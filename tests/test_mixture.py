"""Several data sets in one training: shares, order, loss terms that some of them lack."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from annexe.benchmarks.planning import candidates, lengths, queries_per_image
from annexe.benchmarks.random_model import without_files
from annexe.build import build_dataset, build_training_set, load_config
from annexe.checkpoints.run_folder import saved_config
from annexe.config import Config
from annexe.datasets.collate import Collator
from annexe.datasets.mixture import MAX_PERIOD, Draw, Mixture, take_turns
from annexe.datasets.sampler import MicroBatches
from annexe.errors import UserError
from annexe.evaluation.records import ImageRecord
from annexe.evaluation.scoring import score
from annexe.evaluation.truth import Truth
from annexe.evaluation.validation import join_metrics
from annexe.evaluator import evaluate
from annexe.inference.predictor import Predictor
from annexe.models.language_model.tokenizer import train_tokenizer
from annexe.report.curves import read_curves
from annexe.structures.sample import Sample
from annexe.trainer import set_up, train
from annexe.training import losses
from tests.conftest import SMALLEST
from tests.test_distributed import run_distributed
from tests.test_egohos import draw_split
from tests.test_training import COMPARABLE, lines_of_log

NAMES = list(losses.TERMS)


@pytest.fixture(scope="module")
def egohos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photos of EgoHOS in train, and the same in val."""
    root = tmp_path_factory.mktemp("egohos")
    draw_split(root / "train")
    shutil.copytree(root / "train", root / "val")
    return root


@pytest.fixture
def make_mixed(make_config: Callable[..., Config], egohos: Path) -> Callable[..., Config]:
    """Loads a configuration of three samples of drawn scenes to one of EgoHOS."""

    def make(*options: str) -> Config:
        mixed = ("datasets.ego_irgbench.ratio=3", "datasets.egohos.ratio=1")
        return make_config(*mixed, f"datasets.egohos.data_root={egohos}", *options)

    return make


# Order


def drawn(mixture: Mixture, num_batches: int, first: int = 0, world_size: int = 1) -> list[Draw]:
    """What all ranks take in turns, in batches of four images."""
    by_rank = []
    for rank in range(world_size):
        batches = MicroBatches(
            mixture,
            batch_size=4 // world_size,
            num_batches=num_batches,
            first_image=first,
            rank=rank,
            world_size=world_size,
        )
        by_rank.append(list(batches))
    order = []
    for of_ranks in zip(*by_rank, strict=True):
        for batch in of_ranks:
            order += batch
    return order


def test_three_to_one_over_a_thousand_batches():
    mixture = Mixture([37, 11], [3, 1], seed=5)
    order = drawn(mixture, 1000)
    counts = [0, 0]
    for number, draw in enumerate(order, start=1):
        counts[draw.dataset] += 1
        assert abs(counts[1] - number / 4) < 1
        if number % 500 == 0:
            assert mixture.counts(number) == counts
    assert counts == [3000, 1000]

    # Every epoch of a data set is a permutation of its own
    epochs: dict[tuple[int, int], list[int]] = {}
    for draw in order:
        epochs.setdefault((draw.dataset, draw.epoch), []).append(draw.image)
    complete = [
        images for (dataset, _), images in epochs.items() if len(images) == (37, 11)[dataset]
    ]
    assert len(complete) >= len(epochs) - 2
    assert all(sorted(images) == list(range(len(images))) for images in complete)
    assert len(set(map(tuple, complete))) == len(complete)
    assert drawn(Mixture([37, 11], [3, 1], seed=6), 1000) != order


def test_the_order_depends_neither_on_processes_nor_on_restarts():
    mixture = Mixture([37, 11, 5], [0.5, 0.3, 0.2], seed=5)
    order = drawn(mixture, 100)
    assert drawn(mixture, 100, world_size=2) == drawn(mixture, 100, world_size=4) == order
    resumed = Mixture([37, 11, 5], [0.5, 0.3, 0.2], seed=5)
    assert drawn(resumed, 47, first=4 * 53) == order[4 * 53 :]


def test_processes_share_the_questions_of_a_step_evenly():
    """Whatever their number, a step has the photos that one process takes, each of them once."""
    mixture = Mixture([37, 11], [3, 1], seed=5)
    size = 48  # photos of a step
    for world_size, batches_per_step in ((2, 1), (4, 1), (4, 3)):
        by_rank = []
        for rank in range(world_size):
            batches = MicroBatches(
                mixture,
                batch_size=size // world_size // batches_per_step,
                num_batches=5 * batches_per_step,
                first_image=2 * size,
                rank=rank,
                world_size=world_size,
                batches_per_step=batches_per_step,
                num_queries=lambda draw: 1 + draw.image % 8,
            )
            by_rank.append(list(batches))
        for step in range(5):
            counts = []
            draws = []
            for batches in by_rank:
                num_before = len(draws)
                for batch in batches[step * batches_per_step : (step + 1) * batches_per_step]:
                    draws += batch
                counts.append(sum(1 + draw.image % 8 for draw in draws[num_before:]))
            first = (2 + step) * size
            assert sorted(draws) == sorted(mixture.order(first, first + size))
            assert max(counts) - min(counts) <= 3


def test_a_data_set_tells_the_questions_of_a_sample(make_mixed: Callable[..., Config]):
    train_set = build_training_set(make_mixed("datasets.ego_irgbench.queries_per_image=5"))
    for draw in train_set.mixture.order(0, 12):
        assert train_set.num_queries(draw) == len(train_set[draw].turns)


def test_one_data_set_comes_as_it_always_did():
    order = Mixture([9], [3], seed=4).order(0, 27)
    expected = []
    for epoch in range(3):
        permutation = np.random.default_rng([4, epoch]).permutation(9).tolist()
        expected += [Draw(0, epoch, index) for index in permutation]
    assert order == expected


def test_no_share_is_ever_missed_by_a_sample():
    """Where every turn goes to whoever is furthest behind, some are."""
    random = np.random.default_rng(0)
    for num_datasets in (2, 3, 5, 8, 12):
        weights = random.integers(1, 60, num_datasets).tolist()
        turns = take_turns(weights)
        numbers = np.arange(1, len(turns) + 1)
        for dataset, weight in enumerate(weights):
            taken = np.cumsum(turns == dataset)
            assert taken[-1] == weight
            off = np.abs(taken - numbers * weight / len(turns)).max()
            assert off <= 1 - 1 / (2 * num_datasets - 2) + 1e-9


def test_all_counts_by_the_number_of_images():
    assert Mixture([30, 20], ["all", "all"], 0).weights == [3, 2]
    assert Mixture([30, 20], ["all", 10], 0).weights == [3, 1]
    assert Mixture([5, 5], [0.3333, 1], 0).weights == [3333, 10000]
    mixture = Mixture([3, 2], ["all", "all"], 0)
    assert {draw[::2] for draw in mixture.order(0, 5)} == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)}
    assert sum(map(Fraction, ("0.3", "0.7"))) == 1 and Mixture([1, 1], [0.3, 0.7], 0).period == 10


# Settings


@pytest.mark.parametrize("ratio", ["0", "-1", "nan", ".inf", "many", "true", "[1, 2]"])
def test_a_ratio_that_is_none_is_refused(make_config, ratio: str):
    with pytest.raises(UserError, match=r"datasets.ego_irgbench.ratio is .* above 0, or all"):
        make_config(f"datasets.ego_irgbench.ratio={ratio}")


def test_ratios_that_say_too_little_are_refused(make_config, egohos):
    second = f"datasets.egohos.data_root={egohos}"
    with pytest.raises(UserError, match=r"datasets.egohos has no ratio"):
        build_training_set(make_config(second, "datasets.ego_irgbench.ratio=3"))
    ratios = ("datasets.ego_irgbench.ratio=0.33333333", "datasets.egohos.ratio=1")
    with pytest.raises(UserError, match=rf"133,333,333 samples, and the most is {MAX_PERIOD:,}"):
        build_training_set(make_config(second, *ratios))
    with pytest.raises(UserError, match=r"2 data sets; name one, .* --dataset NAME"):
        build_dataset(make_config(second), "val")
    with pytest.raises(UserError, match="ego_irgbench: phrases, egohos: sentence"):
        build_training_set(make_config(second, "datasets.ego_irgbench.answer_format=phrases"))


def test_two_of_one_type_have_names_of_their_own(make_config, scenes, tmp_path):
    options = ("datasets.kitchen.type=ego_irgbench", f"datasets.kitchen.data_root={scenes}")
    config = make_config(*options)
    assert config.datasets["kitchen"]["type"] == "ego_irgbench"
    assert "type" not in config.datasets["ego_irgbench"]
    assert "ratio" not in config.datasets["ego_irgbench"]
    train_set = build_training_set(config)
    assert train_set.describe() == "50.00% ego_irgbench (12 images), 50.00% kitchen (12 images)"
    samples = [train_set[draw] for draw in train_set.mixture.order(0, 2)]
    assert [sample.dataset for sample in samples] == [0, 1]
    assert train_set.fingerprint() != build_dataset(make_config(), "train").fingerprint()

    # Messages speak of the entry, and of one that no component is called by
    with pytest.raises(UserError, match=r"^datasets.kitchen.data_root: no folder"):
        build_training_set(make_config(*options, "datasets.kitchen.data_root=nowhere"))
    with pytest.raises(UserError, match=r"unknown datasets.kitchen.type 'kitchen'"):
        make_config(options[1])


# Losses


@pytest.fixture
def two_kinds(make_mixed) -> tuple:
    """A model, a collator, and of each data set a sample: the second has no analysis, no depth."""
    config = make_mixed(*COMPARABLE)
    trainer = set_up(config)
    tokenizer = train_tokenizer(trainer.train_set.texts(), num_slots=4)
    collate = Collator(tokenizer, trainer.model.num_image_tokens, 4)
    full = trainer.train_set[Draw(0, 0, 0)]
    bare = trainer.train_set[Draw(1, 0, 0)]
    assert full.analysis and full.depth.any() and not bare.analysis and not bare.depth.any()
    return trainer.model.eval(), collate, full, bare


def gradients(model, collate, samples: list[Sample], names: list[str], *, mean: bool) -> dict:
    """Gradients of the sum of some terms, each over its units where asked."""
    model.zero_grad()
    batch = collate(samples)
    total = losses.totals(model(batch), batch, names)[0]
    if mean:
        total = total / losses.counts([batch], names)[0].clamp(min=1).float()
    total.sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_terms_that_a_data_set_lacks_leave_the_others_as_if_alone(two_kinds):
    model, collate, full, bare = two_kinds

    # Terms of one data set alone
    lacking = ["analysis", "depth"]
    alone = gradients(model, collate, [full], lacking, mean=True)
    together = gradients(model, collate, [full, bare], lacking, mean=True)
    assert alone.keys() == together.keys()
    assert max(gradient.abs().max() for gradient in alone.values()) > 1e-2
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, alone[name], atol=1e-6, rtol=1e-5)

    # All terms add up
    parts = [gradients(model, collate, [sample], NAMES, mean=False) for sample in (full, bare)]
    for name, gradient in gradients(model, collate, [full, bare], NAMES, mean=False).items():
        expected = sum(part.get(name, torch.zeros_like(gradient)) for part in parts)
        difference = (gradient - expected).abs().max()
        assert difference <= 1e-6 * max(1, expected.abs().max()), name


def test_a_batch_without_analyses_and_depth_gives_no_nan(two_kinds):
    model, collate, _, bare = two_kinds
    batch = collate([bare])
    units = losses.counts([batch], NAMES)[0].tolist()
    assert [name for name, count in zip(NAMES, units, strict=True) if not count] == [
        "analysis",
        "depth",
    ]
    found = gradients(model, collate, [bare], NAMES, mean=True)
    assert all(gradient.isfinite().all() for gradient in found.values())
    nothing = gradients(model, collate, [bare], ["analysis", "depth"], mean=True)
    assert not any(gradient.any() for gradient in nothing.values())


def test_losses_of_each_data_set_are_those_of_its_samples_alone(two_kinds):
    model, collate, full, bare = two_kinds
    batch = collate([bare, full, bare])
    with torch.no_grad():
        together = losses.totals(model(batch), batch, NAMES, 2)
        for row, samples in ((1, [full]), (2, [bare, bare])):
            alone = collate(samples)
            expected = losses.totals(model(alone), alone, NAMES)[0]
            torch.testing.assert_close(together[row], expected, atol=1e-4, rtol=1e-4)
            units = losses.counts([batch], NAMES, 2)[row]
            assert torch.equal(units, losses.counts([alone], NAMES)[0])
    torch.testing.assert_close(together[1:].sum(0), together[0], atol=1e-4, rtol=1e-4)


# Runs


@pytest.mark.slow
def test_it_trains_validates_and_resumes(make_mixed, tmp_path):
    def config(name: str, *options: str) -> Config:
        return make_mixed(
            "run.max_steps=6",
            "run.checkpoint_every=3",
            "run.validate_every=6",
            "run.validation_images=2",
            "run.loss_weights.image_token_labels=0",
            f"run.output_dir={tmp_path / name}",
            *options,
        )

    # Two images a step: every data set has its losses where it has samples
    train(config("run"))
    lines = lines_of_log(tmp_path / "run")
    assert [line["images/ego_irgbench"] for line in lines] == [2, 3, 5, 6, 8, 9]
    assert [line["images/egohos"] for line in lines] == [0, 1, 1, 2, 2, 3]
    assert lines[-1]["epoch/egohos"] == 3 / 4
    assert lines[-1]["epoch/ego_irgbench"] == 9 / 12
    for line in lines:
        mixed = [key for key in line if key.startswith("losses/egohos/")]
        assert "losses/ego_irgbench/depth" in line
        assert not any("analysis" in key or "depth" in key for key in mixed)
    assert "losses/egohos/mask" in lines[1] and "losses/egohos/mask" not in lines[0]

    # Validation of each, and the mean picks the best step
    (found,) = lines_of_log(tmp_path / "run", "validation")
    scores = [found[f"{name}/grounding/ciou"] for name in ("ego_irgbench", "egohos")]
    assert found["grounding/ciou"] == pytest.approx(np.mean(scores))
    assert found["answer/cider"] == found["ego_irgbench/answer/cider"]
    assert "egohos/answer/cider" not in found
    assert found["num_images"] == 4

    curves = read_curves(tmp_path / "run" / "log.jsonl")
    assert {"Total, weighted", "Mask"} <= {panel.title for panel in curves["Training loss"]}
    assert "cIoU" in {panel.title for panel in curves["Validation"]}

    # From the middle on, the same again
    halfway = tmp_path / "run" / "checkpoints" / "step-00000003"
    assert saved_config(halfway)["datasets"]["egohos"]["ratio"] == 1
    train(config("again", f"run.resume={halfway}"))
    again = lines_of_log(tmp_path / "again")
    timed = {"images_per_second"}
    for before, after in zip(lines[3:], again, strict=True):
        assert {k: v for k, v in before.items() if k not in timed} == {
            k: v for k, v in after.items() if k not in timed
        }

    # Its folder evaluates one data set at a time, and answers
    options = [option for option in SMALLEST if option.startswith("run.")]
    options += [f"run.checkpoint={tmp_path / 'run'}", f"run.output_dir={tmp_path / 'eval'}"]
    path = tmp_path / "run" / "config.yaml"
    evaluation = load_config(path, [*options, "run.split=val"], onto_checkpoint=True)
    evaluation.datasets = {"egohos": evaluation.datasets["egohos"]}
    metrics = evaluate(evaluation)
    assert metrics["meta"]["dataset"] == "egohos" and metrics["standard"]["num_images"] == 4
    assert "egohos/iou_mean" in metrics["standard"]
    about = Predictor.from_run(tmp_path / "run", device="cpu").about
    assert about["dataset"] == "ego_irgbench, egohos" and about["answer_format"] == "sentence"


def test_memory_is_planned_for_the_longest_batch_of_all_data_sets(make_mixed):
    config, tokenizer, _ = without_files(make_mixed())
    assert queries_per_image(config) == 12
    branches, source = lengths(config, tokenizer, None)
    assert source.count("'") == 4 and len(branches(config)) == config.run.batch_size
    of_scenes = "datasets.ego_irgbench.queries_per_image"
    fewest = list(candidates(config, 1))[-1]
    assert fewest[of_scenes] == 1 and "datasets.egohos.queries_per_image" not in fewest


def test_another_share_is_told_where_a_run_goes_on(make_mixed, tmp_path, caplog):
    options = ("run.max_steps=1", "run.warmup_steps=0")
    train(make_mixed(*options))
    set_up(make_mixed(*options, "run.resume=auto", "datasets.egohos.ratio=2"))
    assert "datasets.egohos.ratio 1 -> 2" in caplog.text


def test_metrics_of_one_data_set_stay_as_they_are():
    one = {"grounding/ciou": 0.5, "depth/mae": 3.0, "num_queries": 7, "num_images": 2}
    assert join_metrics({"a": one}) == one
    other = {"grounding/ciou": 0.25, "num_queries": 5, "num_images": 1}
    joined = join_metrics({"a": one, "b": other})
    assert joined == {
        "grounding/ciou": 0.375,
        "num_queries": 12,
        "num_images": 3,
        **{f"a/{name}": value for name, value in one.items()},
        **{f"b/{name}": value for name, value in other.items()},
    }


def test_a_data_set_without_val_is_not_validated(make_mixed, egohos, tmp_path, caplog):
    shutil.copytree(egohos / "train", tmp_path / "egohos" / "train")
    caplog.set_level("INFO")
    trainer = set_up(
        make_mixed(f"datasets.egohos.data_root={tmp_path / 'egohos'}", "run.validate_every=1")
    )
    assert list(trainer.validator.truths) == ["ego_irgbench"]
    assert "data set 'egohos' is not validated" in caplog.text
    assert "75.00% ego_irgbench" in trainer.train_set.describe()


def test_photos_without_analysis_are_scored_without_one(scenes, make_config, tmp_path):
    """Some captions are empty: neither learned nor scored."""
    root = tmp_path / "root"
    shutil.copytree(scenes, root)
    files = sorted((root / "dataset_split" / "val").glob("*.json"))
    for file in files[:2]:
        entries = json.loads(file.read_text())
        for entry in entries:
            entry["caption"] = ""
        file.write_text(json.dumps(entries))
    config = make_config(f"datasets.ego_irgbench.data_root={root}")
    dataset = build_dataset(config, "val")
    collate = Collator(train_tokenizer(dataset.texts(), num_slots=4), 16, 4)
    counts = [int(collate([dataset[0, index]]).text.is_analysis.sum()) for index in range(3)]
    assert counts[:2] == [0, 0] and counts[2] > 1

    # Right about the third photo, wrong about those that have none
    truth = Truth(dataset)
    said = ["", "A bus.", dataset.annotations[2][0].caption]
    records = [
        ImageRecord(image=stem, analysis=analysis, depth=None)
        for stem, analysis in zip(dataset.stems, said, strict=True)
    ]
    assert score(records, truth) == score(records[2:], truth) | {"num_images": 3}


@pytest.mark.slow
def test_two_processes_train_as_one_does(make_mixed, tmp_path):
    def config(name: str, batch_size: int) -> Config:
        return make_mixed(
            *COMPARABLE,
            f"run.batch_size={batch_size}",
            "run.max_steps=3",
            f"run.output_dir={tmp_path / name}",
        )

    train(config("one", 4))
    run_distributed(train, config("two", 2))
    one = lines_of_log(tmp_path / "one")
    two = lines_of_log(tmp_path / "two")
    assert [line["images/egohos"] for line in two] == [1, 2, 3]
    for before, after in zip(one, two, strict=True):
        assert before.keys() == after.keys()
        for key, value in before.items():
            if key not in ("kind", "images_per_second"):
                assert after[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
