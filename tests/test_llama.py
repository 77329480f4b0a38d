"""The frozen base at small sizes: what it is held in, what is computed again, tables larger than the tokenizer."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from annexe.build import build_model
from annexe.checkpoints.run_folder import find_checkpoint
from annexe.datasets.collate import Collator
from annexe.errors import UserError
from annexe.trainer import Trainer, train
from annexe.training import losses
from tests.test_training import log_of

LORA = ("model.language_model.lora.rank=4", "model.language_model.lora.dropout=0")
# bitsandbytes packs blocks of 64 weights, so its layers want widths that are multiples of it.
WIDE = ("model.language_model.hidden_size=64", "model.language_model.mlp_dim=128")


@pytest.mark.parametrize(
    ("dtype", "bytes_a_weight", "tolerance"), [("int8", 1.1, 0.1), ("nf4", 0.6, 0.3)]
)
def test_a_quantised_base_is_small_and_its_adapters_learn(
    make_parts, dtype, bytes_a_weight, tolerance
):
    pytest.importorskip("bitsandbytes")
    exact, _, batch = make_parts(*LORA, *WIDE, "model.language_model.dtype=bfloat16")
    model, _, _ = make_parts(*LORA, *WIDE, f"model.language_model.dtype={dtype}")
    weights = [
        m.weight
        for m in model.language_model.llama.model.layers.modules()
        if hasattr(m, "base_layer")
    ]
    sizes = [w.numel() * w.element_size() for w in weights]
    shapes = [
        m.in_features * m.out_features
        for m in model.language_model.modules()
        if hasattr(m, "base_layer")
    ]
    assert len(sizes) == 4 and sum(sizes) <= bytes_a_weight * sum(shapes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = exact(batch).token_logits.float(), model(batch).token_logits.float()
        assert 0 < (found - expected).norm() / expected.norm() < tolerance
        losses.totals(model.train()(batch), batch, ["answer", "mask"]).sum().backward()
    trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert trained and all(p.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in trained)
    assert not any(weight.requires_grad for weight in weights)


def test_a_float8_base_says_about_the_same_and_its_adapters_learn_about_the_same(make_parts):
    exact, _, batch = make_parts(*LORA, *WIDE, "model.language_model.dtype=bfloat16")
    model, _, _ = make_parts(*LORA, *WIDE, "model.language_model.dtype=float8")
    weights = dict(model.language_model.llama.model.layers.named_parameters())
    assert (
        sum(weight.dtype == torch.int8 for weight in weights.values()) == 14
    )  # seven of each of two blocks
    found = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for one in (exact, model):
            predictions = one.train()(batch)
            losses.totals(predictions, batch, ["answer", "mask"]).sum().backward()
            gradients = [p.grad.flatten() for name, p in one.named_parameters() if "lora_B" in name]
            found.append(
                (predictions.token_logits.detach().float().flatten(), torch.cat(gradients))
            )
    for expected, close in zip(*found, strict=True):
        assert 0 < (close - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("dtype", ["nf4", "float8"])
def test_a_quantised_run_is_saved_and_resumed(make_config, tmp_path, dtype):
    if dtype == "nf4":
        pytest.importorskip("bitsandbytes")
    options = (
        *LORA, *WIDE, f"model.language_model.dtype={dtype}", "run.max_steps=4",
        "run.checkpoint_every=2", "run.keep_checkpoints=3",
    )  # fmt: skip
    train(make_config(*options))
    straight = [line["loss"] for line in log_of(tmp_path / "run")]
    halfway = tmp_path / "run" / "checkpoints" / "step-00000002"
    train(make_config(*options, f"run.resume={halfway}", f"run.output_dir={tmp_path / 'on'}"))
    assert [line["loss"] for line in log_of(tmp_path / "on")] == straight[2:]


def test_quantisation_says_what_it_needs(make_config, make_parts, monkeypatch):
    with pytest.raises(UserError, match=r"lora\.rank above 0"):
        make_parts("model.language_model.dtype=nf4")
    with pytest.raises(UserError, match=r"multiples of 16, and 'mlp\.gate_proj' is 40 x 64"):
        make_parts(
            *LORA, *WIDE, "model.language_model.mlp_dim=40", "model.language_model.dtype=float8"
        )
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'annexe\[quantise\]'"):
        make_parts(*LORA, "model.language_model.dtype=int8")


def test_fsdp_refuses_a_quantised_base(make_config):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match=r"set run\.parallel=ddp"):
        Trainer(make_config(*LORA, *WIDE, "model.language_model.dtype=nf4", "run.parallel=fsdp"))


@pytest.mark.parametrize("number", [1, 2])
def test_checkpointed_blocks_keep_less_and_change_nothing(make_parts, number):
    def gradients(checkpointed):
        model, _, batch = make_parts(
            *LORA, f"model.language_model.checkpointed_blocks={checkpointed}"
        )
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (kept.append(t.numel()), t)[1], lambda t: t
        ):
            total = losses.totals(model.train()(batch), batch, ["analysis", "answer", "mask"]).sum()
        total.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if "lora_" in name}
        return (
            sum(kept),
            found,
            [block.gradient_checkpointing for block in model.language_model.llama.model.layers],
        )

    kept, expected, _ = gradients(0)
    less, found, flags = gradients(number)
    assert less < kept and flags == [True] * number + [False] * (2 - number)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_frozen_matrices_in_bfloat16_change_nothing_under_autocast(make_config, make_parts):
    options = (*LORA, "model.rgb_encoder.frozen=true", "model.depth_branch.trained=dpt")
    model, tokenizer, batch = make_parts(*options)
    torch.manual_seed(0)
    smaller = build_model(make_config(*options).model, tokenizer, bf16=True).eval()
    assert smaller.rgb_encoder.vit.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert (
        smaller.rgb_encoder.norm.weight.dtype
        == smaller.projector.linear.weight.dtype
        == torch.float32
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = model(batch), smaller(batch)
    assert torch.equal(found.mask_logits, expected.mask_logits)
    assert torch.equal(found.token_logits, expected.token_logits)


def test_tables_may_have_more_rows_than_the_tokenizer_has_words(make_config, tmp_path):
    config = make_config(
        "model.language_model.vocab_size=2000", "run.max_steps=1", "run.warmup_steps=0"
    )
    trainer = Trainer(config)
    assert (
        trainer.model.language_model.llama.lm_head.weight.shape[0]
        == 2000
        > len(trainer.tokenizer.base)
    )
    ids = trainer.tokenizer.encode("The mask of the mug is <MSK_1>.")
    assert (
        2001 in ids and trainer.tokenizer.decode([*ids, 1999]) == "The mask of the mug is <MSK_1>."
    )
    collate = Collator(trainer.tokenizer, trainer.model.num_image_tokens, 4)
    assert trainer.model(collate([trainer.train_set[0, 0]])).token_logits.shape[1] == 2004
    with pytest.raises(UserError, match="vocab_size is 100 but the tokenizer"):
        Trainer(
            make_config(
                "model.language_model.vocab_size=100", f"run.output_dir={tmp_path / 'small'}"
            )
        )


def test_other_frozen_weights_are_refused(make_config, tmp_path):
    options = (*LORA, "run.max_steps=2", "run.checkpoint_every=1")
    train(make_config(*options))
    probe = find_checkpoint(tmp_path / "run") / "frozen.json"
    values = json.loads(probe.read_text())
    name = "language_model.model.base_model.model.model.embed_tokens.weight"
    values[name][3] += 0.01
    probe.write_text(json.dumps(values))
    sizes = probe.with_name("files.json")
    sizes.write_text(
        json.dumps(json.loads(sizes.read_text()) | {"frozen.json": probe.stat().st_size})
    )
    with pytest.raises(UserError, match="the frozen weights of language_model are not those"):
        Trainer(make_config(*options, "run.max_steps=3", "run.resume=auto"))
