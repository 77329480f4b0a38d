"""Wrong inputs: each ends in one line that names the thing and the fix, never a traceback."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from annexe import cli
from annexe.build import build_dataset, load_config
from annexe.checkpoints import training_state as checkpoint
from annexe.checkpoints.run_folder import MANIFEST, find_checkpoint
from annexe.config import Config
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.pixels import PIXEL_FILES
from annexe.errors import UserError
from annexe.evaluator import evaluate
from annexe.files import require_writable, write_json, write_text
from annexe.hub.publish import publish
from annexe.terminal import log_handler, table
from annexe.trainer import set_up, train
from tests.conftest import ROOT, SMALLEST, TINY
from tests.forked import Command

MakeConfig = Callable[..., Config]


def one_line(caught: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    """The message is one line without a traceback and holds ``parts``."""
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert "Traceback" not in message
    for part in parts:
        assert part in message


# Configuration


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("runn.seed=1", ("runn", "Did you mean 'run'")),
        ("run.max_step=1", ("run.max_step", "Did you mean 'max_steps'")),
        ("run.loss_weights.masks=1", ("run.loss_weights.masks", "Did you mean 'mask'")),
        ("model.projector.patches=2", ("model.projector.patches", "'concat' has no")),
        ("model.rgb_encoder.dept=2", ("model.rgb_encoder.dept", "Did you mean 'depth'")),
        (
            "model.language_model.lora.rnk=2",
            ("model.language_model.lora.rnk", "Did you mean 'rank'"),
        ),
        (
            "datasets.ego_irgbench.data_rot=x",
            ("datasets.ego_irgbench.data_rot", "Did you mean 'data_root'"),
        ),
        ("datasets.ego_irgbanch.data_root=x", ("ego_irgbanch", "Did you mean 'ego_irgbench'")),
        (
            "model.pixel_decoder.type=querry",
            ("model.pixel_decoder.type", "Did you mean 'query'", "deconv"),
        ),
        ("model.type=annex", ("model.type", "Did you mean 'annexe'")),
        ("run.max_steps=many", ("run.max_steps is 'many'", "a whole number")),
        ("run.max_steps=2.5", ("run.max_steps is '2.5'", "a whole number")),
        ("run.max_steps=010", ("run.max_steps is '010'", "a whole number, such as 10")),
        ("run.max_steps=1:30", ("run.max_steps is '1:30'", "a whole number")),
        ("run.timeout_minutes=1:30", ("run.timeout_minutes is '1:30'", "a number")),
        ("run.max_steps=true", ("run.max_steps is 'true'", "a whole number")),
        ("run.max_steps=[5]", ("run.max_steps is '['5']'", "a whole number")),
        ("run.max_steps=null", ("run.max_steps is null", "leave it out")),
        ("run.report=2", ("run.report is '2'", "true or false")),
        ("run.report=maybe", ("run.report is 'maybe'", "true or false")),
        ("run.learning_rate=yes", ("run.learning_rate is 'yes'", "a number")),
        ("run.betas=0.9", ("run.betas is '0.9'", "a list, such as [0.9]")),
        ("run.betas=[0.9, fast]", ("run.betas[1] is 'fast'", "a number")),
        ("run.betas={a: 1}", ("run.betas is", "a list")),
        ("run.output_dir=[a]", ("run.output_dir is", "in quotes")),
        ("run.wandb.name={a: b}", ("run.wandb.name is", "in quotes")),
        ("run.resume=true", ("run.resume is 'true'", "auto")),
        ("run.output_dir=''", ("run.output_dir is empty",)),
        ("run.output_dir=${HOME}/runs", ("run.output_dir", "${oc.env:NAME}", "$NAME")),
        ("run.loss_weights.masks.a=1", ("run.loss_weights.masks", "Did you mean 'mask'")),
        ("run.seed.a=1", ("run.seed is", "a whole number")),
        ("run.wandb=true", ("run.wandb is 'true'", "block of settings")),
        ("run.wandb.enabeld=true", ("run.wandb.enabeld", "Did you mean 'enabled'")),
        ("imports=plugin", ("imports is 'plugin'", "a list, such as [plugin]")),
        ("model=5", ("model is '5'", "block of settings")),
        ("model.rgb_encoder=null", ("model.rgb_encoder is", "block of settings")),
        (
            "model.language_model.lora.targets=q_proj",
            ("model.language_model.lora.targets is 'q_proj'", "a list, such as [q_proj]"),
        ),
        ("model.language_model.lora.rank=null", ("model.language_model.lora.rank is null",)),
        ("model.language_model.lora.rank=4.5", ("lora.rank is '4.5'", "a whole number")),
        ("model.rgb_encoder.frozen=5", ("model.rgb_encoder.frozen is '5'", "true or false")),
        ("datasets=[ego_irgbench]", ("datasets is", "block of settings")),
        ("datasets.ego_irgbench=null", ("datasets.ego_irgbench", "block of settings")),
        ("datasets.ego_irgbench.data_root=null", ("data_root is null", "~/")),
        ("run.betas=[1, 2", ("flow sequence", "fix the YAML")),
        ("run.output_dir='a", ("quoted scalar", "fix the YAML")),
        ("run.learning_rate=fast", ("run.learning_rate", "'fast'")),
        ("run.betas=[0.9]", ("run.betas", "two numbers")),
        ("run.output_dir=null", ("run.output_dir is null", "leave it out")),
        ("model.rgb_encoder.depth=deep", ("model.rgb_encoder.depth", "'deep'")),
        ("model.rgb_encoder=5", ("model.rgb_encoder", "block of settings")),
        ("datasets.ego_irgbench=5", ("datasets.ego_irgbench", "block of settings")),
        ("run=5", ("run is '5'", "block of settings")),
        ("run.device=tpu", ("run.device", "choose auto, cpu or cuda")),
        ("run.checkpoint_every=0", ("run.checkpoint_every", "at least 1")),
        ("run.warmup_steps=9999", ("run.warmup_steps to", "at most")),
        ("run.optimizer=sgd", ("run.optimizer is 'sgd'", "choose adamw or muon")),
        ("run.optimizer=muon & run.parallel=fsdp", ("run.parallel=ddp", "run.optimizer=adamw")),
        ("run.clip_norm=0", ("run.clip_norm is 0", "above 0")),
        ("run.clip_norm=.nan", ("run.clip_norm is '.nan'", "a number")),
        ("run.learning_rate=.nan", ("run.learning_rate is '.nan'", "a number")),
        ("run.learning_rate=.inf", ("run.learning_rate is inf", "from 0 on")),
        ("run.weight_decay=-1", ("run.weight_decay is -1", "from 0 on")),
        ("run.loss_weights.mask=-1", ("run.loss_weights.mask is -1", "from 0 on")),
        ("run.seed=4294967296", ("run.seed", "below 4294967296")),
        ("model.presence_threshold=nan", ("model.presence_threshold is 'nan'", "a number")),
        ("model.language_model.lora.alpha=.nan", ("lora.alpha is '.nan'", "a number")),
        ("run.timeout_minutes=.inf", ("run.timeout_minutes", "above 0")),
        ("run.wandb.mode=offlin", ("run.wandb.mode is 'offlin'", "offline")),
        ("run.seed", ("'run.seed'", "a.b=c")),
        ("=3", ("'=3'", "a.b=c")),
        ("run.betas=[1", ("flow sequence", "fix the YAML")),
        ("run.output_dir=${oc.env:ANNEXE_NOT_SET}", ("run.output_dir", "ANNEXE_NOT_SET")),
        ("imports=[annexe_no_such_plugin]", ("annexe_no_such_plugin", "PYTHONPATH")),
    ],
)
def test_wrong_option(option: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(TINY, option.split(" & "))
    one_line(caught, *parts)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("run: {seed: 1\n", "fix the YAML"),
        ("run:\n  seed: 1\n  seed: 2\n", "duplicate key seed"),
        ("- run\n- model\n", "is a list"),
        ("\x00\x01", "fix the YAML"),
        ("only words", "only words"),
        ("model: {type: annexe}\n", "model.rgb_encoder is missing"),
        ("datasets: {ego_irgbench: {}}\n", "datasets.ego_irgbench.data_root is missing"),
    ],
)
def test_wrong_file(text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    one_line(caught, part)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "none.yaml")
    one_line(caught, "none.yaml", "train_configs/annexe_tiny.yaml")


def test_model_and_data_set_have_to_be_named(make_config: MakeConfig) -> None:
    for option, part in (("model=null", "no model block"), ("datasets=null", "datasets")):
        with pytest.raises(UserError) as caught:
            build_dataset(make_config(option), "train")
        one_line(caught, part)


# Data


@pytest.fixture
def root(scenes: Path, tmp_path: Path) -> Path:
    """A data root that a test may spoil: the first two train scenes."""
    out = tmp_path / "root"
    for path in sorted((scenes / "dataset_split" / "train").glob("*.json"))[:2]:
        files = [path]
        files += [scenes / folder / f"{path.stem}{ending}" for folder, ending in PIXEL_FILES]
        for file in files:
            copy = out / file.relative_to(scenes)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    return out


@pytest.fixture
def read(make_config: MakeConfig, root: Path) -> Callable[..., None]:
    """Opens the damaged root and reads every image of it."""

    def run(*options: str, split: str = "train") -> None:
        config = make_config(f"datasets.ego_irgbench.data_root={root}", *options)
        dataset = build_dataset(config, split)
        for index in range(len(dataset)):
            dataset[0, index]

    return run


def first(root: Path, folder: str) -> Path:
    return min((root / folder).iterdir())


def edit_annotation(root: Path, change: Callable[[dict], object]) -> None:
    path = first(root, "dataset_split/train")
    entries = json.loads(path.read_text())
    change(entries[1])
    path.write_text(json.dumps(entries))


def test_missing_data_root(read: Callable[..., None], root: Path) -> None:
    shutil.rmtree(root)
    with pytest.raises(UserError) as caught:
        read()
    one_line(caught, "data_root", str(root), "RGB/")


def test_split_without_files(read: Callable[..., None]) -> None:
    with pytest.raises(UserError) as caught:
        read(split="val")
    one_line(caught, "split 'val'", "data_root")


@pytest.mark.parametrize("option", ["answer_format=sentences", "queries_per_image=0"])
def test_wrong_data_setting(option: str, read: Callable[..., None]) -> None:
    with pytest.raises(UserError) as caught:
        read(f"datasets.ego_irgbench.{option}")
    one_line(caught, option.split("=")[0])


@pytest.mark.parametrize("text", ['{"caption": "a mug"}', "[]", '[{"caption": "a m', "", "\x00"])
def test_json_that_is_no_list_of_annotations(
    text: str, read: Callable[..., None], root: Path
) -> None:
    path = first(root, "dataset_split/train")
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read()
    one_line(caught, str(path))


@pytest.mark.parametrize(
    "field", ["caption", "answer", "tokens", "masks_idx", "with_mask", "questions"]
)
def test_missing_field(field: str, read: Callable[..., None], root: Path) -> None:
    edit_annotation(root, lambda entry: entry.pop(field))
    with pytest.raises(UserError) as caught:
        read()
    one_line(caught, first(root, "dataset_split/train").name, "annotation 1", f"'{field}'")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("answer", 5),
        ("masks_idx", ["two"]),
        ("tokens", None),
        ("questions", []),
        ("questions", [5]),
        ("masks_idx", [float("inf")]),
        ("answer", "half a pair: \ud800"),
        ("questions", [{"query": "\ud800", "id": 0}]),
    ],
)
def test_wrong_field(field: str, value: object, read: Callable[..., None], root: Path) -> None:
    edit_annotation(root, lambda entry: entry.update({field: value}))
    with pytest.raises(UserError) as caught:
        read()
    one_line(caught, "annotation 1", field, "remove the annotation")


@pytest.mark.parametrize("folder", ["RGB", "depth", "mask"])
def test_missing_image(folder: str, read: Callable[..., None], root: Path) -> None:
    path = first(root, folder)
    path.unlink()
    with pytest.raises(UserError) as caught:
        read()
    one_line(caught, str(path), "restore it")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9])
@pytest.mark.parametrize("folder", ["RGB", "depth", "mask"])
def test_truncated_image(folder: str, share: float, read: Callable[..., None], root: Path) -> None:
    path = first(root, folder)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError) as caught:
        read()
    one_line(caught, str(path), "restore it")


@pytest.mark.parametrize("warm", [False, True], ids=["cold cache", "warm cache"])
def test_mask_id_that_is_not_in_the_png(warm: bool, read: Callable[..., None], root: Path) -> None:
    if warm:
        read()
    edit_annotation(root, lambda entry: entry.update(masks_idx=[77, 0, 0]))
    with pytest.raises(UserError) as caught:
        read()
    one_line(caught, "[77]", str(first(root, "mask")), "masks_idx")


def test_mask_of_another_size(read: Callable[..., None], root: Path) -> None:
    path = first(root, "mask")
    ids = Image.open(path)
    half = ids.resize((ids.width // 2, ids.height // 2), Image.Resampling.NEAREST)
    half.save(path)
    with pytest.raises(UserError) as caught:
        read()
    sizes = [f"{image.width} x {image.height}" for image in (half, ids)]
    one_line(caught, str(path), *sizes)


@pytest.mark.parametrize("folder", ["depth", "mask"])
def test_png_with_several_channels(folder: str, read: Callable[..., None], root: Path) -> None:
    path = first(root, folder)
    width, height = Image.open(path).size
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path)
    with pytest.raises(UserError) as caught:
        read()
    one_line(caught, str(path), "one")


def test_error_in_a_loader_worker_is_one_line(make_config: MakeConfig, root: Path) -> None:
    for path in (root / "RGB").iterdir():
        path.write_bytes(path.read_bytes()[:5000])
    config = make_config(
        "run.num_workers=1", "run.max_steps=2", f"datasets.ego_irgbench.data_root={root}"
    )
    with pytest.raises(UserError) as caught:
        train(config)
    one_line(caught, "cannot read image", str(root / "RGB"), "restore it")


# Runs and checkpoints


@pytest.fixture
def run_folder(make_config: MakeConfig, tmp_path: Path) -> Path:
    """A run with checkpoints at steps 1 and 2."""
    train(make_config("run.max_steps=2", "run.checkpoint_every=1"))
    return tmp_path / "run"


def test_checkpoint_of_another_model(
    run_folder: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    other = "model.language_model.hidden_size=48"
    with pytest.raises(UserError) as caught:
        train(make_config("run.max_steps=3", "run.resume=auto", other))
    one_line(caught, "another model", str(run_folder), "config.yaml")
    with pytest.raises(UserError) as caught:
        evaluate(
            make_config(
                f"run.checkpoint={run_folder}", f"run.output_dir={tmp_path / 'eval'}", other
            )
        )
    one_line(caught, "another model", str(run_folder), "config.yaml")


def test_checkpoint_cut_short_is_never_picked_up(
    run_folder: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = sorted((run_folder / "checkpoints").iterdir())
    optimizer = newer / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    assert find_checkpoint(run_folder) == older
    assert f"checkpoint '{newer}' is cut short" in caplog.text
    with pytest.raises(UserError) as caught:
        train(make_config("run.max_steps=2", f"run.resume={newer}"))
    one_line(caught, "no complete checkpoint", str(newer))
    (older / MANIFEST).unlink()
    assert find_checkpoint(run_folder) is None
    train(make_config("run.max_steps=1", "run.resume=auto", "run.warmup_steps=1"))  # starts anew
    assert find_checkpoint(run_folder) == older
    train(make_config("run.max_steps=2", "run.resume=auto"))  # goes on from the complete one
    assert find_checkpoint(run_folder) == newer


def test_run_folder_that_is_taken(run_folder: Path, make_config: MakeConfig) -> None:
    with pytest.raises(UserError) as caught:
        train(make_config("run.max_steps=2"))
    one_line(caught, "run.output_dir", str(run_folder), "run.resume=auto")


def test_evaluation_needs_a_checkpoint(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        evaluate(make_config())
    one_line(caught, "run.checkpoint")
    with pytest.raises(UserError) as caught:
        evaluate(make_config(f"run.checkpoint={tmp_path / 'nothing'}"))
    one_line(caught, "no complete checkpoint", str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("option", "part"),
    [
        (
            "model.language_model.num_heads=3",
            "model.language_model.hidden_size is 32; it must be a multiple of 6",
        ),
        ("model.language_model.num_heads=0", "model.language_model.num_heads is 0"),
        (
            "model.language_model.checkpointed_blocks=-1",
            "checkpointed_blocks is -1; it must be at least 0",
        ),
        ("model.language_model.lora.rank=-1", "model.language_model.lora.rank is -1"),
        (
            "model.language_model.lora={rank: 4, dropout: 1.5}",
            "model.language_model.lora.dropout is 1.5",
        ),
        (
            "model.language_model.lora={rank: 4, alpha: .inf}",
            "model.language_model.lora.alpha is inf",
        ),
        ("model.language_model.lora={rank: 4, targets: [q_prj]}", "Did you mean 'q_proj'"),
        ("model.language_model.lora={rank: 4, targets: []}", "Choices: "),
        ("model.language_model.dtype=bfloat16", "cannot be trained whole"),
        (
            "model.rgb_encoder.num_heads=3",
            "model.rgb_encoder.embed_dim is 32; it must be a multiple of 12",
        ),
        ("model.rgb_encoder.image_size=-168", "model.rgb_encoder.image_size is -168"),
        (
            "model.rgb_encoder.patch_size=48",
            "model.rgb_encoder.image_size 112 is no multiple of the patch size 48; take 96 or 144",
        ),
        ("model.pixel_decoder.num_slots=0", "model.pixel_decoder.num_slots is 0"),
        ("model.pixel_decoder.num_slots=-1", "model.pixel_decoder.num_slots is -1"),
        ("model.language_model.initializer_range=1.5", "initializer_range is 1.5; it must be"),
        (
            "model.pixel_decoder.hidden_size=66",
            "model.pixel_decoder.hidden_size is 66; it must be a multiple of",
        ),
        ("model.patches_per_token=0", "model.projector.patches_per_token is 0"),
        ("model.presence_threshold=7", "model.presence_threshold is 7"),
    ],
)
def test_sizes_of_a_model(option: str, part: str, make_config: MakeConfig) -> None:
    with pytest.raises(UserError) as caught:
        set_up(make_config(option))
    one_line(caught, part)


def test_what_else_is_kept_among_the_checkpoints_stays(
    run_folder: Path, make_config: MakeConfig
) -> None:
    folder = run_folder / "checkpoints"
    shutil.copytree(folder / "step-00000001", folder / "step-keep-this")
    assert find_checkpoint(run_folder) == folder / "step-00000002"
    train(make_config("run.max_steps=3", "run.resume=auto", "run.keep_checkpoints=1"))
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-keep-this"]


def test_damage_within_a_checkpoint_is_named(run_folder: Path, make_config: MakeConfig) -> None:
    (run_folder / "log.jsonl").write_text(
        "no line of ours\n" + (run_folder / "log.jsonl").read_text()
    )
    train(make_config("run.max_steps=3", "run.resume=auto"))
    for name in ("optimizer.pt", "model.safetensors"):
        file = run_folder / "checkpoints" / "step-00000003" / name
        file.write_bytes(bytes(file.stat().st_size))
        with pytest.raises(UserError) as caught:
            train(make_config("run.max_steps=4", "run.resume=auto"))
        one_line(caught, name, "is damaged", "remove its folder")
    with pytest.raises(UserError) as caught:
        train(
            make_config(
                "run.max_steps=4", f"run.resume={run_folder / 'checkpoints' / 'step-00000003'}"
            )
        )
    one_line(caught, "model.safetensors")


@pytest.mark.parametrize("name", ["config.yaml", "state.json", "frozen.json", "model.safetensors"])
def test_damage_of_equal_length_is_named(name: str, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(find_checkpoint(trained), folder)
    (folder / name).write_bytes(bytes((folder / name).stat().st_size))
    with pytest.raises(UserError) as caught:
        publish(folder, tmp_path / "published", "run")
    one_line(caught, name)


def test_a_run_that_is_further_than_asked(run_folder: Path, make_config: MakeConfig) -> None:
    before = (run_folder / "config.yaml").read_text()
    with pytest.raises(UserError) as caught:
        train(make_config("run.max_steps=1", "run.warmup_steps=1", "run.resume=auto"))
    one_line(caught, "past run.max_steps 1", "step-00000002")
    assert (run_folder / "config.yaml").read_text() == before


def test_a_disk_that_is_full_leaves_no_half_checkpoint(
    run_folder: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError) as caught:
        train(make_config("run.max_steps=3", "run.resume=auto", "run.checkpoint_every=1"))
    one_line(caught, "cannot write", "No space left", "run.resume=auto")
    assert [path.name for path in sorted((run_folder / "checkpoints").iterdir())] == [
        "step-00000001",
        "step-00000002",
    ]


def test_weights_that_are_not_finite_are_not_saved(
    run_folder: Path, make_config: MakeConfig
) -> None:
    trainer = set_up(make_config("run.max_steps=3", "run.resume=auto"))
    trainer.progress.step = 3
    trainer.model.projector.linear.bias.data[0] = float("nan")
    with pytest.raises(UserError) as caught:
        trainer.save()
    one_line(caught, "projector.linear.bias is not finite", "intact")
    assert find_checkpoint(run_folder).name == "step-00000002"


def test_a_run_to_start_from_brings_its_words(
    run_folder: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    started = set_up(
        make_config(
            "model.init=null",
            f"model.init_from={run_folder}",
            f"run.output_dir={tmp_path / 'next'}",
        )
    )
    saved = run_folder / "checkpoints" / "step-00000002" / "tokenizer" / "tokenizer.json"
    started.model.language_model.tokenizer.save(tmp_path / "its")
    assert (tmp_path / "its" / "tokenizer.json").read_bytes() == saved.read_bytes()
    assert not (tmp_path / "next" / "tokenizer").exists(), "none was trained"


def test_loss_that_is_not_finite_leaves_the_last_checkpoint(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    wild = (
        "run.learning_rate=1e30",
        "run.warmup_steps=1",
        "run.max_steps=8",
        "run.checkpoint_every=1",
    )
    with pytest.raises(UserError) as caught:
        train(make_config(*wild))
    one_line(caught, "not finite", "run.learning_rate", str(tmp_path / "run" / "checkpoints"))
    assert find_checkpoint(tmp_path / "run") is not None


def test_model_and_run_that_do_not_fit(make_config: MakeConfig) -> None:
    with pytest.raises(UserError) as caught:
        train(make_config("model.image_token_head=false", "run.max_steps=2"))
    one_line(caught, "image_token_labels", "model.image_token_head")


# The commands themselves


def test_guard_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise UserError("[bold]thing[/bold] is wrong; " + "fix it " * 40)

    with pytest.raises(SystemExit) as caught:
        cli.exit_on_user_error(work)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(
        "error: [bold]thing[/bold] is wrong; fix it"
    )
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["doctor", "~/nothing"],
        ["compare", "~/a", "~/b", "--data-root=~/nothing", "--split=test"],
        ["weights", "inspect", "~/nothing"],
        ["weights", "export", "~/nothing", "~/out"],
        ["plan", "--cfg-path=~/nothing"],
        ["bench", "train", "--cfg-path=~/nothing"],
        ["ablate", "~/nothing", "--out=~/out"],
        ["predict", "~/nothing", "~/nothing.jpg", "--ask", "What?", "--out=~/out"],
        ["convert-config", "~/nothing", "~/out"],
        ["score", "~/nothing", "--data-root=~/nothing", "--split=test"],
        ["split", "~/nothing", "--by=room", "--out=~/out"],
        ["convert-predictions", "~/nothing", "~/nothing.tsv", "~/out"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_the_home_folder_is_known_to_every_command(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["annexe", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2 and str(tmp_path) in error and "~" not in error, error
    assert not Path("~").exists()


def test_a_log_record_is_one_line_in_a_file() -> None:
    record = logging.LogRecord("annexe", logging.INFO, "", 0, "a  b\nc " + "d " * 90, (), None)
    line = log_handler().format(record)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO a  b c (d ){90}", line)


def test_a_file_that_fails_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for work in (
        lambda: write_json(tmp_path / "file" / "metrics.json", {}),
        lambda: write_json(tmp_path / "folder", {}),
        lambda: require_writable(tmp_path / "file" / "metrics.json"),
        lambda: require_writable(tmp_path / "folder"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.exit_on_user_error(work)
        error = capsys.readouterr().err
        assert caught.value.code == 2 and error.count("\n") == 1 and str(tmp_path) in error

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        cli.exit_on_user_error(stop)
    assert caught.value.code == 130 and capsys.readouterr().err.startswith("interrupted")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "text", "\ud800")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"], (
        "nothing half written"
    )


def test_a_command_can_be_interrupted_while_it_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=stop))
    monkeypatch.setattr("sys.argv", ["annexe", "doctor", "root"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_a_table_cuts_no_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    table(["a", "b"], [["x" * 50, "y" * 60]])
    printed = capsys.readouterr().out
    assert (printed.count("x"), printed.count("y")) == (50, 60)


def test_an_unknown_argument_is_told_with_the_usage_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["annexe", "doctor", "root", "--jsn", "report.json"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    error = capsys.readouterr().err
    assert "[--json FILE]" in error and "unrecognized arguments: --jsn report.json" in error


def test_scoring_goes_without_a_train_split_that_can_be_read(scenes: Path, root: Path) -> None:
    def annotations_of_train(split: str) -> int:
        return len(EgoIRGBench(split, 1, 0, None, data_root=str(root)).annotations_of("train"))

    assert annotations_of_train("train") == 2
    first(root, "dataset_split/train").write_text("[" * 100_000)
    shutil.copytree(scenes / "dataset_split" / "test", root / "dataset_split" / "test")
    for folder in ("RGB", "depth", "mask"):
        shutil.copytree(scenes / folder, root / folder, dirs_exist_ok=True)
    assert annotations_of_train("test") == 1
    with pytest.raises(UserError, match="is not JSON"):
        EgoIRGBench("train", 1, 0, None, data_root=str(root))


def command(*arguments: object) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=pipe,
        stderr=pipe,
        text=True,
        cwd=ROOT,
        env=environment,
    )


EVALUATE = "eval_scripts/eval_egoirgbench.py"
EVALUATION = ROOT / "eval_configs" / "annexe_tiny.yaml"


@pytest.mark.slow
def test_commands_end_in_one_line(scenes: Path, root: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    first(root, "RGB").write_bytes(b"\xff\xd8 no photo")
    training = (ROOT / "train.py", "--cfg-path", TINY, "--options")
    spoilt = (
        *SMALLEST,
        "run.num_workers=1",
        f"datasets.ego_irgbench.data_root={root}",
        f"run.output_dir={tmp_path / 'a'}",
    )
    evaluation = (ROOT / EVALUATE, "--cfg-path", EVALUATION)
    nothing = (f"run.checkpoint={tmp_path}", f"run.output_dir={tmp_path / 'b'}")
    commands = {
        "Did you mean 'seed'": (*training, "run.sed=1"),
        "cannot read image": (*training, *spoilt),
        "unknown data set 'egohos'": (*evaluation, "--dataset", "egohos"),
        "no complete checkpoint": (*evaluation, "--options", *nothing),
        "not empty": ("-m", "annexe", "synth", foreign, "--images", 4, "--seed", 1),
    }
    for part, words in commands.items():
        process = Command(*words, folder=tmp_path / "printed")
        code = process.wait()
        errors = process.errors()
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert code == 2, errors
        assert len(lines) == 1 and part in lines[0], errors
        assert "Traceback" not in process.output() + errors
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_any_module_can_be_the_first_that_is_imported() -> None:
    code = """
        import importlib, pkgutil, sys, annexe
        for module in pkgutil.walk_packages(annexe.__path__, "annexe."):
            if module.ispkg or module.name.startswith("annexe.tools."):
                for name in [name for name in sys.modules if name.split(".")[0] == "annexe"]:
                    del sys.modules[name]
                importlib.import_module(module.name)
                print(module.name)
    """
    output, errors = command("-c", textwrap.dedent(code)).communicate(timeout=120)
    tools = [f"annexe.tools.{name.replace('-', '_')}" for name in cli.TOOLS]
    assert {"annexe.metrics", "annexe.datasets", *tools} <= set(output.split()), errors


def test_tools_that_need_no_model_start_without_torch() -> None:
    tools = ("synth", "doctor", "split", "score", "compare", "convert_predictions")
    modules = ", ".join(f"annexe.tools.{tool}" for tool in tools)
    code = f"import sys, annexe.cli, {modules}; print('torch' in sys.modules)"
    output, errors = command("-c", code).communicate(timeout=120)
    assert output.strip() == "False", errors


@pytest.mark.slow
def test_help_names_every_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    synth = ("out", "--images", "--seed", "--val", "--test", "--workers")
    commands = {
        ("--cfg-path", "--options"): (ROOT / "train.py",),
        ("--cfg-path", "--options", "--dataset"): (ROOT / EVALUATE,),
        ("--version", *cli.TOOLS): ("-m", "annexe"),
        synth: ("-m", "annexe", "synth"),
    }
    for names, words in commands.items():
        process = Command(*words, "--help", folder=tmp_path)
        assert process.wait() == 0, process.errors()
        for name in names:
            assert name in process.output()
