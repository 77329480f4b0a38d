"""Patches of a frozen RGB encoder that are stored once and read in every epoch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from annexe.datasets.mixture import Draw
from annexe.errors import UserError
from annexe.trainer import set_up, train
from annexe.training import feature_cache
from annexe.training.feature_cache import StoredPatches
from tests.test_distributed import run_distributed
from tests.test_training import lines_of_log

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


def files_in(folder: Path) -> list[Path]:
    """Files of patches; nothing else may be there but the lock."""
    files = sorted(folder.iterdir())
    assert {file.suffix for file in files if file.name != ".lock"} <= {".patches"}
    return [file for file in files if file.name != ".lock"]


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in lines_of_log(run)]


def test_training_on_stored_patches_equals_training_on_photos(make_config, tmp_path):
    store = f"run.store_patches={tmp_path / 'store'}"
    train(make_config(*FROZEN))
    train(make_config(*FROZEN, store, f"run.output_dir={tmp_path / 'stored'}"))
    (file,) = files_in(tmp_path / "store")
    written = file.stat().st_mtime_ns
    train(make_config(*FROZEN, store, f"run.output_dir={tmp_path / 'again'}"))
    times = [other.stat().st_mtime_ns for other in files_in(tmp_path / "store")]
    assert times == [written], "not used again"

    plain = losses_of(tmp_path / "run")
    stored = losses_of(tmp_path / "stored")
    assert stored == losses_of(tmp_path / "again")
    assert stored == pytest.approx(plain, rel=2e-3)
    assert stored != plain, "patches are rounded to bfloat16"


def test_stored_patches_are_those_of_the_encoder(make_config, tmp_path, monkeypatch):
    trainer = set_up(make_config(*FROZEN, f"run.store_patches={tmp_path / 'store'}"))
    sample = trainer.train_set[Draw(0, 0, 4)]
    with torch.no_grad():
        photo = torch.from_numpy(sample.image).permute(2, 0, 1)[None].float() / 255
        expected = trainer.model.rgb_encoder(photo)[0]
    assert torch.equal(sample.patches, expected.to(torch.bfloat16))
    batch = next(iter(trainer.batches(trainer.progress)))
    assert batch.patches.shape == (2, *sample.patches.shape)
    monkeypatch.setattr(trainer.model.rgb_encoder, "forward", None)
    trainer.train_step([batch])


@pytest.mark.slow
def test_processes_share_the_work(make_config, tmp_path):
    """Twelve photos in two processes: the same file as that of one."""
    stores = {name: tmp_path / f"store-{name}" for name in ("one", "two")}
    configs = {}
    for name, store in stores.items():
        options = (f"run.store_patches={store}", f"run.output_dir={tmp_path / name}")
        configs[name] = make_config(*FROZEN, *options)
    set_up(configs["one"])
    run_distributed(set_up, configs["two"])
    (alone,) = files_in(stores["one"])
    (shared,) = files_in(stores["two"])
    assert shared.name == alone.name and shared.read_bytes() == alone.read_bytes()


def test_patches_are_read_as_they_were_written(tmp_path):
    values = torch.randn(5, 4, 3).to(torch.bfloat16)
    path = tmp_path / "some.patches"
    path.write_bytes(values.view(torch.int16).numpy().tobytes())
    stored = StoredPatches(path, (4, 3))
    assert len(stored) == 5
    for index in range(5):
        assert torch.equal(stored[index], values[index])


def test_other_weights_and_settings_get_other_patches(make_config, tmp_path):
    store = f"run.store_patches={tmp_path / 'store'}"
    for option in (
        "run.seed=0",
        "run.seed=1",
        "model.rgb_encoder.statistics=imagenet",
        "model.rgb_encoder.num_heads=4",
    ):
        set_up(make_config(*FROZEN, store, option, f"run.output_dir={tmp_path / option}"))
    assert len(files_in(tmp_path / "store")) == 4


def test_a_run_that_stores_the_same_patches_is_waited_for(make_config, tmp_path):
    """Another process has the folder for two seconds and leaves the whole file there."""
    store = f"run.store_patches={tmp_path / 'store'}"
    set_up(make_config(*FROZEN, store, f"run.output_dir={tmp_path / 'first'}"))
    (file,) = files_in(tmp_path / "store")
    content = file.read_bytes()
    file.unlink()
    command = [sys.executable, "-c", WRITER, file, str(len(content))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "has it\n"
        set_up(make_config(*FROZEN, store, f"run.output_dir={tmp_path / 'second'}"))
    assert file.read_bytes() == b"x" * len(content), "what the other one wrote was written over"


def test_what_cannot_be_stored_is_said(make_config, tmp_path, monkeypatch):
    store = f"run.store_patches={tmp_path / 'store'}"
    with pytest.raises(UserError, match=r"needs model\.rgb_encoder\.frozen=true"):
        set_up(make_config(store))
    full = SimpleNamespace(disk_usage=lambda _: shutil._ntuple_diskusage(9, 9, 0))
    monkeypatch.setattr(feature_cache, "shutil", full)
    with pytest.raises(UserError, match=r"GB are needed in .* set another folder, or null"):
        set_up(make_config(*FROZEN, store))
