"""Annotations of a photo written from its regions, its hands and what they touch.

Questions and answers have the wordings of the drawn scenes, but for those that say more than labels
of contact do, such as "use" or "the table". Only what the labels settle is asked: a thing that is
not labeled may still be there, and a hand whose contact is not labeled may touch anything.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np

from annexe.interchange.labels import SIDES, Contact, LabeledImage, Region, hand_of
from annexe.prompts import number_placeholders, phrases_of
from annexe.synthetic.hard_language import Candidate, choose
from annexe.synthetic.language import NUM_SLOTS, record, records
from annexe.synthetic.wordings import FORMS, Form, read_forms

_NUM_ABSENT = 2  # names of things that are not there, of which a photo is asked
_MAX_PER_REFUSAL = 4  # questions with a target for each one without

# What a label of contact does not tell; {a_thing} needs an article that a name does not have
_SAYS_MORE = re.compile(r"\b(used?|uses|unused|table|wearer|a_thing)\b|interact with the {thing}")
_REUSED = (
    "hand",
    "all_hands",
    "active_hands",
    "interaction",
    "hand_and_object",
    "object_of",
    "in_view",
    "hand_on",
    "hand_not_on",
    "unused",
    "unused_objects",
)
# In the form of the table of the drawn scenes: a question mark makes a sentence
_OWN_FORMS = """
free_hand
  the free hand
  the empty hand
  the hand that touches nothing
  every hand that touches no object
  Which hand is free?
  Which hand touches nothing?
touched_objects
  the touched objects
  every object that a hand touches
  all objects in contact with a hand
  what the hands touch
  Which objects are touched?
  What do the hands touch?
both_object
  the object of both hands
  the object that both hands touch
  what both hands touch
  the object in contact with both hands
  What do both hands touch?
  Which object is touched by both hands?
only_object_of
  the object that only the {side} hand touches
  what the {side} hand alone touches
  the object of the {side} hand alone
  What does only the {side} hand touch?
  Which object is touched by the {side} hand alone?
indirect_object_of
  the second-order object of the {side} hand
  the object that the {side} hand touches through another one
  what the {side} hand touches by means of another object
  What does the {side} hand touch through another object?
  Which object does the {side} hand touch by means of another one?
indirect_objects
  the second-order objects
  every object that a hand touches through another one
  all objects touched by means of another object
  What do the hands touch through another object?
  Which objects are touched by means of another one?
touched
  the touched {thing}
  the {thing} that a hand touches
  any {thing} in contact with a hand
  Which {thing} is touched?
  Does a hand touch the {thing}?
touched_by
  the {thing} that the {side} hand touches
  the {thing} touched by the {side} hand
  any {thing} in contact with the {side} hand
  Which {thing} does the {side} hand touch?
  Where do you see the {thing} touched by the {side} hand?
"""


def write_annotations(
    image: LabeledImage,
    mask_ids: list[int],
    vocabulary: tuple[str, ...],
    rng: np.random.Generator,
    *,
    automatic: bool,
) -> list[dict]:
    """The annotations of a photo, in the form of its JSON file.

    Given questions come first, as they are. One that asks for a region of which nothing is left,
    or for more than four, is passed over.

    Args:
        image: photo and labels.
        mask_ids: of every region its id in the id map, 0 if no pixel is left of it.
        vocabulary: all names of the source. They are names of absent things where all is labeled.
        rng: picks questions and wordings.
        automatic: whether to write the analysis sentence where none is given, and questions.

    Returns:
        At most a dozen written annotations behind the given ones; none where nothing can be asked.
    """
    names = _phrases(image)
    analysis = image.caption
    if analysis is None:
        analysis = _caption(image) if automatic else ""
    result = _given(image, mask_ids, names, analysis)
    if not automatic:
        return result

    # What the labels settle, a third of it without a target where there is as much
    facts = _Facts(image, vocabulary)
    candidates = []
    for candidate in _all_questions(facts, rng):
        targets = tuple(mask_ids[index] for index in candidate.targets)
        if 0 not in targets:
            candidates.append(candidate._replace(targets=targets))
    chosen = _limited(choose(candidates, rng))

    # In words, hands before things
    order = sorted(range(len(names)), key=lambda index: _rank(image.regions[index]))
    names_by_id = {mask_ids[index]: names[index] for index in order}
    questions = []
    for candidate in chosen:
        form = _FORMS[candidate.form]
        questions.append(form.question(candidate.targets, candidate.words, held_out=False))
    written = records(questions, names_by_id, analysis, rng)
    return result + _continued(written, result)


# What is given


def _given(image: LabeledImage, mask_ids: list[int], names: list[str], analysis: str) -> list[dict]:
    """Annotations of the given questions."""
    result = []
    next_id = 0
    for given in image.questions:
        targets = [mask_ids[index] for index in given.targets]
        if 0 in targets or len(targets) > NUM_SLOTS or not given.queries:
            continue
        queries = []
        for query in given.queries:
            is_sentence = int(query.rstrip().endswith((".", "?", "!")))
            queries.append({"id": next_id, "query": query, "is_sentence": is_sentence})
            next_id += 1

        # Phrases of the answer where it has one for each target
        phrases = [names[index] for index in given.targets]
        answer = given.answer
        if answer is not None and targets:
            answer = number_placeholders(answer, list(range(len(targets))))
            named = phrases_of(answer) if "<MSK_" in answer else {}
            if named.keys() == set(range(len(targets))):
                phrases = [named[slot] or phrases[slot] for slot in range(len(targets))]
            else:
                answer = None
        result.append(record(targets, phrases, analysis, queries, answer))
    return result


def _continued(written: list[dict], given: list[dict]) -> list[dict]:
    """Written annotations behind given ones: ids go on, and no wording is asked twice."""
    queries_given = [query for annotation in given for query in annotation["questions"]]
    asked = {query["query"] for query in queries_given}
    result = []
    for annotation in written:
        queries = []
        for query in annotation["questions"]:
            if query["query"] not in asked:
                queries.append(query | {"id": query["id"] + len(queries_given)})
        if queries:
            result.append(annotation | {"questions": queries})
    return result


# How things are called


def _spoken(name: str) -> str:
    """A name without marks at which an answer ends a phrase."""
    return " ".join(re.sub(r"[_,.;:<>]+", " ", name).split())


def _phrases(image: LabeledImage) -> list[str]:
    """What an answer calls every region: a hand by its side, a thing by its name or its hands."""
    phrases = []
    for index, region in enumerate(image.regions):
        direct = _sides_of(image, index, "touched")
        indirect = _sides_of(image, index, "through")
        if region.hand in SIDES:
            phrase = f"the {region.hand} hand"
        elif region.hand:
            phrase = "the hand"
        elif region.name:
            phrase = f"the {_spoken(region.name)}"
        elif direct:
            phrase = f"the object of {_hands(direct)}"
        elif indirect:
            phrase = f"the second-order object of {_hands(indirect)}"
        else:
            phrase = "the object"
        phrases.append(phrase)
    return phrases


def _sides_of(image: LabeledImage, index: int, field: str) -> list[str]:
    """The hands in whose ``touched`` or ``through`` a region is."""
    sides = []
    for side in SIDES:
        contact = image.contacts.get(side)
        if contact is not None and index in (getattr(contact, field) or ()):
            sides.append(side)
    return sides


def _hands(sides: list[str]) -> str:
    return "both hands" if len(sides) == 2 else f"the {sides[0]} hand"


def _rank(region: Region) -> int:
    """Right hand, left hand, other hands, things."""
    if region.hand is None:
        return len(SIDES) + 1
    return SIDES.index(region.hand) if region.hand in SIDES else len(SIDES)


def _caption(image: LabeledImage) -> str:
    """The analysis sentence: hands and what they touch, or what is in view where that is open."""
    present = [side for side in SIDES if any(region.hand == side for region in image.regions)]
    if any(side in image.contacts for side in present):
        return f"In this image, {' while '.join(_clauses(image, present))}."

    # What can be seen
    seen = [f"the {side} hand" for side in present]
    names = [_spoken(region.name) for region in image.regions if region.name and not region.hand]
    for name in dict.fromkeys(names):
        seen.append(f"the {name}" if names.count(name) == 1 else f"more than one {name}")
    if seen:
        verb = "are" if len(seen) > 1 else "is"
        return f"In this image, {_listed(seen)} {verb} in view."
    if image.absent_hands.issuperset(SIDES):
        return "In this image, no hand is in view."
    return ""


def _clauses(image: LabeledImage, present: list[str]) -> list[str]:
    """What each hand in view does; hands that touch the same things share a clause."""
    groups: dict[tuple[str, ...], list[str | None]] = defaultdict(list)
    others = []
    for side in present:
        contact = image.contacts.get(side)
        if contact is None:
            others.append(f"the {side} hand is in view")
        elif not contact.touched:
            others.append(f"the {side} hand is touching nothing")
        for index in contact.touched if contact else ():
            sides = tuple(each for each in _sides_of(image, index, "touched") if each in present)
            if side == sides[0]:
                groups[sides].append(image.regions[index].name)

    # Things without a name are something, and something else
    clauses = []
    unnamed = "something"
    for sides, names in groups.items():
        things = [f"the {_spoken(name)}" if name else unnamed for name in names]
        subject = "both hands are" if len(sides) == 2 else f"the {sides[0]} hand is"
        clauses.append(f"{subject} touching {_listed(list(dict.fromkeys(things)))}")
        if None in names:
            unnamed = "something else"
    return clauses + others


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


# What the labels settle


class _Facts:
    """What is in a photo, as far as its labels settle it. Numbers are indices of regions.

    Attributes:
        names: what things are called -> all things of that name.
        contacts: side -> what that hand touches; a side that is not there is open.
        absent: names of the source that nothing in the photo has.
    """

    def __init__(self, image: LabeledImage, vocabulary: Iterable[str]) -> None:
        self.image = image
        self.regions = image.regions
        self.is_complete = image.is_complete
        names: dict[str, list[int]] = defaultdict(list)
        for index, region in enumerate(image.regions):
            if region.hand is None and region.name:
                names[_spoken(region.name)].append(index)
        self.names = dict(names)
        self.unmasked = {_spoken(name) for name in image.unmasked_names}
        self.hands = [index for index, region in enumerate(image.regions) if region.hand]
        self.contacts: dict[str, Contact] = {}
        for side, contact in image.contacts.items():
            if not set(contact.touched) & set(self.hands):
                self.contacts[side] = contact

        # Names that are in the photo only by their kind are not absent: "car" beside "toy car"
        self.absent: list[str] = []
        sides_of_names = {hand_of(name) for name in vocabulary}
        self._labels_hand = {side: side in sides_of_names for side in SIDES}
        self._has_unnamed = any(not (region.hand or region.name) for region in image.regions)
        kinds = {name.split()[-1] for name in (*self.names, *self.unmasked)}
        if self.is_complete and not self._has_unnamed:
            for name in dict.fromkeys(_spoken(name) for name in vocabulary):
                if hand_of(name) is None and name.split()[-1] not in kinds:
                    self.absent.append(name)

    def hand(self, side: str) -> tuple[int, ...] | None:
        """The hand of a side, () if the labels prove that there is none; None = open."""
        found = [index for index in self.hands if self.regions[index].hand == side]
        is_doubtful = len(found) > 1 or len(self._sided_hands()) < len(self.hands)
        if is_doubtful or any(hand_of(name) for name in self.unmasked):
            return None
        if found:
            return tuple(found)
        is_absent = side in self.image.absent_hands
        return () if is_absent or (self.is_complete and self._labels_hand[side]) else None

    def all_hands(self) -> tuple[int, ...] | None:
        """All hands in the photo; None = open."""
        if any(hand_of(name) for name in self.unmasked):
            return None
        if self.is_complete and (self.hands or any(self._labels_hand.values())):
            return tuple(sorted(self.hands, key=lambda index: _rank(self.regions[index])))
        if len(self.hands) == 1 and not self._sided_hands():
            return tuple(self.hands) if self.regions[self.hands[0]].is_unique else None
        found: list[int] = []
        for side in SIDES:
            hand = self.hand(side)
            if hand is None or not all(self.regions[index].is_unique for index in hand):
                return None
            found += hand
        return tuple(found)

    def sides_in_view(self) -> list[str] | None:
        """The sides of all hands in the photo, if it is known of each what it touches."""
        if self.all_hands() is None or any(self.hand(side) is None for side in SIDES):
            return None
        sides = [side for side in SIDES if self.hand(side)]
        return sides if all(side in self.contacts for side in sides) else None

    def touches(self, side: str, group: Iterable[int]) -> bool | None:
        """Whether a hand whose contact is known touches any of some things; None = open."""
        contact = self.contacts[side]
        if set(contact.touched) & set(group):
            return True
        return False if contact.is_all or not contact.touched else None

    def called(self, name: str) -> tuple[int, ...] | None:
        """All things of a name in the photo; None = there may be more."""
        found = self.names[name]
        is_single = len(found) == 1 and self.regions[found[0]].is_unique
        return tuple(found) if self.is_complete or is_single else None

    def clear_names(self) -> list[str]:
        """Names that nothing else in the photo could have: "pan" is none beside "large pan"."""
        if self._has_unnamed:
            return []
        known = {*self.names, *self.unmasked}
        clear = []
        for name in self.names:
            is_kind = any(other.endswith(f" {name}") for other in known)
            if not is_kind and name not in self.unmasked:
                clear.append(name)
        return clear

    def _sided_hands(self) -> list[int]:
        return [index for index in self.hands if self.regions[index].hand in SIDES]


def _all_questions(facts: _Facts, rng: np.random.Generator) -> Iterator[Candidate]:
    """Every question that the labels settle, with the regions that it asks for."""
    # Hands
    hands = facts.all_hands()
    if hands is not None:
        yield Candidate("all_hands", "all_hands", {}, hands)
    for side in SIDES:
        hand = facts.hand(side)
        if hand is not None:
            yield Candidate("hand", "hand", {"side": side}, hand)

    # What they touch
    yield from _about_hands_in_view(facts)
    for side in SIDES:
        if side in facts.contacts:
            yield from _about_object_of(facts, side)
    yield from _about_both_hands(facts)

    # Things by their names
    for name in facts.clear_names():
        yield from _about_name(facts, name)
    for index in rng.permutation(len(facts.absent))[:_NUM_ABSENT]:
        words = {"thing": facts.absent[index]}
        yield Candidate("in_view", "in_view", words, ())
        sides = facts.sides_in_view()
        if sides is not None and not any(facts.touches(side, ()) is None for side in sides):
            yield Candidate("touched", "touched", words, ())


def _about_hands_in_view(facts: _Facts) -> Iterator[Candidate]:
    """All that touches or is touched, where that is known of every hand in view."""
    sides = facts.sides_in_view()
    if sides is None:
        return
    touched: dict[int, None] = {}
    for side in SIDES:
        if side in facts.contacts:
            touched |= dict.fromkeys(facts.contacts[side].touched)

    # Hands, and what they touch
    active: list[int] = []
    free: list[int] = []
    for side in sides:
        (active if facts.contacts[side].touched else free).extend(facts.hand(side) or ())
    yield Candidate("active_hands", "active_hands", {}, tuple(active))
    yield Candidate("free_hand", "free_hand", {}, tuple(free))
    yield Candidate("touched_objects", "touched_objects", {}, tuple(touched))
    if not any(contact.through for contact in facts.contacts.values()):
        yield Candidate("interaction", "interaction", {}, (*active, *touched))

    # What none touches
    is_settled = all(facts.contacts[side].is_all for side in sides)
    if facts.is_complete and is_settled and not facts.unmasked:
        unused = []
        for index, region in enumerate(facts.regions):
            if region.hand is None and index not in touched:
                unused.append(index)
        yield Candidate("unused_objects", "unused_objects", {}, tuple(unused))


def _about_object_of(facts: _Facts, side: str) -> Iterator[Candidate]:
    """What a hand touches, and what it touches through that."""
    words = {"side": side}
    contact = facts.contacts[side]
    yield Candidate("object_of", "object_of", words, contact.touched)
    hand = facts.hand(side)
    if hand is not None and bool(hand) == bool(contact.touched):
        yield Candidate("hand_and_object", "hand_and_object", words, (*hand, *contact.touched))
    if contact.through is not None:
        yield Candidate("indirect_object_of", "indirect_object_of", words, contact.through)

    # Alone, where the other hand touches one of several things
    other = SIDES[1 - SIDES.index(side)]
    if other in facts.contacts:
        touches = [facts.touches(other, [index]) for index in contact.touched]
        if True in touches and None not in touches:
            alone = set(contact.touched) - set(facts.contacts[other].touched)
            yield Candidate("only_object_of", "only_object_of", words, tuple(sorted(alone)))


def _about_both_hands(facts: _Facts) -> Iterator[Candidate]:
    """What both hands touch, directly or not."""
    contacts = [facts.contacts[side] for side in SIDES if side in facts.contacts]
    if any(not contact.touched for contact in contacts):
        yield Candidate("both_object", "both_object", {}, ())
    elif len(contacts) == 2:
        right, left = contacts
        both = tuple(index for index in right.touched if index in left.touched)
        is_open = [not right.is_all and set(left.touched) - set(both)]
        is_open.append(not left.is_all and set(right.touched) - set(both))
        if not any(is_open):
            yield Candidate("both_object", "both_object", {}, both)

    if len(contacts) == 2 and all(contact.through is not None for contact in contacts):
        through = dict.fromkeys(index for contact in contacts for index in contact.through or ())
        yield Candidate("indirect_objects", "indirect_objects", {}, tuple(through))


def _about_name(facts: _Facts, name: str) -> Iterator[Candidate]:
    """A thing by its name, and who touches it."""
    words = {"thing": name}
    group = facts.names[name]
    everything = facts.called(name)
    if everything is not None:
        yield Candidate("in_view", "in_view", words, everything)

    # With one hand
    for side in SIDES:
        if side in facts.contacts and facts.touches(side, group) is not None:
            touched = tuple(index for index in facts.contacts[side].touched if index in group)
            yield Candidate("touched_by", "touched_by", words | {"side": side}, touched)

    # With all hands
    sides = facts.sides_in_view()
    if sides is None or any(facts.touches(side, group) is None for side in sides):
        return
    in_contact = [index for index in group if _sides_of(facts.image, index, "touched")]
    untouched = [index for index in group if index not in in_contact]
    touching: list[int] = []
    others: list[int] = []
    for side in sides:
        (touching if facts.touches(side, group) else others).extend(facts.hand(side) or ())
    if in_contact or facts.is_complete:
        yield Candidate("touched", "touched", words, tuple(in_contact))
        yield Candidate("hand_on", "hand_on", words, tuple(touching))
    if len(group) == 1 and in_contact:
        yield Candidate("hand_not_on", "hand_not_on", words, tuple(others))
    if facts.is_complete:
        yield Candidate("unused", "unused", words, tuple(untouched))


def _limited(chosen: list[Candidate]) -> list[Candidate]:
    """The questions, fewer with a target where there are few without, but some."""
    num_refused = sum(not candidate.targets for candidate in chosen)
    if num_refused == 0:
        return chosen
    num_left = num_refused * _MAX_PER_REFUSAL
    result = []
    for candidate in chosen:
        if candidate.targets and num_left == 0:
            continue
        num_left -= bool(candidate.targets)
        result.append(candidate)
    return result


def _forms() -> dict[str, Form]:
    """Own wordings, and those of the drawn scenes that say no more than labels do."""
    forms = read_forms(_OWN_FORMS)
    for name in _REUSED:
        templates = (text for text in FORMS[name].seen if not _SAYS_MORE.search(text))
        forms[name] = Form(tuple(templates), ())
    return forms


_FORMS = _forms()
