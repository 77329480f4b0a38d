"""Metrics against hand-worked values, slow loops and the libraries they wrap."""

from __future__ import annotations

import json
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
from nltk.translate.meteor_score import single_meteor_score
from pycocoevalcap.cider.cider import Cider
from pycocotools import mask as coco_mask

from annexe.errors import UserError
from annexe.metrics import DepthMetrics, GroundingMetrics, TextMetrics, depth_errors, normalize
from annexe.metrics import text as text_module
from annexe.rle import Rle, decode, encode, encode_ids, validate

PAIRS = [
    ("a", "the right hand holds a red mug", "the right hand holds a mug", True),
    ("b", "cup", "the right hand holds a cup", True),
    ("c", "there is no suitable referring result", "There is no suitable referring result.", False),
    (
        "d",
        "the left hand opens the box",
        "the mask of the left hand is <MSK_0>, the mask of box is <MSK_1>.",
        True,
    ),
]


def text_metrics(pairs: list[tuple[str, str, str, bool]]) -> TextMetrics:
    metrics = TextMetrics()
    for key, prediction, reference, has_target in pairs:
        metrics.update(key, prediction, reference, has_target=has_target)
    return metrics


@pytest.fixture
def fresh_wordnet_probe():
    text_module.load_wordnet.cache_clear()
    yield
    text_module.load_wordnet.cache_clear()


class MissingWordnet:
    """Fails to load `num_failures` times, as nltk's reader does before its data is on the path."""

    def __init__(self, num_failures: int) -> None:
        self.num_failures = num_failures

    def ensure_loaded(self) -> None:
        self.num_failures -= 1
        if self.num_failures >= 0:
            raise LookupError


ANSWER = "The mask of the Right hand is <MSK_0>, the mug."


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (ANSWER, "the mask of the right hand is the mug"),
        ("<MSK> mug<MSK_12>,the  \n hand-held\tcup!", "mug the hand held cup"),
        ("the person's cup_2", "the persons cup 2"),
        ("<MSK_0>.", ""),
    ],
)
def test_normalize(raw: str, expected: str):
    assert normalize(raw) == expected


def test_meteor_without_wordnet(monkeypatch, caplog, tmp_path, fresh_wordnet_probe):
    monkeypatch.setattr(text_module, "wordnet", MissingWordnet(num_failures=9))
    monkeypatch.setattr(text_module, "DEBIAN_WORDNET", tmp_path / "absent")
    pairs = [("a", "red mug", "Red mug.", True), ("b", "cup", "the right hand holds a cup", True)]
    metrics = text_metrics(pairs)
    with caplog.at_level(logging.WARNING):
        computed = metrics.compute("answer")
        metrics.compute("analysis")
    # (1 - 0.5 (1/2)^3) and, with precision 1 and recall 1/6, 0.5 (1/6) / (0.9 + 0.1/6) = 1/11
    assert computed["answer/meteor_without_synonyms"] == pytest.approx((0.9375 + 1 / 11) / 2)
    assert "answer/meteor" not in computed
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "wordnet-base" in caplog.text


def test_debian_wordnet_is_copied_with_lexnames(monkeypatch, tmp_path, fresh_wordnet_probe):
    (tmp_path / "data.noun").write_text("nouns")
    monkeypatch.setattr(text_module, "wordnet", MissingWordnet(num_failures=1))
    monkeypatch.setattr(text_module, "DEBIAN_WORDNET", tmp_path)
    monkeypatch.setattr(text_module.nltk.data, "path", [])
    assert text_module.load_wordnet() is text_module.wordnet
    corpus = text_module.Path(text_module.nltk.data.path[0]) / "corpora" / "wordnet"
    assert (corpus / "data.noun").read_text() == "nouns"
    assert (corpus / "index.sense").exists()
    lines = (corpus / "lexnames").read_text().splitlines()
    assert len(lines) == 45
    assert lines[0] == "00\tadj.all\t3"
    assert lines[3] == "03\tnoun.Tops\t1"
    assert lines[44] == "44\tadj.ppl\t3"


def test_meteor_equals_nltk():
    if text_module.load_wordnet() is None:
        pytest.skip("WordNet is not installed (apt-get install wordnet-base)")
    scores = []
    for _, prediction, reference, _ in PAIRS:
        words = (normalize(reference).split(), normalize(prediction).split())
        scores.append(single_meteor_score(*words))
    assert text_metrics(PAIRS).compute("answer")["answer/meteor"] == math.fsum(scores) / len(scores)
    pair = ("a", "the right hand takes a cup", "the right hand holds a cup", True)
    synonym = text_metrics([pair])
    assert synonym.compute("answer")["answer/meteor"] > 0.99


@pytest.mark.parametrize(("text", "meteor"), [("Mug.", 0.5), ("red mug", 0.9375)])
def test_meteor_of_a_perfect_short_answer_is_what_the_page_says(text: str, meteor: float):
    name = f"answer/{text_module.meteor_name()}"
    assert text_metrics([("a", text, text, True)]).compute("answer")[name] == meteor


def test_cider_equals_pycocoevalcap_and_sides_are_not_swapped():
    predictions = {key: [normalize(prediction)] for key, prediction, _, _ in PAIRS}
    references = {key: [normalize(reference)] for key, _, reference, _ in PAIRS}
    computed = text_metrics(PAIRS).compute("analysis")["analysis/cider"]
    assert computed == Cider().compute_score(references, predictions)[0]
    assert computed != pytest.approx(Cider().compute_score(predictions, references)[0])


WORDS = (
    *("the", "right", "left", "hand", "holds", "lifts", "a"),
    *("red", "mug", "cup", "bottle", "and", "opens", "it"),
)


def random_pairs(num_pairs: int) -> list[tuple[str, str, str, bool]]:
    """Sentences of the words of the synthetic scenes: some equal, some near, some empty."""
    rng = np.random.default_rng(7)
    pairs = []
    for index in range(num_pairs):
        reference = [WORDS[n] for n in rng.integers(len(WORDS), size=rng.integers(1, 14))]
        prediction = []
        for word in reference:
            is_kept = rng.random() < 0.8
            prediction.append(word if is_kept else WORDS[rng.integers(len(WORDS))])
        if rng.random() < 0.3:
            prediction = prediction[: rng.integers(len(prediction) + 1)]
        pairs.append((f"{index:04}", " ".join(prediction), " ".join(reference), True))
    return pairs + [(f"again {key}", *rest) for key, *rest in pairs[:50]]


def test_cider_equals_pycocoevalcap_on_many_pairs():
    pairs = random_pairs(1000)
    predictions, references = ({key: [pair[side]] for key, *pair in pairs} for side in (0, 1))
    expected, _ = Cider().compute_score(references, predictions)
    assert 0 < expected == text_metrics(pairs).compute("answer")["answer/cider"]


@pytest.mark.parametrize("has_wordnet", [True, False])
def test_meteor_equals_nltk_on_many_pairs(has_wordnet: bool, monkeypatch):
    """Without WordNet nltk itself gets a word base that knows no synonym."""
    if has_wordnet and text_module.load_wordnet() is None:
        pytest.skip("WordNet is not installed (apt-get install wordnet-base)")
    synonyms = text_module.load_wordnet()
    if not has_wordnet:
        synonyms = SimpleNamespace(synsets=lambda word: [])
        monkeypatch.setattr(text_module, "load_wordnet", lambda: None)
    pairs = random_pairs(1000)
    scores = [single_meteor_score(r.split(), p.split(), wordnet=synonyms) for _, p, r, _ in pairs]
    name = "answer/meteor" if has_wordnet else "answer/meteor_without_synonyms"
    assert text_metrics(pairs).compute("answer")[name] == math.fsum(scores) / len(scores)


def test_exact_match():
    computed = text_metrics([*PAIRS, ("e", "Mug.", "mug", True)]).compute("answer")
    assert computed["answer/exact_match"] == 2 / 5
    assert computed["answer/exact_match_targets"] == 1 / 4


def test_exact_match_is_absent_without_pairs_to_judge():
    assert "answer/exact_match_targets" not in text_metrics([PAIRS[2]]).compute("answer")
    analysis = TextMetrics()
    analysis.update("a", "a mug", "a mug")
    assert "analysis/exact_match" not in analysis.compute("analysis")
    assert TextMetrics().compute("answer") == {}


def test_text_merge_equals_all_at_once_in_any_order():
    first, second = text_metrics(PAIRS[2:]), text_metrics(PAIRS[1::-1])
    first.merge(second)
    assert first.compute("answer") == text_metrics(PAIRS).compute("answer")


def test_duplicate_key():
    metrics = text_metrics(PAIRS)
    with pytest.raises(UserError, match="'a'"):
        metrics.update("a", "mug", "mug")
    with pytest.raises(UserError, match="'b'"):
        metrics.merge(text_metrics(PAIRS[1:2]))


def rectangle(top: int, left: int, bottom: int, right: int) -> Rle:
    mask = np.zeros((6, 10), bool)
    mask[top:bottom, left:right] = True
    return encode(mask)


EMPTY = rectangle(0, 0, 0, 0)
TARGET = rectangle(0, 0, 4, 5)  # 20 pixels
HALF = rectangle(0, 0, 2, 5)  # the upper 10 of them
ELSEWHERE = rectangle(4, 5, 6, 10)  # 10 pixels apart from the target


def test_rle_round_trip():
    mask = np.random.default_rng(0).random((7, 5)) < 0.4
    rle = json.loads(json.dumps(encode(mask)))
    assert rle["size"] == [7, 5]
    for counts in (rle["counts"], rle["counts"].encode()):
        decoded = decode({"size": rle["size"], "counts": counts})
        assert decoded.dtype == bool
        assert np.array_equal(decoded, mask)


def test_masks_of_an_id_map_are_those_of_its_ids():
    rng = np.random.default_rng(2)
    maps = [
        rng.integers(0, 4, (7, 5)),
        np.zeros((3, 4)),
        np.full((3, 4), 2),
        np.array([[0, 2], [1, 2]]),
    ]
    maps += [np.repeat(rng.integers(0, 3, (4, 1)), 6, axis=1) for _ in range(20)]
    for ids in maps:
        ids = ids.astype(np.uint8)
        rles = encode_ids(ids, [1, 2, 3])
        for mask_id in (1, 2, 3):
            mask = ids == mask_id
            expected = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            expected = {"size": [*ids.shape], "counts": expected["counts"].decode()}
            assert rles[mask_id] == encode(mask) == expected


def test_damaged_run_length_codes_are_found():
    rng = np.random.default_rng(6)
    sizes = [(1, 1), (7, 5), (60, 40), (1080, 1920)]
    for size in sizes * 5:
        mask = rng.random(size) < rng.choice([0, 0.001, 0.5, 1])
        rle = encode(mask)
        validate(rle)
        with pytest.raises(ValueError, match=f"does not add up to {size[0] + 1} x {size[1]} pix"):
            validate({"size": [size[0] + 1, size[1]], "counts": rle["counts"]})
    counts = encode(rng.random((60, 40)) < 0.5)["counts"]
    damaged = [counts[:-1], counts + "1", counts[1:]]
    for text in (*damaged, "", "p1", " ", "\u20ac1", "oooooooooo1"):
        with pytest.raises(ValueError, match=r"is no COCO run-length code|does not add up to"):
            validate({"size": [60, 40], "counts": text})


@pytest.mark.parametrize("targets", [{}, {0: EMPTY}])
@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        ({}, {"giou": 1, "n_acc": 1, "presence": 1}),
        ({0: EMPTY}, {"giou": 1, "n_acc": 1, "presence": 1}),
        ({0: ELSEWHERE}, {"ciou": 0, "giou": 0, "n_acc": 0, "presence": 0}),
    ],
)
def test_one_no_target_query(targets: dict, predicted: dict, expected: dict):
    assert one_query(predicted, targets) == {
        **expected,
        "num_target_queries": 0,
        "num_no_target_queries": 1,
    }


@pytest.mark.parametrize(
    ("predicted", "iou", "rejected", "precision"),
    [
        ({}, 0, True, (0, 0, 0, 0, 0)),
        ({0: EMPTY}, 0, True, (0, 0, 0, 0, 0)),
        ({0: ELSEWHERE}, 0, False, (0, 0, 0, 0, 0)),
        ({0: HALF}, 0.5, False, (1, 0, 0, 0, 0)),
        ({0: rectangle(0, 0, 4, 3), 2: rectangle(0, 3, 2, 4)}, 0.7, False, (1, 1, 1, 0, 0)),
        ({0: TARGET}, 1, False, (1, 1, 1, 1, 1)),
    ],
)
def test_one_target_query(predicted: dict, iou: float, rejected: bool, precision: tuple):
    computed = one_query(predicted, {0: TARGET})
    slot_iou = 0.6 if 2 in predicted else iou
    expected = {
        "ciou": iou,
        "giou": iou,
        "miou": slot_iou,
        "miou/mug": slot_iou,
        "t_acc": 1 - rejected,
        "presence": 1 - rejected,
        "num_target_queries": 1,
        "num_no_target_queries": 0,
        "slot_ciou": slot_iou,
    }
    for tenths, is_precise in zip(range(5, 10), precision, strict=True):
        expected[f"precision@0.{tenths}"] = is_precise
        expected[f"slot_precision@0.{tenths}"] = slot_iou >= tenths / 10
    assert computed == expected


def one_query(predicted: dict, targets: dict) -> dict:
    metrics = GroundingMetrics()
    metrics.update(predicted, targets, {0: "mug"})
    computed = metrics.compute()
    computed["presence"] = computed.pop("presence/accuracy")
    return {name.removeprefix("grounding/"): value for name, value in computed.items()}


def test_corpus_worked_by_hand():
    metrics = GroundingMetrics()
    metrics.update({0: HALF}, {0: TARGET}, {0: "right_hand"})  # 10 / 20
    metrics.update({}, {0: TARGET}, {0: "mug"})  # 0 / 20
    metrics.update({0: ELSEWHERE}, {}, {})  # 0 / 10
    metrics.update({}, {}, {})  # nothing, IoU 1
    # The slots are swapped: the union is right, each target is wrong, 30 / 30
    metrics.update({0: ELSEWHERE, 1: TARGET}, {0: TARGET, 1: ELSEWHERE}, {0: "right_hand"})
    assert metrics.compute() == {
        "grounding/ciou": 40 / 80,
        "grounding/giou": 2.5 / 5,
        "grounding/miou": 0.5 / 4,
        "grounding/miou/mug": 0,
        "grounding/miou/right_hand": 0.5 / 2,
        "grounding/n_acc": 1 / 2,
        "grounding/t_acc": 2 / 3,
        "grounding/precision@0.5": 2 / 3,
        **{f"grounding/precision@0.{tenths}": 1 / 3 for tenths in (6, 7, 8, 9)},
        # Slot by slot: 10 / 20, 0 / 20, 0 / 30 and 0 / 30.
        "grounding/slot_ciou": 10 / 100,
        "grounding/slot_precision@0.5": 1 / 4,
        **{f"grounding/slot_precision@0.{tenths}": 0 for tenths in (6, 7, 8, 9)},
        "presence/accuracy": 3 / 5,
        "grounding/num_target_queries": 3,
        "grounding/num_no_target_queries": 2,
    }


def random_mask(rng: np.random.Generator) -> np.ndarray:
    """Scattered pixels, nothing, everything, one pixel, or one of two halves that touch."""
    kind = rng.choice(
        ["scattered", "empty", "full", "pixel", "left", "right"], p=[0.5, 0.1, 0.1, 0.1, 0.1, 0.1]
    )
    mask = np.zeros((5, 6), bool)
    if kind == "scattered":
        return rng.random((5, 6)) < rng.choice([0.3, 0.9])
    if kind == "pixel":
        mask[rng.integers(5), rng.integers(6)] = True
    else:
        columns = {"empty": slice(0), "full": slice(6), "left": slice(3), "right": slice(3, 6)}
        mask[:, columns[kind]] = True
    return mask


def random_query(rng: np.random.Generator) -> tuple[dict, dict]:
    """Returns predicted and true masks by slot; a third of the queries is answered perfectly."""

    def masks() -> dict[int, np.ndarray]:
        return {slot: random_mask(rng) for slot in range(3) if rng.random() < 0.4}

    predicted = masks()
    targets = masks()
    if rng.random() < 0.3:
        predicted = targets
    return predicted, targets


def slow_overlap(
    predicted: list[np.ndarray], targets: list[np.ndarray]
) -> tuple[int, int, int, int]:
    """Pixels in both, in either, in predicted and in true masks, counted one by one."""
    both = either = in_predicted = in_true = 0
    for pixel in np.ndindex(5, 6):
        first = any(mask[pixel] for mask in predicted)
        second = any(mask[pixel] for mask in targets)
        both += first and second
        either += first or second
        in_predicted += first
        in_true += second
    return both, either, in_predicted, in_true


def slow_grounding(queries: list[tuple[dict, dict]]) -> dict[str, float]:
    """The definitions once more, pixel by pixel."""
    intersections = unions = slot_intersections = slot_unions = 0
    ious: list[float] = []
    target_ious: list[float] = []
    slot_ious: list[float] = []
    rejections: list[bool] = []
    acceptances: list[bool] = []
    for predicted, targets in queries:
        # All slots together
        both, either, in_predicted, in_true = slow_overlap(
            [*predicted.values()], [*targets.values()]
        )
        intersections += both
        unions += either
        if in_true:
            ious.append(both / either)
            target_ious.append(both / either)
            acceptances.append(in_predicted > 0)
        else:
            ious.append(1.0 if in_predicted == 0 else 0.0)
            rejections.append(in_predicted == 0)

        # Slot by slot
        for slot, target in targets.items():
            in_slot = [predicted[slot]] if slot in predicted else []
            both, either, _, in_true = slow_overlap(in_slot, [target])
            if in_true:
                slot_ious.append(both / either)
                slot_intersections += both
                slot_unions += either

    thresholds = (0.5, 0.6, 0.7, 0.8, 0.9)
    return {
        "grounding/ciou": intersections / unions,
        "grounding/giou": np.mean(ious),
        "grounding/miou": np.mean(slot_ious),
        "grounding/n_acc": np.mean(rejections),
        "grounding/t_acc": np.mean(acceptances),
        "grounding/slot_ciou": slot_intersections / slot_unions,
        **{f"grounding/precision@{x}": np.mean(np.array(target_ious) >= x) for x in thresholds},
        **{f"grounding/slot_precision@{x}": np.mean(np.array(slot_ious) >= x) for x in thresholds},
        "presence/accuracy": np.mean(rejections + acceptances),
        "grounding/num_target_queries": len(target_ious),
        "grounding/num_no_target_queries": len(rejections),
    }


def grounding_metrics(queries: list[tuple[dict, dict]], labels: dict[int, str]) -> GroundingMetrics:
    metrics = GroundingMetrics()
    for masks, true_masks in queries:
        predicted = {slot: encode(mask) for slot, mask in masks.items()}
        targets = {slot: encode(mask) for slot, mask in true_masks.items()}
        metrics.update(predicted, targets, labels)
    return metrics


def test_grounding_equals_slow_loops():
    rng = np.random.default_rng(1)
    queries = [random_query(rng) for _ in range(500)]
    expected = slow_grounding(queries)
    assert grounding_metrics(queries, {}).compute() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_grounding_merge_equals_all_at_once_in_any_order(seed: int):
    rng = np.random.default_rng(seed)
    queries = [random_query(rng) for _ in range(60)]
    labels = {0: "right_hand", 1: "mug"}
    at_once = grounding_metrics(queries, labels).compute()
    shuffled = [queries[index] for index in rng.permutation(60)]
    merged = grounding_metrics(shuffled[:17], labels)
    merged.merge(grounding_metrics([], labels))
    merged.merge(grounding_metrics(shuffled[17:], labels))
    assert merged.compute() == at_once
    assert set(GroundingMetrics().compute().values()) == {0}  # the two counts


def test_bad_masks_are_named():
    with pytest.raises(UserError, match=r"\(2, 3\), \(6, 10\)"):
        GroundingMetrics().update({0: encode(np.ones((2, 3), bool))}, {0: TARGET}, {})
    with pytest.raises(UserError, match="frPyObjects"):
        GroundingMetrics().update({0: {"size": [6, 10], "counts": [0, 60]}}, {0: TARGET}, {})


def random_distance(rng: np.random.Generator) -> np.ndarray:
    distance = rng.uniform(300, 2000, (8, 9)).astype(np.float32)
    distance[rng.random((8, 9)) < 0.2] = 0
    return distance


def depth_metrics(sums: list[dict]) -> DepthMetrics:
    metrics = DepthMetrics()
    for image in sums:
        metrics.update(image)
    return metrics


def test_depth_perfect_up_to_scale_and_shift():
    distance = random_distance(np.random.default_rng(3))
    disparity = np.zeros_like(distance)
    disparity[distance > 0] = 700 / distance[distance > 0] + 0.3
    computed = depth_metrics([depth_errors(disparity, distance)]).compute()
    assert computed["depth/delta1"] == 1
    assert computed["depth/mae"] < 1e-5
    assert computed["depth/abs_rel"] < 1e-5
    assert computed["depth/rmse"] < 1e-2


def test_depth_worked_by_hand():
    # Inverse distances 1, 0.5, 0.25 against 1, 1, 0: the fit is 0.25 + 0.5 d, distances 4/3, 4/3, 4
    sums = depth_errors(np.array([[1.0, 1.0, 0.0]]), np.array([[1.0, 2.0, 4.0]]))
    assert list(sums.values()) == pytest.approx([3, 1 / 3, 2 / 3, 5 / 9, 1])


def test_depth_ignores_invalid_pixels():
    rng = np.random.default_rng(4)
    distance, disparity = random_distance(rng), rng.random((8, 9))
    disturbed = np.where(distance > 0, disparity, 1e6)
    sums = depth_errors(disturbed, distance)
    assert sums == depth_errors(disparity, distance)
    assert sums["num_valid"] == np.count_nonzero(distance)
    assert json.loads(json.dumps(sums)) == sums


def test_depth_prediction_stays_positive():
    # The fit is 41/48, 20/48 and -1/48; the last is held at 10 times the largest true distance
    sums = depth_errors(np.array([[2.0, 1.0, 0.0]]), np.array([[1.0, 8.0, 8.0]]))
    assert sums["sum_squared"] == pytest.approx((7 / 41) ** 2 + (8 - 2.4) ** 2 + (80 - 8) ** 2)


def test_depth_maps_that_cannot_be_scored():
    ramp = np.arange(4.0).reshape(2, 2)
    assert depth_errors(ramp, np.zeros((2, 2))) is None
    assert depth_errors(ramp, np.array([[0.0, 0.0], [0.0, 5.0]])) is None
    assert depth_errors(ramp, np.full((2, 2), 5.0)) is None
    assert DepthMetrics().compute() == {}


def test_constant_depth_prediction_is_scored():
    # The fit is the mean of 1 and 1/3 everywhere, so distance 3/2.
    sums = depth_errors(np.zeros((1, 2)), np.array([[1.0, 3.0]]))
    assert sums["sum_squared"] == pytest.approx(0.25 + 2.25)
    assert sums["sum_absolute_normalised"] == 1


def test_a_reversed_depth_map_is_no_better_than_a_constant_one():
    rng = np.random.default_rng(6)
    distance = random_distance(rng)
    constant = depth_errors(np.zeros_like(distance), distance)
    for reversed_map in (distance, -1 / np.maximum(distance, 1), distance + rng.random((8, 9))):
        assert depth_errors(reversed_map, distance) == pytest.approx(constant)


def test_depth_merge_equals_all_at_once_in_any_order():
    rng = np.random.default_rng(5)
    sums = [depth_errors(rng.random((8, 9)), random_distance(rng)) for _ in range(20)]
    merged = depth_metrics(sums[:7:-1])
    merged.merge(depth_metrics(sums[:8]))
    assert merged.compute() == depth_metrics(sums).compute()
