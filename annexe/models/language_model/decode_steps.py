"""Steps of decoding: one token of each row, or several that were drafted and verified at once.

`DecodingState` holds the rows. `DecodeStep` is the same sequence of kernels whatever the tokens
are, so that a graph of it can be replayed. `VerifyingStep` is as well, and keeps what was drafted
(`annexe.models.language_model.drafts`) as far as the model says the same. On a CPU `DraftingStep`
does that, and runs no more tokens than it has to.

Legend: B images, R rows (responses), r rows that are run, K slots, D width, V words, M tokens of a
step, T those that a row has of them at most, L tokens that a response has at most.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from annexe.models.language_model.causal_lm import CausalLM
from annexe.models.language_model.constraints import DecodingConstraints, SlotConstraint
from annexe.models.language_model.decode_blocks import DecodingBlocks
from annexe.models.language_model.decode_operations import hiding_bias
from annexe.models.language_model.drafts import DeviceDraftTable, DraftTable
from annexe.models.language_model.kv_cache import DecodeIndex, DraftIndex, SharedPrefixCache
from annexe.models.language_model.sampling import choose


@dataclass
class DecodingState:
    """The responses that are being decoded, a row of every tensor each."""

    response_index: Tensor  # int64[R], which response of the batch; -1 = padding row
    image_index: Tensor  # int64[R], the image that it is about
    index_in_image: Tensor  # int64[R], which one it is among the responses of its image
    answers_query: Tensor  # bool[R], whether it answers a query; else it is an analysis
    position: Tensor  # int64[R], rotary position of the next token
    key_mask: Tensor  # bool[R, Lr], columns of its cache that hold a token
    hidden: Tensor  # float[R, D], final hidden state of the last token
    slots_left: Tensor  # bool[R, K], slots that it still has to name
    seeds: Tensor  # int64[R], of the random choice of its tokens
    finished: Tensor  # bool[R], it has ended
    tokens: Tensor  # int64[R, L], generated tokens, then end of sequence
    slot_states: Tensor  # float[R, K, D], hidden states of its placeholders, 0 = not named

    def __len__(self) -> int:
        return len(self.response_index)

    def select(self, rows: Tensor) -> DecodingState:
        """Copy some of the rows.

        Args:
            rows: int64[.], the rows in their new order. -1 makes a padding row, which is finished,
                has no keys, and has an ``index_in_image`` that no real row has.

        Returns:
            The copies, as many as ``rows``.
        """
        copied = rows.clamp(min=0)
        tensors = {field.name: getattr(self, field.name)[copied] for field in fields(self)}
        selected = DecodingState(**tensors)

        # Turn the rows that stand for padding, copies of row 0 so far, into padding.
        is_real = rows >= 0
        selected.response_index.masked_fill_(~is_real, -1)
        selected.image_index.masked_fill_(~is_real, 0)
        index_in_image = selected.index_in_image
        unused_index = index_in_image.masked_fill(~is_real, -1).max() + 1
        selected.index_in_image = torch.where(is_real, index_in_image, unused_index)
        selected.key_mask &= is_real[:, None]
        selected.finished |= ~is_real
        return selected


class DecodeStep:
    """One decoding step of all rows: `launch` generates a token of each, `advance` moves behind it.

    Before `load` says where the rows stand, a step writes to the last column and the last token of
    all, which nobody reads. A graph can therefore be captured while rows in the same cache wait.

    Args:
        language_model: predicts the tokens.
        state: the rows; changed in place.
        caches: keys and values, one for each layer; the responses' own ones are changed in place.
        max_responses: responses of the image that has most.
        constraints: of `GreedyDecoder.decode`. Only their kind matters here, not their tensors.
        temperature: at which tokens are drawn; None takes the most likely ones.
        blocks: run the new tokens; None = those of ``language_model`` do.
    """

    def __init__(
        self,
        language_model: CausalLM,
        state: DecodingState,
        caches: list[SharedPrefixCache],
        max_responses: int,
        constraints: DecodingConstraints | None,
        temperature: float | None,
        blocks: DecodingBlocks | None = None,
    ) -> None:
        self.language_model = language_model
        self.blocks = blocks
        self.state = state
        self.caches = caches
        self.temperature = temperature
        self.graph: torch.cuda.CUDAGraph | None = None
        device = state.response_index.device

        # Where the next token goes: in the caches, and in `state.tokens`.
        num_images = len(caches[0].prefix_keys)
        self.row_index = state.response_index.new_full((num_images, max_responses), -1)
        self.column = torch.tensor([state.key_mask.shape[1] - 1], device=device)
        self.num_generated = torch.tensor([state.tokens.shape[1] - 1], device=device)

        # What it may be.
        self.slot_ids = _slot_ids(language_model, device)
        self.end_ids = torch.tensor(language_model.end_ids, device=device)
        self.slot_constraint = _slot_constraint(language_model, constraints, device)

    def load(self, state: DecodingState, column: int, num_generated: int) -> None:
        """Continue with other rows of the same shapes.

        Args:
            state: the rows, which are copied.
            column: where the caches get the next token.
            num_generated: tokens that each row has so far.
        """
        for field in fields(state):
            getattr(self.state, field.name).copy_(getattr(state, field.name))
        rows = torch.arange(len(state), device=self.row_index.device)
        self.row_index.fill_(-1)
        self.row_index[state.image_index, state.index_in_image] = rows
        self.column.fill_(column)
        self.num_generated.fill_(num_generated)

    def launch(self) -> None:
        """Generate one token of every row, by replaying the graph if there is one."""
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()

    def advance(self) -> None:
        """Move behind the token that was generated."""
        self.state.position += 1
        self.column += 1
        self.num_generated += 1

    @torch.no_grad()
    def run(self) -> None:
        """Generate one token of every row and run the language model on it."""
        state = self.state
        eos_id = self.language_model.tokenizer.eos_id

        # Choose a token that is allowed; finished rows repeat the end of sequence.
        logits = self.language_model.logits(state.hidden)  # [R, V + K]
        if self.slot_constraint is not None:
            logits = self.slot_constraint(logits, state.slots_left, self.num_generated)
        if self.temperature is None:
            token = _most_likely(logits)
        else:
            token = choose(logits, state.seeds, self.num_generated, self.temperature)
        token = token.masked_fill(state.finished, eos_id)  # [R]
        state.tokens.index_copy_(1, self.num_generated, token[:, None])

        # Finish rows at the end of sequence or, under constraints, with the last slot.
        is_named = token[:, None] == self.slot_ids  # [R, K]
        state.finished |= (token[:, None] == self.end_ids).any(1)
        if self.slot_constraint is not None:
            state.slots_left &= ~is_named
            state.finished |= is_named.any(1) & ~state.slots_left.any(1)

        # Run the language model on the token.
        state.key_mask.index_fill_(1, self.column, True)
        index = DecodeIndex(
            state.image_index, state.index_in_image, self.row_index, state.key_mask, self.column
        )
        embeddings = self.language_model.embed(token[:, None])  # [R, 1, D]
        if self.blocks is None:
            attention_kwargs = [
                {"shared_prefix_cache": cache, "decode_index": index} for cache in self.caches
            ]
            hidden = self.language_model.run_layers(
                embeddings, state.position[:, None], attention_kwargs
            )[:, -1]  # [R, D]
        else:
            hidden = self.blocks(embeddings[:, 0], state.position, self.caches, index)  # [R, D]
            hidden = hidden.to(state.hidden.dtype)

        # Keep its hidden state, also as that of the slot that it names.
        state.hidden.copy_(hidden)
        if is_named.is_cuda or is_named.any():  # a CPU may look
            slot_states = torch.where(is_named[..., None], hidden[:, None], state.slot_states)
            state.slot_states.copy_(slot_states)


class VerifyingStep(DecodeStep):
    """As `DecodeStep`, but a step of each row verifies drafted tokens, and generates at least one.

    A row has T new tokens. The first one is certain, the others are drafted. Keys and values of
    those that are not kept lie behind the row's last token, where no query looks before the next
    step writes there.

        columns    | prompt | kept so far | certain  drafted  drafted | free
        the model says behind them           b        c        x
        kept if drafted is b, c                       b        c          x: certain in the next one

    How many tokens a row has is known on the device alone, so that the host need not wait for it.
    The columns of the caches end with T spare ones, and a step writes there before `load`.

    Args:
        drafts: what the next tokens may be.
        num_tokens: T.
        others: of `DecodeStep`.
    """

    def __init__(
        self,
        language_model: CausalLM,
        state: DecodingState,
        caches: list[SharedPrefixCache],
        max_responses: int,
        constraints: DecodingConstraints | None,
        blocks: DecodingBlocks,
        drafts: DeviceDraftTable,
        num_tokens: int,
    ) -> None:
        super().__init__(language_model, state, caches, max_responses, constraints, None, blocks)
        self.drafts = drafts
        device = state.response_index.device
        self.offsets = torch.arange(num_tokens, device=device)  # [T]
        self.columns = torch.arange(state.key_mask.shape[1], device=device)  # [Lr]
        self.places = torch.arange(state.tokens.shape[1], device=device)  # [L]

        # Tokens of each row, the column of its first one, and its next one
        self.num_generated = torch.full_like(state.response_index, len(self.places))  # [R]
        self.column = self.columns[-1:] - (len(self.places) + num_tokens - 2)
        self.next_token = torch.zeros_like(state.response_index)  # [R]

    @torch.no_grad()
    def load(self, state: DecodingState, column: int, num_generated: int) -> None:
        """As of `DecodeStep`, with the column behind the longest row, and its tokens so far."""
        super().load(state, column, num_generated)
        self.column.fill_(column - num_generated)
        self.num_generated.copy_(state.key_mask[:, column - num_generated :].sum(1))
        next_token = _next_token(
            self.language_model,
            self.slot_constraint,
            state.hidden,
            state.slots_left,
            self.num_generated[:, None],
        )
        self.next_token.copy_(next_token)

    def advance(self) -> None:
        """Nothing: rows move by different numbers of tokens, in `run`."""

    @torch.no_grad()
    def run(self) -> None:
        """Verify T tokens of every row, and keep those that the model says."""
        state = self.state
        token = self._draft()  # [R, T]
        hidden = self._run_blocks(token)  # [R, T, D]

        # Find the slots that are left behind each token, and the tokens that end their row.
        is_named = token[..., None] == self.slot_ids  # [R, T, K]
        slots_left = state.slots_left[:, None] & ~is_named.cumsum(1).bool()
        is_last = (token[..., None] == self.end_ids).any(-1)
        if self.slot_constraint is not None:
            is_last |= is_named.any(-1) & ~slots_left.any(-1)

        # Keep what follows as the model says, up to the first draft that does not.
        expected = _next_token(
            self.language_model,
            self.slot_constraint,
            hidden.flatten(0, 1),
            slots_left.flatten(0, 1),
            torch.ones_like(token).view(-1, 1),
        ).view_as(token)
        has_room = self.num_generated[:, None] + self.offsets < len(self.places)
        is_kept = has_room & ~state.finished[:, None]  # [R, T]
        is_kept[:, 1:] &= (token[:, 1:] == expected[:, :-1]) & ~is_last[:, :-1]
        is_kept = is_kept.cumprod(1).bool()
        self._keep(token, is_kept)

        # Keep the states of placeholders, of a slot that is named twice the last one.
        order = (is_named & is_kept[..., None]) * (self.offsets + 1)[:, None]  # [R, T, K]
        number = order.amax(1)[..., None]  # [R, K, 1], 0 where none is named
        named = hidden.gather(1, (number - 1).clamp(min=0).expand_as(state.slot_states))
        state.slot_states.copy_(torch.where(number > 0, named, state.slot_states))

        # Move behind the last token that is kept.
        rows = torch.arange(len(state), device=token.device)
        last = (is_kept.sum(1) - 1).clamp(min=0)  # [R]
        state.hidden.copy_(hidden[rows, last])
        state.slots_left.copy_(slots_left[rows, last])
        state.finished |= is_last[rows, last] | (self.num_generated >= len(self.places))
        self.next_token.copy_(expected[rows, last])

    def _draft(self) -> Tensor:
        """The next token of each row, and behind it what is drafted: int64[R, T]."""
        state = self.state
        last_place = (self.num_generated - 1).clamp(min=0)
        previous = state.tokens.gather(1, last_place[:, None])[:, 0]
        drafted = self.drafts.look_up(
            state.answers_query, previous, self.next_token, self.num_generated == 0
        )
        num_drafted = len(self.offsets) - 1
        return torch.cat([self.next_token[:, None], drafted[:, :num_drafted]], dim=1)

    def _run_blocks(self, token: Tensor) -> Tensor:
        """Final hidden states of int64[R, T] tokens, float[R, T, D]."""
        state = self.state
        assert self.blocks is not None

        # A row that is full already stays before the end of its columns.
        place = self.num_generated.clamp(max=len(self.places) - 1)[:, None] + self.offsets
        column = self.column + place
        key_mask = state.key_mask | (self.columns >= self.column)
        index = DecodeIndex(
            state.image_index, state.index_in_image, self.row_index, key_mask, column.flatten()
        )
        embeddings = self.language_model.embed(token).flatten(0, 1)  # [R * T, D]
        position = (state.position[:, None] + self.offsets).flatten()
        hidden = self.blocks(embeddings, position, self.caches, index)
        return hidden.to(state.hidden.dtype).unflatten(0, token.shape)

    def _keep(self, token: Tensor, is_kept: Tensor) -> None:
        """Write the tokens that are kept behind those of their rows; [R, T] each."""
        state = self.state
        num_kept = is_kept.sum(1)
        offset = self.places - self.num_generated[:, None]  # [R, L], of the token for each place
        is_new = (offset >= 0) & (offset < num_kept[:, None])
        new_tokens = token.gather(1, offset.clamp(0, len(self.offsets) - 1))
        state.tokens.copy_(torch.where(is_new, new_tokens, state.tokens))
        self.num_generated += num_kept
        state.position += num_kept
        end = self.column + self.num_generated[:, None]
        state.key_mask |= (self.columns >= self.column) & (self.columns < end)


class DraftingStep:
    """As `VerifyingStep`, with rows of different numbers of new tokens.

    It runs on a CPU, only the rows that are not finished, and takes the most likely tokens.

    Args:
        language_model: predicts the tokens.
        blocks: run the new tokens.
        drafts: what the next tokens may be.
        state: the rows; changed in place.
        caches: keys and values, one for each layer; the responses' own ones are changed in place.
        first_column: where the caches get the first token of a response.
        constraints: of `GreedyDecoder.decode`. Only their kind matters here, not their tensors.
    """

    def __init__(
        self,
        language_model: CausalLM,
        blocks: DecodingBlocks,
        drafts: DraftTable,
        state: DecodingState,
        caches: list[SharedPrefixCache],
        first_column: int,
        constraints: DecodingConstraints | None,
    ) -> None:
        self.language_model = language_model
        self.blocks = blocks
        self.drafts = drafts
        self.state = state
        self.caches = caches
        self.first_column = first_column
        device = state.response_index.device
        self.slot_ids = _slot_ids(language_model, device)
        self.end_ids = torch.tensor(language_model.end_ids, device=device)
        self.slot_constraint = _slot_constraint(language_model, constraints, device)

        # Which row is which response of an image
        num_images = len(caches[0].prefix_keys)
        max_responses = int(state.index_in_image.max()) + 1
        self.row_index = state.response_index.new_full((num_images, max_responses), -1)
        rows = torch.arange(len(state), device=device)
        self.row_index[state.image_index, state.index_in_image] = rows

    @property
    def num_generated(self) -> Tensor:
        """Tokens of each row so far, int64[R]."""
        return self.state.key_mask[:, self.first_column :].sum(1)

    @torch.no_grad()
    def run(self) -> None:
        """Generate some tokens of every row that is not finished."""
        state = self.state
        num_generated = self.num_generated
        rows = (~state.finished).nonzero()[:, 0]  # [r], those that are run

        # The next token of each row is certain; others behind it are drafted.
        next_token = self._next_token(
            state.hidden[rows], state.slots_left[rows], num_generated[rows, None]
        )
        row, offset, token = self._draft(rows, next_token, num_generated)  # [M]
        start = (offset == 0).nonzero()[:, 0]  # [r], the first token of each row
        start_of_token = torch.arange(len(token)) - offset  # [M]

        # Run the language model on all of them.
        place = num_generated[row] + offset  # [M], among the tokens of its row
        index = self._index(row, offset, place, num_generated)
        embeddings = self.language_model.embed(token[:, None])[:, 0]  # [M, D]
        hidden = self.blocks(embeddings, state.position[row] + offset, self.caches, index)
        hidden = hidden.to(state.hidden.dtype)  # [M, D]

        # Find the slots that are left behind each token, and the tokens that end their row.
        is_named = token[:, None] == self.slot_ids  # [M, K]
        num_named = is_named.cumsum(0)
        num_named_before = num_named[start_of_token] - is_named[start_of_token].long()
        slots_left = state.slots_left[row] & (num_named == num_named_before)
        is_last = (token[:, None] == self.end_ids).any(1)
        if self.slot_constraint is not None:
            is_last |= is_named.any(1) & ~slots_left.any(1)

        # Keep what follows as the model says, up to the first draft that does not.
        is_drafted = offset > 0
        before = is_drafted.nonzero()[:, 0] - 1  # tokens that a draft follows
        is_wrong = torch.zeros_like(is_last)
        if len(before):
            some_generated = torch.ones_like(before)[:, None]
            expected = self._next_token(hidden[before], slots_left[before], some_generated)
            is_wrong[is_drafted] = (token[is_drafted] != expected) | is_last[before]
        num_wrong = is_wrong.cumsum(0)
        kept = (num_wrong == num_wrong[start_of_token]).nonzero()[:, 0]
        num_kept = torch.bincount(row[kept], minlength=len(state))  # [R]

        # Move behind them.
        state.tokens[row[kept], place[kept]] = token[kept]
        state.key_mask[row[kept], self.first_column + place[kept]] = True
        state.position += num_kept
        last = start + num_kept[rows] - 1  # [r]
        state.hidden[rows] = hidden[last]
        state.slots_left[rows] = slots_left[last]
        is_full = num_generated[rows] + num_kept[rows] == state.tokens.shape[1]
        state.finished[rows] = is_last[last] | is_full
        named, slot = is_named[kept].nonzero().unbind(1)
        state.slot_states[row[kept[named]], slot] = hidden[kept[named]]

    def _next_token(self, hidden: Tensor, slots_left: Tensor, num_generated: Tensor) -> Tensor:
        """`_next_token` of the language model under the constraint."""
        return _next_token(
            self.language_model, self.slot_constraint, hidden, slots_left, num_generated
        )

    def _draft(
        self, rows: Tensor, next_token: Tensor, num_generated: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next token of each row, and behind it what is drafted.

        Args:
            rows: int64[r], the rows that are run.
            next_token: int64[r].
            num_generated: int64[R].

        Returns:
            Of every token its row, which one of the row's it is, and its id: int64[M] each.
        """
        state = self.state
        last_place = (num_generated - 1).clamp(min=0)[:, None]
        last_tokens = state.tokens.gather(1, last_place)[rows, 0].tolist()
        room = (state.tokens.shape[1] - 1 - num_generated)[rows].tolist()
        is_first = (num_generated == 0)[rows].tolist()
        answers_query = state.answers_query[rows].tolist()

        row_of_token: list[int] = []
        offsets: list[int] = []
        ids: list[int] = []
        for position, (row, token) in enumerate(
            zip(rows.tolist(), next_token.tolist(), strict=True)
        ):
            said = [token] if is_first[position] else [last_tokens[position], token]
            drafted = self.drafts.draft(answers_query[position], said)[: room[position]]
            row_of_token += [row] * (1 + len(drafted))
            offsets += range(1 + len(drafted))
            ids += [token, *drafted]
        return torch.tensor(row_of_token), torch.tensor(offsets), torch.tensor(ids)

    def _index(
        self, row: Tensor, offset: Tensor, place: Tensor, num_generated: Tensor
    ) -> DraftIndex:
        """Where new tokens go, and which columns they attend to.

        Args:
            row: int64[M], the row of each token.
            offset: int64[M], which one of the row's new tokens it is.
            place: int64[M], which one of all its tokens.
            num_generated: int64[R].
        """
        state = self.state
        column = self.first_column + place
        num_columns = int(column.max()) + 1
        columns = torch.arange(num_columns)
        first = (self.first_column + num_generated)[:, None, None]  # [R, 1, 1]
        last = first + torch.arange(int(offset.max()) + 1)[:, None]  # [R, T, 1]
        is_new = (columns >= first) & (columns <= last)  # [R, T, columns]
        is_hidden = ~(state.key_mask[:, None, :num_columns] | is_new)
        bias = hiding_bias(is_hidden, self.caches[0].own_keys.dtype)
        return DraftIndex(
            state.image_index, state.index_in_image, self.row_index, row, offset, column, bias
        )


def _slot_ids(language_model: CausalLM, device: torch.device) -> Tensor:
    """Ids of the placeholders, int64[K]."""
    tokenizer = language_model.tokenizer
    num_tokens = tokenizer.vocab_size + tokenizer.num_slots
    return torch.arange(tokenizer.vocab_size, num_tokens, device=device)


def _slot_constraint(
    language_model: CausalLM, constraints: DecodingConstraints | None, device: torch.device
) -> SlotConstraint | None:
    """What keeps responses to the slots that they have to name; None: they may name any."""
    if constraints is None or constraints.slots is None:
        return None
    return SlotConstraint(
        language_model.tokenizer,
        language_model.end_ids,
        constraints.forbidden_first_tokens,
        device,
    )


def _next_token(
    language_model: CausalLM,
    constraint: SlotConstraint | None,
    hidden: Tensor,
    slots_left: Tensor,
    num_generated: Tensor,
) -> Tensor:
    """The most likely token that is allowed behind each of some tokens.

    Args:
        language_model: predicts the tokens.
        constraint: what is allowed; None = everything.
        hidden: float[., D].
        slots_left: bool[., K].
        num_generated: int64[., 1], tokens of the response so far.

    Returns:
        int64[.].
    """
    logits = language_model.logits(hidden)
    if constraint is not None:
        logits = constraint(logits, slots_left, num_generated)
    return _most_likely(logits)


def _most_likely(logits: Tensor) -> Tensor:
    """Index of the highest of each row, int64[R], for float[R, V]."""
    if logits.is_cuda:
        return logits.argmax(-1)
    # On a CPU that of NumPy is ten times as fast.
    return torch.from_numpy(logits.float().numpy().argmax(-1))
