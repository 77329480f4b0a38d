"""Shared fixtures: a few synthetic scenes, and the tiny configuration made smaller still."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from annexe import cli
from annexe.build import build_dataset, build_model, load_config
from annexe.config import Config
from annexe.datasets.collate import Collator
from annexe.models.annexe import Annexe
from annexe.models.language_model.tokenizer import TextTokenizer, train_tokenizer
from annexe.structures.batch import Batch
from annexe.synthetic.generate import generate
from annexe.trainer import train

ROOT = Path(__file__).parent.parent
TINY = ROOT / "train_configs" / "annexe_tiny.yaml"
SHARED = ROOT.parent / "shared"

# The components of the tiny configuration at the smallest size that keeps each of them in play.
SMALLEST = (
    "model.rgb_encoder.image_size=112",
    "model.rgb_encoder.embed_dim=32",
    "model.rgb_encoder.depth=1",
    "model.rgb_encoder.mlp_dim=64",
    "model.language_model.hidden_size=32",
    "model.language_model.num_layers=2",
    "model.language_model.mlp_dim=64",
    "model.pixel_decoder.hidden_size=32",
    "model.pixel_decoder.num_layers=2",
    "model.pixel_decoder.pixel_dim=8",
    # A hard cut, in which differences of rounding, which many tests allow, would show
    "model.pixel_decoder.masked_attention=false",
    "run.num_workers=0",
    "run.device=cpu",
    "run.batch_size=2",
    "run.max_new_tokens=8",
    "run.warmup_steps=2",
    "run.log_every=1",
    "run.validate_every=0",
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """One thread everywhere, so that parallel sums run in one order in every process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Indexes of the tests' data sets stay out of the user's own cache."""
    os.environ["ANNEXE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def assert_same_but_for_rounding(
    tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = 1e-6
) -> None:
    """Compare tensors element by element, but those of the depth branch by norm.

    Rounding turns the sign of a depth error that is all but zero, and with it a step of AdamW where
    the gradient is as small.
    """
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.startswith("depth_branch."):
            assert (tensors[name] - tensor).norm() <= atol + 1e-3 * tensor.norm(), name
        else:
            torch.testing.assert_close(
                tensors[name], tensor, atol=atol, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with 12 train, 3 val and 5 test scenes."""
    root = tmp_path_factory.mktemp("scenes")
    generate(root, num_images=20, seed=3, val_fraction=0.15, test_fraction=0.25)
    return root


@pytest.fixture
def make_config(scenes: Path, tmp_path: Path) -> Callable[..., Config]:
    """Loads the smallest configuration with further ``a.b=c`` options.

    It writes under a folder of the test.
    """

    def make(*options: str) -> Config:
        own = (f"datasets.ego_irgbench.data_root={scenes}", f"run.output_dir={tmp_path / 'run'}")
        # A part of another type has settings of its own
        others = []
        if "model.pixel_decoder.type=deconv" in options:
            others.append("pixel_decoder")
        if "model.language_model.type=causal_lm" in options:
            others.append("language_model")
        chosen = [o for o in SMALLEST if not any(part in o for part in others)]
        return load_config(TINY, [*chosen, *own, *options])

    return make


@pytest.fixture
def command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the `annexe` command in this process.

    Gives exit code, output and errors.
    """

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["annexe", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def built_parts() -> dict[tuple, tuple]:
    """What `make_parts` built in this session, by its arguments."""
    return {}


@pytest.fixture
def make_parts(
    make_config: Callable[..., Config], built_parts: dict[tuple, tuple]
) -> Callable[..., tuple[Annexe, TextTokenizer, Batch]]:
    """Builds the smallest model (seed 0, eval mode), its tokenizer, and a batch of first images.

    They are built once for all tests that ask for the same, and copied for each of them.
    """

    def build(*options: str, num_images: int) -> tuple[Annexe, TextTokenizer, Batch]:
        config = make_config(*options)
        dataset = build_dataset(config, "train")
        tokenizer = train_tokenizer(dataset.texts(), num_slots=4)
        torch.manual_seed(0)
        model = build_model(config.model, tokenizer).eval()
        collate = Collator(tokenizer, model.num_image_tokens, num_slots=4)
        return model, tokenizer, collate([dataset[0, index] for index in range(num_images)])

    def make(*options: str, num_images: int = 3) -> tuple[Annexe, TextTokenizer, Batch]:
        key = (*options, num_images)
        if key not in built_parts:
            parts = build(*options, num_images=num_images)
            built_parts[key] = (parts, torch.get_rng_state())
        # Random numbers go on as after building
        parts, random_state = built_parts[key]
        torch.set_rng_state(random_state)
        return copy.deepcopy(parts)

    return make


@pytest.fixture(scope="session")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step; tests read it and write elsewhere."""
    folder = tmp_path_factory.mktemp("trained")
    options = [
        *SMALLEST,
        f"datasets.ego_irgbench.data_root={scenes}",
        f"run.output_dir={folder}",
        "run.max_steps=1",
        "run.warmup_steps=0",
    ]
    train(load_config(TINY, options))
    return folder
