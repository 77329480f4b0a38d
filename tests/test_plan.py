"""`annexe plan`: predicted memory against that of real tensors, and what it proposes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from annexe.benchmarks.memory import CudaRules, LiveBytes, Plan, measure, without_files
from annexe.benchmarks.random_batch import (
    even_branches,
    longest_batch,
    nominal_branches,
    random_batch,
    real_branches,
)
from annexe.build import build_dataset, build_model
from annexe.cli import main
from annexe.config import Config
from annexe.datasets.collate import Collator
from annexe.tools.plan import candidates, with_options
from annexe.training import losses
from annexe.training.optimizer import build_optimizer
from tests.conftest import ROOT, SMALLEST, TINY

FULL = ROOT / "train_configs" / "annexe.yaml"
LORA = (
    "model.language_model.lora.rank=4",
    "model.language_model.dtype=bfloat16",
    "run.optimizer=adamw",
)
CHECKPOINTED = (
    *LORA,
    "model.language_model.checkpointed_blocks=1",
    "model.pixel_decoder.prompt_tokens=true",
)
DECONV = (
    "model.pixel_decoder.type=deconv",
    "model.pixel_decoder.num_rows=32",
    "run.optimizer=adamw",
)


def plan_of(config: Config, num_images: int = 2, num_queries: int = 3, **more: Any) -> Plan:
    config, tokenizer, _ = without_files(config)
    return measure(config, tokenizer, nominal_branches(num_images, num_queries), **more)


def rounded(tensors: Iterable[Tensor]) -> int:
    """Bytes of all storages, each counted once in whole blocks of 512."""
    storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}
    return sum(-(-size // 512) * 512 for size in storages.values())


def real_parts(config: Config) -> tuple:
    """A real model under bf16 and the batch that `plan_of` makes up."""
    config, tokenizer, _ = without_files(config)
    model = build_model(config.model, tokenizer, torch.device("cpu"), bf16=True).train()
    size, slots = model.rgb_encoder.image_size, config.model["pixel_decoder"]["num_slots"]
    batch = random_batch(
        nominal_branches(2, 3), size, model.num_image_tokens, slots, tokenizer.vocab_size
    )
    terms = list(losses.active(config.run.loss_weights, image_token_head=model.image_token_head))

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predictions = model(batch)
        return losses.totals(predictions, batch, terms).sum()

    return model, forward


@pytest.mark.parametrize("options", [(), LORA], ids=["whole", "lora"])
def test_weights_gradients_and_moments_are_those_of_real_tensors(
    options: tuple[str, ...], make_config: Callable[..., Config]
) -> None:
    config = make_config(*options)
    plan = plan_of(config)
    model, forward = real_parts(config)
    optimizer = build_optimizer(model, config.run)
    forward().backward()
    optimizer.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    state = [value for p in trained for value in optimizer.state[p].values()]
    assert plan.weights.total() == rounded([*model.parameters(), *model.buffers()])
    assert plan.gradients.total() == pytest.approx(
        rounded(p.grad for p in trained), rel=1e-3
    )  # some share storage
    assert plan.optimizer.total() == rounded(state)


@pytest.mark.parametrize(
    "options",
    [(), LORA, CHECKPOINTED, DECONV],
    ids=["whole", "lora", "checkpointed", "deconv"],
)
def test_kept_activations_are_those_that_a_real_forward_pass_saves(
    options: tuple[str, ...], make_config: Callable[..., Config]
) -> None:
    config = make_config(*options)
    plan = plan_of(config)
    model, forward = real_parts(config)
    held = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: list[Tensor] = []
    with (
        CudaRules(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        forward()
    real = rounded(t for t in saved if t.untyped_storage().data_ptr() not in held)
    assert plan.activations.total() == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
@pytest.mark.parametrize("blocks", [0, 2])
def test_a_quantised_model_holds_and_keeps_as_much_as_the_real_one(
    dtype: str, blocks: int, make_config: Callable[..., Config]
) -> None:
    pytest.importorskip("bitsandbytes")
    config = make_config(
        "model.language_model.lora.rank=4",
        "model.language_model.hidden_size=64",
        "model.language_model.mlp_dim=256",
        f"model.language_model.dtype={dtype}",
        f"model.language_model.checkpointed_blocks={blocks}",
    )
    plan = plan_of(config)
    model, forward = real_parts(config)
    with CudaRules(), LiveBytes() as live:
        live.add([list(model.parameters()), list(model.buffers())])
        live.start()
        total = forward()
        real = live.since_start().total()
    assert total.requires_grad
    language = model.language_model
    assert plan.weights["language_model"] == pytest.approx(
        rounded([*language.parameters(), *language.buffers()]), rel=0.1
    )
    assert plan.activations.total() == pytest.approx(real, rel=0.03)


def test_precision_and_dropout_are_those_of_cuda() -> None:
    x, weight = (
        torch.ones(4, 8, dtype=t, requires_grad=True) for t in (torch.bfloat16, torch.float32)
    )
    saved: list[Tensor] = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with CudaRules(), keep, torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.layer_norm(x, (8,)).dtype == x.softmax(-1).dtype == torch.float32
        assert F.linear(x, weight).dtype == torch.bfloat16
        saved.clear()
        F.dropout(x, 0.5)
    assert [t.dtype for t in saved] == [torch.bool]


def test_checkpointed_blocks_lower_the_prediction(make_config: Callable[..., Config]) -> None:
    every, none = (
        plan_of(make_config(*LORA, f"model.language_model.checkpointed_blocks={n}")) for n in (2, 0)
    )
    assert every.peak < none.peak
    assert every.activations["language_model"] < 0.5 * none.activations["language_model"]
    assert every.weights == none.weights


def test_twice_the_images_nearly_double_activations(make_config: Callable[..., Config]) -> None:
    config = make_config(*LORA)
    two, four = (plan_of(config, num_images=n).activations.total() for n in (2, 4))
    assert four == pytest.approx(2 * two, rel=0.1)


def test_accumulated_gradients_are_there_at_the_peak(make_config: Callable[..., Config]) -> None:
    config = make_config()
    once, twice = plan_of(config), plan_of(with_options(config, {"run.gradient_accumulation": 2}))
    assert twice.peak - once.peak == pytest.approx(once.gradients.total(), rel=0.2)
    assert plan_of(config, gpus=2).peak == twice.peak  # DDP keeps them in its buckets


def test_fsdp_spreads_what_is_held(make_config: Callable[..., Config]) -> None:
    config = make_config(*LORA, "run.parallel=fsdp", "model.rgb_encoder.depth=4")
    alone, spread = plan_of(config), plan_of(config, gpus=4)
    assert spread.optimizer.total() == alone.optimizer.total() / 4
    assert alone.weights.total() / 4 < spread.weights.total() < alone.weights.total() * 5 / 4
    held = [p.weights.total() + p.optimizer.total() for p in (alone, spread)]
    assert alone.peak - spread.peak == pytest.approx(held[0] - held[1])


def test_lengths_of_real_batches_are_those_of_the_collator(
    make_config: Callable[..., Config],
) -> None:
    config, tokenizer, notes = without_files(make_config())
    assert notes == []
    branches = real_branches(config, tokenizer)
    assert len(branches) == 16 * config.run.batch_size
    dataset = build_dataset(config, "train", cached=False)
    batch = Collator(tokenizer, num_image_tokens=16, num_slots=4)(
        [dataset[0, i] for i in range(len(dataset))]
    )
    most = max(
        sum(map(sum, image)) for image in branches[: len(dataset)]
    )  # the same images, wordings of their own
    assert most == pytest.approx(batch.text.input_ids.shape[1] - batch.text.prefix_length, rel=0.1)
    longest = longest_batch(branches, 3, num_queries=2)
    assert len(longest) == 3 and {len(image) for image in longest} == {3}


def test_tokens_are_spread_over_the_branches() -> None:
    for image in even_branches(num_images=2, num_queries=3, num_tokens=101):
        assert len(image) == 4 and sum(map(sum, image)) == 101
        assert min(min(branch) for branch in image) > 0


def test_candidates_save_more_and_more_and_keep_the_images_of_a_step(
    make_config: Callable[..., Config],
) -> None:
    config = make_config(*LORA, "run.batch_size=6")
    tried = [dict(options) for options in candidates(config, gpus=1)]
    images = [o.get("run.batch_size", 6) * o.get("run.gradient_accumulation", 1) for o in tried]
    assert set(images) == {6}
    assert [o["model.language_model.dtype"] for o in tried if "model.language_model.dtype" in o][
        :2
    ] == ["int8", "nf4"]
    assert tried[-1]["datasets.ego_irgbench.queries_per_image"] == 1
    sharded = [dict(o) for o in candidates(with_options(config, {"run.parallel": "fsdp"}), gpus=2)]
    assert not any(
        "model.language_model.dtype" in o for o in sharded
    )  # quantised weights cannot be spread


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["annexe", "plan", *map(str, arguments)])
    main()


def test_full_size_is_planned_without_its_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command(monkeypatch, "--cfg-path", FULL, "--card", 60, "--json", tmp_path / "plan.json")
    record = json.loads((tmp_path / "plan.json").read_text())
    assert 20 < record["peak"] < record["needs"] < 60 and record["fits"]
    assert record["tokens_per_image"] == 958 and record["batch_size"] == 4
    assert record["parts"]["language_model"]["weights"] > 13  # 7B in bfloat16
    assert "32000 words assumed" in record["notes"][0]


def test_a_proposal_fits_the_card(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    scenes: Path,
    tmp_path: Path,
) -> None:
    options = [*SMALLEST, *LORA, "run.batch_size=4", f"datasets.ego_irgbench.data_root={scenes}"]

    def record(card: float, *more: str) -> dict[str, Any]:
        out = tmp_path / "plan.json"
        command(
            monkeypatch,
            "--cfg-path",
            TINY,
            "--card",
            card,
            "--json",
            out,
            "--options",
            *options,
            *more,
        )
        return json.loads(out.read_text())

    whole = record(24)
    assert whole["fits"] and whole["proposal"] is None
    card = whole["needs"] - 1e-4
    proposal = record(card)["proposal"]
    assert proposal["options"] == ["model.language_model.checkpointed_blocks=1"]  # half of the two
    assert proposal["needs"] <= card
    assert f"--options {' '.join([*options, *proposal['options']])}\n" in capsys.readouterr().out
    again = record(card, *proposal["options"])
    assert again["fits"] and again["peak"] == pytest.approx(proposal["peak"], rel=1e-6)


def test_a_card_that_nothing_fits_is_told_so(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    scenes: Path,
    tmp_path: Path,
) -> None:
    options = (
        "--options",
        *SMALLEST,
        f"datasets.ego_irgbench.data_root={scenes}",
        "--card",
        0.5,
        "--json",
        tmp_path / "plan.json",
    )
    command(monkeypatch, "--cfg-path", TINY, *options)
    assert "Nothing tried fits a card of 0.5 GB" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["proposal"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpus", 0), "must be above 0"),
        (("--tokens", 40), "give at least"),
        (
            (
                "--gpus",
                2,
                "--options",
                "run.parallel=fsdp",
                "run.optimizer=adamw",
                *LORA[:1],
                "model.language_model.dtype=nf4",
            ),
            "cannot spread",
        ),
        (("--options", "model.language_model.path={folder}"), "is no Llama's"),
    ],
)
def test_wrong_input_ends_in_one_line(
    arguments: tuple,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text("{}")
    arguments = [str(a).format(folder=tmp_path) for a in arguments]
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, "--cfg-path", TINY, *arguments)
    assert said in capsys.readouterr().err
