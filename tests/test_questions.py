"""Questions written from labels: all are right, by the facts of drawn scenes and by their words."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from annexe.datasets.image_names import CATEGORIES
from annexe.interchange import egohos, visor
from annexe.interchange.labels import (
    SIDES,
    Contact,
    GivenQuestion,
    ImportReport,
    LabeledImage,
    ReadOptions,
    Region,
)
from annexe.interchange.layout import LayoutOptions, collect, write_layout
from annexe.interchange.questions import write_annotations
from annexe.prompts import NO_TARGET_ANSWER, phrases_of
from annexe.rle import encode
from annexe.synthetic.language import FRAMES
from annexe.synthetic.render import render
from annexe.synthetic.scene import FIRST_DISTRACTOR, HAND_IDS, Scene, draw_scene

HEIGHT = 108  # rows of the drawn photos
SCALE = 1080 // HEIGHT  # of the corners in VISOR's files
NUM_SCENES = 14

DOT = encode(np.ones((1, 1), bool))


# What a scene shows, told without the code under test


@dataclass
class Truth:
    """Ids of the scene's own map: what is there and what each hand touches, directly or not."""

    hands: dict[str, int]
    names: dict[int, str]
    touched: dict[str, set[int]]
    through: dict[str, set[int]] = field(default_factory=lambda: {side: set() for side in SIDES})

    @property
    def in_contact(self) -> set[int]:
        return self.touched["right"] | self.touched["left"]

    def called(self, name: str) -> set[int]:
        return {identity for identity, known in self.names.items() if known == name}

    def touching(self, things: set[int]) -> set[int]:
        return {hand for side, hand in self.hands.items() if self.touched[side] & things}

    def hand(self, side: str) -> set[int]:
        return {self.hands[side]} if side in self.hands else set()


def truth_of(scene: Scene) -> Truth:
    names = {FIRST_DISTRACTOR + n: item.noun for n, item in enumerate(scene.distractors)}
    touched: dict[str, set[int]] = {side: set() for side in SIDES}
    for act in scene.interactions:
        names[act.identity] = act.item.noun
        for side in act.sides:
            touched[side].add(act.identity)
    return Truth({side: HAND_IDS[side] for side in scene.visible_sides}, names, touched)


# What queries mean, read from their words alone

SIDE = "(?P<side>right|left)"
THING = "(?P<thing>.+?)"
MEANINGS: dict[str, Callable[[Truth, str, str], set[int]]] = {
    f"(the {SIDE} hand|the hand on the {SIDE} arm|where is the {SIDE} hand"
    f"|is there a {SIDE} hand in the image)": lambda t, s, n: t.hand(s),
    "(all hands|all visible hands|every hand in view|which hands can be seen"
    "|what hands does the picture show)": lambda t, s, n: set(t.hands.values()),
    "(the hands in interaction|the active hands|every hand that acts on an object"
    "|which hands interact with an object)": lambda t, s, n: t.touching(t.in_contact),
    "(the free hand|the empty hand|the hand that touches nothing"
    "|every hand that touches no object|which hand is free"
    "|which hand touches nothing)": lambda t, s, n: (
        set(t.hands.values()) - t.touching(t.in_contact)
    ),
    "(the touched objects|every object that a hand touches|all objects in contact with a hand"
    "|what the hands touch|which objects are touched"
    "|what do the hands touch)": lambda t, s, n: t.in_contact,
    "(hands and objects in interaction|everything that takes part in the interaction"
    "|the interacting hands with their objects|the active hands and the active objects"
    "|what takes part in the interaction"
    "|which hands and objects interact)": lambda t, s, n: t.touching(t.in_contact) | t.in_contact,
    f"(the {SIDE} hand and its object|the {SIDE} hand together with what it touches"
    f"|the {SIDE} hand and the object it interacts with)": lambda t, s, n: t.hand(s) | t.touched[s],
    f"((the )?(active )?object (of the {SIDE} hand|that the {SIDE} hand touches)"
    f"|what does the {SIDE} hand interact with)": lambda t, s, n: t.touched[s],
    "((the object|what|the object in contact with|the object of) ?(that )?both hands( touch)?"
    "|what do both hands touch|which object is touched by both hands)": lambda t, s, n: (
        t.touched["right"] & t.touched["left"]
    ),
    f"(the object that only the {SIDE} hand touches|what the {SIDE} hand alone touches"
    f"|the object of the {SIDE} hand alone|what does only the {SIDE} hand touch"
    f"|which object is touched by the {SIDE} hand alone)": lambda t, s, n: (
        t.touched[s] - t.touched["left" if s == "right" else "right"]
    ),
    f"(the second-order object of the {SIDE} hand"
    f"|the object that the {SIDE} hand touches through another one"
    f"|what the {SIDE} hand touches by means of another object"
    f"|what does the {SIDE} hand touch through another object"
    f"|which object does the {SIDE} hand touch by means of another one)": lambda t, s, n: t.through[
        s
    ],
    "(the second-order objects|every object that a hand touches through another one"
    "|all objects touched by means of another object"
    "|what do the hands touch through another object"
    "|which objects are touched by means of another one)": lambda t, s, n: (
        t.through["right"] | t.through["left"]
    ),
    f"(the|every|any) {THING}( in view| in the picture)?": lambda t, s, n: t.called(n),
    f"(the touched {THING}|the {THING} that a hand touches|any {THING} in contact with a hand"
    f"|which {THING} is touched|does a hand touch the {THING})": lambda t, s, n: (
        t.called(n) & t.in_contact
    ),
    f"((the|any) {THING} (that the {SIDE} hand touches|touched by the {SIDE} hand"
    f"|in contact with the {SIDE} hand)|which {THING} does the {SIDE} hand touch"
    f"|where do you see the {THING} touched by the {SIDE} hand)": lambda t, s, n: (
        t.called(n) & t.touched[s]
    ),
    f"(what acts on the {THING}|every hand on the {THING}|any hand at the {THING}"
    f"|which hand touches the {THING})": lambda t, s, n: t.touching(t.called(n)),
    f"(the hand that does not touch the {THING}|every hand not on the {THING}"
    f"|the hand that is not at the {THING}|any hand that leaves the {THING} alone"
    f"|which hand does not touch the {THING}"
    f"|which hands leave the {THING} alone)": lambda t, s, n: (
        set(t.hands.values()) - t.touching(t.called(n))
    ),
    f"(the {THING} that no hand touches|the {THING} left alone"
    f"|which {THING} do the hands leave alone)": lambda t, s, n: t.called(n) - t.in_contact,
    "(every object that no hand touches|objects that the hands leave alone"
    "|which objects do the hands leave alone)": lambda t, s, n: set(t.names) - t.in_contact,
}
NOUNS = re.compile("[a-z]+( [a-z]+)?")


def numbered(pattern: str) -> re.Pattern:
    """The pattern with a name of its own for every group that it repeats."""
    counter = iter(range(100))
    return re.compile(re.sub(r"\(\?P<(\w+)>", lambda m: f"(?P<{m[1]}{next(counter)}>", pattern))


PATTERNS = [(numbered(pattern), meaning) for pattern, meaning in MEANINGS.items()]


def meant(query: str, truth: Truth) -> set[int]:
    """What a query asks for: its frame taken off, and the one meaning that its words have."""
    inner = re.sub(r"[.?]$", "", query)
    for frame in FRAMES:
        head, tail = frame.split("{}")
        if query.startswith(head) and query.endswith(tail):
            inner = query[len(head) : len(query) - len(tail)]
            break
    inner = inner[0].lower() + inner[1:]
    answers = []
    for pattern, meaning in PATTERNS:
        match = pattern.fullmatch(inner)
        if match:
            words = {
                key.rstrip("0123456789"): word for key, word in match.groupdict().items() if word
            }
            thing = words.get("thing", "")
            if "thing" in words and not is_name(thing):
                continue
            answers.append(meaning(truth, words.get("side", ""), thing))
    assert len(answers) == 1, (query, inner)
    return answers[0]


def is_name(text: str) -> bool:
    """Whether a text can be the name of a drawn thing."""
    return text in CATEGORIES.values()


# Drawn scenes in the files of other data sets


@cache
def drawn(index: int) -> tuple[Scene, np.ndarray, np.ndarray]:
    """A scene, its photo and its id map."""
    rng = np.random.default_rng([5, index])
    scene = draw_scene(rng, unseen_pair=False)
    picture = render(scene, rng, HEIGHT)
    return scene, picture.image, picture.ids


Scenes = dict[str, tuple[Truth, np.ndarray]]
"""Name of a photo -> its facts and its id map."""


def make_egohos(root: Path, num_scenes: int) -> Scenes:
    """Drawn scenes as EgoHOS labels them; in some a thing is touched by means of another."""
    scenes: Scenes = {}
    for name in ("image", "label"):
        (root / "val" / name).mkdir(parents=True)
    for index in range(num_scenes):
        scene, photo, ids = drawn(index)
        truth = truth_of(scene)
        label = np.zeros_like(ids)
        for mask_id, side in ((1, "left"), (2, "right")):
            label[ids == HAND_IDS[side]] = mask_id
        for act in scene.interactions:
            label[ids == act.identity] = {1: 3 if act.sides[0] == "left" else 4, 2: 5}[
                len(act.sides)
            ]

        # What a tool would touch
        if index % 4 == 0:
            sides = scene.interactions[0].sides
            label[ids == FIRST_DISTRACTOR] = {("left",): 6, ("right",): 7}.get(sides, 8)
            for side in sides:
                truth.through[side] = {FIRST_DISTRACTOR}
        cv2.imwrite(str(root / "val" / "image" / f"{index}.jpg"), photo)
        Image.fromarray(label).save(root / "val" / "label" / f"{index}.png")
        scenes[f"val/{index}.jpg"] = truth, ids
    return scenes


def make_visor(root: Path, num_scenes: int, *, withheld: bool = True) -> Scenes:
    """Drawn scenes as VISOR labels them: things of one noun are one entity.

    Args:
        root: folder of all files.
        num_scenes: how many.
        withheld: some scenes are labeled in part, as those of VISOR are: unused things have no
            mask, or it stays open what a hand touches.
    """
    scenes: Scenes = {}
    entries = []
    for index in range(num_scenes):
        scene, photo, ids = drawn(index)
        truth = truth_of(scene)
        entities = []
        for noun in sorted(set(truth.names.values())):
            shown = truth.called(noun)
            if withheld and index % 2:
                shown &= truth.in_contact
            segments = [s for each in shown for s in segments_of(ids == each)]
            exhaustive = "y" if shown == truth.called(noun) else "n"
            entity = {"id": noun, "name": noun, "exhaustive": exhaustive, "segments": segments}
            if shown:
                entities.append(entity)
        for side, hand in truth.hands.items():
            (contact,) = [truth.names[each] for each in truth.touched[side]] or [None]
            entity = {"id": side, "name": f"{side} hand", "segments": segments_of(ids == hand)}
            entity["in_contact_object"] = contact or "hand-not-in-contact"
            if withheld and index % 6 == (2 if side == "left" else 4):
                entity["in_contact_object"] = "inconclusive"
            entities.append(entity)
        name = f"P01_01_frame_{index:010d}.jpg"
        entries.append({"image": {"name": name, "video": "P01_01"}, "annotations": entities})
        cv2.imwrite(str(root / name), photo)
        scenes[name] = truth, ids
    (root / "P01_01.json").write_text(json.dumps({"video_annotations": entries}))
    return scenes


def segments_of(mask: np.ndarray) -> list[list[list[float]]]:
    """Outlines of a mask, in pixels of a video of 1080 rows."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return [(contour[:, 0] * float(SCALE)).tolist() for contour in contours]


def ids_of(mask: np.ndarray, ids: np.ndarray) -> set[int]:
    """Things of the scene that a mask shows."""
    shown = set()
    for identity in np.unique(ids[ids > 0]).tolist():
        is_it = ids == identity
        if np.count_nonzero(mask & is_it) > 0.5 * min(mask.sum(), is_it.sum()):
            shown.add(identity)
    return shown


def check_caption(caption: str, truth: Truth) -> None:
    """An analysis says of every hand in view what it touches, or that it is there."""
    text = re.fullmatch(r"In this image, (.+)\.", caption)
    assert text, caption
    told = set()
    view = re.fullmatch(r"(the .*) (?:is|are) in view", text[1])
    if view and " while " not in text[1]:
        things = re.split(", | and ", view[1])
        told = {side for side in SIDES if f"the {side} hand" in things}
        nouns = [thing.removeprefix("the ") for thing in things if not thing.endswith(" hand")]
        assert all(truth.called(noun) for noun in nouns), (caption, truth)
        assert told == set(truth.hands), (caption, truth)
        return
    for clause in text[1].split(" while "):
        match = re.fullmatch(r"(both hands are|the (right|left) hand is) (touching )?(.+)", clause)
        assert match, clause
        sides = [match[2]] if match[2] else list(SIDES)
        told |= set(sides)
        touched = set.intersection(*(truth.touched[side] for side in sides))
        if match[4] == "nothing":
            assert not touched, (caption, truth)
        elif match[3]:
            for thing in match[4].split(" and "):
                named = truth.called(thing.removeprefix("the ")) if thing[:4] == "the " else None
                assert touched & named if named is not None else touched, (caption, truth)
        else:
            assert match[4] == "in view"
    assert told == set(truth.hands), (caption, truth)


def checked(name: str, source: Path, scenes: Scenes, *, is_complete: bool = False) -> Counter[str]:
    """Make a data root and compare each of its questions with what its wordings ask for."""
    reader = {"egohos": egohos, "visor": visor}[name]
    report = ImportReport()
    entries = reader.read(source, ReadOptions(is_complete=is_complete), report)
    images = collect(entries, report, skip_bad=False)
    out = source / "out"
    write_layout(images, out, LayoutOptions(split="train", seed=1), report)

    counts: Counter[str] = Counter()
    for photo, (truth, ids) in scenes.items():
        stem = Path(photo).stem
        id_map = np.asarray(Image.open(out / "mask" / f"{stem}.png"))
        path = out / "dataset_split" / "train" / f"{stem}.json"
        for annotation in json.loads(path.read_text()):
            check_caption(annotation["caption"], truth)
            targets = [each for each in annotation["masks_idx"] if each]
            found = set().union(*(ids_of(id_map == each, ids) for each in targets))
            for question in annotation["questions"]:
                query = question["query"]
                assert found == meant(query, truth), (photo, query, found, truth)
            counts["questions"] += 1
            counts["without target"] += not targets
        counts["photos"] += 1
    return counts


@pytest.mark.parametrize(
    ("name", "is_complete", "num_scenes", "min_share"),
    [
        ("egohos", False, NUM_SCENES, 0.15),
        ("visor", False, NUM_SCENES, 0.15),
        ("visor", True, NUM_SCENES, 0.25),
        pytest.param("egohos", False, 112, 0.15, marks=pytest.mark.slow),
        pytest.param("visor", False, 150, 0.15, marks=pytest.mark.slow),
        pytest.param("visor", True, 116, 0.25, marks=pytest.mark.slow),
    ],
)
def test_questions_about_drawn_scenes_are_right(
    name: str, is_complete: bool, num_scenes: int, min_share: float, tmp_path: Path
) -> None:
    if name == "egohos":
        scenes = make_egohos(tmp_path, num_scenes)
    else:
        scenes = make_visor(tmp_path, num_scenes, withheld=not is_complete)
    counts = checked(name, tmp_path, scenes, is_complete=is_complete)
    assert counts["photos"] == num_scenes
    assert counts["questions"] >= (1000 if num_scenes > 100 else 5 * num_scenes)
    assert counts["without target"] > min_share * counts["questions"]


# Single photos


def labeled(regions: list[Region], **known) -> LabeledImage:
    return LabeledImage("a.jpg", Path("a.jpg"), (1, 1), "'a'", regions, **known)


def asked(image: LabeledImage, vocabulary: tuple[str, ...] = ()) -> dict[str, list[int]]:
    """Every question of many draws in lower case, without frames, with its targets."""
    found: dict[str, list[int]] = {}
    mask_ids = [index + 1 for index in range(len(image.regions))]
    for seed in range(20):
        rng = np.random.default_rng(seed)
        for annotation in write_annotations(image, mask_ids, vocabulary, rng, automatic=True):
            for question in annotation["questions"]:
                targets = [each for each in annotation["masks_idx"] if each]
                assert found.setdefault(question["query"], targets) == targets
    return found


def test_what_labels_leave_open_is_not_asked() -> None:
    right = Region(DOT, "right hand", "right", is_unique=True)
    left = Region(DOT, "left hand", "left", is_unique=True)
    pan = Region(DOT, "large pan", is_unique=True)
    spoon = Region(DOT, "spoon")

    # A hand whose contact is open: nothing about it but that it is there
    only_right = labeled([right, left, pan], contacts={"right": Contact((2,))})
    queries = asked(only_right)
    assert queries["The left hand"] == [2] and queries["The large pan"] == [3]
    for query in queries:
        if "touch" in query or "object" in query or "free" in query or "interact" in query:
            assert "right hand" in query, query

    # One of several spoons: only as the one that a hand touches, and no spoon is proved absent
    spoons = labeled([right, spoon, spoon], contacts={"right": Contact((1,), is_all=False)})
    for query, targets in asked(spoons, ("fork", "spoon")).items():
        assert "fork" not in query
        if "spoon" in query.lower():
            assert "touch" in query or "contact" in query
            assert targets == [2]

    # A hand that touches more than is known; names that are the kind of another
    both = labeled(
        [right, left, pan, Region(DOT, "pan", is_unique=True)],
        contacts={"right": Contact((2,), is_all=False), "left": Contact((3,), is_all=False)},
    )
    for query, targets in asked(both).items():
        assert "both hands" not in query and "pan" not in query.replace("large pan", "")
        assert targets or re.search("free|empty|nothing|no object", query), query

    # Hands without a side
    one = Region(DOT, "hand", "unknown", is_unique=True)
    assert asked(labeled([one, pan]))["All hands"] == [1]
    two = replace(one, is_unique=False)
    assert not any("hand" in query for query in asked(labeled([two, two, pan])))

    # A thing without a mask, and a region of which no pixel is left
    unmasked = labeled([right, pan], unmasked_names=frozenset(["large pan", "left hand"]))
    assert asked(unmasked) == {}
    rng = np.random.default_rng(0)
    hidden = labeled([right, pan], contacts={"right": Contact((1,))})
    for annotation in write_annotations(hidden, [1, 0], (), rng, automatic=True):
        assert annotation["answer"] == "The mask of the right hand is <MSK_0>."
        assert "object" not in annotation["questions"][0]["query"]


def test_nothing_proves_a_thing_absent_but_complete_labels() -> None:
    right = Region(DOT, "right hand", "right", is_unique=True)
    mug = Region(DOT, "mug", is_unique=True)
    names = ("mug", "fork", "travel mug", "left hand", "right hand")
    known = {"contacts": {"right": Contact((1,))}}
    assert not any("fork" in query for query in asked(labeled([right, mug], **known), names))
    assert "The left hand" not in asked(labeled([right, mug], **known), names)
    queries = asked(labeled([right, mug], is_complete=True, **known), names)
    assert queries["The fork"] == [] and queries["The left hand"] == []
    assert not any("travel" in query for query in queries)


def test_answers_are_those_of_drawn_scenes() -> None:
    regions = [Region(DOT, None), Region(DOT, None), Region(DOT, None, "left"), Region(DOT, "mug")]
    contacts = {"left": Contact((0, 1), ()), "right": Contact((1,), ())}
    image = labeled(regions, contacts=contacts, absent_hands=frozenset(["right"]))
    annotations = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        annotations += write_annotations(image, [7, 8, 9, 0], (), rng, automatic=True)
    answers = {tuple(each["masks_idx"]): each for each in annotations}
    assert answers[7, 8, 0, 0]["answer"] == (
        "The mask of the object of the left hand is <MSK_0>, "
        "and the mask of the object of both hands is <MSK_1>."
    )
    assert answers[7, 8, 0, 0]["tokens"][:2] == [
        "the object of the left hand",
        "the object of both hands",
    ]
    assert answers[0, 0, 0, 0]["answer"] == NO_TARGET_ANSWER
    captions = {each["caption"] for each in annotations}
    assert captions == {"In this image, the left hand is touching something."}


def test_given_questions_come_first_as_they_are() -> None:
    right = Region(DOT, "right hand", "right", is_unique=True)
    many = tuple(range(5))
    given = [
        GivenQuestion(("Which mug?", "mug"), (1,), "This one: the green mug is <MSK>."),
        GivenQuestion(("Hand and mug",), (0, 1)),
        GivenQuestion(("A fork?",), (), "There is none."),
        GivenQuestion(("Too many",), many),
        GivenQuestion(("Hidden",), (2,)),
    ]
    regions = [right, *[Region(DOT, "mug")] * 4]
    image = labeled(regions, caption="Mugs.", questions=given)
    rng = np.random.default_rng(0)
    annotations = write_annotations(image, [1, 2, 0, 4, 5], (), rng, automatic=False)
    assert [each["answer"] for each in annotations] == [
        "This one: the green mug is <MSK_0>.",
        "The mask of the right hand is <MSK_0>, and the mask of the mug is <MSK_1>.",
        "There is none.",
    ]
    assert annotations[0]["tokens"][0] == phrases_of(annotations[0]["answer"])[0]
    assert [each["with_mask"] for each in annotations] == [1, 1, 0]
    assert {each["caption"] for each in annotations} == {"Mugs."}
    ids = [question["id"] for each in annotations for question in each["questions"]]
    assert ids == [0, 1, 2, 3]

    # Written ones follow, with further ids; without given ones nothing is left
    more = write_annotations(image, [1, 2, 0, 4, 5], (), rng, automatic=True)
    assert more[:3] == annotations and len(more) > 3
    ids = [question["id"] for each in more for question in each["questions"]]
    assert len(set(ids)) == len(ids)
    bare = labeled(regions)
    assert write_annotations(bare, [1, 2, 0, 4, 5], (), rng, automatic=False) == []


def test_questions_are_the_same_for_a_seed() -> None:
    image = labeled(
        [Region(DOT, "right hand", "right", is_unique=True), Region(DOT, "mug")],
        contacts={"right": Contact((1,))},
    )
    once, again, other = (
        write_annotations(image, [1, 2], (), np.random.default_rng(seed), automatic=True)
        for seed in (1, 1, 2)
    )
    assert once == again != other
    assert 5 <= len(once[0]["questions"]) <= 10
