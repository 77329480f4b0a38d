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
