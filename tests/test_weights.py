"""Public weights: parity with the original modules, key lists, damaged files, export."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DepthAnythingForDepthEstimation,
    LlamaConfig,
    LlamaForCausalLM,
)

from annexe import prompts
from annexe.build import build_model
from annexe.checkpoints import public as weights
from annexe.checkpoints.run_folder import find_checkpoint, saved_config
from annexe.checkpoints.training_state import load_weights, trained_tensors
from annexe.cli import main
from annexe.datasets.collate import Collator
from annexe.errors import UserError
from annexe.models.annexe import Annexe
from annexe.models.depth_branch import DepthAnythingV2
from annexe.models.language_model.causal_lm import Lora
from annexe.models.language_model.llama import make_llama
from annexe.models.language_model.tokenizer import TextTokenizer, load_tokenizer
from annexe.models.pixel_decoder import QueryDecoder
from annexe.models.projector import ConcatProjector
from annexe.models.vision_encoders.eva_vit import EvaViT
from annexe.structures.sample import Sample, Turn
from annexe.tools.weights import export_run, inspect_file
from annexe.trainer import train
from tests.conftest import SHARED

PARITY = SHARED / "parity"
TOLERANCE = 1e-4  # absolute, float32 on CPU

needs_parity = pytest.mark.skipif(
    not PARITY.is_dir(), reason=f"the parity fixtures are not at {PARITY}"
)
needs_memory = pytest.mark.skipif(
    not os.environ.get("ANNEXE_SLOW"), reason="takes minutes and 9 GB; set ANNEXE_SLOW=1"
)


@pytest.fixture(scope="session")
def recipe():
    """The deterministic weights and inputs of the parity fixtures."""
    spec = importlib.util.spec_from_file_location("recipe", PARITY / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def weights_file(recipe, tmp_path_factory) -> Callable[[str], Path]:
    """Writes the weights of a parity fixture, once for all tests that read them."""
    folder = tmp_path_factory.mktemp("weights")

    @functools.cache
    def write(name: str) -> Path:
        tensors = recipe.weights_from_manifest({"tensors": manifest(name)}, 0)
        torch.save(tensors, folder / f"{name}.pth")
        return folder / f"{name}.pth"

    return write


def manifest(name: str) -> dict[str, list[int]]:
    return json.loads((PARITY / f"{name}.json").read_text())["tensors"]


def on_meta(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def assert_parity(recipe, fixture: str, outputs: dict[str, Tensor]) -> None:
    for name, errors in recipe.compare(PARITY / f"{fixture}_seed0.npz", outputs).items():
        assert errors["max_abs"] <= TOLERANCE, (name, errors)


def eva(path: Path | None, size: int, depth: int, **options) -> EvaViT:
    source = {"init": "random"} if path is None else {"weights": str(path)}
    return EvaViT(image_size=size, depth=depth, statistics="annexe", **source, **options).eval()


# --- RGB encoder ----------------------------------------------------------------------------------


@needs_parity
@pytest.mark.parametrize("size", [224, 448])
def test_eva_and_image_tokens_equal_the_original(recipe, weights_file, size):
    model = eva(weights_file("fixture_eva_d4_224"), size, 4)
    projector = ConcatProjector(1408, size // 14, 256)
    head = recipe.weights_from_manifest(PARITY / "fixture_image_path.json", 0)
    for module, prefix in ((model.norm, "ln_vision."), (projector.linear, "llama_proj.")):
        state = {k.removeprefix(prefix): v for k, v in head.items() if k.startswith(prefix)}
        module.load_state_dict(state)

    with torch.no_grad():
        # The epsilon of both norms
        probe = recipe.tensor(0, "eps_probe", (4, 1408), 0.001)
        before = {"norm1_eps_probe": model.vit.blocks[0].norm1(probe)}
        behind = {"ln_vision_eps_probe": model.norm(probe)}

        # One forward pass, and what is in between
        outputs: dict[str, Tensor] = {}
        between = {f"block{index}": block for index, block in enumerate(model.vit.blocks[:3])}
        between |= {"tokens": model.vit, "ln_vision": model.norm}
        for name, module in between.items():
            module.register_forward_hook(lambda _m, _i, out, name=name: outputs.update({name: out}))
        behind["image_embeds"] = projector(model(recipe.image(0, size, 2)))
    behind["ln_vision"] = outputs.pop("ln_vision")
    before |= {"pos_embed": model.vit.pos_embed, **outputs}
    assert_parity(recipe, f"eva_d4_{size}", before)
    assert_parity(recipe, f"image_path_d4_{size}", behind)


@needs_parity
@needs_memory
@pytest.mark.parametrize("size", [224, 448])
def test_the_whole_eva_equals_the_original(recipe, weights_file, size):
    model = eva(weights_file("eva_vit_g_224"), size, 39)
    with torch.no_grad():
        tokens = model.vit(model.normalize(recipe.image(0, size, 1)))
    assert_parity(recipe, f"eva_d39_{size}", {"tokens": tokens})


BLIP2_NAMES = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.weight", "embeddings.patch_embedding.weight"),
    ("patch_embed.proj.bias", "embeddings.patch_embedding.bias"),
    ("blocks.", "encoder.layers."),
    (".norm", ".layer_norm"),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)


def as_blip2(original: dict[str, Tensor], num_blocks: int) -> dict[str, Tensor]:
    """Weights of EVA under the names of transformers' BLIP-2, biases of attention as one."""
    renamed = {}
    for key, value in original.items():
        if key.endswith(("q_bias", "v_bias")):
            continue
        for ours, theirs in BLIP2_NAMES:
            key = key.replace(ours, theirs)
        renamed[f"vision_model.{key}"] = value
    for block in range(num_blocks):
        q = original[f"blocks.{block}.attn.q_bias"]
        v = original[f"blocks.{block}.attn.v_bias"]
        key = f"vision_model.encoder.layers.{block}.self_attn.qkv.bias"
        renamed[key] = torch.cat([q, torch.zeros_like(q), v])
    return renamed


SMALL_EVA = {"embed_dim": 32, "num_heads": 2, "mlp_dim": 64}


def test_the_transformers_form_of_eva_gives_the_same_model(tmp_path):
    state = eva(None, 28, 2, **SMALL_EVA).vit.state_dict()
    original = {key: torch.randn(value.shape).half() for key, value in state.items()}
    lavis = {"model": {f"visual_encoder.{key}": value for key, value in original.items()}}
    torch.save(lavis, tmp_path / "lavis.pth")
    torch.save(as_blip2(original, num_blocks=2), tmp_path / "blip2.bin")
    first = eva(tmp_path / "lavis.pth", 28, 2, **SMALL_EVA).state_dict()
    second = eva(tmp_path / "blip2.bin", 28, 2, **SMALL_EVA).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[f"vit.{key}"], original[key].float()) for key in original)


def test_config_json_tells_what_shapes_of_eva_do_not(tmp_path):
    renamed = as_blip2(eva(None, 28, 1, **SMALL_EVA).vit.state_dict(), num_blocks=1)
    save_file(renamed, tmp_path / "model.safetensors")
    for vision, message in (
        ({"num_attention_heads": 2, "layer_norm_eps": 1e-6, "hidden_act": "gelu"}, None),
        (
            {"num_attention_heads": 4},
            "num_attention_heads 4 by its config.json, and here that is 2",
        ),
        ({"num_attention_heads": 2, "layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05"),
    ):
        config = {"model_type": "blip-2", "vision_config": vision}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if message is None:
            eva(tmp_path, 28, 1, **SMALL_EVA)
            continue
        with pytest.raises(UserError, match=message):
            eva(tmp_path, 28, 1, **SMALL_EVA)


# --- Depth branch ---------------------------------------------------------------------------------


@pytest.mark.slow
@needs_parity
@pytest.mark.parametrize("size", [448, 518])
@pytest.mark.parametrize("name", ["vits", "vitb"])
def test_depth_anything_equals_the_original(recipe, weights_file, name, size):
    file = weights_file(f"depth_anything_v2_{name}")
    branch = DepthAnythingV2(size, weights=str(file), size=name, statistics="annexe").eval()
    with torch.no_grad():
        images = recipe.image(0, size, 2 if size == 448 else 1)
        tapped = branch.model.backbone.forward_with_filtered_kwargs(
            branch.normalize(images)
        ).feature_maps
        outputs = {
            "depth": branch(images).depth,
            "pos_embed": branch.model.backbone.embeddings.position_embeddings,
        }
        width = tapped[0].shape[-1]
        outputs["norm_eps_probe"] = branch.model.backbone.layernorm(
            recipe.tensor(0, "eps_probe", (4, width), 0.001)
        )
    for index, tokens in enumerate(tapped):
        outputs |= {f"feat{index}_patch": tokens[:, 1:], f"feat{index}_cls": tokens[:, 0]}
    assert_parity(recipe, f"depth_{name}_{size}", outputs)


@needs_parity
def test_the_transformers_form_of_depth_anything_gives_the_same_model(weights_file, tmp_path):
    file = weights_file("depth_anything_v2_vits")
    first = DepthAnythingV2(518, weights=str(file), size="vits")
    first.model.save_pretrained(tmp_path / "folder")
    second = DepthAnythingV2(518, weights=str(tmp_path / "folder"), size="vits")
    other = second.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in first.state_dict().items())


@pytest.fixture(scope="session")
def depth_folder(tmp_path_factory) -> Path:
    """A folder as transformers writes it, of Depth Anything V2 at a small size."""
    folder = tmp_path_factory.mktemp("depth") / "folder"
    torch.manual_seed(0)
    DepthAnythingV2(56, init="random", size="small").model.save_pretrained(folder)
    return folder


def variant(folder: Path, out: Path, backbone: dict | None = None, **changes: object) -> Path:
    """A copy of a folder whose config.json says something else."""
    shutil.copytree(folder, out)
    config = json.loads((folder / "config.json").read_text())
    config["backbone_config"] |= backbone or {}
    (out / "config.json").write_text(json.dumps(config | changes))
    return out


def test_config_json_says_which_depth_anything_a_folder_holds(depth_folder, tmp_path):
    v1_blocks = {"out_indices": [3, 4, 5, 6], "out_features": [f"stage{i}" for i in (3, 4, 5, 6)]}
    v1 = variant(depth_folder, tmp_path / "v1", v1_blocks)
    cases = {
        depth_folder: {None: None, "v2": None, "v1": "version=v2"},
        v1: {None: "version=v1", "v2": "version=v1", "v1": None},
        v1 / "model.safetensors": {None: "version=v1", "v1": None},
        variant(depth_folder, tmp_path / "metric", depth_estimation_type="metric", max_depth=20): {
            None: "predicts meters", "v2": "predicts meters", "v1": "predicts meters",
        },
        variant(depth_folder, tmp_path / "prompt", model_type="prompt_depth_anything"): {
            None: "a model of type 'prompt_depth_anything'",
        },
        variant(depth_folder, tmp_path / "heads", {"num_attention_heads": 6}): {
            None: "num_attention_heads 6, and here that is 3",
        },
        variant(depth_folder, tmp_path / "broken", {"hidden_size": "x"}): {None: "is damaged"},
    }  # fmt: skip
    for source, answers in cases.items():
        for version, message in answers.items():
            settings = {"weights": str(source), "version": version, "size": "small"}
            if message is None:
                DepthAnythingV2(56, **settings)
                continue
            with pytest.raises(UserError, match=message):
                DepthAnythingV2(56, **settings)


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("depth_anything_v2_vits.safetensors", None, None),
        ("depth_anything_v2_vits.safetensors", "v2", None),
        ("depth_anything_v2_vits.safetensors", "v1", "by its name"),
        ("depth_anything_vits14.safetensors", "v1", None),
        ("depth_anything_vits14.safetensors", None, r"set model\.depth_branch\.version=v1"),
        ("depth_anything_v2_metric_hypersim_vits.safetensors", None, "predicts meters"),
        ("depth_anything_v2_vits_vkitti.safetensors", "v2", "predicts meters"),
        ("depth_anything_v2_metric_vkitti_vits.safetensors", "v2", "predicts meters"),
        ("latest.safetensors", None, "nothing tells which Depth Anything"),
        ("latest.safetensors", "v1", None),
        ("latest.safetensors", "v3", "unknown setting"),
    ],
)
def test_a_depth_file_alone_is_asked_about(depth_folder, tmp_path, name, version, message):
    shutil.copy(depth_folder / "model.safetensors", tmp_path / name)
    settings = {"weights": str(tmp_path / name), "version": version, "size": "small"}
    if message is None:
        blocks = DepthAnythingV2(56, **settings).out_indices
        assert blocks == ((3, 4, 5, 6) if version == "v1" else (2, 3, 5, 6))
        return
    with pytest.raises(UserError, match=message):
        DepthAnythingV2(56, **settings)


def test_depth_anything_v1_equals_the_library(depth_folder, tmp_path):
    v1_blocks = {"out_indices": [3, 4, 5, 6], "out_features": [f"stage{i}" for i in (3, 4, 5, 6)]}
    folder = variant(depth_folder, tmp_path / "v1", v1_blocks)
    ours = DepthAnythingV2(56, weights=str(folder), version="v1", size="small").eval()
    theirs = DepthAnythingForDepthEstimation.from_pretrained(folder).eval()
    v2 = DepthAnythingV2(56, weights=str(depth_folder), size="small").eval()
    images = torch.rand(2, 3, 56, 56)
    with torch.no_grad():
        depth = ours(images).depth
        expected = theirs(ours.normalize(images)).predicted_depth
        torch.testing.assert_close(depth, expected, atol=1e-4, rtol=0)
        assert (v2(images).depth - depth).abs().max() > 0.01


# --- Key lists ------------------------------------------------------------------------------------


@functools.cache
def full_size(part: str) -> nn.Module:
    """A part at full size on the meta device, where it takes no memory."""
    with torch.device("meta"):
        if part == "eva_vit_g_224":
            return eva(None, 224, 39)
        if part.startswith("depth_anything_v2_"):
            return DepthAnythingV2(518, init="random", size=part.rpartition("_")[2])
        tokenizer = load_tokenizer(PARITY / "toy_tokenizer", num_slots=4)
        rgb = eva(None, 448, 39)
        depth = DepthAnythingV2(448, init="random", size="vitb", trained="released")
        language = make_llama(tokenizer, init="random")
        decoder = QueryDecoder(4096, 1408, 128, 32)
        projector = ConcatProjector(1408, 32, 4096)
        return Annexe(rgb, depth, projector, language, decoder, init="random")


# Matched and left-over tensors of each list
MATCHED = {
    "eva_vit_g_224": (511, 0),
    # 12 fused query-key-value weights and biases fill three tensors each
    "depth_anything_v2_vits": (287, 0),
    "depth_anything_v2_vitb": (287, 0),
    "depth_anything_v2_vitl": (503, 0),
    "minigpt_v2_ckpt": (130, 0),
    # 128 of LoRA, 2 of the projector, 17 of the depth head; its heads and buffers stay
    "annexe_ckpt": (147, 60),
}


@needs_parity
@pytest.mark.parametrize("name", MATCHED)
def test_every_public_key_list_is_matched(name):
    model = full_size(name)
    report, _ = weights.match(name, on_meta(manifest(name)), model.state_dict())
    assert (len(report.matched), len(report.unexpected)) == MATCHED[name]
    assert not report.misfits
    for missing in report.missing:
        if name in ("minigpt_v2_ckpt", "annexe_ckpt"):
            assert "lora_" not in missing
            assert not missing.startswith("projector.")
        else:
            assert missing.startswith("norm.")


@needs_parity
def test_what_a_public_file_holds_beyond_its_list_is_left_over():
    shapes = manifest("eva_vit_g_224")
    extra = json.loads((PARITY / "eva_vit_g_224.json").read_text())["extra_in_public_file"]
    more = extra["confirmed_by_third_party"] | extra["plausible_unverified"]
    report, _ = weights.match(
        "eva", on_meta(shapes | more), full_size("eva_vit_g_224").state_dict()
    )
    assert set(report.unexpected) == set(more)
    assert "blocks.39* (13)" in str(report)


@needs_parity
@pytest.mark.parametrize("fault", ["removed", "renamed", "reshaped"])
@pytest.mark.parametrize("name", MATCHED)
def test_a_list_with_one_fault_stops_and_names_the_key(name, fault, tmp_path, monkeypatch):
    model = full_size(name)
    tensors = on_meta(manifest(name))
    endings = ("blocks.1.mlp.fc1.weight", "layers.1.self_attn.q_proj.lora_A.weight")
    key = next(key for key in tensors if key.endswith(endings))
    tensor = tensors.pop(key)
    if fault == "renamed":
        tensors[key.replace(".1.", ".one.")] = tensor
    elif fault == "reshaped":
        tensors[key] = torch.empty(3, 5, device="meta")
    monkeypatch.setattr(weights, "read_tensors", lambda source: tensors)
    part = {"e": "rgb_encoder", "d": "depth_branch"}.get(name[0], "model")
    required = []
    for parameter in model.state_dict():
        is_required = "lora_" in parameter if part == "model" else parameter[:5] != "norm."
        if is_required:
            required.append(parameter)
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        weights.load(model, part, name, required)


# --- Damaged and dangerous files ------------------------------------------------------------------


class Payload:
    """What a malicious file would run."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_files_that_are_no_sound_checkpoint_give_one_clear_error(tmp_path):
    (tmp_path / "text.pth").write_text("no weights here")
    torch.save({"blocks.0.attn.q_bias": torch.zeros(1000)}, tmp_path / "sound.pth")
    (tmp_path / "short.pth").write_bytes((tmp_path / "sound.pth").read_bytes()[:900])
    (tmp_path / "other.pth").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"unheard.of": torch.zeros(1)}, tmp_path / "strange.pth")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "text.pth": "not a checkpoint",
        "short.pth": "damaged or cut short",
        "other.pth": "not a checkpoint",
        "strange.pth": "no known format",
        "empty": "holds no weights",
        "absent.pth": "no checkpoint",
    }.items():
        with pytest.raises(UserError, match=message):
            weights.load(nn.Linear(1, 1), "rgb_encoder", str(tmp_path / name))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_object_with_code_is_refused_and_not_run(tmp_path, zipped):
    target = tmp_path / "executed"
    torch.save(
        {"model": Payload(target)}, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(UserError, match="could run code; nothing was loaded"):
        weights.read_tensors(tmp_path / "bad.pth")
    assert not target.exists()


def zipped(file: Path, name: str) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, b"bytes")


# What people have in place of weights, by the words that the message has to have
OTHER_FILES = {
    "pointer.safetensors": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134\n",
        "Git LFS pointer.*git lfs pull",
    ),
    "page.pth": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "web page"),
    "denied.pth": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
    "answer.bin": (b'{"error": "gated repo"}', "text .JSON."),
    "llama.gguf": (b"GGUF\x03\x00\x00\x00{" + bytes(40), "llama.cpp.*Hugging Face folder"),
    "model.h5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "TensorFlow.*model.safetensors"),
    "model.tar.gz": (b"\x1f\x8b\x08" + bytes(40), "an archive; unpack it"),
    "zeros.pth": (bytes(4096), "file of zeros.*fetch it again"),
    "nothing.pth": (b"", "is empty; fetch it again"),
    "short.safetensors": (b"\x40\x00\x00\x00\x00\x00\x00\x00{" + bytes(80), "damaged or cut short"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FILES)
def test_files_in_place_of_weights_are_named(tmp_path, name, capsys, monkeypatch):
    content, message = OTHER_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        weights.load(nn.Linear(1, 1), "rgb_encoder", str(tmp_path / name))


def test_archives_and_programs_are_told_from_weights(tmp_path):
    zipped(tmp_path / "download.zip", "folder/eva_vit_g.pth")
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    torch.save({0: torch.zeros(2)}, tmp_path / "numbers.pth")
    for name, message in {
        "download.zip": "an archive .of eva_vit_g.pth.; unpack it",
        "program.pt": "program of TorchScript",
        "numbers.pth": "holds no tensors",
    }.items():
        with pytest.raises(UserError, match=message):
            weights.load(nn.Linear(1, 1), "rgb_encoder", str(tmp_path / name))


ATTENTION = "model.layers.0.self_attn"
# Keys of public models that no setting takes: what inspect says of them
OTHER_MODELS = {
    "consolidated.00.pth": (["norm.weight", "layers.0.attention.wq.weight"], "Meta's own"),
    "minigpt4.pth": (["llama_proj.weight", "llama_proj.bias"], "projector of MiniGPT-4"),
    "qwen2.pth": (["model.embed_tokens.weight", f"{ATTENTION}.q_proj.bias"], "Qwen2"),
    "qwen3.pth": (["model.embed_tokens.weight", f"{ATTENTION}.q_norm.weight"], "Qwen3"),
    "phi3.pth": (["model.embed_tokens.weight", f"{ATTENTION}.qkv_proj.weight"], "Phi"),
    "llava.pth": (
        ["language_model.model.embed_tokens.weight", "multi_modal_projector.linear_1.weight"],
        "vision-language model",
    ),
    "llava_next.pth": (["model.embed_tokens.weight", "model.mm_projector.0.weight"], "LLaVA"),
    "inside.pth": (["text.model.embed_tokens.weight"], "language model inside"),
    "gptq.pth": (["model.embed_tokens.weight", f"{ATTENTION}.q_proj.qweight"], "GPTQ or AWQ"),
    "nf4.pth": (["model.embed_tokens.weight", f"{ATTENTION}.q_proj.weight.absmax"], "bitsandbytes"),
    "fp8.pth": (["model.embed_tokens.weight", f"{ATTENTION}.q_proj.weight_scale"], "float8"),
    "adapter.pth": ([f"base_model.model.{ATTENTION}.q_proj.lora_A.weight"], "LoRA adapter of peft"),
    "dinov2.pth": (["cls_token", "blocks.0.attn.qkv.weight"], "DINOv2"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_models_that_no_setting_takes_are_named(tmp_path, name, capsys):
    keys, words = OTHER_MODELS[name]
    torch.save({key: torch.zeros(2, 2) for key in keys}, tmp_path / name)
    inspect_file(tmp_path / name)
    shown = capsys.readouterr().out
    assert re.search(f"format: .*{words}", shown)
    assert "taken by: no setting" in shown
    assert "instead: " in shown
    with pytest.raises(UserError, match=words):
        weights.load(nn.Linear(1, 1), "model", str(tmp_path / name))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama"}, "format: Llama .transformers.\ntaken by: model.language_model"),
        ({"model_type": "mistral"}, "mistral .transformers.\ntaken by: .*type: causal_lm"),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}},
            "format: llama, quantized with gptq",
        ),
        (None, "Mistral and others have the same names"),
    ],
)  # fmt: skip
def test_config_json_says_which_language_model_a_file_is_of(tmp_path, config, words, capsys):
    file = tmp_path / "model.safetensors"
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, file)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    for source in (file, tmp_path):
        inspect_file(source)
        assert re.search(words, capsys.readouterr().out)


def test_folders_without_weights_say_what_they_hold(tmp_path):
    for name, message in {
        "consolidated.00.pth": "Meta's own format",
        "ggml-model.gguf": "it holds ggml-model.gguf",
        "README.md": "no weights at all",
    }.items():
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(b"x")
        with pytest.raises(UserError, match=message):
            weights.load(nn.Linear(1, 1), "rgb_encoder", str(folder))
    index = tmp_path / "README" / "model.safetensors.index.json"
    for content, message in {"{": "is damaged", "[]": "lists no files", "{}": "lists no"}.items():
        index.write_text(content)
        with pytest.raises(UserError, match=message):
            weights.load(nn.Linear(1, 1), "rgb_encoder", str(index.parent))


def test_values_that_are_no_weights_and_tensors_without_a_place_are_refused(tmp_path):
    sizes = {"embed_dim": 32, "num_heads": 2, "mlp_dim": 64}
    sound = eva(None, 28, 1, **sizes).vit.state_dict()
    key = "blocks.0.mlp.fc1.bias"
    not_finite = sound[key].clone()
    not_finite[3] = torch.nan
    for change, message in (
        ({key: not_finite}, f"{key} holds values that are not finite"),
        ({key: sound[key].to(torch.int8)}, f"{key} is int8, the code of a quantized weight"),
        ({key: sound[key].to(torch.float8_e4m3fn)}, "is float8_e4m3fn, the code of"),
        ({"blocks.0.gamma_1": torch.ones(32)}, r"no place for blocks\.0\.gamma_1"),
        ({"blocks.1.gamma_1": torch.ones(32), "head.weight": torch.ones(2)}, None),
    ):
        torch.save(sound | change, tmp_path / "eva.pth")
        if message is None:
            eva(tmp_path / "eva.pth", 28, 1, **sizes)
            continue
        with pytest.raises(UserError, match=message):
            eva(tmp_path / "eva.pth", 28, 1, **sizes)


def test_every_block_has_to_say_where_its_weights_come_from(make_config):
    both_ways = "model.rgb_encoder.weights to a checkpoint, or model.rgb_encoder.init to random"
    for option, message in {
        "model.rgb_encoder.init=null": both_ways,
        "model.depth_branch.init=null": "model.depth_branch.weights",
        "model.language_model.init=null": "model.language_model.path",
        "model.init=null": "model.init_from",
        "model.rgb_encoder.weights=somewhere": "remove one",
    }.items():
        config = make_config(option)
        with pytest.raises(UserError, match=message):
            build_model(config.model, toy_tokenizer_or_skip())


def toy_tokenizer_or_skip() -> TextTokenizer:
    if not PARITY.is_dir():
        pytest.skip(f"the parity fixtures are not at {PARITY}")
    return load_tokenizer(PARITY / "toy_tokenizer", num_slots=4)


# --- Language model, prompt and export ------------------------------------------------------------


def save_llama(folder: Path, config: dict, state: dict[str, Tensor] | None = None) -> None:
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**config))
    if state is not None:
        llama.load_state_dict(state)
    llama.save_pretrained(folder)


@needs_parity
def test_llama_with_minigpt_adapters_equals_the_original(recipe, tmp_path):
    """Base from its folder, adapters and projector from a checkpoint with the old names."""
    kit = json.loads((PARITY / "fixture_llama_lora_tiny.json").read_text())
    tensors = recipe.weights_from_manifest(kit, 0)
    lora = {k: v for k, v in tensors.items() if "lora_" in k or "inv_freq" in k}
    base = {}
    for key, tensor in tensors.items():
        if key not in lora:
            key = key.removeprefix("llama_model.base_model.model.")
            base[key.replace("lm_head.0.", "lm_head.")] = tensor
    save_llama(tmp_path / "llama", kit["config"], base)
    head = recipe.weights_from_manifest(PARITY / "fixture_image_path.json", 0)
    torch.save({"model": lora | head}, tmp_path / "minigpt.pth")
    tokenizer = TextTokenizer(toy_tokenizer_or_skip().base, num_slots=4)
    tokenizer.vocab_size = 320 if len(tokenizer.base) != 320 else tokenizer.vocab_size
    language = make_llama(tokenizer, path=str(tmp_path / "llama"), lora=Lora(rank=64, alpha=16))
    rgb = EvaViT(image_size=56, init="random", depth=1)
    depth = DepthAnythingV2(56, init="random", size="tiny")
    decoder = QueryDecoder(256, 1408, 16, 4, hidden_size=32, num_heads=4)
    init_from = str(tmp_path / "minigpt.pth")
    projector = ConcatProjector(1408, 4, 256)
    model = Annexe(rgb, depth, projector, language, decoder, init_from=init_from).eval()
    assert torch.equal(model.projector.linear.weight, head["llama_proj.weight"])
    assert torch.equal(model.rgb_encoder.norm.weight, head["ln_vision.weight"])
    embeds = recipe.tensor(0, "llama/embeds", (2, 24, 256), 1.0)
    kit = np.load(PARITY / "llama_lora_tiny_seed0.npz")
    lens = kit["lens"].tolist()
    mask = (torch.arange(24) < torch.tensor(lens)[:, None]).long()
    llama = model.language_model.base
    left_padded = []
    for row, length in zip(embeds, lens, strict=True):
        is_there = torch.arange(24) >= 24 - length
        left_padded.append(row.roll(24 - length, 0) * is_there[:, None])
    shifted = torch.stack(left_padded)
    with torch.no_grad():
        logits = llama(inputs_embeds=embeds, attention_mask=mask).logits
        last = llama(inputs_embeds=shifted, attention_mask=mask.flip(1)).logits[:, -1]
        words = llama.generate(
            inputs_embeds=shifted,
            attention_mask=mask.flip(1),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), torch.from_numpy(kit["targets"])[:, 1:].flatten()
    )
    outputs = {
        "logits_valid": logits[mask.bool()],
        "last_logits_leftpad": last,
        "loss": loss.view(1),
    }
    assert_parity(recipe, "llama_lora_tiny", outputs)
    assert words.tolist() == kit["greedy_ids"][:, 1:].tolist()  # the original puts a BOS in front


@needs_parity
def test_prompt_rows_equal_those_of_the_original(monkeypatch):
    tokenizer = toy_tokenizer_or_skip()
    kit = json.loads((PARITY / "prompt_traces.json").read_text())
    samples = kit["samples"]
    traces = kit["traces"]["toy_legacy_True"]
    tag = "<Img><ImageHere></Img> [caption] "
    request = (
        "Based on the image, describe the things need to be segmented accorting to this prompt:"
    )
    monkeypatch.setattr(prompts, "QUERY_INSTRUCTION", request)
    for row in range(2):
        query = samples["vqa_query"][row].partition(request)[2].strip()
        pixels = np.zeros((2, 2, 3), np.uint8)
        instruction = samples["instruction_input"][row].removeprefix(tag).removesuffix(" ")
        sample = Sample(
            stem="stem",
            image=pixels,
            depth=np.zeros((2, 2), np.float32),
            target_ids=pixels[..., 0],
            analysis=samples["answer"][row],
            turns=[Turn(0, 0, query, samples["vqa_answer"][row], [1])],
            original_size=(2, 2),
            instruction=instruction,
        )
        text = Collator(tokenizer, kit["n_image_tokens"], 4)([sample]).text
        for branch, trace in ((1, traces["train_caption"]), (2, traces["train_vqa"])):
            columns = [c for c, s in enumerate(text.segment_ids[0].tolist()) if s in (0, branch)]
            length = sum(trace["attention_mask"][row])
            theirs = [
                0 if isinstance(token, str) else token for token in trace["sequence"][row][:length]
            ]
            assert text.input_ids[0, columns].tolist() == theirs
            assert text.position_ids[0, columns].tolist() == list(range(length))
            labels = dict(zip(text.label_positions.tolist(), text.labels.tolist(), strict=True))
            ours = [labels.get(columns[i - 1], -100) if i else -100 for i in range(length)]
            assert ours == trace["labels"][row][:length]


@pytest.fixture
def llama_run(make_config: Callable, tmp_path: Path, dtype: str) -> Path:
    """A short run with adapters over a Llama of ``dtype`` from its folder."""
    save_llama(
        tmp_path / "llama",
        {
            "vocab_size": len(toy_tokenizer_or_skip().base),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
    )
    toy_tokenizer_or_skip().save(tmp_path / "llama")
    train(
        make_config(
            "model.language_model.init=null",
            f"model.language_model.path={tmp_path / 'llama'}",
            f"model.language_model.dtype={dtype}",
            "model.language_model.lora.rank=4",
            "run.max_steps=3",
            "run.learning_rate=0.01",
        )
    )
    return tmp_path / "run"


@needs_parity
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_an_exported_run_loads_with_peft_and_transformers_alone(
    llama_run, tmp_path, monkeypatch, dtype, tolerance
):
    out = tmp_path / "out"
    monkeypatch.setattr(
        sys, "argv", ["annexe", "weights", "export", str(llama_run), str(out), "--merge"]
    )
    main()
    checkpoint = find_checkpoint(llama_run)
    ours = build_model(
        saved_config(checkpoint)["model"], load_tokenizer(checkpoint / "tokenizer", 4)
    )
    load_weights(checkpoint, ours)
    language = ours.eval().language_model
    ids = torch.randint(
        3, language.tokenizer.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0)
    )
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=getattr(torch, dtype))
    with torch.no_grad():
        plain = stock(ids).logits
        mine = language.base(ids).logits
        adapted = peft.PeftModel.from_pretrained(stock, out / "adapter").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(out / "llama")(ids).logits
    assert (mine - plain).abs().max() > 1e-3  # the adapter does something
    assert (mine - adapted).abs().max() <= 1e-5
    # Merging rounds the sum to the base's precision
    assert (mine - merged).abs().max() <= tolerance
    assert (out / "heads.safetensors").is_file()


@needs_parity
@pytest.mark.parametrize("dtype", ["float32"])
def test_an_adapter_is_merged_into_a_base_that_has_moved(llama_run, tmp_path):
    shutil.move(tmp_path / "llama", tmp_path / "moved")
    other = variant_of_llama(tmp_path / "moved", tmp_path / "other")
    run = str(llama_run)
    for base, message in {
        None: "not at .* any more; say where it is: --base FOLDER",
        tmp_path / "nowhere": "no language model in",
        other: "the frozen weights of language_model are not those",
    }.items():
        with pytest.raises(UserError, match=message):
            export_run(run, tmp_path / "exports" / "out", merge=True, base=base)
        assert not (tmp_path / "exports").exists()
    with pytest.raises(UserError, match="--base is not needed"):
        export_run(run, tmp_path / "out", merge=False, base=tmp_path / "moved")
    export_run(run, tmp_path / "out", merge=True, base=tmp_path / "moved")
    assert (tmp_path / "out" / "llama" / "config.json").is_file()
    assert not list(tmp_path.glob("*.part"))


def variant_of_llama(folder: Path, out: Path) -> Path:
    """A Llama of the same sizes and other weights."""
    llama = LlamaForCausalLM.from_pretrained(folder)
    llama.model.embed_tokens.weight.data += 0.1
    llama.save_pretrained(out)
    return out


@needs_parity
@pytest.mark.parametrize("dtype", ["float32"])
def test_a_new_run_starts_from_an_old_one(llama_run, make_config, tmp_path):
    config = make_config(
        "model.init=null",
        f"model.init_from={llama_run}",
        "model.language_model.init=null",
        f"model.language_model.path={tmp_path / 'llama'}",
        "model.language_model.lora.rank=4",
    )
    model = build_model(config.model, load_tokenizer(tmp_path / "llama", 4))
    saved = load_file(find_checkpoint(llama_run) / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in trained_tensors(model).items())
