"""Which weights of a public vision encoder are trained: none, all, the last blocks, or adapters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from annexe.errors import UserError, require_adapter, require_sizes

_SETTINGS = "model.rgb_encoder"
_WORDS = ("none", "all", "lora")


@dataclass
class EncoderLora:
    """Low-rank adapters (arXiv 2106.09685) on every linear layer of the encoder's blocks.

    Args:
        rank: width of the adapters.
        alpha: their product is scaled by ``alpha / rank``.
        dropout: probability that an input of an adapter is dropped in training.

    Raises:
        UserError: for a rank below 1, a dropout outside [0, 1), or an ``alpha`` of 0 or less.
    """

    rank: int = 16
    alpha: float = 16
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_sizes(f"{_SETTINGS}.lora", rank=self.rank)
        require_adapter(f"{_SETTINGS}.lora", self.alpha, self.dropout)


def require_trained(trained: int | str, num_blocks: int) -> None:
    """Check the setting ``trained`` of an encoder of so many blocks.

    Raises:
        UserError: for a word or a number that means nothing.
    """
    is_known = trained in _WORDS if isinstance(trained, str) else 1 <= trained <= num_blocks
    if not is_known:
        raise UserError(
            f"{_SETTINGS}.trained is {trained}; set it to none, all, lora, or to how many of the "
            f"last blocks are trained, from 1 to {num_blocks}"
        )


def set_trained(
    network: nn.Module,
    blocks: Sequence[nn.Module],
    norms: Iterable[nn.Module],
    trained: int | str,
    lora: EncoderLora,
) -> None:
    """Let gradients reach the weights that ``trained`` names, and no others.

    Args:
        network: the encoder, changed in place.
        blocks: its transformer blocks.
        norms: the norms behind the last block, which are trained with it.
        trained: ``none``, ``all``, ``lora``, or the number of the last blocks, which
            `require_trained` has checked before there was a network.
        lora: the adapters.
    """
    network.requires_grad_(trained == "all")
    if isinstance(trained, int):
        for module in [*blocks[-trained:], *norms]:
            module.requires_grad_(True)
    if trained == "lora":
        _add_adapters(network, blocks, lora)


def _add_adapters(network: nn.Module, blocks: Sequence[nn.Module], lora: EncoderLora) -> None:
    """Put an adapter beside every linear layer of the blocks."""
    from peft import LoraConfig, inject_adapter_in_model

    in_blocks = {module for block in blocks for module in block.modules()}
    targets = []
    for name, module in network.named_modules():
        # timm adds this layer's bias without calling the layer, which would pass the adapter by
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True
        if isinstance(module, nn.Linear) and module in in_blocks:
            targets.append(name)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=lora.dropout,
        target_modules=targets,
    )
    inject_adapter_in_model(config, network)
