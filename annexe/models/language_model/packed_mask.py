"""Which tokens of packed sequences attend to which.

A row of a packed batch holds an image's prefix and, behind it, one branch for its analysis and one
for each query. A token attends to the prefix and, causally, to its own branch, as if no other
branch were there:

    tokens       | prefix: template, image | analysis | query 1 | query 2 | padding |
    segment_ids  | 0  0  0  0  0  0  0  0  | 1  1  1  | 2  2  2 | 3  3  3 | -1  -1  |

    queries     keys: prefix    analysis   query 1   query 2   padding
    prefix            causal       .          .         .         .
    analysis           all       causal       .         .         .
    query 1            all         .        causal      .         .
    query 2            all         .          .       causal      .
    padding            all         .          .         .       causal

    all: every key      causal: keys up to the query itself      .: no key

Where queries read the analysis, or descriptor tokens in it, they attend to all of those as well.
Drawn responses that share a prompt lie behind it, and all of them attend to it.

All of this is said by one number for each key: the column behind the last token that attends to it
(``reach``). A query attends to the keys up to itself that reach it. Where padding is left out
("unpad"), one row holds the sequences of all images, one behind the other, and no token reaches
beyond its own image.

Legend: B images (or rows), N packed tokens, C tokens that attend.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens of the tiles that a program of the kernels for a GPU holds, and of those that it visits
HELD = 64
VISITED = 32


def packed_attention_mask(reach: Tensor, columns: Tensor | None = None) -> Tensor:
    """Dense mask of packed sequences: the prefix for all, and causally a token's own branch.

    Args:
        reach: int[B, N], the column behind the last token that attends to each one. It lies behind
            the token itself, so that no row of the mask is empty.
        columns: int64[C], the tokens that attend, in order; the others are keys alone. None = all.

    Returns:
        bool[B, 1, C, N], True = attends. Only ``sdpa`` takes a boolean mask; ``eager`` would add it
        as 1.
    """
    keys = torch.arange(reach.shape[1], device=reach.device)
    queries = keys if columns is None else columns
    return ((keys <= queries[:, None]) & (queries[:, None] < reach[:, None]))[:, None]


@dataclass(frozen=True)
class PackedTiles:
    """`packed_attention_mask` for the kernels of a GPU, which skip what no query attends to.

    They go through queries and keys in tiles, of which they hold one and visit others
    (`annexe.models.language_model.packed_kernels`).

    Attributes:
        reach: int32[B, N], as of `packed_attention_mask`.
        columns: int32[C], the tokens that attend.
        num_visits: int32[B, query tiles], how many key tiles each one of `HELD` queries visits.
        visits: int32[B, query tiles, key tiles], these, of `VISITED` keys each; of a list only the
            first `num_visits` count.
        first_visit: int32[B, key tiles], the first tile of `VISITED` queries that each tile of
            `HELD` keys visits.
        end_visit: int32[B, key tiles], the tile behind the last one.
    """

    reach: Tensor
    columns: Tensor
    num_visits: Tensor
    visits: Tensor
    first_visit: Tensor
    end_visit: Tensor


def packed_tiles(reach: Tensor, columns: Tensor | None = None) -> PackedTiles:
    """The mask of packed sequences for the kernels of a GPU.

    For a tile of queries only the key tiles up to the diagonal that reach it are visited. The
    others, of other images and of branches before its own, are skipped.

    Args:
        reach: int[B, N], as of `packed_attention_mask`.
        columns: as of `packed_attention_mask`.
    """
    if columns is None:
        columns = torch.arange(reach.shape[1], device=reach.device)

    # List the key tiles that a tile of queries visits.
    is_visited = _needed_tiles(reach, columns, HELD, VISITED)
    visits = (~is_visited).byte().argsort(dim=-1, stable=True)

    # Those of queries that a tile of keys visits lie one behind the other.
    is_visitor = _needed_tiles(reach, columns, VISITED, HELD)
    first_visit = is_visitor.byte().argmax(1)
    return PackedTiles(
        reach.int().contiguous(),
        columns.int(),
        is_visited.sum(-1, dtype=torch.int32),
        visits.int(),
        first_visit.int(),
        (first_visit + is_visitor.sum(1)).int(),
    )


def _needed_tiles(reach: Tensor, columns: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """Where a query may attend to a key, by tiles: bool[B, query tiles, key tiles].

    Args:
        reach: as of `packed_tiles`, as is ``columns``.
        num_queries: queries of a tile.
        num_keys: keys of a tile.
    """
    # The first and the last query of each tile
    first = columns[::num_queries, None]  # [query tiles, 1]
    last = torch.cat([columns[num_queries - 1 :: num_queries], columns[-1:]])[: len(first), None]

    # How far the keys of each tile reach
    num_tiles = -(-reach.shape[1] // num_keys)
    num_unused = num_tiles * num_keys - reach.shape[1]
    reach_of_tile = F.pad(reach, (0, num_unused)).unflatten(1, (-1, num_keys)).amax(-1)
    first_key = num_keys * torch.arange(num_tiles, device=reach.device)
    return (reach_of_tile[:, None] > first) & (first_key <= last)
