"""The frozen base: a language model from its Hugging Face folder, or one of random weights.

It is held in float32, bfloat16, int8 or NF4. float8 starts from bfloat16, once the adapters are
there (`annexe.models.language_model.float8`).
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from annexe.checkpoints.formats import UNQUANTIZED
from annexe.checkpoints.public import quantization_of
from annexe.checkpoints.tensor_files import CONFIG, contents_of, read_json, require_real_files
from annexe.checkpoints.whole_models import PARTS_OF_WHOLE, family_of, load_whole
from annexe.errors import UserError
from annexe.models.language_model.attention import NAME

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUANTIZED = ("int8", "nf4")
FLOAT8 = "float8"

# Magnitude of an input from which on LLM.int8() multiplies its column in 16 bits (its section 3.2).
_INT8_OUTLIER_THRESHOLD = 6.0
# Largest weight of a Llama's final norm, below which a file holds a difference: in models it is
# about 1 or more, in differences of models some hundredths at most.
_MIN_NORM = 0.1


class LanguagePart(PreTrainedModel):
    """A language model that transformers has as a part of a whole model alone, with its head."""

    base_model_prefix = "model"
    generation_config = None  # it does not generate by itself

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.model = AutoModel.from_config(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        """The table of words."""
        return self.model.embed_tokens

    def forward(self, input_ids: Tensor, **others: Any) -> CausalLMOutput:
        """Logits of the next token, float[B, N, V], for rows of words int[B, N]."""
        hidden = self.model(input_ids=input_ids, **others).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden))


def require_class_for_text(model: nn.Module) -> None:
    """Check that transformers can load a language model from a folder of its own.

    Raises:
        UserError: for one that it has as a part of a whole model alone.
    """
    if isinstance(model, LanguagePart):
        raise UserError(
            f"transformers has no language model of type '{model.config.model_type}' by itself, "
            "so it cannot be exported; export the adapter, without --merge"
        )


def make_language_model(config: PretrainedConfig, **settings: Any) -> PreTrainedModel:
    """A causal language model of random weights.

    Args:
        config: its sizes.
        settings: of transformers' ``from_config``.
    """
    if config.model_type in PARTS_OF_WHOLE:
        return LanguagePart._from_config(config, **settings)
    return AutoModelForCausalLM.from_config(config, **settings)


def load_base(path: str, dtype: str) -> PreTrainedModel:
    """Load every tensor of a language model from its Hugging Face folder.

    Args:
        path: the folder.
        dtype: float32, bfloat16, int8 or nf4. Any other loads bfloat16.

    Returns:
        The model, on torch's default device if it is quantized, else on the CPU.

    Raises:
        UserError: for a folder that is damaged, lacks a tensor, or holds the difference of two
            models.
    """
    if family_of(path) is not None:
        return quantize(_base_of_whole(path, dtype), dtype)

    # Read the folder. Of what is damaged in it the libraries raise whatever they like.
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES.get(dtype, torch.bfloat16),
            attn_implementation=NAME,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            # A small card could not hold the weights before they are quantized.
            device_map={"": "cpu"} if dtype in QUANTIZED else None,
        )
        model, info = loaded
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot load the language model in '{path}' ({type(error).__name__}: {reason}); "
            "fetch it again"
        ) from None

    # Insist on every tensor.
    faults = [f"missing {key}" for key in info["missing_keys"]]
    faults += [f"{key} does not fit" for key in info["mismatched_keys"]]
    if faults:
        raise UserError(
            f"the language model in '{path}' is not complete: {'; '.join(faults[:3])}; "
            "fetch it again"
        )
    _require_no_delta(model, path)
    log.info(
        "model.language_model.path: %d tensors from '%s'; %d left over",
        len(model.state_dict()),
        path,
        len(info["unexpected_keys"]),
    )
    return quantize(model, dtype)


def _base_of_whole(path: str, dtype: str) -> PreTrainedModel:
    """The language model of a whole vision-language model, as one of its own.

    Args:
        path: folder of the whole model.
        dtype: as of `load_base`.
    """
    whole = load_whole(path)
    language_model = whole.model.get_submodule(whole.family.language_model)
    language_model.set_attn_implementation(NAME)

    # The class of causal language models around it, without weights of its own
    with torch.device("meta"):
        base: Any = make_language_model(copy.deepcopy(language_model.config))
    base.model = language_model
    base.lm_head = whole.model.lm_head
    base.config = language_model.config
    base.generation_config = whole.model.generation_config
    return base.to(DTYPES.get(dtype, torch.bfloat16))


def _require_no_delta(model: PreTrainedModel, path: str) -> None:
    """Refuse the difference of two Llamas, as Vicuna was first published: its norms are all but 0.

    Raises:
        UserError: for such a folder.
    """
    if model.config.model_type != "llama":
        return
    if float(model.model.norm.weight.detach().float().abs().max()) < _MIN_NORM:
        raise UserError(
            f"'{path}' holds the difference of two models (a delta), not a model; add it to its "
            "base with the script that it was published with, and give the sum"
        )


def require_llama(folder: Path) -> None:
    """Check by its small files that a folder holds a Llama in plain weights.

    Raises:
        UserError: if it does not, saying what it holds.
    """
    model_type = require_plain_folder(folder)["model_type"]
    if model_type != "llama":
        raise UserError(
            f"'{folder}' holds a model of type '{model_type}', and model.language_model.type llama "
            "takes a llama; set it to causal_lm"
        )


def require_plain_folder(folder: Path) -> dict[str, Any]:
    """Check by its small files that a folder holds a model in plain weights.

    Returns:
        The content of its config.json.

    Raises:
        UserError: if it does not, saying what it holds.
    """
    if not (folder / CONFIG).is_file():
        what = f"; {contents_of(folder)}" if folder.is_dir() else ""
        raise UserError(
            f"no language model in '{folder}' ({CONFIG} is missing{what}); "
            "give its Hugging Face folder"
        )
    require_real_files(folder)
    content = read_json(folder / CONFIG)
    if not isinstance(content, dict) or "model_type" not in content:
        raise UserError(f"'{folder / CONFIG}' does not name a model_type; fetch it again")
    method = quantization_of(content)
    if method is not None:
        raise UserError(
            f"the language model in '{folder}' is quantized with {method}; {UNQUANTIZED}"
        )
    return content


def random_base(config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    """Make a language model of random weights on torch's default device.

    It is made in its own dtype, so that it never takes the memory of float32.

    Args:
        config: its sizes.
        dtype: float32, bfloat16, int8 or nf4. Any other makes bfloat16.

    Returns:
        The model.

    Raises:
        UserError: if bitsandbytes is needed and not installed.
    """
    previous = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES.get(dtype, torch.bfloat16))
    try:
        model = make_language_model(config, attn_implementation=NAME)
    finally:
        torch.set_default_dtype(previous)
    return quantize(model, dtype)


def quantize(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """Put bitsandbytes' layers in place of the linear layers of every block.

    int8 is LLM.int8() (NeurIPS 2022), nf4 is NF4 with double quantization (QLoRA, NeurIPS 2023).
    float8 comes later, other types leave the model as it is. Embedding and head stay bfloat16.

    Args:
        model: changed in place.
        dtype: setting of the language model.

    Returns:
        The model, on torch's default device if it was quantized.

    Raises:
        UserError: if bitsandbytes is needed and not installed.
    """
    if dtype not in QUANTIZED:
        return model
    try:
        # Imported here, because the library is optional.
        import bitsandbytes as bnb
    except ImportError:
        raise UserError(
            f"model.language_model.dtype {dtype} needs bitsandbytes: pip install 'annexe[quantize]'"
        ) from None
    device = torch.get_default_device()

    def to_int8(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear8bitLt(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            has_fp16_weights=False,
            threshold=_INT8_OUTLIER_THRESHOLD,
            device="meta",
        )
        layer.bias = linear.bias
        layer.weight = bnb.nn.Int8Params(
            linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False
        )
        return layer

    def to_nf4(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=torch.bfloat16,
            device="meta",
        )
        layer.bias = linear.bias
        layer.weight = bnb.nn.Params4bit(
            linear.weight.data,
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            module=layer,
        )
        return layer

    # Replace the layers one by one; bitsandbytes quantizes the weights as they move to the device.
    convert = to_int8 if dtype == "int8" else to_nf4
    for block in model.model.layers:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                block.set_submodule(name, convert(module).to(device))

    # peft asks for these; a module may have attributes that are neither tensors nor modules.
    model.is_loaded_in_8bit = dtype == "int8"  # type: ignore[assignment]
    model.is_loaded_in_4bit = dtype == "nf4"  # type: ignore[assignment]
    return model.to(device)  # type: ignore[arg-type]  # the library wraps the method
