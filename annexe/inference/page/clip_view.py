"""A clip from the page, and what the page shows of the answers to its frames."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from annexe.errors import UserError
from annexe.inference.page import fragments
from annexe.inference.page.view import Ask, require_question, told_in_one_line
from annexe.inference.results import Photo, PhotoResult

if TYPE_CHECKING:
    from annexe.inference.predictor import Predictor
    from annexe.inference.video.clips import VideoResult

AskVideo = Callable[[Path, str, float, Path], "VideoResult"]
"""Answers a clip: its file, a question, seconds from frame to frame, a folder for what comes."""

NUM_FRAMES = 4  # frames of a clip that are asked about at once
KEPT_SECONDS = 3600  # for which the files of a clip are kept


@dataclass(frozen=True)
class ClipView:
    """What the page shows of a clip: a video, and HTML about how steady the answers are."""

    video: Path
    report: str


def look_at_clip(
    ask_video: AskVideo, path: str | None, question: str, every: float | None, folder: Path
) -> ClipView:
    """Ask a question about the frames of a clip.

    Args:
        ask_video: answers a clip.
        path: of the clip; None where none was chosen.
        question: as it was typed.
        every: seconds from frame to frame, as they were typed.
        folder: for the files of this clip, and of those before, of which old ones are removed.

    Raises:
        UserError: the one line to show instead, whatever went wrong.
    """
    if path is None:
        raise UserError("There is no video yet; choose one.")
    require_question(question)
    if every is None or not 0 < every < math.inf:
        raise UserError("The seconds from frame to frame must be above 0.")
    clip = Path(path)
    _remove_old(folder)
    try:
        with told_in_one_line():
            out = Path(tempfile.mkdtemp(dir=folder))
            result = ask_video(clip, question.strip(), every, out)
    except UserError as error:
        raise UserError(str(error).replace(str(clip), clip.name)) from None
    return ClipView(result.videos[0], report_card(result))


def _remove_old(folder: Path) -> None:
    """Remove what earlier clips left in a folder and nobody looks at any more."""
    for old in folder.iterdir():
        if time.time() - old.stat().st_mtime > KEPT_SECONDS:
            shutil.rmtree(old, ignore_errors=True)


def report_card(result: VideoResult) -> str:
    """How much the answers change from frame to frame, as HTML."""
    (report,) = result.flicker["questions"]
    flips = report["presence_flips"]
    iou = report["mask_iou"]
    changes = report["answer_changes"]
    rows = [
        ["", "as answered", "smoothed"],
        ["answer in other words", changes, changes],
        ["target comes or goes", flips["before"], flips["after"]],
        ["mask overlap (IoU)", _shown(iou["before"]), _shown(iou["after"])],
    ]

    # Frames that are far apart stay as they are
    note = ""
    if not result.flicker["smoothed_frames"]:
        rows = [row[:2] for row in rows]
        note = " Frames so far apart are not smoothed."

    # As a table
    lines = ""
    for name, *values in rows:
        cells = "".join(f"<td>{value}</td>" for value in values)
        lines += f"<tr><th scope='row'>{name}</th>{cells}</tr>"
    damage = fragments.message(result.damage) if result.damage is not None else ""
    return (
        f'{damage}<div class="annexe-flicker"><p class="quiet">{escape(report["question"])}</p>'
        f"<p>{result.flicker['frames']} frames were answered. This is how much changes from one "
        f"to the next, in {report['neighboring_frames']} pairs of neighbors.{note}</p>"
        f"<table>{lines}</table></div>"
    )


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


# Clips over a door for photos


class AskedFrames:
    """What `predict_video` needs of a predictor, over a function that answers one photo.

    Args:
        ask: answers a photo; it may block.
        about: what there is to know of the model.
    """

    def __init__(self, ask: Ask, about: dict[str, Any]) -> None:
        self.ask = ask
        self.about = about

    def iterate(self, photos: Iterable[Photo]) -> Iterator[PhotoResult | UserError]:
        """Results in order; a few frames are asked about at once, so that they make a batch."""
        waiting: deque[Future[PhotoResult | UserError]] = deque()
        with ThreadPoolExecutor(NUM_FRAMES) as pool:
            for photo in photos:
                waiting.append(pool.submit(self.ask, photo))
                if len(waiting) == NUM_FRAMES:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


def ask_frames(ask: Ask, about: dict[str, Any]) -> AskVideo:
    """Answers clips with what answers photos."""
    predictor = cast("Predictor", AskedFrames(ask, about))

    def ask_video(clip: Path, question: str, every: float, out: Path) -> VideoResult:
        from annexe.inference.video import predict_video

        return predict_video(predictor, clip, question, out=out, every=every, save_video=True)

    return ask_video


def missing_extra() -> str | None:
    """A line that says what is missing for videos; None where nothing is."""
    from annexe.inference.video.reading import has_pyav, has_torchcodec

    if has_torchcodec() or has_pyav():
        return None
    return 'Videos need TorchCodec or PyAV; install them with pip install "annexe[video]".'
