"""Training on rewards: what is drawn, what it is worth, the loss, and runs that go on."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from annexe.benchmarks.flops import num_attended_pairs
from annexe.build import load_config
from annexe.checkpoints.run_folder import find_checkpoint
from annexe.checkpoints.training_state import trained_tensors
from annexe.config import Config, RewardConfig
from annexe.datasets.collate import Collator, Padding
from annexe.errors import UserError
from annexe.evaluator import evaluate
from annexe.models.annexe import Annexe
from annexe.models.language_model.packed_mask import packed_attention_mask
from annexe.models.language_model.sampling import choose, split_seeds, uniform
from annexe.models.rollouts import roll_out
from annexe.structures.batch import Batch
from annexe.structures.rollouts import DrawnText, Rollouts
from annexe.trainer import set_up, train
from annexe.training import rewards
from annexe.training.groups import pack_groups
from annexe.training.objective import RewardObjective
from annexe.training.policy import divergences, draw_logprobs, policy_losses, token_logprobs
from tests.conftest import ROOT
from tests.test_packed_sequence import VARIED, branch_ids, run_alone

REWARDS = ROOT / "train_configs" / "rewards.yaml"
TRL = json.loads((ROOT / "tests" / "trl_loss" / "expected.json").read_text())
SHORT = (
    "run.max_steps=2",
    "run.warmup_steps=0",
    "run.batch_size=2",
    "run.num_workers=0",
    "run.device=cpu",
    "run.validate_every=0",
    "run.log_every=1",
    "run.max_new_tokens=6",
    "run.rewards.group_size=3",
    "datasets.ego_irgbench.queries_per_image=2",
)
READS = ("prefix", "analysis", "descriptor")
MEMBERS = 3
MakeConfig = Callable[..., Config]


@pytest.fixture
def reward_config(trained: Path, scenes: Path, tmp_path: Path) -> MakeConfig:
    """Loads rewards.yaml with further ``a.b=c`` options; it starts from the fixture's run."""

    def make(*options: str) -> Config:
        own = (
            f"model.init_from={trained}",
            f"datasets.ego_irgbench.data_root={scenes}",
            f"run.output_dir={tmp_path / 'rewarded'}",
        )
        return load_config(REWARDS, [*own, *SHORT, *options])

    return make


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    folder = find_checkpoint(run)
    assert folder is not None
    return load_file(folder / "model.safetensors")


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


# What is drawn


def test_random_numbers_are_even_and_follow_from_seed_and_position():
    seeds = torch.arange(500)
    numbers = uniform(seeds, torch.tensor([3]), 400)
    assert numbers.min() > 0 and numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.005)
    assert numbers.var().item() == pytest.approx(1 / 12, abs=0.002)
    assert torch.equal(numbers[7:9, :10], uniform(torch.tensor([7, 8]), torch.tensor([3]), 10))
    assert not torch.equal(numbers, uniform(seeds, torch.tensor([4]), 400))
    assert len(split_seeds(seeds, 40).unique()) == 500 * 40

    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    drawn = choose(logits.expand(40000, -1), torch.arange(40000), torch.tensor([0]), 2.0)
    shares = drawn.bincount(minlength=4) / 40000
    torch.testing.assert_close(shares, (logits[0] / 2).softmax(0), atol=0.01, rtol=0)


@pytest.fixture(params=READS)
def drawn(make_parts, request) -> tuple[Annexe, Batch, Collator, Rollouts, torch.Tensor]:
    """A model, prompts, and groups drawn for them, for each thing that answers can read."""
    model, tokenizer, batch = make_parts(*VARIED, f"model.answers_read={request.param}")
    collate = Collator(
        tokenizer, model.num_image_tokens, 4, responses=False, answers_read=model.answers_read
    )
    prompts = collate([dataclasses.replace(s, turns=s.turns[:2]) for s in batch.samples[:2]])
    seeds = torch.tensor([5, 9])
    rollouts = roll_out(
        model, prompts, seeds, num_members=MEMBERS, max_new_tokens=6, temperature=1.5
    )
    return model, prompts, collate, rollouts, seeds


def test_groups_behind_one_prefix_equal_separate_responses(drawn):
    """Token for token, without any cache: each prompt by itself, drawn with its own seed."""
    model, prompts, _, rollouts, seeds = drawn
    text = prompts.text
    encoding = model.encode(prompts)
    word_seeds = split_seeds(seeds, 2)[:, 0]
    descriptors = model.descriptor_tokens
    end = [model.language_model.tokenizer.eos_id]
    for branch in range(len(text.branch_start)):
        image = int(text.branch_image_index[branch])
        place = int(text.segment_ids[image, text.branch_start[branch]]) - 1
        if descriptors is not None:
            continue  # embeddings that no token has: the next test
        for member in range(MEMBERS):
            seed = split_seeds(word_seeds[image : image + 1], place * MEMBERS + member + 1)[:, -1]
            ids = branch_ids(prompts, branch)
            if model.answers_read.source == "analysis" and place:
                analysis = branch - place
                said = rollouts.texts[analysis][member].tokens
                ids = branch_ids(prompts, analysis) + said + end + ids
            expected: list[int] = []
            for position in range(6):
                with torch.no_grad():
                    states = run_alone(
                        model, prompts, encoding.image_tokens, branch, ids + expected
                    )
                    logits = model.language_model.logits(states[-1:])
                token = choose(logits, seed, torch.tensor([position]), 1.5).item()
                if token in end:
                    break
                expected.append(token)
            assert rollouts.texts[branch][member].tokens == expected, (branch, member)
            assert rollouts.texts[branch][member].has_ended == (len(expected) < 6)
    distinct = {tuple(each.tokens) for group in rollouts.texts for each in group}
    assert len(distinct) > len(rollouts.texts)


def test_what_is_drawn_does_not_depend_on_other_images(drawn):
    model, prompts, collate, rollouts, seeds = drawn
    alone = roll_out(
        model,
        collate(prompts.samples[1:]),
        seeds[1:],
        num_members=MEMBERS,
        max_new_tokens=6,
        temperature=1.5,
    )
    assert alone.texts == rollouts.texts[3:]
    assert torch.equal(alone.draws, rollouts.draws[:, 2:])
    assert rollouts.draws.shape == (MEMBERS, 4, 4)


@pytest.mark.parametrize("unpad", [False, True])
def test_packed_groups_give_what_a_row_for_each_member_gives(drawn, unpad):
    """Log probabilities, presence and gradients, as if each member's words were the true ones."""
    model, prompts, collate, rollouts, _ = drawn
    model.train()
    collate.padding = Padding(unpad=unpad)
    packed = pack_groups(collate, prompts.text, rollouts.texts)
    text = packed.text
    group = dataclasses.replace(prompts, text=text)
    weights = torch.randn(len(text.labels), generator=torch.Generator().manual_seed(0))
    logprobs, presence = _outputs(model, group)
    ((weights * logprobs).sum() + presence.square().sum()).backward()
    found = _take_gradients(model)

    # The same weights, member by member
    loss = torch.zeros(())
    truth = Collator(collate.tokenizer, model.num_image_tokens, 4, answers_read=model.answers_read)
    for member in range(MEMBERS):
        for image, sample in enumerate(prompts.samples):
            of_image = range(3 * image, 3 * image + 3)
            drawn_tokens = [rollouts.texts[prompt][member].tokens for prompt in of_image]
            alone = _with_tokens(truth, sample, drawn_tokens)
            expected, expected_presence = _outputs(model, alone)
            is_own = (packed.token_member == member) & torch.isin(
                packed.token_prompt, torch.tensor(of_image)
            )
            assert torch.equal(text.labels[is_own], alone.text.labels)
            torch.testing.assert_close(logprobs[is_own], expected, atol=1e-5, rtol=1e-5)
            loss = loss + (weights[is_own] * expected).sum()
            if member == 0:
                rows = slice(2 * image, 2 * image + 2)
                torch.testing.assert_close(presence[rows], expected_presence, atol=1e-5, rtol=1e-5)
                loss = loss + expected_presence.square().sum()
    loss.backward()
    expected_gradients = _take_gradients(model)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            found[name], gradient, atol=1e-5 * max(scale, 1), rtol=0, msg=lambda m, n=name: n + m
        )


def _outputs(model: Annexe, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probabilities of all labels, and the presence of all queries."""
    predictions = model(batch)
    logits = predictions.token_logits.float()
    logprobs = -F.cross_entropy(logits, batch.text.labels, reduction="none")
    return logprobs, predictions.presence_logits


def _take_gradients(model: Annexe) -> dict[str, torch.Tensor]:
    """Gradients by name, which are set to zero."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad
            parameter.grad = None
    return gradients


def test_a_group_reads_prefix_and_prompts_once(drawn):
    model, prompts, collate, rollouts, _ = drawn
    collate.padding = Padding(unpad=True)
    text = pack_groups(collate, prompts.text, rollouts.texts).text
    assert len(text.input_ids) == len(prompts.images)
    num_drawn = sum(len(drawn.tokens) + 1 for group in rollouts.texts for drawn in group)
    num_prompts = int((prompts.text.segment_ids >= 0).sum())
    if model.answers_read.source == "analysis":
        # Each member reads the queries behind its own analysis
        lengths = prompts.text.branch_length[prompts.text.query_branches]
        num_prompts += (MEMBERS - 1) * int(lengths.sum())
    is_token = text.segment_ids >= 0
    assert int(is_token.sum()) == num_prompts + num_drawn
    mask = packed_attention_mask(text.reach)[:, 0]
    assert num_attended_pairs(text) == int(mask[is_token].sum())


def _with_tokens(collate: Collator, sample, responses: list[list[int]]) -> Batch:
    """A batch of one sample, whose responses are these tokens."""
    tokenizer = collate.tokenizer
    branches = collate._branches(sample, collate._encode([sample]))
    pairs = zip(branches, responses, strict=True)
    drawn = [(prompt, [*tokens, tokenizer.eos_id]) for (prompt, _), tokens in pairs]
    without = copy.copy(collate)
    without._branches = lambda *_: drawn  # type: ignore[method-assign]
    return without([sample])


# What it is worth

TWO = "The mask of the left hand is <MSK_0>, and the mask of the red mug is <MSK_1>."
NONE = "There is no suitable referring result."


def answered(text: str, has_ended: bool = True) -> DrawnText:
    return DrawnText([1, 2], text, has_ended)


@pytest.mark.parametrize(
    ("answer", "reference", "present", "expected"),
    [
        # equal, F1, refusal, targets, consistency, format
        (TWO, TWO, {0, 1}, (1, 1, 1, 1, 1, 1)),
        (TWO, TWO, {0}, (1, 1, 1, 1, 0, 1)),
        (NONE, NONE, set(), (1, 1, 1, 1, 1, 1)),
        (NONE, TWO, set(), (0, 2 / 21, 0, 0, 1, 1)),
        (TWO, NONE, {0, 1}, (0, 2 / 21, 0, 0, 1, 1)),
        # One of two is left out: half of the targets
        ("The mask of the left hand is <MSK_0>.", TWO, {0}, (0, 14 / 22, 1, 0.5, 1, 1)),
        # One too many costs as much
        (TWO, "The mask of the left hand is <MSK_0>.", {0, 1}, (0, 14 / 22, 1, 0.5, 1, 1)),
        # Two placeholders of one slot, a name that is missing, words without a placeholder
        (TWO.replace("_1", "_0"), TWO, {0}, (1, 1, 1, 0, 1, 0)),
        ("<MSK_0>.", TWO, {0}, (0, 0, 1, 0, 1, 0)),
        ("A mug.", TWO, {0}, (0, 2 / 17, 1, 0, 1, 0)),
    ],
)  # fmt: skip
def test_parts_of_an_answer(answer, reference, present, expected):
    parts = rewards.answer_parts(answered(answer), reference, present, "sentence")
    assert tuple(parts) == rewards.ANSWER_PARTS
    assert tuple(parts.values()) == pytest.approx(expected)


def test_an_answer_that_does_not_end_has_no_format():
    assert rewards.answer_parts(answered(TWO, False), TWO, {0, 1}, "sentence")["format"] == 0
    phrases = rewards.answer_parts(answered("the mug"), "the mug", {0}, "phrases")
    assert set(phrases.values()) == {1.0}


def test_parts_of_an_analysis():
    true = "In this image, the right hand is holding a red mug."
    blue = answered(true.replace("red", "blue"))
    parts = rewards.analysis_parts(blue, true)
    assert parts == pytest.approx(
        {"analysis_equal": 0, "analysis_f1": 10 / 11, "analysis_slots": 0.75, "format": 1}
    )
    assert "analysis_slots" not in rewards.analysis_parts(blue, "A free sentence.")


def test_draws_lead_to_masks_and_these_to_rewards(make_parts):
    """The IoU of each number of slots, pixel by pixel, on masks that are right, or shifted."""
    _, _, batch = make_parts()
    targets = batch.target_ids[batch.queries.image_index]
    true = (targets[:, None] == batch.slot_ids[..., None, None]) & (batch.slot_ids > 0)[
        ..., None, None
    ]
    has_target = (batch.slot_ids > 0).any(1)
    outcomes = rewards.presence_outcomes(true, batch)
    num_used = (batch.slot_ids > 0).sum(1)
    assert {0, 1, 2} <= set(num_used.tolist())
    for query, row in enumerate(outcomes):
        assert row[num_used[query]] == 1
        assert row[0] == (0 if has_target[query] else 1)
        if num_used[query] == 2:
            first, second = true[query, :2].flatten(1).sum(-1)
            assert row[1] == pytest.approx((first / (first + second)).item())
    shifted = rewards.presence_outcomes(true.roll(3, -1), batch)
    (query,) = num_used.eq(1).nonzero()[:1, 0].tolist()
    a, b = true[query, 0], true[query, 0].roll(3, -1)
    assert shifted[query, 1] == pytest.approx(((a & b).sum() / (a | b).sum()).item())

    # Draws behind the first slot without a target, or without a pixel, have no say
    draws = torch.tensor([[[1, 0, 1, 1]], [[1, 1, 1, 1]], [[0, 1, 0, 0]]]).bool()
    num_present, had_a_say = rewards.effective_draws(draws, torch.tensor([[1, 1, 0, 1]]).bool())
    assert num_present[:, 0].tolist() == [1, 2, 0]
    assert had_a_say[:, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    parts = rewards.presence_parts(
        num_present, torch.tensor([[0.0, 0.3, 0.8, 0, 0]]), torch.tensor([True])
    )
    torch.testing.assert_close(parts["presence_iou"][:, 0], torch.tensor([0.3, 0.8, 0.0]))
    assert parts["presence_refusal"][:, 0].tolist() == [1, 1, 0]


# The loss


def test_loss_and_gradient_equal_those_of_trl():
    """On the batch of tests/trl_loss, to 1e-6, with advantages made here."""
    logprobs, old, start = (
        torch.tensor(TRL[name], dtype=torch.float64) for name in ("logprobs", "old", "start")
    )
    mask = torch.tensor(TRL["mask"])
    by_group = torch.tensor(TRL["rewards"], dtype=torch.float64)
    advantages = rewards.advantages(by_group.T, scale=True).T.flatten()
    logprobs.requires_grad_()
    clip = {"clip_low": TRL["clip_low"], "clip_high": TRL["clip_high"]}
    policy = (policy_losses(logprobs, old, advantages[:, None], **clip) * mask).sum() / mask.sum()
    kl = (divergences(logprobs, start) * mask).sum() / mask.sum()
    loss = policy + TRL["kl_weight"] * kl
    loss.backward()
    assert loss.item() == pytest.approx(TRL["loss"], abs=1e-6)
    gradient = torch.tensor(TRL["gradient"], dtype=torch.float64)
    torch.testing.assert_close(logprobs.grad, gradient, atol=1e-6, rtol=0)

    # Without a step in between the ratio is 1, and the gradient that of the log probability
    logprobs.grad = None
    policy_losses(logprobs, None, advantages[:, None], **clip).sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages[:, None].expand_as(logprobs))


def test_a_step_makes_better_responses_likelier(reward_config: MakeConfig):
    unsupervised = [f"run.loss_weights.{name}=0" for name in ("depth", "presence", "mask", "dice")]
    trainer = set_up(reward_config("run.learning_rate=1e-3", *unsupervised))
    objective = trainer.objective
    assert isinstance(objective, RewardObjective)
    assert "answer" not in trainer.loss_weights and "mask" in trainer.loss_weights
    (group,) = objective.prepare([next(iter(trainer.batches(trainer.progress)))], 0)
    objective.prepare = lambda batches, step: batches  # type: ignore[method-assign]

    # A model of one step says little that differs: here every second token was better
    assert group.policy is not None
    signs = torch.where(torch.arange(len(group.text.labels)) % 2 == 0, 1.0, -1.0)
    policy = dataclasses.replace(group.policy, token_advantages=signs)
    group = dataclasses.replace(group, policy=policy)
    better = policy.token_advantages * policy.token_mask
    drawn = policy.draw_advantages[..., None] * policy.draw_mask

    def likelihood() -> tuple[float, float]:
        with torch.no_grad():
            predictions = trainer.model.eval()(group)
        words = (better * token_logprobs(predictions, group)).sum()
        return words.item(), (drawn * draw_logprobs(predictions, group)).sum().item()

    # The start is the model as it is: nothing has moved, and no copy takes its place
    before = trained_tensors(trainer.model)
    before = {name: tensor.clone() for name, tensor in before.items()}
    with torch.no_grad():
        torch.testing.assert_close(
            token_logprobs(trainer.model.eval()(group), group), policy.start_tokens
        )
    words, presence = likelihood()
    trainer.train_step([group])
    assert likelihood()[0] > words and likelihood()[1] > presence
    assert objective.start is not None
    with objective.start.in_place():
        for name, tensor in trained_tensors(trainer.model).items():
            assert torch.equal(tensor, before[name]), name
    moved = trained_tensors(trainer.model)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in moved.items())


def test_a_frozen_encoder_runs_once_a_step(reward_config: MakeConfig):
    """Of drawing, the divergence and the trained pass: all read what it gave to the first."""
    calls = {}
    for frozen in ("true", "false"):
        trainer = set_up(reward_config(f"model.rgb_encoder.frozen={frozen}"))
        batch = next(iter(trainer.batches(trainer.progress)))
        (group,) = trainer.objective.prepare([batch], 0)
        again = dataclasses.replace(group, patches=None)
        with torch.no_grad():
            expected = token_logprobs(trainer.model(again), again)
            torch.testing.assert_close(token_logprobs(trainer.model(group), group), expected)
        count = 0

        def add(*_: object) -> None:
            nonlocal count
            count += 1

        trainer.model.rgb_encoder.register_forward_hook(add)
        trainer.train_step([batch])
        calls[frozen] = count
    assert calls == {"true": 1, "false": 3}


@pytest.mark.slow
def test_batches_of_a_step_can_be_split_and_updates_repeated(reward_config: MakeConfig):
    """Two micro-batches draw and move what one of both does, also in a second update."""
    trainer = set_up(reward_config("run.rewards.updates=2", "run.batch_size=4"))
    (whole,) = [next(iter(trainer.batches(trainer.progress)))]
    halves = [trainer.objective.collate(whole.samples[index : index + 2]) for index in (0, 2)]
    (group,) = trainer.objective.prepare([whole], 0)
    parts = trainer.objective.prepare(halves, 0)
    assert group.policy.old_tokens is not None
    torch.testing.assert_close(group.policy.old_tokens, group.policy.start_tokens)
    draws = torch.cat([part.policy.draws for part in parts], 1)
    assert torch.equal(draws, group.policy.draws)
    tokens = [part.text.labels.sort().values for part in parts]
    assert torch.equal(torch.cat(tokens).sort().values, group.text.labels.sort().values)

    before = {name: tensor.clone() for name, tensor in trained_tensors(trainer.model).items()}
    trainer.train_step([whole])
    assert trainer.progress.step == 1
    together = {name: tensor.clone() for name, tensor in trained_tensors(trainer.model).items()}
    other = set_up(reward_config("run.rewards.updates=2", "run.batch_size=4"))
    other.train_step(halves)
    for name, tensor in trained_tensors(other.model).items():
        # AdamW moves by the sign where a gradient is all but zero
        apart = (tensor - together[name]).norm()
        assert apart <= 0.05 * (together[name] - before[name]).norm() + 1e-6, name


# Runs


def test_a_run_logs_rewards_and_answers_afterwards(reward_config: MakeConfig):
    config = reward_config("run.rewards.kl_weight=0.1", "run.learning_rate=1e-3")
    train(config)
    lines = [line for line in log_of(Path(config.run.output_dir)) if line["kind"] == "train"]
    parts = {*rewards.ANSWER_PARTS, *rewards.ANALYSIS_PARTS, *rewards.PRESENCE_PARTS}
    for line in lines:
        assert parts <= {key.removeprefix("reward/") for key in line}
        assert all(0 <= line[f"reward/{part}"] <= 1 for part in parts)
        assert line["drawn/answer_length"] <= 6 and 0 <= line["drawn/refusals"] <= 1
        assert line["completions_per_second"] > 0
        assert "loss/answer" not in line and line["loss/mask"] > 0
    assert lines[0]["loss/policy_kl"] == pytest.approx(0, abs=1e-6)
    assert lines[1]["loss/policy_kl"] > 0 and lines[1]["loss/presence_kl"] > 0
    with pytest.raises(UserError, match="objective is supervised here and rewards there"):
        set_up(dataclasses_replace(config, resume="auto", objective="supervised"))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["analysis", "descriptor"])
def test_a_run_whose_answers_read_more_is_rewarded_and_evaluated(
    make_config: MakeConfig, reward_config: MakeConfig, tmp_path: Path, source: str
):
    """A whole run, one that goes on behind its first half, and an evaluation."""
    start = tmp_path / "start"
    reads = f"model.answers_read={source}"
    train(make_config(reads, f"run.output_dir={start}", "run.max_steps=1", "run.warmup_steps=0"))
    rewarded = (f"model.init_from={start}", "run.learning_rate=1e-3", "run.checkpoint_every=1")
    straight = reward_config(*rewarded)
    assert straight.require_model()["answers_read"] == source
    train(straight)
    lines = [line for line in log_of(tmp_path / "rewarded") if line["kind"] == "train"]
    assert lines[1]["loss/policy_kl"] > 0
    if source == "descriptor":
        name = "descriptor_tokens.weight"
        assert not torch.equal(weights_of(start)[name], weights_of(tmp_path / "rewarded")[name])

    # From its first checkpoint on it goes as before
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(tmp_path / "rewarded" / "checkpoints", resumed / "checkpoints")
    shutil.rmtree(resumed / "checkpoints" / "step-00000002")
    train(reward_config(*rewarded, f"run.output_dir={resumed}", "run.resume=auto"))
    expected = weights_of(tmp_path / "rewarded")
    for name, tensor in weights_of(resumed).items():
        assert torch.equal(tensor, expected[name]), name

    options = (reads, f"run.checkpoint={resumed}", "run.report=false")
    scores = evaluate(make_config(*options, f"run.output_dir={tmp_path / 'evaluated'}"))
    assert scores["standard"]


def dataclasses_replace(config: Config, **settings: object) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **settings))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("run.rewards.group_size=1",), "run.rewards.group_size is 1; it must be at least 2"),
        (("run.rewards.temperature=0",), "run.rewards.temperature is 0.0; it must be above 0"),
        (("run.rewards.clip_low=1",), "run.rewards.clip_low is 1.0; it must be between 0 and 1"),
        (("run.rewards.kl_weight=-1",), "run.rewards.kl_weight is -1.0; it must be a number from"),
        (("run.rewards.weights.format=-1",), "run.rewards.weights.format is -1.0"),
        (("run.rewards.word_weight=0", "run.rewards.presence_weight=0"), "raise one, or set"),
        (("run.parallel=fsdp",), "run.objective=rewards needs weights whole"),
        (("run.objective=reward",), "run.objective is 'reward'; choose supervised or rewards"),
    ],
)
def test_settings_that_make_no_sense(reward_config: MakeConfig, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        reward_config(*options)


def test_rewards_need_a_trained_run_whose_masks_come_first(
    make_config: MakeConfig, reward_config: MakeConfig
):
    with pytest.raises(UserError, match="goes on from a trained run; set"):
        set_up(make_config("run.objective=rewards"))
    with pytest.raises(UserError, match="needs masks that come from the prompt"):
        set_up(reward_config("model.pixel_decoder.conditioning=answer"))


def test_all_rewards_of_weight_zero_are_refused():
    zero = dict.fromkeys(vars(RewardConfig().weights), 0.0)
    weights = dataclasses.replace(RewardConfig().weights, **zero)
    with pytest.raises(UserError, match="weights are all 0; there is nothing to reward"):
        RewardConfig(weights=weights)


def test_the_commands_of_the_page_load(trained: Path, scenes: Path):
    page = (ROOT / "docs" / "rewards.md").read_text()
    found = [
        shlex.split(line)
        for block in re.findall(r"^```bash\n(.*?)^```$", page, re.M | re.S)
        for line in block.replace("\\\n", " ").splitlines()
        if "rewards.yaml" in line
    ]
    assert len(found) == 4
    for words in found:
        # The fixture's run in place of the page's
        start = f"model.init_from={trained}"
        options = [
            start if option.startswith("model.init_from=") else option
            for option in words[words.index("--options") + 1 :]
        ]
        assert start in options
        run = load_config(REWARDS, options).run
        assert run.objective == ("supervised" if "longer" in run.output_dir else "rewards")


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(
    reward_config: MakeConfig, trained: Path, scenes: Path, tmp_path: Path
):
    """kill -9 between two checkpoints, then on: as a run that nobody ended."""
    settings = ("run.max_steps=4", "run.checkpoint_every=2", "run.rewards.updates=2")
    train(reward_config(*settings))

    # Another run in a process of its own, ended behind its third step
    killed = tmp_path / "killed"
    options = [
        f"model.init_from={trained}",
        f"datasets.ego_irgbench.data_root={scenes}",
        f"run.output_dir={killed}",
        *SHORT,
        *settings,
    ]
    process = subprocess.Popen(
        [sys.executable, "train.py", "--cfg-path", str(REWARDS), "--options", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    log = killed / "log.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and '"step": 3' in log.read_text():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    latest = find_checkpoint(killed)
    assert latest is not None and latest.name == "step-00000002"

    # On, and compared
    train(load_config(REWARDS, [*options, "run.resume=auto"]))
    expected = weights_of(tmp_path / "rewarded")
    found = weights_of(killed)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for ours, other in zip(log_of(tmp_path / "rewarded"), log_of(killed), strict=True):
        assert {k: v for k, v in ours.items() if "per_second" not in k} == {
            k: v for k, v in other.items() if "per_second" not in k
        }
