"""What is said about a synthetic scene: caption, questions, targets, answers and paraphrases."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from annexe.prompts import NO_TARGET
from annexe.synthetic.scene import (
    CATEGORIES,
    COLORS,
    HAND_IDS,
    SIDES,
    VERBS,
    Interaction,
    Item,
    Scene,
    is_held_out,
)
from annexe.synthetic.wordings import (
    ING,
    Question,
    about_active_hands,
    about_all_hands,
    about_category,
    about_color,
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
_BARE_SHARE = 0.4  # of the queries of a question: phrases without a frame
_CAPTION_TAIL = {
    "hold": "",
    "lift": " off the table",
    "push": " across the table",
    "touch": " with one finger",
}

# Sentences around a noun phrase.
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
        thing = with_article(act.item)
        clauses.append(f"{subject} {ING[act.verb]} {thing}{_CAPTION_TAIL[act.verb]}")
    clauses += [f"the {side} hand rests on the table" for side in scene.idle_sides]
    return f"In this image, {' while '.join(clauses)}."


def easy_annotations(scene: Scene, rng: np.random.Generator, *, allow_held_out: bool) -> list[dict]:
    """Annotations of one image in the form of Ego-IRGBench's JSON files.

    Args:
        scene: what the image shows.
        rng: picks the questions and their paraphrases.
        allow_held_out: whether a wrong color or category may name a pair that training never
            shows.
    """
    # every possible question
    names = target_names(scene)
    num_questions = int(rng.choice(NUM_ANNOTATIONS))
    num_refused = int(num_questions * NO_TARGET_SHARE + rng.random())
    answerable = list(_answerable(scene))
    refused = list(_refused(scene, rng, allow_held_out))

    # a draw of them, about a third without a target
    chosen = _shuffled(answerable, rng)[: num_questions - num_refused]
    chosen += _shuffled(refused, rng)[:num_refused]
    return records(_shuffled(chosen, rng), names, caption(scene), rng)


def _shuffled(items: list, rng: np.random.Generator) -> list:
    return [items[index] for index in rng.permutation(len(items))]


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
    next_id = 0
    used_queries: set[str] = set()
    result = []
    for question in questions:
        targets = sorted(question.targets, key=list(names).index)
        phrases = [names[target] for target in targets]

        # its wordings
        queries = []
        for query, is_sentence in _paraphrases(question, rng, used_queries, frames):
            queries.append({"id": next_id, "query": query, "is_sentence": is_sentence})
            next_id += 1
        result.append(record(targets, phrases, analysis, queries))
    return result


def record(
    targets: list[int],
    phrases: list[str],
    analysis: str,
    queries: list[dict],
    answer: str | None = None,
) -> dict:
    """One question in the form of Ego-IRGBench's JSON files.

    Args:
        targets: ids, none if there is no target.
        phrases: what the answer calls each of them.
        analysis: the caption.
        queries: its wordings.
        answer: None writes one of the phrases.
    """
    tokens = phrases or [NO_TARGET["phrases"]]
    return {
        "masks_idx": targets + [0] * (NUM_SLOTS - len(targets)),
        "with_mask": int(bool(targets)),
        "caption": analysis,
        "answer": _answer(phrases) if answer is None else answer,
        "tokens": tokens + [""] * (NUM_SLOTS - len(tokens)),
        "questions": queries,
    }


def target_names(scene: Scene) -> dict[int, str]:
    """Phrase of every possible target by id, in the order of the answer's slots."""
    names = {HAND_IDS[side]: f"the {side} hand" for side in scene.visible_sides}
    for act in scene.interactions:
        names[act.identity] = f"the {act.item.name}"
    return names


def _answer(phrases: list[str]) -> str:
    if not phrases:
        return NO_TARGET["sentence"]
    parts = [f"the mask of {phrase} is <MSK_{slot}>" for slot, phrase in enumerate(phrases)]
    if len(parts) > 1:
        parts[-1] = f"and {parts[-1]}"
    return f"{_capitalized(', '.join(parts))}."


def _capitalized(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def _paraphrases(
    question: Question,
    rng: np.random.Generator,
    used_queries: set[str],
    frames: tuple[str, ...],
) -> list[tuple[str, int]]:
    """Draws 5 to 10 wordings of a question, about two in five of them bare phrases.

    Args:
        question: what is asked.
        rng: picks the wordings.
        used_queries: those of the image so far, which are not used again; the new ones are added.
        frames: sentences around a noun phrase.

    Returns:
        Each query, and 1 if it is a sentence, else 0.
    """
    # all phrases, bare and in frames
    bare = []
    framed = []
    for phrase in question.phrases:
        bare += [(_capitalized(phrase) + mark, 0) for mark in (".", "", "?")]
        framed += [(frame.format(phrase), 1) for frame in frames]
    num_queries = int(rng.choice(_NUM_QUERIES, p=_NUM_QUERIES_SHARES))
    num_bare = int(rng.binomial(num_queries, _BARE_SHARE))

    # up to three of the question's own sentences come before framed phrases
    bare = _shuffled(bare, rng)
    sentences = [(sentence, 1) for sentence in question.sentences]
    sentences = _shuffled(sentences, rng)[:3] + _shuffled(framed, rng)

    # the first of them that are new
    queries: list[tuple[str, int]] = []
    for pool, num_wanted in ((bare, num_bare), (sentences, num_queries - num_bare)):
        fresh = [query for query in pool if query[0] not in used_queries][:num_wanted]
        used_queries.update(text for text, _ in fresh)
        queries += fresh
    return _shuffled(queries, rng)


def _answerable(scene: Scene) -> Iterator[Question]:
    """Every question about the scene that has a target."""
    # all of a kind
    hands = _hand_ids(scene.visible_sides)
    active_hands = _hand_ids(scene.active_sides)
    objects = tuple(act.identity for act in scene.interactions)
    yield about_all_hands(hands)
    yield about_active_hands(active_hands)
    yield about_objects(objects)
    yield about_interaction((*active_hands, *objects))

    # each hand and what it acts on
    for side in scene.visible_sides:
        hand = HAND_IDS[side]
        yield about_hand(side, (hand,))
        act = scene.interaction_of(side)
        if act is None:
            yield about_empty_hand((hand,))
            continue
        yield about_object_of(side, (act.identity,))
        yield about_hand_and_object(side, act.verb, act.item, (hand, act.identity))

    for act in scene.interactions:
        yield from _about_object(scene, act)

    # each verb
    for verb in dict.fromkeys(act.verb for act in scene.interactions):
        acts = [act for act in scene.interactions if act.verb == verb]
        yield about_object_by_verb(verb, tuple(act.identity for act in acts))
        sides = sum((act.sides for act in acts), ())
        yield about_hand_by_verb(verb, _hand_ids(sides))


def _about_object(scene: Scene, act: Interaction) -> Iterator[Question]:
    """Questions about an active object by its name, and by what of it is unique."""
    target = (act.identity,)
    yield about_named(act.item, target)
    yield about_named_with_hand(act.item, act.sides, target)
    yield about_hand_on(act.item, _hand_ids(act.sides))
    items = _all_items(scene)
    if [item.category for item in items].count(act.item.category) == 1:
        yield about_category(act.item.noun, target)
    if [item.color for item in items].count(act.item.color) == 1:
        yield about_color(act.item.color, target)


def _hand_ids(sides: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(HAND_IDS[side] for side in sides)


def _refused(scene: Scene, rng: np.random.Generator, allow_held_out: bool) -> Iterator[Question]:
    """Questions about the scene that have no target."""
    # hands that are not there, or do nothing
    for side in SIDES:
        if side not in scene.visible_sides:
            yield about_hand(side, ())
        if side not in scene.active_sides:
            yield about_object_of(side, ())
    if not scene.idle_sides:
        yield about_empty_hand(())

    # verbs that nobody acts out
    shown_verbs = {act.verb for act in scene.interactions}
    unseen_verbs = [verb for verb in VERBS if verb not in shown_verbs]
    yield about_object_by_verb(str(rng.choice(unseen_verbs)), ())
    yield about_hand_by_verb(str(rng.choice(unseen_verbs)), ())

    # objects that are not in use, or not there
    for item in scene.distractors:
        yield about_named(item, ())
    pairs = {item[:2] for item in _all_items(scene)}
    confused = scene.interactions[rng.integers(len(scene.interactions))]
    for wrong in _wrong_items(confused.item, pairs, rng, allow_held_out):
        yield about_named(wrong, ())
        yield about_named_with_hand(wrong, confused.sides, ())

    # the right object with the wrong hand
    if scene.kind != "both_hands":
        for act in scene.interactions:
            other = SIDES[1 - SIDES.index(act.sides[0])]
            yield about_named_with_hand(act.item, (other,), ())


def _wrong_items(
    item: Item, present: set[tuple[int, str]], rng: np.random.Generator, allow_held_out: bool
) -> list[Item]:
    """The item in a wrong color, and a wrong category in its color; neither is in the scene."""

    def allowed(category: int, color: str) -> bool:
        if (category, color) in present:
            return False
        return allow_held_out or not is_held_out(category, color)

    colors = [color for color in COLORS if allowed(item.category, color)]
    categories = [category for category in CATEGORIES if allowed(category, item.color)]
    return [
        item._replace(color=colors[rng.integers(len(colors))]),
        item._replace(category=categories[rng.integers(len(categories))]),
    ]


def _all_items(scene: Scene) -> list[Item]:
    return [*scene.active_items, *scene.distractors]
