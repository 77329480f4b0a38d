"""Mask logits to COCO run lengths of the image's size.

A GPU encodes masks where they are, so that the host gets strings and no pixels.

Legend: n masks, H x W pixels, h x w mask logits, E runs of all masks.
"""

from __future__ import annotations

import math
from itertools import islice, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from annexe.prompts import phrases_of
from annexe.rle import Rle, encode, is_empty
from annexe.structures.prediction import RawResponse, Response, Target

# Pixels at full size that a GPU encodes at a time, to bound the memory that it takes
_PIXELS_AT_ONCE = 1 << 27


def postprocess(raw: RawResponse) -> Response:
    """Bring masks to the size of the image and encode them, unless a GPU has done so."""
    if not isinstance(raw.masks, Tensor):
        rles = raw.masks
    elif raw.slots:
        rles = [encode(mask) for mask in at_full_size(raw.masks, raw.size).numpy()]
    else:
        rles = []

    # A mask without a pixel is no target
    phrases = phrases_of(raw.answer)
    targets = []
    for slot, rle in zip(raw.slots, rles, strict=True):
        if not is_empty(rle):
            targets.append(Target(slot, phrases.get(slot, ""), raw.scores[slot], rle))
    return Response(raw.answer, raw.scores[0], targets)


def split_by_query(
    logits: Tensor, counts: list[int], sizes: list[tuple[int, int]]
) -> list[Tensor] | list[list[Rle]]:
    """The masks of every query: logits on a CPU, and encoded at full size on a GPU.

    Args:
        logits: float32[n, h, w], the masks of all queries.
        counts: masks of each query.
        sizes: height and width of each query's image.

    Returns:
        One item a query, as `RawResponse` takes it.
    """
    if not logits.is_cuda:
        return list(logits.split(counts))
    size_of_mask: list[tuple[int, int]] = []
    for size, count in zip(sizes, counts, strict=True):
        size_of_mask += [size] * count
    rles = iter(encode_on_device(logits, size_of_mask))
    return [list(islice(rles, count)) for count in counts]


def at_full_size(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks bool[n, *size] of ``logits`` float32[n, h, w]."""
    return F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0] > 0


def encode_on_device(logits: Tensor, sizes: list[tuple[int, int]]) -> list[Rle]:
    """Bring every mask to its own size and encode it on the device where it is.

    Args:
        logits: float32[n, h, w].
        sizes: height and width of each mask.
    """
    rles: dict[int, Rle] = {}
    for size in set(sizes):
        same_size = torch.tensor([index for index, other in enumerate(sizes) if other == size])
        for chunk in same_size.split(max(1, _PIXELS_AT_ONCE // math.prod(size))):
            columns = at_full_size(logits[chunk.to(logits.device)].mT, size[::-1])
            rles.update(zip(chunk.tolist(), encode_columns(columns), strict=True))
    return [rles[index] for index in range(len(sizes))]


def encode_columns(masks: Tensor) -> list[Rle]:
    """As `annexe.rle.encode` of each mask, on the device where they are.

    Args:
        masks: bool[n, W, H]; the rows of each are the columns of a mask, down which COCO counts.
    """
    num_masks, width, height = masks.shape

    # Where runs end. COCO's first run is of what is not set, and may be empty
    pixels = masks.flatten(1)
    ends = pixels.new_ones(num_masks, height * width + 1)
    ends[:, 0] = pixels[:, 0]
    torch.ne(pixels[:, 1:], pixels[:, :-1], out=ends[:, 1:-1])

    # Lengths of runs
    mask, end = ends.nonzero(as_tuple=True)  # [E]
    num_runs = ends.sum(1)  # [n]
    first = num_runs.cumsum(0) - num_runs
    index = torch.arange(len(mask), device=mask.device) - first[mask]  # of a run in its mask
    length = torch.where(index > 0, end - end.roll(1), end)

    # From the fourth on, each is written as the difference to the one two before, in 5-bit groups,
    # low ones first; bit 5 says that more follow, bit 4 of the last is its sign
    rest = torch.where(index > 2, length - length.roll(2), length)
    groups = []
    written = [torch.ones_like(rest, dtype=torch.bool)]
    for _ in range((height * width).bit_length() // 5 + 1):
        low = rest & 31
        rest = rest >> 5
        more = rest != -(low >> 4)
        groups.append((low + 32 * more + 48).to(torch.uint8))
        written.append(written[-1] & more)
    is_written = torch.stack(written[:-1], dim=1)  # [E, groups]

    # One text for all masks, cut where each of them ends
    text = torch.stack(groups, dim=1)[is_written].cpu().numpy().tobytes().decode("ascii")
    stops = torch.zeros_like(num_runs).index_add(0, mask, is_written.sum(1)).cumsum(0).tolist()
    rles: list[Rle] = []
    for start, stop in pairwise([0, *stops]):
        rles.append({"size": [height, width], "counts": text[start:stop]})
    return rles
