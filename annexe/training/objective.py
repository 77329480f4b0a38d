"""What a step trains on: the true responses, or rewards of drawn ones.

The trainer asks an objective for its loss terms, and before each step for the batches of it. Under
rewards these are made of what the model draws (`RewardObjective.prepare`):

    prompts of a batch -> groups of responses -> rewards -> advantages
                                    |                           |
                                    +--> a batch of groups <----+

Legend: B images, Q queries, K slots, R prompts, M members of a group, T tokens of all responses.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from annexe.config import LossWeights, RewardConfig
from annexe.datasets.collate import Collator
from annexe.distributed import sum_over_ranks
from annexe.errors import UserError
from annexe.structures.batch import Batch
from annexe.structures.rollouts import DrawnText, Policy, Rollouts
from annexe.training import losses, rewards
from annexe.training.groups import pack_groups
from annexe.training.losses import Term
from annexe.training.policy import draw_logprobs, policy_terms, token_logprobs

# Loss terms of true responses, which drawn ones take the place of
_TEXT_TERMS = ("analysis", "answer")


class Objective(Protocol):
    """What the trainer asks for.

    Attributes:
        weights: the loss terms by name, with their weights.
        terms: what they are.
        num_updates: optimizer steps on the batches of one step.
    """

    weights: dict[str, float]
    terms: Mapping[str, Term]
    num_updates: int

    def prepare(self, batches: list[Batch], step: int) -> list[Batch]:
        """The batches to train on, made of the loader's; on the CPU."""

    def record(self) -> dict[str, float]:
        """What a log line says besides losses, since the last one; every rank has to ask."""


class SupervisedObjective:
    """Trains on the true responses.

    Args:
        weights: of the loss terms.
        image_token_head: whether the model has this head.
        has_depth: whether it predicts depth.
    """

    terms: Mapping[str, Term] = losses.TERMS
    num_updates = 1

    def __init__(self, weights: LossWeights, *, image_token_head: bool, has_depth: bool) -> None:
        self.weights = losses.active(
            weights, image_token_head=image_token_head, has_depth=has_depth
        )

    def prepare(self, batches: list[Batch], step: int) -> list[Batch]:
        """The batches as they are."""
        return batches

    def record(self) -> dict[str, float]:
        """Nothing."""
        return {}


class RollOut(Protocol):
    """Draws groups; see `annexe.models.rollouts.roll_out`."""

    def __call__(self, batch: Batch, seeds: Tensor) -> Rollouts:
        """Draw a group of responses to every prompt of a batch, by int64[B] seeds."""


class RewardObjective:
    """Trains on rewards of drawn responses, and on the true masks and depth as before.

    Masks come from the prompt, before the first word. What is said cannot change them: they keep
    the gradient of their own loss terms, and what is rewarded beside words is the presence of
    slots, by the masks that it leads to.

    Args:
        settings: of rewards.
        supervised: weights of the loss terms of true masks and depth.
        model: what is trained; its dropout is set to 0, for with it a response would be drawn from
            another model than the one that is trained.
        roll_out: draws groups.
        collate: made the batches; packs groups as it packed those.
        accelerator: device, processes and precision.
        seed: of the run. What is drawn depends on it, on the step and on the image.
        start: the trained weights that the run started from; None without a penalty for moving
            away from them.
    """

    def __init__(
        self,
        settings: RewardConfig,
        supervised: Mapping[str, float],
        *,
        model: nn.Module,
        roll_out: RollOut,
        collate: Collator,
        accelerator: Accelerator,
        seed: int,
        start: StartWeights | None,
    ) -> None:
        self.settings = settings
        self.model = model
        self.roll_out = roll_out
        self.collate = collate
        self.accelerator = accelerator
        self.seed = seed
        self.start = start
        self.num_updates = settings.updates

        # Loss terms
        self.terms: Mapping[str, Term] = {**losses.TERMS, **policy_terms(settings)}
        self.weights = weights_under_rewards(settings, supervised)

        # What is trained is what draws
        without_dropout(model)
        self.log = RolloutLog()

    @torch.no_grad()
    def prepare(self, batches: list[Batch], step: int) -> list[Batch]:
        """Draw groups for this rank's micro-batches of a step, and reward them.

        Args:
            batches: packed prompts with their samples.
            step: optimizer steps so far.

        Returns:
            Batches of groups, whose `Policy` says what was drawn and how good it was.
        """
        self.model.eval()
        groups = []
        for batch in batches:
            on_device = batch.to(self.accelerator.device)
            rollouts = self.draw(on_device, step)
            group = self.reward(batch, on_device, rollouts)
            groups.append(self.with_logprobs(group))
        return groups

    def record(self) -> dict[str, float]:
        """Mean reward by part, lengths, refusals and completions a second, over all ranks."""
        return self.log.take(self.accelerator)

    def draw(self, batch: Batch, step: int) -> Rollouts:
        """Draw a group of responses to every prompt of a batch on the device."""
        with self.accelerator.autocast():
            return self.roll_out(batch, self._seeds(batch, step))

    def _seeds(self, batch: Batch, step: int) -> Tensor:
        """A seed for each image of a batch, int64[B]: the same in whichever batch it is."""
        seeds = []
        for sample in batch.samples:
            name = f"{self.seed}/{step}/{sample.dataset}/{sample.stem}"
            digest = hashlib.sha256(name.encode()).digest()
            seeds.append(int.from_bytes(digest[:8], "little", signed=True))
        return torch.tensor(seeds, device=self.accelerator.device)

    def reward(self, batch: Batch, on_device: Batch, rollouts: Rollouts) -> Batch:
        """Pack groups with their rewards.

        Args:
            batch: packed prompts.
            on_device: the same on the device, where masks are compared.
            rollouts: what was drawn for them.

        Returns:
            A batch of groups on the CPU, but for the patches.
        """
        settings = self.settings
        packed = pack_groups(self.collate, batch.text, rollouts.texts)
        text = packed.text

        # How much better words and presence are than those of their groups
        of_words = self._reward_words(batch, rollouts)
        better = rewards.advantages(of_words.nan_to_num(), scale=settings.scale_advantages)
        of_draws, had_a_say = self._reward_draws(on_device, rollouts)
        better_draws = rewards.advantages(of_draws, scale=settings.scale_advantages)

        # For each token of the rows, of which an image may have several
        of_token = (packed.token_member, packed.token_prompt)
        is_rewarded = ~of_words.isnan()[of_token]  # [T]
        policy = Policy(
            temperature=settings.temperature,
            token_mask=packed.is_drawn & is_rewarded,
            token_advantages=better[of_token],
            token_image=text.label_positions // text.input_ids.shape[1] % len(batch.images),
            draws=rollouts.draws.cpu(),
            draw_mask=had_a_say.cpu(),
            draw_advantages=better_draws.cpu(),
        )
        return replace(batch, text=text, policy=policy, samples=[], patches=rollouts.patches)

    def _reward_draws(self, batch: Batch, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Rewards of all draws of presence, for a batch on the device.

        Returns:
            float32[M, Q], and which draws had a say, bool[M, Q, K].
        """
        # The masks that they lead to
        num_present, had_a_say = rewards.effective_draws(rollouts.draws, rollouts.has_pixels)
        outcomes = rewards.presence_outcomes(rollouts.masks, batch)
        has_target = (batch.slot_ids > 0).any(1)
        parts = rewards.presence_parts(num_present, outcomes, has_target)
        weights = vars(self.settings.weights)
        reward = torch.stack([weights[name] * part for name, part in parts.items()]).sum(0)

        # For the log
        for name, part in parts.items():
            self.log.add_mean(f"reward/{name}", part.sum(), part.numel())
        self.log.add_mean("reward/presence", reward.sum(), reward.numel())
        self.log.add_mean("drawn/rejected", (num_present == 0).sum(), num_present.numel())
        return reward, had_a_say

    def _reward_words(self, batch: Batch, rollouts: Rollouts) -> Tensor:
        """Rewards of all responses, float32[M, R]; NaN where there is no true response.

        The prompts are in the order of the batch.
        """
        weights = vars(self.settings.weights)
        in_use = rollouts.in_use.tolist()
        num_members = len(rollouts.draws)
        table = torch.full((num_members, len(rollouts.texts)), torch.nan)
        prompt = 0
        query = 0
        for sample in batch.samples:
            # The analysis
            for member, drawn in enumerate(rollouts.texts[prompt]):
                if sample.analysis.strip():
                    parts = rewards.analysis_parts(drawn, sample.analysis)
                    table[member, prompt] = rewards.weighted(parts, weights)
                    self.log.add_response("analysis", drawn, parts, float(table[member, prompt]))
            prompt += 1

            # The answers
            for turn in sample.turns:
                present = {slot for slot, is_present in enumerate(in_use[query]) if is_present}
                for member, drawn in enumerate(rollouts.texts[prompt]):
                    parts = rewards.answer_parts(drawn, turn.answer, present, sample.answer_format)
                    table[member, prompt] = rewards.weighted(parts, weights)
                    self.log.add_response("answer", drawn, parts, float(table[member, prompt]))
                prompt += 1
                query += 1
        return table

    def with_logprobs(self, group: Batch) -> Batch:
        """A batch of groups with the log probabilities that its losses compare with."""
        # Losses of a single update compare with what it computes itself
        needs_old = self.num_updates > 1
        if self.start is None and not needs_old:
            return group
        policy = group.policy
        assert policy is not None
        on_device = group.to(self.accelerator.device)

        # Those of the start, and those before the step
        if self.start is not None:
            with self.start.in_place():
                predictions = self.model(on_device)
            policy = replace(
                policy,
                start_tokens=token_logprobs(predictions, on_device).cpu(),
                start_draws=draw_logprobs(predictions, on_device).cpu(),
            )
        if needs_old:
            predictions = self.model(on_device)
            policy = replace(
                policy,
                old_tokens=token_logprobs(predictions, on_device).cpu(),
                old_draws=draw_logprobs(predictions, on_device).cpu(),
            )
        return replace(group, policy=policy)


def weights_under_rewards(
    settings: RewardConfig, supervised: Mapping[str, float]
) -> dict[str, float]:
    """The loss terms of training on rewards by name, with their weights.

    Args:
        settings: of rewards.
        supervised: weights of the terms of true responses, masks and depth.
    """
    weights = {name: weight for name, weight in supervised.items() if name not in _TEXT_TERMS}
    weights["policy"] = settings.word_weight
    weights["presence_policy"] = settings.presence_weight
    if settings.kl_weight:
        weights["policy_kl"] = settings.word_weight * settings.kl_weight
        weights["presence_kl"] = settings.presence_weight * settings.kl_weight
    return weights


def without_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


class StartWeights:
    """Copies of all weights that are trained, as they are now; of frozen ones there is no copy.

    With adapters these are the adapters, projector and pixel decoder.

    Args:
        model: whose weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [each for each in model.parameters() if each.requires_grad]
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have these weights for a while, which takes no further memory."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for index, parameter in enumerate(self.parameters):
            parameter.data, self.values[index] = self.values[index], parameter.data


def require_rewardable(model: Any) -> None:
    """Check that the presence and the words of a model can be rewarded.

    Raises:
        UserError: for a pixel decoder whose masks do not stand before the first word, or that has
            no presence.
    """
    decoder = model.pixel_decoder
    if decoder.conditioning != "prompt" or not decoder.presence_gates_masks:
        raise UserError(
            "run.objective=rewards needs masks that come from the prompt, and a presence that "
            "gates them; start from a run with model.pixel_decoder.type=query and "
            "model.pixel_decoder.conditioning=prompt"
        )


class RolloutLog:
    """Sums of what was drawn since the last log line."""

    def __init__(self) -> None:
        self.start_anew()

    def start_anew(self) -> None:
        """Forget what was added."""
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, float] = defaultdict(float)
        self.num_completions = 0
        self.since = time.perf_counter()

    def add_mean(self, name: str, total: Tensor | float, count: int) -> None:
        """Add to a mean."""
        self.sums[name] += float(total)
        self.counts[name] += count

    def add_response(
        self, kind: str, drawn: DrawnText, parts: Mapping[str, float], reward: float
    ) -> None:
        """Add a response, ``analysis`` or ``answer``."""
        self.num_completions += 1
        for name, value in parts.items():
            self.add_mean(f"reward/{name}", value, 1)
        self.add_mean(f"reward/{kind}", reward, 1)
        self.add_mean(f"drawn/{kind}_length", len(drawn.tokens), 1)
        self.add_mean("drawn/ended", drawn.has_ended, 1)
        if kind == "answer":
            self.add_mean("drawn/refusals", rewards.refuses(drawn.text), 1)

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all ranks, and completions a second; starts anew."""
        names = sorted(_MEANS)
        numbers = [[self.sums[name] for name in names], [self.counts[name] for name in names]]
        table = torch.tensor(numbers, dtype=torch.float64, device=accelerator.device)
        completions = table.new_tensor([self.num_completions])
        summed = sum_over_ranks(accelerator, torch.cat([table.flatten(), completions]))
        sums, counts = summed[:-1].view(2, -1).tolist()
        record = {}
        for name, total, count in zip(names, sums, counts, strict=True):
            if count:
                record[name] = total / count
        seconds = time.perf_counter() - self.since
        record["completions_per_second"] = float(summed[-1]) / seconds
        self.start_anew()
        return record


_MEANS = {
    *(f"reward/{name}" for name in rewards.ANSWER_PARTS),
    *(f"reward/{name}" for name in rewards.ANALYSIS_PARTS),
    *(f"reward/{name}" for name in rewards.PRESENCE_PARTS),
    *("reward/analysis", "reward/answer", "reward/presence"),
    *("drawn/analysis_length", "drawn/answer_length"),
    *("drawn/ended", "drawn/refusals", "drawn/rejected"),
}
