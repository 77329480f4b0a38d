"""Patches of a frozen RGB encoder that are stored once."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch

from annexe.datasets import patches
from annexe.errors import UserError
from annexe.trainer import Trainer, train
from tests.test_training import log_of

FROZEN = ("model.rgb_encoder.frozen=true", "run.max_steps=3", "run.checkpoint_every=3")


def test_training_on_stored_patches_equals_training_on_photos(make_config, tmp_path):
    store = f"run.store_patches={tmp_path / 'store'}"
    train(make_config(*FROZEN))
    train(make_config(*FROZEN, store, f"run.output_dir={tmp_path / 'stored'}"))
    (file,) = (tmp_path / "store").iterdir()
    written = file.stat().st_mtime_ns
    train(make_config(*FROZEN, store, f"run.output_dir={tmp_path / 'again'}"))
    assert [f.stat().st_mtime_ns for f in (tmp_path / "store").iterdir()] == [written], "not used again"
    plain, stored, again = ([line["loss"] for line in log_of(tmp_path / run)] for run in ("run", "stored", "again"))
    assert stored == again
    assert stored == pytest.approx(plain, rel=2e-3) and stored != plain  # patches were rounded to bfloat16


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


def test_other_weights_get_other_patches(make_config, tmp_path):
    store = f"run.store_patches={tmp_path / 'store'}"
    for seed in (0, 1):
        Trainer(make_config(*FROZEN, store, f"run.seed={seed}", f"run.output_dir={tmp_path / str(seed)}"))
    assert len(list((tmp_path / "store").iterdir())) == 2


def test_what_cannot_be_stored_is_said(make_config, tmp_path, monkeypatch):
    store = f"run.store_patches={tmp_path / 'store'}"
    with pytest.raises(UserError, match=r"needs model\.rgb_encoder\.frozen=true"):
        Trainer(make_config(store))
    monkeypatch.setattr(patches, "shutil", SimpleNamespace(disk_usage=lambda _: shutil._ntuple_diskusage(9, 9, 0)))
    with pytest.raises(UserError, match=r"GB are needed in .* set another folder, or null"):
        Trainer(make_config(*FROZEN, store))
