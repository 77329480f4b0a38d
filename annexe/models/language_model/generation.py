"""Greedy decoding of many responses at once, with steps that a GPU can replay as CUDA graphs.

All branches of all images are decoded together, each as a row of `DecodingState`; the prefix of an
image is kept once (`annexe.models.language_model.kv_cache`). A step is the same sequence of kernels
whatever the tokens are, so that a graph of it can be replayed. The host looks at the rows after
every step, stops once all are finished, and drops the finished ones when they are at least half. It
sees the rows as they were a step before, so that a GPU has the next step while the host looks.
Where it has to see what the last step did, a GPU takes several steps between two looks.

    round        1        2        3
    row 0     w w w w  w w .           .: finished          w: a token
    row 1     w w .
    row 2     w w w w  w w w w  w w w w
    row 3     w .
    rows         4        2        1   kept after the finished ones were dropped

A step may also generate several tokens of a row: those that were drafted and turn out to be what
the model says (`annexe.models.language_model.drafts`).

Legend: R rows (responses), K slots, D width, Lr columns of a response.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce
from torch.distributed.fsdp import FSDPModule

from annexe.models.language_model.causal_lm import CausalLM
from annexe.models.language_model.constraints import DecodingConstraints
from annexe.models.language_model.decode_blocks import DecodingBlocks, can_join_products
from annexe.models.language_model.decode_steps import (
    DecodeStep,
    DecodingState,
    DraftingStep,
    VerifyingStep,
)
from annexe.models.language_model.drafts import DeviceDraftTable, DraftTable
from annexe.models.language_model.kv_cache import (
    CachePool,
    CacheShape,
    Prefill,
    PromptColumns,
    SharedPrefixCache,
)
from annexe.models.language_model.prompt_reading import read_prompts
from annexe.models.language_model.sampling import Sampler
from annexe.structures.batch import PackedText, round_up

# With CUDA graphs sizes are rounded up to these multiples, so that few graphs serve all batches.
_ROW_MULTIPLE = 16
_COLUMN_MULTIPLE = 32
_RESPONSE_MULTIPLE = 16  # new tokens of the responses of one image
# Rows, in place of that many, where each has several tokens in a step.
_ROW_MULTIPLE_OF_DRAFTS = 8
# Tokens of a step on a GPU, above which fewer are drafted: about as many as take little longer than
# the weights are read.
_MAX_STEP_TOKENS = 320
# Graphs that are kept; beyond that the oldest one goes.
_MAX_GRAPHS = 64
# Steps on a GPU between two looks that have to see the last of them, and so wait for it.
_STEPS_PER_WAIT = 8
# Bytes that copies of the prefixes, one for each response, may take on a CPU.
_MAX_PREFIX_COPIES = 2**28


TokenListener = Callable[[int, list[int]], None]
"""Is told which response it is about, and its tokens so far."""


@dataclass
class Responses:
    """Generated responses, in the order of the branches of the prompts."""

    tokens: list[list[int]]  # of each response, without end of sequence
    slot_states: Tensor  # float[R, K, D], hidden states of the placeholders, 0 = not named

    def collect(self, state: DecodingState, end_ids: tuple[int, ...]) -> None:
        """Take over the rows of ``state`` as they are now; padding rows are skipped."""
        # Cut the tokens at the first that ends a response.
        response_indices = state.response_index.tolist()
        for index, row in zip(response_indices, state.tokens.tolist(), strict=True):
            if index >= 0:
                is_end = (column for column, token in enumerate(row) if token in end_ids)
                self.tokens[index] = row[: next(is_end, len(row))]

        # Copy the states of the placeholders.
        is_real = state.response_index >= 0
        self.slot_states[state.response_index[is_real]] = state.slot_states[is_real]


class LateCount:
    """Rows that are not finished, as they were one step before.

    Args:
        num_running: how many there are before the first step.
    """

    def __init__(self, num_running: int) -> None:
        self.num_running = num_running
        self.on_the_way: list[tuple[Tensor, torch.cuda.Event]] = []

    def note(self, finished: Tensor) -> None:
        """Count behind the step that was launched last, without waiting; bool[R]."""
        count = (~finished).sum().to("cpu", non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.on_the_way.append((count, event))

    def read(self) -> int:
        """The rows after the step before the last, or before the first."""
        if len(self.on_the_way) > 1:
            count, event = self.on_the_way.pop(0)
            event.synchronize()
            self.num_running = int(count)
        return self.num_running


class GreedyDecoder:
    """Decodes for a language model.

    Caches and graphs stay from batch to batch, until `release`.

    Args:
        language_model: predicts the tokens.
    """

    def __init__(self, language_model: CausalLM) -> None:
        self.language_model = language_model
        self.graphs = False  # replay steps as CUDA graphs
        self.temperature: float | None = None  # of what is being decoded
        self.blocks: DecodingBlocks | None = None  # of their own, see `join_products`
        self.drafts: DraftTable | None = None  # see `draft`
        self.num_steps = 0  # of what was decoded last
        self.cache_pool = CachePool()
        self.captured_steps: dict[tuple, DecodeStep] = {}

    def join_products(
        self, autocast_dtype: torch.dtype | None = None, *, float8: bool = False
    ) -> bool:
        """Make steps faster by joint products, for a model whose weights stay as they are now.

        On a CPU prompts are read with them as well, but not in float8.

        Args:
            autocast_dtype: of the products; None = that of the weights.
            float8: keep weights in float8.

        Returns:
            Whether the model can be run like that (`can_join_products`).

        Raises:
            UserError: for a GPU without float8.
        """
        if self._is_sharded or not can_join_products(self.language_model):
            return False
        self.release()
        self.blocks = DecodingBlocks(self.language_model, autocast_dtype, float8=float8)
        reads_prompts = self._is_on_cpu and not float8
        reader = partial(read_prompts, self.blocks) if reads_prompts else None
        self.language_model.prompt_reader = reader
        return True

    def draft(self, max_tokens: int) -> bool:
        """Make steps fewer by drafted tokens, which are learned from what is decoded.

        Responses stay the same but for two tokens whose logits differ by rounding alone. The states
        of placeholders may differ by rounding, too.

        Args:
            max_tokens: tokens of a draft at most; 0 = none.

        Returns:
            Whether that can be done: with joint products, on a CPU in float32 alone.
        """
        self.drafts = None
        if self.blocks is None or max_tokens == 0:
            return False
        if not self._is_on_cpu:
            self.release()  # graphs read the table
            tokenizer = self.language_model.tokenizer
            num_words = tokenizer.vocab_size + tokenizer.num_slots
            device = self.language_model.mask_head.weight.device
            self.drafts = DeviceDraftTable(max_tokens, num_words, device)
        elif self.blocks.dtype == torch.float32:
            self.drafts = DraftTable(max_tokens)
        return self.drafts is not None

    def release(self) -> None:
        """Give back the memory for keys and values, and the graphs that read it."""
        self.cache_pool.release()
        self.captured_steps = {}

    def decode(
        self,
        prefill: Prefill,
        max_new_tokens: int,
        constraints: DecodingConstraints | None = None,
        on_tokens: TokenListener | None = None,
        sampler: Sampler | None = None,
    ) -> Responses:
        """Decode a response to every branch of the prompts, all of them as one batch.

        Args:
            prefill: the prompts; its caches are emptied.
            max_new_tokens: tokens of a response at most.
            constraints: what the responses have to name, where that is known.
            on_tokens: is told how the responses grow, at every look at the rows.
            sampler: draws the tokens; without one the most likely ones are taken.

        Returns:
            A response for every branch.
        """
        # Start rows: one for every branch, at the end of its prompt.
        end_ids = self.language_model.end_ids
        state = self.start_rows(prefill, max_new_tokens, constraints)
        self.temperature = None
        if sampler is not None:
            self.temperature = sampler.temperature
            state.seeds = sampler.seeds
        responses = Responses([[] for _ in range(len(state))], torch.zeros_like(state.slot_states))
        drafts = self.drafts if sampler is None else None

        # Look after every step; on a GPU less often where a look waits for it.
        looks_late = self._looks_late(prefill, on_tokens)
        late_count: LateCount | None = None
        steps_per_look = 1
        if prefill.hidden.is_cuda and not looks_late:
            steps_per_look = _STEPS_PER_WAIT
        step: DecodeStep | DraftingStep | None = None
        num_taken = 0

        while num_taken < max_new_tokens:
            # Stop?
            num_running = self._count_running(state) if late_count is None else late_count.read()
            if num_running == 0:
                break

            # Compact: drop the finished rows once they are at least half.
            if step is None or self._is_half_empty(state, num_running):
                # The step behind a late look may have finished the last ones.
                if late_count is not None and self._count_running(state) == 0:
                    break
                responses.collect(state, end_ids)
                step = self._compact(prefill, state, step, constraints, drafts)
                state = step.state

            # Run some steps.
            if isinstance(step, DraftingStep):
                step.run()
                num_taken += 1
            else:
                num_steps = min(steps_per_look, max_new_tokens - num_taken)
                for _ in range(num_steps):
                    step.launch()
                    step.advance()
                num_taken += num_steps
                if looks_late:
                    late_count = late_count or LateCount(num_running)
                    late_count.note(state.finished)
            if on_tokens is not None:
                responses.collect(state, end_ids)
                for branch in state.response_index.tolist():
                    if branch >= 0:
                        on_tokens(branch, responses.tokens[branch])

        # Collect what is left.
        self.num_steps = num_taken
        responses.collect(state, end_ids)
        if drafts is not None:
            self._learn(drafts, responses, prefill.text, max_new_tokens)
        return responses

    def _learn(
        self, drafts: DraftTable, responses: Responses, text: PackedText, max_new_tokens: int
    ) -> None:
        """Learn drafts from responses to the branches of ``text``."""
        tokenizer = self.language_model.tokenizer
        for answers_query, tokens in zip(text.is_query.tolist(), responses.tokens, strict=True):
            # Neither a response that was cut nor one that ended with its last slot has an end
            is_ended = 0 < len(tokens) < max_new_tokens and tokens[-1] < tokenizer.vocab_size
            drafts.learn(answers_query, [*tokens, tokenizer.eos_id] if is_ended else tokens)
        if isinstance(drafts, DeviceDraftTable):
            drafts.upload()

    def start_rows(
        self, prefill: Prefill, max_new_tokens: int, constraints: DecodingConstraints | None
    ) -> DecodingState:
        """Make a row for every branch, at the end of its prompt.

        Args:
            prefill: the prompts.
            max_new_tokens: tokens of a response at most.
            constraints: what the responses have to name, where that is known.

        Returns:
            The rows, in the order of the branches.
        """
        text = prefill.text
        image_index = text.branch_image_index
        prompt_length = text.branch_length
        num_slots = self.language_model.tokenizer.num_slots
        device = image_index.device

        # Count the responses of each image from 0 on.
        response_index = torch.arange(len(image_index), device=device)
        responses_of_image = torch.bincount(image_index, minlength=len(prefill.hidden))
        end_of_image = responses_of_image.cumsum(0)
        start_of_image = torch.cat([end_of_image.new_zeros(1), end_of_image[:-1]])
        index_in_image = response_index - start_of_image[image_index]

        # Lay out the columns: the prompts, left aligned, then room for the generated tokens.
        first_column = self._first_own_column(prefill)
        num_columns = first_column + text.max_own_length + max_new_tokens
        if isinstance(self.drafts, DeviceDraftTable):
            num_columns += 1 + self.drafts.max_tokens  # for tokens that are not kept
        if self.graphs:
            num_columns = round_up(num_columns, _COLUMN_MULTIPLE)
        columns = torch.arange(num_columns, device=device)

        # Apply the constraints.
        finished = torch.zeros_like(image_index, dtype=torch.bool)
        slots_left = finished[:, None].repeat(1, num_slots)
        if constraints is not None:
            finished = constraints.skip.clone()
            if constraints.slots is not None:
                slots_left = constraints.slots.clone()

        # Begin with the hidden state of the last prompt token.
        last_column = text.branch_start + prompt_length - 1
        hidden = prefill.hidden[image_index, last_column]  # [R, D]
        return DecodingState(
            response_index=response_index,
            image_index=image_index,
            index_in_image=index_in_image,
            answers_query=text.is_query.clone(),
            position=text.position_ids[image_index, last_column] + 1,
            key_mask=columns < (first_column + text.context_length + prompt_length)[:, None],
            hidden=hidden,
            slots_left=slots_left,
            seeds=torch.zeros_like(image_index),
            finished=finished,
            tokens=torch.full(
                (len(image_index), max_new_tokens),
                self.language_model.tokenizer.eos_id,
                device=device,
            ),
            slot_states=hidden.new_zeros(len(hidden), num_slots, hidden.shape[-1]),
        )

    def _first_own_column(self, prefill: Prefill) -> int:
        """Columns of a response that hold a copy of its prefix: all of the prefix or none."""
        keys = prefill.prefill_caches[0].keys
        if self.graphs or keys is None or keys.is_cuda:
            return 0
        prefix_length = prefill.text.prefix_length
        num_rows = len(prefill.text.branch_start)
        num_numbers = 2 * len(prefill.prefill_caches) * keys.shape[1] * keys.shape[3]
        num_bytes = num_rows * prefix_length * num_numbers * keys.element_size()
        return prefix_length if num_bytes <= _MAX_PREFIX_COPIES else 0

    def _looks_late(self, prefill: Prefill, on_tokens: TokenListener | None) -> bool:
        """Whether the host sees rows as they were a step before."""
        return prefill.hidden.is_cuda and on_tokens is None and not self._is_sharded

    @property
    def _is_on_cpu(self) -> bool:
        return self.language_model.mask_head.weight.device.type == "cpu"

    @property
    def _is_sharded(self) -> bool:
        """Whether FSDP gathers weights in every step, so that all ranks take the same steps."""
        return isinstance(self.language_model.base.model.layers[0], FSDPModule)

    def _count_running(self, state: DecodingState) -> int:
        """Rows that are not finished; with sharded weights, on the rank that has most of them."""
        num_running = (~state.finished).sum()
        if self._is_sharded:
            all_reduce(num_running, ReduceOp.MAX)
        return int(num_running)

    def _is_half_empty(self, state: DecodingState, num_running: int) -> bool:
        """Whether half of the rows can be dropped; with sharded weights no rank drops any."""
        return not self._is_sharded and 2 * self._rounded_rows(num_running) <= len(state)

    def _rounded_rows(self, num_rows: int) -> int:
        if not self.graphs:
            return num_rows
        multiple = _ROW_MULTIPLE if self.drafts is None else _ROW_MULTIPLE_OF_DRAFTS
        return round_up(num_rows, multiple)

    def _compact(
        self,
        prefill: Prefill,
        state: DecodingState,
        previous: DecodeStep | DraftingStep | None,
        constraints: DecodingConstraints | None,
        drafts: DraftTable | None = None,
    ) -> DecodeStep | DraftingStep:
        """Continue with the rows that are not finished.

        Args:
            prefill: the prompts.
            state: the rows so far.
            previous: the step that generated them; None = the caches are filled from ``prefill``.
            constraints: what the responses have to name, where that is known.
            drafts: what the next tokens may be; None = nothing is drafted.

        Returns:
            The step of the rows that were kept, ready to be launched.
        """
        # Select the rows and, for graphs, padding rows behind them.
        keep_mask = state.response_index >= 0 if self._is_sharded else ~state.finished
        rows = keep_mask.nonzero()[:, 0]
        num_padding = self._rounded_rows(len(rows)) - len(rows)
        rows = torch.cat([rows, rows.new_full((num_padding,), -1)])
        state = state.select(rows)

        # Make the step before filling its caches, because capturing a graph writes to them.
        caches = self._take_caches(prefill, state, previous)
        num_copied = prefill.text.prefix_length - caches[0].prefix_keys.shape[2]
        first_column = num_copied + prefill.text.max_own_length
        step: DecodeStep | DraftingStep
        if drafts is None or isinstance(drafts, DeviceDraftTable):
            step = self._make_step(state, caches, constraints, drafts)
        else:
            assert self.blocks is not None
            step = DraftingStep(
                self.language_model,
                self.blocks,
                drafts,
                state,
                caches,
                first_column,
                constraints,
            )

        # Fill them from the prompts or from the previous step.
        num_generated = 0 if previous is None else int(previous.num_generated.max())
        column = first_column + num_generated
        if previous is None:
            branch = state.response_index.clamp(min=0)
            prompts = PromptColumns.of(prefill.text, branch, state.key_mask, num_copied)
            for cache, prefill_cache in zip(step.caches, prefill.prefill_caches, strict=True):
                cache.load_prefill(prefill_cache, prompts)
        else:
            copied = rows.clamp(min=0)
            for cache, previous_cache in zip(step.caches, previous.caches, strict=True):
                cache.load_rows(previous_cache, copied, column)
        if isinstance(step, DecodeStep):
            step.load(state, column, num_generated)
        return step

    def _take_caches(
        self,
        prefill: Prefill,
        state: DecodingState,
        previous: DecodeStep | DraftingStep | None,
    ) -> list[SharedPrefixCache]:
        """Take caches for the rows out of the pool."""
        # Fewer rows fit into the same memory, and the prefixes stay where they are.
        if previous is not None:
            prefix_keys = previous.caches[0].prefix_keys
            shape = CacheShape.of(prefix_keys, prefix_keys.shape[2], state.key_mask)
            return self.cache_pool.views(shape)

        # New prompts may need a larger pool. The old one goes first, with the graphs that read it.
        # Under autocast, rotation makes keys float32; values have the dtype of the products.
        values = []
        for prefill_cache in prefill.prefill_caches:
            assert prefill_cache.values is not None
            values.append(prefill_cache.values)
        shared_length = prefill.text.prefix_length - self._first_own_column(prefill)
        shape = CacheShape.of(values[0], shared_length, state.key_mask)
        if not self.cache_pool.fits(shape):
            self.release()
            self.cache_pool.allocate(shape, values)
        return self.cache_pool.views(shape)

    def _make_step(
        self,
        state: DecodingState,
        caches: list[SharedPrefixCache],
        constraints: DecodingConstraints | None,
        drafts: DeviceDraftTable | None,
    ) -> DecodeStep:
        """A step of the rows; with graphs a captured one, which is used again for equal shapes."""
        max_responses = int(state.index_in_image.max()) + 1
        num_tokens = 1  # of each row in a step
        if drafts is not None:
            num_tokens = max(1, min(1 + drafts.max_tokens, _MAX_STEP_TOKENS // len(state)))

        def make(state: DecodingState) -> DecodeStep:
            arguments = (self.language_model, state, caches, max_responses, constraints)
            if drafts is None or num_tokens == 1:
                return DecodeStep(*arguments, self.temperature, self.blocks)
            assert self.blocks is not None
            return VerifyingStep(*arguments, self.blocks, drafts, num_tokens)

        if not self.graphs:
            return make(state)

        # Everything that a graph depends on.
        max_responses = round_up(max_responses, max(1, _RESPONSE_MULTIPLE // num_tokens))
        num_images = len(caches[0].prefix_keys)
        forbidden_first_tokens = None
        if constraints is not None and constraints.slots is not None:
            forbidden_first_tokens = constraints.forbidden_first_tokens
        max_new_tokens = state.tokens.shape[1]
        key = (
            num_images,
            *state.key_mask.shape,
            max_new_tokens,
            max_responses,
            num_tokens,
            forbidden_first_tokens,
            self.temperature,
        )

        # Capture a new graph with tensors of its own.
        if key not in self.captured_steps:
            if len(self.captured_steps) == _MAX_GRAPHS:
                oldest = next(iter(self.captured_steps))
                del self.captured_steps[oldest]
            every_row = torch.arange(len(state), device=state.response_index.device)
            step = make(state.select(every_row))
            step.graph = capture_graph(step.run)
            self.captured_steps[key] = step
        return self.captured_steps[key]


def capture_graph(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Capture ``step`` as a CUDA graph, after two runs that warm it up.

    Args:
        step: launches kernels on tensors that stay where they are.

    Returns:
        The graph; replaying it does what ``step`` does.
    """
    # Casts of weights that autocast caches would be freed at the end of its block, before replays.
    dtype = torch.get_autocast_dtype("cuda")
    enabled = torch.is_autocast_enabled("cuda")
    with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
        # Warm up on a stream of its own, as capturing asks for.
        warm_up_stream = torch.cuda.Stream()
        warm_up_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up_stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(warm_up_stream)

        # Capture.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    return graph
