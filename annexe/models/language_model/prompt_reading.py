"""Prompts on a CPU: joint products over real tokens alone, attention branch by branch.

A row of packed prompts is padded, and most of its tokens do not attend to each other
(`annexe.models.language_model.attention`). Here the tokens of all rows lie in one sequence without
padding, and every branch attends to the prefix of its image and to itself:

    tokens    | prefix of image 0 | prefix of image 1 | branch 0 | branch 1 | branch 2 |
    queries   prefixes [B, Lp]                        branches [R, L]
    keys      the same, causal                        prefix of the image, then the branch, causal

Branches of an image that begin with the same words, as all of its queries do, share those tokens.
In the last block only those tokens are computed whose states are read; of the others it is keys and
values.

Legend: B images, N packed tokens, M tokens that are computed, R branches, L tokens of the longest
one, Lp prefix tokens, H query heads, Hk key heads, Dh width of a head, D width of the language
model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from annexe.models.language_model.attention import operations_on
from annexe.models.language_model.decode_blocks import DecodingBlocks
from annexe.models.language_model.decode_operations import hiding_bias, rotate
from annexe.models.language_model.kv_cache import Prefill, PrefillCache
from annexe.structures.batch import PackedText


@dataclass
class _Layout:
    """Where the tokens lie: prefixes of all images, then what is new of one branch after another.

    What a branch shares with the one before it, from its first token on, is not new. Places behind
    the end of a row or a branch hold any token, which nothing reads.
    """

    num_images: int
    num_prefix_tokens: int  # B * Lp
    packed_places: Tensor  # int64[M], a place of each token in [B * N]
    packed_tokens: Tensor  # int64[B, N], token at each place
    branch_places: Tensor  # int64[M - B * Lp], a place of each token of a branch in [R * L]
    branch_tokens: Tensor  # int64[R, L], token at each place
    key_tokens: Tensor  # int64[R, Lp + L], the same with the prefix of the branch's image before
    lengths: Tensor  # int64[R], tokens of each branch
    last_tokens: Tensor  # int64[R], the last one of each branch
    last_places: Tensor  # int64[R], its place in [B * N]

    @classmethod
    def of(cls, text: PackedText) -> _Layout:
        """The layout of packed prompts without responses."""
        num_images, num_columns = text.input_ids.shape
        rows = torch.arange(num_images)[:, None]
        columns = torch.arange(text.prefix_length)
        prefix_places = (num_columns * rows + columns).flatten()
        num_prefix_tokens = len(prefix_places)

        # Branches, and what is new of each
        lengths = text.branch_length
        image_index = text.branch_image_index
        offsets = torch.arange(int(lengths.max()))
        is_token = offsets < lengths[:, None]  # [R, L]
        starts = num_columns * image_index + text.branch_start
        places = (starts[:, None] + offsets).clamp(max=num_images * num_columns - 1)
        ids = torch.where(is_token, text.input_ids.flatten()[places], -1)
        is_new = _is_new(ids, image_index) & is_token
        branch_places = is_new.flatten().nonzero()[:, 0]
        packed_places = torch.cat([prefix_places, places.flatten()[branch_places]])

        # Tokens at places: a new one, or that of the nearest branch before in which it is new
        rows_of_branches = torch.arange(len(lengths))[:, None]
        newest_row = torch.where(is_new, rows_of_branches, 0).cummax(0).values  # [R, L]
        new_tokens = (num_prefix_tokens - 1 + is_new.flatten().cumsum(0)).view_as(is_new)
        branch_tokens = new_tokens.gather(0, newest_row)
        prefix_tokens = text.prefix_length * image_index[:, None] + columns
        packed_tokens = torch.zeros(num_images * num_columns, dtype=torch.int64)
        packed_tokens[prefix_places] = torch.arange(num_prefix_tokens)
        packed_tokens[places[is_token]] = branch_tokens[is_token]
        return cls(
            num_images=num_images,
            num_prefix_tokens=num_prefix_tokens,
            packed_places=packed_places,
            packed_tokens=packed_tokens.view(num_images, num_columns),
            branch_places=branch_places,
            branch_tokens=branch_tokens,
            key_tokens=torch.cat([prefix_tokens, branch_tokens], dim=1),
            lengths=lengths,
            last_tokens=branch_tokens.gather(1, lengths[:, None] - 1)[:, 0],
            last_places=starts + lengths - 1,
        )

    def prefixes(self, x: Tensor) -> Tensor:
        """Tokens of the prefixes: [M, ...] -> [B, Lp, ...]."""
        return x[: self.num_prefix_tokens].unflatten(0, (self.num_images, -1))

    def hiding_bias(self, dtype: torch.dtype) -> Tensor:
        """What hides the keys behind a token of a branch: float[L, Lp + L]."""
        max_length = self.branch_tokens.shape[1]
        prefix_length = self.key_tokens.shape[1] - max_length
        columns = torch.arange(-prefix_length, max_length)
        return hiding_bias(columns > torch.arange(max_length)[:, None], dtype)


def _is_new(ids: Tensor, image_index: Tensor) -> Tensor:
    """Tokens that a branch does not share with the one before it.

    Args:
        ids: int64[R, L], -1 behind the end of a branch.
        image_index: int64[R], in ascending order.

    Returns:
        bool[R, L].
    """
    is_same = ids[1:] == ids[:-1]
    is_same &= (image_index[1:] == image_index[:-1])[:, None]
    is_shared = is_same.cumprod(1).bool()  # from the first token on
    return torch.cat([torch.ones_like(ids[:1], dtype=torch.bool), ~is_shared])


def _at(tokens: Tensor, x: Tensor) -> Tensor:
    """``x[tokens]``, which this does at the speed of memory: [M, ...] -> [*tokens.shape, ...]."""
    return x.index_select(0, tokens.flatten()).unflatten(0, tokens.shape)


@torch.no_grad()
def read_prompts(
    blocks: DecodingBlocks, embeddings: Tensor, text: PackedText, last_alone: bool
) -> Prefill:
    """As `CausalLM.prefill`.

    Args:
        blocks: of the language model.
        embeddings: float[B, N, D].
        text: prompts whose branches read the prefix and themselves.
        last_alone: give no states but that of each branch's last token.

    Returns:
        The prompts. States that are not computed are 0, and those of padding anything.
    """
    # The tokens that are computed, and what all blocks share
    operations = operations_on(embeddings.device)
    packed_shape = text.input_ids.shape
    layout = _Layout.of(text)
    x = _at(layout.packed_places, embeddings.flatten(0, 1))  # [M, D]
    angles = blocks.angles(_at(layout.packed_places, text.position_ids.flatten()))
    bias = layout.hiding_bias(blocks.dtype)  # [L, Lp + L]
    caches = []
    update = None
    with torch.autocast("cpu", enabled=False):
        for index, block in enumerate(blocks.blocks):
            # Queries, keys and values, all of one dtype; the cache keeps those of all tokens.
            projections = block.project(x, update, blocks.dtype, operations)
            query, key, value = rotate(
                projections, angles, block.head_norms, blocks.num_key_heads, blocks.head_dim
            )
            query = query.to(value.dtype)
            key = key.to(value.dtype)
            packed_key = _at(layout.packed_tokens, key)  # [B, N, Hk, Dh]
            packed_value = _at(layout.packed_tokens, value)
            caches.append(PrefillCache(packed_key.transpose(1, 2), packed_value.transpose(1, 2)))

            # Attention and MLP
            is_short = last_alone and index == len(blocks.blocks) - 1
            if is_short:
                attended = _attend_last(query, key, value, layout, bias, blocks.scaling)
                x = _at(layout.last_tokens, x)  # [R, D]
            else:
                attended = _attend(query, key, value, layout, bias, blocks.scaling)
            update = block.output(attended, operations)
            update = block.run_mlp(x, update, blocks.dtype, operations)

        # The final norm, and states where they were packed
        norm = blocks.final_norm
        states = operations.add_and_normalize(x, update, norm.weight, norm.epsilon, x.dtype)
    if last_alone:
        every_state = states.new_zeros(packed_shape.numel(), states.shape[1])
        every_state[layout.last_places] = states
        return Prefill(text, every_state.unflatten(0, packed_shape), caches)
    return Prefill(text, _at(layout.packed_tokens, states), caches)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, layout: _Layout, bias: Tensor, scaling: float
) -> Tensor:
    """Attention of all tokens.

    Args:
        query: float[M, H, Dh].
        key: float[M, Hk, Dh].
        value: float[M, Hk, Dh].
        layout: of the tokens.
        bias: of `_Layout.hiding_bias`.
        scaling: factor of the scores before the softmax.

    Returns:
        float[M, H, Dh].
    """
    of_prefixes = _attention(
        layout.prefixes(query), layout.prefixes(key), layout.prefixes(value), None, scaling
    )
    of_branches = _attention(
        _at(layout.branch_tokens, query),
        _at(layout.key_tokens, key),
        _at(layout.key_tokens, value),
        bias,
        scaling,
    )
    of_branches = _at(layout.branch_places, of_branches.flatten(0, 1))
    return torch.cat([of_prefixes.flatten(0, 1), of_branches])


def _attend_last(
    query: Tensor, key: Tensor, value: Tensor, layout: _Layout, bias: Tensor, scaling: float
) -> Tensor:
    """Attention of each branch's last token, float[R, H, Dh]; arguments are those of `_attend`."""
    last = _at(layout.last_tokens, query)[:, None]  # [R, 1, H, Dh]
    bias_of_last = bias[layout.lengths - 1][:, None, None]  # [R, 1, 1, Lp + L]
    keys, values = _at(layout.key_tokens, key), _at(layout.key_tokens, value)
    return _attention(last, keys, values, bias_of_last, scaling)[:, 0]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float
) -> Tensor:
    """Attention, float[., n, H, Dh]; causal without a bias.

    Args:
        query: float[., n, H, Dh].
        key: float[., m, Hk, Dh].
        value: float[., m, Hk, Dh].
        bias: float[n, m] or more, what is added to the scores.
        scaling: factor of the scores before the softmax.
    """
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=bias,
        is_causal=bias is None,
        scale=scaling,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return output.transpose(1, 2)
