"""Keys and values that generation keeps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from annexe.structures.batch import PackedText


@dataclass
class PrefillCache:
    """KV cache of one layer as the prefill leaves it: rotated, K x N x D for each image."""

    keys: Tensor | None = None
    values: Tensor | None = None


@dataclass
class Memory:
    """KV cache of one layer while decoding: the prefix, shared by an image's responses, and their own tokens."""

    prefix_keys: Tensor  # [B, K, P, D]
    prefix_values: Tensor
    own_keys: Tensor  # [R, K, M, D]
    own_values: Tensor


@dataclass
class DecodeIndex:
    """Where the responses that are being decoded belong, the same in all layers."""

    image: Tensor  # int64[R]
    place: Tensor  # int64[R], number of the response among those of its image
    row: Tensor  # int64[B, most], which response is an image's first, second, ...; -1 = none
    seen: Tensor  # bool[R, M], tokens of a response that are there, the new one included
    column: Tensor  # int64[1], that of the new token


@dataclass
class Prefill:
    """Prompts that were read."""

    text: PackedText
    hidden: Tensor  # float[B, N, D]
    kept: list[PrefillCache]  # of every layer
