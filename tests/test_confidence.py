"""Calibration, risk, agreement, intervals: against values worked by hand or slow loops."""

from __future__ import annotations

import numpy as np
import pytest

from annexe.datasets.target_groups import target_group
from annexe.metrics import (
    AnswerContradictions,
    ClusterBootstrap,
    GroundingMetrics,
    MaskCalibration,
    ObjectWithoutHand,
    ParaphraseAgreement,
    PresenceRisk,
    best_threshold,
    differences,
)
from annexe.metrics.bootstrap import METRICS, Difference
from annexe.metrics.consistency import agreement
from annexe.metrics.grounding import QueryResult, measure
from annexe.rle import Rle, encode


def rectangle(top: int, left: int, bottom: int, right: int) -> Rle:
    mask = np.zeros((6, 10), bool)
    mask[top:bottom, left:right] = True
    return encode(mask)


EMPTY = rectangle(0, 0, 0, 0)
TARGET = rectangle(0, 0, 4, 5)  # 20 pixels
HALF = rectangle(0, 0, 2, 5)  # the upper 10 of them
ELSEWHERE = rectangle(4, 5, 6, 10)  # 10 pixels apart from the target
HAND_AND_MUG = {0: "right_hand", 1: "mug"}


def test_calibration_worked_by_hand():
    metric = MaskCalibration()
    metric.add(measure({0: TARGET}, {0: TARGET}, {}, {0: 0.95}))  # right, last bin
    metric.add(measure({0: HALF}, {0: TARGET}, {}, {0: 1.0}))  # IoU 0.5 is right, last bin
    # Wrong; slot 1 has no target
    metric.add(measure({0: ELSEWHERE, 1: TARGET}, {0: TARGET}, {}, {0: 0.96, 1: 0.3}))
    metric.add(measure({0: ELSEWHERE}, {}, {}, {0: 0.31}))  # no target, the bin of 0.3
    metric.add(measure({0: EMPTY}, {0: TARGET}, {}, {0: 0.9}))  # no pixel, no mask
    metric.add(measure({0: TARGET}, {0: TARGET}, {}))  # without a score
    # |2.91 - 2| + |0.61 - 0| over 5 masks
    assert metric.compute() == pytest.approx(
        {
            "calibration/ece": 1.52 / 5,
            "calibration/confidence": 3.52 / 5,
            "calibration/accuracy": 2 / 5,
        }
    )
    assert MaskCalibration().compute() == {}


def test_risk_worked_by_hand():
    right = measure({0: HALF}, {0: TARGET}, {})
    missed = measure({}, {0: TARGET}, {})
    rejected = measure({}, {}, {})
    metric = PresenceRisk()
    metric.add(right, 0.9)
    metric.add(rejected, 0.2)  # sure of 0.8
    metric.add(missed, 0.2)  # as sure, and wrong: each of the two counts 1 / 2
    metric.add(right, 0.6)
    # Wrong among the surest: 0, 1/2 of 2, 1 of 3, 1 of 4.
    assert metric.compute() == pytest.approx(
        {
            "presence/aurc": (0 + 0.25 + 1 / 3 + 0.25) / 4,
            "presence/risk@0.5": 0.25,
            "presence/risk@0.7": 1 / 3,
            "presence/risk@0.8": 0.25,
            "presence/risk@0.9": 0.25,
            "presence/risk@1.0": 0.25,
        }
    )


def random_results(seed: int, num_queries: int = 60) -> list[QueryResult]:
    rng = np.random.default_rng(seed)
    choices = [EMPTY, TARGET, HALF, ELSEWHERE]

    def masks() -> dict[int, Rle]:
        return {slot: choices[rng.integers(4)] for slot in range(2) if rng.random() < 0.6}

    results = []
    for _ in range(num_queries):
        predicted = masks()
        targets = masks()
        scores = {slot: float(rng.random()) for slot in predicted}
        results.append(measure(predicted, targets, HAND_AND_MUG, scores))
    return results


def test_risk_of_all_is_the_share_of_wrong_decisions_and_order_does_not_matter():
    results = random_results(1)
    presences = np.random.default_rng(2).integers(0, 5, len(results)) / 4  # many equal ones
    risk = PresenceRisk()
    grounding = GroundingMetrics()
    for result, presence in zip(results, presences, strict=True):
        risk.add(result, float(presence))
        grounding.add(result)
    other = PresenceRisk()
    other.decisions = risk.decisions[::-1]
    assert risk.compute() == other.compute()
    accuracy = grounding.compute()["presence/accuracy"]
    assert risk.compute()["presence/risk@1.0"] == pytest.approx(1 - accuracy)


def test_agreement_worked_by_hand():
    # Pairs: TARGET with HALF 10 / 20, each of them with nothing 0; two of the answers are equal.
    question = agreement([[TARGET], [HALF], []], ["The mug.", "mug", "the mug"])
    assert question == pytest.approx((0.5 / 3, 1 / 3))
    assert agreement([[], [EMPTY]], ["a", "b"]) == (1, 0)
    assert agreement([[HALF, TARGET], [TARGET]], ["a", "a"]) == (1, 1)  # the union counts
    metric = ParaphraseAgreement()
    more = ParaphraseAgreement()
    metric.update(question)
    more.update(agreement([[TARGET], [TARGET]], ["a", "a"]))
    metric.merge(more)
    assert metric.compute() == pytest.approx(
        {
            "paraphrase/iou": (0.5 / 3 + 1) / 2,
            "paraphrase/equal_answers": (1 / 3 + 1) / 2,
            "paraphrase/num_questions": 2,
        }
    )
    assert ParaphraseAgreement().compute() == {}


@pytest.mark.parametrize(
    ("predicted", "counts"),
    [
        ({1: ELSEWHERE}, 1),
        ({0: EMPTY, 1: HALF}, 1),
        ({0: HALF, 1: ELSEWHERE}, 0),
        ({0: TARGET}, 0),
        ({}, 0),
        ({2: TARGET}, 0),
    ],
)
def test_object_without_hand(predicted: dict, counts: int):
    metric = ObjectWithoutHand()
    metric.add(measure(predicted, {0: TARGET, 1: ELSEWHERE}, HAND_AND_MUG))
    metric.add(measure({1: TARGET}, {1: TARGET}, HAND_AND_MUG))  # asks for no hand
    metric.add(measure({}, {0: TARGET}, HAND_AND_MUG))  # asks for no object
    assert metric.compute() == {
        "consistency/object_without_hand": counts,
        "consistency/num_hand_and_object_queries": 1,
    }


@pytest.mark.parametrize("phrase", ["my right hand", "the left hand.", "the hand of the person"])
def test_hands_are_told_from_objects_by_words(phrase: str):
    labels = {0: target_group(phrase, "photo"), 1: target_group("the clamp", "photo")}
    metric = ObjectWithoutHand()
    metric.add(measure({1: ELSEWHERE}, {0: TARGET, 1: ELSEWHERE}, labels))
    assert metric.compute()["consistency/object_without_hand"] == 1


def clusters_of(
    results: list[QueryResult], num_clusters: int, exact: list[bool]
) -> ClusterBootstrap:
    bootstrap = ClusterBootstrap()
    for index, (result, is_exact) in enumerate(zip(results, exact, strict=True)):
        bootstrap.update(f"video {index % num_clusters}", result, is_exact)
    return bootstrap


def test_bootstrap_measures_what_the_metrics_do():
    results = random_results(3)
    grounding = GroundingMetrics()
    for result in results:
        grounding.add(result)
    exact = [index % 3 == 0 for index in range(len(results))]
    same = clusters_of(results, 7, exact)
    compared = differences(same, same)
    assert list(compared) == list(METRICS)
    for name, row in compared.items():
        if name in grounding.compute():
            assert row.first == pytest.approx(grounding.compute()[name], abs=1e-12), name
    assert compared["answer/exact_match"].first == pytest.approx(sum(exact) / len(exact))
    for row in compared.values():
        assert (row.difference, row.low, row.high, row.p) == (0, 0, 0, 1)


def test_intervals_equal_slow_resampling():
    """The same draws, one cluster after the other."""
    results, num_clusters = random_results(4), 7
    clusters = clusters_of(results, num_clusters, [False] * len(results))
    rng = np.random.default_rng(0)
    values = []
    for times in rng.multinomial(num_clusters, [1 / num_clusters] * num_clusters, size=1000):
        metric = GroundingMetrics()
        for index, result in enumerate(results):
            for _ in range(times[index % num_clusters]):
                metric.add(result)
        values.append(metric.compute())
    for name in ("ciou", "giou", "t_acc", "miou", "precision@0.5"):
        name = f"grounding/{name}"
        expected = np.quantile([value[name] for value in values], [0.025, 0.975])
        assert clusters.compute()[name] == pytest.approx(expected), name
    low, high = clusters.compute()["grounding/giou"]
    assert low < differences(clusters, clusters)["grounding/giou"].first < high


def test_frames_of_one_video_do_not_narrow_the_interval():
    results = random_results(5, 20)
    alone = clusters_of(results, 20, [False] * 20)
    repeated = clusters_of(results * 10, 20, [False] * 200)
    assert repeated.compute().keys() == alone.compute().keys()
    for name, interval in repeated.compute().items():
        assert interval == pytest.approx(alone.compute()[name]), name
    as_if_apart = clusters_of(results * 10, 200, [False] * 200).compute()["grounding/giou"]
    low, high = alone.compute()["grounding/giou"]
    assert as_if_apart[1] - as_if_apart[0] < (high - low) / 2


def test_order_and_merging_of_queries_do_not_matter():
    results = random_results(6)
    at_once = clusters_of(results, 60, [True] * 60)
    merged = ClusterBootstrap()
    for index in np.random.default_rng(0).permutation(60).tolist():
        part = ClusterBootstrap()
        part.update(f"video {index}", results[index], True)
        merged.merge(part)
    assert merged.compute() == at_once.compute()


def test_a_clear_difference_is_significant_and_chance_is_not():
    good = [measure({0: TARGET}, {0: TARGET}, {})] * 40
    bad = [measure({0: ELSEWHERE}, {0: TARGET}, {})] * 40
    half = [good[0], bad[0]] * 20
    other_half = [bad[0], good[0]] * 20

    def giou(first: list[QueryResult], second: list[QueryResult]) -> Difference:
        sides = [clusters_of(results, 40, [True] * 40) for results in (first, second)]
        return differences(*sides)["grounding/giou"]

    clear = giou(bad, good)
    assert (clear.difference, clear.low, clear.high) == (1, 1, 1)
    assert clear.p == pytest.approx(2 / 1001)
    chance = giou(half, other_half)
    assert chance.difference == 0 and chance.low < 0 < chance.high and chance.p > 0.5


def test_one_video_gives_neither_interval_nor_p():
    clusters = clusters_of(random_results(7), 1, [True] * 60)
    assert clusters.compute() == {}
    for row in differences(clusters, clusters).values():
        assert (row.low, row.high, row.p) == (None, None, None)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_the_best_threshold_judges_most_right(seed, balanced):
    random = np.random.default_rng(seed)
    scores = random.integers(0, 8, 30) / 7
    present = random.random(30) < scores

    def right(threshold: float) -> float:
        judged = (scores > threshold) == present
        return min(judged[present].mean(), judged[~present].mean()) if balanced else judged.mean()

    found = best_threshold(scores.tolist(), present.tolist(), balanced=balanced)
    candidates = np.linspace(0, 1, 1001)
    assert right(found) == pytest.approx(max(map(right, candidates)))
    ends = np.unique([0, *scores, 1])
    middles = [t for t in (ends[:-1] + ends[1:]) / 2 if right(t) == pytest.approx(right(found))]
    assert abs(found - 0.5) == pytest.approx(min(abs(t - 0.5) for t in middles))


def test_without_a_choice_the_threshold_is_a_half():
    for scores, present in (([0.1, 0.9], [True, True]), ([0.1], [False]), ([], [])):
        assert best_threshold(scores, present, balanced=True) == 0.5


BOTH = "The mask of the left hand is <MSK_0>, and the mask of the mug is <MSK_1>."


@pytest.mark.parametrize(
    ("slots", "answer", "contradicts"),
    [
        ((0, 1), BOTH, False),
        ((0,), BOTH, True),
        ((0, 1), "The mask of the left hand is <MSK_0>.", True),
        ((), "The mask of the left hand is <MSK_0>.", True),
        ((0, 1), "The mask of the left hand is <MSK>, the mask of the mug is <MSK>.", False),
        ((0,), "The mask of the left hand is <MSK>, the mask of the mug is <MSK>.", True),
        ((1,), "The mask of the mug is <MSK>.", False),
        ((), "There is no suitable referring result.", False),
        ((), "there is no suitable referring result", False),
        ((0,), "There is no suitable referring result.", True),
        ((0, 1), "the left hand and the mug", False),
        ((), "the left hand", True),
        ((), "none", False),
        ((0,), "none", True),
    ],
)
def test_contradictions_of_answer_and_masks(slots, answer, contradicts):
    square = encode(np.ones((4, 4), bool))
    metric = AnswerContradictions()
    metric.add(measure(dict.fromkeys(slots, square), {0: square}, {0: "mug"}), answer)
    other = AnswerContradictions()
    other.merge(metric)
    assert other.compute() == {"consistency/contradictions": float(contradicts)}
    assert AnswerContradictions().compute() == {}
