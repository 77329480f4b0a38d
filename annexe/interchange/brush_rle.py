"""Label Studio's run-length code of brush strokes.

It is no code of COCO: a stream of bits, highest bit first, that holds the red, green, blue and
alpha value of every pixel, row by row. The mask is the alpha channel. Label Studio's editor packs
it with the JavaScript library rle-pack of the project umbrella.

    32 bits     number of values: 4 x pixels
    5 bits      width of a value in bits, less 1
    4 x 4 bits  the four widths that a length may have in bits, each less 1
    blocks      1 bit: 1 = one value repeated, 0 = as many values as follow
                2 bits: which width the length has
                the length, less 1
                the value or the values

Legend: H, W height and width of the photo.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

_VALUE_BITS = 8
_LENGTH_BITS = (3, 4, 8, 16)  # the four widths that Label Studio's own converter writes
_MAX_LENGTH = 1 << max(_LENGTH_BITS)


def encode_brush(mask: np.ndarray) -> list[int]:
    """Encode a mask.

    Args:
        mask: bool[H, W].

    Returns:
        The bits in groups of 8, as numbers from 0 to 255.
    """
    # Head
    num_values = 4 * mask.size
    bits = [f"{num_values:032b}", f"{_VALUE_BITS - 1:05b}"]
    bits += [f"{width - 1:04b}" for width in _LENGTH_BITS]

    # Runs of pixels, row by row; all four channels have the same value
    flat = mask.reshape(-1)
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = 4 * np.diff(starts, append=flat.size)
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        value = f"{255 * int(flat[start]):08b}"
        for first in range(0, length, _MAX_LENGTH):
            bits.append(_repeated(min(length - first, _MAX_LENGTH)) + value)

    # To whole bytes
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def _repeated(length: int) -> str:
    """The bits of a block of one value repeated, up to the value."""
    which = next(i for i, width in enumerate(_LENGTH_BITS) if length <= 1 << width)
    return f"1{which:02b}{length - 1:0{_LENGTH_BITS[which]}b}"


def decode_brush(code: Iterable[int], size: tuple[int, int]) -> np.ndarray:
    """Decode a mask.

    The editor draws soft edges, and scripts write 1 for 255: a pixel is inside if its alpha is at
    least half of the largest one.

    Args:
        code: numbers from 0 to 255.
        size: height and width of the photo.

    Returns:
        bool[H, W].

    Raises:
        ValueError: what is wrong with the code, to stand behind "the brush code".
    """
    # Head
    try:
        bits = _Bits(bytes(list(code)))
    except (TypeError, ValueError):
        raise ValueError("is no list of numbers from 0 to 255") from None
    num_values = bits.number(32)
    width = bits.number(5) + 1
    length_widths = [bits.number(4) + 1 for _ in range(4)]
    height_of_photo, width_of_photo = size
    if num_values != 4 * height_of_photo * width_of_photo:
        raise ValueError(
            f"holds {num_values} values, not 4 x {width_of_photo} x {height_of_photo}; it may be a "
            "code of COCO, or of another photo"
        )

    # Blocks
    values = np.empty(num_values, np.uint8 if width <= _VALUE_BITS else np.int64)
    start = 0
    while start < num_values:
        is_repeated = bits.number(1)
        end = start + bits.number(length_widths[bits.number(2)]) + 1
        if end > num_values:
            raise ValueError("is damaged: its blocks hold more values than its head says")
        if is_repeated:
            values[start:end] = bits.number(width)
        else:
            values[start:end] = bits.numbers(width, end - start)
        start = end
    alpha = values[3::4].reshape(size).astype(np.int64)
    return (alpha > 0) & (2 * alpha >= alpha.max())


class _Bits:
    """Reads numbers from a stream of bits, highest bit first.

    Args:
        code: the stream.

    Raises:
        ValueError: from its methods, where the stream ends too early.
    """

    def __init__(self, code: bytes) -> None:
        self.bits = np.unpackbits(np.frombuffer(code, np.uint8))
        self.code = code
        self.position = 0

    def number(self, width: int) -> int:
        """The number in the next ``width`` bits."""
        first, end = self._advance(width)
        last_byte = -(-end // 8)
        whole = int.from_bytes(self.code[first // 8 : last_byte], "big")
        return (whole >> (8 * last_byte - end)) & ((1 << width) - 1)

    def numbers(self, width: int, count: int) -> np.ndarray:
        """The next ``count`` numbers of ``width`` bits each, int64[count]."""
        first, end = self._advance(width * count)
        rows = self.bits[first:end].reshape(count, width)
        return rows @ (np.int64(1) << np.arange(width - 1, -1, -1, dtype=np.int64))

    def _advance(self, num_bits: int) -> tuple[int, int]:
        """Where the next bits begin and end; the stream goes on behind them."""
        first = self.position
        self.position += num_bits
        if self.position > len(self.bits):
            raise ValueError("is cut short")
        return first, self.position
