"""Settings to objects: a configuration is read and checked once, and its components are built.

The one file that knows both the configuration and the components.
"""

from __future__ import annotations

import inspect
import logging
import typing
from collections.abc import Callable, Sequence
from dataclasses import asdict, field, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

import annexe.datasets
import annexe.models  # noqa: F401  (both register their components)
from annexe.checkpoints.manifest import describe_changes, explain_versions
from annexe.checkpoints.run_folder import (
    is_of_run,
    load_progress,
    saved_config,
    without_sources,
)
from annexe.checkpoints.saved_settings import compare_start, require_same_meaning
from annexe.checkpoints.start import folder_of_start, settings_of_start
from annexe.checkpoints.tensor_files import read_config
from annexe.checkpoints.training_state import load_weights
from annexe.checkpoints.whole_models import is_whole, read_once, settings_of_whole
from annexe.config import OPTIONAL_PARTS, PARTS, Config, RunConfig, is_released
from annexe.datasets.ego_irgbench import EgoIRGBench, MissingSplit
from annexe.datasets.mixture import ALL, Ratio, require_ratio
from annexe.datasets.training_set import TrainingSet
from annexe.errors import UserError, unknown_name_error
from annexe.hub.runs import local_run, require_run
from annexe.models.annexe import Annexe, grid_of_masks
from annexe.models.compile import compile_blocks, start_compiler
from annexe.models.language_model.tokenizer import TextTokenizer, load_tokenizer
from annexe.registry import import_plugins, lookup
from annexe.settings import (
    merge_strictly,
    overlay,
    read_options,
    read_path,
    read_settings,
    setting_error,
)

log = logging.getLogger(__name__)

_PUBLISHED_ALPHA = 16  # of the adapters of MiniGPT-v2 and of the released code


def load_config(
    cfg_path: str | Path, options: Sequence[str] = (), *, onto_checkpoint: bool = False
) -> Config:
    """Read a YAML file, put ``a.b=c`` options over it, and check every key and value.

    Args:
        onto_checkpoint: where there are model settings, they stand over those that
            ``run.checkpoint`` was trained with.

    Raises:
        UserError: for a missing file, bad YAML, an unknown key or component, or a value of the
            wrong type.
    """
    path = Path(cfg_path)
    base = read_settings(path)
    if is_of_run(path):
        base = OmegaConf.create(saved_config(path.parent))
    if not isinstance(base, DictConfig):
        raise UserError(f"{path} is a list; write a block of settings: model, datasets and run")
    if is_released(base):
        raise UserError(
            f"{path} is of the released ANNEXE code; turn it into ours: "
            f"annexe convert-config {path} NEW.yaml"
        )

    # Options over the file over the defaults; an error may be about either
    source = f"{path} and its options" if options else str(path)
    try:
        overrides = read_options(options)
        for settings in (base, overrides):
            _upgrade_model(settings)
        if onto_checkpoint:
            base = _onto_checkpoint(base, overrides)
        given = overlay(base, overrides)
        whole = _whole_of_start(given)
        start = _start_of_parts(given) if whole is None else None
        if whole is not None:
            base = _onto_model({"model": settings_of_whole(whole)}, base)
        if start is not None:
            base = _onto_model({"model": settings_of_start(start)}, base)
        _drop_settings_of_other_types(base, overrides)
        config = merge_strictly(Config, overlay(base, overrides))
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {setting_error('', error)}") from None
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (yaml.YAMLError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read {source}: {reason}; fix the YAML") from None

    # Components, those of plug-ins included
    import_plugins(config.imports)
    for name, spec in config.datasets.items():
        config.datasets[name] = check_dataset(name, spec)
    if config.model is not None:
        config.model = check_model(config.model)
        _require_depth(config)
    if start is not None:
        folder = folder_of_start(Path(start))
        assert folder is not None
        config.model = without_sources(config.require_model(), folder)
    return config


def _require_depth(config: Config) -> None:
    """Refuse to choose checkpoints by depth where none is predicted.

    Raises:
        UserError: naming both settings.
    """
    metric = config.run.validation_metric
    if config.require_model()["depth_branch"]["type"] == "none" and metric.startswith("depth/"):
        raise UserError(
            f"run.validation_metric is {metric}, and model.depth_branch is none; choose another, "
            "such as grounding/ciou"
        )


def _upgrade_model(settings: DictConfig) -> None:
    """Bring a ``model`` block to today's form.

    A part may be written as its type alone, and older files have ``patches_per_token`` outside of
    the projector's block.
    """
    model = settings.get("model")
    if not isinstance(model, DictConfig):
        return
    for part in PARTS:
        named = model.get(part)
        if isinstance(named, str) and named.isidentifier():
            model[part] = {"type": named}
    if "patches_per_token" in model:
        OmegaConf.update(model, "projector.patches_per_token", model.pop("patches_per_token"))


def _onto_checkpoint(base: DictConfig, overrides: DictConfig) -> Any:
    """``base`` over the model settings of the checkpoint that it or ``overrides`` names.

    Without model settings of its own, ``base`` stays as it is.
    """
    checkpoint = OmegaConf.select(overlay(base, overrides), "run.checkpoint")
    if isinstance(checkpoint, str):
        checkpoint = read_path(checkpoint, "run.checkpoint", optional=True)
    has_model = any(settings.get("model") is not None for settings in (base, overrides))
    if not isinstance(checkpoint, str) or not has_model:
        return base
    saved = {"model": saved_config(require_run(checkpoint))["model"]}
    return _onto_model(saved, base)


def _onto_model(saved: dict[str, Any], base: DictConfig) -> DictConfig:
    """``base`` over a saved ``model`` block; a part of another type takes nothing from there."""
    if base.get("model") is None:
        base["model"] = {}
    for part in PARTS:
        chosen = OmegaConf.select(base, f"model.{part}.type")
        if chosen not in (None, saved["model"].get(part, {}).get("type")):
            saved["model"][part] = {}
    return overlay(saved, base)


def _start_of_parts(given: DictConfig) -> str | None:
    """The path that ``model.init_from`` means, if the parts of the model are to be those of there.

    A file that gives every part its ``type`` says itself what the model is.
    """
    start = _init_from(given)
    if start is None:
        return None
    for part in PARTS:
        has_type = OmegaConf.select(given, f"model.{part}.type") is not None
        if not has_type and part not in OPTIONAL_PARTS:
            return local_run(start)
    return None


def _init_from(given: Any) -> str | None:
    """The path that ``model.init_from`` names."""
    start = OmegaConf.select(given, "model.init_from")
    if isinstance(start, str):
        start = read_path(start, "model.init_from", optional=True)
    return start if isinstance(start, str) else None


def _whole_of_start(given: DictConfig) -> str | None:
    """The folder that ``model.init_from`` names, if it holds a whole vision-language model."""
    start = _init_from(given)
    return start if start is not None and is_whole(start) else None


def _drop_settings_of_other_types(base: Any, overrides: DictConfig) -> None:
    """A part whose type an option changes takes none of the old type's settings along."""
    for part in PARTS:
        chosen = OmegaConf.select(overrides, f"model.{part}.type")
        before = OmegaConf.select(base, f"model.{part}.type")
        if before is None and OmegaConf.select(base, f"model.{part}") is not None:
            before = OPTIONAL_PARTS.get(part)
        if chosen is not None and before is not None and chosen != before:
            base.model[part] = {}


def check_model(spec: dict[str, Any]) -> dict[str, Any]:
    """A ``model`` block with every setting checked and every default filled in.

    Raises:
        UserError: for a part that is missing, an unknown setting, or a value of the wrong type.
    """
    spec = dict(spec)
    for part in PARTS:
        if part in OPTIONAL_PARTS:
            spec.setdefault(part, {})
        if part not in spec:
            needed = ", ".join(part for part in PARTS if part not in OPTIONAL_PARTS)
            raise UserError(f"model.{part} is missing; a model needs {needed}")
    parts = {}
    for part in PARTS:
        default = {"type": OPTIONAL_PARTS[part]} if part in OPTIONAL_PARTS else {}
        parts[part] = check_component(part, spec[part], f"model.{part}", **default)
    wiring = {key: value for key, value in spec.items() if key not in PARTS}
    return check_component("model", wiring, "model") | parts


def check_dataset(name: str, spec: object) -> dict[str, Any]:
    """An entry of ``datasets`` with every setting checked and every default filled in.

    Its ``type`` is left out where the entry is called by it, and ``ratio`` where it is not given.

    Raises:
        UserError: for an unknown type or setting, or a value of the wrong type.
    """
    where = f"datasets.{name}"
    ratio = spec.get("ratio") if isinstance(spec, dict) else None
    if isinstance(spec, dict):
        spec = {key: value for key, value in spec.items() if key != "ratio"}
    checked = check_component("dataset", spec, where, type=name)
    if checked["type"] == name:
        del checked["type"]
    if ratio is not None:
        checked["ratio"] = require_ratio(ratio, f"{where}.ratio")
    return checked


def check_component(kind: str, spec: object, where: str, **defaults: str) -> dict[str, Any]:
    """A component's block, checked against the signature of its constructor, defaults filled in.

    Args:
        spec: ``type`` and settings.
        where: the block's place in the configuration, for messages.
        defaults: settings that the block may leave out, such as ``type``.

    Raises:
        UserError: for an unknown type or setting, or a value of the wrong type.
    """
    if not isinstance(spec, dict):
        shown = "null" if spec is None else spec
        raise UserError(f"{where} is '{shown}'; it must be a block of settings")
    spec = {**defaults, **spec}
    component = lookup(kind, spec.get("type"), f"{where}.type")
    options = _options(component)
    settings = {key: value for key, value in spec.items() if key != "type"}
    for key in settings.keys() - options.keys():
        raise unknown_name_error(f"setting {where}.{key}: '{spec['type']}' has no", key, options)

    # A dataclass with the constructor's arguments as its fields, to check against
    hints = _hints(component)
    fields: list[tuple[str, Any, Any]] = []
    for name, parameter in options.items():
        default = MISSING if parameter.default is parameter.empty else parameter.default
        fields.append((name, hints[name], field(default_factory=_returning(default))))
    checked = merge_strictly(make_dataclass("Settings", fields), settings, where)

    # Plain values, as they are saved with a run
    filled = {"type": spec["type"]}
    for name in options:
        value = getattr(checked, name)
        is_block = is_dataclass(value)
        filled[name] = asdict(value) if is_block else value
    return filled


def build_component(kind: str, spec: dict[str, Any], *parts: Any) -> Any:
    """The component that a checked block names, made from its settings and injected ``parts``."""
    component = lookup(kind, spec["type"], f"{kind}.type")
    hints = _hints(component)
    settings = {}
    for name, value in spec.items():
        if name != "type":
            is_block = is_dataclass(hints[name]) and isinstance(value, dict)
            settings[name] = hints[name](**value) if is_block else value
    return component(*parts, **settings)


def _returning(value: Any) -> Callable[[], Any]:
    """A function without arguments that returns ``value``."""
    return lambda: value


def _options(component: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """A constructor's keyword-only parameters: what YAML may set."""
    parameters = inspect.signature(component).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def _hints(component: Callable[..., Any]) -> dict[str, Any]:
    constructor = component.__init__ if inspect.isclass(component) else component
    return typing.get_type_hints(constructor, include_extras=True)


def build_dataset(config: Config, split: str, *, cached: bool = True) -> EgoIRGBench:
    """The configuration's only data set in one of its splits.

    Args:
        cached: keep resized pixels under ``run.output_dir``.

    Raises:
        UserError: unless there is one data set and a model block.
    """
    if len(config.datasets) != 1:
        raise UserError(
            f"datasets names {len(config.datasets)} data sets; name one, such as ego_irgbench "
            "(an evaluation takes --dataset NAME)"
        )
    (name,) = config.datasets
    return _build_dataset(config, name, split, cached=cached)


def build_training_set(config: Config, *, cached: bool = True) -> TrainingSet:
    """The train splits of all data sets of the configuration, mixed by their ratios.

    Args:
        cached: as of `build_dataset`.

    Raises:
        UserError: for a data set that cannot be used, or ratios that say too little.
    """
    if not config.datasets:
        raise UserError("datasets names no data set; name one, such as ego_irgbench")
    ratios = _ratios(config.datasets)
    datasets = {
        name: _build_dataset(config, name, "train", cached=cached) for name in config.datasets
    }
    return TrainingSet(datasets, ratios, config.run.seed)


def build_validation_sets(config: Config) -> dict[str, EgoIRGBench]:
    """Name -> val split, of the data sets that have one.

    Raises:
        UserError: for a data set that cannot be used, or if none has a val split.
    """
    datasets = {}
    for name in config.datasets:
        try:
            datasets[name] = _build_dataset(config, name, "val", cached=True)
        except MissingSplit as error:
            if len(config.datasets) == 1:
                raise
            log.info("data set '%s' is not validated: %s", name, error)
    if not datasets:
        raise UserError(
            "no data set has a val split; set run.validate_every=0, or make one (annexe split)"
        )
    return datasets


def _build_dataset(config: Config, name: str, split: str, *, cached: bool) -> EgoIRGBench:
    """One data set of the configuration; arguments as of `build_dataset`."""
    image_size = config.require_model()["rgb_encoder"]["image_size"]
    cache = Path(config.run.output_dir) / "cache" if cached else None
    spec = {"type": name, **config.datasets[name]}
    spec.pop("ratio", None)
    try:
        return build_component("dataset", spec, split, image_size, config.run.seed, cache)
    except UserError as error:
        # Data sets speak of their settings under the name of their type
        error.args = (str(error).replace(f"datasets.{spec['type']}.", f"datasets.{name}."),)
        raise


def answer_format_of(datasets: dict[str, dict[str, Any]]) -> str:
    """The form of the answers that a model learns from the data sets of a training.

    All have the same; those that have no such setting answer in sentences.
    """
    for settings in datasets.values():
        if "answer_format" in settings:
            return settings["answer_format"]
    return "sentence"


def _ratios(datasets: dict[str, Any]) -> dict[str, Ratio]:
    """The ratio of every data set; without any, each counts by the number of its images.

    Raises:
        UserError: if some have one and others have not.
    """
    ratios = {name: settings.get("ratio") for name, settings in datasets.items()}
    missing = [name for name, ratio in ratios.items() if ratio is None]
    if missing and len(missing) < len(ratios):
        raise UserError(
            f"datasets.{missing[0]} has no ratio, and other data sets have one; set "
            f"datasets.{missing[0]}.ratio to a number, or to {ALL} for its number of images"
        )
    return {name: ALL if ratio is None else ratio for name, ratio in ratios.items()}


def build_tokenizer(config: Config, folder: Path) -> TextTokenizer:
    """The tokenizer in ``folder``, as the configured model takes it.

    Raises:
        UserError: if there is none, or it has more words than the model.
    """
    model = config.require_model()
    language_model = model["language_model"]
    size = table_rows(language_model)
    num_slots = model["pixel_decoder"]["num_slots"]
    tokenizer = load_tokenizer(folder, num_slots, size, language_model["prompt_template"])
    is_set = language_model["vocab_size"] is not None
    if is_set and size is not None and tokenizer.vocab_size > size:
        raise UserError(
            f"model.language_model.vocab_size is {size} but the tokenizer in '{folder}' has "
            f"{tokenizer.vocab_size} words; raise it or leave it out"
        )
    return tokenizer


def table_rows(language_model: dict[str, Any]) -> int | None:
    """Rows of the tables of a checked ``language_model`` block; None: as many as it has words.

    A folder of type causal_lm says it itself.
    """
    if language_model["type"] != "causal_lm" or language_model["vocab_size"] is not None:
        return language_model["vocab_size"]
    stored = read_config(language_model["path"])
    if stored is None:
        return None
    return stored.get("text_config", stored).get("vocab_size")


def build_model(
    spec: dict[str, Any],
    tokenizer: TextTokenizer,
    device: torch.device | None = None,
    *,
    bf16: bool = False,
) -> Annexe:
    """Build the model that a checked ``model`` block describes.

    Args:
        device: where it is made (default: torch's default device).
        bf16: it will run under bf16 autocast, so frozen matrices are cast once and for all: the
            same results, less memory.
    """
    # Encoders first: the other parts ask for their sizes
    device = torch.get_default_device() if device is None else device
    with read_once(), torch.device(device):
        rgb_encoder = build_component("rgb_encoder", spec["rgb_encoder"])
        depth_branch = build_component("depth_branch", spec["depth_branch"], rgb_encoder.image_size)
        language_model = build_component("language_model", spec["language_model"], tokenizer)
        pixel_decoder = build_component(
            "pixel_decoder",
            spec["pixel_decoder"],
            language_model.hidden_size,
            rgb_encoder.embed_dim,
            depth_branch.num_channels,
            grid_of_masks(rgb_encoder, depth_branch),
        )
        projector = build_component(
            "projector",
            spec["projector"],
            rgb_encoder.embed_dim,
            rgb_encoder.grid,
            language_model.hidden_size,
        )
        wiring = {key: value for key, value in spec.items() if key not in PARTS}
        parts = (rgb_encoder, depth_branch, projector, language_model, pixel_decoder)
        model = build_component("model", wiring, *parts)
    if bf16:
        _cast_frozen_matrices(model)
    return model.to(device)  # some buffers are made on the CPU whatever the default


def _cast_frozen_matrices(model: nn.Module) -> None:
    """Frozen float32 weights of linear layers and convolutions become bfloat16.

    A head that is its model's table of embeddings stays: what is read from it is not rounded.
    """
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            for parameter in module.parameters(recurse=False):
                is_frozen = not parameter.requires_grad and parameter not in tables
                if parameter.dtype == torch.float32 and is_frozen:
                    parameter.data = parameter.data.to(torch.bfloat16)


def filled_config(folder: Path) -> dict[str, Any]:
    """As `saved_config`, with the default of every setting that a version before did not have.

    Raises:
        UserError: for a setting that this version does not know.
    """
    saved = saved_config(folder)
    try:
        saved["model"] = check_model(saved["model"])
        saved["run"] = asdict(merge_strictly(RunConfig, saved["run"], "run"))
    except UserError as error:
        raise UserError(f"'{folder / 'config.yaml'}': {error}{explain_versions(folder)}") from None
    return saved


def fetch_start(spec: dict[str, Any]) -> None:
    """Fetch the run of the hub that ``init_from`` of a ``model`` block names, and name its folder.

    Raises:
        UserError: for a name that is neither a path nor a run on the hub.
    """
    if spec.get("init_from") is not None:
        spec["init_from"] = local_run(spec["init_from"])


def check_start(spec: dict[str, Any]) -> None:
    """Compare a checked ``model`` block with that of what ``init_from`` names.

    Raises:
        UserError: for settings under which the weights from there mean something else.
    """
    if spec.get("init_from") is None:
        return
    folder = folder_of_start(Path(spec["init_from"]))
    lora = spec["language_model"].get("lora")
    if folder is not None:
        changes = compare_start(folder, filled_config(folder)["model"], spec)
        if changes:
            log.warning("model.init_from '%s' had %s", folder, describe_changes(changes))
    elif lora is not None and lora["rank"] > 0 and lora["alpha"] != _PUBLISHED_ALPHA:
        log.warning(
            "model.language_model.lora.alpha is %g; MiniGPT-v2 and the released code train "
            "adapters with %g, and files do not say it",
            *(lora["alpha"], _PUBLISHED_ALPHA),
        )


def restore_model(config: Config, checkpoint: Path, accelerator: Accelerator) -> Annexe:
    """The trained model on this process's device, ready to answer.

    Raises:
        UserError: for a damaged checkpoint, or one of another model than configured.
    """
    model_here = {"model": config.require_model()}
    require_same_meaning(checkpoint, {"model": filled_config(checkpoint)["model"]}, model_here)
    tokenizer = build_tokenizer(config, checkpoint / "tokenizer")

    if config.run.compile:
        start_compiler()

    # Frozen random weights are not in a checkpoint: the seed makes them again
    set_seed(saved_config(checkpoint)["run"]["seed"])
    bf16 = accelerator.mixed_precision == "bf16"
    model = build_model(config.require_model(), tokenizer, accelerator.device, bf16=bf16)

    load_weights(checkpoint, model)
    model.calibrated_thresholds = load_progress(checkpoint).thresholds
    return prepare_for_inference(model, config.run, accelerator)


def prepare_for_inference(model: Annexe, run: RunConfig, accelerator: Accelerator) -> Annexe:
    """``model`` as it answers fastest.

    Adapters are merged for good, and products of one input joined. CUDA graphs, compiled blocks,
    weights in float8 and drafts are used where ``run`` has them.

    Raises:
        UserError: for weights in float8 that the language model or the GPU cannot have.
    """
    language_model = model.language_model
    language_model.merge_adapters()
    on_gpu = accelerator.device.type == "cuda"
    model.text_decoder.graphs = run.cuda_graphs and on_gpu and language_model.supports_cuda_graphs
    if run.compile:
        compile_blocks(model)
    prepared = accelerator.prepare_model(model.eval(), evaluation_mode=True)
    autocast_dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    float8 = run.generation_dtype == "float8"
    is_joined = model.text_decoder.join_products(autocast_dtype, float8=float8)
    if float8 and not is_joined:
        raise UserError(
            "run.generation_dtype float8 is for a Llama, Mistral, Qwen2 or Qwen3 with merged "
            "adapters, of dtype float32 or bfloat16 and not with fsdp; set it to auto"
        )

    # Masks that start from placeholders would differ by rounding with what was decoded before
    if model.pixel_decoder.conditioning == "prompt":
        model.text_decoder.draft(run.draft_tokens)
    return prepared
