"""Masks as COCO run lengths, made where the masks are: a GPU gives strings to the host, not pixels.

Legend: n masks, H x W pixels, E runs of all masks.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from annexe.prompts import phrases_of
from annexe.rle import Rle, encode, is_empty
from annexe.structures.prediction import RawResponse, Response, Target

_PIXELS_AT_ONCE = 1 << 27


def at_full_size(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks bool[n, *size] of ``logits`` float32[n, h, w]."""
    return F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0] > 0


def encoded(logits: Tensor, sizes: list[tuple[int, int]]) -> list[Rle]:
    """Masks of ``logits`` float32[n, h, w], each brought to its own size and encoded on their device."""
    found: dict[int, Rle] = {}
    for size in set(sizes):
        own = torch.tensor([number for number, other in enumerate(sizes) if other == size])
        for some in own.split(max(1, _PIXELS_AT_ONCE // math.prod(size))):
            columns = at_full_size(logits[some.to(logits.device)].mT, size[::-1])
            found.update(zip(some.tolist(), encode_columns(columns), strict=True))
    return [found[number] for number in range(len(sizes))]


def encode_columns(masks: Tensor) -> list[Rle]:
    """As `annexe.metrics.encode` of each mask, whose columns are the rows of ``masks`` bool[n, W, H]."""
    number, width, height = masks.shape
    down = masks.flatten(1)  # COCO counts down the columns, and first what is not set
    ends = down.new_ones(number, height * width + 1)
    ends[:, 0] = down[:, 0]
    torch.ne(down[:, 1:], down[:, :-1], out=ends[:, 1:-1])
    mask, end = ends.nonzero(as_tuple=True)  # [E]
    runs = ends.sum(1)  # [n]
    place = torch.arange(len(mask), device=mask.device) - (runs.cumsum(0) - runs)[mask]
    count = torch.where(place > 0, end - end.roll(1), end)
    # From the fourth on, each is written as the difference to the one two places before, in 5-bit groups, low ones
    # first; bit 5 says that more follow, bit 4 of the last is its sign.
    rest = torch.where(place > 2, count - count.roll(2), count)
    groups, written = [], [torch.ones_like(rest, dtype=torch.bool)]
    for _ in range((height * width).bit_length() // 5 + 1):
        low, rest = rest & 31, rest >> 5
        more = rest != -(low >> 4)
        groups.append((low + 32 * more + 48).to(torch.uint8))
        written.append(written[-1] & more)
    is_written = torch.stack(written[:-1], dim=1)  # [E, groups]
    text = torch.stack(groups, dim=1)[is_written].cpu().numpy().tobytes().decode("ascii")
    stops = torch.zeros_like(runs).index_add(0, mask, is_written.sum(1)).cumsum(0).tolist()
    return [
        {"size": [height, width], "counts": text[start:stop]}
        for start, stop in pairwise([0, *stops])
    ]


def postprocess(raw: RawResponse) -> Response:
    """Bring the masks to the size of the image and encode them, if a GPU has not."""
    rles = raw.masks
    if isinstance(rles, Tensor):
        rles = []
        if raw.slots:
            rles = [encode(mask) for mask in at_full_size(raw.masks, raw.size).numpy()]

    # A mask without a pixel is no target
    phrases = phrases_of(raw.answer)
    targets = []
    for slot, rle in zip(raw.slots, rles, strict=True):
        if not is_empty(rle):
            targets.append(Target(slot, phrases.get(slot, ""), raw.scores[slot], rle))
    return Response(raw.analysis, raw.answer, raw.scores[0], targets, raw.depth)
