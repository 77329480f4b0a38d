"""Clips: read the same by both libraries, answered frame by frame, smoothed, and written."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from annexe import cli
from annexe.errors import UserError
from annexe.evaluation.records import ImageRecord, PredictedMask, QueryRecord, read_records
from annexe.inference import video
from annexe.inference.predictor import Predictor
from annexe.inference.results import Answer, Photo, PhotoResult
from annexe.inference.video import reading, writing
from annexe.inference.video.pictures import FramePictures
from annexe.inference.video.reading import DamagedClip, is_video, read_frames
from annexe.inference.video.records import FrameQueryRecord, read_lines
from annexe.inference.video.smoothing import Flicker, majority, smoothed
from annexe.inference.video.writing import Pace, video_file
from annexe.rle import decode, encode

LIBRARIES = ("TorchCodec", "PyAV")
RATE = 10
QUESTION = "Where is the mug?"

has_both = reading.has_torchcodec() and reading.has_pyav()
needs_both = pytest.mark.skipif(not has_both, reason="TorchCodec or PyAV is not installed")
needs_pyav = pytest.mark.skipif(not reading.has_pyav(), reason="PyAV is not installed")
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is absent")


# Clips


@pytest.fixture(scope="module")
def drawings(scenes: Path) -> list[np.ndarray]:
    """Drawn scenes, uint8[120, 160, 3]."""
    photos = sorted((scenes / "RGB").glob("*.jpg"))[:5]
    return [np.asarray(Image.open(photo).resize((160, 120))) for photo in photos]


def picture(drawings: list[np.ndarray], index: int, height: int, width: int) -> np.ndarray:
    """The picture of a frame: a scene that moves, with the number of the frame as gray bars."""
    scene = np.roll(drawings[index // 25 % len(drawings)], 2 * index, axis=1)
    pixels = np.ascontiguousarray(scene[:height, :width])
    for bit in range(9):
        pixels[:16, 16 * bit : 16 * bit + 16] = 235 if index >> bit & 1 else 20
    return pixels


def number_in(pixels: np.ndarray) -> int:
    """The number of a frame, read from its bars."""
    means = [pixels[2:14, 16 * bit + 2 : 16 * bit + 14].mean() for bit in range(9)]
    return sum(1 << bit for bit, mean in enumerate(means) if mean > 128)


def write_clip(
    path: Path,
    drawings: list[np.ndarray],
    times: list[float],
    *,
    size: tuple[int, int] = (120, 160),
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    **options: str,
) -> Path:
    """A clip whose frames have these times in seconds."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options={"g": "50", **options})
        stream.height, stream.width = size
        stream.pix_fmt = pixel_format
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, time in enumerate(times):
            pixels = picture(drawings, index, *size)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = round(time * 1000)
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def even_times(count: int) -> list[float]:
    return [index / RATE for index in range(count)]


@pytest.fixture
def clip(drawings: list[np.ndarray], tmp_path: Path) -> Path:
    """Two seconds."""
    return write_clip(tmp_path / "clip.mp4", drawings, even_times(20))


def ffmpeg(*words: object) -> None:
    subprocess.run(
        ["ffmpeg", "-v", "error", "-y", *map(str, words)], check=True, stdin=subprocess.DEVNULL
    )


def test_a_clip_is_known_by_its_ending():
    assert is_video(Path("a/Clip.MP4"))
    assert is_video(Path("clip.ts"))
    assert not is_video(Path("photo.jpg"))
    assert not is_video(Path("mp4"))


# Reading


@needs_both
def test_both_libraries_give_the_same_frames(drawings, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", drawings, even_times(300))
    by_library = [list(read_frames(path, library=library)) for library in LIBRARIES]
    for frames in by_library:
        assert [frame.index for frame in frames] == list(range(300))
        assert [number_in(frame.pixels) for frame in frames] == list(range(300))
        np.testing.assert_allclose([frame.time for frame in frames], even_times(300), atol=1e-6)
    for frame, other in zip(*by_library, strict=True):
        assert frame.pixels.shape == other.pixels.shape == (120, 160, 3)
        difference = np.abs(frame.pixels.astype(int) - other.pixels)
        assert difference.max() <= 2


@needs_both
@pytest.mark.parametrize("library", LIBRARIES)
def test_times_of_an_uneven_clip_are_its_own(drawings, tmp_path, library):
    times = [0, 0.1, 0.2, 0.5, 0.9, 1.0, 1.8, 2.1, 2.2, 3.4, 3.5, 5.9]
    path = write_clip(tmp_path / "uneven.mp4", drawings, times)
    frames = list(read_frames(path, library=library))
    np.testing.assert_allclose([frame.time for frame in frames], times, atol=1e-3)

    # At 2 s the frame of 1.8 s is still shown, at 4 s and 5 s that of 3.5 s
    frames = list(read_frames(path, 1.0, library=library))
    expected = [0, 1.0, 1.8, 2.2, 3.5, 5.9]
    np.testing.assert_allclose([frame.time for frame in frames], expected, atol=1e-3)
    assert [frame.index for frame in frames] == [0, 5, 6, 8, 10, 11]
    assert [number_in(frame.pixels) for frame in frames] == [0, 5, 6, 8, 10, 11]


@needs_both
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("every", "expected"),
    [(0.01, range(20)), (0.1, range(20)), (0.25, [0, 2, 5, 7, 10, 12, 15, 17]), (60, [0])],
)
def test_one_frame_in_so_many_seconds(clip, library, every, expected):
    frames = list(read_frames(clip, every, library=library))
    assert [frame.index for frame in frames] == list(expected)
    assert [number_in(frame.pixels) for frame in frames] == list(expected)


@needs_both
@needs_ffmpeg
@pytest.mark.parametrize("angle", [90, 180, 270])
def test_a_turned_clip_stands_upright(clip, tmp_path, angle):
    turned = tmp_path / "turned.mp4"
    ffmpeg("-i", clip, "-c", "copy", "-metadata:s:v", f"rotate={angle}", turned)
    (plain, *_) = read_frames(clip)
    expected = np.rot90(plain.pixels, angle // 90)  # to the left, as ffmpeg itself does
    for library in LIBRARIES:
        (frame, *_) = read_frames(turned, library=library)
        assert frame.pixels.shape == expected.shape
        assert np.abs(frame.pixels.astype(int) - expected).max() <= 2


@needs_both
@pytest.mark.parametrize("name", ["clip.ts", "clip.mkv", "clip.avi", "clip.mov"])
def test_other_containers_start_at_0_as_well(drawings, tmp_path, name):
    path = write_clip(tmp_path / name, drawings, even_times(50), bf="0")
    frames = list(read_frames(path))
    np.testing.assert_allclose([frame.time for frame in frames], even_times(50), atol=1e-3)
    assert [number_in(frame.pixels) for frame in frames] == list(range(50))


def damage(path: Path, start: float, length: int = 4000) -> None:
    """Overwrite bytes in the middle of a file."""
    content = bytearray(path.read_bytes())
    first = int(start * len(content))
    content[first : first + length] = b"\xff" * length
    path.write_bytes(content)


@needs_both
@pytest.mark.parametrize("library", [*LIBRARIES, None])
@pytest.mark.parametrize("length", [100, 4000])  # FFmpeg paints over the shorter one
def test_a_damaged_middle_is_told(drawings, tmp_path, library, length):
    path = write_clip(tmp_path / "damaged.mp4", drawings, even_times(100))
    damage(path, 0.5, length)
    decoded = read_frames(path, library=library)
    frames = []
    with pytest.raises(DamagedClip, match=r"damaged\.mp4' is damaged after frame \d+ at"):
        frames.extend(decoded)
    assert 10 < len(frames) < 100
    assert [number_in(frame.pixels) for frame in frames] == list(range(len(frames)))


@needs_both
@needs_ffmpeg
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_clip_that_ends_too_early_is_told(drawings, tmp_path, library):
    path = write_clip(tmp_path / "whole.mkv", drawings, even_times(50))
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DamagedClip, match="is damaged after frame"):
        list(read_frames(cut, library=library))

    # One that was cut by its player's list of edits is whole
    trimmed = tmp_path / "trimmed.mp4"
    ffmpeg("-ss", "0.35", "-i", path, "-c", "copy", trimmed)
    numbers = [number_in(frame.pixels) for frame in read_frames(trimmed, library=library)]
    assert numbers[-1] == 49
    assert numbers == list(range(numbers[0], 50))


@needs_both
def test_pyav_takes_over_where_torchcodec_fails(clip, tmp_path, monkeypatch):
    def fails(*_: object) -> Iterator[object]:
        raise reading._Unreadable("no codec")
        yield

    class Fails:
        def __init__(self, *_: object) -> None:
            raise UserError("no encoder")

    monkeypatch.setattr(reading, "_by_torchcodec", fails)
    monkeypatch.setattr(writing, "_TorchCodecWriter", Fails)
    with pytest.raises(UserError, match="no codec"):
        list(read_frames(clip, library="TorchCodec"))
    frames = list(read_frames(clip))
    assert len(frames) == 20
    copy = tmp_path / "copy.mp4"
    with video_file(copy, (120, 160), Pace(RATE, True)) as writer:
        for frame in frames:
            writer.add(frame.time, frame.pixels)
    assert [number_in(frame.pixels) for frame in read_frames(copy)] == list(range(20))


@needs_both
@needs_ffmpeg
@pytest.mark.parametrize("library", [*LIBRARIES, None])
def test_what_is_no_clip_is_refused_in_one_line(clip, tmp_path, library):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("This is no clip.\n" * 100)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac", tmp_path / "sound.mp4")
    small = tmp_path / "small.mp4"
    ffmpeg("-i", clip, "-vf", "scale=60:30", small)
    messages = {
        "absent.mp4": "no clip",
        "empty.mp4": "is empty",
        "text.mp4": "cannot read clip",
        "folder.mp4": "is no file",
        "cut.mp4": "cannot read clip",
        "sound.mp4": "sound, but no pictures",
        "small.mp4": "60 x 30; no side may be below 32",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=message) as refused:
            list(read_frames(tmp_path / name, library=library))
        assert name in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_missing_library_is_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "has_torchcodec", lambda: False)
    monkeypatch.setattr(reading, "has_pyav", lambda: False)
    (tmp_path / "clip.mp4").write_text("anything")
    with pytest.raises(UserError, match=r"TorchCodec or PyAV.*pip install \"annexe\[video\]\""):
        next(read_frames(tmp_path / "clip.mp4"))


# Smoothing


def record_of(frame: int, time: float, masks: dict[int, np.ndarray], **fields: Any):
    """The answer about a frame, with a mask for each slot."""
    predicted = []
    for slot, mask in masks.items():
        rle = encode(mask)
        predicted.append(PredictedMask(slot=slot, phrase=f"thing {slot}", score=0.5, rle=rle))
    return FrameQueryRecord(
        image=f"clip-{frame:06d}",
        annotation=0,
        query_id=0,
        query=QUESTION,
        answer=fields.get("answer", "It is <MSK_0>."),
        presence=fields.get("presence", 0.5),
        slot_scores=fields.get("slot_scores", [0.5, 0.25]),
        masks=predicted,
        frame=frame,
        time=time,
        analysis="",
    )


def random_records(times: list[float]) -> list[list[FrameQueryRecord]]:
    """Answers with random masks in two slots, some of them without."""
    random = np.random.default_rng(0)
    frames = []
    for index, time in enumerate(times):
        masks = {}
        for slot in range(2):
            if random.random() < 0.8:
                masks[slot] = random.random((24, 32)) < 0.5
        scores = random.random(2).tolist()
        record = record_of(index, time, masks, presence=scores[0], slot_scores=scores)
        frames.append([record])
    return frames


def slowly_smoothed(frames: list[list[FrameQueryRecord]], seconds: float) -> list[dict]:
    """The rule of smoothing, pixel by pixel: presence, scores and masks of every frame."""
    results = []
    for index, (record,) in enumerate(frames):
        # Neighbors
        reach = 0
        for distance in (1, 2):
            if index - distance < 0 or index + distance >= len(frames):
                break
            times = [frames[place][0].time for place in (index - distance, index + distance)]
            if any(abs(time - record.time) > seconds + 1e-6 for time in times):
                break
            reach = distance
        window = [frame[0] for frame in frames[index - reach : index + reach + 1]]

        # Votes and means
        masks = {}
        for slot in range(2):
            votes = np.zeros((24, 32))
            for other in window:
                for mask in other.masks:
                    if mask.slot == slot:
                        votes += decode(mask.rle)
            if (votes > len(window) / 2).any():
                masks[slot] = votes > len(window) / 2
        results.append(
            {
                "presence": np.mean([other.presence for other in window]),
                "slot_scores": np.mean([other.slot_scores for other in window], axis=0),
                "masks": masks,
            }
        )
    return results


@pytest.mark.parametrize("seconds", [0, 0.1, 0.25, 9])
def test_smoothing_equals_a_slow_reference(seconds):
    times = [0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 1.6, 1.7, 1.8, 1.9, 2.0, 2.3]
    frames = random_records(times)
    expected = slowly_smoothed(frames, seconds)
    results = list(smoothed(frames, seconds))
    assert [before for before, _ in results] == frames
    for (before, (record,)), reference in zip(results, expected, strict=True):
        assert (record.answer, record.frame, record.time) == (
            before[0].answer,
            before[0].frame,
            before[0].time,
        )
        assert record.presence == pytest.approx(reference["presence"], abs=1e-6)
        np.testing.assert_allclose(record.slot_scores, reference["slot_scores"], atol=1e-9)
        assert {mask.slot for mask in record.masks} == reference["masks"].keys()
        for mask in record.masks:
            np.testing.assert_array_equal(decode(mask.rle), reference["masks"][mask.slot])


def test_smoothing_needs_two_frames_ahead_and_no_more():
    drawn = 0

    def frames() -> Iterator[list[FrameQueryRecord]]:
        nonlocal drawn
        for (record,) in random_records([index / 10 for index in range(20)]):
            drawn += 1
            yield [record]

    results = smoothed(frames(), 0.25)
    for index in range(18):
        next(results)
        assert drawn == min(index + 3, 20)


def test_a_mask_that_is_gone_for_one_frame_comes_back():
    mask = np.zeros((24, 32), bool)
    mask[4:10, 5:20] = True
    frames = [[record_of(index, index / 10, {} if index == 3 else {1: mask})] for index in range(7)]
    results = [after for _, (after,) in smoothed(frames, 0.25)]
    assert [len(record.masks) for record in results] == [1] * 7
    assert results[3].masks[0].phrase == "thing 1"
    np.testing.assert_array_equal(decode(results[3].masks[0].rle), mask)
    assert majority([encode(mask), encode(~mask)], 2) is None


def test_flicker_is_measured_between_neighbors():
    left = np.zeros((24, 32), bool)
    left[:, :16] = True
    half = left.copy()
    half[:12] = False
    flicker = Flicker()
    for masks, answer in (
        ({0: left}, "a"),
        ({0: half}, "a"),
        ({}, "b"),
        ({}, "b"),
        ({1: half}, "a"),
    ):
        flicker.update(record_of(0, 0, masks, answer=answer))
    assert flicker.num_pairs == 4
    assert flicker.answer_changes == 2
    assert flicker.presence_flips == 2
    assert flicker.mask_iou() == pytest.approx((0.5 + 0 + 0) / 3)
    assert Flicker().mask_iou() is None


# Writing


@needs_both
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_video_of_odd_size_is_written_and_read(drawings, tmp_path, library):
    path = tmp_path / "odd.mp4.part"
    pictures = [picture(drawings, index, 119, 159) for index in range(30)]
    with video_file(path, (119, 159), Pace(RATE, True), library=library) as writer:
        for index, pixels in enumerate(pictures):
            writer.add(index / RATE, pixels)
    path = path.rename(tmp_path / "odd.mp4")
    frames = list(read_frames(path, library="PyAV"))
    assert [number_in(frame.pixels) for frame in frames] == list(range(30))
    np.testing.assert_allclose([frame.time for frame in frames], even_times(30), atol=1e-3)
    assert frames[0].pixels.shape == (120, 160, 3)
    assert np.abs(frames[5].pixels[:119, :159].astype(int) - pictures[5]).mean() < 8
    assert codec_of(path) == "h264"


def codec_of(path: Path) -> str:
    import av

    with av.open(str(path)) as container:
        return container.streams.video[0].codec_context.name


@needs_both
def test_a_video_of_uneven_pace_keeps_its_times(drawings, tmp_path):
    times = [0, 0.1, 0.5, 0.6, 2.0]
    pace = Pace.of(iter(times))
    assert pace == (2.0, False)
    assert Pace.of(iter([0.0, 0.033, 0.067, 0.1])).is_even
    assert Pace.of(iter([0.0]), 0.5) == (0.5, True)
    with video_file(tmp_path / "uneven.mp4", (120, 160), pace) as writer:
        for index, time in enumerate(times):
            writer.add(time, picture(drawings, index, 120, 160))
    read = [frame.time for frame in read_frames(tmp_path / "uneven.mp4")]
    np.testing.assert_allclose(read, times, atol=1e-3)


def test_pictures_have_one_size_whatever_is_said():
    pictures = FramePictures(120, 160)
    mask = np.zeros((120, 160), bool)
    mask[30:90, 40:120] = True
    frame = np.zeros((120, 160, 3), np.uint8)
    short = pictures.draw(frame, record_of(0, 0, {}))
    long = pictures.draw(frame, record_of(0, 0, dict.fromkeys(range(6), mask), answer="word " * 90))
    assert short.shape == long.shape == (*pictures.size, 3)
    assert short.shape[1] == 640
    assert (short[:480] == 0).all()
    assert (long[240, 320] != 0).any()
    assert (long[480:, -8:] == 255).all()  # no word runs out of it


# Clips as a whole


class Painter:
    """Answers as a predictor does, and paints the bars of a frame's number as its mask.

    Args:
        end_at: raise `KeyboardInterrupt` in place of this answer.
    """

    batch_size = 4

    def __init__(self, end_at: int | None = None) -> None:
        self.about = {"checkpoint": "none"}
        self.num_answers = 0
        self.end_at = end_at

    def iterate(self, photos: Iterator[Photo]) -> Iterator[PhotoResult | UserError]:
        for photo in photos:
            if self.num_answers == self.end_at:
                raise KeyboardInterrupt
            self.num_answers += 1
            yield self._answer(photo)

    def _answer(self, photo: Photo) -> PhotoResult:
        pixels = np.asarray(photo.read())
        number = number_in(pixels)
        mask = np.zeros(pixels.shape[:2], bool)
        mask[20 : 60 + number % 3, 20:80] = number % 7 != 3
        answers = []
        for index, question in enumerate(photo.questions):
            rle = encode(mask)
            masks = [PredictedMask(slot=0, phrase="it", score=0.5, rle=rle)] if mask.any() else []
            record = QueryRecord(
                image=photo.name,
                annotation=index,
                query_id=0,
                query=question,
                answer=f"The number is {number // 50}.",
                presence=0.9 if masks else 0.1,
                slot_scores=[0.9 if masks else 0.1],
                masks=masks,
            )
            answers.append(Answer(record, photo))
        return PhotoResult(
            source=photo,
            size=pixels.shape[:2],
            record=ImageRecord(image=photo.name, analysis=f"Frame {number}."),
            depth=np.zeros((2, 2), np.float32),
            answers=answers,
        )


@needs_both
def test_300_frames_give_300_lines_with_their_times(drawings, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", drawings, even_times(300))
    painter = Painter()
    result = video.predict_video(painter, clip, QUESTION, out=tmp_path / "out", every=None)

    # Lines
    lines = [json.loads(line) for line in result.lines.read_text().splitlines()]
    assert len(lines) == painter.num_answers == 300
    np.testing.assert_allclose([line["time"] for line in lines], even_times(300), atol=1e-6)
    assert [line["frame"] for line in lines] == list(range(300))
    assert [line["analysis"] for line in lines] == [f"Frame {index}." for index in range(300)]
    records = read_records(result.lines)
    assert len({record.key for record in records}) == 300
    assert records[7].query == QUESTION

    # Flicker: masks that are gone for one frame in seven are filled in
    (report,) = json.loads(result.report.read_text())["questions"]
    assert report["neighboring_frames"] == 299
    assert report["answer_changes"] == 5
    assert report["presence_flips"] == {"before": 86, "after": 0}
    assert report["mask_iou"]["before"] < 0.75
    assert report["mask_iou"]["after"] > 0.95
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"clip.answers.jsonl", "clip.frames.jsonl", "clip.flicker.json"}


@needs_both
def test_a_video_has_every_answered_frame(clip, tmp_path):
    questions = [QUESTION, "And the knife?"]
    result = video.predict_video(
        Painter(), clip, questions, out=tmp_path / "out", every=None, save_video=True
    )
    assert [path.name for path in result.videos] == ["clip-1.mp4", "clip-2.mp4"]
    shown = list(read_frames(clip))
    for path in result.videos:
        frames = list(read_frames(path, library="PyAV"))
        np.testing.assert_allclose([frame.time for frame in frames], even_times(20), atol=1e-3)
        assert codec_of(path) == "h264"

        # The frame is enlarged, and its mask has the color of its slot
        pixels = frames[5].pixels
        assert number_in(pixels[:480:4, :640:4]) == 5
        inside = shown[5].pixels[25:55, 25:75].mean((0, 1))
        expected = 0.58 * inside + 0.42 * np.array([255, 45, 149])  # slot 0
        np.testing.assert_allclose(pixels[100:220, 100:300].mean((0, 1)), expected, atol=8)
        assert (pixels[480:] > 200).mean() > 0.7  # the caption
        assert (pixels[480:] < 100).any()
    assert not list((tmp_path / "out").glob("*.part"))


@needs_both
def test_without_smoothing_lines_are_what_the_model_said(clip, tmp_path):
    results = {}
    for smooth in (0.0, 0.25):
        painter = Painter()
        results[smooth] = video.predict_video(
            painter, clip, [QUESTION, "And the knife?"], out=tmp_path / "out", every=None,
            smooth=smooth,
        )  # fmt: skip
        assert painter.num_answers == (0 if smooth else 20)  # the second time they are there
        frames = list(read_lines(results[smooth].lines, 2))
        assert [record.annotation for records in frames for record in records] == [0, 1] * 20
        (raw,) = list((tmp_path / "out").glob("*.answers.jsonl"))
        said = list(read_lines(raw, 2, num_skipped=1))
        assert (frames == said) == (not smooth)
    flickers = [result.flicker["questions"][1] for result in results.values()]
    assert flickers[0]["presence_flips"] == {"before": 6, "after": 6}
    assert flickers[1]["presence_flips"] == {"before": 6, "after": 0}


@needs_both
def test_without_questions_frames_are_analyzed(clip, tmp_path):
    result = video.predict_video(Painter(), clip, out=tmp_path / "out", every=0.5, save_video=True)
    images = read_records(result.lines)
    assert [record.analysis for record in images] == [f"Frame {i}." for i in (0, 5, 10, 15)]
    (path,) = result.videos
    assert path.name == "clip-analysis.mp4"
    assert [round(frame.time, 3) for frame in read_frames(path)] == [0, 0.5, 1.0, 1.5]
    assert result.flicker["questions"] == []


@needs_both
@pytest.mark.parametrize("end_at", [0, 7])
def test_what_was_ended_goes_on(clip, tmp_path, end_at):
    whole = video.predict_video(Painter(), clip, QUESTION, out=tmp_path / "whole", every=None)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        video.predict_video(Painter(end_at), clip, QUESTION, out=out, every=None)
    assert {file.name for file in out.iterdir()} <= {"clip.answers.jsonl"}

    # A line that is half written does not count
    if end_at:
        with (out / "clip.answers.jsonl").open("a") as file:
            file.write('{"kind": "query", "ima')
    painter = Painter()
    result = video.predict_video(painter, clip, QUESTION, out=out, every=None, save_video=True)
    assert painter.num_answers == 20 - end_at
    assert result.lines.read_bytes() == whole.lines.read_bytes()
    assert result.report.read_bytes() == whole.report.read_bytes()
    assert len(list(read_frames(result.videos[0]))) == 20

    # Nothing is left to do, and nothing else is mixed in
    painter = Painter()
    again = video.predict_video(painter, clip, QUESTION, out=out, every=None, save_video=True)
    assert painter.num_answers == 0
    assert again == result
    with pytest.raises(UserError, match="holds answers with questions"):
        video.predict_video(painter, clip, "Where is the knife?", out=out, every=None)


def arguments_of(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    video.add_arguments(parser)
    arguments = parser.parse_args(words)
    arguments.save = ("jsonl",)
    return arguments


@needs_both
def test_bad_clips_cost_themselves_alone(drawings, clip, tmp_path, capsys):
    damaged = write_clip(tmp_path / "damaged.mp4", drawings, even_times(100))
    damage(damaged, 0.5)
    text = tmp_path / "text.mp4"
    text.write_text("This is no clip.")
    out = tmp_path / "out"
    arguments = arguments_of("--frames", "all", "--no-smooth")
    for _ in range(2):
        files = [damaged, text, clip]
        errors = video.run(arguments, Painter(), files, [(QUESTION,), (), (QUESTION,)], out)
        assert len(errors) == 2
        assert "'text.mp4'" in errors[1].replace(f"{tmp_path}{os.sep}", "")
        assert "damaged after frame" in errors[0]
    assert len(read_records(out / "clip.frames.jsonl")) == 20
    num_answered = len(read_records(out / "damaged.frames.jsonl"))
    assert 10 < num_answered < 100
    assert json.loads((out / "damaged.flicker.json").read_text())["damage"] == errors[0]
    assert not list(out.glob("text.*"))
    printed = capsys.readouterr().out
    assert "20 frames" in printed
    assert "pairs of neighboring frames" in printed


@pytest.mark.parametrize(
    "words", [("--every", "0"), ("--every", "nan"), ("--smooth", "x"), ("--frames", "some")]
)
def test_wrong_options_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        arguments_of(*words)
    assert words[1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clip.mp4", {"every": 0}, "every is 0"),
        ("clip.mp4", {"every": float("nan")}, "every is nan"),
        ("clip.mp4", {"smooth": -1}, "smooth is -1"),
        (f"{'c' * 210}.mp4", {}, "too long"),
        ("\udcff.mp4", {}, "not UTF-8"),
        ("clip.mp4", {"out": Path(__file__)}, "cannot make folder"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, name, options, message):
    options = {"out": tmp_path, **options}
    with pytest.raises(UserError, match=message):
        video.predict_video(Painter(), tmp_path / name, QUESTION, **options)


@needs_both
def test_a_model_answers_a_clip(trained, clip, tmp_path):
    predictor = Predictor.from_run(trained, device="cpu")
    result = video.predict_video(
        predictor, clip, QUESTION, out=tmp_path / "out", every=0.5, save_video=True
    )
    records = read_records(result.lines)
    assert [record.image for record in records] == [f"clip-{i:06d}" for i in (0, 5, 10, 15)]
    frames = [frame.pixels for frame in read_frames(clip, 0.5)]
    for record, answered in zip(records, predictor.predict(frames, QUESTION), strict=True):
        assert record.answer == answered.answers[0].text
        assert record.masks == answered.answers[0].record.masks
    assert len(list(read_frames(result.videos[0]))) == 4


@needs_both
def test_the_command_answers_clips_beside_photos(
    trained, scenes, clip, drawings, tmp_path, monkeypatch, capsys
):
    (photo, *_) = sorted((scenes / "RGB").glob("*.jpg"))
    (tmp_path / "text.mp4").write_text("This is no clip.")
    out = tmp_path / "out"
    words = ["predict", trained, photo, clip, tmp_path / "text.mp4", "--ask", QUESTION]
    words += ["--frames", "all", "--out", out, "--save", "overlay,video", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["annexe", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if "text.mp4" in line]
    assert "cannot read clip" in line
    assert "20 frames" in printed.out
    assert len(read_records(out / "clip.frames.jsonl")) == 20
    assert len(list(read_frames(out / "clip-1.mp4"))) == 20
    assert len(read_records(out / "predictions.jsonl")) == 2
