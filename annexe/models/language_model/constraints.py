"""Constrained decoding: answers that name exactly the slots that were found.

Legend: R responses, K slots, V words of the tokenizer, C tokens that are not always allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from annexe.models.language_model.tokenizer import TextTokenizer


@dataclass
class DecodingConstraints:
    """What greedy decoding lets each response say."""

    skip: Tensor  # bool[R], True = nothing is generated
    slots: Tensor | None  # bool[R, K], the slots that a response names once each; None = any
    # Tokens that open a refusal. A response that has to name a slot does not start with them.
    forbidden_first_tokens: tuple[int, ...] = ()


class SlotConstraint:
    """Masks the logits of tokens that would contradict the slots that a response has to name.

    As long as slots are left, a response can neither end nor open with a refusal. Placeholders are
    allowed in ascending order only, each of them once.

    Args:
        tokenizer: knows the ids of the placeholders and of the full stop.
        end_ids: tokens that end a response.
        forbidden_first_tokens: as in `DecodingConstraints`.
        device: where the logits are.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        end_ids: tuple[int, ...],
        forbidden_first_tokens: tuple[int, ...],
        device: torch.device,
    ) -> None:
        ends = list(dict.fromkeys([*end_ids, tokenizer.full_stop_id]))
        first = [token for token in forbidden_first_tokens if token not in ends]
        num_tokens = tokenizer.vocab_size + tokenizer.num_slots
        slots = list(range(tokenizer.vocab_size, num_tokens))
        self.columns = torch.tensor([*ends, *first, *slots], device=device)  # [C]
        self.is_first = torch.zeros(len(ends) + len(first), dtype=torch.bool, device=device)
        self.is_first[len(ends) :] = True

    def __call__(self, logits: Tensor, slots_left: Tensor, num_generated: Tensor) -> Tensor:
        """Set the logits of tokens that are not allowed to minus infinity.

        Args:
            logits: float[R, V + K], changed in place.
            slots_left: bool[R, K], slots that still have to be named.
            num_generated: int64[1], tokens of each response so far.

        Returns:
            float[R, V + K].
        """
        # A response that still has to name a slot must not end or refuse.
        forbidden = ~self.is_first | (num_generated == 0)
        forbidden = slots_left.any(1, keepdim=True) & forbidden  # [R, C - K]

        # Of the placeholders only the first one that is left is allowed.
        is_next = slots_left & (slots_left.cumsum(1) == 1)  # [R, K]
        forbidden = torch.cat([forbidden, ~is_next], dim=1)  # [R, C]
        allowed = logits[:, self.columns].masked_fill(forbidden, -torch.inf)
        return logits.index_copy_(1, self.columns, allowed)
