"""Settings of the released code are recognized, refused with a command, and turned into ours."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from annexe.build import build_model, load_config
from annexe.errors import UserError
from annexe.models.language_model.tokenizer import train_tokenizer
from annexe.tools.convert_config import convert
from annexe.training.optimizer import build_optimizer
from tests.conftest import ROOT

RELEASED = """
model:
  arch: annexe
  model_type: pretrain
  max_txt_len: 1024
  image_size: 448
  end_sym: "</s>"
  prompt_template: "[INST] {} [/INST]"
  llama_model: /lab/Llama-2-7b-chat-hf
  ckpt: /lab/minigptv2_checkpoint.pth
  use_grad_checkpoint: false
  chat_template: true
  lora_r: 64
  lora_alpha: 16
  low_resource: false
datasets:
  egoirgbench:
    batch_size: 4
    sample_ratio: 30
    vis_processor:
      train:
        name: blip2_image_train
        image_size: 448
        mean: [0.55, 0.55, 0.53]
        std: [0.22, 0.23, 0.25]
    text_processor: {train: {name: blip_caption}}
    build_info:
      annotations: {train: {storage: /lab/Ego-IRGBench/dataset_split/train}}
      images: {storage: /lab/Ego-IRGBench/RGB}
run:
  task: image_text_pretrain
  lr_sched: linear_warmup_cosine_lr
  init_lr: 1e-5
  min_lr: 1e-6
  warmup_lr: 1e-6
  weight_decay: 0.05
  max_epoch: 320
  num_workers: 6
  warmup_steps: 1000
  iters_per_epoch: 2544
  seed: 42
  output_dir: runs/old
  amp: true
  resume_ckpt_path: null
  evaluate: false
  train_splits: [train]
  device: cuda
  world_size: 1
  dist_url: "env://"
  distributed: true
  wandb_log: true
  job_name: annexe_train
"""


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text(RELEASED)
    return path


def test_a_released_file_is_refused_with_the_command_that_turns_it_into_ours(old):
    with pytest.raises(UserError, match=f"annexe convert-config {old} NEW.yaml"):
        load_config(old)


def released(**changes: object) -> dict:
    """The settings of the released file, with others under dotted keys."""
    settings = OmegaConf.create(RELEASED)
    for key, value in changes.items():
        OmegaConf.update(settings, key, value)
    return OmegaConf.to_container(settings)


def test_every_key_is_mapped_or_named():
    new, notes = convert(released())
    language_model = new["model"]["language_model"]
    assert language_model["lora"] == {"rank": 64, "alpha": 16.0}
    assert language_model["dtype"] == "bfloat16"
    assert language_model["checkpointed_blocks"] == 0
    assert new["model"]["rgb_encoder"]["statistics"] == "annexe"
    assert new["datasets"]["ego_irgbench"]["data_root"] == "/lab/Ego-IRGBench"
    assert new["run"]["max_steps"] == 320 * 2544
    assert new["run"]["learning_rate"] == 1e-5
    assert not [note for note in notes if "unknown to us" in note]
    assert len(notes) == 18

    small = {"model.low_resource": True, "model.use_grad_checkpoint": True}
    language_model = convert(released(**small))[0]["model"]["language_model"]
    assert language_model["dtype"] == "int8"
    assert language_model["checkpointed_blocks"] == 32

    _, notes = convert(released(**{"extra.key": 1}))
    assert "extra.key: unknown to us, left out" in notes


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("run.init_lr", "fast", r"run\.init_lr\b.*fix"),
        ("model.lora_r", "r64", r"model\.lora_r\b.*fix"),
        ("run.max_epoch", None, r"run\.max_epoch\b.*whole numbers"),
        ("datasets.egoirgbench.build_info.images.storage", "/", r"images\.storage\b.*fix"),
        ("datasets.egoirgbench.vis_processor.train.mean", 0.5, r"train\.mean\b.*fix"),
        ("run.lr_sched", "linear_warmup_step_lr", "linear_warmup_step_lr"),
        ("model.image_size", 224, r"disagree on model\.rgb_encoder\.image_size"),
    ],
)
def test_a_value_that_we_cannot_use_is_named(key, value, message):
    with pytest.raises(UserError, match=message):
        convert(released(**{key: value}))


@pytest.mark.parametrize("which", ["converted", "annexe.yaml"])
def test_the_full_size_model_and_its_optimizer_are_built(which, tmp_path):
    """On the meta device, where 9 billion parameters take no memory, with the weights left out."""
    path = ROOT / "train_configs" / "annexe.yaml"
    if which == "converted":
        path = tmp_path / "new.yaml"
        OmegaConf.save(OmegaConf.create(convert(released())[0]), path)
    sources = {
        "rgb_encoder.": "weights",
        "depth_branch.": "weights",
        "language_model.": "path",
        "": "init_from",
    }
    options = [f"model.{block}{setting}=null" for block, setting in sources.items()]
    options += [f"model.{block}init=random" for block in sources]
    config = load_config(path, options)
    with torch.device("meta"):
        model = build_model(config.model, train_tokenizer(["some words"], num_slots=4))

    # Published sizes, with positions of 448 in place of 224 or 518, and ln_vision
    sizes = {}
    for name, part in model.named_children():
        sizes[name] = sum(parameter.numel() for parameter in part.parameters())
    assert sizes["rgb_encoder"] == 985_894_528 + (1025 - 257 + 2) * 1408
    assert sizes["depth_branch"] == 97_470_785 + (1025 - 1370) * 768
    lora = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert lora == 33_554_432

    optimizer = build_optimizer(model, config.run)
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters() if p.requires_grad} == optimized
    assert not any(p.requires_grad for p in model.rgb_encoder.parameters())
