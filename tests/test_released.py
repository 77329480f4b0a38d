"""The released scoring formulas against values worked by hand, and apart from the standard ones.

The last part compares the scores of 300 random queries with slow references that follow the
published scripts pixel by pixel and word by word.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

import nltk
import numpy as np
import pytest
from nltk.translate.meteor_score import single_meteor_score
from PIL import Image
from pycocoevalcap.cider.cider import Cider

from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.evaluation.records import ImageRecord, PredictedMask, QueryRecord, Record
from annexe.evaluation.scoring import score_all
from annexe.evaluation.truth import Truth
from annexe.metrics import AnnexeRelease, EarlRelease, GroundingMetrics
from annexe.metrics import text as text_module
from annexe.metrics.grounding import measure
from annexe.metrics.released import (
    class_pixels,
    mask_names,
    match_names,
    mean_target_iou,
    refuses,
)
from annexe.metrics.text import word_tokenize
from annexe.prompts import NO_TARGET_ANSWER
from annexe.rle import Rle, decode, encode

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


class Query(NamedTuple):
    """Masks of one query by slot."""

    predicted: dict[int, Rle]
    targets: dict[int, Rle]


def released(queries: list[Query]) -> float:
    metric = AnnexeRelease()
    for query in queries:
        pixels = class_pixels(measure(*query, {}), *query, NUM_PIXELS)
        metric.add_query("a", "b", pixels)
    return metric.compute()["grounding/batch_class_iou"]


def earl(queries: list[Query]) -> float:
    metric = EarlRelease()
    for query in queries:
        by_slot = {slot: [slot] for slot in query.targets}
        iou = mean_target_iou(measure(*query, {}), *query, by_slot, refused=False)
        metric.add_query("a", "b", iou)
    return metric.compute()["grounding/mean_target_iou"]


PERFECT = Query({0: TARGET}, {0: TARGET})
HALF_RIGHT = Query({0: HALF}, {0: TARGET})
ONE_OF_TWO = Query({1: ELSEWHERE}, {0: TARGET, 1: ELSEWHERE})
REFUSED = Query({}, {})
FALSE_ALARM = Query({0: ELSEWHERE}, {})
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
    assert released(SAMPLES) == pytest.approx((1 + 0.7375 + 17 / 18) / 3, abs=1e-7)


def test_pixels_of_several_slots_belong_to_the_last_of_them():
    random = np.random.default_rng(0)

    def draw() -> dict[int, Rle]:
        slots = random.permutation(4)[: random.integers(5)].tolist()
        return {slot: encode(random.random((6, 10)) < random.choice([0, 0.3, 1])) for slot in slots}

    def distinct(masks: dict[int, Rle]) -> dict[int, Rle]:
        later = np.zeros((6, 10), bool)
        parts = {}
        for slot in sorted(masks, reverse=True):
            parts[slot] = encode(decode(masks[slot]) & ~later)
            later |= decode(masks[slot])
        return parts

    for _ in range(100):
        query = Query(draw(), draw())
        apart = Query(distinct(query.predicted), distinct(query.targets))
        pixels = class_pixels(measure(*query, {}), *query, NUM_PIXELS)
        assert (pixels == class_pixels(measure(*apart, {}), *apart, NUM_PIXELS)).all()


def test_earl_release_worked_by_hand_on_23_samples():
    # 10 perfect; 5 of 0.5; 5 of (0 + 1) / 2; 1, 1 and, with a mask where nothing is, 0.
    assert earl(SAMPLES) == pytest.approx((10 + 2.5 + 2.5 + 2) / 23, abs=1e-12)
    # Further masks do not count
    assert earl([Query({0: TARGET, 1: ELSEWHERE}, {0: TARGET})]) == 1


def test_predicting_nothing_scores_a_quarter_there_and_nothing_under_the_standard():
    nothing = [Query({}, {0: SMALL})] * 23
    assert released(nothing) == pytest.approx(0.95 / 4)  # background alone: 57 / 60, 0, 0, 0
    standard = GroundingMetrics()
    for query in nothing:
        standard.add(measure(*query, {}))
    assert standard.compute()["grounding/ciou"] == 0


def test_an_absent_background_is_0_and_a_batch_does_not_look_back():
    full = Query({0: FULL}, {0: FULL})
    assert released([full]) == pytest.approx(0.75, abs=1e-7)  # 0, 1, 1, 1
    assert released([PERFECT] * 10 + [full]) == pytest.approx((1 + 0.75) / 2, abs=1e-7)


def test_slots_beyond_the_released_head_are_no_background_and_no_class():
    fourth = Query({}, {3: TARGET})
    # Background 40 / 60, which the absent classes repeat
    assert released([fourth]) == pytest.approx(40 / 60)


def test_a_pixel_in_the_masks_of_two_slots_has_the_class_of_the_later_one():
    # Class 1 keeps the lower 10 pixels of the target, of which 10 are predicted among 20
    query = Query({0: TARGET}, {0: TARGET, 1: HALF})
    background, first, second = 1, 10 / 20, 0
    assert released([query]) == pytest.approx((background + first + second + second) / 4)


def test_names_are_not_those_of_the_standard():
    ours = AnnexeRelease()
    theirs = EarlRelease()
    standard = GroundingMetrics()
    ours.add_analysis("a mug", "a mug")
    ours.add_query("a mug", "a cup", class_pixels(measure(*PERFECT, {}), *PERFECT, NUM_PIXELS))
    theirs.add_analysis("a mug", "a mug")
    theirs.add_query("a mug", "a cup", 1.0)
    standard.add(measure(*PERFECT, {}))
    texts = text_module.TextMetrics()
    texts.update("0", "a mug", "a cup")
    names = [set(metric.compute()) for metric in (ours, theirs, standard)]
    names.append(set(texts.compute("answer") | texts.compute("analysis")))
    assert len(set.union(*names)) == sum(map(len, names))
    assert all(names)


def test_the_order_of_samples_settles_the_batches():
    assert released(SAMPLES[::-1]) != pytest.approx(released(SAMPLES))
    assert earl(SAMPLES[::-1]) == earl(SAMPLES)


# Names, refusals and tokens, as EARL reads them


@pytest.mark.parametrize(
    ("names", "phrases", "matches"),
    [
        # Whatever the slots are
        ({0: "the mug", 1: "right hand"}, {0: "the right hand", 1: "mug"}, {0: [1], 1: [0]}),
        # The very name first, then a part of it either way
        ({0: "mug", 1: "the hand"}, {0: "the right hand", 1: "the red mug"}, {0: [1], 1: [0]}),
        ({0: "mug handle", 1: "mug"}, {0: "the mug"}, {0: [1]}),
        ({0: "an active laptop interacting with right hand"}, {0: "the laptop"}, {0: [0]}),
        # Several masks of one target, and several targets of one name
        ({0: "the mug", 1: "Mug"}, {0: "the mug"}, {0: [0, 1]}),
        ({0: "red mug", 1: "blue mug"}, {0: "mug"}, {0: [0, 1]}),
        ({0: "the mug"}, {0: "the mug", 1: "a mug"}, {0: [0], 1: [0]}),
        # A mask takes a target that has none
        ({0: "hand", 1: "hand"}, {0: "left hand", 1: "right hand"}, {0: [0], 1: [1]}),
        ({0: "bottle"}, {0: "the mug"}, {0: []}),
        # Without a name the slot counts
        ({0: "", 1: ""}, {1: "the mug"}, {1: [1]}),
    ],
)
def test_masks_find_their_targets_by_name(names, phrases, matches):
    assert match_names(names, phrases) == matches


def test_a_mask_is_called_by_its_phrase_or_else_by_the_answer():
    answer = "The mask of the right hand is <MSK_0>, the mask of the mug is <MSK_1>."
    assert mask_names(answer, {0: None, 1: "a cup", 2: None}) == {
        0: "the right hand",
        1: "a cup",
        2: "",
    }
    assert mask_names("The mask of the mug is <MSK>.", {1: None}) == {1: "the mug"}


def test_the_best_of_several_masks_counts_and_a_refusal_is_one_whatever_the_masks():
    predicted = {0: HALF, 1: ELSEWHERE, 2: TARGET}
    query = measure(predicted, {0: TARGET}, {})
    assert mean_target_iou(query, predicted, {0: TARGET}, {0: [0, 1, 2]}, refused=False) == 1
    assert mean_target_iou(query, predicted, {0: TARGET}, {0: [1, 0]}, refused=False) == 0.5
    assert mean_target_iou(query, predicted, {0: TARGET}, {0: [1]}, refused=False) == 0
    assert mean_target_iou(query, predicted, {0: TARGET}, {0: [2]}, refused=True) == 0
    alarm = measure(predicted, {}, {})
    assert mean_target_iou(alarm, predicted, {}, {}, refused=True) == 1
    assert mean_target_iou(alarm, predicted, {}, {}, refused=False) == 0
    assert refuses("Sorry: There is no suitable referring result") and refuses(" None ")
    assert not refuses("none of the mugs")


def test_tokens_keep_case_punctuation_and_placeholders():
    assert word_tokenize("The mug's mask is <MSK_0>.").split() == [
        *("The", "mug", "'s", "mask", "is"),
        *("<", "MSK_0", ">", "."),
    ]
    assert word_tokenize("A mug. A hand.").split() == ["A", "mug", ".", "A", "hand", "."]
    assert word_tokenize(" ") == ""


def test_tokens_are_those_of_nltk():
    texts = ["The right hand holds a mug. It's full, isn't it?", "a mug", "No! <MSK_1>... yes."]
    try:
        expected = [nltk.word_tokenize(text) for text in texts]
    except LookupError:
        pytest.skip("punkt_tab is not installed (nltk.download('punkt_tab'))")
    assert [word_tokenize(text).split() for text in texts] == expected


def test_empty_texts_do_not_count_with_earl_and_count_0_with_annexe():
    theirs = EarlRelease()
    ours = AnnexeRelease()
    for prediction in ("", " ", "the mug"):
        theirs.add_query(prediction, "the mug", 1.0)
        ours.add_query(prediction, "the mug", np.ones((4, 3), np.int64))
    name = text_module.meteor_name()
    perfect = 1 - 0.5 / 8  # two words in one piece
    assert theirs.compute()[f"answer/{name}_raw"] == pytest.approx(perfect)
    assert ours.compute()[f"answer/{name}_swapped"] == pytest.approx(perfect / 3)


# 300 random queries

SIZE = (24, 32)  # height and width
NUM_IMAGES = 30
NUM_WORDINGS = 5  # of two annotations of each image
NAMES = ("the right hand", "the left hand", "the active mug", "a red mug", "the kettle", "bottle")
WORDS = (
    "the right",
    "left hand",
    "holds",
    "a mug",
    "cup",
    "kettle",
    "don't",
    "it's",
    ", ; <MSK_0>",
)


class Text(NamedTuple):
    """A text that knows where its sentences end."""

    sentences: tuple[str, ...]

    @property
    def whole(self) -> str:
        return " ".join(self.sentences)

    def tokens(self) -> list[str]:
        tokens = []
        for sentence in self.sentences:
            tokens += nltk.word_tokenize(sentence, preserve_line=True)
        return tokens

    def lower(self) -> Text:
        return Text(tuple(sentence.lower() for sentence in self.sentences))


class Sample(NamedTuple):
    """One random query as the references see it."""

    prediction: Text
    reference: Text
    names: list[str]  # of the predicted masks, by slot
    masks: list[np.ndarray]  # predicted, by slot
    tokens: list[str]
    masks_idx: list[int]
    id_map: np.ndarray


REFUSAL = Text((NO_TARGET_ANSWER,))


def random_text(rng: np.random.Generator) -> Text:
    sentences = []
    for _ in range(rng.integers(1, 3)):
        words = rng.choice(WORDS, rng.integers(2, 9))
        sentences.append(" ".join(words).capitalize() + rng.choice([".", "!", "?"]))
    return Text(tuple(sentences))


def random_mask(rng: np.random.Generator) -> np.ndarray:
    top, left = rng.integers(0, 16), rng.integers(0, 22)
    mask = np.zeros(SIZE, bool)
    mask[top : top + rng.integers(1, 12), left : left + rng.integers(1, 14)] = True
    return mask


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[Sample], list[tuple]]:
    """Scores of 300 random queries, the queries, and analyses with their references."""
    rng = np.random.default_rng(22)
    root = tmp_path_factory.mktemp("random")
    for folder in ("RGB", "depth", "mask", "dataset_split/test"):
        (root / folder).mkdir(parents=True)
    samples: list[Sample] = []
    analyses: list[tuple[Text, Text]] = []
    records: list[Record] = []
    for image in range(NUM_IMAGES):
        # The files of the image
        stem = f"image_{image:02d}"
        id_map = np.zeros(SIZE, np.uint8)
        for mask_id in (1, 2, 3, 4):
            id_map[4 * mask_id : 4 * mask_id + 3, mask_id : 20 + mask_id] = mask_id
            id_map[random_mask(rng)] = mask_id
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(root / "RGB" / f"{stem}.jpg")
        Image.fromarray(np.ones(SIZE, np.uint8)).save(root / "depth" / f"{stem}.png")
        Image.fromarray(id_map).save(root / "mask" / f"{stem}.png")
        caption = random_text(rng)
        analysis = caption if rng.random() < 0.3 else random_text(rng)
        analyses.append((analysis, caption))
        records.append(ImageRecord(image=stem, analysis=analysis.whole))

        # Annotations and what was predicted for them
        entries = []
        for annotation in range(2):
            num_targets = int(rng.integers(0, 4))
            slots = np.sort(rng.choice(3, num_targets, replace=False))
            tokens, masks_idx = [""] * 4, [0] * 4
            for slot, name in zip(
                slots, rng.choice(NAMES, num_targets, replace=False), strict=True
            ):
                tokens[slot] = str(name)
                masks_idx[slot] = int(rng.choice(np.unique(id_map)[1:]))
            reference = random_text(rng) if num_targets else REFUSAL
            entries.append(
                {
                    "caption": caption.whole,
                    "answer": reference.whole,
                    "tokens": tokens,
                    "masks_idx": masks_idx,
                    "with_mask": int(num_targets > 0),
                    "questions": [
                        {"query": "?", "id": query_id, "is_sentence": 0}
                        for query_id in range(NUM_WORDINGS)
                    ],
                }
            )
            for query_id in range(NUM_WORDINGS):
                prediction = [reference, random_text(rng), REFUSAL][
                    rng.choice(3, p=[0.4, 0.4, 0.2])
                ]
                names, masks = [], []
                for slot in range(rng.integers(0, 4)):
                    names.append(str(rng.choice([*NAMES, "mug", "hand", *filter(None, tokens)])))
                    mask = random_mask(rng)
                    if masks_idx[slot] and rng.random() < 0.5:
                        mask = (id_map == masks_idx[slot]) ^ (rng.random(SIZE) < 0.1)
                    masks.append(mask)
                samples.append(
                    Sample(prediction, reference, names, masks, tokens, masks_idx, id_map)
                )
                predicted = []
                for slot, (name, mask) in enumerate(zip(names, masks, strict=True)):
                    predicted.append(PredictedMask(slot=slot, phrase=name, rle=encode(mask)))
                records.append(
                    QueryRecord(
                        image=stem,
                        annotation=annotation,
                        query_id=query_id,
                        answer=prediction.whole,
                        masks=predicted,
                    )
                )
        (root / "dataset_split" / "test" / f"{stem}.json").write_text(json.dumps(entries))

    truth = Truth(EgoIRGBench("test", 1, 0, None, data_root=str(root), cache=False))
    assert len(samples) == 300
    return score_all(records, truth).metrics, samples, analyses


def slow_meteor(reference: Text, hypothesis: Text) -> float:
    synonyms = text_module.load_wordnet() or text_module._NoSynonyms()
    return single_meteor_score(reference.tokens(), hypothesis.tokens(), wordnet=synonyms)


def slow_cider(references: list[Text], hypotheses: list[Text]) -> float:
    wanted = {str(index): [text.whole] for index, text in enumerate(references)}
    given = {str(index): [text.whole] for index, text in enumerate(hypotheses)}
    return float(Cider().compute_score(wanted, given)[0])


def test_300_queries_score_as_the_released_annexe_code_scores_them(drawn):
    metrics, samples, analyses = drawn
    pairs = {"answer": [(sample.prediction, sample.reference) for sample in samples]}
    pairs["analysis"] = analyses
    for part, texts in pairs.items():
        meteors, ciders = [], []
        for first in range(0, len(texts), 10):
            predictions, references = zip(*texts[first : first + 10], strict=True)
            # The script hands over the prediction as the reference
            of_batch = map(slow_meteor, predictions, references)
            meteors.append(np.mean(list(of_batch)))
            ciders.append(slow_cider(predictions, references))
        found = metrics["annexe_release"]
        meteor = found[f"{part}/{text_module.meteor_name()}_swapped"]
        assert meteor == pytest.approx(np.mean(meteors), abs=1e-9)
        assert found[f"{part}/cider_swapped"] == pytest.approx(np.mean(ciders), abs=1e-9)
        assert 0.1 < np.mean(meteors) < 0.9 and np.mean(ciders) > 0.1

    ious = []
    for first in range(0, len(samples), 10):
        maps = []
        for sample in samples[first : first + 10]:
            predicted, true = np.zeros((2, *SIZE), int)
            for slot, mask in enumerate(sample.masks):
                predicted[mask] = slot + 1
            for slot, mask_id in enumerate(sample.masks_idx):
                if mask_id:
                    true[sample.id_map == mask_id] = slot + 1
            maps.append((predicted, true))
        predicted, true = np.stack([a for a, _ in maps]), np.stack([b for _, b in maps])
        of_classes = []
        for index in range(4):
            if (true == index).any():
                both = ((predicted == index) & (true == index)).sum()
                iou = both / (((predicted == index) | (true == index)).sum() + 1e-6)
            of_classes.append(iou)
        ious.append(np.mean(of_classes))
    found = metrics["annexe_release"]["grounding/batch_class_iou"]
    assert found == pytest.approx(np.mean(ious), abs=1e-9)
    assert metrics["annexe_release"]["num_batches"] == 30


def slow_earl_iou(sample: Sample) -> float:
    def plain(name: str) -> str:
        words = re.sub(r"\b(the|a|an|active)\b", "", name.lower()).split()
        return " ".join(words)

    entities = []
    for token, mask_id in zip(sample.tokens, sample.masks_idx, strict=True):
        if mask_id:
            entities.append((token, mask_id))
    refused = "there is no suitable referring result" in sample.prediction.whole.lower()
    has_prediction = bool(sample.masks) and not refused
    if not entities or not has_prediction:
        return 1.0 if not entities and not has_prediction else 0.0

    # The very names, then parts of names; a target is free until a part of a name has found it
    masks_of: list[list[np.ndarray]] = [[] for _ in entities]
    left = []
    for name, mask in zip(sample.names, sample.masks, strict=True):
        same = [index for index, (token, _) in enumerate(entities) if plain(token) == plain(name)]
        for index in same:
            masks_of[index].append(mask)
        if not same:
            left.append((plain(name), mask))
    candidates = [index for index, masks in enumerate(masks_of) if not masks]
    for name, mask in left:
        alike = []
        for index in candidates:
            token = plain(entities[index][0])
            if name in token or token in name:
                alike.append(index)
        fewest = min((len(masks_of[index]) for index in alike), default=0)
        for index in alike:
            if len(masks_of[index]) == fewest:
                masks_of[index].append(mask)
                break

    ious = []
    for (_, mask_id), masks in zip(entities, masks_of, strict=True):
        true = sample.id_map == mask_id
        ious.append(max([0.0, *((mask & true).sum() / (mask | true).sum() for mask in masks)]))
    return float(np.mean(ious))


def test_300_queries_score_as_earls_script_scores_them(drawn):
    metrics, samples, analyses = drawn
    found = metrics["earl_release"]
    ious = [slow_earl_iou(sample) for sample in samples]
    assert found["grounding/mean_target_iou"] == pytest.approx(np.mean(ious), abs=1e-9)
    assert len({round(iou, 6) for iou in ious}) > 40
    pairs = {"answer": [(sample.prediction, sample.reference) for sample in samples]}
    pairs["analysis"] = analyses
    for part, texts in pairs.items():
        predictions, references = zip(*texts, strict=True)
        meteors = []
        for prediction, reference in texts:
            meteors.append(slow_meteor(reference.lower(), prediction.lower()))
        meteor = found[f"{part}/{text_module.meteor_name()}_raw"]
        assert meteor == pytest.approx(np.mean(meteors), abs=1e-9)
        expected = slow_cider(references, predictions)
        assert found[f"{part}/cider_raw"] == pytest.approx(expected, abs=1e-9)
        assert found[f"{part}/cider_raw"] != metrics["standard"][f"{part}/cider"]
