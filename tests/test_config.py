"""Configuration and registry: strict, defaults in one place, open to outside components."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from annexe import registry
from annexe.build import build_component, build_model, check_component, load_config
from annexe.checkpoints.run_folder import find_checkpoint, saved_config
from annexe.config import Config, RunConfig, as_dict
from annexe.errors import UserError
from annexe.models.language_model.tokenizer import load_tokenizer
from annexe.registry import register
from annexe.settings import as_option, read_path
from annexe.trainer import train
from tests.conftest import ROOT, SMALLEST, TINY

# One is for annexe ablate; two need a run to start from: tests/test_finetune.py, test_rewards.py
NEED_A_START = {ROOT / "train_configs" / name for name in ("finetune.yaml", "rewards.yaml")}
OTHERS = {*ROOT.glob("train_configs/*_ablation.yaml"), *NEED_A_START}
CONFIGS = sorted({*ROOT.glob("*_configs/*.yaml")} - OTHERS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EVA_WEIGHTS", "DEPTH_WEIGHTS", "LLAMA_PATH", "MINIGPT_WEIGHTS"):
        monkeypatch.setenv(name, "weights")
    config = load_config(path)
    assert len(config.datasets) == 1
    assert (config.model is not None) == (path.parent.name == "train_configs")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "some.yaml"
    path.write_text(text)
    return path


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")).run == RunConfig()


def test_numbers_and_null(tmp_path: Path) -> None:
    path = write(
        tmp_path, "run: {learning_rate: 1e-4, weight_decay: 1, resume: null, betas: [0, 1e-1]}"
    )
    run = load_config(path, ["run.clip_norm=1e-4", "run.checkpoint=null"]).run
    assert (run.learning_rate, run.weight_decay, run.clip_norm, run.betas) == (
        1e-4,
        1.0,
        1e-4,
        [0.0, 0.1],
    )
    assert all(
        isinstance(value, float)
        for value in (run.learning_rate, run.weight_decay, run.clip_norm, *run.betas)
    )
    assert run.resume is None and run.checkpoint is None


def test_options_go_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "run: {seed: 1, max_steps: 2000, loss_weights: {mask: 2}}")
    config = load_config(
        path, ["run.seed=5", "run.seed=7", "run.loss_weights.dice=4", "run.output_dir=a=b"]
    )
    assert (config.run.seed, config.run.max_steps, config.run.output_dir) == (7, 2000, "a=b")
    assert (config.run.loss_weights.mask, config.run.loss_weights.dice) == (2.0, 4.0)


@pytest.mark.parametrize(
    "option",
    ["seed=1", "run.seeds=1", "run.seed=one", "run.seed=1.5", "model.rgb_encoder.frozen=perhaps"],
)
def test_nothing_unknown_and_nothing_of_another_type_passes(option: str) -> None:
    with pytest.raises(UserError):
        load_config(TINY, [option])


@pytest.mark.parametrize(
    "option", ["run=fast", "run.loss_weights=2", "model.language_model.lora=4", "datasets=3"]
)
def test_a_value_where_a_block_belongs_is_named(option: str) -> None:
    key, _, value = option.partition("=")
    with pytest.raises(
        UserError, match=rf"(^|: ){key} is '{value}'; it must be a block of settings"
    ):
        load_config(TINY, [option])


def test_interpolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANNEXE_RUNS", "elsewhere")
    path = write(
        tmp_path,
        'run: {output_dir: "${oc.env:ANNEXE_RUNS}/a", max_steps: 3000, '
        'warmup_steps: "${run.max_steps}"}',
    )
    config = load_config(path)
    assert (config.run.output_dir, config.run.warmup_steps) == ("elsewhere/a", 3000)


def test_a_reference_changes_no_other_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks with references are made by OmegaConf, others without it."""
    monkeypatch.setenv("ANNEXE_NAME", "a name")
    plain = load_config(TINY, ["run.wandb.name=a name"])
    with_reference = load_config(TINY, ["run.wandb.name=${oc.env:ANNEXE_NAME}"])
    assert repr(with_reference) == repr(plain)  # 1 and 1.0 are told apart


TYPED = ("007", "1e5", "on", "No", "1:30", "0x10", "2026-01-01", "1_000", "1.50", ".5", "a: b")


@pytest.mark.parametrize("text", TYPED)
def test_a_text_stays_as_typed(text: str, tmp_path: Path) -> None:
    """YAML sees a number, a flag, a date or a block in each of them."""
    by_option = load_config(TINY, [f"run.output_dir={text}", f"run.wandb.name={text}"])
    assert (by_option.run.output_dir, by_option.run.wandb.name) == (text, text)
    of_data = load_config(TINY, [f"datasets.ego_irgbench.exclude=./{text}"])
    assert of_data.datasets["ego_irgbench"]["exclude"] == f"./{text}"

    # In a file as far as YAML lets it, and again from what is saved with a run
    if ": " not in text:
        path = write(tmp_path, f"run: {{output_dir: {text}, wandb: {{name: {text}}}}}")
        run = load_config(path).run
        assert (run.output_dir, run.wandb.name) == (text, text)
    saved = tmp_path / "saved.yaml"
    OmegaConf.save(OmegaConf.create(as_dict(by_option)), saved)
    assert load_config(saved) == by_option


@pytest.mark.parametrize(
    "text", ["a #b", "@a", "*a", "&a", "!a", "%a", "- a", "a'b", "|", "x=y", "`"]
)
def test_an_option_is_no_yaml_unless_it_begins_as_a_list_or_in_quotes(text: str) -> None:
    assert load_config(TINY, [f"run.output_dir={text}"]).run.output_dir == text


@pytest.mark.parametrize("text", ["[a]", "{a}", "'a b'", '"', "null", "~", "a", "007", ""])
def test_an_option_made_of_a_text_gives_it_back(text: str) -> None:
    config = load_config(TINY, [as_option("run.wandb.name", text)])
    assert config.run.wandb.name == text
    assert load_config(TINY, [as_option("run.wandb.name", None)]).run.wandb.name is None


def test_numbers_and_flags_are_those_of_yaml(tmp_path: Path) -> None:
    text = "run: {seed: 0x10, max_steps: 1_000, report: off, compile: 'yes', betas: [0, '0.5']}"
    run = load_config(write(tmp_path, text), ["run.batch_size= 8", "run.clip_norm=.inf"]).run
    assert (run.seed, run.max_steps, run.batch_size) == (16, 1000, 8)
    assert (run.report, run.compile, run.betas, run.clip_norm) == (False, True, [0, 0.5], math.inf)
    numbers = load_config(TINY, ["run.queries_per_annotation=3"]).run.queries_per_annotation
    assert numbers == 3 and isinstance(numbers, int)
    assert load_config(TINY, ["run.queries_per_annotation=all"]).run.queries_per_annotation == "all"


PATHS = (
    "run.output_dir",
    "run.resume",
    "run.checkpoint",
    "run.store_patches",
    "model.init_from",
    "model.rgb_encoder.weights",
    "model.depth_branch.weights",
    "model.language_model.path",
    "datasets.ego_irgbench.data_root",
    "datasets.ego_irgbench.exclude",
    "datasets.ego_irgbench.split_dir",
    "datasets.egohos.data_root",
)


@pytest.mark.parametrize("setting", PATHS)
def test_paths_are_expanded(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/people/ann")
    monkeypatch.setenv("SCRATCH", "/scratch")

    def value(text: str) -> object:
        found = as_dict(load_config(TINY, [f"{setting}={text}"]))
        for name in setting.split("."):
            found = found[name]
        return found

    assert value("~/$SCRATCH/${oc.env:SCRATCH}/7") == "/people/ann//scratch//scratch/7"
    if "data_root" in setting or "output_dir" in setting:
        with pytest.raises(UserError, match=rf"{setting} is null .as ~ alone is; .* is ~/"):
            value("~")
    else:
        assert value("False") is None


@pytest.mark.parametrize("optional", [False, True])
def test_what_a_path_may_be(optional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/people/ann")
    monkeypatch.setenv("SCRATCH", "/scratch")

    def value(text: str) -> str | None:
        return read_path(text, "run.x", optional=optional)

    for text in ("./~/$", "a~", "$5", "a b", "007", "./false"):
        assert value(text) == text
    assert value("~") == "/people/ann" and value("$SCRATCH/a") == "/scratch/a"
    with pytest.raises(UserError, match=r"run.x is .* no user of ~annexe-nobody; write './~annexe"):
        value("~annexe-nobody/x")
    with pytest.raises(UserError, match=r"run.x is .*\$ANNEXE_NOT_SET is not set"):
        value("$ANNEXE_NOT_SET/x")

    # Words for none and for any
    if optional:
        assert [value(no) for no in ("false", "No", "off", "none", "")] == [None] * 5
        with pytest.raises(UserError, match=r"run.x is 'true'; it must be a path, or null"):
            value("true")
    else:
        assert value("no") == "no" and value("on") == "on"
        with pytest.raises(UserError, match=r"run.x is empty"):
            value(" ")


def test_what_is_left_empty_in_a_file_has_its_defaults(tmp_path: Path) -> None:
    empty = "model:\ndatasets:\nrun:\nimports: []\n"
    assert load_config(write(tmp_path, empty)) == Config()
    half = "run:\n  wandb:\n  loss_weights:\n  seed: 3\n"
    assert load_config(write(tmp_path, half)).run == RunConfig(seed=3)
    options = ["model.language_model.lora={rank: 4}", "model.language_model.lora=null"]
    assert load_config(TINY, options).model["language_model"]["lora"]["rank"] == 0


def test_resolved_configuration_loads_again(tmp_path: Path) -> None:
    config = load_config(TINY, ["run.seed=3", "run.loss_weights.dice=0.5"])
    path = tmp_path / "resolved.yaml"
    OmegaConf.save(OmegaConf.create(as_dict(config)), path)
    assert load_config(path) == config


def test_configuration_saved_with_a_run_loads_again(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = make_config("run.max_steps=2")
    train(config)
    assert load_config(tmp_path / "run" / "config.yaml") == config
    assert load_config(find_checkpoint(tmp_path / "run") / "config.yaml") == config


# Registry


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty registry for one test."""
    monkeypatch.setattr(registry, "_COMPONENTS", {})


def build(kind: str, spec: dict, *parts: object) -> object:
    """A component of a block that was checked, as a configuration's are."""
    return build_component(kind, check_component(kind, spec, kind), *parts)


@pytest.mark.usefixtures("shelf")
def test_a_name_is_taken_once() -> None:
    def lamp(*, watts: int = 5) -> int:
        return watts

    register("light", "lamp")(lamp)
    register("light", "lamp")(lamp)  # importing a module twice is no second lamp
    with pytest.raises(ValueError, match="light 'lamp' is registered twice"):
        register("light", "lamp")(lambda *, watts=5: watts)
    register("heat", "lamp")(lambda *, watts=5: watts)


@pytest.mark.usefixtures("shelf")
def test_unknown_names_list_the_choices() -> None:
    register("light", "lamp")(lambda *, watts=5: watts)
    register("light", "torch")(lambda *, watts=5: watts)
    with pytest.raises(
        UserError, match=r"unknown light.type 'lmap'. Did you mean 'lamp'\? Choices: lamp, torch"
    ):
        build("light", {"type": "lmap"})
    with pytest.raises(UserError, match=r"unknown light.type 'None'. Choices: lamp, torch"):
        build("light", {})
    with pytest.raises(UserError, match="Choices: none"):
        build("sound", {"type": "bell"})


@pytest.mark.usefixtures("shelf")
def test_arguments_are_checked_before_the_component_is_made() -> None:
    @register("light", "lamp")
    def lamp(
        socket: str,
        *,
        watts: int,
        colour: str | None = None,
        sizes: list[int] = [1],  # noqa: B006
    ) -> tuple:
        return socket, watts, colour, sizes

    assert build("light", {"type": "lamp", "watts": "7"}, "E27") == ("E27", 7, None, [1])
    assert check_component("light", {"type": "lamp", "watts": 7, "sizes": [2, 3]}, "here")[
        "sizes"
    ] == [
        2,
        3,
    ]
    with pytest.raises(UserError, match=r"here\.watts is missing"):
        check_component("light", {"type": "lamp"}, "here")
    with pytest.raises(
        UserError, match=r"here\.wats: .* Did you mean 'watts'\? Choices: colour, sizes, watts"
    ):
        check_component("light", {"type": "lamp", "wats": 7}, "here")
    with pytest.raises(UserError, match=r"here\.socket"):  # injected by the code, not for YAML
        check_component("light", {"type": "lamp", "watts": 7, "socket": "E14"}, "here")
    with pytest.raises(UserError, match=r"here\.watts.*'bright'"):
        check_component("light", {"type": "lamp", "watts": "bright"}, "here")


PLUGIN = '''
from annexe.models.pixel_decoder import QueryDecoder
from annexe.registry import register


@register("pixel_decoder", "shouting_query")
class ShoutingDecoder(QueryDecoder):
    """The query decoder with louder masks."""

    def __init__(self, *parts: int, gain: float = 2.0, num_slots: int = 4) -> None:
        super().__init__(
            *parts, num_slots=num_slots, hidden_size=32, num_layers=1, num_heads=4, pixel_dim=8
        )
        self.gain = gain

    def forward(self, *inputs):
        return [said._replace(masks=self.gain * said.masks) for said in super().forward(*inputs)]
'''


def test_component_from_outside(
    make_config: Callable[..., Config],
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        registry, "_COMPONENTS", {kind: dict(names) for kind, names in registry._COMPONENTS.items()}
    )
    (tmp_path / "annexe_shouting.py").write_text(PLUGIN)
    given = OmegaConf.load(TINY)
    given.imports = ["annexe_shouting"]
    given.model.pixel_decoder = {"type": "shouting_query", "gain": 3}
    OmegaConf.save(given, tmp_path / "plugin.yaml")
    own = (
        f"datasets.ego_irgbench.data_root={scenes}",
        f"run.output_dir={tmp_path / 'run'}",
        "run.max_steps=2",
    )
    options = [option for option in SMALLEST if "pixel_decoder" not in option]
    config = load_config(tmp_path / "plugin.yaml", [*options, *own])
    train(config)
    checkpoint = find_checkpoint(tmp_path / "run")
    model = build_model(
        saved_config(checkpoint)["model"],
        load_tokenizer(checkpoint / "tokenizer", config.model["pixel_decoder"]["num_slots"]),
    )
    assert (
        type(model.pixel_decoder).__name__ == "ShoutingDecoder" and model.pixel_decoder.gain == 3.0
    )
    assert torch.is_tensor(model.pixel_decoder.slot)
    with pytest.raises(UserError, match="Did you mean 'gain'"):
        load_config(tmp_path / "plugin.yaml", ["model.pixel_decoder.gian=1"])
