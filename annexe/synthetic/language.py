"""What is said about a synthetic scene: the caption, and questions with targets, answers and paraphrases."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from annexe.prompts import NO_TARGET
from annexe.datasets.image_names import CATEGORIES
from annexe.synthetic.scene import COLOURS, HAND_IDS, SIDES, VERBS, Item, Scene, is_held_out
from annexe.synthetic.wordings import (
    ING,
    Question,
    about_active_hands,
    about_all_hands,
    about_category,
    about_colour,
    about_empty_hand,
    about_hand,
    about_hand_and_object,
    about_hand_by_verb,
    about_hand_on,
    about_interaction,
    about_named,
    about_named_with_hand,
    about_object_by_verb,
    about_object_of,
    about_objects,
    with_article,
)

NUM_SLOTS = 4
NO_TARGET_SHARE = 0.335
NUM_ANNOTATIONS = (8, 9, 10, 11)
_NUM_QUERIES = (5, 6, 7, 8, 9, 10)
_NUM_QUERIES_SHARES = (0.04, 0.06, 0.15, 0.25, 0.25, 0.25)
_CAPTION_TAIL = {
    "hold": "",
    "lift": " off the table",
    "push": " across the table",
    "touch": " with one finger",
}

FRAMES = (
    "Please segment {}.",
    "Can you point out {}?",
    "Show me {}.",
    "Find {} in this image.",
    "Mark {} in the picture.",
    "I want to see {}.",
    "Could you highlight {}?",
    "Locate {} for me.",
)


def caption(scene: Scene) -> str:
    """The analysis sentence; verb, hands and objects settle its every word."""
    clauses = []
    for act in scene.interactions:
        subject = "both hands are" if len(act.sides) == 2 else f"the {act.sides[0]} hand is"
        clauses.append(f"{subject} {ING[act.verb]} {with_article(act.item)}{_CAPTION_TAIL[act.verb]}")
    clauses += [f"the {side} hand rests on the table" for side in scene.idle_sides]
    return f"In this image, {' while '.join(clauses)}."


def annotations(scene: Scene, rng: np.random.Generator, *, allow_held_out: bool) -> list[dict]:
    """Annotations of one image in the form of Ego-IRGBench's JSON files.

    Args:
        scene: what the image shows.
        rng: picks the questions and their paraphrases.
        allow_held_out: whether a wrong colour or category may name a pair that training never shows.
    """
    names = target_names(scene)
    num_questions = int(rng.choice(NUM_ANNOTATIONS))
    num_refused = int(num_questions * NO_TARGET_SHARE + rng.random())
    answerable = list(_answerable(scene))
    refused = list(_refused(scene, rng, allow_held_out))
    chosen = [answerable[index] for index in rng.permutation(len(answerable))[: num_questions - num_refused]]
    chosen += [refused[index] for index in rng.permutation(len(refused))[:num_refused]]
    return records([chosen[index] for index in rng.permutation(len(chosen))], names, caption(scene), rng)


def records(
    questions: list[Question],
    names: dict[int, str],
    analysis: str,
    rng: np.random.Generator,
    frames: tuple[str, ...] = FRAMES,
) -> list[dict]:
    """Questions in the form of Ego-IRGBench's JSON files, with answers and drawn paraphrases.

    Args:
        questions: what is asked.
        names: phrase of every possible target by id, in the order of the answer's slots.
        analysis: the caption.
        rng: picks the paraphrases.
        frames: sentences around a noun phrase.
    """
    next_id, asked, result = 0, set(), []
    for question in questions:
        targets = sorted(question.targets, key=list(names).index)
        queries = _paraphrases(question, rng, asked, frames)
        phrases = [names[target] for target in targets]
        tokens = phrases or [NO_TARGET["phrases"]]
        result.append(
            {
                "masks_idx": targets + [0] * (NUM_SLOTS - len(targets)),
                "with_mask": int(bool(targets)),
                "caption": analysis,
                "answer": _answer(phrases),
                "tokens": tokens + [""] * (NUM_SLOTS - len(tokens)),
                "questions": [
                    {"id": next_id + number, "query": query, "is_sentence": is_sentence}
                    for number, (query, is_sentence) in enumerate(queries)
                ],
            }
        )
        next_id += len(queries)
    return result


def target_names(scene: Scene) -> dict[int, str]:
    """Phrase of every possible target by id, in the order of the answer's slots."""
    names = {HAND_IDS[side]: f"the {side} hand" for side in scene.visible_sides}
    return names | {act.identity: f"the {act.item.name}" for act in scene.interactions}


def _answer(phrases: list[str]) -> str:
    if not phrases:
        return NO_TARGET["sentence"]
    parts = [f"the mask of {phrase} is <MSK_{slot}>" for slot, phrase in enumerate(phrases)]
    if len(parts) > 1:
        parts[-1] = f"and {parts[-1]}"
    sentence = ", ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _paraphrases(
    question: Question, rng: np.random.Generator, asked: set[str], frames: tuple[str, ...]
) -> list[tuple[str, int]]:
    """Draws 5 to 10 wordings as (query, is_sentence), about two in five of them bare phrases."""
    bare = [f"{phrase[0].upper()}{phrase[1:]}{mark}" for phrase in question.phrases for mark in (".", "", "?")]
    framed = [frame.format(phrase) for phrase in question.phrases for frame in frames]
    num_queries = int(rng.choice(_NUM_QUERIES, p=_NUM_QUERIES_SHARES))
    num_bare = int(rng.binomial(num_queries, 0.4))
    queries: list[tuple[str, int]] = []
    own = [(sentence, 1) for sentence in question.sentences]
    pools = (
        [(bare[index], 0) for index in rng.permutation(len(bare))],
        [
            *(own[index] for index in rng.permutation(len(own))[:3]),
            *((framed[index], 1) for index in rng.permutation(len(framed))),
        ],
    )
    for pool, wanted in zip(pools, (num_bare, num_queries - num_bare), strict=True):
        fresh = [query for query in pool if query[0] not in asked][:wanted]
        asked.update(text for text, _ in fresh)
        queries += fresh
    return [queries[index] for index in rng.permutation(len(queries))]


def _answerable(scene: Scene) -> Iterator[Question]:
    """Every question about the scene that has a target."""
    hands = tuple(HAND_IDS[side] for side in scene.visible_sides)
    active_hands = tuple(HAND_IDS[side] for side in scene.active_sides)
    objects = tuple(act.identity for act in scene.interactions)
    yield about_all_hands(hands)
    yield about_active_hands(active_hands)
    yield about_objects(objects)
    yield about_interaction((*active_hands, *objects))
    for side in scene.visible_sides:
        yield about_hand(side, (HAND_IDS[side],))
        act = scene.interaction_of(side)
        if act is None:
            yield about_empty_hand((HAND_IDS[side],))
            continue
        yield about_object_of(side, (act.identity,))
        yield about_hand_and_object(side, act.verb, act.item, (HAND_IDS[side], act.identity))
    for act in scene.interactions:
        yield about_named(act.item, (act.identity,))
        yield about_named_with_hand(act.item, act.sides, (act.identity,))
        yield about_hand_on(act.item, tuple(HAND_IDS[side] for side in act.sides))
        if sum(item.category == act.item.category for item in _all_items(scene)) == 1:
            yield about_category(act.item.noun, (act.identity,))
        if sum(item.colour == act.item.colour for item in _all_items(scene)) == 1:
            yield about_colour(act.item.colour, (act.identity,))
    for verb in dict.fromkeys(act.verb for act in scene.interactions):
        doing = [act for act in scene.interactions if act.verb == verb]
        yield about_object_by_verb(verb, tuple(act.identity for act in doing))
        yield about_hand_by_verb(verb, tuple(HAND_IDS[side] for act in doing for side in act.sides))


def _refused(scene: Scene, rng: np.random.Generator, allow_held_out: bool) -> Iterator[Question]:
    """Questions about the scene that have no target."""
    for side in SIDES:
        if side not in scene.visible_sides:
            yield about_hand(side, ())
        if side not in scene.active_sides:
            yield about_object_of(side, ())
    if not scene.idle_sides:
        yield about_empty_hand(())
    unseen_verbs = [verb for verb in VERBS if verb not in {act.verb for act in scene.interactions}]
    yield about_object_by_verb(str(rng.choice(unseen_verbs)), ())
    yield about_hand_by_verb(str(rng.choice(unseen_verbs)), ())
    for item in scene.distractors:
        yield about_named(item, ())
    names = {item[:2] for item in _all_items(scene)}
    confused = scene.interactions[rng.integers(len(scene.interactions))]
    for wrong in _wrong_items(confused.item, names, rng, allow_held_out):
        yield about_named(wrong, ())
        yield about_named_with_hand(wrong, confused.sides, ())
    if scene.kind != "both_hands":
        for act in scene.interactions:
            yield about_named_with_hand(act.item, (SIDES[1 - SIDES.index(act.sides[0])],), ())


def _wrong_items(
    item: Item, present: set[tuple[int, str]], rng: np.random.Generator, allow_held_out: bool
) -> list[Item]:
    """The item in a wrong colour, and a wrong category in its colour; neither is in the scene."""

    def allowed(category: int, colour: str) -> bool:
        return (category, colour) not in present and (allow_held_out or not is_held_out(category, colour))

    colours = [colour for colour in COLOURS if allowed(item.category, colour)]
    categories = [category for category in CATEGORIES if allowed(category, item.colour)]
    return [
        item._replace(colour=colours[rng.integers(len(colours))]),
        item._replace(category=categories[rng.integers(len(categories))]),
    ]


def _all_items(scene: Scene) -> list[Item]:
    return [*(act.item for act in scene.interactions), *scene.distractors]
