"""Drafts of the next tokens, learned from earlier responses.

What a trained model says follows few patterns, so that the next tokens can often be told from the
last two. Decoding verifies several drafted tokens in one step (speculative decoding, arXiv
2211.17192) and keeps those that greedy decoding would have chosen. Drafts are therefore free to be
wrong: they change how many steps a response takes, and the response itself only where rounding
decides between two tokens.

On a GPU a step always takes the same number of tokens, and drafts are looked up on the device, so
that no step waits for the host:

    host:    learn responses -> drafts of the pairs of tokens in them -> copy to the device
    device:  pair of tokens -> place, the remainder of its key -> the draft there, if the key is its
"""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Probability below which no further token is drafted on a CPU. Higher or lower thresholds made the
# decoding of tiny models slower.
_MIN_PROBABILITY = 0.5
# Pairs of tokens whose followers are counted; beyond that no further pair is learned.
_MAX_PAIRS = 100_000
# What stands for the token before the first one.
_BEFORE_FIRST = -1
# Places for drafts on a device, a prime. Of pairs that share a place the last one keeps it.
_NUM_PLACES = 131_071

Pair = tuple[bool, int, int]  # whether the response answers a query, and two tokens


class DraftTable:
    """Which token most often followed two others, in analyses and in answers.

    Args:
        max_tokens: tokens of a draft at most.
        min_probability: of all drafted tokens together, below which no further one is drafted.
    """

    def __init__(self, max_tokens: int, min_probability: float = _MIN_PROBABILITY) -> None:
        self.max_tokens = max_tokens
        self.min_probability = min_probability
        self.followers: dict[Pair, Counter[int]] = defaultdict(Counter)
        self.drafts: dict[Pair, list[int]] = {}  # those that were asked for since `learn`

    def learn(self, answers_query: bool, tokens: list[int]) -> None:
        """Count what follows what in a response.

        Args:
            answers_query: whether it answers a query; else it is an analysis.
            tokens: the response, with its end if that is to be drafted as well.
        """
        self.drafts.clear()
        previous = _BEFORE_FIRST
        for token, follower in pairwise(tokens):
            pair = (answers_query, previous, token)
            if pair in self.followers or len(self.followers) < _MAX_PAIRS:
                self.followers[pair][follower] += 1
            previous = token

    def draft(self, answers_query: bool, tokens: list[int]) -> list[int]:
        """The tokens that probably follow.

        Args:
            answers_query: whether the response answers a query.
            tokens: its tokens so far, at least one; only the last two are looked at.

        Returns:
            Token ids, at most ``max_tokens``; none where no follower is likely enough.
        """
        previous = tokens[-2] if len(tokens) > 1 else _BEFORE_FIRST
        pair = (answers_query, previous, tokens[-1])
        if pair not in self.drafts:
            self.drafts[pair] = self._follow(pair)
        return self.drafts[pair]

    def _follow(self, pair: Pair) -> list[int]:
        """`draft`, by following the most frequent tokens."""
        answers_query, previous, token = pair
        drafted: list[int] = []
        probability = 1.0
        while len(drafted) < self.max_tokens:
            followers = self.followers.get((answers_query, previous, token))
            if followers is None:
                break
            follower, count = followers.most_common(1)[0]
            probability *= count / followers.total()
            if probability < self.min_probability:
                break
            drafted.append(follower)
            previous = token
            token = follower
        return drafted


class DeviceDraftTable(DraftTable):
    """`DraftTable` whose drafts are looked up on a device, and are always of the full length.

    Args:
        max_tokens: tokens of every draft.
        num_words: ids of tokens are smaller.
        device: where it is.
    """

    def __init__(self, max_tokens: int, num_words: int, device: torch.device) -> None:
        super().__init__(max_tokens, min_probability=0.0)
        self.num_words = num_words
        self.changed: set[Pair] = set()  # pairs that were learned since `upload`
        self.keys = torch.full((_NUM_PLACES,), -1, device=device)
        self.tokens = torch.zeros(_NUM_PLACES, max_tokens, dtype=torch.long, device=device)

    def learn(self, answers_query: bool, tokens: list[int]) -> None:
        """As of `DraftTable`; `upload` makes it known to the device."""
        super().learn(answers_query, tokens)
        before = [_BEFORE_FIRST, *tokens]
        self.changed.update((answers_query, *pair) for pair in zip(before, tokens, strict=False))

    def upload(self) -> None:
        """Copy the drafts of the pairs that were learned to the device."""
        drafts: dict[int, tuple[int, list[int]]] = {}  # for each place a key and its draft
        for answers_query, previous, token in self.changed:
            drafted = self.draft(answers_query, [previous, token])
            if drafted:
                key = self._key(answers_query, previous, token)
                padding = [0] * (self.max_tokens - len(drafted))
                drafts[key % _NUM_PLACES] = (key, drafted + padding)
        self.changed.clear()
        if drafts:
            device = self.keys.device
            places = torch.tensor(list(drafts), device=device)
            keys, tokens = zip(*drafts.values(), strict=True)
            self.keys[places] = torch.tensor(keys, device=device)
            self.tokens[places] = torch.tensor(tokens, device=device)

    def look_up(
        self, answers_query: Tensor, previous: Tensor, token: Tensor, is_first: Tensor
    ) -> Tensor:
        """The tokens that probably follow, without waiting for the device.

        Args:
            answers_query: bool[R], whether each response answers a query.
            previous: int64[R], its last token but one.
            token: int64[R], its last token.
            is_first: bool[R], whether that is its first one, so that ``previous`` does not count.

        Returns:
            int64[R, max_tokens]; 0 where nothing is known.
        """
        previous = previous.masked_fill(is_first, _BEFORE_FIRST)
        key = self._key(answers_query, previous, token)
        place = key % _NUM_PLACES
        return self.tokens[place].masked_fill((self.keys[place] != key)[:, None], 0)

    def _key(self, answers_query: Any, previous: Any, token: Any) -> Any:
        """A number for each pair, of numbers or of tensors."""
        number = answers_query * (self.num_words + 1) + previous + 1  # the latter up to num_words
        return number * self.num_words + token
