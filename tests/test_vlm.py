"""Whole vision-language models: what annexe makes of a folder, against transformers' own model."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from annexe.benchmarks.flops import flops_of_batch
from annexe.benchmarks.memory import measure
from annexe.benchmarks.random_batch import nominal_branches
from annexe.benchmarks.random_model import without_files
from annexe.build import build_dataset, build_model, build_tokenizer, load_config
from annexe.checkpoints.run_folder import require_checkpoint
from annexe.checkpoints.training_state import saved_tensors, trained_tensors
from annexe.config import Config
from annexe.datasets.collate import Collator, unpadded_indices
from annexe.errors import UserError
from annexe.inference.predictor import Predictor
from annexe.models.annexe import Annexe
from annexe.models.vision_encoders.hf_vit import HfViT
from annexe.models.vision_encoders.qwen_vit import QwenViT
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


def qwen_vl(version: str) -> tuple[Any, list[str], str]:
    """Configuration, words and template of a Qwen2.5-VL or a Qwen3-VL."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
    language = {**LANGUAGE, "rope_parameters": rope}
    vision = {"hidden_size": 32, "depth": 3, "num_heads": 2, "intermediate_size": 48}
    vision["out_hidden_size"] = LANGUAGE["hidden_size"]
    if version == "2.5":
        windows = {"window_size": 56, "fullatt_block_indexes": [1], "patch_size": 14}
        config = transformers.Qwen2_5_VLConfig(
            vision_config={**vision, **windows}, text_config=language
        )
    else:
        levels = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 36}
        config = transformers.Qwen3VLConfig(
            vision_config={**vision, **levels, "patch_size": 16},
            text_config={**language, "head_dim": 8},
        )
    words = [*WORDS, "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"]
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return config, words, CHAT.replace("IMAGE", image)


def llava_onevision() -> tuple[Any, list[str], str]:
    """Configuration, words and template of a LLaVA-OneVision."""
    vision = {**VISION, "intermediate_size": 48, "image_size": 112, "patch_size": 14}
    config = transformers.LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **vision},
        text_config={"model_type": "qwen2", **LANGUAGE},
        image_grid_pinpoints=[[112, 112], [112, 224]],
    )
    return config, [*WORDS, "<image>"], CHAT.replace("IMAGE", "<image>\n")


MODELS = {
    "internvl3": lambda: internvl("qwen2"),
    "internvl3_5": lambda: internvl("qwen3"),
    "qwen2_5_vl": lambda: qwen_vl("2.5"),
    "qwen3_vl": lambda: qwen_vl("3"),
    "llava_onevision": llava_onevision,
}
# Sides of square photos; windows of Qwen2.5-VL do not divide theirs
SIZES = {"internvl3": 112, "internvl3_5": 112, "qwen2_5_vl": 140, "qwen3_vl": 128}
SIZES["llava_onevision"] = 112


def mostly_slow(*fast: str) -> list[Any]:
    """All models, of which only some are tested in the fast suite."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


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
    if name.startswith("qwen"):
        patch_size = 14 if name == "qwen2_5_vl" else 16
        area = SIZES[name] ** 2
        return transformers.Qwen2VLImageProcessor(
            patch_size=patch_size, min_pixels=area, max_pixels=area, **statistics
        )
    if name == "llava_onevision":
        return transformers.LlavaOnevisionImageProcessor(
            size={"height": 112, "width": 112},
            image_grid_pinpoints=[[112, 112], [112, 224]],
            **statistics,
        )
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
def make_whole(wholes, scenes, tmp_path):
    """Loads a configuration that names a whole model by one word."""

    def make(name: str, *options: str) -> Config:
        folder, _ = wholes[name]
        kept = [option for option in SMALLEST if option.startswith(("run.", "model.pixel"))]
        cfg = tmp_path / "whole.yaml"
        cfg.write_text(
            f"model:\n  init_from: {folder}\n  depth_branch: none\n  pixel_decoder: query\n"
            "  language_model: {dtype: float32}\n"
            f"datasets:\n  ego_irgbench: {{data_root: {scenes}, queries_per_image: 2}}\n"
        )
        size = f"model.rgb_encoder.image_size={SIZES[name]}"
        return load_config(cfg, [*kept, size, f"run.output_dir={tmp_path / 'run'}", *options])

    return make


def built(config: Config, *, responses: bool = True) -> tuple[Annexe, Batch]:
    """The model of a configuration in eval mode, and a batch of two photos."""
    tokenizer = build_tokenizer(config, Path(config.model["language_model"]["path"]))
    torch.manual_seed(0)
    model = build_model(config.model, tokenizer).eval()
    dataset = build_dataset(config, "train")
    collate = Collator(
        tokenizer,
        model.num_image_tokens,
        model.pixel_decoder.num_slots,
        responses=responses,
        num_image_positions=model.num_image_positions,
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
    if name.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids[None] == stock.config.image_token_id).int()
    if name == "llava_onevision":
        inputs["batch_num_images"] = torch.tensor([2])  # of several photos each is one tile
    return ids[None], inputs


def processor_of(name: str, tokenizer: Any) -> Any:
    """The processor of a model, which writes image tokens into a prompt."""
    parts = (image_processor_of(name), tokenizer)
    chat = {"chat_template": tokenizer.chat_template}
    if name.startswith("qwen"):
        videos = transformers.Qwen2VLVideoProcessor()
        return transformers.Qwen2_5_VLProcessor(*parts, videos, **chat)
    videos = transformers.InternVLVideoProcessor()
    return transformers.InternVLProcessor(*parts, videos, image_seq_length=16, **chat)


@pytest.mark.parametrize("name", mostly_slow("internvl3", *list(MODELS)[2:]))
def test_packed_logits_are_those_of_the_whole_model(wholes, make_whole, name):
    _, stock = wholes[name]
    model, batch = built(make_whole(name))
    text = batch.text
    words = model.language_model.tokenizer.vocab_size
    with torch.no_grad():
        encoding = model.encode(batch)
        levels = encoding.image_levels
        hidden = model.language_model(encoding.embeddings, text, image_levels=levels)
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


@pytest.mark.parametrize("name", ["qwen3_vl"])
def test_rows_without_padding_are_the_same(make_whole, name):
    model, batch = built(make_whole(name))
    indices = unpadded_indices(batch.text.segment_ids.numpy())
    in_one_row = replace(batch.text, unpadded_indices=indices)
    with torch.no_grad():
        encoding = model.encode(batch)
        padded, unpadded = (
            model.language_model(encoding.embeddings, text, image_levels=encoding.image_levels)
            for text in (batch.text, in_one_row)
        )
    is_token = batch.text.segment_ids >= 0
    torch.testing.assert_close(unpadded[is_token], padded[is_token], atol=1e-5, rtol=0)


def test_positions_and_levels_of_a_photo_count(make_whole):
    model, batch = built(make_whole("qwen3_vl"))
    language_model = model.language_model
    with torch.no_grad():
        encoding = model.encode(batch)
        arguments = (encoding.embeddings, batch.text)
        hidden = language_model(*arguments, image_levels=encoding.image_levels)
        without_levels = language_model(*arguments)
        language_model.has_image_axes = False
        in_line = language_model(*arguments, image_levels=encoding.image_levels)
    assert (hidden - without_levels).abs().max() > 0.1
    assert (hidden - in_line).abs().max() > 0.1


@pytest.mark.parametrize("name", mostly_slow("internvl3", "qwen3_vl"))
def test_greedy_answers_are_those_of_the_whole_model(wholes, make_whole, name):
    _, stock = wholes[name]
    model, batch = built(make_whole(name), responses=False)
    text = batch.text
    with torch.no_grad():
        encoding = model.encode(batch)
        levels = encoding.image_levels
        prefill = model.language_model.prefill(encoding.embeddings, text, levels)
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


@pytest.mark.parametrize("name", mostly_slow("internvl3"))
def test_prompts_are_those_of_the_processor(wholes, make_whole, name):
    _, stock = wholes[name]
    model, batch = built(make_whole(name), responses=False)
    if name == "llava_onevision":
        pytest.skip("its processor makes two tiles or more of a single photo")
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


@pytest.mark.parametrize("name", ["qwen3_vl", "llava_onevision"])
@pytest.mark.slow
def test_other_whole_models_train_and_come_back(make_whole, name):
    config = make_whole(name, "run.max_steps=2", "run.warmup_steps=0")
    train(config)
    saved = saved_tensors(require_checkpoint(config.run.output_dir, "latest"))
    predictor = Predictor.from_run(Path(config.run.output_dir), device="cpu", max_new_tokens=4)
    restored = trained_tensors(predictor.model)
    assert restored.keys() == saved.keys()
    for tensor_name, tensor in saved.items():
        assert torch.equal(restored[tensor_name], tensor), tensor_name
    root = Path(config.datasets["ego_irgbench"]["data_root"])
    (result,) = predictor.predict([str(next(root.rglob("*.jpg")))], "What is held?")
    assert len(result.answers) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl"])
def test_a_trained_encoder_of_a_whole_model_needs_no_folder(make_whole, name):
    options = ("run.max_steps=1", "run.warmup_steps=0", "model.rgb_encoder.trained=all")
    config = make_whole(name, *options)
    train(config)
    checkpoint = require_checkpoint(config.run.output_dir, "latest")
    saved = saved_tensors(checkpoint)
    assert any(tensor_name.startswith("rgb_encoder.") for tensor_name in saved)
    adapters = [tensor_name for tensor_name in saved if ".lora_" in tensor_name]
    assert adapters
    assert all(tensor_name.startswith("language_model.") for tensor_name in adapters)
    predictor = Predictor.from_run(Path(config.run.output_dir), device="cpu", max_new_tokens=4)
    restored = trained_tensors(predictor.model)
    for tensor_name, tensor in saved.items():
        assert torch.equal(restored[tensor_name], tensor), tensor_name


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_patches_of_qwen_lie_row_by_row(wholes, name):
    folder, stock = wholes[name]
    size = SIZES[name]
    encoder = QwenViT(path=str(folder), image_size=size).eval()
    photo = torch.randint(256, (size, size, 3), dtype=torch.uint8)
    inputs = image_processor_of(name)(photo.numpy(), return_tensors="pt")
    with torch.no_grad():
        own = encoder(photo.permute(2, 0, 1)[None] / 255)[0, :, : encoder.embed_dim]
        theirs = stock.model.visual(inputs["pixel_values"], inputs["image_grid_thw"])

    # Blocks of 2 x 2 patches; those of Qwen2.5-VL by windows of 2 x 2 tokens
    tokens = encoder.grid // 2
    squares = theirs.last_hidden_state.unflatten(0, (-1, 4))
    if name == "qwen2_5_vl":
        cells = [(row, column) for row in range(tokens) for column in range(tokens)]
        seen = sorted(cells, key=lambda cell: (cell[0] // 2, cell[1] // 2, *cell))
        by_cell = dict(zip(seen, squares, strict=True))
        squares = torch.stack([by_cell[cell] for cell in cells])
    grid = squares.view(tokens, tokens, 2, 2, -1).transpose(1, 2).flatten(0, 3)
    torch.testing.assert_close(own, grid, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["internvl3", "llava_onevision", "qwen3_vl"])
def test_pixels_are_those_of_the_image_processor(wholes, name):
    folder, _ = wholes[name]
    size = SIZES[name]
    make = QwenViT if name == "qwen3_vl" else HfViT
    encoder = make(path=str(folder), image_size=size, init="random")
    photo = torch.randint(256, (size, size, 3), dtype=torch.uint8)
    expected = image_processor_of(name)(photo.numpy(), return_tensors="pt")["pixel_values"]
    own = encoder.normalize(photo.permute(2, 0, 1)[None] / 255)
    if name == "qwen3_vl":
        own = encoder._patch_vectors(own)[0, encoder.order]
    if name == "llava_onevision":
        expected = expected[:, 0]  # the whole photo comes before its tiles
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=0)


def test_resized_pixels_are_those_of_the_processor_but_for_rounding(make_whole, scenes):
    sample = build_dataset(make_whole("internvl3"), "train")[0, 0]
    (file,) = [path for path in scenes.rglob("*.jpg") if path.stem == sample.stem]
    photo = Image.open(file)
    assert photo.size != (112, 112)
    inputs = image_processor_of("internvl3")(photo, return_tensors="pt")
    levels = inputs["pixel_values"][0] * torch.tensor(STD).view(3, 1, 1)
    levels = (levels + torch.tensor(MEAN).view(3, 1, 1)) * 255
    own = torch.from_numpy(sample.image.copy()).permute(2, 0, 1)
    # On the hard edges of drawn scenes; of photographs one level at most
    differences = (own - levels).abs()
    assert differences.max() < 3.01
    assert differences.mean() < 0.25


def test_whole_models_that_cannot_be_taken_are_refused_by_name(wholes, make_whole, tmp_path):
    folder, _ = wholes["internvl3"]
    for change, message in {
        "type": "the whole model of type 'gemma3' .* is none of those that annexe takes",
        "layer": "has vision_feature_layer -2, and annexe takes those with -1",
        "tensor": "is not complete: missing model.multi_modal_projector.linear_1.weight",
        "template": "the folder has none",
    }.items():
        copied = tmp_path / change
        shutil.copytree(folder, copied)
        settings = json.loads((copied / "config.json").read_text())
        if change == "type":
            settings["model_type"] = "gemma3"
        if change == "layer":
            settings["vision_feature_layer"] = -2
        (copied / "config.json").write_text(json.dumps(settings))
        if change == "template":
            (copied / "chat_template.jinja").unlink()
        if change == "tensor":
            tensors = load_file(copied / "model.safetensors")
            (name,) = [name for name in tensors if name.endswith("projector.linear_1.weight")]
            del tensors[name]
            save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=message):
            built(make_whole("internvl3", f"model.init_from={copied}"))


@pytest.mark.parametrize("name", ["qwen3_vl"])
@pytest.mark.slow
def test_memory_and_operations_of_whole_models_are_counted(make_whole, name):
    config = make_whole(name)
    planned, tokenizer, _ = without_files(config)
    plan = measure(planned, tokenizer, nominal_branches(2, 2))
    assert plan is not None and plan.activations["language_model"] > 0
    model, batch = built(config)
    flops = flops_of_batch(model, batch)
    assert all(flops[part].total > 0 for part in ("rgb_encoder", "projector", "language_model"))


def test_a_whole_model_trains_and_comes_back(make_whole, caplog):
    config = make_whole("internvl3", "run.max_steps=2", "run.warmup_steps=0")
    caplog.set_level("INFO")
    train(config)
    reports = [line for line in caplog.messages if line.startswith("model.init_from: tensors")]
    assert len(reports) == 1
    assert "6 to projector, 34 to rgb_encoder, 51 to language_model; 0 left over" in reports[0]

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
