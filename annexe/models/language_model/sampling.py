"""Random choice of tokens, with a seed for each response.

The random numbers are a function of seed, position and token alone (SplitMix64, OOPSLA 2014). What
is drawn for a response therefore does not depend on the responses beside it, on which of them are
finished, or on the device, and a CUDA graph of a step draws anew whenever it is replayed.

Legend: R responses, V words and placeholders.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The signed integer of the same 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST_FACTOR = _signed(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = _signed(0x94D049BB133111EB)
_NUM_BITS = 23  # of a random number: with half a step more, a float32 still holds it exactly


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn.

    Attributes:
        temperature: logits are divided by it; above 0.
        seeds: int64[R], one for each response.
    """

    temperature: float
    seeds: Tensor


def mix(values: Tensor) -> Tensor:
    """Hash every integer of int64[...] to 64 random bits, as SplitMix64 does."""
    values = (values ^ _shifted(values, 30)) * _FIRST_FACTOR
    values = (values ^ _shifted(values, 27)) * _SECOND_FACTOR
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, num_bits: int) -> Tensor:
    """Shift right without the sign, which torch would repeat."""
    return (values >> num_bits) & ((1 << (64 - num_bits)) - 1)


def split_seeds(seeds: Tensor, number: int) -> Tensor:
    """Seeds of ``number`` independent streams out of each seed.

    Args:
        seeds: int64[...].
        number: of streams.

    Returns:
        int64[..., number].
    """
    streams = torch.arange(1, number + 1, device=seeds.device)
    return mix(seeds[..., None] + _GAMMA * streams)


def uniform(seeds: Tensor, position: Tensor, number: int) -> Tensor:
    """Random numbers above 0 and below 1.

    Args:
        seeds: int64[R].
        position: int64[1], which of a seed's rows of numbers.
        number: of numbers in a row.

    Returns:
        float32[R, number].
    """
    rows = mix(seeds + _GAMMA * (position + 1))
    bits = _shifted(split_seeds(rows, number), 64 - _NUM_BITS)
    return (bits.float() + 0.5) / (1 << _NUM_BITS)


def choose(logits: Tensor, seeds: Tensor, position: Tensor, temperature: float) -> Tensor:
    """Draw a token of each response, by the largest logit after Gumbel noise.

    Args:
        logits: float[R, V].
        seeds: int64[R].
        position: int64[1], tokens of each response so far.
        temperature: logits are divided by it.

    Returns:
        int64[R].
    """
    noise = -uniform(seeds, position, logits.shape[-1]).log().neg().log()
    return (logits.float() / temperature + noise).argmax(-1)
