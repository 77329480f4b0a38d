"""A packed sequence gives what prefix + branch alone give, in training and in generation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from annexe.datasets.collate import Collator
from annexe.models.annexe import Annexe
from annexe.structures.batch import Batch
from annexe.training import losses

LORA = ("model.language_model.lora.rank=4", "model.language_model.lora.dropout=0")
WITHOUT_LORA = ("model.language_model.lora.rank=0",)
# Greedy responses differ, and some end early.
VARIED = ("model.language_model.initializer_range=0.3",)


def run_alone(
    model: Annexe, batch: Batch, image_tokens: torch.Tensor, branch: int, ids: list[int]
) -> torch.Tensor:
    """Final states [prefix + ids, D] of one branch by the stock model: causal, plain positions."""
    image = batch.text.branch_image_index[branch].item()
    start = batch.text.image_start
    prefix = batch.text.input_ids[image, :start]
    text_ids = torch.cat([prefix, torch.tensor(ids, dtype=torch.int64)])
    words = model.language_model.embed(text_ids[None])[0]
    embeddings = torch.cat([words[:start], image_tokens[image], words[start:]])
    llama = model.language_model.base.model
    return llama(inputs_embeds=embeddings[None], use_cache=False).last_hidden_state[0]


def branch_ids(batch: Batch, branch: int) -> list[int]:
    """Prompt and response of one branch, cut out of the packed row."""
    image = batch.text.branch_image_index[branch].item()
    start = batch.text.branch_start[branch].item()
    segment_ids = batch.text.segment_ids[image]
    return batch.text.input_ids[image, segment_ids == segment_ids[start]].tolist()


def prompts_of(model: Annexe, tokenizer, batch: Batch) -> Batch:
    """The prompts of the samples of ``batch``, without responses."""
    return Collator(tokenizer, model.num_image_tokens, 4, responses=False)(batch.samples)


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("options", [LORA, WITHOUT_LORA], ids=["lora", "without_lora"])
def test_states_and_losses_equal_each_branch_alone(make_parts, options, unpad):
    model, tokenizer, batch = make_parts(*options)
    batch = Collator(tokenizer, model.num_image_tokens, 4, unpad=unpad)(batch.samples)
    text = batch.text
    with torch.no_grad():
        encoding = model.encode(batch)
        hidden = model.language_model(encoding.embeddings, text)
        token_logits = model(batch).token_logits
    token_losses = F.cross_entropy(token_logits, text.labels, reduction="none")
    assert len(set((text.segment_ids >= 0).sum(1).tolist())) > 1, (
        "rows of one length would not test the padding"
    )
    first_token = 0
    for branch in range(len(text.branch_start)):
        ids = branch_ids(batch, branch)
        image = text.branch_image_index[branch].item()
        start = text.branch_start[branch].item()
        length = text.branch_length[branch].item()
        prefix = text.prefix_length
        response = torch.tensor(ids[length:])
        with torch.no_grad():
            states = run_alone(model, batch, encoding.image_tokens, branch, ids)
            logits = model.language_model.logits(states[prefix + length - 1 : -1])
        torch.testing.assert_close(hidden[image, :prefix], states[:prefix], atol=1e-5, rtol=0)
        packed_states = hidden[image, start : start + len(ids)]
        torch.testing.assert_close(packed_states, states[prefix:], atol=1e-5, rtol=0)
        packed_losses = token_losses[first_token : first_token + len(response)]
        expected_losses = F.cross_entropy(logits, response, reduction="none")
        torch.testing.assert_close(packed_losses, expected_losses, atol=1e-5, rtol=0)
        first_token += len(response)
    assert first_token == len(token_losses)


def test_all_images_in_one_row_give_the_same_gradients(make_parts):
    model, tokenizer, batch = make_parts(*LORA)
    gradients = []
    for unpad in (False, True):
        batch = Collator(tokenizer, model.num_image_tokens, 4, unpad=unpad)(batch.samples)
        model.zero_grad()
        losses.totals(model(batch), batch, list(losses.TERMS)).sum().backward()
        gradients.append(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        )
    assert batch.text.unpadded_indices.numel() % 128 == 0
    assert (batch.text.unpadded_indices == batch.text.segment_ids.numel()).any(), (
        "no spare tokens to test"
    )
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [LORA, WITHOUT_LORA], ids=["lora", "without_lora"])
def test_greedy_generation_equals_one_by_one_without_cache(make_parts, options):
    model, tokenizer, batch = make_parts(*options, *VARIED)
    prompts = prompts_of(model, tokenizer, batch)
    with torch.no_grad():
        encoding = model.encode(prompts)
        prefill = model.language_model.prefill(encoding.embeddings, prompts.text)
        generated = model.text_decoder.decode(prefill, max_new_tokens=10).tokens
        for branch, tokens in enumerate(generated):
            prompt = branch_ids(prompts, branch)
            expected = []
            for _ in range(10):
                ids = prompt + expected
                state = run_alone(model, prompts, encoding.image_tokens, branch, ids)[-1]
                expected.append(model.language_model.logits(state).argmax().item())
                if expected[-1] == tokenizer.eos_id:
                    expected.pop()
                    break
            assert tokens == expected, f"branch {branch}"
    assert len({tuple(tokens) for tokens in generated}) > 3, "equal responses would test little"


def test_prompts_are_the_same_tokens_in_training_and_generation(make_parts):
    model, tokenizer, batch = make_parts()
    prompts = prompts_of(model, tokenizer, batch)
    for branch, length in enumerate(batch.text.branch_length.tolist()):
        assert branch_ids(batch, branch)[:length] == branch_ids(prompts, branch)
    prefix_ids = batch.text.input_ids[:, : batch.text.prefix_length]
    assert torch.equal(prefix_ids, prompts.text.input_ids[:, : prompts.text.prefix_length])


@pytest.mark.parametrize("decoder", ["query", "deconv"])
def test_masks_of_generation_equal_those_of_training(make_parts, decoder):
    """What conditions the masks is there at test time: the answer is not in it."""
    model, tokenizer, batch = make_parts(f"model.pixel_decoder.type={decoder}")
    prompts = prompts_of(model, tokenizer, batch)
    with torch.no_grad():
        trained = model(batch)
        tested = model(prompts)
    torch.testing.assert_close(trained.mask_logits, tested.mask_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(trained.presence_logits, tested.presence_logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("decoder", ["query", "deconv"])
def test_a_batch_of_one_equals_its_share_of_a_larger_batch(make_parts, decoder):
    model, tokenizer, batch = make_parts(f"model.pixel_decoder.type={decoder}")
    collate = Collator(tokenizer, model.num_image_tokens, 4)
    with torch.no_grad():
        together = model(batch)
        for image, sample in enumerate(batch.samples):
            single = model(collate([sample]))
            in_image = batch.queries.image_index == image
            mask_logits = together.mask_logits[in_image]
            torch.testing.assert_close(mask_logits, single.mask_logits, atol=1e-5, rtol=0)
            presence_logits = together.presence_logits[in_image]
            torch.testing.assert_close(presence_logits, single.presence_logits, atol=1e-5, rtol=0)
            torch.testing.assert_close(together.depth[image], single.depth[0], atol=1e-4, rtol=1e-5)
