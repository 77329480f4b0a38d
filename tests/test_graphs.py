"""A captured pass gives what the pass itself gives."""

from __future__ import annotations

import pytest
import torch

from annexe import losses
from annexe.datasets.collate import Batch, Collator
from annexe.graphs import MULTIPLE, GraphedPass

NAMES = list(losses.TERMS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_gradients_equal_those_launched_one_by_one(make_parts):
    model, tokenizer, batch = make_parts()
    device = torch.device("cuda")
    model.to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def work(batch: Batch, factor: torch.Tensor) -> torch.Tensor:
        totals = losses.totals(model(batch), batch, NAMES)
        (factor * totals).sum().backward()
        return totals.detach()

    collate = Collator(tokenizer, model.num_image_tokens, 4, multiple=MULTIPLE)
    batches = [collate(batch.samples), collate(batch.samples[:1]), collate(batch.samples[::-1])]
    factor = torch.rand(len(NAMES), device=device)
    graphed = GraphedPass(work, trained, device)
    for one in batches * 3:  # met, captured, replayed; shapes take turns
        results = []
        for run, given in ((work, one.to(device)), (graphed, one)):
            torch._foreach_zero_([parameter.grad for parameter in trained])
            results.append((run(given, factor), [parameter.grad.clone() for parameter in trained]))
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    assert len(graphed.captured) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_replayed_steps_of_generation_say_the_same(make_parts, autocast):
    model, tokenizer, batch = make_parts("model.language_model.initializer_range=0.3")
    device = torch.device("cuda")
    model.to(device)
    collate = Collator(tokenizer, model.num_image_tokens, 4, responses=False)
    for samples in (batch.samples, batch.samples[:2], batch.samples):
        prompts, said = collate(samples).to(device), []
        for model.language_model.generator.graphs in (False, True):
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                said.append([(draft.analysis, draft.answer) for draft in model.draft(prompts, 20)])
        same = sum(one == other for one, other in zip(*said, strict=True))
        assert same == len(said[0]) or (autocast and same > 0.7 * len(said[0]))
    assert len(model.language_model.generator._captured) >= 2
