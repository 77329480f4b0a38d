"""Patches of a frozen RGB encoder that are stored once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from annexe.errors import UserError
from annexe.trainer import Trainer, train
from annexe.training import feature_cache as patches
from tests.test_training import log_of

WRITER = """
import sys, time
from pathlib import Path
from annexe.files import locked
file = Path(sys.argv[1])
with locked(file.parent):
    print("has it", flush=True)
    time.sleep(2)
    file.write_bytes(b"x" * int(sys.argv[2]))
"""
FROZEN = ("model.rgb_encoder.frozen=true", "run.max_steps=3", "run.checkpoint_every=3")


def test_training_on_stored_patches_equals_training_on_photos(make_config, tmp_path):
    store = f"run.store_patches={tmp_path / 'store'}"
    train(make_config(*FROZEN))
    train(make_config(*FROZEN, store, f"run.output_dir={tmp_path / 'stored'}"))
    (file,) = (tmp_path / "store").glob("*.patches")
    written = file.stat().st_mtime_ns
    train(make_config(*FROZEN, store, f"run.output_dir={tmp_path / 'again'}"))
    assert [f.stat().st_mtime_ns for f in (tmp_path / "store").glob("*.patches")] == [written], (
        "not used again"
    )
    plain, stored, again = (
        [line["loss"] for line in log_of(tmp_path / run)] for run in ("run", "stored", "again")
    )
    assert stored == again
    assert (
        stored == pytest.approx(plain, rel=2e-3) and stored != plain
    )  # patches were rounded to bfloat16


def test_stored_patches_are_those_of_the_encoder(make_config, tmp_path, monkeypatch):
    trainer = Trainer(make_config(*FROZEN, f"run.store_patches={tmp_path / 'store'}"))
    sample = trainer.train_set[0, 4]
    with torch.no_grad():
        photo = torch.from_numpy(sample.image).permute(2, 0, 1)[None].float() / 255
        expected = trainer.model.rgb_encoder(photo)[0]
    assert torch.equal(sample.patches, expected.to(torch.bfloat16))
    batch = next(iter(trainer._loader()))
    assert batch.patches.shape == (2, *sample.patches.shape)
    monkeypatch.setattr(trainer.model.rgb_encoder, "forward", None)
    trainer.train_step([batch])


def test_other_weights_and_settings_get_other_patches(make_config, tmp_path):
    store = f"run.store_patches={tmp_path / 'store'}"
    for option in (
        "run.seed=0",
        "run.seed=1",
        "model.rgb_encoder.statistics=imagenet",
        "model.rgb_encoder.num_heads=4",
    ):
        Trainer(make_config(*FROZEN, store, option, f"run.output_dir={tmp_path / option}"))
    assert len(list((tmp_path / "store").glob("*.patches"))) == 4


def test_a_run_that_stores_the_same_patches_is_waited_for(make_config, tmp_path):
    """Another process has the folder for two seconds and leaves the whole file there."""
    options = (
        *FROZEN,
        f"run.store_patches={tmp_path / 'store'}",
        f"run.output_dir={tmp_path / 'first'}",
    )
    Trainer(make_config(*options))
    (file,) = (tmp_path / "store").glob("*.patches")
    content = file.read_bytes()
    file.unlink()
    command = [sys.executable, "-c", WRITER, file, str(len(content))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "has it\n"
        Trainer(make_config(*options, f"run.output_dir={tmp_path / 'second'}"))
    assert file.read_bytes() == b"x" * len(content), "what the other one wrote was written over"


def test_what_cannot_be_stored_is_said(make_config, tmp_path, monkeypatch):
    store = f"run.store_patches={tmp_path / 'store'}"
    with pytest.raises(UserError, match=r"needs model\.rgb_encoder\.frozen=true"):
        Trainer(make_config(store))
    monkeypatch.setattr(
        patches, "shutil", SimpleNamespace(disk_usage=lambda _: shutil._ntuple_diskusage(9, 9, 0))
    )
    with pytest.raises(UserError, match=r"GB are needed in .* set another folder, or null"):
        Trainer(make_config(*FROZEN, store))
