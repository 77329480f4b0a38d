"""What every foreign format is read into and written from: a photo with labeled regions.

A module of this package is one format. Its ``read`` yields a `LabeledImage` for every photo, or the
error that makes a photo unusable; its ``write`` takes them. What a format leaves unknown stays
unknown here, so that nothing is asked about it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from annexe.errors import UserError
from annexe.rle import Rle

SIDES = ("right", "left")

FORMATS = ("coco", "label-studio", "cvat", "id-png", "egohos", "visor", "hoi4d")
"""Names on the command line; the module of a format has an underscore for each dash."""

LEADING_ARTICLE = re.compile("^(the|an?) (?=.)", re.IGNORECASE)
_CAPITAL_WITHIN = re.compile("(?<=[a-z])(?=[A-Z])")  # as in "LeftHand"
_HANDS = {
    "left hand": "left",
    "hand left": "left",
    "lefthand": "left",
    "right hand": "right",
    "hand right": "right",
    "righthand": "right",
    "hand": "unknown",
    "hands": "unknown",
}


def hand_of(name: str) -> str | None:
    """Which hand of the camera wearer the name of a label means, by all of its words.

    "Left_Hand" and "hand-left" are left, and "hand" is a hand of unknown side. "Left handle" is no
    hand, and "other person's left hand" is none of the wearer's.
    """
    words = re.findall(r"\w+", _CAPITAL_WITHIN.sub(" ", name).replace("_", " ").lower())
    return _HANDS.get(" ".join(word for word in words if word not in ("a", "the")))


@dataclass(frozen=True)
class Region:
    """One labeled thing, of one part or several."""

    rle: Rle  # at the size of the photo, with at least one pixel
    name: str | None = None  # noun phrase without article, such as "mug"; None = not named
    hand: str | None = None  # "right" or "left", "unknown" for a hand without a side; None = none
    is_unique: bool = False  # whether the labels prove that the photo has no other of this name
    score: float | None = None  # confidence of a predicted mask, in [0, 1]


def mark_unique(regions: list[Region], unmasked_names: Collection[str]) -> list[Region]:
    """Regions of a user's labels, unique where a photo has one region of a name.

    Whoever labels by hand is taken to label all things of a name in a photo or none.

    Args:
        regions: of a photo.
        unmasked_names: names of labeled things that have no usable mask.
    """
    counts = Counter(region.name for region in regions)
    marked = []
    for region in regions:
        is_alone = counts[region.name] == 1 and region.name not in unmasked_names
        marked.append(replace(region, is_unique=is_alone and region.name is not None))
    return marked


@dataclass(frozen=True)
class Contact:
    """What one hand touches, where the labels settle it."""

    touched: tuple[int, ...] = ()  # indices of regions; none = the hand is free
    # Regions that it touches by means of a touched one; None = the format does not tell
    through: tuple[int, ...] | None = None
    # Whether it touches nothing else for certain; one that touches nothing is known to be free
    is_all: bool = True


@dataclass(frozen=True)
class GivenQuestion:
    """A question with its answer that the format has."""

    queries: tuple[str, ...]  # wordings
    targets: tuple[int, ...]  # indices of regions, none = there is no target
    answer: str | None = None  # with <MSK_k> for target k; None = to be written


@dataclass
class LabeledImage:
    """One photo, and what a format says of it.

    Regions that overlap are in the order from back to front: a later one lies on top.
    """

    name: str  # path of the photo as the format has it, without what tools put in front
    photo: Path
    size: tuple[int, int]  # height, width
    where: str  # file and entry of the labels, for messages: "'a.json', image 7"
    regions: list[Region] = field(default_factory=list)

    # "right" or "left" -> what that hand touches; a side that is not there is not known
    contacts: dict[str, Contact] = field(default_factory=dict)
    # Sides of which the labels prove that no hand is in the photo
    absent_hands: frozenset[str] = frozenset()
    # Whether everything of the labeled categories is labeled (``--complete``)
    is_complete: bool = False
    # Names of things that are labeled but have no usable mask: nothing is asked by these names
    unmasked_names: frozenset[str] = frozenset()

    caption: str | None = None  # the analysis sentence
    questions: list[GivenQuestion] = field(default_factory=list)
    depth: Path | None = None  # map as docs/data.md describes it
    split: str | None = None  # train, val or test, where the format has splits
    sequence: str | None = None  # frames of one sequence never part; None = a photo alone


@dataclass
class ImportReport:
    """What was taken of a source, what was left out, and why.

    Attributes:
        taken: what -> how many, such as "regions".
        left_out: reason -> entries, such as "'a.json', annotation 7".
        notes: sentences about decisions that hold for the whole source.
        unpacked: folder that goes away with the process -> zip file that is unpacked there.
    """

    taken: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unpacked: dict[str, str] = field(default_factory=dict)

    def as_given(self, text: str) -> str:
        """A message that names files by their place in a zip file, not where they are unpacked."""
        for folder, source in self.unpacked.items():
            text = text.replace(folder, source)
        return text

    def leave_out(self, reason: str, where: str) -> None:
        """Count an entry that is sound but cannot be used."""
        self.left_out.setdefault(reason, []).append(self.as_given(where))

    def note(self, text: str) -> None:
        """Keep a sentence, once."""
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True)
class ReadOptions:
    """What a user may say about a source beside its path."""

    images: Path | None = None  # folder of the photos; None = where the format has them
    is_complete: bool = False  # everything of the labeled categories is labeled


class Reader(Protocol):
    """``read`` of a format's module."""

    def __call__(
        self, source: Path, options: ReadOptions, report: ImportReport
    ) -> Iterator[LabeledImage | UserError]:
        """The photos of a source in a fixed order.

        Args:
            source: annotation file or folder.
            options: what the user says beside it.
            report: gets what is taken and what is left out.

        Yields:
            A photo with its labels, or the error about a photo that cannot be used: damaged,
            missing, or labels that do not fit it. It names file, entry and fix.

        Raises:
            UserError: for a source that cannot be read at all.
        """


class Writer(Protocol):
    """``write`` of a format's module."""

    def __call__(self, images: list[LabeledImage], out: Path) -> None:
        """Write files for a tool that reads the format; complete or not at all.

        Raises:
            UserError: where the format cannot hold what the images have, or files cannot be made.
        """
