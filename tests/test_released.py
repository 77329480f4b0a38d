"""The released scoring formulas against values worked by hand, and apart from the standard ones."""

from __future__ import annotations

import numpy as np
import pytest
from nltk.translate.meteor_score import single_meteor_score
from pycocoevalcap.cider.cider import Cider

from annexe.metrics import AnnexeRelease, EarlRelease, GroundingMetrics
from annexe.metrics import text as text_module
from annexe.metrics.grounding import QueryResult, measure
from annexe.rle import Rle, encode

NUM_PIXELS = 60


def rectangle(top: int, left: int, bottom: int, right: int) -> Rle:
    mask = np.zeros((6, 10), bool)
    mask[top:bottom, left:right] = True
    return encode(mask)


TARGET = rectangle(0, 0, 4, 5)  # 20 pixels
HALF = rectangle(0, 0, 2, 5)  # the upper 10 of them
ELSEWHERE = rectangle(4, 5, 6, 10)  # 10 pixels apart from the target
FULL = rectangle(0, 0, 6, 10)
SMALL = rectangle(0, 0, 1, 3)  # 3 pixels, 5 % of the photo


def released(results: list[QueryResult]) -> float:
    metric = AnnexeRelease()
    for result in results:
        metric.add_query("a", "b", result, NUM_PIXELS)
    return metric.compute()["grounding/batch_class_iou"]


def earl(results: list[QueryResult]) -> float:
    metric = EarlRelease()
    for result in results:
        metric.add(result)
    return metric.compute()["grounding/mean_target_iou"]


PERFECT = measure({0: TARGET}, {0: TARGET}, {})
HALF_RIGHT = measure({0: HALF}, {0: TARGET}, {})
ONE_OF_TWO = measure({1: ELSEWHERE}, {0: TARGET, 1: ELSEWHERE}, {})
REFUSED = measure({}, {}, {})
FALSE_ALARM = measure({0: ELSEWHERE}, {}, {})
SAMPLES = [PERFECT] * 10 + [HALF_RIGHT] * 5 + [ONE_OF_TWO] * 5 + [REFUSED, REFUSED, FALSE_ALARM]


def test_annexe_release_worked_by_hand_on_23_samples():
    """The IoU of every class in three batches; each counts the same, the short one too.

    First ten: background 400 / 400, class 1 200 / 200; 2 and 3 are in no truth and repeat 1.
    Mean 1.

    Second ten, five half right and five with one of two targets:
    background: half right 60 - 20 shared of 60 - 10, one of two 60 - 30 of 60 - 10,
    (200 + 150) / (250 + 250) = 0.7
    class 1: 10 / 20 and 0 / 20, five times each: 50 / 200 = 0.25
    class 2: 10 / 10 five times = 1; class 3 repeats 1. Mean 2.95 / 4 = 0.7375.

    Last three, no target: background (60 + 60 + 50) / 180 = 17 / 18, which all other classes
    repeat. Mean 17 / 18.
    """
    assert len(SAMPLES) == 23
    assert released(SAMPLES) == pytest.approx((1 + 0.7375 + 17 / 18) / 3, abs=1e-12)


def test_earl_release_worked_by_hand_on_23_samples():
    # 10 perfect; 5 of 0.5; 5 of (0 + 1) / 2; 1, 1 and, with a mask where nothing is, 0.
    assert earl(SAMPLES) == pytest.approx((10 + 2.5 + 2.5 + 2) / 23, abs=1e-12)
    # A mask in a slot without a target is one more that is empty on one side.
    assert earl([measure({0: TARGET, 1: ELSEWHERE}, {0: TARGET}, {})]) == 0.5


def test_predicting_nothing_scores_a_quarter_there_and_nothing_under_the_standard():
    nothing = [measure({}, {0: SMALL}, {})] * 23
    assert released(nothing) == pytest.approx(0.95 / 4)  # background alone: 57 / 60, 0, 0, 0
    standard = GroundingMetrics()
    for result in nothing:
        standard.add(result)
    assert standard.compute()["grounding/ciou"] == 0


def test_an_absent_background_is_0_and_a_batch_does_not_look_back():
    full = measure({0: FULL}, {0: FULL}, {})
    assert released([full]) == 0.75  # 0, 1, 1, 1
    assert released([PERFECT] * 10 + [full]) == (1 + 0.75) / 2


def test_slots_beyond_the_released_head_are_no_background_and_no_class():
    fourth = measure({}, {3: TARGET}, {})
    # Background 40 / 60, which the absent classes repeat
    assert released([fourth]) == pytest.approx(40 / 60)


def test_names_are_not_those_of_the_standard():
    metric = AnnexeRelease()
    standard = GroundingMetrics()
    metric.add_analysis("a mug", "a mug")
    metric.add_query("a mug", "a cup", PERFECT, NUM_PIXELS)
    standard.add(PERFECT)
    names = set(metric.compute()) | {"grounding/mean_target_iou"}
    assert not names & (set(standard.compute()) | {f"answer/{n}" for n in ("meteor", "cider")})


def test_texts_are_swapped_and_scored_within_batches_of_ten():
    words = ["the", "right", "hand", "holds", "a", "red", "mug", "on", "the", "old", "table"]
    rng = np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(rng.permutation(words)[: rng.integers(3, 10)])

    pairs = [(sentence(), sentence()) for _ in range(23)]
    metric = AnnexeRelease()
    for (prediction, reference), result in zip(pairs, SAMPLES, strict=True):
        metric.add_query(f"{prediction.upper()}.", reference, result, NUM_PIXELS)
    computed = metric.compute()
    assert computed["num_batches"] == 3
    batches = (pairs[:10], pairs[10:20], pairs[20:])
    ciders = []
    for batch in batches:
        as_references = {n: [prediction] for n, (prediction, _) in enumerate(batch)}
        as_predictions = {n: [reference] for n, (_, reference) in enumerate(batch)}
        ciders.append(Cider().compute_score(as_references, as_predictions)[0])
    assert computed["answer/cider_swapped"] == pytest.approx(np.mean(ciders), abs=1e-12)
    if text_module.load_wordnet() is None:
        pytest.skip("WordNet is not installed (apt-get install wordnet-base)")
    meteors = []
    for batch in batches:
        scores = [single_meteor_score(first.split(), second.split()) for first, second in batch]
        meteors.append(np.mean(scores))
    assert computed["answer/meteor_swapped"] == pytest.approx(np.mean(meteors), abs=1e-12)


def test_the_order_of_samples_settles_the_batches():
    assert released(SAMPLES[::-1]) != pytest.approx(released(SAMPLES))
    assert earl(SAMPLES[::-1]) == earl(SAMPLES)
