"""The frozen base: a Llama from its Hugging Face folder, or one of random weights.

It is held in float32, bfloat16, int8 or NF4. float8 starts from bfloat16, once the adapters are
there (`annexe.models.language_model.float8`).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from annexe.checkpoints.formats import UNQUANTIZED
from annexe.checkpoints.public import quantization_of
from annexe.checkpoints.tensor_files import CONFIG, contents_of, read_json, require_real_files
from annexe.errors import UserError
from annexe.models.language_model.attention import NAME

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUANTIZED = ("int8", "nf4")
FLOAT8 = "float8"

# Magnitude of an input from which on LLM.int8() multiplies its column in 16 bits (its section 3.2).
_INT8_OUTLIER_THRESHOLD = 6.0


def load_llama(path: str, dtype: str) -> LlamaForCausalLM:
    """Load every tensor of a Llama from its Hugging Face folder.

    Args:
        path: the folder.
        dtype: float32, bfloat16, int8 or nf4. Any other loads bfloat16.

    Returns:
        The model, on torch's default device if it is quantized, else on the CPU.

    Raises:
        UserError: for a folder that holds no Llama, or a quantized one, is damaged, or lacks a
            tensor.
    """
    require_llama(Path(path))

    # Read the folder. Of what is damaged in it the libraries raise whatever they like.
    try:
        loaded: Any = LlamaForCausalLM.from_pretrained(
            path,
            dtype=DTYPES.get(dtype, torch.bfloat16),
            attn_implementation=NAME,
            local_files_only=True,
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
            f"cannot load the Llama in '{path}' ({type(error).__name__}: {reason}); fetch it again"
        ) from None

    # Insist on every tensor.
    faults = [f"missing {key}" for key in info["missing_keys"]]
    faults += [f"{key} does not fit" for key in info["mismatched_keys"]]
    if faults:
        raise UserError(
            f"the Llama in '{path}' is not complete: {'; '.join(faults[:3])}; fetch it again"
        )
    log.info(
        "model.language_model.path: %d tensors from '%s'; %d left over",
        len(model.state_dict()),
        path,
        len(info["unexpected_keys"]),
    )
    return quantize(model, dtype)


def require_llama(folder: Path) -> None:
    """Check by its small files that a folder holds a Llama in plain weights.

    Raises:
        UserError: if it does not, saying what it holds.
    """
    if not (folder / CONFIG).is_file():
        what = f"; {contents_of(folder)}" if folder.is_dir() else ""
        raise UserError(
            f"no Llama in '{folder}' ({CONFIG} is missing{what}); give its Hugging Face folder"
        )
    require_real_files(folder)
    content = read_json(folder / CONFIG)
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type != "llama":
        raise UserError(
            f"'{folder}' holds a model of type '{model_type}'; "
            "model.language_model.path takes a llama"
        )
    method = quantization_of(content)
    if method is not None:
        raise UserError(f"the Llama in '{folder}' is quantized with {method}; {UNQUANTIZED}")


def random_llama(config: LlamaConfig, dtype: str) -> LlamaForCausalLM:
    """Make a Llama of random weights on torch's default device.

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
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)
    return quantize(model, dtype)


def _require_no_biases(blocks: nn.Module, dtype: str) -> None:
    """Refuse linear layers with biases, for which quantized layers have no place.

    Raises:
        UserError: naming the first one.
    """
    for name, module in blocks.named_modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            raise UserError(
                f"model.language_model.dtype {dtype} takes no biases, and '{name}' of this Llama "
                "has one; set it to bfloat16"
            )


def quantize(model: LlamaForCausalLM, dtype: str) -> LlamaForCausalLM:
    """Put bitsandbytes' layers in place of the linear layers of every block.

    int8 is LLM.int8() (NeurIPS 2022), nf4 is NF4 with double quantization (QLoRA, NeurIPS 2023).
    float8 comes later, other types leave the model as it is. Embedding and head stay bfloat16.

    Args:
        model: changed in place.
        dtype: setting of the language model.

    Returns:
        The model, on torch's default device if it was quantized.

    Raises:
        UserError: if bitsandbytes is needed and not installed, or layers have biases.
    """
    if dtype not in DTYPES:
        _require_no_biases(model.model.layers, dtype)
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
            bias=False,
            has_fp16_weights=False,
            threshold=_INT8_OUTLIER_THRESHOLD,
            device="meta",
        )
        layer.weight = bnb.nn.Int8Params(
            linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False
        )
        return layer

    def to_nf4(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            device="meta",
        )
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
