"""What generated answers have to name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class DecodingConstraints:
    """Constraints of greedy decoding: what responses have to name."""

    silent: Tensor  # bool[R], no word is to be said
    slots: (
        Tensor | None
    )  # bool[R, S], each is named once and no other; None leaves the responses free
    refusals: tuple[
        int, ...
    ] = ()  # tokens that open a refusal, which no response that names a slot begins with
