"""A question from the page, and what the page shows of its answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from annexe.datasets.image_files import Upload
from annexe.errors import UserError
from annexe.inference.page import fragments
from annexe.inference.page.pictures import LabeledMask, depth_picture, mask_layers
from annexe.inference.results import Photo, PhotoResult

log = logging.getLogger(__name__)

Ask = Callable[[Photo], PhotoResult | UserError]
"""Answers a photo, or says why not; it may block."""


@dataclass(frozen=True)
class View:
    """An answer as the page shows it.

    Attributes:
        answer: HTML, as are ``downloads`` and ``analysis``.
        photo: what lies under the masks.
        masks: layers over the photo.
        colors: label of a layer -> color.
        depth: the depth view, if the model predicts depth.
    """

    answer: str
    photo: Image.Image
    masks: list[LabeledMask]
    colors: dict[str, str]
    depth: Image.Image | None
    downloads: str
    analysis: str


def look(ask: Ask, path: str | None, question: str) -> View:
    """Ask a question about a photo.

    Args:
        ask: answers a photo.
        path: of the photo; None where none was chosen.
        question: as it was typed.

    Raises:
        UserError: the one line to show instead, whatever went wrong.
    """
    if path is None:
        raise UserError("There is no photo yet; choose one, or take one with the camera.")
    require_question(question)
    with told_in_one_line():
        file = Path(path)
        result = ask(Photo.of(Upload(file.read_bytes(), file.name), question.strip()))
        if isinstance(result, UserError):
            raise result
        return _view_of(result)


def _view_of(result: PhotoResult) -> View:
    (answer,) = result.answers
    photo, layers, colors = mask_layers(result, answer)
    depth = None if result.depth is None else depth_picture(result.depth, result.size)
    return View(
        answer=fragments.answer_card(answer),
        photo=photo,
        masks=layers,
        colors=colors,
        depth=depth,
        downloads=fragments.downloads(result, answer),
        analysis=fragments.analysis(result),
    )


def require_question(question: str) -> None:
    """Refuse an empty question; what else is wrong with one, the model's door says.

    Raises:
        UserError: it is empty.
    """
    if not question.strip():
        raise UserError("There is no question yet; write one.")


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turn whatever goes wrong into one line for the page, and log what is not the user's fault.

    Raises:
        UserError: for any error in the block.
    """
    try:
        yield
    except UserError:
        raise
    except Exception:
        log.exception("the page could not answer")
        raise UserError("The server could not answer; try again, or read its log.") from None
