"""Drafts of the next tokens, learned from earlier responses.

What a trained model says follows few patterns, so that the next tokens can often be told from the
last two. Decoding verifies several drafted tokens in one step (speculative decoding, arXiv
2211.17192) and keeps those that greedy decoding would have chosen. Drafts are therefore free to be
wrong: they change how many steps a response takes, and the response itself only where rounding
decides between two tokens.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

# Probability, of all drafted tokens together, below which no further one is drafted. Higher or
# lower thresholds made the decoding of tiny models slower.
_MIN_PROBABILITY = 0.5
# Pairs of tokens whose followers are counted; beyond that no further pair is learned.
_MAX_PAIRS = 100_000
# What stands for the token before the first one.
_BEFORE_FIRST = -1

Pair = tuple[bool, int, int]  # whether the response answers a query, and two tokens


class DraftTable:
    """Which token most often followed two others, in analyses and in answers.

    Args:
        max_tokens: tokens of a draft at most.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
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
            if probability < _MIN_PROBABILITY:
                break
            drafted.append(follower)
            previous = token
            token = follower
        return drafted
