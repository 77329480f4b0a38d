"""Whole vision-language models: what annexe makes of a folder, against transformers' own model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from annexe.build import build_dataset, build_model, build_tokenizer, load_config
from annexe.checkpoints.run_folder import require_checkpoint
from annexe.checkpoints.training_state import saved_tensors, trained_tensors
from annexe.config import Config
from annexe.datasets.collate import Collator
from annexe.inference.predictor import Predictor
from annexe.models.annexe import Annexe
from annexe.structures.batch import Batch
from annexe.trainer import train
from tests.conftest import SMALLEST
from tests.test_causal_lm import byte_tokenizer

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LANGUAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "vocab_size": 272,
}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MEAN = [0.48, 0.45, 0.4]
STD = [0.22, 0.23, 0.25]

# As the published templates write an image and a text
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def internvl(language: str) -> tuple[Any, list[str], str]:
    """Configuration, words and template of an InternVL, whose language model is of a family."""
    vision = {**VISION, "intermediate_size": 48, "image_size": [112, 112], "patch_size": [14, 14]}
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config={"model_type": language, **LANGUAGE, "head_dim": 8},
        image_seq_length=16,
    )
    words = [*WORDS, "<img>", "</img>", "<IMG_CONTEXT>"]
    return config, words, CHAT.replace("IMAGE", "<IMG_CONTEXT>\n")


MODELS = {
    "internvl3": lambda: internvl("qwen2"),
    "internvl3_5": lambda: internvl("qwen3"),
}


def randomize(model: nn.Module) -> None:
    """Weights that leave nothing at 1 or 0, where a scale or a bias would not show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)


def save(name: str, folder: Path) -> Any:
    """A tiny whole model of transformers with random weights, saved as a folder."""
    # Words
    config, words, template = MODELS[name]()
    settings: dict[str, Any] = {"eos_token": "<|endoftext|>"}
    if "<img>" in words:
        settings["extra_special_tokens"] = {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
    tokenizer = byte_tokenizer(words, **settings)
    tokenizer.chat_template = template
    config.image_token_id = tokenizer.convert_tokens_to_ids(words[-1])

    # Weights
    torch.manual_seed(0)
    make = transformers.AutoModelForImageTextToText.from_config
    model = make(copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager").eval()
    randomize(model)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor_of(name).save_pretrained(folder)
    return model


def image_processor_of(name: str) -> Any:
    """The image processor of a model, at the size of the tiny ones."""
    statistics = {"image_mean": MEAN, "image_std": STD}
    return transformers.GotOcr2ImageProcessor(
        size={"height": 112, "width": 112}, crop_to_patches=False, **statistics
    )


@pytest.fixture(scope="module")
def wholes(tmp_path_factory) -> dict[str, tuple[Path, Any]]:
    """Folder and model of transformers by name."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = {}
    for name in MODELS:
        folder = tmp_path_factory.mktemp(name)
        found[name] = (folder, save(name, folder))
    return found


@pytest.fixture
def make_whole(scenes, tmp_path):
    """Loads a configuration that names a whole model by one word."""

    def make(folder: Path, *options: str) -> Config:
        kept = [option for option in SMALLEST if option.startswith(("run.", "model.pixel"))]
        cfg = tmp_path / "whole.yaml"
        cfg.write_text(
            f"model:\n  init_from: {folder}\n  depth_branch: none\n  pixel_decoder: query\n"
            "  language_model: {dtype: float32}\n"
            f"datasets:\n  ego_irgbench: {{data_root: {scenes}, queries_per_image: 2}}\n"
        )
        return load_config(cfg, [*kept, f"run.output_dir={tmp_path / 'run'}", *options])

    return make


def built(config: Config, *, responses: bool = True) -> tuple[Annexe, Batch]:
    """The model of a configuration in eval mode, and a batch of two photos."""
    tokenizer = build_tokenizer(config, Path(config.model["language_model"]["path"]))
    torch.manual_seed(0)
    model = build_model(config.model, tokenizer).eval()
    dataset = build_dataset(config, "train")
    collate = Collator(
        tokenizer, model.num_image_tokens, model.pixel_decoder.num_slots, responses=responses
    )
    return model, collate([dataset[0, index] for index in range(2)])


def conversation(
    name: str, stock: Any, batch: Batch, branch: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Prefix, image tokens and one branch of a batch, as the model of transformers takes them.

    Pixels are those of the model's own image processor.
    """
    text = batch.text
    image = int(text.branch_image_index[branch])
    segments = text.segment_ids[image]
    own = int(segments[text.branch_start[branch]])
    columns = ((segments == 0) | (segments == own)).nonzero()[:, 0]
    ids = text.input_ids[image, columns]
    ids[text.image_start : text.prefix_length] = stock.config.image_token_id
    photo = batch.images[image].permute(1, 2, 0).numpy()
    inputs = dict(image_processor_of(name)(photo, return_tensors="pt"))
    inputs.pop("num_patches", None)
    return ids[None], inputs


def processor_of(name: str, tokenizer: Any) -> Any:
    """The processor of a model, which writes image tokens into a prompt."""
    parts = (image_processor_of(name), tokenizer)
    chat = {"chat_template": tokenizer.chat_template}
    videos = transformers.InternVLVideoProcessor()
    return transformers.InternVLProcessor(*parts, videos, image_seq_length=16, **chat)


@pytest.mark.parametrize("name", MODELS)
def test_packed_logits_are_those_of_the_whole_model(wholes, make_whole, name):
    folder, stock = wholes[name]
    model, batch = built(make_whole(folder))
    text = batch.text
    words = model.language_model.tokenizer.vocab_size
    with torch.no_grad():
        encoding = model.encode(batch)
        hidden = model.language_model(encoding.embeddings, text)
        logits = model.language_model.logits(hidden)[..., :words]
        for branch, image in enumerate(text.branch_image_index.tolist()):
            ids, inputs = conversation(name, stock, batch, branch)
            expected = stock(input_ids=ids.clamp(max=words - 1), **inputs).logits[0]
            segments = text.segment_ids[image]
            own = int(segments[text.branch_start[branch]])
            columns = ((segments == 0) | (segments == own)).nonzero()[:, 0]
            # Placeholders are words of our own
            known = int((ids[0] < words).long().cumprod(0).sum())
            torch.testing.assert_close(
                logits[image, columns[:known]], expected[:known], atol=1e-4, rtol=0
            )
            assert expected.abs().max() > 1


@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_are_those_of_the_whole_model(wholes, make_whole, name):
    folder, stock = wholes[name]
    model, batch = built(make_whole(folder), responses=False)
    text = batch.text
    with torch.no_grad():
        prefill = model.language_model.prefill(model.encode(batch).embeddings, text)
        responses = model.text_decoder.decode(prefill, 12)
        for branch, image in enumerate(text.branch_image_index.tolist()):
            ids, inputs = conversation(name, stock, batch, branch)
            whole = stock.generate(input_ids=ids, **inputs, max_new_tokens=12, do_sample=False)
            expected = whole[0, ids.shape[1] :].tolist()
            ends = stock.generation_config.eos_token_id
            if expected[-1] in ends:
                expected.pop()
            assert responses.tokens[branch] == expected, (branch, image)
            assert expected


@pytest.mark.parametrize("name", MODELS)
def test_prompts_are_those_of_the_processor(wholes, make_whole, name):
    folder, stock = wholes[name]
    model, batch = built(make_whole(folder), responses=False)
    processor = processor_of(name, model.language_model.tokenizer.base)
    turn = batch.samples[0].turns[0]
    content = [{"type": "image"}, {"type": "text", "text": f"Name and locate: {turn.query}"}]
    rendered = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    photo = batch.images[0].permute(1, 2, 0).numpy()
    expected = processor(images=photo, text=rendered, return_tensors="pt")["input_ids"][0]
    ids, _ = conversation(name, stock, batch, 1)
    assert ids[0].tolist() == expected.tolist()


def test_a_whole_model_trains_and_comes_back(wholes, make_whole, caplog):
    folder, _ = wholes["internvl3"]
    config = make_whole(folder, "run.max_steps=2", "run.warmup_steps=0")
    caplog.set_level("INFO")
    train(config)
    reports = [line for line in caplog.messages if line.startswith("model.init_from: tensors")]
    assert len(reports) == 1
    assert " to rgb_encoder, 6 to projector, " in reports[0]
    assert reports[0].endswith("0 left over")

    # The adapters are of the language model alone, and nothing of the encoder moves
    checkpoint = require_checkpoint(config.run.output_dir, "latest")
    saved = saved_tensors(checkpoint)
    adapters = [name for name in saved if ".lora_" in name]
    assert adapters
    assert all(name.startswith("language_model.") for name in adapters)
    assert not any(name.startswith("rgb_encoder.") for name in saved)

    # The same model again
    predictor = Predictor.from_run(Path(config.run.output_dir), device="cpu", max_new_tokens=4)
    restored = trained_tensors(predictor.model)
    assert restored.keys() == saved.keys()
    for tensor_name, tensor in saved.items():
        assert torch.equal(restored[tensor_name], tensor), tensor_name
