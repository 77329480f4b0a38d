"""Frames of a clip, decoded one after the other: TorchCodec first, PyAV where that fails.

Both libraries are optional. Whichever reads a clip, its frames stand upright, are counted from 0
and have times that begin at 0: the difference to the first frame's time stamp.

Legend: H x W pixels of a frame.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from annexe.datasets.photos import MIN_SIDE
from annexe.errors import UserError

log = logging.getLogger(__name__)

ENDINGS = (
    ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts",
    ".wmv", ".flv", ".3gp", ".ogv",
)  # fmt: skip
_SAME_TIME = 1e-6  # seconds; times closer than that are equal
_MISSING = 0.5  # seconds that a header may promise too much, as where the sound is longer
_MISSING_SHARE = 0.02  # of the clip, likewise
_TS_PACKET = 188  # bytes, of an MPEG transport stream
_TORCHCODEC_ERRORS = (ValueError, RuntimeError, IndexError, AssertionError)
_SHOWN = 100  # characters of an error of a library
_FIX = "save it again as MP4 with H.264, or leave it out"


@dataclass(frozen=True)
class Frame:
    """A frame of a clip.

    Attributes:
        index: counts the frames of the clip from 0, in the order in which they are shown.
        time: seconds since the first frame.
        pixels: uint8[H, W, 3], RGB, upright.
    """

    index: int
    time: float
    pixels: np.ndarray


class ClipSize(NamedTuple):
    """What the header of a clip promises; any of it may be unknown or wrong.

    Attributes:
        num_frames: in the clip.
        seconds: that it takes.
    """

    num_frames: int | None
    seconds: float | None

    def num_asked(self, every: float | None) -> int | None:
        """About how many frames `read_frames` gives."""
        if every is None or self.seconds is None:
            return self.num_frames
        return math.ceil(self.seconds / every)


class DamagedClip(UserError):
    """A clip that can be read up to some frame and no further."""


@dataclass(frozen=True)
class _Decoded:
    """A frame whose pixels are converted to RGB only if somebody wants them."""

    index: int
    time: float
    pixels: Callable[[], np.ndarray]


class _Unreadable(Exception):
    """Why a library cannot read a clip at all, or no further than some frame."""


def is_video(path: Path) -> bool:
    """Whether a file is a clip, by the ending of its name."""
    return path.suffix.lower() in ENDINGS


def read_frames(
    path: Path, every: float | None = None, *, library: str | None = None
) -> Generator[Frame, None, None]:
    """Decode a clip frame by frame; what is in memory does not depend on its length.

    Args:
        path: the clip.
        every: seconds; only the frames that are shown at 0, ``every``, 2 x ``every`` and so on are
            given, each of them once. None gives all frames.
        library: ``TorchCodec`` or ``PyAV``, to use that one alone.

    Yields:
        The frames in the order in which they are shown.

    Raises:
        UserError: no library is installed, or the file is no clip.
        DamagedClip: after the frames that come before the damage.
    """
    with closing(_decoded(path, library)) as decoded:
        chosen = decoded if every is None else _shown_every(decoded, every)
        for frame in chosen:
            pixels = frame.pixels()
            height, width = pixels.shape[:2]
            if min(height, width) < MIN_SIDE:
                raise UserError(
                    f"clip '{path}' is {width} x {height}; no side may be below {MIN_SIDE} pixels"
                )
            yield Frame(frame.index, frame.time, pixels)


def _shown_every(frames: Iterator[_Decoded], every: float) -> Iterator[_Decoded]:
    """Those of the frames that are shown at a multiple of ``every``: see `read_frames`.

    A frame is shown until the next one comes, and the last one is taken to be shown as long as the
    one before it: libraries differ in what they say of its end.
    """
    due = 0  # the next multiple
    shown: _Decoded | None = None
    duration = 0.0
    for frame in frames:
        if shown is not None:
            duration = frame.time - shown.time
            if due * every < frame.time - _SAME_TIME:
                yield shown
                due = math.ceil((frame.time - _SAME_TIME) / every)
        shown = frame
    if shown is not None and (due == 0 or due * every < shown.time + duration - _SAME_TIME):
        yield shown


# Libraries


def _decoded(path: Path, library: str | None) -> Generator[_Decoded, None, None]:
    """All frames of a clip, by the first library that can give its first frame.

    Raises:
        UserError: none can.
        DamagedClip: after the frames that come before the damage.
    """
    # The first frame, by any library
    reasons = {}
    for name, decode in _installed(path, library).items():
        frames = decode(path)
        try:
            first = next(frames, None)
        except _Unreadable as error:
            reasons[name] = str(error)
            continue
        if first is not None:
            break
        reasons[name] = "it has no frames"
    else:
        why = next(reversed(reasons.values()))
        raise UserError(f"cannot read clip '{path}' ({why}); {_FIX}")

    # The others, by the same one
    if reasons:
        log.info("%s reads '%s', which others cannot (%s)", name, path, reasons)
    last = first
    try:
        for frame in chain([first], frames):
            yield frame
            last = frame
    except _Unreadable as error:
        raise DamagedClip(
            f"clip '{path}' is damaged after frame {last.index} at {last.time:.2f} s ({error}); "
            "what comes before is answered: repair the clip, or cut it there"
        ) from None


def _head_of(path: Path) -> bytes:
    """The first bytes of a clip.

    Raises:
        UserError: it is no file, an empty one, or cannot be read.
    """
    try:
        if not path.exists():
            raise UserError(f"no clip '{path}'; give video files")
        if not path.is_file():
            raise UserError(f"clip '{path}' is no file; give video files")
        with path.open("rb") as file:
            head = file.read(2 * _TS_PACKET + 5)
    except OSError as error:
        raise UserError(
            f"cannot read clip '{path}' ({error.strerror}); check that you may read it"
        ) from None
    if not head:
        raise UserError(f"clip '{path}' is empty; copy it again, or leave it out")
    return head


def _installed(path: Path, library: str | None) -> dict[str, Callable[[Path], Iterator[_Decoded]]]:
    """Libraries that can read a clip, in the order in which they are tried.

    Raises:
        UserError: there is none, or the clip is no file that can be read.
    """
    found: dict[str, Callable[[Path], Iterator[_Decoded]]] = {}
    head = _head_of(path)
    needed = library or "TorchCodec or PyAV"
    if _is_mpeg_stream(head):
        needed = "PyAV"  # of these TorchCodec finds half of the frames
    if needed != "PyAV" and has_torchcodec():
        found["TorchCodec"] = _by_torchcodec
    if needed != "TorchCodec" and has_pyav():
        found["PyAV"] = _by_pyav
    if not found:
        raise UserError(
            f"clip '{path}' needs {needed} to be read; run pip install \"annexe[video]\""
        )
    return found


def _is_mpeg_stream(head: bytes) -> bool:
    """Whether a file is an MPEG transport or program stream, by its first bytes."""
    is_transport = any(
        head[start : start + 1] == b"G" and head[start + size : start + size + 1] == b"G"
        for start, size in ((0, _TS_PACKET), (4, _TS_PACKET + 4))
    )
    return is_transport or head.startswith(b"\x00\x00\x01\xba")


def has_torchcodec() -> bool:
    """Whether TorchCodec is installed and finds an FFmpeg."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # the last two without FFmpeg
        log.debug("no TorchCodec: %s", error)
        return False
    return True


def has_pyav() -> bool:
    """Whether PyAV is installed."""
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


def clip_size(path: Path) -> ClipSize:
    """What the header of a clip says of its length; nothing where that cannot be read."""
    if has_torchcodec():
        from torchcodec.decoders import VideoDecoder

        try:
            metadata = VideoDecoder(path, seek_mode="approximate").metadata
            return ClipSize(metadata.num_frames, metadata.duration_seconds)
        except _TORCHCODEC_ERRORS:
            pass
    if has_pyav():
        import av

        try:
            with av.open(str(path)) as container:
                seconds = container.duration / av.time_base if container.duration else None
                num_frames = [stream.frames for stream in container.streams.video]
                return ClipSize(num_frames[0] or None if num_frames else None, seconds)
        except (av.FFmpegError, ValueError):
            pass
    return ClipSize(None, None)


def _by_torchcodec(path: Path) -> Iterator[_Decoded]:
    """Frames decoded by TorchCodec.

    They are asked for by their index: an approximate search, or the search for one time, gives
    wrong frames of a clip whose rate varies.

    Raises:
        _Unreadable: before the first frame or after the last good one.
    """
    from torchcodec.decoders import AudioDecoder, VideoDecoder

    try:
        decoder = VideoDecoder(
            path, dimension_order="NHWC", seek_mode="exact", num_ffmpeg_threads=0, device="cpu"
        )
    except _TORCHCODEC_ERRORS as error:
        # The error for a file with sound alone asks to report a bug
        try:
            AudioDecoder(path)
        except _TORCHCODEC_ERRORS:
            raise _Unreadable(in_short(error)) from None
        raise _Unreadable("it has sound, but no pictures") from None

    # TorchCodec passes over damage that FFmpeg paints over; PyAV tells of it
    checks = _checks_of_pyav(path) if has_pyav() else iter(())
    start = last = None
    for index in range(len(decoder)):
        next(checks, None)
        try:
            frame = decoder.get_frame_at(index)
        except _TORCHCODEC_ERRORS as error:
            raise _Unreadable(in_short(error)) from None
        if start is None:
            start = frame.pts_seconds
        yield _Decoded(index, frame.pts_seconds - start, frame.data.numpy)
        last = frame
    next(checks, None)
    if last is not None and start is not None:
        end = last.pts_seconds + last.duration_seconds - start
        _require_end(end, decoder.metadata.duration_seconds_from_header)


def _by_pyav(path: Path) -> Iterator[_Decoded]:
    """Frames decoded by PyAV.

    Raises:
        _Unreadable: before the first frame or after the last good one.
    """
    start: Fraction | None = None
    for index, frame in enumerate(_frames_of_pyav(path)):
        time = _time_of(frame)
        if start is None:
            start = time
        yield _Decoded(index, float(time - start), partial(_upright, frame))


def _checks_of_pyav(path: Path) -> Iterator[Any]:
    """Something for every frame that PyAV finds to be sound; nothing where it finds no frame.

    Raises:
        _Unreadable: after the last good frame.
    """
    frames = _frames_of_pyav(path)
    try:
        first = next(frames, None)
    except _Unreadable:  # a kind of clip that TorchCodec alone can read
        return
    yield first
    yield from frames


def _frames_of_pyav(path: Path) -> Iterator[Any]:
    """The frames of a clip as PyAV gives them, which are not converted to RGB.

    Raises:
        _Unreadable: before the first frame or after the last good one.
    """
    import av

    try:
        with av.open(str(path)) as container:
            stream: Any = container.streams.best("video")
            if stream is None:
                has_sound = bool(container.streams.audio)
                raise _Unreadable("it has sound, but no pictures" if has_sound else "no pictures")
            stream.thread_type = "AUTO"
            first: Any = None
            last: Any = None
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise _Unreadable("its data are corrupt")
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise _Unreadable("its data are corrupt")
                    first = first or frame
                    last = frame
                    yield frame

            # How long it should be
            if last is not None:
                end = _time_of(last) + last.duration * last.time_base - _time_of(first)
                promised = None
                if stream.duration:
                    promised = float(stream.duration * stream.time_base)
                elif container.duration:
                    promised = container.duration / av.time_base
                _require_end(float(end), promised)
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise _Unreadable(in_short(error)) from None


def _time_of(frame: Any) -> Fraction:
    """The time stamp of a frame of PyAV in seconds.

    Raises:
        _Unreadable: it has none.
    """
    stamp = frame.pts if frame.pts is not None else frame.dts
    if stamp is None:
        raise _Unreadable("its frames have no times")
    return stamp * frame.time_base


def _upright(frame: Any) -> np.ndarray:
    """The pixels of a frame of PyAV, which does not turn them as the camera says."""
    pixels = frame.to_ndarray(format="rgb24")
    quarter_turns = round(frame.rotation / 90) % 4  # to the left
    return np.ascontiguousarray(np.rot90(pixels, quarter_turns))


def _require_end(end: float, promised: float | None) -> None:
    """Refuse the end of a clip that comes well before its header says, in seconds.

    Raises:
        _Unreadable: it does.
    """
    if promised and promised - end > max(_MISSING, _MISSING_SHARE * promised):
        raise _Unreadable(f"it ends there, and takes {promised:.2f} s by its header")


def in_short(error: Exception) -> str:
    """The first line of a library's error, which goes on about the library's own code."""
    text = str(getattr(error, "strerror", None) or error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    return line[:_SHOWN]
