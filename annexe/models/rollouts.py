"""Groups of responses, drawn behind one prefix, and the presence of slots, drawn as often.

The prompts of an image are read once. Every member of a group continues the same keys and values:

    prefix: template, image | analysis prompt | --> member 0, 1, ...
                            | query 1         | --> member 0, 1, ...
                            | query 2         | --> member 0, 1, ...

Where queries read the analysis (`annexe.structures.batch.AnswersRead`), the analyses are drawn
first, and each member has a row of its own, in which its queries read its own analysis.

What is drawn depends on the image's seed alone, not on other images or on the size of a batch.

Legend: B images, N packed tokens, D width, Q queries, K slots, R prompts (B of analyses and Q of
queries), M members of a group.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from annexe.models.annexe import Annexe, Encoding
from annexe.models.language_model.constraints import DecodingConstraints
from annexe.models.language_model.kv_cache import Prefill, PrefillCache
from annexe.models.language_model.sampling import Sampler, split_seeds, uniform
from annexe.models.language_model.stages import analyses_alone, with_analyses
from annexe.structures.batch import ANALYSIS, Batch, Context, PackedText
from annexe.structures.rollouts import DrawnText, Rollouts


@torch.no_grad()
def roll_out(
    model: Annexe,
    batch: Batch,
    seeds: Tensor,
    *,
    num_members: int,
    max_new_tokens: int,
    temperature: float,
) -> Rollouts:
    """Draw a group of responses to every prompt of a batch.

    Words are drawn freely, without the constraints that bind answers to masks in use: what they
    say about targets is theirs to learn.

    Args:
        model: in evaluation mode; its masks have to stand before the first word.
        batch: packed prompts without responses.
        seeds: int64[B], one for each image.
        num_members: M.
        max_new_tokens: tokens of a response, at most.
        temperature: at which tokens are drawn.
    """
    # What a frozen encoder sees is kept for the passes that follow
    is_frozen = not any(each.requires_grad for each in model.rgb_encoder.parameters())
    if is_frozen:
        batch = replace(batch, patches=model.patches_of(batch))

    # Prompts, and responses to them
    word_seeds, draw_seeds = split_seeds(seeds, 2).unbind(-1)
    drawer = _Drawer(model, word_seeds, num_members, max_new_tokens, temperature)
    if model.answers_read.source == "analysis":
        batch, encoding, hidden, tokens = drawer.in_two_stages(batch)
    else:
        encoding, prefill = _prefill(model, batch)
        hidden = prefill.hidden
        tokens = drawer.decode(prefill)

    # Words of the responses
    tokenizer = model.language_model.tokenizer
    texts = []
    for group in tokens:
        members = []
        for each in group:
            has_ended = len(each) < max_new_tokens
            members.append(DrawnText(each, tokenizer.decode(each), has_ended))
        texts.append(members)

    # Presence: one draw for each slot
    grounding = model.ground_prompts(hidden, encoding, batch)[-1]
    masks = grounding.masks > 0
    queries = batch.queries
    seeds_of_images = split_seeds(draw_seeds, queries.max_queries * num_members)
    member_index = torch.arange(num_members, device=seeds.device)[:, None]
    streams = queries.index_in_image * num_members + member_index  # [M, Q]
    seeds_of_draws = seeds_of_images[queries.image_index, streams].flatten()
    numbers = uniform(seeds_of_draws, seeds.new_zeros(1), masks.shape[1])
    draws = numbers.unflatten(0, streams.shape) < grounding.presence.float().sigmoid()  # [M, Q, K]
    return Rollouts(
        texts=texts,
        draws=draws,
        has_pixels=masks.flatten(2).any(-1),
        masks=masks,
        in_use=model.present_slots(grounding),
        patches=batch.patches if is_frozen else None,
    )


class _Drawer:
    """Draws the words of groups.

    Args:
        model: the model.
        seeds: int64[B], one for each image.
        num_members: M.
        max_new_tokens: tokens of a response, at most.
        temperature: at which tokens are drawn.
    """

    def __init__(
        self,
        model: Annexe,
        seeds: Tensor,
        num_members: int,
        max_new_tokens: int,
        temperature: float,
    ) -> None:
        self.model = model
        self.seeds = seeds
        self.num_members = num_members
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature

    def decode(self, prefill: Prefill) -> list[list[list[int]]]:
        """Draw a group for every branch of the prompts.

        Returns:
            The tokens of each member, [R][M].
        """
        text = prefill.text
        group = replace(
            text,
            branch_image_index=text.branch_image_index.repeat_interleave(self.num_members),
            branch_start=text.branch_start.repeat_interleave(self.num_members),
            branch_length=text.branch_length.repeat_interleave(self.num_members),
            query_branches=_members_of(text.query_branches, self.num_members),
        )
        seeds = self._seeds(text.branch_image_index, _place_in_image(text))  # [R, M]
        sampler = Sampler(self.temperature, seeds.flatten())
        tokens = self.model.text_decoder.decode(
            replace(prefill, text=group), self.max_new_tokens, sampler=sampler
        ).tokens
        firsts = range(0, len(tokens), self.num_members)
        return [tokens[first : first + self.num_members] for first in firsts]

    def in_two_stages(self, batch: Batch) -> tuple[Batch, Encoding, Tensor, list[list[list[int]]]]:
        """Draw analyses, then answers behind each of them.

        Returns:
            The batch with the analyses of the first members in its prompts; what the encoders made
            of the images; the states of these prompts, float[B, N, D]; and the tokens, [R][M].
        """
        model = self.model
        text = batch.text
        num_members = self.num_members

        # Analyses
        encoding, prefill = _prefill(model, replace(batch, text=analyses_alone(text)))
        prefix = prefill.keep_prefix()
        analyses = self.decode(prefill)  # [B][M]

        # Prompts behind them: a row for each member of each image
        eos_id = model.language_model.tokenizer.eos_id
        ended = [[[*tokens, eos_id] for tokens in group] for group in analyses]
        flat = [tokens for group in ended for tokens in group]
        rows = with_analyses(_repeat_rows(text, num_members), flat)
        words = model.language_model.embed(rows.input_ids[:, rows.prefix_length :])
        prefix_of_rows = [_repeat_cache(cache, num_members) for cache in prefix]
        prefill = model.language_model.prefill(words, rows, prefix=prefix_of_rows)
        first_hidden = prefill.hidden[::num_members]

        # Answers
        row = rows.branch_image_index
        image = row.div(num_members, rounding_mode="floor")
        place = _place_in_image(rows)
        seeds = self._seeds(image, place).gather(1, (row % num_members)[:, None])[:, 0]
        answered = model.text_decoder.decode(
            prefill,
            self.max_new_tokens,
            DecodingConstraints(skip=~rows.is_query, slots=None),
            sampler=Sampler(self.temperature, seeds),
        ).tokens

        # Groups in the order of the branches; the rows of an image follow one another
        first_batch = replace(batch, text=with_analyses(text, [group[0] for group in ended]))
        tokens: list[list[list[int]]] = []
        first = 0
        counts = torch.bincount(text.branch_image_index).tolist()
        for image_index, num_branches in enumerate(counts):
            tokens.append(analyses[image_index])
            end = first + num_branches * num_members
            for branch in range(1, num_branches):
                tokens.append(answered[first + branch : end : num_branches])
            first = end
        return first_batch, encoding, first_hidden, tokens

    def _seeds(self, image: Tensor, place: Tensor) -> Tensor:
        """Seeds of the members of branches, int64[R, M].

        Args:
            image: int64[R], the image of each branch.
            place: int64[R], which branch of its image it is.
        """
        num_places = int(place.max()) + 1
        seeds = split_seeds(self.seeds, num_places * self.num_members)
        seeds = seeds.unflatten(1, (num_places, self.num_members))
        return seeds[image, place]


def _prefill(model: Annexe, batch: Batch) -> tuple[Encoding, Prefill]:
    """Run encoders and language model over the prompts of a batch."""
    encoding = model.encode(batch)
    prefill = model.language_model.prefill(encoding.embeddings, batch.text, encoding.image_levels)
    return encoding, prefill


def _place_in_image(text: PackedText) -> Tensor:
    """Which branch of its image each one is, the analysis being 0: int64[R]."""
    return text.segment_ids[text.branch_image_index, text.branch_start] - ANALYSIS


def _members_of(index: Tensor, num_members: int) -> Tensor:
    """Indices of all members, where there were those of groups: int64[R] -> int64[R * M]."""
    members = torch.arange(num_members, device=index.device)
    return (index[:, None] * num_members + members).flatten()


def _repeat_cache(cache: PrefillCache, num_members: int) -> PrefillCache:
    """Keys and values with those of every row repeated, one behind the other."""
    assert cache.keys is not None and cache.values is not None
    keys = cache.keys.repeat_interleave(num_members, 0)
    return PrefillCache(keys, cache.values.repeat_interleave(num_members, 0))


def _repeat_rows(text: PackedText, num_members: int) -> PackedText:
    """Packed prompts with every row repeated, one behind the other."""
    # Branches of all rows, row by row
    branches_of_image = [
        (text.branch_image_index == image).nonzero()[:, 0] for image in range(len(text.input_ids))
    ]
    order = torch.cat([each.repeat(num_members) for each in branches_of_image])
    num_branches = torch.tensor([len(each) for each in branches_of_image], device=order.device)
    rows = torch.arange(len(text.input_ids) * num_members, device=order.device)
    row_of_branch = rows.repeat_interleave(num_branches.repeat_interleave(num_members))

    context = text.context
    if context is not None:
        start = context.start.repeat_interleave(num_members)
        context = Context(start, context.end.repeat_interleave(num_members))
    return replace(
        text,
        input_ids=text.input_ids.repeat_interleave(num_members, 0),
        segment_ids=text.segment_ids.repeat_interleave(num_members, 0),
        reach=text.reach.repeat_interleave(num_members, 0),
        position_ids=text.position_ids.repeat_interleave(num_members, 0),
        branch_image_index=row_of_branch,
        branch_start=text.branch_start[order],
        branch_length=text.branch_length[order],
        query_branches=text.is_query[order].nonzero()[:, 0],
        unpadded_indices=None,
        context=context,
    )
