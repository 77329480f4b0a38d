"""`annexe plan`: predicted memory against that of real tensors, and what it proposes."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from annexe.benchmarks.fake_model import CudaRules
from annexe.benchmarks.memory import LiveBytes, Plan, measure
from annexe.benchmarks.planning import candidates, propose, with_options
from annexe.benchmarks.random_batch import (
    even_branches,
    longest_batch,
    nominal_branches,
    random_batch,
    real_branches,
)
from annexe.benchmarks.random_groups import random_groups
from annexe.benchmarks.random_model import without_files
from annexe.build import build_dataset, build_model, load_config
from annexe.cli import main
from annexe.config import Config
from annexe.datasets.collate import Collator
from annexe.models.annexe import Annexe
from annexe.structures.batch import Batch
from annexe.training import losses
from annexe.training.objective import weights_under_rewards, without_dropout
from annexe.training.optimizer import build_optimizer
from annexe.training.policy import policy_terms
from tests.conftest import ROOT, SMALLEST, TINY

FULL = ROOT / "train_configs" / "annexe.yaml"
LORA = (
    "model.language_model.lora.rank=4",
    "model.language_model.dtype=bfloat16",
    "run.optimizer=adamw",
)
CHECKPOINTED = (*LORA, "model.language_model.checkpointed_blocks=1")
DECONV = (
    "model.pixel_decoder.type=deconv",
    "model.pixel_decoder.num_rows=32",
    "run.optimizer=adamw",
)
LARGER_LORA = (
    "model.language_model.lora.rank=4",
    "model.language_model.hidden_size=64",
    "model.language_model.mlp_dim=256",
)
NUM_IMAGES = 2
NUM_QUERIES = 3

Load = Callable[..., Config]
PlanOf = Callable[..., Plan]


class RealStep(NamedTuple):
    """A real model under bf16, and a forward pass over the batch that the plan is about."""

    config: Config
    model: Annexe
    forward: Callable[[], Tensor]


@pytest.fixture(scope="module")
def load(scenes: Path) -> Load:
    """Loads the smallest configuration with further options; nothing here writes to its folder."""

    def load(*options: str) -> Config:
        smallest = list(SMALLEST)
        if "model.pixel_decoder.type=deconv" in options:
            smallest = [option for option in SMALLEST if "pixel_decoder" not in option]
        data = f"datasets.ego_irgbench.data_root={scenes}"
        return load_config(TINY, [*smallest, data, *options])

    return load


@pytest.fixture(scope="module")
def plan_of(load: Load) -> PlanOf:
    """Plans the smallest configuration with further options; each plan is made once."""

    @functools.cache
    def plan(*options: str, num_images: int = NUM_IMAGES, gpus: int = 1) -> Plan:
        config, tokenizer, _ = without_files(load(*options))
        branches = nominal_branches(num_images, NUM_QUERIES)
        return measure(config, tokenizer, branches, gpus=gpus)

    return plan


def batch_of(config: Config, model: Annexe, tokenizer: Any) -> Batch:
    """The batch that plans are about."""
    return random_batch(
        nominal_branches(NUM_IMAGES, NUM_QUERIES),
        model.rgb_encoder.image_size,
        model.num_image_tokens,
        config.model["pixel_decoder"]["num_slots"],
        tokenizer.vocab_size,
    )


def terms_of(config: Config, model: Annexe) -> list[str]:
    """Names of the loss terms."""
    weights = config.run.loss_weights
    return list(losses.active(weights, image_token_head=model.image_token_head))


@pytest.fixture(scope="module")
def real_step(load: Load) -> Callable[..., RealStep]:
    """Builds the smallest model with further options; each is built once."""

    @functools.cache
    def build(*options: str) -> RealStep:
        config, tokenizer, _ = without_files(load(*options))
        model = build_model(config.model, tokenizer, torch.device("cpu"), bf16=True).train()
        batch = batch_of(config, model, tokenizer)
        terms = terms_of(config, model)

        def forward() -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                predictions = model(batch)
            return losses.totals(predictions, batch, terms).sum()

        return RealStep(config, model, forward)

    return build


def booked_size(tensors: Iterable[Tensor]) -> int:
    """Bytes of all storages, each counted once in full blocks of 512."""
    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = -(-storage.nbytes() // 512) * 512
    return sum(sizes.values())


@pytest.mark.parametrize("options", [(), LORA], ids=["full", "lora"])
def test_weights_gradients_and_moments_are_those_of_real_tensors(
    options: tuple[str, ...], plan_of: PlanOf, real_step: Callable[..., RealStep]
) -> None:
    plan = plan_of(*options)
    config, model, forward = real_step(*options)
    optimizer = build_optimizer(model, config.run)
    forward().backward()
    optimizer.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    state = [value for p in trained for value in optimizer.state[p].values()]
    gradients = booked_size(p.grad for p in trained)  # some share storage
    assert plan.weights.total() == booked_size([*model.parameters(), *model.buffers()])
    assert plan.gradients.total() == pytest.approx(gradients, rel=1e-3)
    assert plan.optimizer.total() == booked_size(state)


@pytest.mark.parametrize(
    "options",
    [(), LORA, CHECKPOINTED, DECONV],
    ids=["full", "lora", "checkpointed", "deconv"],
)
def test_activations_are_those_that_a_real_forward_pass_saves(
    options: tuple[str, ...], plan_of: PlanOf, real_step: Callable[..., RealStep]
) -> None:
    _, model, forward = real_step(*options)
    activations = saved_bytes(model, forward)
    assert plan_of(*options).activations.total() == pytest.approx(activations, rel=0.03)


def saved_bytes(model: Annexe, forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass saves for the backward pass, beside weights and buffers."""
    held = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: list[Tensor] = []
    # A checkpointed block has what it is called with, which autograd's hooks do not see
    for block in model.language_model.base.model.layers:
        if block.gradient_checkpointing:
            block.register_forward_pre_hook(
                lambda _, *inputs: saved.extend(
                    t for t in tree_leaves(inputs) if torch.is_tensor(t)
                ),
                with_kwargs=True,
            )
    with CudaRules(), saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        forward()
    return booked_size(t for t in saved if t.untyped_storage().data_ptr() not in held)


def test_the_groups_of_a_run_on_rewards_are_planned(plan_of: PlanOf, load: Load) -> None:
    options = ("run.objective=rewards", "run.rewards.group_size=3", "run.max_new_tokens=8", *LORA)
    plan = plan_of(*options)
    assert plan.peak > plan_of(*LORA).peak

    # The pass that is trained, with real tensors
    config, tokenizer, _ = without_files(load(*options))
    run = config.run
    model = build_model(config.model, tokenizer, torch.device("cpu"), bf16=True).train()
    without_dropout(model)
    batch = random_groups(model, nominal_branches(NUM_IMAGES, NUM_QUERIES), run)
    assert plan.num_tokens == batch.text.input_ids.shape[1]
    num_drawn = (NUM_QUERIES + 1) * run.rewards.group_size * (run.max_new_tokens + 1)
    assert len(batch.text.labels) == NUM_IMAGES * num_drawn
    supervised = losses.active(run.loss_weights, image_token_head=model.image_token_head)
    names = list(weights_under_rewards(run.rewards, supervised))
    terms = {**losses.TERMS, **policy_terms(run.rewards)}

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predictions = model(batch)
        return losses.totals(predictions, batch, names, terms=terms).sum()

    assert plan.activations.total() == pytest.approx(saved_bytes(model, forward), rel=0.03)


@pytest.mark.parametrize(("dtype", "num_checkpointed"), [("int8", 2), ("nf4", 0)])
def test_a_quantized_model_takes_as_much_as_the_real_one(
    dtype: str, num_checkpointed: int, plan_of: PlanOf, real_step: Callable[..., RealStep]
) -> None:
    pytest.importorskip("bitsandbytes")
    options = (
        *LARGER_LORA,
        f"model.language_model.dtype={dtype}",
        f"model.language_model.checkpointed_blocks={num_checkpointed}",
    )
    plan = plan_of(*options)
    _, model, forward = real_step(*options)
    with CudaRules(), LiveBytes() as live:
        live.add([list(model.parameters()), list(model.buffers())])
        live.start()
        total = forward()
        activations = live.since_start().total()
    assert total.requires_grad
    language_model = model.language_model
    weights = booked_size([*language_model.parameters(), *language_model.buffers()])
    assert plan.weights["language_model"] == pytest.approx(weights, rel=0.1)
    assert plan.activations.total() == pytest.approx(activations, rel=0.03)


@pytest.mark.slow
def test_compiled_blocks_in_nf4_keep_no_more_than_those_in_bfloat16(plan_of: PlanOf) -> None:
    options = (*LARGER_LORA, "run.compile=true")
    plain = plan_of(*options, "model.language_model.dtype=bfloat16")
    packed = plan_of(*options, "model.language_model.dtype=nf4")
    assert packed.activations["language_model"] <= plain.activations["language_model"]
    assert packed.weights["language_model"] < 0.7 * plain.weights["language_model"]


def test_precision_and_dropout_are_those_of_cuda() -> None:
    x = torch.ones(4, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(4, 8, dtype=torch.float32, requires_grad=True)
    saved: list[Tensor] = []
    hooks = saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with CudaRules(), hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.layer_norm(x, (8,)).dtype == x.softmax(-1).dtype == torch.float32
        assert F.linear(x, weight).dtype == torch.bfloat16
        saved.clear()
        F.dropout(x, 0.5)
    assert [t.dtype for t in saved] == [torch.bool]


def test_checkpointed_blocks_lower_the_prediction(plan_of: PlanOf) -> None:
    every = plan_of(*LORA, "model.language_model.checkpointed_blocks=2")
    none = plan_of(*LORA)
    assert every.peak < none.peak
    assert every.activations["language_model"] < 0.5 * none.activations["language_model"]
    assert every.weights == none.weights


def test_twice_the_images_nearly_double_activations(plan_of: PlanOf) -> None:
    two = plan_of(*LORA).activations.total()
    four = plan_of(*LORA, num_images=4).activations.total()
    assert four == pytest.approx(2 * two, rel=0.1)


def test_accumulated_gradients_are_there_at_the_peak(plan_of: PlanOf) -> None:
    once = plan_of()
    twice = plan_of("run.gradient_accumulation=2")
    assert twice.peak - once.peak == pytest.approx(once.gradients.total(), rel=0.2)
    assert plan_of(gpus=2).peak == twice.peak  # DDP keeps them in its buckets


def test_fsdp_shares_what_is_held(plan_of: PlanOf) -> None:
    options = (*LORA, "run.parallel=fsdp", "model.rgb_encoder.depth=4")
    alone = plan_of(*options)
    shared = plan_of(*options, gpus=4)
    assert shared.optimizer.total() == alone.optimizer.total() / 4
    assert alone.weights.total() / 4 < shared.weights.total() < alone.weights.total() * 5 / 4
    held = [plan.weights.total() + plan.optimizer.total() for plan in (alone, shared)]
    assert alone.peak - shared.peak == pytest.approx(held[0] - held[1])


def test_cuda_graphs_keep_gradients_and_a_pass_of_their_own(plan_of: PlanOf) -> None:
    once = plan_of()
    graphed = plan_of("run.cuda_graphs=true")
    assert once.graph_pool == 0
    assert graphed.peak > once.peak + 0.9 * once.gradients.total()
    assert graphed.graph_pool > 0.9 * once.activations.total()
    assert graphed.needs > graphed.peak + graphed.graph_pool


def test_a_float8_model_takes_as_much_as_bfloat16(plan_of: PlanOf) -> None:
    wide = ("model.language_model.hidden_size=256", "model.language_model.mlp_dim=512")
    plans = []
    for dtype in ("bfloat16", "float8"):
        options = (*wide, "model.language_model.lora.rank=4", f"model.language_model.dtype={dtype}")
        plans.append(plan_of(*options))
    half, eighth = plans
    weights = half.weights["language_model"]
    assert eighth.weights["language_model"] == pytest.approx(weights, rel=0.05)  # and scales


@pytest.mark.slow
def test_a_compiled_model_saves_what_torch_compile_saves(load: Load, plan_of: PlanOf) -> None:
    """Compared with a real language model, compiled for the CPU up to its kernels, in float32."""
    options = (
        *("run.mixed_precision=fp32", "run.optimizer=adamw"),
        *("model.depth_branch.type=none", "model.pixel_decoder.num_layers=1"),
    )
    plain = plan_of(*options)
    plan = plan_of(*options, "run.compile=true")
    assert plan.weights == plain.weights
    assert plan.activations.total() < 0.9 * plain.activations.total()
    assert plan.peak < plain.peak

    config, tokenizer, _ = without_files(load(*options))
    model = build_model(config.model, tokenizer, torch.device("cpu")).train()
    language_model = model.language_model
    for block in language_model.base.model.layers:
        block.forward = torch.compile(block.forward, backend="aot_eager_decomp_partition")
    text = batch_of(config, model, tokenizer).text
    embeddings = torch.randn(*text.input_ids.shape, 32, requires_grad=True)
    held = {t.untyped_storage().data_ptr() for t in [embeddings, *model.parameters()]}
    saved: list[Tensor] = []
    budget = torch._functorch.config.patch(activation_memory_budget=0.9)
    with budget, saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        language_model(embeddings, text)
    torch._dynamo.reset()
    activations = booked_size(t for t in saved if t.untyped_storage().data_ptr() not in held)
    assert plan.activations["language_model"] == pytest.approx(activations, rel=0.1)


def test_lengths_of_real_batches_are_those_of_the_collator(load: Load) -> None:
    config, tokenizer, notes = without_files(load())
    assert notes == []
    branches = real_branches(config, tokenizer)
    assert len(branches) == 16 * config.run.batch_size

    # The same images, with wordings of their own
    dataset = build_dataset(config, "train", cached=False)
    collate = Collator(tokenizer, num_image_tokens=16, num_slots=4)
    text = collate([dataset[0, index] for index in range(len(dataset))]).text
    longest_row = max(sum(map(sum, image)) for image in branches[: len(dataset)])
    num_tokens = text.input_ids.shape[1] - text.prefix_length
    assert longest_row == pytest.approx(num_tokens, rel=0.1)

    longest = longest_batch(branches, 3, num_queries=2)
    assert len(longest) == 3
    assert {len(image) for image in longest} == {3}


def test_tokens_are_spread_over_the_branches() -> None:
    for image in even_branches(num_images=2, num_queries=3, num_tokens=101):
        assert len(image) == 4
        assert sum(map(sum, image)) == 101
        assert min(min(branch) for branch in image) > 0


def test_candidates_save_more_and_more_and_keep_the_images_of_a_step(load: Load) -> None:
    config = load(*LORA, "run.batch_size=6")
    tried = list(candidates(config, gpus=1))
    for options in tried:
        batch_size = options.get("run.batch_size", 6)
        assert batch_size * options.get("run.gradient_accumulation", 1) == 6
    dtype = "model.language_model.dtype"
    assert [options[dtype] for options in tried if dtype in options][:2] == ["int8", "nf4"]
    assert tried[-1]["datasets.ego_irgbench.queries_per_image"] == 1

    # Quantized weights cannot be sharded
    sharded = with_options(config, {"run.parallel": "fsdp"})
    assert not any(dtype in options for options in candidates(sharded, gpus=2))


@pytest.fixture
def annexe_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs `annexe plan`, and gives what it wrote."""
    out = tmp_path / "plan.json"

    def run(config: Path, *words: object) -> dict[str, Any]:
        command = ["annexe", "plan", "--cfg-path", config, "--json", out, *words]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        main()
        return json.loads(out.read_text())

    return run


def test_full_size_is_planned_without_its_files(annexe_plan: Callable[..., dict]) -> None:
    record = annexe_plan(FULL, "--card", 60)
    assert 20 < record["peak"] < record["needs"] < 60
    assert record["fits"]
    assert record["tokens_per_image"] == 958
    assert record["batch_size"] == 4
    assert record["parts"]["language_model"]["weights"] > 13  # 7B in bfloat16
    assert "32000 words assumed" in record["notes"][0]


def test_a_proposal_fits_the_card(
    annexe_plan: Callable[..., dict], scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALLEST, *LORA, "run.batch_size=4", f"datasets.ego_irgbench.data_root={scenes}"]
    options += ["model.depth_branch.type=none", "model.pixel_decoder.num_layers=1"]
    on_a_large_card = annexe_plan(TINY, "--card", 24, "--options", *options)
    assert on_a_large_card["fits"]
    assert on_a_large_card["proposal"] is None

    card = on_a_large_card["needs"] - 1e-4
    proposal = annexe_plan(TINY, "--card", card, "--options", *options)["proposal"]
    assert proposal["options"] == ["model.language_model.checkpointed_blocks=1"]  # half of the two
    assert proposal["needs"] <= card
    options += proposal["options"]
    assert f"--options {' '.join(options)}\n" in capsys.readouterr().out

    again = annexe_plan(TINY, "--card", card, "--options", *options)
    assert again["fits"]
    assert again["peak"] == pytest.approx(proposal["peak"], rel=1e-6)


@pytest.mark.parametrize("num_too_large", [0, 1, 5, 100])
def test_the_first_settings_that_fit_are_found_by_few_plans(load: Load, num_too_large: int) -> None:
    config = load(*LORA, "run.batch_size=8", "run.cuda_graphs=true")
    tried = list(candidates(config, gpus=1))
    assert tried[0] == {"run.cuda_graphs": False}
    configs = [with_options(config, options) for options in tried]
    planned = []

    def plan_of(changed: Config, limit: float) -> Any:
        planned.append(configs.index(changed))
        return None if planned[-1] < num_too_large else SimpleNamespace(needs=1)

    proposal = propose(plan_of, config, gpus=1, card=1)
    if num_too_large < len(tried):
        assert proposal is not None
        assert proposal[0] == tried[num_too_large]
    else:
        assert proposal is None
    assert len(planned) <= 4


def test_nothing_is_proposed_for_a_card_that_nothing_fits(
    annexe_plan: Callable[..., dict], scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALLEST, f"datasets.ego_irgbench.data_root={scenes}"]
    record = annexe_plan(TINY, "--card", 0.5, "--options", *options)
    assert "Nothing tried fits a card of 0.5 GB" in capsys.readouterr().out
    assert record["proposal"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpus", 0), "must be above 0"),
        (("--card", "nan"), "--card nan must be above 0"),
        (("--card", "inf"), "--card inf must be above 0"),
        (("--json", ROOT), "a folder"),
        (("--tokens", 40), "give at least"),
        (
            (
                *("--gpus", 2, "--options", "run.parallel=fsdp", "run.optimizer=adamw"),
                *("model.language_model.lora.rank=4", "model.language_model.dtype=nf4"),
            ),
            "cannot spread",
        ),
        (("--options", "model.language_model.path={folder}"), "is no Llama's"),
    ],
)
def test_wrong_input_ends_in_one_line(
    words: tuple,
    message: str,
    annexe_plan: Callable[..., dict],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        annexe_plan(TINY, *(str(word).format(folder=tmp_path) for word in words))
    assert message in capsys.readouterr().err
