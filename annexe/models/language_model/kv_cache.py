"""Key and value caches of generation, layer by layer.

The prefill leaves the keys and values of an image's packed sequence in a `PrefillCache`. Decoding
keeps the prefix once for each image and the rest once for each response, in a `SharedPrefixCache`:

    PrefillCache: keys and values [B, Hk, N, Dh]

      image 0  | prefix ............ | analysis 0 | query 1 | query 2 | padding
      image 1  | prefix ............ | analysis 3 | query 4 | padding

    SharedPrefixCache: prefix_keys [B, Hk, Lp, Dh]      own_keys [R, Hk, Lr, Dh]
                                                            column of the next token
      image 0  | prefix ............ | <--+                         v
                                          +-- response 0  | a a a . g g _ _ _ _ |
                                          +-- response 1  | q q . . g g _ _ _ _ |
                                          +-- response 2  | q q q q g g _ _ _ _ |
      image 1  | prefix ............ | <--+
                                          +-- response 3  | a a . . g g _ _ _ _ |
                                          +-- response 4  | q q q . g g _ _ _ _ |

      a, q: prompt of an analysis or a query      g: generated      _: free
            (a query's begins with what it reads of the analysis branch)
      .: unused, because the generated tokens of all responses start in the same column
      `key_mask` is True for a, q and g.

    Where that takes little memory, each response has a copy of its prefix before its own columns,
    and `prefix_keys` is empty (Lp = 0): on a CPU one product over all keys is faster than two.

    DecodeIndex: which response reads which prefix

      row_index [B, max_responses]   0  1  2      image_index    [R]   0 0 0 1 1
                                     3  4 -1      index_in_image [R]   0 1 2 0 1

Legend: B images, N packed tokens, R responses, Lp prefix tokens, Lr columns of a response,
Hk key heads, Dh width of a head, D width of the language model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from annexe.structures.batch import PackedText


@dataclass
class PrefillCache:
    """Rotated keys and values of one layer, as the prefill computes them: float[B, Hk, N, Dh]."""

    keys: Tensor | None = None
    values: Tensor | None = None


@dataclass
class Prefill:
    """Packed prompts and what the language model made of them."""

    text: PackedText
    hidden: Tensor  # float[B, N, D], final hidden states
    prefill_caches: list[PrefillCache]  # one for each layer; decoding empties them

    def keep_prefix(self) -> list[PrefillCache]:
        """Copies of the prefixes' keys and values, for another prefill behind them.

        They have the dtype of the values, as decoding keeps them.
        """
        kept = []
        for cache in self.prefill_caches:
            assert cache.keys is not None and cache.values is not None
            prefix = slice(self.text.prefix_length)
            keys = cache.keys[:, :, prefix].to(cache.values.dtype, copy=True)
            kept.append(PrefillCache(keys, cache.values[:, :, prefix].clone()))
        return kept


@dataclass
class DecodeIndex:
    """Which response reads which prefix, and which columns are filled; the same in all layers.

    Kernels take T new tokens of each response as well, some of them drafted. They lie in T columns
    that follow each other, and attend to no column behind their own.
    """

    image_index: Tensor  # int64[R], whose prefix a response reads
    index_in_image: Tensor  # int64[R], which one it is among the responses of its image
    row_index: Tensor  # int64[B, max_responses], the responses of each image in order; -1 = none
    key_mask: Tensor  # bool[R, Lr], columns that hold a token, the new one included
    column: Tensor  # int64[1], where the new token is written; of T above 1 int64[R * T]


@dataclass
class DraftIndex:
    """Which responses several new tokens belong to, some of them drafted, and where they go.

    It is for a CPU. There are M tokens, up to T of a response, which follow each other.
    """

    image_index: Tensor  # int64[R], as of `DecodeIndex`, as are the next two
    index_in_image: Tensor  # int64[R]
    row_index: Tensor  # int64[B, max_responses]
    row: Tensor  # int64[M], the response of each token
    offset: Tensor  # int64[M], which one of its response's new tokens it is
    column: Tensor  # int64[M], where it is written
    bias: Tensor  # float[R, T, columns], -inf for those that a new token does not attend to, else 0


@dataclass
class PromptColumns:
    """Where the prompts of responses lie in packed sequences; the same in all layers."""

    image_index: Tensor  # int64[R]
    # int64[R, columns], column of each token: of the prefix, if it is copied, and of the prompt
    packed_columns: Tensor

    @classmethod
    def of(
        cls, text: PackedText, branch: Tensor, key_mask: Tensor, first_column: int
    ) -> PromptColumns:
        """Find the prompts.

        Args:
            text: the packed prompts.
            branch: int64[R], the branch of ``text`` that each response continues.
            key_mask: bool[R, Lr], the columns that its prompt fills.
            first_column: columns that come before those of its own prompt.
        """
        prompt_length = text.max_own_length
        image_index = text.branch_image_index[branch]
        offsets = torch.arange(prompt_length, device=branch.device)
        packed_columns = text.branch_start[branch][:, None] + offsets
        if text.context is not None:
            # What queries read between prefix and prompt comes first.
            context_length = text.context_length[branch][:, None]
            context_columns = text.context.start[image_index][:, None] + offsets
            is_context = offsets < context_length
            packed_columns = packed_columns - context_length
            packed_columns = torch.where(is_context, context_columns, packed_columns)

        # Unused columns copy column 0, masked.
        own_part = slice(first_column, first_column + prompt_length)
        packed_columns = torch.where(key_mask[:, own_part], packed_columns, 0)
        if first_column:
            prefix_columns = torch.arange(first_column, device=branch.device)
            prefix_columns = prefix_columns.expand(len(branch), -1)
            packed_columns = torch.cat([prefix_columns, packed_columns], dim=1)
        return cls(image_index, packed_columns)

    def take(self, packed: Tensor) -> Tensor:
        """Keys or values of the tokens.

        Args:
            packed: float[B, Hk, N, Dh].

        Returns:
            float[R, columns, Hk, Dh].
        """
        # Tokens that lie in rows of memory, as a CPU leaves them, are copied faster
        by_token = packed.transpose(1, 2)
        if by_token.is_contiguous():
            places = packed.shape[2] * self.image_index[:, None] + self.packed_columns
            rows = by_token.flatten(0, 1).index_select(0, places.flatten())
            return rows.unflatten(0, places.shape)

        # Two index tensors around a slice put their axes first
        return packed[self.image_index[:, None], :, self.packed_columns]


@dataclass
class SharedPrefixCache:
    """Rotated keys and values of one layer while decoding."""

    prefix_keys: Tensor  # float[B, Hk, Lp, Dh], shared by the responses of an image
    prefix_values: Tensor  # float[B, Hk, Lp, Dh]
    own_keys: Tensor  # float[R, Hk, Lr, Dh], prompt and generated tokens of each response
    own_values: Tensor  # float[R, Hk, Lr, Dh]

    def load_prefill(self, prefill_cache: PrefillCache, prompts: PromptColumns) -> None:
        """Copy prefixes and prompts out of ``prefill_cache``, which is emptied."""
        filled = slice(prompts.packed_columns.shape[1])
        for packed, prefix, own_columns in (
            (prefill_cache.keys, self.prefix_keys, self.own_keys),
            (prefill_cache.values, self.prefix_values, self.own_values),
        ):
            assert packed is not None
            prefix.copy_(packed[:, :, : prefix.shape[2]])
            own_columns[:, :, filled] = prompts.take(packed).transpose(1, 2)

        # Free the packed tensors before the next layer is copied.
        prefill_cache.keys = None
        prefill_cache.values = None

    def load_rows(self, source: SharedPrefixCache, rows: Tensor, num_columns: int) -> None:
        """Copy own keys and values of another cache.

        The prefixes are not copied. Both caches are views of one `CachePool`, where prefixes stay.

        Args:
            source: the other cache.
            rows: int64[R], its rows.
            num_columns: columns of them that are filled.
        """
        columns = slice(num_columns)
        self.own_keys[:, :, columns] = source.own_keys[:, :, columns][rows]
        self.own_values[:, :, columns] = source.own_values[:, :, columns][rows]


@dataclass(frozen=True)
class CacheShape:
    """Sizes of a `SharedPrefixCache`, the same in all layers."""

    num_images: int
    num_responses: int
    num_key_heads: int
    prefix_length: int
    num_columns: int
    head_dim: int

    @classmethod
    def of(cls, keys: Tensor, prefix_length: int, key_mask: Tensor) -> CacheShape:
        """The sizes that prompts and rows ask for.

        Args:
            keys: float[B, Hk, ., Dh], keys or values of all images.
            prefix_length: Lp.
            key_mask: bool[R, Lr].
        """
        num_images, num_key_heads, _, head_dim = keys.shape
        num_responses, num_columns = key_mask.shape
        return cls(num_images, num_responses, num_key_heads, prefix_length, num_columns, head_dim)

    @property
    def tensor_shapes(self) -> list[tuple[int, int, int, int]]:
        """Shapes of the prefix keys, prefix values, own keys and own values."""
        prefix = (self.num_images, self.num_key_heads, self.prefix_length, self.head_dim)
        own_columns = (self.num_responses, self.num_key_heads, self.num_columns, self.head_dim)
        return [prefix, prefix, own_columns, own_columns]


@dataclass
class CachePool:
    """Memory for the caches of all layers, allocated once and used again by every batch that fits.

    A cache is a view of the beginnings of four flat buffers. Caches of one shape therefore lie at
    the same addresses in every batch, so that CUDA graphs can be replayed.
    """

    # For each layer the buffers of prefix keys, prefix values, own keys and own values.
    buffers: list[list[Tensor]] = field(default_factory=list)

    def fits(self, shape: CacheShape) -> bool:
        """Whether caches of this shape fit into the buffers."""
        if not self.buffers:
            return False
        first_layer = zip(self.buffers[0], shape.tensor_shapes, strict=True)
        return all(len(buffer) >= math.prod(sizes) for buffer, sizes in first_layer)

    def allocate(self, shape: CacheShape, templates: list[Tensor]) -> None:
        """Allocate buffers for caches of this shape.

        Args:
            templates: a tensor of each layer, with the dtype and the device that its caches get.
        """
        self.buffers = []
        # Zeros, not empty memory: a masked column has weight 0, and 0 times NaN is NaN.
        for template in templates:
            layer = [template.new_zeros(math.prod(sizes)) for sizes in shape.tensor_shapes]
            self.buffers.append(layer)

    def views(self, shape: CacheShape) -> list[SharedPrefixCache]:
        """A cache for each layer, in the buffers."""
        caches = []
        for layer in self.buffers:
            tensors = []
            for buffer, sizes in zip(layer, shape.tensor_shapes, strict=True):
                tensors.append(buffer[: math.prod(sizes)].view(sizes))
            caches.append(SharedPrefixCache(*tensors))
        return caches

    def release(self) -> None:
        """Give the memory back."""
        self.buffers = []
