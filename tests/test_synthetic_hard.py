"""Hard synthetic scenes: their facts against the id map, their balance, and what only test images have."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest

from annexe.datasets.image_names import CATEGORIES, SPLITS
from annexe.prompts import NO_TARGET_ANSWER
from annexe.synthetic.canvas import HEIGHT, WIDTH, Patch, fill
from annexe.synthetic.generate import HARD_LISTS, generate
from annexe.synthetic.hard_language import Asked, all_questions, choose, hard_annotations, things_of
from annexe.synthetic.hard_scene import draw_hard_scene, place
from annexe.synthetic.language import FRAMES, NUM_SLOTS
from annexe.synthetic.render import Layout, paint
from annexe.synthetic.scene import (
    COLOURS,
    FIRST_DISTRACTOR,
    HAND_IDS,
    Interaction,
    Item,
    Scene,
    draw_item,
    held_out_colour,
    is_held_out,
)
from annexe.synthetic.wordings import FORMS, KEPT_FRAMES, VERB_WORDS

SETTINGS = {"num_images": 22, "seed": 3, "val_fraction": 0.1, "test_fraction": 0.5, "hard": True}
NUM_SCENES, NUM_CHECKED = 160, 60
HELD_OUT_NAMES = [f"{held_out_colour(number)} {noun}" for number, noun in CATEGORIES.items()]
# Every scene has targets for these.
NEVER_REFUSED = {"all_hands", "active_hands", "active_objects", "interaction", "unused_objects"}
NEVER_REFUSED |= {"outermost all", "outermost unused"}


class Drawn(NamedTuple):
    """A hard scene with its id map, painted from the outlines alone."""

    scene: Scene
    layout: Layout
    ids: np.ndarray
    rng: np.random.Generator


def draw(seed: int, index: int, *, unseen_pair: bool = False, crossed: bool = False) -> Drawn:
    rng = np.random.default_rng([seed, index])
    scene = draw_hard_scene(rng, unseen_pair=unseen_pair, one_hand=crossed)
    layout = place(scene, rng, crossed=crossed)
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    for layer in layout.layers:
        for patch in layer.patches:
            fill(ids, patch.contours, layer.identity, smooth=False)
    return Drawn(scene, layout, ids, rng)


@pytest.fixture(scope="module")
def scenes() -> list[Drawn]:
    return [draw(17, index) for index in range(NUM_SCENES)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hard") / "data"
    generate(out, **SETTINGS, num_workers=1)
    return out


def load(root: Path, split: str) -> dict[str, list[dict]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((root / "dataset_split" / split).glob("*.json"))}


def stems_of(root: Path, name: str) -> list[str]:
    return (root / "subsets" / f"{name}.txt").read_text().split()


def queries_of(records: list[dict]) -> list[str]:
    return [question["query"] for record in records for question in record["questions"]]


def columns(ids: np.ndarray, identity: int) -> np.ndarray:
    return np.nonzero(ids == identity)[1]


def is_crossed(act: Interaction, ids: np.ndarray) -> bool:
    """Whether a single hand works in the third of the picture on the other hand's side."""
    column = columns(ids, act.identity).mean()
    return (act.sides == ("right",) and column < WIDTH / 3) or (act.sides == ("left",) and column > 2 * WIDTH / 3)


# The facts anew, from the scene and the full id map.


class Facts:
    def __init__(self, scene: Scene, ids: np.ndarray) -> None:
        self.hands = set(np.unique(ids)) & {2, 3}
        self.items: dict[int, Item] = {FIRST_DISTRACTOR + n: item for n, item in enumerate(scene.distractors)}
        self.items |= {act.identity: act.item for act in scene.interactions}
        self.acts = {act.identity: act for act in scene.interactions}
        self.spans = {i: (xs.min(), xs.mean(), xs.max()) for i in self.items for xs in [columns(ids, i)]}

    def called(self, thing: str) -> set[int]:
        """Ids of "mug", "red mug", "red object" or "unused object"."""
        return {
            identity
            for identity, item in self.items.items()
            if thing in (item.noun, f"{item.colour} {item.noun}", f"{item.colour} object", "object")
            or (thing == "unused object" and identity not in self.acts)
        }

    def touching(self, objects: set[int]) -> set[int]:
        return {HAND_IDS[side] for identity in objects & self.acts.keys() for side in self.acts[identity].sides}

    def touched_by(self, side: str) -> set[int]:
        return {identity for identity, act in self.acts.items() if side in act.sides}

    def doing(self, words: dict) -> set[int]:
        return {identity for identity, act in self.acts.items() if VERB_WORDS[act.verb] == words}

    def lifted(self) -> set[int]:
        return {identity for identity, act in self.acts.items() if act.verb in ("hold", "lift")}

    def beyond(self, identity: int, other: int, way: str) -> bool:
        sign = {"left": -1, "right": 1}[way]
        return all(sign * (a - b) > 0 for a, b in zip(self.spans[identity], self.spans[other], strict=True))


def used_by(facts: Facts, thing: str, hands: str) -> set[int]:
    sides = {"both hands": ("right", "left")}.get(hands, (hands.split()[1],) if hands != "both hands" else ())
    return facts.called(thing) & set.intersection(*(facts.touched_by(side) for side in sides))


EXPECTED: dict[str, Callable[[Facts, dict], set[int]]] = {
    "hand": lambda f, w: f.hands & {HAND_IDS[w["side"]]},
    "all_hands": lambda f, w: f.hands,
    "active_hands": lambda f, w: f.touching(set(f.items)),
    "idle_hand": lambda f, w: f.hands - f.touching(set(f.items)),
    "active_objects": lambda f, w: set(f.acts),
    "interaction": lambda f, w: f.touching(set(f.items)) | set(f.acts),
    "hand_and_object": lambda f, w: (f.hands & {HAND_IDS[w["side"]]}) | f.touched_by(w["side"]),
    "object_of": lambda f, w: f.touched_by(w["side"]),
    "in_view": lambda f, w: f.called(w["thing"]),
    "active": lambda f, w: f.called(w["thing"]) & set(f.acts),
    "unused": lambda f, w: f.called(w["thing"]) - set(f.acts),
    "unused_objects": lambda f, w: set(f.items) - set(f.acts),
    "used_by": lambda f, w: used_by(f, w["thing"], w["hands"]),
    "hand_on": lambda f, w: f.touching(f.called(w["thing"])),
    "hand_not_on": lambda f, w: f.hands - f.touching(f.called(w["thing"])),
    "not_colour": lambda f, w: {i for i in f.called(w["thing"]) if f.items[i].colour != w["colour"]},
    "active_not": lambda f, w: set(f.acts) - f.called(w["thing"]),
    "object_by_verb": lambda f, w: f.doing(w),
    "hand_by_verb": lambda f, w: f.touching(f.doing(w)),
    "on_table": lambda f, w: f.called(w["thing"]) - f.lifted(),
    "off_table": lambda f, w: f.called(w["thing"]) & f.lifted(),
    "half": lambda f, w: {i for i in f.called(w["thing"]) if (f.spans[i][1] < WIDTH / 2) == (w["way"] == "left")},
    "outermost": lambda f, w: {
        i for i in f.called(w["thing"]) if all(f.beyond(i, j, w["way"]) for j in f.called(w["thing"]) - {i})
    },
    "beside": lambda f, w: {
        i for i in f.called(w["thing"]) if all(f.beyond(i, j, w["way"]) for j in f.called(w["other"]))
    },
}


def possible(drawn: Drawn) -> list[Asked]:
    return list(all_questions(drawn.scene, things_of(drawn.scene, drawn.ids), drawn.rng, allow_held_out=False))


def test_every_question_is_right(scenes: list[Drawn]) -> None:
    forms: Counter[str] = Counter()
    for drawn in scenes[:NUM_CHECKED]:
        facts = Facts(drawn.scene, drawn.ids)
        asked = possible(drawn)
        for question in asked:
            assert len(set(question.targets)) == len(question.targets)
            assert set(question.targets) == EXPECTED[question.form](facts, question.words), question
        forms.update(question.form for question in asked)
    assert set(forms) == set(FORMS) == set(EXPECTED)


def test_places_are_plain_to_see(scenes: list[Drawn]) -> None:
    for drawn in scenes[:NUM_CHECKED]:
        facts = Facts(drawn.scene, drawn.ids)
        for question in possible(drawn):
            thing = facts.called(question.words.get("thing", ""))
            if question.form == "half":
                assert all(abs(facts.spans[i][1] - WIDTH / 2) > 130 for i in thing)
            if question.form == "beside":
                (mark,) = facts.called(question.words["other"])
                assert all(abs(facts.spans[i][1] - facts.spans[mark][1]) > 170 for i in thing)


def test_everything_is_visible(scenes: list[Drawn]) -> None:
    for drawn in scenes:
        sizes = np.bincount(drawn.ids.ravel(), minlength=9)
        for layer in drawn.layout.layers:
            assert sizes[layer.identity] > 12_000
            if layer.identity not in HAND_IDS.values():
                least = 0.4 if layer.identity >= FIRST_DISTRACTOR else 0.5
                assert sizes[layer.identity] > least * whole_size(layer.patches), drawn.scene


def whole_size(patches: list[Patch]) -> int:
    """Pixels of a thing with what lies outside the picture."""
    mask = np.zeros((2 * HEIGHT, 2 * WIDTH), np.uint8)
    for patch in patches:
        fill(mask, patch.contours, 1, smooth=False, offset=(-WIDTH / 2, -HEIGHT / 2))
    return int(mask.sum())


def test_scenes_are_hard(scenes: list[Drawn]) -> None:
    alike, twin, cut, places = [], [], [], set()
    for drawn in scenes:
        active = [act.item for act in drawn.scene.interactions]
        unused = drawn.scene.distractors
        assert 2 <= len(unused) <= 4
        alike.append(any(item.category == other.category for item in unused for other in active))
        twin.append(any(item[:2] == other[:2] for item in unused for other in active))
        border = np.concatenate([drawn.ids[0], drawn.ids[:, 0], drawn.ids[:, -1], drawn.ids[-1]])
        cut.append(np.isin(list(act.identity for act in drawn.scene.interactions), border).any())
        places.add(int(columns(drawn.ids, 1).mean() * 3 / WIDTH))
    assert np.mean(alike) > 0.85 and 0.1 < np.mean(twin) < 0.5
    assert 0.08 < np.mean(cut) < 0.35 and places == {0, 1, 2}


def test_no_hand_touches_an_unused_object(scenes: list[Drawn]) -> None:
    for drawn in scenes[:NUM_CHECKED]:
        layers = {layer.identity: layer for layer in drawn.layout.layers}
        for side in drawn.scene.visible_sides:
            fist = np.zeros((HEIGHT, WIDTH), np.uint8)
            for patch in layers[HAND_IDS[side]].patches[1:-3]:
                fill(fist, patch.contours, 1, smooth=False)
            near = cv2.dilate(fist, np.ones((25, 25), np.uint8)) > 0
            assert not (near & (drawn.ids >= FIRST_DISTRACTOR)).any()
            act = drawn.scene.interaction_of(side)
            assert set(np.unique(drawn.ids[near])) & {1, 4} == ({act.identity} if act else set())


def test_every_kind_is_asked_with_and_without_targets(scenes: list[Drawn]) -> None:
    refused: dict[str, list[bool]] = {}
    for drawn in scenes:
        for _ in range(3):
            chosen = choose(possible(drawn), drawn.rng)
            assert 8 <= len(chosen) <= 11
            for question in chosen:
                refused.setdefault(question.kind, []).append(not question.targets)
    assert 0.31 < np.mean([one for many in refused.values() for one in many]) < 0.36
    for kind, many in refused.items():
        if kind in NEVER_REFUSED:
            assert not any(many)
        else:
            assert 0.2 < np.mean(many) < 0.55, (kind, np.mean(many), len(many))


def test_number_of_queries_and_of_words(scenes: list[Drawn]) -> None:
    images = [
        hard_annotations(drawn.scene, drawn.ids, drawn.rng, allow_held_out=False, kept_wordings=False)
        for drawn in scenes
    ]
    assert 75 < np.mean([len(queries_of(records)) for records in images]) < 83
    words = {word for records in images for word in re.findall(r"[a-z']+", json.dumps(records).lower())}
    assert len(words) < 250
    assert not [name for name in HELD_OUT_NAMES if name in json.dumps(images)]


def test_annotations_fit_the_mask(root: Path) -> None:
    for split in SPLITS:
        for stem, records in load(root, split).items():
            ids = cv2.imread(str(root / "mask" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
            place_of = {identity: float(columns(ids, identity).mean()) for identity in np.unique(ids)[1:]}
            assert len({record["caption"] for record in records}) == 1
            queries = queries_of(records)
            assert len(set(queries)) == len(queries)
            for record in records:
                check_record(record, place_of)


def check_record(record: dict, place_of: dict[int, float]) -> None:
    used = [identity for identity in record["masks_idx"] if identity]
    assert len(record["masks_idx"]) == len(record["tokens"]) == NUM_SLOTS
    assert record["masks_idx"][: len(used)] == used and set(used) <= set(place_of)
    assert record["with_mask"] == int(bool(used))
    assert 5 <= len(record["questions"]) <= 10
    assert re.findall(r"<MSK_(\d)>", record["answer"]) == [str(slot) for slot in range(len(used))]
    if not used:
        assert record["answer"] == NO_TARGET_ANSWER and record["tokens"] == ["none", "", "", ""]
    order = {2: 0, 3: 1, 1: 2, 4: 3}
    assert used == sorted(used, key=lambda identity: (order.get(identity, 4), place_of[identity]))
    for slot, (identity, token) in enumerate(zip(used, record["tokens"], strict=False)):
        assert f"the mask of {token} is <MSK_{slot}>" in record["answer"].replace("The mask", "the mask")
        assert (token in ("the right hand", "the left hand")) == (identity in (2, 3))


def test_bytes_do_not_depend_on_workers(root: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    generate(again, **SETTINGS, num_workers=2)
    files = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for name in files:
        assert (root / name).read_bytes() == (again / name).read_bytes(), name


def test_the_painting_has_the_ids_of_the_outlines() -> None:
    for index in range(3):
        drawn = draw(18, index)
        assert (paint(drawn.scene, drawn.layout, drawn.rng).ids != drawn.ids).mean() < 1e-3


def test_lists_divide_the_test_images(root: Path) -> None:
    lists = {name: stems_of(root, name) for name in HARD_LISTS}
    assert [len(lists[name]) for name in HARD_LISTS] == [2, 1, 1, 7]
    assert sorted(stem for stems in lists.values() for stem in stems) == sorted(load(root, "test"))


def test_held_out_pairs_are_only_in_their_list(root: Path) -> None:
    listed = set(stems_of(root, "unseen_pairs"))
    for split in SPLITS:
        for stem, records in load(root, split).items():
            text = json.dumps(records)
            assert any(name in text for name in HELD_OUT_NAMES) == (stem in listed)
            assert any(name in records[0]["caption"] for name in HELD_OUT_NAMES) == (stem in listed)


def test_unseen_pairs_hold_out_the_first_object_alone(scenes: list[Drawn]) -> None:
    for index in range(8):
        scene = draw(19, index, unseen_pair=True).scene
        items = [*(act.item for act in scene.interactions), *scene.distractors]
        assert [is_held_out(*item[:2]) for item in items] == [True] + [False] * (len(items) - 1)
    for drawn in scenes:
        items = [*(act.item for act in drawn.scene.interactions), *drawn.scene.distractors]
        assert not any(is_held_out(*item[:2]) for item in items)


def test_unseen_layouts_are_only_in_their_list(root: Path, scenes: list[Drawn]) -> None:
    for drawn in scenes:
        assert not any(is_crossed(act, drawn.ids) for act in drawn.scene.interactions)
    for index in range(12):
        drawn = draw(20, index, crossed=True)
        assert drawn.scene.kind == "one_hand" and is_crossed(drawn.scene.interactions[0], drawn.ids)
    listed = set(stems_of(root, "unseen_layouts"))
    for split in SPLITS:
        for stem, records in load(root, split).items():
            ids = cv2.imread(str(root / "mask" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
            sides = re.findall(r"(both|left|right) hands? (?:is|are)", records[0]["caption"])
            acts = [Interaction("", (side,), Item(1, "red", 0), i) for side, i in zip(sides, (1, 4), strict=False)]
            assert any(is_crossed(act, ids) for act in acts) == (stem in listed), stem


@pytest.mark.parametrize("wanted", [{"category": 9}, {"colour": "black"}], ids=["category", "colour"])
def test_an_item_shares_what_is_asked_for_while_one_is_left(wanted: dict) -> None:
    rng, (field, value), items = np.random.default_rng(0), *wanted.items(), []
    while not items or getattr(items[-1], field) == value:
        items.append(draw_item(rng, avoid=tuple(items), **wanted))
    pairs = [(number, word) for number in CATEGORIES for word in COLOURS if word != held_out_colour(number)]
    assert {item[:2] for item in items[:-1]} == {pair for pair in pairs if value in pair}
    assert items[-1][:2] in pairs


def test_kept_wordings_are_new_but_their_words_are_known() -> None:
    seen = [text for form in FORMS.values() for text in form.seen]
    kept = [text for form in FORMS.values() for text in form.kept]
    assert not set(seen) & set(kept) and not set(FRAMES) & set(KEPT_FRAMES)

    def words(texts: list[str]) -> set[str]:
        return {word for text in texts for word in re.findall(r"[\w'{}]+|[,]", text)}

    assert words([*kept, *KEPT_FRAMES]) <= words([*seen, *FRAMES])
    for name, form in FORMS.items():
        sentences = sum(text.endswith("?") for text in form.kept)
        assert sentences == 1 and len(form.kept) == 3, name


def test_kept_wordings_are_only_in_their_list(root: Path) -> None:
    def patterns(texts: list[str], frames: tuple[str, ...]) -> re.Pattern:
        """Any bare phrase, framed phrase or sentence."""
        phrases = "|".join(re.sub(r"\\{.*?\\}", ".+", re.escape(text)) for text in texts if not text.endswith("?"))
        sentences = [re.sub(r"\\{.*?\\}", ".+", re.escape(text)) for text in texts if text.endswith("?")]
        framed = [re.escape(frame).replace(r"\{\}", f"(?:{phrases})") for frame in frames]
        return re.compile("|".join([f"(?:{phrases})[.?]?", *framed, *sentences]), re.IGNORECASE)

    kept = patterns([text for form in FORMS.values() for text in form.kept], KEPT_FRAMES)
    listed = set(stems_of(root, "unseen_wordings"))
    known = {
        query for split in ("train", "val") for records in load(root, split).values() for query in queries_of(records)
    }
    for stem, records in load(root, "test").items():
        if stem in listed:
            assert all(kept.fullmatch(query) for query in queries_of(records))
            assert not known & set(queries_of(records))
