"""Greedy decoding of many responses at once: state, one step, and the step as a CUDA graph.

The images' prefixes are kept once; what is said about an image is a row each. A step is the same sequence of kernels
whatever the tokens, so that a GPU can replay it; the host looks at the rows now and then and drops those that are done.

Legend: R responses, S placeholders, D width, V words, M columns of a response, T tokens at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce
from torch.distributed.fsdp import FSDPModule

from annexe.models.language_model.constraints import DecodingConstraints
from annexe.models.language_model.kv_cache import DecodeIndex, Memory, Prefill, PrefillCache
from annexe.models.language_model.llama import Llama
from annexe.structures.batch import PackedText, round_up

# With CUDA graphs sizes are rounded up to multiples of these, so that batches have few different shapes.
_ROWS, _COLUMNS, _PLACES = 16, 32, 16
_MOST_GRAPHS = 64


@dataclass
class Responses:
    """What was generated."""

    tokens: list[list[int]]  # R rows, end of sequence left out
    slot_states: Tensor  # float[R, S, D], states of the placeholders, 0 where a slot is not named


@dataclass
class Rows:
    """Responses on their way, a row of every tensor each."""

    number: Tensor  # int64[R], which of all responses
    image: Tensor  # int64[R]
    place: Tensor  # int64[R], among those of its image
    position: Tensor  # int64[R], of the next token
    seen: Tensor  # bool[R, M], columns that hold a token
    state: Tensor  # float[R, D], of the last token
    left: Tensor  # bool[R, S], slots still to be named
    finished: Tensor  # bool[R]
    tokens: Tensor  # int64[R, T]
    slot_states: Tensor  # float[R, S, D]

    def select(self, chosen: Tensor) -> Rows:
        """The ``chosen`` rows, int64[.]; where an index is -1, a row that is done, in a place that no real row has."""
        real = chosen >= 0
        rows = Rows(**{f.name: getattr(self, f.name)[chosen.clamp(min=0)] for f in fields(self)})
        rows.number.masked_fill_(~real, -1)
        rows.image.masked_fill_(~real, 0)
        rows.place = torch.where(real, rows.place, rows.place.masked_fill(~real, -1).max() + 1)
        rows.seen &= real[:, None]
        rows.finished |= ~real
        return rows


class Decoding:
    """Some rows and the memory they read; a step says one token of each, and `advance` goes on to the next.

    Until `load` says where the rows stand, steps write where the last token of all would go, which nothing reads: so
    a graph may be captured beside rows that are on their way.

    Args:
        llama: the language model.
        rows: changed in place.
        memories: of every layer; their tensors for responses are changed in place.
        most: rows of the image that has most.
        binding: as of `GreedyDecoder.decode`; its tensors are not looked at.
    """

    def __init__(
        self,
        llama: Llama,
        rows: Rows,
        memories: list[Memory],
        most: int,
        binding: DecodingConstraints | None,
    ) -> None:
        self.llama, self.rows, self.memories = llama, rows, memories
        device, tokenizer = rows.number.device, llama.tokenizer
        self.row = rows.number.new_full((len(memories[0].prefix_keys), most), -1)  # as in `Places`
        self.column, self.said = (  # of the new token
            torch.tensor([table.shape[1] - 1], device=device) for table in (rows.seen, rows.tokens)
        )
        words = tokenizer.vocab_size + tokenizer.num_slots
        self.slot_ids = torch.arange(tokenizer.vocab_size, words, device=device)
        self.bound = binding is not None and binding.slots is not None
        self.ends, self.refusals = (
            torch.zeros(words, dtype=torch.bool, device=device) for _ in range(2)
        )
        self.ends[[tokenizer.eos_id, tokenizer.full_stop_id]] = True
        if self.bound:
            self.refusals[list(binding.refusals)] = True

    def load(self, rows: Rows, column: int, said: int) -> None:
        """Go on with other ``rows`` of the same shapes, whose next token goes to ``column``, as number ``said``."""
        for field in fields(rows):
            getattr(self.rows, field.name).copy_(getattr(rows, field.name))
        self.row.fill_(-1)
        self.row[rows.image, rows.place] = torch.arange(len(rows.number), device=self.row.device)
        self.column.fill_(column)
        self.said.fill_(said)

    @torch.no_grad()
    def step(self) -> None:
        """Generate one token of every response; repeated before `advance`, it generates the same one."""
        rows, llama = self.rows, self.llama
        logits = llama.logits(rows.state)  # [R, V + S]
        if self.bound:
            logits = self._bound(logits)
        token = logits.argmax(-1).masked_fill(rows.finished, llama.tokenizer.eos_id)  # [R]
        rows.tokens.index_copy_(1, self.said, token[:, None])
        named = token[:, None] == self.slot_ids  # [R, S]
        rows.finished |= token == llama.tokenizer.eos_id
        if self.bound:
            rows.left &= ~named
            rows.finished |= named.any(1) & ~rows.left.any(
                1
            )  # the last placeholder ends the sentence
        rows.seen.index_fill_(1, self.column, True)
        places = DecodeIndex(rows.image, rows.place, self.row, rows.seen, self.column)
        given = [{"memory": memory, "places": places} for memory in self.memories]
        state = llama.run(llama.embed(token[:, None]), rows.position[:, None], given)[
            :, -1
        ]  # [R, D]
        rows.state.copy_(state)
        rows.slot_states.copy_(torch.where(named[..., None], state[:, None], rows.slot_states))

    def advance(self) -> None:
        """The token that was said is there; the next goes behind it."""
        for counter in (self.rows.position, self.column, self.said):
            counter += 1

    def _bound(self, logits: Tensor) -> Tensor:
        """``logits`` without what would contradict the slots left: they are named in order, then all is said."""
        left = self.rows.left
        due = left & (left.cumsum(1) == 1)  # the next slot of a row
        barred = self.ends | (self.refusals & (self.said == 0))  # [V + S], while a slot is owed
        barred = left.any(1, keepdim=True) & barred
        barred[:, self.slot_ids] = ~due
        return logits.masked_fill(barred, -torch.inf)


class GreedyDecoder:
    """Decodes for a language model; what it needs for that stays from batch to batch until `release`."""

    def __init__(self, llama: Llama) -> None:
        self.llama = llama
        self.graphs = False  # replay steps as CUDA graphs
        self.release()

    def release(self) -> None:
        """Give back the memory for keys and values, and the graphs that read it."""
        self._cache_pool: list[
            list[Tensor]
        ] = []  # of every layer: prefix keys and values, own keys and values, all flat
        self._captured: dict[tuple, tuple[Decoding, torch.cuda.CUDAGraph]] = {}

    def decode(
        self, prefill: Prefill, max_new_tokens: int, binding: DecodingConstraints | None = None
    ) -> Responses:
        """Greedy responses to every branch, all branches as one batch; what ``prefill`` kept is used up.

        Args:
            binding: what responses have to name, where that is settled.
        """
        rows = self._first_rows(prefill, max_new_tokens, binding)
        tokens: list[list[int]] = [[] for _ in rows.number]
        slot_states = torch.zeros_like(rows.slot_states)

        def collect(rows: Rows) -> None:
            for number, row in zip(rows.number.tolist(), rows.tokens.tolist(), strict=True):
                if number >= 0:
                    eos = self.llama.tokenizer.eos_id
                    tokens[number] = row[: row.index(eos)] if eos in row else row
            real = rows.number >= 0
            slot_states[rows.number[real]] = rows.slot_states[real]

        sharded = isinstance(
            self.llama.llama.model.layers[0], FSDPModule
        )  # then all ranks take part in every step
        at_once = (
            8 if rows.number.is_cuda else 1
        )  # steps between two looks at the rows, each of which waits for them
        said, going, decoding, step = 0, len(rows.number), None, None
        while said < max_new_tokens:
            if not sharded:
                going = int((~rows.finished).sum())
                if going == 0:
                    break
            if decoding is None or 2 * self._rounded(going) <= len(rows.number):
                collect(rows)
                chosen = (rows.number >= 0 if sharded else ~rows.finished).nonzero()[:, 0]
                decoding, step = self._start(prefill, rows, chosen, said, decoding, binding)
                rows = decoding.rows
            number = min(at_once, max_new_tokens - said)
            for _ in range(number):
                step()
                decoding.advance()
            said += number
            if sharded and self._all(rows.finished):
                break
        collect(rows)
        return Responses(tokens, slot_states)

    def _rounded(self, rows: int) -> int:
        return round_up(rows, _ROWS) if self.graphs else rows

    def _first_rows(
        self, prefill: Prefill, max_new_tokens: int, binding: DecodingConstraints | None
    ) -> Rows:
        """A row for every branch, at the end of its prompt."""
        text, tokenizer = prefill.text, self.llama.tokenizer
        image, length = text.branch_image_index, text.branch_length
        number = torch.arange(len(image), device=image.device)
        before = torch.bincount(image, minlength=len(prefill.hidden)).cumsum(
            0
        )  # rows up to and with an image's
        first = torch.cat([before.new_zeros(1), before[:-1]])
        columns = text.max_branch_length + max_new_tokens
        columns = torch.arange(
            round_up(columns, _COLUMNS) if self.graphs else columns, device=image.device
        )
        state = prefill.hidden[image, text.branch_start + length - 1]  # [R, D]
        silent = torch.zeros_like(image, dtype=torch.bool)
        left = silent[:, None].repeat(1, tokenizer.num_slots)
        return Rows(
            number=number,
            image=image,
            place=number - first[image],
            position=text.prefix_length + length,
            seen=columns < length[:, None],
            state=state,
            left=left if binding is None or binding.slots is None else binding.slots.clone(),
            finished=silent if binding is None else binding.silent.clone(),
            tokens=torch.full((len(image), max_new_tokens), tokenizer.eos_id, device=image.device),
            slot_states=state.new_zeros(len(state), tokenizer.num_slots, state.shape[-1]),
        )

    def _start(
        self,
        prefill: Prefill,
        rows: Rows,
        chosen: Tensor,
        said: int,
        before: Decoding | None,
        binding: DecodingConstraints | None,
    ) -> tuple[Decoding, Callable[[], None]]:
        """A decoding of the ``chosen`` rows alone, and what takes it one step further.

        Args:
            said: tokens of the response that are there.
            before: the decoding that the rows come from; without one they come from ``prefill``.
        """
        spare = chosen.new_full((self._rounded(len(chosen)) - len(chosen),), -1)
        chosen = torch.cat([chosen, spare])
        rows = rows.select(chosen)
        most, column = int(rows.place.max()) + 1, prefill.text.max_branch_length + said
        # Under autocast keys are float32, of their rotation; values have the dtype that products are made in.
        source = (
            [kept.values for kept in prefill.kept]
            if before is None
            else [m.prefix_keys for m in before.memories]
        )
        memories = self._memories(source, prefill.text.prefix_length, rows)
        if self.graphs:
            decoding, step = self._graphed(rows, memories, round_up(most, _PLACES), binding)
        else:
            decoding = Decoding(self.llama, rows, memories, most, binding)
            step = decoding.step
        for layer, memory in enumerate(decoding.memories):
            if before is None:
                self._recall(prefill.kept[layer], prefill.text, rows, memory)
            else:
                old = before.memories[layer]
                memory.own_keys.copy_(old.own_keys[chosen.clamp(min=0)])
                memory.own_values.copy_(old.own_values[chosen.clamp(min=0)])
        decoding.load(rows, column, said)
        return decoding, step

    def _memories(self, like: list[Tensor], prefix_length: int, rows: Rows) -> list[Memory]:
        """Room for the keys and values of every layer: ``like`` float[B, K, ., D] says how many images and of what."""
        images, heads, _, width = like[0].shape
        prefix, own = (
            (images, heads, prefix_length, width),
            (*rows.seen.shape[:1], heads, rows.seen.shape[1], width),
        )
        needed = [math.prod(shape) for shape in (prefix, prefix, own, own)]
        if not self._cache_pool or any(
            n > len(flat) for n, flat in zip(needed, self._cache_pool[0], strict=True)
        ):
            self.release()
            # Not empty: what is not seen has weight 0, and 0 times what is no number is none either.
            self._cache_pool = [[layer.new_zeros(number) for number in needed] for layer in like]
        return [
            Memory(
                *(
                    flat[:n].view(shape)
                    for flat, n, shape in zip(room, needed, (prefix, prefix, own, own), strict=True)
                )
            )
            for room in self._cache_pool
        ]

    def _recall(self, kept: PrefillCache, text: PackedText, rows: Rows, memory: Memory) -> None:
        """Bring what a packed sequence kept into ``memory``; it is dropped there."""
        branch = rows.number.clamp(min=0)
        offsets = torch.arange(text.max_branch_length, device=branch.device)
        columns = torch.where(
            rows.seen[:, : len(offsets)], text.branch_start[branch][:, None] + offsets, 0
        )  # [R, L]
        image = text.branch_image_index[branch][:, None]
        memory.prefix_keys.copy_(kept.keys[:, :, : text.prefix_length])
        memory.prefix_values.copy_(kept.values[:, :, : text.prefix_length])
        memory.own_keys[:, :, : len(offsets)] = kept.keys[image, :, columns].transpose(1, 2)
        memory.own_values[:, :, : len(offsets)] = kept.values[image, :, columns].transpose(1, 2)
        kept.keys = kept.values = None

    def _graphed(
        self, rows: Rows, memories: list[Memory], most: int, binding: DecodingConstraints | None
    ) -> tuple[Decoding, Callable[[], None]]:
        """A decoding whose step is a CUDA graph, captured where there is none of this shape yet."""
        refusals = None if binding is None or binding.slots is None else binding.refusals
        key = (len(memories[0].prefix_keys), *rows.seen.shape, rows.tokens.shape[1], most, refusals)
        if key not in self._captured:
            if len(self._captured) == _MOST_GRAPHS:
                del self._captured[next(iter(self._captured))]  # the oldest
            decoding = Decoding(
                self.llama,
                rows.select(torch.arange(len(rows.number), device=rows.number.device)),
                memories,
                most,
                binding,
            )
            self._captured[key] = decoding, capture(decoding.step)
        decoding, graph = self._captured[key]
        return decoding, graph.replay

    def _all(self, finished: Tensor) -> bool:
        """Whether every row is finished on every rank, for all have to take the same number of steps."""
        done = finished.all().to(torch.uint8)
        all_reduce(done, ReduceOp.MIN)
        return bool(done)


def capture(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``step``, which is run twice before."""
    # Casts of weights that autocast keeps for its block alone would be gone when the graph is replayed behind it.
    kind, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    with torch.autocast("cuda", dtype=kind, enabled=enabled, cache_enabled=False):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    return graph
