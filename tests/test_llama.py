"""The frozen base at small sizes: dtypes, checkpointed blocks, tables larger than the tokenizer."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from annexe.build import build_model
from annexe.checkpoints.run_folder import find_checkpoint
from annexe.datasets.collate import Collator
from annexe.datasets.mixture import Draw
from annexe.errors import UserError
from annexe.models.annexe import Annexe
from annexe.models.language_model.causal_lm import CausalLM, Lora
from annexe.models.language_model.float8 import Float8Linear
from annexe.models.language_model.llama import make_llama
from annexe.models.language_model.tokenizer import load_tokenizer, train_tokenizer
from annexe.trainer import set_up, train
from annexe.training import losses
from tests.test_training import lines_of_log

LORA = ("model.language_model.lora.rank=4", "model.language_model.lora.dropout=0")
# bitsandbytes packs blocks of 64 weights, so its layers want widths that are multiples of it.
WIDE = ("model.language_model.hidden_size=64", "model.language_model.mlp_dim=128")


@pytest.mark.parametrize(
    ("dtype", "bytes_per_weight", "tolerance"), [("int8", 1.1, 0.1), ("nf4", 0.6, 0.3)]
)
def test_a_quantized_base_is_small_and_its_adapters_learn(
    make_parts, dtype, bytes_per_weight, tolerance
):
    pytest.importorskip("bitsandbytes")
    exact, _, batch = make_parts(*LORA, *WIDE, "model.language_model.dtype=bfloat16")
    model, _, _ = make_parts(*LORA, *WIDE, f"model.language_model.dtype={dtype}")
    adapted = [m for m in model.language_model.modules() if hasattr(m, "base_layer")]
    weights = [module.weight for module in adapted]
    num_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    num_weights = sum(module.in_features * module.out_features for module in adapted)
    assert len(weights) == 4
    assert num_bytes <= bytes_per_weight * num_weights
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = exact(batch).token_logits.float()
        logits = model(batch).token_logits.float()
        assert 0 < (logits - expected).norm() / expected.norm() < tolerance
        losses.totals(model.train()(batch), batch, ["answer", "mask"]).sum().backward()
    trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert trained
    assert all(p.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in trained)
    assert not any(weight.requires_grad for weight in weights)


def test_a_float8_base_gives_about_the_same_and_its_adapters_learn_about_the_same(make_parts):
    exact, _, batch = make_parts(*LORA, *WIDE, "model.language_model.dtype=bfloat16")
    model, _, _ = make_parts(*LORA, *WIDE, "model.language_model.dtype=float8")
    weights = model.language_model.base.model.layers.parameters()
    assert sum(w.dtype == torch.int8 for w in weights) == 14  # seven of each of two blocks

    def logits_and_gradients(one: Annexe) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predictions = one.train()(batch)
            losses.totals(predictions, batch, ["answer", "mask"]).sum().backward()
        gradients = [p.grad.flatten() for name, p in one.named_parameters() if "lora_B" in name]
        return predictions.token_logits.detach().float().flatten(), torch.cat(gradients)

    for expected, close in zip(
        logits_and_gradients(exact), logits_and_gradients(model), strict=True
    ):
        assert 0 < (close - expected).norm() / expected.norm() < 0.1


@pytest.fixture
def layouts(monkeypatch) -> list[tuple[bool, bool]]:
    """Of every float8 product: whether its left factor lies in rows and its right one in columns.

    The kernels of GPUs take no other layout; that of CPUs takes any.
    """
    seen = []
    scaled_mm = torch._scaled_mm

    def spy(left: torch.Tensor, right: torch.Tensor, **settings: object) -> torch.Tensor:
        seen.append((left.is_contiguous(), right.t().is_contiguous()))
        return scaled_mm(left, right, **settings)

    monkeypatch.setattr(torch, "_scaled_mm", spy)
    return seen


@pytest.mark.parametrize(
    "backend", ["none", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_float8_products_have_the_layout_of_gpu_kernels(layouts, backend):
    torch.manual_seed(0)
    layer = Float8Linear(torch.nn.Linear(64, 64, bias=False))
    assert layer.weight.is_contiguous()
    assert layer.transposed_weight.is_contiguous()
    heads = torch.randn(2, 4, 6, 16)

    def run(weight: torch.Tensor) -> torch.Tensor:
        """Input and gradient of the layer come transposed, as they may from attention."""
        tokens = heads.transpose(1, 2).flatten(2)
        turned = (tokens.transpose(1, 2).contiguous() * weight[:, None]).transpose(1, 2)
        return layer(tokens * weight).transpose(1, 2).sin() + layer(turned).transpose(1, 2)

    weight = torch.randn(64, requires_grad=True)
    expected = run(weight)
    expected.sum().backward()
    expected_gradient, weight.grad = weight.grad, None
    assert layouts == [(True, True)] * 4

    # What is computed again in the backward pass are no products, as `compile_blocks` has it
    if backend != "none":
        with torch._functorch.config.patch(activation_memory_budget=0.9):
            output = torch.compile(run, backend=backend)(weight)
            output.sum().backward()
        assert layouts == [(True, True)] * 8
        pairs = [(output, expected), (weight.grad, expected_gradient)]
        for found, wanted in pairs:
            assert (found - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("dtype", ["nf4", "float8"])
def test_a_quantized_run_is_saved_and_resumed(make_config, tmp_path, dtype):
    if dtype == "nf4":
        pytest.importorskip("bitsandbytes")
    options = (
        *LORA, *WIDE, f"model.language_model.dtype={dtype}", "run.max_steps=4",
        "run.checkpoint_every=2", "run.keep_checkpoints=3",
    )  # fmt: skip
    train(make_config(*options))
    expected = [line["loss"] for line in lines_of_log(tmp_path / "run")]
    halfway = tmp_path / "run" / "checkpoints" / "step-00000002"
    resumed = tmp_path / "resumed"
    train(make_config(*options, f"run.resume={halfway}", f"run.output_dir={resumed}"))
    assert [line["loss"] for line in lines_of_log(resumed)] == expected[2:]


def test_quantization_says_what_it_needs(make_config, make_parts, monkeypatch):
    with pytest.raises(UserError, match=r"lora\.rank above 0"):
        make_parts("model.language_model.dtype=nf4")
    with pytest.raises(UserError, match=r"multiples of 16, and 'mlp\.gate_proj' is 40 x 64"):
        make_parts(
            *LORA, *WIDE, "model.language_model.mlp_dim=40", "model.language_model.dtype=float8"
        )
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'annexe\[quantize\]'"):
        make_parts(*LORA, "model.language_model.dtype=int8")


def test_fsdp_refuses_a_quantized_base(make_config):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match=r"set run\.parallel=ddp"):
        set_up(make_config(*LORA, *WIDE, "model.language_model.dtype=nf4", "run.parallel=fsdp"))


def test_checkpointed_blocks_keep_less_and_change_nothing(make_parts):
    def run(num_blocks: int) -> tuple[int, dict[str, torch.Tensor]]:
        """Numbers that are saved for the backward pass, and the adapters' gradients."""
        option = f"model.language_model.checkpointed_blocks={num_blocks}"
        model, _, batch = make_parts(*LORA, option)
        blocks = model.language_model.base.model.layers
        are_checkpointed = [block.gradient_checkpointing for block in blocks]
        assert are_checkpointed == [True] * num_blocks + [False] * (2 - num_blocks)

        saved_sizes = []

        def save(tensor: torch.Tensor) -> torch.Tensor:
            saved_sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            total = losses.totals(model.train()(batch), batch, ["analysis", "answer", "mask"]).sum()
        num_saved = sum(saved_sizes)
        total.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if "lora_" in n}
        return num_saved, gradients

    num_saved, expected = run(0)
    for num_blocks in (1, 2):
        num_saved_now, gradients = run(num_blocks)
        assert num_saved_now < num_saved
        for name, gradient in expected.items():
            assert torch.equal(gradients[name], gradient), name


def test_frozen_matrices_in_bfloat16_change_nothing_under_autocast(make_config, make_parts):
    options = (*LORA, "model.rgb_encoder.frozen=true", "model.depth_branch.trained=dpt")
    model, tokenizer, batch = make_parts(*options)
    torch.manual_seed(0)
    smaller = build_model(make_config(*options).model, tokenizer, bf16=True).eval()
    assert smaller.rgb_encoder.vit.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert smaller.rgb_encoder.norm.weight.dtype == torch.float32
    assert smaller.projector.linear.weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(batch)
        predictions = smaller(batch)
    assert torch.equal(predictions.mask_logits, expected.mask_logits)
    assert torch.equal(predictions.token_logits, expected.token_logits)


def test_tables_may_have_more_rows_than_the_tokenizer_has_words(make_config, tmp_path):
    config = make_config(
        "model.language_model.vocab_size=2000", "run.max_steps=1", "run.warmup_steps=0"
    )
    trainer = set_up(config)
    tokenizer = trainer.model.language_model.tokenizer
    num_rows = trainer.model.language_model.base.lm_head.weight.shape[0]
    assert num_rows == 2000 > len(tokenizer.base)
    ids = tokenizer.encode("The mask of the mug is <MSK_1>.")
    assert 2001 in ids
    assert tokenizer.decode([*ids, 1999]) == "The mask of the mug is <MSK_1>."
    collate = Collator(tokenizer, trainer.model.num_image_tokens, 4)
    sample = trainer.train_set[Draw(0, 0, 0)]
    assert trainer.model(collate([sample])).token_logits.shape[1] == 2004
    small = make_config(
        "model.language_model.vocab_size=100", f"run.output_dir={tmp_path / 'small'}"
    )
    with pytest.raises(UserError, match="vocab_size is 100 but the tokenizer"):
        set_up(small)


def test_other_frozen_weights_are_refused(make_config, tmp_path):
    options = (*LORA, "run.max_steps=2", "run.checkpoint_every=1")
    train(make_config(*options))
    fingerprint = find_checkpoint(tmp_path / "run") / "frozen.json"
    values = json.loads(fingerprint.read_text())
    name = "language_model.llama.embed_tokens.weight"
    values[name][3] += 0.01
    fingerprint.write_text(json.dumps(values))
    manifest = fingerprint.with_name("files.json")
    sizes = json.loads(manifest.read_text())
    sizes["frozen.json"] = fingerprint.stat().st_size
    manifest.write_text(json.dumps(sizes))
    with pytest.raises(UserError, match="the frozen weights of language_model are not those"):
        set_up(make_config(*options, "run.max_steps=3", "run.resume=auto"))


# --- Folders that hold no sound Llama -------------------------------------------------------------


@pytest.fixture(scope="session")
def sound_folder(tmp_path_factory) -> Path:
    """A small Llama with its tokenizer, as transformers writes them."""
    folder = tmp_path_factory.mktemp("llama") / "sound"
    tokenizer = train_tokenizer(["a hand holds a mug"], num_slots=4)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def load(folder: Path, **settings: object) -> CausalLM:
    return make_llama(load_tokenizer(folder, 4), path=str(folder), lora=Lora(rank=4), **settings)


def change(file: Path, **values: object) -> None:
    """Set values in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134\n"
# What is written over a file, or set in it, and the words of the message
DAMAGES = [
    ("config.json", "{", r"config.json' is damaged .*fetch it again"),
    ("config.json", "[]", "describes no model"),
    ("config.json", "<html>sign in</html>", "is a web page"),
    ("config.json", {"model_type": "mistral"}, "holds a model of type 'mistral'"),
    ("config.json", {"model_type": 5}, "holds a model of type '5'"),
    ("config.json", {"hidden_size": "wide"}, "cannot load .*'hidden_size' expected int"),
    ("config.json", {"num_attention_heads": 0}, "cannot load .*by zero"),
    ("config.json", {"intermediate_size": 96}, "cannot load the language model|is not complete"),
    ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "quantized with gptq; take"),
    ("config.json", {"quantization_config": {}}, "quantized with an unnamed method"),
    ("model.safetensors", POINTER, "is a Git LFS pointer.*git lfs pull"),
    ("model.safetensors", "", "is empty"),
    ("model.safetensors", "\x10" * 100, "cannot load the language model"),
    ("tokenizer.json", POINTER, "is a Git LFS pointer"),
    ("tokenizer.json", "{}", "cannot load the tokenizer"),
    ("tokenizer.json", "[1", "cannot load the tokenizer"),
    ("tokenizer_config.json", "{", "cannot load the tokenizer"),
    ("tokenizer_config.json", "[]", "cannot load the tokenizer"),
    ("tokenizer_config.json", {"bos_token": None}, "has no bos_token, so it cannot begin a prompt"),
    ("tokenizer_config.json", {"eos_token": None}, "has no eos_token, so it cannot end a response"),
    ("tokenizer_config.json", {"tokenizer_class": "NoSuch"}, None),
]


@pytest.mark.parametrize(("name", "content", "message"), DAMAGES)
def test_a_damaged_llama_folder_ends_in_one_line(sound_folder, tmp_path, name, content, message):
    folder = tmp_path / "llama"
    shutil.copytree(sound_folder, folder)
    if isinstance(content, dict):
        change(folder / name, **content)
    else:
        (folder / name).write_text(content)
    if message is None:
        load(folder)
        return
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_config_json_says_what_it_holds(sound_folder, tmp_path):
    tokenizer = load_tokenizer(sound_folder, 4)
    for name, message in {
        "consolidated.00.pth": "Meta's own format",
        "adapter_model.safetensors": "a LoRA adapter of peft",
        "llama-2-7b.Q4_K_M.gguf": "it holds llama-2-7b.Q4_K_M.gguf",
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(b"x")
        if name.startswith("adapter"):
            (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(UserError, match=message):
            make_llama(tokenizer, path=str(folder))


def test_words_without_a_row_and_rows_without_a_word_say_what_helps(sound_folder, tmp_path):
    # A word more, as [PAD] in many fine-tuned models
    folder = tmp_path / "llama"
    shutil.copytree(sound_folder, folder)
    base = load_tokenizer(folder, 4).base
    base.add_special_tokens({"pad_token": "[PAD]"})
    base.save_pretrained(folder)
    with pytest.raises(UserError, match=r"1 words beyond the \d+ rows of .* tables: '\[PAD\]'"):
        load(folder)

    # The first thing that helps
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(base))
    model.save_pretrained(folder)
    load(folder)

    # Tables that are padded
    model.resize_token_embeddings(len(base), pad_to_multiple_of=64)
    model.save_pretrained(folder)
    num_rows = model.config.vocab_size
    message = rf"have {num_rows} rows.*set model\.language_model\.vocab_size={num_rows}"
    with pytest.raises(UserError, match=message):
        load(folder)
    tokenizer = load_tokenizer(folder, 4, num_rows)
    assert make_llama(tokenizer, path=str(folder)).tokenizer.vocab_size == num_rows


@pytest.mark.parametrize("dtype", ["nf4", "int8", "float8"])
def test_biases_are_not_dropped_by_quantization(sound_folder, tmp_path, dtype):
    folder = tmp_path / "llama"
    shutil.copytree(sound_folder, folder)
    config = LlamaConfig.from_pretrained(folder, attention_bias=True)
    llama = LlamaForCausalLM(config)
    nn.init.normal_(llama.model.layers[0].self_attn.o_proj.bias)
    llama.save_pretrained(folder)

    # The layer gives its bias for an input of 0
    layer = load(folder, dtype=dtype).base.model.layers[0].self_attn.o_proj
    output = layer(torch.zeros(1, 32, dtype=torch.bfloat16))[0]
    expected = llama.model.layers[0].self_attn.o_proj.bias.to(torch.bfloat16)
    torch.testing.assert_close(output, expected.to(output.dtype))


def test_positions_of_the_language_model_are_a_limit(make_parts, make_config, sound_folder):
    # In a batch, with and without responses
    model, tokenizer, batch = make_parts()
    assert model.language_model.max_positions == 2048
    (sample,) = batch.samples[:1]
    num_positions = int(batch.text.position_ids[0].max()) + 1
    arguments = (tokenizer, model.num_image_tokens, 4)
    Collator(*arguments, max_positions=num_positions)([sample])
    message = rf"takes {num_positions} tokens .*has {num_positions - 1} positions"
    with pytest.raises(UserError, match=message):
        Collator(*arguments, max_positions=num_positions - 1)([sample])
    prompts = Collator(*arguments, responses=False)([sample]).text
    length = prompts.prefix_length + int(prompts.branch_length.max())
    Collator(*arguments, responses=False, max_positions=length + 8, num_generated=8)([sample])
    with pytest.raises(UserError, match=r"8 to generate \(run\.max_new_tokens\)"):
        Collator(*arguments, responses=False, max_positions=length + 7, num_generated=8)([sample])

    # In a run
    option = "model.language_model.max_position_embeddings=64"
    trainer = set_up(make_config(option, "run.max_steps=1", "run.warmup_steps=0"))
    with pytest.raises(UserError, match=r"the language model has 64 positions"):
        trainer.train()

    # Of a folder its own count, or fewer where positions beyond change the others
    assert load(sound_folder, max_position_embeddings=77).max_positions == 2048


def test_a_long_rope_is_exact_up_to_its_first_length(sound_folder, tmp_path):
    folder = tmp_path / "llama"
    shutil.copytree(sound_folder, folder)
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 128,
        "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 16.0,
    }  # fmt: skip
    change(folder / "config.json", rope_parameters=rope)
    assert load(folder).max_positions == 128
