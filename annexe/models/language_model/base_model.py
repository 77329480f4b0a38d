"""The frozen base: a Llama from its Hugging Face folder or of random weights, in float32, bfloat16, int8 or NF4.

float8 comes on top of bfloat16 (`annexe.models.language_model.float8`), when the adapters are there.
"""

from __future__ import annotations

import logging
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from annexe.errors import UserError
from annexe.models.language_model.attention import NAME

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUANTISED = ("int8", "nf4")
FLOAT8 = "float8"


def load_llama(path: str, dtype: str) -> LlamaForCausalLM:
    """A Llama from its Hugging Face folder, every tensor of it.

    Args:
        dtype: float32, bfloat16, int8 or nf4; of any other it is bfloat16.

    Raises:
        UserError: for a folder that is no Llama, is damaged, or lacks a tensor.
    """
    if not (Path(path) / "config.json").is_file():
        raise UserError(
            f"no Llama in '{path}' (config.json is missing); give its Hugging Face folder"
        )
    try:
        kind = AutoConfig.from_pretrained(path, local_files_only=True).model_type
        if kind != "llama":
            raise UserError(
                f"'{path}' holds a model of type '{kind}'; model.language_model.path takes a llama"
            )
        model, info = LlamaForCausalLM.from_pretrained(
            path,
            dtype=DTYPES.get(dtype, torch.bfloat16),
            attn_implementation=NAME,
            local_files_only=True,
            output_loading_info=True,
            # What is quantised has to pass through the CPU: a small card could not hold it before.
            device_map={"": "cpu"} if dtype in QUANTISED else None,
        )
    except UserError:
        raise
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        SafetensorError,
        UnpicklingError,
    ) as error:
        first = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"cannot load the Llama in '{path}' ({type(error).__name__}: {first}); fetch it again"
        ) from None
    faults = [f"missing {key}" for key in info["missing_keys"]]
    faults += [f"{key} does not fit" for key in info["mismatched_keys"]]
    if faults:
        raise UserError(
            f"the Llama in '{path}' is not whole: {'; '.join(faults[:3])}; fetch it again"
        )
    left_over, number = len(info["unexpected_keys"]), len(model.state_dict())
    log.info(
        "model.language_model.path: %d tensors from '%s'; %d left over", number, path, left_over
    )
    return quantise(model, dtype)


def random_llama(config: LlamaConfig, dtype: str) -> LlamaForCausalLM:
    """A Llama of random weights on torch's default device, made in its dtype: nothing is ever held in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES.get(dtype, torch.bfloat16))
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return quantise(model, dtype)


def quantise(model: LlamaForCausalLM, dtype: str) -> LlamaForCausalLM:
    """Put bitsandbytes' layers in place of the linear layers of every block, on torch's default device.

    int8 is LLM.int8() (NeurIPS 2022), nf4 is NF4 with double quantisation (QLoRA, NeurIPS 2023); other types leave the
    model as it is. Embedding and head stay bfloat16.

    Raises:
        UserError: if bitsandbytes is not installed.
    """
    if dtype not in QUANTISED:
        return model
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise UserError(
            f"model.language_model.dtype {dtype} needs bitsandbytes: pip install 'annexe[quantize]'"
        ) from None
    device = torch.get_default_device()

    def smaller(linear: nn.Linear) -> nn.Module:
        shape, values = (linear.in_features, linear.out_features), linear.weight.data
        if dtype == "int8":
            layer = bnb.nn.Linear8bitLt(
                *shape, bias=False, has_fp16_weights=False, threshold=6.0, device="meta"
            )
            layer.weight = bnb.nn.Int8Params(
                values.cpu(), requires_grad=False, has_fp16_weights=False
            )
        else:
            layer = bnb.nn.Linear4bit(
                *shape, bias=False, compute_dtype=torch.bfloat16, device="meta"
            )
            layer.weight = bnb.nn.Params4bit(
                values,
                requires_grad=False,
                compress_statistics=True,
                quant_type="nf4",
                module=layer,
            )
        return layer.to(device)  # this is where bitsandbytes quantises

    for block in model.model.layers:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                block.set_submodule(name, smaller(module))
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = (
        dtype == "int8",
        dtype == "nf4",
    )  # peft asks for these
    return model.to(device)
