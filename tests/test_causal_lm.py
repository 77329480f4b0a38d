"""Language models of any family and prompt templates, against transformers' own way."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from annexe.build import restore_model
from annexe.checkpoints.run_folder import find_checkpoint
from annexe.config import device_settings
from annexe.datasets.collate import Branch, Collator, Padding, pack, unpadded_indices
from annexe.distributed import make_accelerator
from annexe.errors import UserError
from annexe.inference.predictor import check_question
from annexe.models.language_model.causal_lm import CausalLM, Lora, load_causal_lm
from annexe.models.language_model.generation import GreedyDecoder
from annexe.models.language_model.gguf_file import convert_gguf
from annexe.models.language_model.kv_cache import Prefill
from annexe.models.language_model.prompt_templates import find_template
from annexe.models.language_model.tokenizer import TextTokenizer, load_tokenizer
from annexe.structures.batch import PackedText
from annexe.tools.weights import export_run
from annexe.trainer import set_up, train

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def byte_tokenizer(words: list[str], **settings: object) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes and some special words, with tokenizer.json alone."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: index for index, word in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    base = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    base.add_special_tokens({"additional_special_tokens": words})
    return base


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory) -> Path:
    """A tokenizer of a chat model, without a beginning of sequence."""
    folder = tmp_path_factory.mktemp("chat")
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    base = byte_tokenizer(words, eos_token="<|endoftext|>")
    base.chat_template = CHATML
    base.save_pretrained(folder)
    return folder


# --- Prompt templates -----------------------------------------------------------------------------


def test_a_chat_template_is_split_around_image_and_task(chat_folder):
    split = load_tokenizer(chat_folder, 4, None, "auto")
    written = load_tokenizer(chat_folder, 4, None, "chatml")
    assert split.template == written.template
    assert split.eos_id == split.base.convert_tokens_to_ids("<|im_end|>") != split.base.eos_token_id

    # Its words around an image are those of a conversation
    messages = [{"role": "user", "content": "\nName and locate: the mug"}]
    whole = split.base.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    task = split.encode(split.template.query_prompt("the mug"))
    assert split.base.decode(split.prefix_ids + task) == whole


def test_llama_3_is_asked_as_its_own_template_does():
    words = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    base = byte_tokenizer(words, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    base.chat_template = LLAMA3
    by_name = TextTokenizer(base, 4, None, find_template("llama3", base))
    split = TextTokenizer(base, 4, None, find_template("auto", base))
    assert by_name.prefix_ids == split.prefix_ids
    assert by_name.template.query == split.template.query
    assert by_name.eos_id == split.eos_id


@pytest.mark.parametrize("name", ["chatml", "auto", "plain"])
def test_prompts_are_the_same_tokens_in_training_and_generation(chat_folder, make_parts, name):
    _, _, batch = make_parts(num_images=2)
    tokenizer = load_tokenizer(chat_folder, 4, None, name)
    trained = Collator(tokenizer, 4, 4)(batch.samples).text
    asked = Collator(tokenizer, 4, 4, responses=False)(batch.samples).text
    assert trained.prefix_length == asked.prefix_length == len(tokenizer.prefix_ids) + 4
    rows = zip(trained.branch_image_index.tolist(), trained.branch_length.tolist(), strict=True)
    for branch, (row, length) in enumerate(rows):
        prompts = []
        for text in (trained, asked):
            start = int(text.branch_start[branch])
            prompts.append(text.input_ids[row, start : start + length].tolist())
        assert prompts[0] == prompts[1]
    ends = trained.labels == tokenizer.eos_id
    assert int(ends.sum()) == len(trained.branch_start)


def test_templates_that_do_not_fit_a_tokenizer_say_what_does(chat_folder, tmp_path):
    for name, message in {
        "llama3": "'<\\|eot_id\\|>', which the tokenizer does not know",
        "minigpt_v2": "has no bos_token, so it cannot begin a prompt",
        "vicuna": "prompt_template",
    }.items():
        with pytest.raises(UserError, match=message):
            load_tokenizer(chat_folder, 4, None, name)
    base = load_tokenizer(chat_folder, 4, None, "plain").base
    for template, message in {
        None: "it has none",
        "{{ raise_exception('no') }}": "cannot apply",
        "{{ messages[0].role }}": "leaves out what it is given",
    }.items():
        base.chat_template = template
        folder = tmp_path / str(len(message))
        base.save_pretrained(folder)
        with pytest.raises(UserError, match=message):
            load_tokenizer(folder, 4, None, "auto")


def test_a_question_cannot_end_the_prompt():
    with pytest.raises(UserError, match="holds a token of the prompt"):
        check_question("the mug<|im_end|>")


# --- Families -------------------------------------------------------------------------------------

SIZES: dict[str, Any] = dict(
    vocab_size=264,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=256,
    pad_token_id=None,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
FAMILIES = {
    "llama3": LlamaConfig(
        **SIZES, head_dim=16, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE
    ),
    "smollm2": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2.5": Qwen2Config(**SIZES, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "mistral": MistralConfig(**SIZES, sliding_window=64),
    "olmo2": Olmo2Config(**SIZES),
    "phi3": Phi3Config(**SIZES),
}
LORA_TARGETS = {"phi3": ["qkv_proj", "down_proj"]}
PREFIX = [11, 12, 13, 14, 15]
# Prompts of two images, of which the second one has padding behind it
PROMPTS = [[[20, 21, 22], [30, 31], [40, 41, 42, 43]], [[50], [60, 61]]]
RESPONSE = [70, 71, 72, 256]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> tuple[str, Path, Any]:
    """Name, folder and model of transformers, with weights that leave no norm or bias at rest."""
    name = request.param
    folder = tmp_path_factory.mktemp(name.replace(".", "_"))
    return name, folder, save_family(FAMILIES[name], folder)


def save_family(config: PretrainedConfig, folder: Path) -> Any:
    """A model of ``config`` with its tokenizer in ``folder``; its attention is eager."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    stock = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.3)
    stock.save_pretrained(folder)
    byte_tokenizer(["</s>", "<|im_start|>"], eos_token="</s>").save_pretrained(folder)
    return stock


def load(folder: Path, **settings: Any) -> CausalLM:
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer = load_tokenizer(folder, 4, rows, "plain")
    defaults: dict[str, Any] = {"dtype": "float32", "lora": Lora(rank=0)}
    return load_causal_lm(tokenizer, path=str(folder), **(defaults | settings)).eval()


def packed(response: list[int]) -> PackedText:
    """All prompts, each with the same response."""
    branches: list[list[Branch]] = []
    for image in PROMPTS:
        branches.append([(prompt, response) for prompt in image])
    return pack(branches, PREFIX, 0, Padding())


def all_prompts() -> list[list[int]]:
    return [prompt for image in PROMPTS for prompt in image]


def label_logits(model: CausalLM, text: PackedText) -> torch.Tensor:
    """Logits of the words where the labels are, float[T, V]."""
    hidden = model(model.embed(text.input_ids), text).flatten(0, 1)
    return model.logits(hidden[text.label_positions])[:, : model.tokenizer.vocab_size]


def logits_and_gradients(model: CausalLM, text: PackedText) -> list[torch.Tensor]:
    """Logits where the labels are, and gradients of all weights for them."""
    model.zero_grad()
    logits = label_logits(model, text)
    logits.sin().sum().backward()
    return [logits, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def own_logits(stock: Any, response: list[int]) -> torch.Tensor:
    """The same by a model of transformers, which runs every branch alone behind the prefix."""
    logits = []
    for prompt in all_prompts():
        ids = torch.tensor([PREFIX + prompt + response])
        start = len(PREFIX) + len(prompt) - 1
        logits.append(stock(input_ids=ids, use_cache=False).logits[0, start:-1])
    return torch.cat(logits)


def decoded(
    model: CausalLM, num_tokens: int, *, decoder: GreedyDecoder | None = None
) -> list[list[int]]:
    text = packed([])
    prefill: Prefill = model.prefill(model.embed(text.input_ids), text, last_alone=True)
    return (decoder or GreedyDecoder(model)).decode(prefill, num_tokens).tokens


def generated(stock: Any, num_tokens: int) -> list[list[int]]:
    """Greedy tokens of transformers up to the first that ends a response."""
    ends = stock.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    rows = []
    for prompt in all_prompts():
        ids = torch.tensor([PREFIX + prompt])
        mask = torch.ones_like(ids)
        row = stock.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=num_tokens, pad_token_id=0
        )
        tokens = row[0, ids.shape[1] :].tolist()
        rows.append([token for token in tokens if token not in ends])
    return rows


@torch.no_grad()
def test_packed_branches_equal_each_alone_in_transformers(family):
    _, folder, stock = family
    model = load(folder)
    assert model.model.state_dict().keys() == stock.state_dict().keys()
    expected = own_logits(stock, RESPONSE)
    logits = label_logits(model, packed(RESPONSE))
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_greedy_generation_is_that_of_transformers(family, tmp_path):
    name, folder, stock = family
    expected = generated(stock, 12)
    model = load(folder)
    assert decoded(model, 12) == expected

    # With joint products, which read the prompts as well
    decoder = GreedyDecoder(model)
    assert decoder.join_products() == (name not in ("olmo2", "phi3"))
    assert (model.prompt_reader is not None) == (name not in ("olmo2", "phi3"))
    assert decoded(model, 12, decoder=decoder) == expected

    # Further ends of sequence, which the folder names
    stock = copy.deepcopy(stock)
    stock.generation_config.eos_token_id = [256, expected[0][4], expected[3][2]]
    stock.save_pretrained(tmp_path)
    load_tokenizer(folder, 4, None, "plain").save(tmp_path)
    cut = generated(stock, 12)
    assert cut != expected
    assert decoded(load(tmp_path), 12) == cut


def test_the_last_block_may_leave_out_the_prefix(family, monkeypatch):
    name, folder, _ = family
    model = load(folder)
    assert model.can_skip_prefix == (name not in ("olmo2", "phi3"))
    assert not load(folder, checkpointed_blocks=2).can_skip_prefix
    assert not model.skips_prefix, "a CPU computes all states"
    if not model.can_skip_prefix:
        return

    rows = packed(RESPONSE)
    without_padding = replace(rows, unpadded_indices=unpadded_indices(rows.segment_ids.numpy()))
    for text in (rows, without_padding):
        expected = logits_and_gradients(model, text)
        with monkeypatch.context() as patch:
            patch.setattr(CausalLM, "skips_prefix", True)
            torch.testing.assert_close(
                logits_and_gradients(model, text), expected, atol=1e-3, rtol=1e-4
            )
            hidden = model(model.embed(text.input_ids), text)
            assert not hidden[:, : len(PREFIX)].any()

    # Generation reads keys and values of the prefix all the same
    tokens = decoded(model, 4)
    monkeypatch.setattr(CausalLM, "skips_prefix", True)
    assert decoded(model, 4) == tokens


def test_adapters_are_those_of_peft_and_learn(family, tmp_path):
    name, folder, stock = family
    targets = LORA_TARGETS.get(name, ["q_proj", "v_proj", "down_proj"])
    torch.manual_seed(1)
    model = load(folder, lora=Lora(rank=4, alpha=8, dropout=0.0, targets=targets)).train()

    # 20 steps
    text = packed(RESPONSE)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for _ in range(20):
        loss = cross_entropy(label_logits(model, text), text.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]

    # Saved, on the stock model, merged, and merged by ourselves
    tensors = {key: value for key, value in model.named_parameters() if value.requires_grad}
    model.eval().save_extras(tmp_path, tensors)
    with torch.no_grad():
        logits = label_logits(model, text)
        adapted = PeftModel.from_pretrained(copy.deepcopy(stock), tmp_path / "adapter").eval()
        torch.testing.assert_close(own_logits(adapted, RESPONSE), logits, atol=1e-4, rtol=1e-4)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(own_logits(merged, RESPONSE), logits, atol=1e-4, rtol=1e-4)
        model.merge_adapters()
        torch.testing.assert_close(label_logits(model, text), logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_quantized_families_are_the_same_but_for_their_weights(family, dtype):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    _, folder, _ = family
    exact = load(folder)
    coarse = load(folder, dtype=dtype, lora=Lora(rank=2, targets=["o_proj"]))

    # The exact model with the weights that 4 bits hold
    layers = dict(coarse.base.model.layers.named_modules())
    for name, layer in exact.base.model.layers.named_modules():
        quantized = layers.get(f"{name}.base_layer", layers.get(name))
        if isinstance(layer, nn.Linear) and dtype == "nf4":
            weight = quantized.weight
            values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            layer.weight.copy_(values)

    text = packed(RESPONSE)
    expected = label_logits(exact, text)
    distance = (label_logits(coarse, text).float() - expected).norm() / expected.norm()
    assert distance < 0.15


# --- A run ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_is_trained_resumed_and_exported(make_config, tmp_path, rank):
    # A tied table with rows to spare, and a tokenizer that knows a chat
    folder = tmp_path / "smollm2"
    stock = save_family(FAMILIES["smollm2"], folder)
    base = byte_tokenizer(["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    base.chat_template = CHATML
    base.save_pretrained(folder)
    options = (
        "model.language_model.type=causal_lm",
        f"model.language_model.path={folder}",
        "model.language_model.dtype=float32",
        f"model.language_model.lora.rank={rank}",
        "model.rgb_encoder.image_size=56",
    )
    fresh = set_up(make_config(*options, "run.max_steps=1", "run.warmup_steps=0")).model
    config = make_config(*options, "run.max_steps=2", "run.warmup_steps=0")
    train(config)
    run_folder = Path(config.run.output_dir)

    # What it has saved answers
    checkpoint = find_checkpoint(run_folder)
    model = restore_model(config, checkpoint, make_accelerator(**device_settings(config.run)))
    tokenizer = model.language_model.tokenizer
    assert tokenizer.template == fresh.language_model.tokenizer.template
    assert tokenizer.vocab_size == SIZES["vocab_size"]
    tied = model.language_model.base
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    changed = not torch.equal(tied.lm_head.weight, stock.lm_head.weight)
    assert changed == (rank == 0)

    # And what it exports is the same model in transformers
    export_run(str(run_folder), tmp_path / "out", merge=rank > 0)
    exported = tmp_path / "out" / "language_model"
    same = AutoModelForCausalLM.from_pretrained(exported).eval()
    ids = torch.tensor([PREFIX])
    with torch.no_grad():
        expected = model.language_model.base(ids).logits
        torch.testing.assert_close(same(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert load_tokenizer(exported, 4, None, "auto").template == tokenizer.template


# --- What is refused ------------------------------------------------------------------------------

REFUSED = {
    "gemma2": (Gemma2Config(**SIZES, head_dim=16), "soft-capped .attn_logit_softcapping"),
    "mamba": (MambaConfig(hidden_size=32, num_hidden_layers=2), "carry a state"),
    "gpt2": (GPT2Config(n_embd=32, n_layer=2, n_head=2), "laid out otherwise"),
    "granite": (GraniteConfig(**SIZES, logits_scaling=4.0), "factor of its own .logits_scaling"),
    "granite_residual": (
        GraniteConfig(**SIZES, attention_multiplier=0.5, residual_multiplier=0.3),
        None,
    ),
    "cohere": (CohereConfig(**SIZES), "factor of its own .logit_scale"),
    "gpt_oss": (GptOssConfig(**SIZES, head_dim=16), "mixture of experts"),
    "sinks": (GptOssConfig(**SIZES, head_dim=16, num_local_experts=0), "cannot be packed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_packed_are_refused_by_name(tmp_path, name):
    config, reason = REFUSED[name]
    config.save_pretrained(tmp_path)
    byte_tokenizer([], eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, 4, config.get_text_config().vocab_size, "plain")
    if reason is None:
        load_causal_lm(tokenizer, path=str(tmp_path), init="random", dtype="float32")
        return
    with pytest.raises(UserError, match=reason) as caught:
        load_causal_lm(tokenizer, path=str(tmp_path), init="random")
    assert "\n" not in str(caught.value)


def test_other_folders_say_what_they_hold(tmp_path):
    # An adapter
    tokenizer = TextTokenizer(byte_tokenizer([], eos_token="</s>"), 4, 264)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="a LoRA adapter of peft, not a whole model"):
        load_causal_lm(tokenizer, path=str(adapter))

    # A difference of two models, as of Vicuna
    delta = tmp_path / "delta"
    stock = save_family(FAMILIES["smollm2"], delta)
    with torch.no_grad():
        stock.model.norm.weight.mul_(1e-3)
    stock.save_pretrained(delta)
    with pytest.raises(UserError, match="the difference of two models"):
        load(delta)


def test_windows_and_ropes_limit_positions_in_training_and_decoding(tmp_path, make_parts):
    for name, config, limit in (
        ("window", MistralConfig(**SIZES, sliding_window=64), 64),
        ("wide", MistralConfig(**SIZES, sliding_window=4096), 256),
        ("full", Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=64), 256),
        ("some", Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=64,
                             max_window_layers=1), 64),
        ("dynamic", LlamaConfig(**SIZES, rope_parameters=dict(
            rope_type="dynamic", rope_theta=10000.0, factor=4.0)), 256),
    ):  # fmt: skip
        save_family(config, tmp_path / name)
        assert load(tmp_path / name).max_positions == limit, name

    # Beyond it nothing is read, with and without responses
    _, _, batch = make_parts(num_images=2)
    tokenizer = load(tmp_path / "window").tokenizer
    for responses in (True, False):
        with pytest.raises(UserError, match="the language model has 64 positions"):
            Collator(tokenizer, 40, 4, responses=responses, max_positions=64)(batch.samples)


def test_a_folder_may_have_no_number_for_the_dropout_of_attention(tmp_path):
    save_family(LlamaConfig(**SIZES, attention_dropout=None), tmp_path)
    assert decoded(load(tmp_path), 2)


def test_attention_refuses_what_it_does_not_know(family):
    _, folder, _ = family
    model = load(folder)
    text = packed([])
    kwargs = [{"attention_mask": None, "s_aux": torch.zeros(4)}] * 2
    with pytest.raises(TypeError, match="s_aux"):
        model.run_layers(model.embed(text.input_ids), text.position_ids, kwargs)


def test_random_weights_take_the_sizes_of_a_folder(tmp_path):
    FAMILIES["qwen3"].save_pretrained(tmp_path)
    byte_tokenizer([], eos_token="</s>").save_pretrained(tmp_path)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = load(tmp_path, init="random")
    assert model.head_dim == 32
    assert model.base.model.layers[0].self_attn.q_norm.weight.shape == (32,)

    # The check that a family can be packed draws no number of the run's
    torch.set_rng_state(before)
    again = load(tmp_path, init="random")
    for first, second in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)


def test_a_gguf_file_becomes_a_folder(tmp_path):
    with pytest.raises(UserError, match="no file"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    for name, content, message in (
        ("model.txt", b"text", "is no GGUF file"),
        ("model.gguf", b"GGUF" + bytes(20), "cannot convert|pip install gguf"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            convert_gguf(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    # A model with one block, as llama.cpp stores it
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES["smollm2"])
    config.num_hidden_layers = 1
    stock = LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(48)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(264)
    base = byte_tokenizer(["</s>", "<|im_start|>"], eos_token="</s>")
    words = [base.convert_ids_to_tokens(index) or f"<unused{index}>" for index in range(264)]
    words[258:260] = ["ab", "<|endoftext|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * 256 + [3, 3, 1] + [3] * 5)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for key, tensor in stock.state_dict().items():
        if key == "lm_head.weight":
            continue
        array = tensor.numpy()
        heads = {"q_proj": 4, "k_proj": 2}.get(key.split(".")[-2])
        if heads is not None:  # halves of a head are interleaved there
            array = array.reshape(heads, 2, -1, 48).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(key, (".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    converted = load(tmp_path / "out")
    with torch.no_grad():
        expected = own_logits(stock.eval(), RESPONSE)
        torch.testing.assert_close(label_logits(converted, packed(RESPONSE)), expected)
