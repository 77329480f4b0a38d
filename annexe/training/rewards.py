"""What a drawn response is worth: parts of the reward by name, each from 0 to 1.

The parts are weighted by `RewardWeights` (`annexe.config`) and summed. A part that nothing is known
about, such as the slots of an analysis that is a free sentence, is absent.

Legend: B images, S image side, Q queries, K slots, M members of a group, h x w mask logits.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Set

import torch
import torch.nn.functional as F
from torch import Tensor

from annexe.metrics.analysis import SLOTS, judge_slots
from annexe.metrics.text import normalize
from annexe.prompts import NO_TARGET, number_placeholders, phrases_of
from annexe.structures.batch import Batch
from annexe.structures.rollouts import DrawnText

ANSWER_PARTS = ("answer_equal", "answer_f1", "refusal", "targets", "consistency", "format")
ANALYSIS_PARTS = ("analysis_equal", "analysis_f1", "analysis_slots", "format")
PRESENCE_PARTS = ("presence_iou", "presence_refusal")

_PLACEHOLDER = re.compile(r"<MSK_(\d+)>")
# Keeps advantages finite where all members of a group are as good
_EPSILON = 1e-4


# Words


def answer_parts(
    drawn: DrawnText, reference: str, present: Set[int], answer_format: str | None
) -> dict[str, float]:
    """The parts of an answer's reward.

    Args:
        drawn: the answer.
        reference: the true one.
        present: slots that have a mask, as the model is used.
        answer_format: ``sentence``, ``phrases``, or None for any.

    Returns:
        ``answer_equal``: whether it is the reference, as `normalize` compares them.
        ``answer_f1``: F1 of its words.
        ``refusal``: whether it refuses where the reference does, and only there.
        ``targets``: share of the named targets that are right, of all that it names or should.
        ``consistency``: whether it names the slots that have a mask, and no others.
        ``format``: whether it ends, and is written as answers are.
    """
    answer = drawn.text
    is_refusal = refuses(answer)
    named = named_slots(answer)
    agrees = named == present if named else is_refusal != bool(present)
    return {
        "answer_equal": float(normalize(answer) == normalize(reference)),
        "answer_f1": token_f1(answer, reference),
        "refusal": float(is_refusal == refuses(reference)),
        "targets": share_of_targets(answer, reference),
        "consistency": float(agrees),
        "format": float(drawn.has_ended and is_well_formed(answer, answer_format)),
    }


def analysis_parts(drawn: DrawnText, reference: str) -> dict[str, float]:
    """The parts of an analysis's reward.

    Args:
        drawn: the analysis.
        reference: the true one, not empty.

    Returns:
        ``analysis_equal`` and ``analysis_f1`` as of an answer; ``analysis_slots``: share of the
        slots that are right (`judge_slots`), if the true one can be read; ``format``: whether it
        ends.
    """
    parts = {
        "analysis_equal": float(normalize(drawn.text) == normalize(reference)),
        "analysis_f1": token_f1(drawn.text, reference),
        "format": float(drawn.has_ended),
    }
    right = judge_slots(drawn.text, reference)
    if right is not None:
        parts["analysis_slots"] = sum(right[slot] for slot in SLOTS) / len(SLOTS)
    return parts


def weighted(parts: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The reward: the weighted sum of its parts."""
    return sum(weights[name] * value for name, value in parts.items())


def refuses(answer: str) -> bool:
    """Whether an answer says that there is no target."""
    return normalize(answer) in {normalize(text) for text in NO_TARGET.values()}


def named_slots(answer: str) -> set[int]:
    """The slots that the placeholders of an answer name."""
    return {int(slot) for slot in _PLACEHOLDER.findall(number_placeholders(answer, []))}


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the words of two texts (SQuAD, EMNLP 2016); two empty texts agree."""
    predicted = normalize(prediction).split()
    true = normalize(reference).split()
    num_shared = (Counter(predicted) & Counter(true)).total()
    num_words = len(predicted) + len(true)
    return 2 * num_shared / num_words if num_words else 1.0


def share_of_targets(answer: str, reference: str) -> float:
    """Targets that are named right, of all that are named or should be.

    A target that is left out costs as much as one too many. Where there is none, naming none is 1.
    """
    named = phrases_of(answer)
    true = phrases_of(reference)
    if refuses(answer):
        named = {}
    num_right = 0
    for slot, phrase in true.items():
        num_right += slot in named and normalize(named[slot]) == normalize(phrase)
    most = max(len(named), len(true))
    return num_right / most if most else 1.0


def is_well_formed(answer: str, answer_format: str | None) -> bool:
    """Whether an answer is written as answers are.

    Args:
        answer_format: ``sentence``: a refusal, or names followed by the placeholders of slots 0, 1
            and so on, each once. ``phrases``: without placeholders. None: any text.
    """
    if refuses(answer) or not answer_format:
        return bool(answer.strip())
    if answer_format == "phrases":
        return bool(answer.strip()) and "<msk" not in answer.lower()
    slots = [int(slot) for slot in _PLACEHOLDER.findall(number_placeholders(answer, []))]
    phrases = phrases_of(answer)
    has_names = len(phrases) == len(slots) and all(phrases.values())
    return bool(slots) and slots == list(range(len(slots))) and has_names


# Presence


def presence_outcomes(masks: Tensor, batch: Batch) -> Tensor:
    """IoU of each query if its first 0, 1, ..., K slots have a target, and no others.

    It is that of all predicted and all true pixels of a query, at the size of the mask logits. Two
    empty masks agree.

    Args:
        masks: bool[Q, K, h, w].
        batch: with its truth.

    Returns:
        float32[Q, 1 + K].
    """
    # Truth: pixels of any target, averaged over the area of a pixel of the logits
    targets = batch.target_ids[batch.queries.image_index]  # [Q, S, S]
    true = torch.zeros_like(targets, dtype=torch.bool)
    for slot_ids in batch.slot_ids.unbind(1):  # [Q] each
        true |= (targets == slot_ids[:, None, None]) & (slot_ids > 0)[:, None, None]
    true = F.interpolate(true[:, None].float(), size=masks.shape[-2:], mode="area") >= 0.5

    # Unions of the first slots
    unions = masks.int().cummax(dim=1).values.bool()  # [Q, K, h, w]
    unions = torch.cat([torch.zeros_like(unions[:, :1]), unions], dim=1)  # [Q, 1 + K, h, w]
    intersection = (unions & true).flatten(2).sum(-1)
    union = (unions | true).flatten(2).sum(-1)
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0)


def effective_draws(draws: Tensor, has_pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What the draws of presence lead to.

    Targets fill slots from the first on, and a slot without a pixel has no mask: what is drawn
    behind the first slot without a target has no say.

    Args:
        draws: bool[M, Q, K].
        has_pixels: bool[Q, K].

    Returns:
        How many slots have a target, int64[M, Q], and which draws had a say, bool[M, Q, K].
    """
    present = (draws & has_pixels).cumprod(-1).bool()
    before = F.pad(present[..., :-1], (1, 0), value=True)
    return present.sum(-1), before & has_pixels


def presence_parts(num_present: Tensor, outcomes: Tensor, has_target: Tensor) -> dict[str, Tensor]:
    """The parts of the reward of a query's draws.

    Args:
        num_present: int64[M, Q], slots that were drawn to have a target.
        outcomes: float32[Q, 1 + K], see `presence_outcomes`.
        has_target: bool[Q], whether the query has a target.

    Returns:
        float32[M, Q] each: ``presence_iou``, the IoU that the draws lead to, and
        ``presence_refusal``, whether they reject the query if it has no target, and only then.
    """
    each = outcomes.expand(len(num_present), -1, -1)  # [M, Q, 1 + K]
    return {
        "presence_iou": each.gather(-1, num_present[..., None])[..., 0],
        "presence_refusal": ((num_present > 0) == has_target).float(),
    }


# Groups


def advantages(rewards: Tensor, *, scale: bool) -> Tensor:
    """How much better each member is than its group (GRPO, arXiv 2402.03300).

    Args:
        rewards: float32[M, ...], of each member.
        scale: divide by the standard deviation of the group. Without it, groups that agree move
            the policy less (Dr. GRPO, arXiv 2503.20783).

    Returns:
        float32[M, ...].
    """
    centered = rewards - rewards.mean(0)
    if not scale:
        return centered
    return centered / (rewards.std(0) + _EPSILON)
