"""Analyses read slot by slot: against the facts of drawn scenes, and what a wrong one costs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from msgspec.structs import replace

from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.evaluation.records import ImageRecord, PredictedMask, QueryRecord, Record
from annexe.evaluation.scoring import score_all
from annexe.evaluation.truth import Truth
from annexe.metrics.analysis import AnalysisSlots, Clause, judge_slots, parse_analysis
from annexe.synthetic.language import caption
from annexe.synthetic.scene import draw_scene
from annexe.synthetic.wordings import ING

TRUE = (
    "In this image, the right hand is lifting a red mug off the table while the left hand is "
    "touching black scissors with one finger."
)


def test_clauses_are_the_facts_of_drawn_scenes():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = draw_scene(rng, unseen_pair=False)
        facts = Counter(
            Clause(frozenset(act.sides), ING[act.verb], act.item.name) for act in scene.interactions
        )
        facts.update(Clause(frozenset((side,)), None, None) for side in scene.idle_sides)
        parsed = parse_analysis(caption(scene))
        assert parsed.is_complete and Counter(parsed.clauses) == facts


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("", "", set()),
        ("red mug off the table", "RED  mug across the table", set()),
        ("red", "blue", {"object"}),
        ("lifting", "holding", {"verb"}),
        ("the right hand is", "both hands are", {"actor"}),
        (" while the left hand is touching black scissors with one finger", "",
         {"actor", "hand", "verb", "object"}),
        ("is touching black scissors with one finger", "rests on the table",
         {"actor", "verb", "object"}),
        # Every word is right, but they stand with the wrong hands
        ("mug off the table", "mug", set()),
        # A clause that cannot be read: the others count
        ("scissors with one finger", "scissors with one finger while nobody looks", None),
        (TRUE, "", {"actor", "hand", "verb", "object"}),
    ],
)  # fmt: skip
def test_a_slot_is_wrong_where_its_words_are(old: str, new: str, wrong: set[str] | None):
    right = judge_slots(TRUE.replace(old, new) if old else TRUE, TRUE)
    assert right is not None
    assert {slot for slot, is_right in right.items() if not is_right} == (
        {"all_slots"} if wrong is None else wrong | ({"all_slots"} if wrong else set())
    )


def test_words_with_the_wrong_hand_are_right_alone_but_not_together():
    swapped = TRUE.replace("right", "RIGHT").replace("left", "right").replace("RIGHT", "left")
    right = judge_slots(swapped, TRUE)
    assert right == dict.fromkeys(("actor", "hand", "verb", "object"), True) | {"all_slots": False}


def test_free_sentences_are_left_out():
    free = "This image illustrates camera wearer manipulating a laptop with the right hand."
    held = (
        "In this image, the right hand of the person is holding a white trash can over the table."
    )
    metric = AnalysisSlots()
    metric.add(free, free)
    metric.add("", "")
    assert metric.compute() == {}
    other = AnalysisSlots()
    other.add(free, held)
    other.add(held, held)
    metric.merge(other)
    assert metric.compute() == {
        "analysis/actor": 0.5,
        "analysis/hand": 0.5,
        "analysis/verb": 0.5,
        "analysis/object": 0.5,
        "analysis/all_slots": 0.5,
        "analysis/num_slot_images": 2,
    }


def test_answers_are_scored_apart_where_the_analysis_is_wrong(scenes):
    """Perfect answers about photos with a perfect analysis, and refusals about the others."""
    truth = Truth(EgoIRGBench("test", 56, 0, None, data_root=str(scenes), cache=False))
    records: list[Record] = []
    for index, stem in enumerate(truth.dataset.stems):
        is_right = index % 2 == 0
        true = truth.annotations(stem)
        analysis = true[0].caption if is_right else "The left foot is kicking a ball."
        records.append(ImageRecord(image=stem, analysis=analysis))
        for number, annotation in enumerate(true):
            masks = []
            for slot, mask_id in annotation.slots.items():
                masks.append(PredictedMask(slot=slot, rle=truth.masks(stem)[mask_id]))
            query = QueryRecord(
                image=stem,
                annotation=number,
                query_id=annotation.questions[0]["id"],
                answer=annotation.answer,
                masks=masks,
            )
            records.append(query if is_right else replace(query, answer="", masks=[]))
    metrics, _ = score_all(records, truth, workers=1)
    standard = metrics["standard"]
    num_right = (len(truth.dataset.stems) + 1) // 2
    assert standard["analysis/num_slot_images"] == len(truth.dataset.stems)
    assert standard["analysis/all_slots"] == num_right / len(truth.dataset.stems)
    parts = metrics["breakdowns"]["analysis"]
    for part, expected in (("right", 1.0), ("wrong", 0.0)):
        assert parts[part]["answer/exact_match"] == expected
        assert parts[part]["grounding/ciou"] == expected
    assert parts["right"]["num_queries"] + parts["wrong"]["num_queries"] == standard["num_queries"]

    # Without analyses there is nothing to tell them apart by
    bare = score_all([record for record in records if isinstance(record, QueryRecord)], truth)
    assert "analysis" not in bare.metrics["breakdowns"]
