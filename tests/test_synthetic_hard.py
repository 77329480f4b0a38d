"""Hard synthetic scenes: their facts against the id map, balance, what only test images have."""

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
from annexe.synthetic.canvas import HEIGHT, SUBPIXEL_BITS, WIDTH, Patch, bounds
from annexe.synthetic.generate import HARD_LISTS, generate
from annexe.synthetic.hard_language import (
    Candidate,
    Thing,
    all_questions,
    choose,
    hard_annotations,
    things_of,
)
from annexe.synthetic.hard_scene import draw_hard_scene, lay_out
from annexe.synthetic.language import FRAMES, NUM_SLOTS
from annexe.synthetic.render import Layout, id_map, paint
from annexe.synthetic.scene import (
    COLORS,
    FIRST_DISTRACTOR,
    HAND_IDS,
    Interaction,
    Item,
    Scene,
    draw_item,
    held_out_color,
    is_held_out,
)
from annexe.synthetic.wordings import FORMS, HELD_OUT_FRAMES, VERB_WORDS

SMALL = HEIGHT // 4  # what needs no full size is drawn at a quarter of it
SETTINGS = {"num_images": 22, "seed": 3, "val_fraction": 0.1, "test_fraction": 0.5, "hard": True}
NUM_SCENES = 100
NUM_CHECKED = 40
HELD_OUT_NAMES = [f"{held_out_color(index)} {noun}" for index, noun in CATEGORIES.items()]
# Every scene has targets for these.
NEVER_REFUSED = {"all_hands", "active_hands", "active_objects", "interaction", "unused_objects"}
NEVER_REFUSED |= {"outermost all", "outermost unused"}


class Drawn(NamedTuple):
    """A hard scene with its id map, painted from the outlines alone, and its objects."""

    scene: Scene
    layout: Layout
    ids: np.ndarray
    things: list[Thing]
    rng: np.random.Generator


def draw(seed: int, index: int, *, unseen_pair: bool = False, crossed: bool = False) -> Drawn:
    rng = np.random.default_rng([seed, index])
    scene = draw_hard_scene(rng, unseen_pair=unseen_pair, one_hand=crossed)
    layout = lay_out(scene, rng, crossed=crossed)
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    for layer in layout.layers:
        fill(ids, layer.patches, layer.identity)
    return Drawn(scene, layout, ids, things_of(scene, ids), rng)


def fill(
    image: np.ndarray, patches: list[Patch], value: int, offset: tuple[float, float] = (0, 0)
) -> None:
    """Fills the outlines of a thing in an image that starts at an offset."""
    for patch in patches:
        polygons = []
        for contour in patch.contours:
            points = (contour - offset) * 2**SUBPIXEL_BITS
            polygons.append(np.rint(points).astype(np.int32))
        cv2.fillPoly(image, polygons, value, cv2.LINE_8, SUBPIXEL_BITS)


@pytest.fixture(scope="module")
def scenes() -> list[Drawn]:
    return [draw(17, index) for index in range(NUM_SCENES)]


@pytest.fixture(scope="module")
def checked(scenes: list[Drawn]) -> list[tuple[Facts, list[Candidate]]]:
    """The facts of some scenes, and all that can be asked about them."""
    return [(Facts(drawn.scene, drawn.ids), possible(drawn)) for drawn in scenes[:NUM_CHECKED]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hard") / "data"
    generate(out, **SETTINGS, height=SMALL, num_workers=1)
    return out


def load(root: Path, split: str) -> dict[str, list[dict]]:
    paths = sorted((root / "dataset_split" / split).glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def stems_of(root: Path, name: str) -> list[str]:
    return (root / "subsets" / f"{name}.txt").read_text().split()


def queries_of(records: list[dict]) -> list[str]:
    return [question["query"] for record in records for question in record["questions"]]


def columns(ids: np.ndarray, identity: int) -> np.ndarray:
    return np.nonzero(ids == identity)[1]


def is_crossed(act: Interaction, ids: np.ndarray) -> bool:
    """Whether a single hand works in the third of the picture on the other hand's side."""
    share = columns(ids, act.identity).mean() / ids.shape[1]
    if act.sides == ("right",):
        return share < 1 / 3
    return act.sides == ("left",) and share > 2 / 3


# The facts anew, from the scene and the full id map.


class Facts:
    """What is where, and what is done to it.

    Attributes:
        hands: ids of the visible hands.
        items: every object by its id.
        acts: every interaction by the id of its object.
        spans: first, mean and last column of every object by its id.
    """

    def __init__(self, scene: Scene, ids: np.ndarray) -> None:
        self.hands = set(np.unique(ids)) & {2, 3}
        self.items: dict[int, Item] = {}
        for index, item in enumerate(scene.distractors):
            self.items[FIRST_DISTRACTOR + index] = item
        self.items |= {act.identity: act.item for act in scene.interactions}
        self.acts = {act.identity: act for act in scene.interactions}
        self.spans = {}
        for identity in self.items:
            found = columns(ids, identity)
            self.spans[identity] = (found.min(), found.mean(), found.max())

    def called(self, thing: str) -> set[int]:
        """Ids of "mug", "red mug", "red object" or "unused object"."""
        found = set()
        for identity, item in self.items.items():
            names = (item.noun, f"{item.color} {item.noun}", f"{item.color} object", "object")
            is_unused = thing == "unused object" and identity not in self.acts
            if thing in names or is_unused:
                found.add(identity)
        return found

    def touching(self, objects: set[int]) -> set[int]:
        hands = set()
        for identity in objects & self.acts.keys():
            hands |= {HAND_IDS[side] for side in self.acts[identity].sides}
        return hands

    def touched_by(self, side: str) -> set[int]:
        return {identity for identity, act in self.acts.items() if side in act.sides}

    def doing(self, words: dict) -> set[int]:
        return {identity for identity, act in self.acts.items() if VERB_WORDS[act.verb] == words}

    def lifted(self) -> set[int]:
        return {identity for identity, act in self.acts.items() if act.verb in ("hold", "lift")}

    def beyond(self, identity: int, other: int, way: str) -> bool:
        sign = {"left": -1, "right": 1}[way]
        pairs = zip(self.spans[identity], self.spans[other], strict=True)
        return all(sign * (a - b) > 0 for a, b in pairs)


def used_by(facts: Facts, thing: str, hands: str) -> set[int]:
    sides = ("right", "left") if hands == "both hands" else (hands.split()[1],)
    return facts.called(thing) & set.intersection(*(facts.touched_by(side) for side in sides))


def in_half(facts: Facts, thing: str, way: str) -> set[int]:
    found = set()
    for identity in facts.called(thing):
        is_left = facts.spans[identity][1] < WIDTH / 2
        if is_left == (way == "left"):
            found.add(identity)
    return found


def beyond_all(facts: Facts, thing: str, others: str, way: str) -> set[int]:
    """Things that lie further to a side than all others."""
    found = set()
    for identity in facts.called(thing):
        rest = facts.called(others) - {identity}
        if all(facts.beyond(identity, other, way) for other in rest):
            found.add(identity)
    return found


def not_of_color(facts: Facts, thing: str, color: str) -> set[int]:
    return {identity for identity in facts.called(thing) if facts.items[identity].color != color}


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
    "not_color": lambda f, w: not_of_color(f, w["thing"], w["color"]),
    "active_not": lambda f, w: set(f.acts) - f.called(w["thing"]),
    "object_by_verb": lambda f, w: f.doing(w),
    "hand_by_verb": lambda f, w: f.touching(f.doing(w)),
    "on_table": lambda f, w: f.called(w["thing"]) - f.lifted(),
    "off_table": lambda f, w: f.called(w["thing"]) & f.lifted(),
    "half": lambda f, w: in_half(f, w["thing"], w["way"]),
    "outermost": lambda f, w: beyond_all(f, w["thing"], w["thing"], w["way"]),
    "beside": lambda f, w: beyond_all(f, w["thing"], w["other"], w["way"]),
}


def possible(drawn: Drawn) -> list[Candidate]:
    return list(all_questions(drawn.scene, drawn.things, drawn.rng, allow_held_out=False))


def test_every_question_is_right(checked: list[tuple[Facts, list[Candidate]]]) -> None:
    forms: Counter[str] = Counter()
    for facts, candidates in checked:
        for question in candidates:
            assert len(set(question.targets)) == len(question.targets)
            expected = EXPECTED[question.form](facts, question.words)
            assert set(question.targets) == expected, question
        forms.update(question.form for question in candidates)
    assert set(forms) == set(FORMS) == set(EXPECTED)


def test_places_are_plain_to_see(checked: list[tuple[Facts, list[Candidate]]]) -> None:
    for facts, candidates in checked:
        for question in candidates:
            middles = []
            for identity in facts.called(question.words.get("thing", "")):
                middles.append(facts.spans[identity][1])
            if question.form == "half":
                assert all(abs(middle - WIDTH / 2) > 130 for middle in middles)
            if question.form == "beside":
                (mark,) = facts.called(question.words["other"])
                assert all(abs(middle - facts.spans[mark][1]) > 170 for middle in middles)


def test_everything_is_visible(scenes: list[Drawn]) -> None:
    for drawn in scenes:
        sizes = cv2.calcHist([drawn.ids], [0], None, [9], [0, 9]).ravel()
        for layer in drawn.layout.layers:
            assert sizes[layer.identity] > 12_000
            if layer.identity not in HAND_IDS.values():
                min_share = 0.4 if layer.identity >= FIRST_DISTRACTOR else 0.5
                assert sizes[layer.identity] > min_share * full_area(layer.patches), drawn.scene


def full_area(patches: list[Patch]) -> int:
    """Pixels of a thing with what lies outside the picture."""
    points = np.concatenate([contour for patch in patches for contour in patch.contours])
    offset = np.floor(points.min(axis=0)) - 2
    width, height = (np.ceil(points.max(axis=0)) - offset + 3).astype(int)
    mask = np.zeros((height, width), np.uint8)
    fill(mask, patches, 1, tuple(offset))
    return int(mask.sum())


def test_scenes_are_hard(scenes: list[Drawn]) -> None:
    alike = []
    twin = []
    cut = []
    thirds = set()
    for drawn in scenes:
        active = drawn.scene.active_items
        unused = drawn.scene.distractors
        assert 2 <= len(unused) <= 4
        alike.append(bool({item.category for item in unused} & {item.category for item in active}))
        twin.append(bool({item[:2] for item in unused} & {item[:2] for item in active}))
        ids = drawn.ids
        border = np.concatenate([ids[0], ids[:, 0], ids[:, -1], ids[-1]])
        cut.append(np.isin([act.identity for act in drawn.scene.interactions], border).any())
        thirds.add(int(columns(ids, 1).mean() * 3 / WIDTH))
    assert np.mean(alike) > 0.85
    assert 0.1 < np.mean(twin) < 0.5
    assert 0.08 < np.mean(cut) < 0.35
    assert thirds == {0, 1, 2}


def test_no_hand_touches_an_unused_object(scenes: list[Drawn]) -> None:
    for drawn in scenes[:NUM_CHECKED]:
        layers = {layer.identity: layer for layer in drawn.layout.layers}
        for side in drawn.scene.visible_sides:
            fist = layers[HAND_IDS[side]].patches[1:-3]
            left, top, right, bottom = bounds(fist)
            around = np.s_[max(top - 20, 0) : bottom + 20, max(left - 20, 0) : right + 20]
            ids = drawn.ids[around]
            mask = np.zeros(ids.shape, np.uint8)
            fill(mask, fist, 1, (max(left - 20, 0), max(top - 20, 0)))
            near = cv2.dilate(mask, np.ones((25, 25), np.uint8)) > 0
            assert not (near & (ids >= FIRST_DISTRACTOR)).any()
            act = drawn.scene.interaction_of(side)
            touched = {act.identity} if act else set()
            assert set(np.unique(ids[near])) & {1, 4} == touched


def test_every_kind_is_asked_with_and_without_targets(scenes: list[Drawn]) -> None:
    refused: dict[str, list[bool]] = {}
    for drawn in scenes:
        for _ in range(3):
            chosen = choose(possible(drawn), drawn.rng)
            assert 8 <= len(chosen) <= 11
            for question in chosen:
                refused.setdefault(question.kind, []).append(not question.targets)
    assert 0.31 < np.mean(np.concatenate(list(refused.values()))) < 0.36
    for kind, many in refused.items():
        if kind in NEVER_REFUSED:
            assert not any(many)
        else:
            assert 0.2 < np.mean(many) < 0.55, (kind, np.mean(many), len(many))


def test_number_of_queries_and_of_words(scenes: list[Drawn]) -> None:
    images = [
        hard_annotations(
            drawn.scene, drawn.ids, drawn.rng, allow_held_out=False, held_out_wordings=False
        )
        for drawn in scenes
    ]
    assert 75 < np.mean([len(queries_of(records)) for records in images]) < 83
    words = set(re.findall(r"[a-z']+", json.dumps(images).lower()))
    assert len(words) < 250
    assert not [name for name in HELD_OUT_NAMES if name in json.dumps(images)]


def test_annotations_fit_the_mask(root: Path) -> None:
    for split in SPLITS:
        for stem, records in load(root, split).items():
            ids = cv2.imread(str(root / "mask" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
            column_of = {}
            for identity in np.unique(ids)[1:]:
                column_of[identity] = float(columns(ids, identity).mean())
            assert len({record["caption"] for record in records}) == 1
            queries = queries_of(records)
            assert len(set(queries)) == len(queries)
            for record in records:
                check_record(record, column_of)


def check_record(record: dict, column_of: dict[int, float]) -> None:
    used = [identity for identity in record["masks_idx"] if identity]
    assert len(record["masks_idx"]) == len(record["tokens"]) == NUM_SLOTS
    assert record["masks_idx"][: len(used)] == used
    assert set(used) <= set(column_of)
    assert record["with_mask"] == int(bool(used))
    assert 5 <= len(record["questions"]) <= 10
    slots = [str(slot) for slot in range(len(used))]
    assert re.findall(r"<MSK_(\d)>", record["answer"]) == slots
    if not used:
        assert record["answer"] == NO_TARGET_ANSWER
        assert record["tokens"] == ["none", "", "", ""]
    order = {2: 0, 3: 1, 1: 2, 4: 3}
    assert used == sorted(used, key=lambda identity: (order.get(identity, 4), column_of[identity]))
    answer = record["answer"].replace("The mask", "the mask")
    for slot, (identity, token) in enumerate(zip(used, record["tokens"], strict=False)):
        assert f"the mask of {token} is <MSK_{slot}>" in answer
        assert (token in ("the right hand", "the left hand")) == (identity in (2, 3))


def files_of(root: Path) -> list[Path]:
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())


def test_bytes_do_not_depend_on_workers(root: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    generate(again, **SETTINGS, height=SMALL, num_workers=2)
    assert files_of(root) == files_of(again)
    for name in files_of(root):
        assert (root / name).read_bytes() == (again / name).read_bytes(), name


def test_smaller_pictures_show_the_same(tmp_path: Path) -> None:
    few = {"num_images": 2, "seed": 3, "val_fraction": 0, "test_fraction": 0.5, "hard": True}
    for height in (HEIGHT, HEIGHT // 2, SMALL):
        generate(tmp_path / str(height), **few, height=height, num_workers=1)
    full = tmp_path / str(HEIGHT)
    for height in (HEIGHT // 2, SMALL):
        small = tmp_path / str(height)
        assert files_of(small) == files_of(full)
        for name in files_of(full):
            if name.suffix in (".json", ".txt") and name.name != "synthetic.json":
                assert (small / name).read_bytes() == (full / name).read_bytes()
            elif name.parent.name == "mask":
                ids = cv2.imread(str(small / name), cv2.IMREAD_UNCHANGED)
                full_ids = cv2.imread(str(full / name), cv2.IMREAD_UNCHANGED)
                size = (height * 16 // 9, height)
                shrunk = cv2.resize(full_ids, size, interpolation=cv2.INTER_NEAREST)
                assert set(np.unique(ids)) == set(np.unique(full_ids))
                assert (ids == shrunk).mean() > 0.97


def test_the_painting_has_the_ids_of_the_outlines() -> None:
    for index in range(3):
        drawn = draw(18, index)
        painted = paint(drawn.scene, drawn.layout, drawn.rng).ids
        assert (painted != drawn.ids).mean() < 1e-3
        assert (painted == id_map(drawn.layout)).all()


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
        items = [*scene.active_items, *scene.distractors]
        assert [is_held_out(*item[:2]) for item in items] == [True] + [False] * (len(items) - 1)
    for drawn in scenes:
        items = [*drawn.scene.active_items, *drawn.scene.distractors]
        assert not any(is_held_out(*item[:2]) for item in items)


def test_unseen_layouts_are_only_in_their_list(root: Path, scenes: list[Drawn]) -> None:
    for drawn in scenes:
        assert not any(is_crossed(act, drawn.ids) for act in drawn.scene.interactions)
    for index in range(6):
        drawn = draw(20, index, crossed=True)
        assert drawn.scene.kind == "one_hand"
        assert is_crossed(drawn.scene.interactions[0], drawn.ids)
    listed = set(stems_of(root, "unseen_layouts"))
    for split in SPLITS:
        for stem, records in load(root, split).items():
            ids = cv2.imread(str(root / "mask" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
            sides = re.findall(r"(both|left|right) hands? (?:is|are)", records[0]["caption"])
            acts = []
            for side, identity in zip(sides, (1, 4), strict=False):
                acts.append(Interaction("", (side,), Item(1, "red", 0), identity))
            assert any(is_crossed(act, ids) for act in acts) == (stem in listed), stem


@pytest.mark.parametrize("wanted", [{"category": 9}, {"color": "black"}], ids=["category", "color"])
def test_an_item_shares_what_is_asked_for_while_one_is_left(wanted: dict) -> None:
    rng = np.random.default_rng(0)
    ((field, value),) = wanted.items()
    items = []
    while not items or getattr(items[-1], field) == value:
        items.append(draw_item(rng, avoid=tuple(items), **wanted))
    pairs = set()
    for category in CATEGORIES:
        pairs |= {(category, word) for word in COLORS if word != held_out_color(category)}
    assert {item[:2] for item in items[:-1]} == {pair for pair in pairs if value in pair}
    assert items[-1][:2] in pairs


def wordings() -> tuple[list[str], list[str]]:
    """All wordings that training uses, and all that are held out."""
    seen = []
    held_out = []
    for form in FORMS.values():
        seen += form.seen
        held_out += form.held_out
    return seen, held_out


def test_held_out_wordings_are_new_but_their_words_are_known() -> None:
    seen, held_out = wordings()
    assert not set(seen) & set(held_out)
    assert not set(FRAMES) & set(HELD_OUT_FRAMES)

    def words(texts: list[str]) -> set[str]:
        return set(re.findall(r"[\w'{}]+|[,]", "\n".join(texts)))

    assert words([*held_out, *HELD_OUT_FRAMES]) <= words([*seen, *FRAMES])
    for name, form in FORMS.items():
        num_sentences = sum(text.endswith("?") for text in form.held_out)
        assert num_sentences == 1, name
        assert len(form.held_out) == 3, name


def pattern_of(texts: list[str], frames: tuple[str, ...]) -> re.Pattern:
    """Any bare phrase, framed phrase or sentence."""
    escaped = [re.sub(r"\\{.*?\\}", ".+", re.escape(text)) for text in texts]
    sentences = [text for text in escaped if text.endswith("?")]
    phrases = "|".join(text for text in escaped if not text.endswith("?"))
    framed = [re.escape(frame).replace(r"\{\}", f"(?:{phrases})") for frame in frames]
    choices = "|".join([f"(?:{phrases})[.?]?", *framed, *sentences])
    return re.compile(choices, re.IGNORECASE)


def test_held_out_wordings_are_only_in_their_list(root: Path) -> None:
    _, held_out = wordings()
    pattern = pattern_of(held_out, HELD_OUT_FRAMES)
    listed = set(stems_of(root, "unseen_wordings"))
    known = set()
    for split in ("train", "val"):
        for records in load(root, split).values():
            known.update(queries_of(records))
    for stem, records in load(root, "test").items():
        if stem in listed:
            assert all(pattern.fullmatch(query) for query in queries_of(records))
            assert not known & set(queries_of(records))
