"""RGB encoders of timm and transformers, projectors, and models without a depth branch."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from annexe.benchmarks.flops import flops_by_counter, flops_of_batch
from annexe.benchmarks.memory import measure
from annexe.benchmarks.random_batch import nominal_branches
from annexe.benchmarks.random_model import without_files
from annexe.build import build_dataset, build_model, load_config
from annexe.checkpoints.names import our_name
from annexe.checkpoints.training_state import trained_tensors
from annexe.config import Config, LossWeights
from annexe.datasets.collate import Collator
from annexe.errors import UserError
from annexe.evaluator import evaluate
from annexe.inference.page.view import look
from annexe.inference.predictor import Predictor
from annexe.models.annexe import Annexe
from annexe.models.compile import compile_blocks
from annexe.models.depth_branch import DepthAnythingV2, DepthFeatures
from annexe.models.language_model.float8 import Float8Linear
from annexe.models.language_model.tokenizer import train_tokenizer
from annexe.models.projector import MlpProjector, PixelShuffleProjector
from annexe.models.vision_encoders.eva_vit import EvaViT, FastGELU, LinearGELU
from annexe.models.vision_encoders.hf_vit import HfViT
from annexe.models.vision_encoders.timm_vit import TimmViT
from annexe.structures.batch import Batch
from annexe.trainer import train
from annexe.training import losses
from tests.conftest import ROOT, SMALLEST, TINY

MakeConfig = Callable[..., Config]

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MLP = {**SIZES, "intermediate_size": 64}
LANGUAGE = {"model_type": "qwen2", **MLP, "num_key_value_heads": 2, "vocab_size": 64}
TIMM = (
    "vit_small_patch14_dinov2",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_siglip_224",
    "eva02_small_patch14_224",
    "vit_pe_core_tiny_patch16_384",
)


@pytest.fixture(autouse=True)
def quiet() -> None:
    """No lines of transformers about the files that it writes and reads."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def randomize(module: nn.Module) -> None:
    """Weights far from their first values, for many of those are zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def configurations() -> dict[str, Any]:
    """Tiny configurations of transformers by name, all of patches that go into 112 pixels."""
    plain = {**MLP, "image_size": 112, "patch_size": 14}
    square = {**MLP, "image_size": [112, 112], "patch_size": [14, 14]}
    dino = {**SIZES, "image_size": 112, "patch_size": 14, "drop_path_rate": 0.5}
    return {
        "SiglipVisionModel": transformers.SiglipVisionConfig(**{**plain, "patch_size": 16}),
        "SiglipModel": transformers.SiglipConfig(
            text_config={**MLP, "vocab_size": 64}, vision_config=plain
        ),
        "Siglip2VisionModel": transformers.Siglip2VisionConfig(
            **MLP, num_patches=25, patch_size=16
        ),
        "InternVLVisionModel": transformers.InternVLVisionConfig(**square),
        "InternVLForConditionalGeneration": transformers.InternVLConfig(
            vision_config=square, text_config=LANGUAGE, image_token_id=3
        ),
        "LlavaOnevisionForConditionalGeneration": transformers.LlavaOnevisionConfig(
            vision_config={"model_type": "siglip_vision_model", **plain},
            text_config=LANGUAGE,
            image_token_index=3,
        ),
        "Dinov2Model": transformers.Dinov2Config(**dino),
        "Dinov2WithRegistersModel": transformers.Dinov2WithRegistersConfig(**dino),
        "DINOv3ViTModel": transformers.DINOv3ViTConfig(**{**plain, "patch_size": 16}),
    }


def save(name: str, folder: Path) -> nn.Module:
    """A tiny model of transformers with random weights, saved as a folder; gives its encoder."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(copy.deepcopy(configurations()[name])).eval()
    randomize(model)
    model.save_pretrained(folder)
    statistics = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    if name == "SiglipModel":
        return model.vision_model
    if name.endswith("Generation"):
        return model.model.vision_tower
    return model


# --- timm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TIMM)
def test_patches_of_timm_are_those_of_forward_features(name: str, tmp_path: Path) -> None:
    original = timm.create_model(name, depth=1).eval()
    randomize(original)
    file = tmp_path / "encoder.safetensors"
    save_file(original.state_dict(), file)
    native = original.patch_embed.img_size[0]
    patch = original.patch_embed.patch_size[0]
    for image_size in (native, 8 * patch):
        original.set_input_size(img_size=(image_size, image_size))
        encoder = TimmViT(model=name, image_size=image_size, weights=str(file), depth=1).train()
        mean = torch.tensor(original.pretrained_cfg["mean"]).view(3, 1, 1)
        std = torch.tensor(original.pretrained_cfg["std"]).view(3, 1, 1)
        images = torch.rand(1, 3, image_size, image_size)
        with torch.no_grad():
            expected = original.forward_features((images - mean) / std)
            patches = encoder(images)
        assert patches.shape == (1, encoder.grid**2, encoder.embed_dim)
        expected = expected[:, original.num_prefix_tokens :]
        torch.testing.assert_close(patches, expected, atol=1e-5, rtol=0)
        assert not trained_tensors(encoder)


# --- transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(configurations()))
def test_patches_of_transformers_are_its_own(name: str, tmp_path: Path) -> None:
    original: Any = save(name, tmp_path)
    patch = original.config.patch_size
    patch = patch if isinstance(patch, int) else patch[0]
    for image_size in (112, 6 * patch):
        encoder = HfViT(path=str(tmp_path), image_size=image_size).train()
        images = torch.rand(2, 3, image_size, image_size)
        with torch.no_grad():
            expected = last_hidden_state(original, (images - 0.5) / 0.25, patch)
            patches = encoder(images)
        assert patches.shape == (2, (image_size // patch) ** 2, 32)
        expected = expected[:, -patches.shape[1] :]
        torch.testing.assert_close(patches, expected, atol=1e-5, rtol=0)


def last_hidden_state(model: Any, pixels: Tensor, patch: int) -> Tensor:
    """What transformers' own forward pass gives for normalized pixels."""
    if model.config.model_type == "siglip_vision_model":
        return model(pixels, interpolate_pos_encoding=True).last_hidden_state
    if model.config.model_type != "siglip2_vision_model":
        return model(pixels).last_hidden_state
    grid = pixels.shape[-1] // patch
    tiles = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # [B, 3, G, G, patch, patch]
    flat = tiles.permute(0, 2, 3, 4, 5, 1).reshape(len(pixels), grid**2, -1)
    outputs = model(
        pixel_values=flat,
        pixel_attention_mask=torch.ones(flat.shape[:2], dtype=torch.long),
        spatial_shapes=torch.full((len(pixels), 2), grid),
    )
    return outputs.last_hidden_state


# --- Projectors -----------------------------------------------------------------------------------


def test_pixel_shuffle_is_internvls() -> None:
    config = configurations()["InternVLForConditionalGeneration"]
    whole: Any = transformers.InternVLForConditionalGeneration(config).model
    randomize(whole.multi_modal_projector)
    projector = PixelShuffleProjector(32, 6, 32)
    projector.load_state_dict(whole.multi_modal_projector.state_dict())
    patches = torch.randn(2, 36, 32)
    squares = whole.pixel_shuffle(patches.view(2, 6, 6, 32), 0.5)
    expected = whole.multi_modal_projector(squares.flatten(1, 2))
    torch.testing.assert_close(projector(patches), expected, atol=1e-5, rtol=0)
    assert projector.num_tokens == 9 and projector.num_rows == 3


def test_mlp_is_llavas() -> None:
    config = configurations()["LlavaOnevisionForConditionalGeneration"]
    whole: Any = transformers.LlavaOnevisionForConditionalGeneration(config).model
    projector = MlpProjector(32, 6, 32)
    projector.load_state_dict(whole.multi_modal_projector.state_dict())
    patches = torch.randn(2, 36, 32)
    expected = whole.multi_modal_projector(patches)
    torch.testing.assert_close(projector(patches), expected, atol=1e-5, rtol=0)


# --- In a model -----------------------------------------------------------------------------------

NO_DEPTH = "model.depth_branch=none"
TINY_TIMM = (
    "model.rgb_encoder.type=timm_vit",
    "model.rgb_encoder.model=vit_pe_core_tiny_patch16_384",
    "model.rgb_encoder.init=random",
    "model.rgb_encoder.depth=2",
)


@pytest.fixture
def configure(scenes: Path, tmp_path: Path) -> MakeConfig:
    """Loads the smallest configuration with another RGB encoder."""

    def load(*options: str) -> Config:
        others = [option for option in SMALLEST if "rgb_encoder" not in option]
        own = (f"datasets.ego_irgbench.data_root={scenes}", f"run.output_dir={tmp_path / 'run'}")
        return load_config(TINY, [*others, *own, *options])

    return load


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """A tiny DINOv3 in the form of transformers."""
    save("DINOv3ViTModel", tmp_path / "dinov3")
    return tmp_path / "dinov3"


def of_folder(folder: Path, trained: str) -> tuple[str, ...]:
    """Options for the encoder in a folder of transformers."""
    block = f"{{type: hf_vit, path: {folder}, image_size: 128, trained: {trained}}}"
    return (f"model.rgb_encoder={block}",)


def build(config: Config) -> tuple[Annexe, Batch]:
    """The configured model with seed 0, and a batch of the first images."""
    dataset = build_dataset(config, "train")
    tokenizer = train_tokenizer(dataset.texts(), num_slots=4)
    torch.manual_seed(0)
    model = build_model(config.require_model(), tokenizer)
    collate = Collator(tokenizer, model.num_image_tokens, num_slots=4)
    return model, collate([dataset[0, index] for index in range(2)])


def train_on(model: Annexe, batch: Batch) -> list[float]:
    """Losses of some steps on one batch; every trained weight has to get a gradient."""
    names = list(
        losses.active(LossWeights(), image_token_head=False, has_depth=model.predicts_depth)
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    counts = losses.counts([batch], names).clamp(min=1)
    values = []
    for _ in range(5):
        loss = (losses.totals(model(batch), batch, names) / counts).sum()
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        values.append(loss.item())
    return values


@pytest.mark.parametrize(
    "case", ["lora", "last block", pytest.param("folder", marks=pytest.mark.slow)]
)
def test_other_encoders_are_trained_and_answer(
    case: str, configure: MakeConfig, hf_folder: Path
) -> None:
    # Patches of 16 pixels beside 14 of the depth branch, where 128 is a multiple of 16 alone
    options = {
        "lora": (
            *TINY_TIMM,
            "model.rgb_encoder.image_size=128",
            "model.rgb_encoder.trained=lora",
            "model.projector=pixel_shuffle",
        ),
        "last block": (
            *TINY_TIMM,
            "model.rgb_encoder.image_size=96",
            "model.rgb_encoder.trained=1",
            "model.projector=mlp",
            NO_DEPTH,
        ),
        "folder": (*of_folder(hf_folder, "all"), "model.projector.patches_per_token=2"),
    }[case]
    model, batch = build(configure(*options))
    size = model.rgb_encoder.image_size
    assert model.num_image_tokens == {"lora": 16, "last block": 36, "folder": 32}[case]
    grid = {"lora": 9, "last block": 6, "folder": 9}[case]

    # What is trained, by names that stay
    names = [name for name in trained_tensors(model) if name.startswith("rgb_encoder.")]
    if case == "lora":
        assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
        assert len(names) == 2 * 2 * 4  # blocks, matrices, layers of a block
    elif case == "last block":
        assert {name.split(".")[3] for name in names} <= {"1", "weight", "bias"}
    else:
        assert not any(name.endswith(("q_proj.weight", "o_proj.weight")) for name in names)

    # Training and generation
    predictions = model(batch)
    assert predictions.mask_logits.shape[-1] == 4 * grid
    if case == "last block":
        assert predictions.depth is None
    else:
        assert predictions.depth is not None and predictions.depth.shape == (2, size, size)
    values = train_on(model.train(), batch)
    assert values[-1] < 0.9 * values[0]
    tokenizer = model.language_model.tokenizer
    prompts = Collator(tokenizer, model.num_image_tokens, num_slots=4, responses=False)
    images = model.eval().generate(prompts(batch.samples), max_new_tokens=3)
    assert all((image.depth is None) == (case == "last block") for image in images)


def eval_config(run: Path, scenes: Path, output: Path) -> Config:
    """The evaluation of a run on its test scenes."""
    options = [
        f"datasets.ego_irgbench.data_root={scenes}",
        f"run.checkpoint={run}",
        f"run.output_dir={output}",
        *("run.batch_size=2", "run.num_workers=0", "run.device=cpu", "run.max_new_tokens=4"),
    ]
    return load_config(ROOT / "eval_configs" / "annexe_tiny.yaml", options)


def test_gelu_of_fewer_instructions_is_gelu() -> None:
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    exact = torch.nn.functional.gelu(x)
    gelu = FastGELU()
    torch.testing.assert_close(gelu.approximation(x.float()).double(), exact, atol=1e-6, rtol=2e-3)
    assert torch.equal(gelu(x.float()), torch.nn.functional.gelu(x.float()))


def test_a_linear_layer_with_gelu_is_both() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 40).requires_grad_(False)
    both = LinearGELU(linear)
    assert {name: id(value) for name, value in both.named_parameters()} == {
        name: id(value) for name, value in linear.named_parameters()
    }

    # In one kernel with GELU by tanh, under autocast on a GPU alone
    x = 4 * torch.randn(2, 5, 24)
    exact = torch.nn.functional.gelu(linear(x))
    assert torch.equal(both(x), exact)
    one = torch.compile(both.in_one, backend="eager", fullgraph=True)
    torch.testing.assert_close(one(x, torch.float32), exact, atol=1e-3, rtol=0)
    assert one(x, torch.bfloat16).dtype == torch.bfloat16

    # Not where the product runs in float8, whose layers have no place for it
    sizes: Any = {"embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_dim": 64, "image_size": 28}
    for dtype, is_fused in (("float32", True), ("float8", False)):
        mlp = EvaViT(init="random", dtype=dtype, **sizes).blocks[0].mlp
        assert isinstance(mlp.fc1, LinearGELU) == is_fused
        assert isinstance(mlp.act, FastGELU) == (not is_fused)


def test_who_reads_depth_first_waits_for_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls; what streams do with them takes a GPU (`tests.test_graphs`)."""
    calls: list[object] = []
    stream = SimpleNamespace(wait_event=calls.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, _: calls.append(id(tensor)))
    depth, finest = torch.zeros(2)
    ready: Any = "event"
    features = DepthFeatures(depth, [finest], ready)
    assert not calls
    assert features.maps[0] is finest
    assert features.depth is depth
    assert calls == ["event", id(depth), id(finest)]


@pytest.mark.slow
def test_without_a_depth_branch_all_goes_on_but_depth(
    configure: MakeConfig, scenes: Path, tmp_path: Path
) -> None:
    validated = ("run.validate_every=2", "run.validation_images=2", "run.max_steps=2")
    train(configure(*TINY_TIMM, "model.rgb_encoder.image_size=128", NO_DEPTH, *validated))
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all("loss/depth" not in line for line in lines)

    # Scores, predictions and report
    metrics = evaluate(eval_config(run, scenes, tmp_path / "eval"))
    assert not any(name.startswith("depth/") for name in metrics["standard"])
    assert "grounding/ciou" in metrics["standard"]
    predictions = (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()
    images = [line for line in map(json.loads, predictions) if line["kind"] == "image"]
    assert images and all(image["depth"] is None for image in images)
    assert (tmp_path / "eval" / "report.html").is_file()

    # A photo by the predictor, and as the page shows it
    photo = next((scenes / "RGB").rglob("*.jpg"))
    predictor = Predictor.from_run(run, device="cpu", max_new_tokens=4)
    (result,) = predictor.predict([str(photo)], "Which object is in use?")
    assert result.depth is None
    view = look(lambda photo: predictor.answer_batch([photo])[0], str(photo), "Where is the cup?")
    assert view.depth is None


@pytest.mark.slow
def test_a_run_of_a_trained_encoder_does_without_its_folder(
    configure: MakeConfig, hf_folder: Path, scenes: Path, tmp_path: Path
) -> None:
    options = ("run.max_steps=1", "run.warmup_steps=0")
    train(configure(*of_folder(hf_folder, "all"), *options))
    train(configure(*of_folder(hf_folder, "lora"), *options, f"run.output_dir={tmp_path / 'lora'}"))
    before = Predictor.from_run(tmp_path / "run", device="cpu", max_new_tokens=4)
    hf_folder.rename(tmp_path / "moved")
    after = Predictor.from_run(tmp_path / "run", device="cpu", max_new_tokens=4)
    photo = str(next((scenes / "RGB").rglob("*.jpg")))
    first, second = (each.predict([photo], "What is held?")[0] for each in (before, after))
    assert first.to_records() == second.to_records()

    # Adapters are nothing without what they adapt
    with pytest.raises(UserError, match=r"model\.rgb_encoder\.path: .* is not here"):
        Predictor.from_run(tmp_path / "lora", device="cpu")
    moved = (f"model.rgb_encoder.path={tmp_path / 'moved'}",)
    Predictor.from_run(tmp_path / "lora", device="cpu", options=moved)


@pytest.mark.slow
def test_compiled_blocks_of_other_encoders_give_the_same(
    configure: MakeConfig, hf_folder: Path
) -> None:
    model, batch = build(configure(*of_folder(hf_folder, "1"), NO_DEPTH))
    expected = model(batch).mask_logits
    compile_blocks(model, backend="eager")
    torch.testing.assert_close(model(batch).mask_logits, expected)


# --- EVA in float8 --------------------------------------------------------------------------------


@torch.no_grad()
def test_an_eva_in_float8_gives_about_the_same() -> None:
    sizes = {"image_size": 56, "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_dim": 128}
    torch.manual_seed(0)
    exact = EvaViT(**sizes, init="random")
    torch.manual_seed(0)
    coarse = EvaViT(**sizes, init="random", dtype="float8")
    biases = {name: bias for name, bias in exact.named_parameters() if name.endswith("bias")}
    for name, bias in coarse.named_parameters():
        if name in biases:
            bias.copy_(biases[name].normal_())

    images = torch.rand(2, 3, 56, 56)
    expected = exact(images)
    error = (coarse(images) - expected).norm() / expected.norm()
    assert 0 < error < 0.1
    layers = [layer for layer in coarse.modules() if isinstance(layer, Float8Linear)]
    assert len(layers) == 8
    assert all(layer.transposed_weight is None for layer in layers)


def test_an_eva_in_float8_says_what_it_takes() -> None:
    sizes = {"image_size": 56, "embed_dim": 64, "depth": 1, "num_heads": 4, "mlp_dim": 128}
    with pytest.raises(UserError, match=r"model\.rgb_encoder\.frozen=true"):
        EvaViT(**sizes, init="random", dtype="float8", frozen=False)
    with pytest.raises(UserError, match=r"'mlp\.fc1' is 40 x 64; change embed_dim or mlp_dim"):
        EvaViT(**sizes | {"mlp_dim": 40}, init="random", dtype="float8")
    with pytest.raises(UserError, match=r"model\.rgb_encoder\.dtype"):
        EvaViT(**sizes, init="random", dtype="bfloat16")


# --- The default ----------------------------------------------------------------------------------


def test_the_default_has_the_tensors_that_it_had(tmp_path: Path) -> None:
    """The digest was made before projectors and encoders were components."""
    config = load_config(
        ROOT / "train_configs" / "annexe.yaml", [f"datasets.ego_irgbench.data_root={tmp_path}/none"]
    )
    config, tokenizer, _ = without_files(config)
    model = build_model(config.require_model(), tokenizer, torch.device("meta"))
    tensors = model.state_dict()
    lines = sorted(f"{our_name(name)} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    assert len(lines) == 1326
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "6d2b686330b3708573ebadc7c3922533b24ff38f84e6e6b214308bbf716e9aae"


def test_older_settings_and_short_forms_are_read(tmp_path: Path) -> None:
    forms = {
        "model.patches_per_token=2": {"type": "concat", "patches_per_token": 2},
        "model.projector=mlp": {"type": "mlp", "newline": False},
        "model.projector.type=pixel_shuffle": {"type": "pixel_shuffle", "patches_per_side": 2},
    }
    for option, expected in forms.items():
        assert load_config(TINY, [option]).require_model()["projector"] == expected
    old = ROOT / "tests" / "run_of_0_1" / "checkpoints" / "step-00000003" / "config.yaml"
    assert load_config(old).require_model()["projector"]["patches_per_token"] == 4

    # A projector of another type takes nothing of what stood there
    text = TINY.read_text().replace("  type: annexe\n", "  type: annexe\n  patches_per_token: 2\n")
    (tmp_path / "own.yaml").write_text(text)
    changed = load_config(tmp_path / "own.yaml", ["model.projector.type=mlp"])
    assert changed.require_model()["projector"] == {"type": "mlp", "newline": False}


def test_depth_of_any_image_size_has_the_size_of_the_image() -> None:
    branch = DepthAnythingV2(100, init="random", size="tiny").eval()
    features = branch(torch.rand(1, 3, 100, 100))
    assert features.depth is not None and features.depth.shape == (1, 100, 100)
    assert [level.shape[-1] for level in features.maps] == [7, 14, 28, 56]


# --- Operations and memory ------------------------------------------------------------------------


def test_operations_of_an_encoder_of_timm_are_counted() -> None:
    options = {"image_size": 112, "init": "random", "depth": 1}
    flops = {}
    for trained in ("none", "all"):
        model = TimmViT(model="vit_small_patch14_dinov2", trained=trained, **options)  # type: ignore[arg-type]
        flops[trained] = flops_by_counter(model, torch.zeros(3, 3, 112, 112))
    tokens = 65
    width = 384
    embedding = 2 * 64 * 3 * 14**2 * width
    block = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    assert flops["none"].forward == 3 * (embedding + block)
    assert flops["none"].backward == 0
    assert flops["all"].forward < flops["all"].backward <= 2 * flops["all"].forward


@pytest.mark.slow
def test_memory_and_operations_are_planned(configure: MakeConfig, tmp_path: Path) -> None:
    save("Siglip2VisionModel", tmp_path / "siglip2")
    options = (*of_folder(tmp_path / "siglip2", "lora"), NO_DEPTH, "model.projector=mlp")
    config = configure(*options)
    planned, tokenizer, _ = without_files(config)
    plan = measure(planned, tokenizer, nominal_branches(2, 2))
    assert plan is not None and plan.activations["rgb_encoder"] > 0
    assert plan.weights["depth_branch"] == 0
    assert 0 < plan.gradients["rgb_encoder"] < plan.weights["rgb_encoder"]
    model, batch = build(config)
    flops = flops_of_batch(model, batch)
    assert flops["depth_branch"].total == 0
    assert flops["rgb_encoder"].total > 0 and flops["pixel_decoder"].total > 0
    stored = replace(batch, patches=torch.zeros(2, 64, 32))
    assert flops_of_batch(model, stored)["rgb_encoder"].total == 0


# --- Refusals -------------------------------------------------------------------------------------

timm_vit = partial(TimmViT, image_size=112, init="random")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "convnext_tiny"}, "convnext_tiny has no grid of patches"),
        ({"model": "swin_tiny_patch4_window7_224"}, "has no grid of patches"),
        ({"model": "vit_smal_patch14_dinov2"}, "Did you mean 'vit_small_patch14_dinov2'"),
        ({"model": "vit_small_patch14_dinov2.x"}, "Leave out what follows the dot"),
        ({"image_size": 100}, "no multiple of the patch size 14; take 98 or 112"),
        ({"init": None}, "does not say where its weights come from"),
        ({"depth": 13}, "has 12 blocks"),
        ({"depth": 2, "trained": 3}, "the last blocks are trained, from 1 to 2"),
        ({"trained": "some"}, "set it to none, all, lora"),
        ({"statistics": "half-half"}, "Choices: annexe, clip, half, imagenet, own"),
    ],
)
def test_bad_settings_of_timm_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        timm_vit(**{"model": "vit_small_patch14_dinov2", "depth": 1, **settings})
    assert message in str(caught.value)


def test_bad_weights_of_timm_are_refused(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    model = timm.create_model(name, depth=1)
    tensors = model.state_dict()
    load = partial(TimmViT, model=name, image_size=96, depth=1)

    def refusal(changed: dict[str, Tensor], **settings: Any) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        save_file(changed, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"architecture": name}))
        with pytest.raises(UserError) as caught:
            load(weights=str(folder), **settings)
        return str(caught.value)

    without = {key: tensor for key, tensor in tensors.items() if key != "norm.weight"}
    assert "1 tensors differ (missing norm.weight)" in refusal(without)
    assert "no place for norm.scale" in refusal({**tensors, "norm.scale": torch.ones(1)})
    spoiled = {**tensors, "norm.weight": torch.full((192,), torch.nan)}
    assert "norm.weight holds values that are not finite" in refusal(spoiled)
    other = refusal(tensors, model="vit_small_patch16_224")
    assert f"holds {name} by its config.json" in other
    with pytest.raises(UserError, match="no checkpoint 'nowhere'"):
        load(weights="nowhere")


def test_bad_folders_of_transformers_are_refused(tmp_path: Path) -> None:
    def refusal(**settings: Any) -> str:
        with pytest.raises(UserError) as caught:
            HfViT(**{"path": str(tmp_path), "image_size": 112, **settings})
        return str(caught.value)

    assert "config.json is missing" in refusal()
    for content in ({"model_type": "convnext"}, {"model_type": "internvl_chat"}, {}):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert "has no grid of patches" in refusal()

    # Sizes, statistics and tensors
    model = save("InternVLVisionModel", tmp_path)
    assert "no multiple of the patch size 14" in refusal(image_size=100)
    assert "from 1 to 2" in refusal(trained=3)
    assert "unknown setting model.rgb_encoder.init 'none'" in refusal(init="none")
    tensors = {k: v for k, v in model.state_dict().items() if "layer.1.mlp.fc2" not in k}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "is not complete: missing encoder.layer.1.mlp.fc2" in refusal()
    (tmp_path / "preprocessor_config.json").unlink()
    assert "set model.rgb_encoder.statistics" in refusal()


def test_what_needs_depth_is_refused_without_it(configure: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"run\.validation_metric is depth/delta1"):
        configure(NO_DEPTH, "run.validation_metric=depth/delta1")
    deconv = configure(NO_DEPTH, *TINY_TIMM, "model.rgb_encoder.image_size=128")
    deconv.require_model()["pixel_decoder"] = {"type": "deconv", "num_slots": 4}
    with pytest.raises(UserError, match=r"set model\.pixel_decoder\.type=query"):
        build(deconv)
    only_depth = LossWeights(**{**dict.fromkeys(vars(LossWeights()), 0.0), "depth": 1.0})
    with pytest.raises(UserError, match="nothing to train"):
        losses.active(only_depth, image_token_head=False, has_depth=False)
