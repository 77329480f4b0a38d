"""What kind of target a phrase names: a hand and which, or an object of which category.

The words decide, not letters within words: a clamp is no lamp. Of a phrase such as "the mug in the
left hand" only the noun that it is about counts, and the words in front of that.
"""

from __future__ import annotations

import re

from annexe.datasets.image_names import CATEGORIES, category

HANDS = ("right_hand", "left_hand", "hand")
"""Groups of hands; ``hand`` is one whose side the phrase does not tell."""

OTHER = "other"

_SIDES = ("left", "right")
_PLURALS = {"knife": "knives"}

_WORD = re.compile(r"[^\W_]+(?:'\w+)?")
_CAPITAL_WITHIN = re.compile("(?<=[a-z])(?=[A-Z])")  # as in "ToyCar"

# What stands beside a noun without being one
_ATTRIBUTE = re.compile(
    r"an?|the|this|these|those|his|her|their|my|your|our|its|one|both|two|other|another|same|"
    r"active|inactive|passive|left|right|first|second|\d+"
)
# Nouns that name no kind of object
_GENERIC = re.compile("objects?|things?|items?|ones?|it|them")
# Words behind which something else is named
_LINK = re.compile(
    "of|in|on|at|by|with|from|to|for|under|over|above|below|behind|beside|near|next|between|inside|"
    "into|onto|against|around|and|that|which|who|whose|is|are|being|"
    "held|touched|used|gripped|grasped|lifted|pushed|pulled|moved|carried|manipulated|operated|"
    "holding|touching|using|gripping|grasping|lifting|pushing|pulling|moving|carrying|"
    "manipulating|operating|interacting|contacting|reaching|resting|lying|standing"
)


def target_group(phrase: str, stem: str) -> str:
    """Group of a target in metrics and counts.

    Args:
        phrase: what the annotation calls it.
        stem: name of its image.

    Returns:
        ``right_hand``, ``left_hand``, ``hand`` where the phrase does not say which, or a category
        of HOI4D, such as ``toy_car``. The category of the stem counts where the phrase names no
        kind of object, such as "the active object". Everything else is ``other``.
    """
    text = _CAPITAL_WITHIN.sub(" ", phrase).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    named, link, rest = _split(_WORD.findall(text.lower()))
    nouns = [word for word in named if not _ATTRIBUTE.fullmatch(word)]
    is_generic = not nouns or _GENERIC.fullmatch(nouns[-1]) is not None

    # A hand
    if nouns and nouns[-1] in ("hand", "hands"):
        sides = [side for side in _SIDES if side in named]
        return f"{sides[0]}_hand" if len(sides) == 1 else "hand"

    # An object that the phrase names, or a part of it: "the lid of the bottle"
    found = _category_in(named)
    if found is None and link == "of" and not is_generic:
        found = _category_in(_split(rest)[0])

    # An object that it names by half or not at all
    own = category(stem)
    if found is None and (is_generic or nouns[-1] == own.rpartition(" ")[2]):
        found = own
    return (found or OTHER).replace(" ", "_")


def _split(words: list[str]) -> tuple[list[str], str, list[str]]:
    """The words up to the noun that a phrase is about, the word that links more to it, the rest."""
    has_noun = False
    for index, word in enumerate(words):
        is_link = _LINK.fullmatch(word) is not None
        is_side_of = word in _SIDES and words[index + 1 : index + 2] == ["of"]
        if has_noun and (is_link or is_side_of):
            return words[:index], word, words[index + 1 :]
        has_noun = has_noun or not (is_link or _ATTRIBUTE.fullmatch(word))
    return words, "", []


def _category_in(words: list[str]) -> str | None:
    """The category whose whole name stands in ``words``, the last one of several."""
    text = f" {' '.join(words)} "
    places: dict[str, int] = {}
    for name in CATEGORIES.values():
        for form in _forms(name):
            places[name] = max(places.get(name, -1), text.rfind(f" {form} "))
    last = max(places, key=lambda name: places[name])
    return last if places[last] >= 0 else None


def _forms(name: str) -> list[str]:
    """How a category is written: as such, in one word, and in the plural."""
    plural = _PLURALS.get(name, f"{name}s")
    return [name, name.replace(" ", ""), plural, plural.replace(" ", "")]
