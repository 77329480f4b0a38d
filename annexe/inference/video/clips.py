"""A clip from its frames to lines, videos and a report of how much the answers flicker.

Of ``clip.mp4`` come these files. Each of them is whole or not there; the first one alone grows:

    clip.answers.jsonl   what the model said, frame by frame; what was ended goes on from it
    clip.frames.jsonl    the same after smoothing: one line for each frame and question
    clip.flicker.json    how much the answers change from frame to frame, before and after it
    clip-1.mp4           frames with masks and captions, a video for each question
"""

from __future__ import annotations

import argparse
import json
import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from annexe.errors import UserError
from annexe.evaluation.records import line_of
from annexe.files import remove, replaced, write_json
from annexe.inference.results import Photo
from annexe.inference.video.pictures import FramePictures
from annexe.inference.video.reading import DamagedClip, Frame, clip_size, read_frames
from annexe.inference.video.records import (
    FinishedFrames,
    FrameQueryRecord,
    FrameRecord,
    read_lines,
    records_of_frame,
)
from annexe.inference.video.smoothing import SECONDS, Flicker, smoothed
from annexe.inference.video.writing import Pace, VideoWriter, video_file
from annexe.terminal import say, track

if TYPE_CHECKING:
    from annexe.inference.predictor import Predictor

EVERY = 1.0  # seconds
_NUM_AHEAD = 8  # frames that are decoded while the model answers those before
_MAX_NAME = 200  # bytes: files that come of a clip have longer names
_MADE_BY = ("checkpoint", "step", "answer_format", "max_new_tokens")  # of what answers depend on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for clips."""
    frames = parser.add_mutually_exclusive_group()
    frames.add_argument(
        "--every",
        type=_seconds,
        default=EVERY,
        metavar="SECONDS",
        help=f"of a video, ask about one frame in so many seconds (default: {EVERY:g})",
    )
    frames.add_argument("--frames", choices=["all"], help="of a video, ask about every frame")
    smoothing = parser.add_mutually_exclusive_group()
    smoothing.add_argument(
        "--smooth",
        type=_seconds,
        default=SECONDS,
        metavar="SECONDS",
        help="of a video, smooth masks and presence over frames that are no further apart than "
        f"that (default: {SECONDS:g})",
    )
    smoothing.add_argument(
        "--no-smooth", action="store_true", help="of a video, leave masks and presence as they are"
    )


def _seconds(text: str) -> float:
    """A number of seconds above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of seconds above 0")
    return value


def run(
    arguments: argparse.Namespace,
    predictor: Predictor,
    files: Sequence[Path],
    questions: Sequence[str] | Sequence[Sequence[str]],
    out: Path,
) -> list[str]:
    """Answer clips one after the other, as `annexe predict` does, and print what came of them.

    Args:
        arguments: those of `add_arguments`, and ``save``, which names ``video`` or does not.
        predictor: answers.
        files: clips of different names.
        questions: asked of every clip, or those of each.
        out: folder for what comes of them.

    Returns:
        For each clip that could not be answered, or not to its end, why.
    """
    errors = []
    for index, file in enumerate(files):
        own = [text for text in questions if isinstance(text, str)]
        try:
            result = predict_video(
                predictor,
                file,
                own if own or not questions else questions[index],
                out=out,
                every=None if arguments.frames == "all" else arguments.every,
                smooth=0.0 if arguments.no_smooth else arguments.smooth,
                save_video="video" in arguments.save,
            )
        except UserError as error:
            errors.append(str(error))
            continue
        _tell(file, result)
        if result.damage is not None:
            errors.append(result.damage)
    return errors


@dataclass(frozen=True)
class VideoResult:
    """What came of a clip.

    Attributes:
        lines: file with a line for each frame and question.
        report: file with what is in ``flicker``.
        videos: one for each question, or one of the analysis; none if they were not wanted.
        flicker: number of frames, and how much the answers to each question change.
    """

    lines: Path
    report: Path
    videos: list[Path]
    flicker: dict[str, Any]

    @property
    def damage(self) -> str | None:
        """Why the clip was not answered to its end, if it was not."""
        return self.flicker["damage"]


def predict_video(
    predictor: Predictor,
    clip: str | Path,
    questions: str | Sequence[str] = (),
    *,
    out: str | Path,
    every: float | None = EVERY,
    smooth: float = SECONDS,
    save_video: bool = False,
) -> VideoResult:
    """Ask about the frames of a clip; what is in memory does not depend on its length.

    The same call goes on where an earlier one was ended. No two may write to a folder at once.

    Args:
        predictor: answers.
        clip: video file.
        questions: one or several, asked of every frame; without any, frames are analyzed alone.
        out: folder for the files that the top of this module names; it is made.
        every: seconds from one frame that is asked about to the next; None asks about all.
        smooth: how many seconds away the neighbors may be over which a frame is smoothed; with 0
            answers stay as they are.
        save_video: write a video for each question.

    Raises:
        UserError: the clip cannot be read, a question cannot be asked, or the folder has answers
            to something else.
    """
    # What is asked for
    clip = Path(clip)
    out = Path(out)
    asked = [questions] if isinstance(questions, str) else list(questions)
    _check(clip, out, every, smooth)

    # The files
    lines = out / f"{clip.stem}.frames.jsonl"
    report = out / f"{clip.stem}.flicker.json"
    videos = [out / f"{clip.stem}-{index + 1}.mp4" for index in range(len(asked))]
    videos = videos or [out / f"{clip.stem}-analysis.mp4"]

    # The lines, from answers of which an earlier call may have left some
    made_from = _made_from(predictor, clip, asked, every)
    finished = FinishedFrames(out / f"{clip.stem}.answers.jsonl", made_from, max(1, len(asked)))
    finished.open()
    flicker = _read_report(report, smooth) if finished.is_complete else None
    if flicker is None:
        for stale in (report, lines, *videos):
            remove(stale)
        total = clip_size(clip).num_asked(every)
        frames = _answered(predictor, clip, asked, every, finished)
        with closing(frames):
            shown = track(frames, clip.name, total, transient=True, stderr=True)
            flicker = _write_smoothed(shown, asked, smooth, lines)
        flicker = {"clip": clip.name, "every": every, "smooth": smooth} | flicker
        flicker["damage"] = finished.damage
        write_json(report, flicker)

    # The videos
    if save_video and not all(video.exists() for video in videos):
        write_videos(clip, lines, videos, every)
    return VideoResult(
        lines=lines, report=report, videos=videos if save_video else [], flicker=flicker
    )


def _check(clip: Path, out: Path, every: float | None, smooth: float) -> None:
    """Refuse what cannot be, and make the folder.

    Raises:
        UserError: naming the argument.
    """
    try:
        name = clip.stem.encode()  # it is written to JSON, which has to be UTF-8
    except UnicodeEncodeError:
        raise UserError(f"the name of clip {str(clip)!r} is not UTF-8; rename it") from None
    if len(name) > _MAX_NAME:
        raise UserError(f"the name of clip '{clip}' is too long; rename it")
    if every is not None and not 0 < every < math.inf:
        raise UserError(f"every is {every}; it must be a number of seconds above 0, or None")
    if not 0 <= smooth < math.inf:
        raise UserError(f"smooth is {smooth}; it must be a number of seconds, 0 for none")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make folder '{out}' ({error.strerror}); choose another one"
        ) from None


def _made_from(
    predictor: Predictor, clip: Path, questions: list[str], every: float | None
) -> dict[str, Any]:
    """All that the answers depend on, by a name for each."""
    made_from: dict[str, Any] = {"questions": questions, "--every": every}
    if clip.exists():
        stat = clip.stat()
        made_from["the clip's size and time"] = [stat.st_size, stat.st_mtime_ns]
    for name in _MADE_BY:
        made_from[name] = predictor.about.get(name)
    return made_from


def _read_report(path: Path, smooth: float) -> dict[str, Any] | None:
    """The report of an earlier call; None if there is none with the same smoothing."""
    if not path.exists():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    return report if report["smooth"] == smooth else None


def _answered(
    predictor: Predictor,
    clip: Path,
    questions: list[str],
    every: float | None,
    finished: FinishedFrames,
) -> Generator[list[FrameRecord], None, None]:
    """The records of all frames: those that are finished, then those that the model answers.

    Raises:
        UserError: the clip cannot be read at all, or a frame not be answered.
    """
    yield from finished.read()
    if finished.is_complete:
        return
    num_done = finished.num_frames
    places: deque[tuple[int, float]] = deque()
    errors: list[UserError] = []

    def photos() -> Iterator[Photo]:
        """The frames that are left, up to an error if there is one."""
        frames = read_frames(clip, every)
        ahead = _ahead(islice(frames, num_done, None))
        with closing(frames), closing(ahead):
            try:
                for frame in ahead:
                    places.append((frame.index, frame.time))
                    yield Photo.of(frame.pixels, questions, f"{clip.stem}-{frame.index:06d}")
            except UserError as error:
                errors.append(error)

    for result in predictor.iterate(photos()):
        index, time = places.popleft()
        if isinstance(result, UserError):
            raise result
        records = records_of_frame(result, index, time)
        finished.add(records)
        yield records

    # The end, or the damage
    if errors and not isinstance(errors[0], DamagedClip):
        raise errors[0]
    finished.finish(str(errors[0]) if errors else None)


def _ahead(frames: Iterator[Frame]) -> Generator[Frame, None, None]:
    """The frames, decoded by a thread of their own while the ones before are worked on."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, frames, None) for _ in range(_NUM_AHEAD))
        while (frame := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, frames, None))
            yield frame


def _write_smoothed(
    frames: Iterable[list[FrameRecord]], questions: list[str], smooth: float, lines: Path
) -> dict[str, Any]:
    """Smooth the records of all frames and write them as they come.

    Returns:
        How many frames there are, how many of them have neighbors to be smoothed with, and how
        much the answers to each question change.
    """
    num_frames = 0
    num_smoothed = 0
    before = [Flicker() for _ in questions]
    after = [Flicker() for _ in questions]
    with replaced(lines) as part, part.open("w", encoding="utf-8") as file:
        for records, results in smoothed(frames, smooth):
            file.write("".join(map(line_of, results)))
            file.flush()
            num_frames += 1
            num_smoothed += results[0] is not records[0]
            _update(before, records)
            _update(after, results)

    # The report on each question
    reports = []
    for question, raw, steady in zip(questions, before, after, strict=True):
        reports.append(
            {
                "question": question,
                "neighboring_frames": raw.num_pairs,
                "answer_changes": raw.answer_changes,
                "presence_flips": {"before": raw.presence_flips, "after": steady.presence_flips},
                "mask_iou": {"before": raw.mask_iou(), "after": steady.mask_iou()},
            }
        )
    return {"frames": num_frames, "smoothed_frames": num_smoothed, "questions": reports}


def _update(flickers: list[Flicker], records: list[FrameRecord]) -> None:
    """Take the answers about a frame into the measurements of their questions."""
    for flicker, record in zip(flickers, records, strict=False):
        assert isinstance(record, FrameQueryRecord)
        flicker.update(record)


def write_videos(clip: Path, lines: Path, videos: list[Path], every: float | None) -> None:
    """Draw the answers on their frames, which are decoded once more.

    Args:
        clip: video file.
        lines: what `predict_video` wrote about it.
        videos: files to write, one for each line of a frame.
        every: as the frames were chosen.

    Raises:
        UserError: the videos cannot be written.
    """
    pace = Pace.of((records[0].time for records in read_lines(lines, len(videos))), every or 1.0)
    with closing(read_frames(clip, every)) as frames, ExitStack() as stack:
        pictures: FramePictures | None = None
        writers: list[VideoWriter] = []
        for records, frame in zip(read_lines(lines, len(videos)), frames, strict=False):
            assert records[0].frame == frame.index
            if pictures is None:
                pictures = FramePictures(*frame.pixels.shape[:2])
                for video in videos:
                    part = stack.enter_context(replaced(video))
                    writers.append(stack.enter_context(video_file(part, pictures.size, pace)))
            for writer, record in zip(writers, records, strict=True):
                writer.add(frame.time, pictures.draw(frame.pixels, record))


def _tell(clip: Path, result: VideoResult) -> None:
    """Print what came of a clip."""
    flicker = result.flicker
    say(f"{clip}: {flicker['frames']} frames, answered in '{result.lines}'", style="bold")
    for video in result.videos:
        say(f"  '{video}'")
    if flicker["smooth"] and not flicker["smoothed_frames"]:
        say(
            f"  nothing is smoothed: no frame has neighbors within {flicker['smooth']:g} s on both "
            "sides (--smooth SECONDS, --frames all)"
        )
    for report in flicker["questions"]:
        num_pairs = report["neighboring_frames"]
        flips = report["presence_flips"]
        iou = report["mask_iou"]
        say(f"  {report['question']}")
        say(
            f"    of {num_pairs} pairs of neighboring frames {report['answer_changes']} differ in "
            f"their answer, {flips['before']} in whether there is a target (smoothed: "
            f"{flips['after']}); mask IoU {_shown(iou['before'])} (smoothed: "
            f"{_shown(iou['after'])})"
        )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
