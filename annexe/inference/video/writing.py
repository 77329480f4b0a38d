"""Pictures to an MP4 file with H.264: TorchCodec first, PyAV where that fails.

Legend: h x w pixels of a picture.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from annexe.errors import UserError
from annexe.inference.video.reading import has_pyav, has_torchcodec, in_short

log = logging.getLogger(__name__)

_QUALITY = 23  # constant rate factor of H.264: 18 looks like the original, 28 is rough
_PRESET = "veryfast"
_TICKS = 90_000  # a second, for times of pictures
_UNEVEN = 1.5  # gaps between pictures are even as long as none is that many times another


class Pace(NamedTuple):
    """How pictures follow each other.

    Attributes:
        rate: pictures a second, in the mean.
        is_even: that is their rate everywhere, but for the rounding of times.
    """

    rate: float
    is_even: bool

    @classmethod
    def of(cls, times: Iterator[float], default: float = 1.0) -> Pace:
        """The pace of pictures by their times in seconds; ``default`` is the rate of one."""
        first = last = next(times)
        num_gaps = 0
        shortest = float("inf")
        longest = 0.0
        for time in times:
            shortest = min(shortest, time - last)
            longest = max(longest, time - last)
            last = time
            num_gaps += 1
        if not num_gaps or last <= first:
            return cls(default, True)
        return cls(num_gaps / (last - first), longest < _UNEVEN * shortest)


class VideoWriter(Protocol):
    """An open file to which pictures are added."""

    def add(self, time: float, pixels: np.ndarray) -> None:
        """Add the next picture, uint8[h, w, 3], shown from a time in seconds on."""

    def close(self) -> None:
        """Write what is left."""


@contextmanager
def video_file(
    path: Path, size: tuple[int, int], pace: Pace, *, library: str | None = None
) -> Iterator[VideoWriter]:
    """Open an MP4 file for pictures; it is whole when the block has ended.

    H.264 wants even sides: an odd one gets its last row or column twice.

    Args:
        path: the file, with any ending; `annexe.files.replaced` gives one.
        size: height and width of every picture.
        pace: of the pictures.
        library: ``TorchCodec`` or ``PyAV``, to use that one alone.

    Raises:
        UserError: no library can write it.
    """
    writer = _open(path, size, pace, library)
    try:
        yield writer
    except BaseException:
        with suppress(Exception):  # the first error counts
            writer.close()
        raise
    writer.close()


def _open(path: Path, size: tuple[int, int], pace: Pace, library: str | None) -> VideoWriter:
    """The first writer that can open the file.

    Raises:
        UserError: none can.
    """
    # TorchCodec knows one rate for all pictures, PyAV a time for each
    found: dict[str, type[_TorchCodecWriter] | type[_PyAVWriter]] = {}
    if library in (None, "TorchCodec") and has_torchcodec():
        found["TorchCodec"] = _TorchCodecWriter
    if library in (None, "PyAV") and has_pyav():
        found["PyAV"] = _PyAVWriter
    if not pace.is_even:
        found = dict(reversed(found.items()))
    if not found:
        raise UserError(
            f"video '{path.name}' needs {library or 'TorchCodec or PyAV'} to be written; "
            'run pip install "annexe[video]"'
        )

    # One may come without an encoder for H.264
    for name, writer in found.items():
        try:
            opened = writer(path, size, pace)
        except UserError as error:
            reason = error
            continue
        if name == "TorchCodec" and not pace.is_even:
            log.warning("pictures of '%s' come at their mean rate; PyAV keeps times", path.name)
        return opened
    raise reason


def even(pixels: np.ndarray) -> np.ndarray:
    """A picture, uint8[h, w, 3], with its last row and column twice where they are odd."""
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Give the errors of both libraries as one line.

    Raises:
        UserError: for any of them.
    """
    try:
        yield
    except Exception as error:  # those of PyAV are of a dozen kinds
        raise UserError(
            f"cannot write video '{path}' ({in_short(error)}); check the room on the disk, and "
            'that FFmpeg has H.264 (pip install "annexe[video]" brings one that has)'
        ) from None


class _TorchCodecWriter:
    """Writes with TorchCodec; times are those of an even pace."""

    def __init__(self, path: Path, size: tuple[int, int], pace: Pace) -> None:
        self.path = path
        height, width = size
        self.file = path.open("wb")
        with _explained(path):
            from torchcodec.encoders import Encoder  # not in early releases

            self.encoder = Encoder()
            self.stream = self.encoder.add_video(
                height=height + height % 2,
                width=width + width % 2,
                frame_rate=pace.rate,
                device="cpu",
                codec="libx264",
                pixel_format="yuv420p",
                crf=_QUALITY,
                preset=_PRESET,
            )
            self.encoder.open_file_like(self.file, format="mp4")

    def add(self, time: float, pixels: np.ndarray) -> None:
        import torch

        frame = torch.from_numpy(even(pixels)).permute(2, 0, 1)[None]  # [1, 3, h, w]
        with _explained(self.path):
            self.stream.add_frames(frame)

    def close(self) -> None:
        with self.file, _explained(self.path):
            self.encoder.close()


class _PyAVWriter:
    """Writes with PyAV; every picture has its own time."""

    def __init__(self, path: Path, size: tuple[int, int], pace: Pace) -> None:
        import av

        self.path = path
        height, width = size
        with _explained(path):
            self.container = av.open(str(path), "w", format="mp4")
            rate = Fraction(pace.rate).limit_denominator(1001)
            options = {"crf": str(_QUALITY), "preset": _PRESET}
            self.stream: Any = self.container.add_stream("libx264", rate=rate, options=options)
            self.stream.height = height + height % 2
            self.stream.width = width + width % 2
            self.stream.pix_fmt = "yuv420p"
            self.stream.codec_context.time_base = Fraction(1, _TICKS)

    def add(self, time: float, pixels: np.ndarray) -> None:
        import av

        frame = av.VideoFrame.from_ndarray(even(pixels), format="rgb24")
        frame.pts = round(time * _TICKS)
        frame.time_base = Fraction(1, _TICKS)
        with _explained(self.path):
            self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        with _explained(self.path):
            self.container.mux(self.stream.encode(None))
            self.container.close()
