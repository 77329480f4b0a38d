"""Contacts of hands that labels tell of in words: relations, choices, attributes.

Annotation tools have no field for what a hand touches. People put it into the label of a relation
("holds"), or into a choice or an attribute of a region ("held by the right hand").
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from annexe.errors import UserError
from annexe.interchange.labels import SIDES, Contact, LabeledImage, Region

TOUCHES = "touches"
"""Label of a relation from a hand to a thing."""

FREE = "touches nothing"
"""What is said of a hand."""

TOUCHED_BY = {side: f"touched by {side} hand" for side in SIDES}
"""What is said of a thing."""

_VERBS = (
    "hold|holds|holding|held|touch|touches|touching|touched|grasp|grasps|grasping|grasped|"
    "grip|grips|gripping|gripped|use|uses|using|used|carry|carries|carrying|carried|"
    "lift|lifts|lifting|lifted|push|pushes|pushing|pushed|pull|pulls|pulling|pulled|"
    "move|moves|moving|moved|press|presses|pressing|pressed|"
    "manipulate|manipulates|manipulating|manipulated"
)
_CONTACT = re.compile(rf"(is |in )*({_VERBS}|contact|active|use)( by| with)?")
_BY_HAND = re.compile(
    rf"(?:(?:is |in )*(?:{_VERBS}|contact) )?(?:by |with |in )?(?:the |a )?"
    r"(left|right|both) hands?"
)
_NO_CONTACT = re.compile(
    rf"(?:{_VERBS}) nothing|free|empty|idle|no contact|"
    r"(?:is )?not (?:touching|holding|in contact)(?: anything)?"
)


class SaidContacts:
    """Collects what is said of the regions of a photo.

    Args:
        regions: of the photo.
        is_complete: nothing is left out of the labels, so that what is said is all there is.
    """

    def __init__(self, regions: Sequence[Region], *, is_complete: bool) -> None:
        self.regions = regions
        self.is_complete = is_complete
        self._touched: dict[str, set[int]] = defaultdict(set)  # side of a hand -> regions
        self._free: set[str] = set()  # sides of hands that touch nothing

    def relate(self, first: int, second: int, labels: Sequence[str]) -> str | None:
        """Take a relation of two regions, whichever way it points.

        Returns:
            None, or why it settles no contact.
        """
        if not any(_CONTACT.fullmatch(_words(label)) for label in labels):
            return "relations whose label names no contact"
        ends = {self.regions[index].hand: index for index in (first, second)}
        sides = [hand for hand in ends if hand in SIDES]
        if len(sides) != 1 or None not in ends:
            return "relations that are not of a right or left hand and a thing"
        self._touched[str(sides[0])].add(ends[None])
        return None

    def say(self, index: int, words: str) -> bool:
        """Take what is said of a region.

        Of a hand it can be that it touches nothing, of a thing by which hand it is touched. A thing
        that is "held", by nobody knows whom, is held by the one hand of a photo, if the labels are
        complete.

        Returns:
            Whether that settles a contact.
        """
        text = _words(words)
        hand = self.regions[index].hand
        if hand is not None:
            is_free = hand in SIDES and _NO_CONTACT.fullmatch(text) is not None
            if is_free:
                self._free.add(hand)
            return is_free

        # A thing
        by_hand = _BY_HAND.fullmatch(text)
        sides: tuple[str, ...]
        if by_hand:
            sides = SIDES if by_hand[1] == "both" else (by_hand[1],)
        else:
            hands = [region.hand for region in self.regions if region.hand is not None]
            is_only = self.is_complete and len(hands) == 1 and hands[0] in SIDES
            sides = (str(hands[0]),) if is_only and _CONTACT.fullmatch(text) else ()
        for side in sides:
            self._touched[side].add(index)
        return bool(sides)

    def contacts(self, where: str) -> dict[str, Contact]:
        """Side of a hand -> what it touches, of the hands of which anything is said.

        Args:
            where: the photo, for messages.

        Raises:
            UserError: a hand touches nothing and something.
        """
        contacts = {}
        for side in SIDES:
            is_free = side in self._free
            touched = self._touched[side]
            if is_free and touched:
                raise UserError(
                    f"{where}: the {side} hand is said to touch nothing, and to touch "
                    f"{self.regions[min(touched)].name or 'a thing'!r}; remove one of the two"
                )
            if is_free or touched:
                is_all = is_free or self.is_complete
                contacts[side] = Contact(tuple(sorted(touched)), is_all=is_all)
        return contacts


def hand_index(image: LabeledImage, side: str) -> int | None:
    """Index of the first region of a hand."""
    for index, region in enumerate(image.regions):
        if region.hand == side:
            return index
    return None


def _words(text: str) -> str:
    """Words in lower case, without what joins them in names."""
    return " ".join(re.sub(r"[_\s-]+", " ", text.lower()).split())
