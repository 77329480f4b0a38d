"""Model to records of predictions."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from annexe.datasets.collate import Collator
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.egohos import EgoHOS
from annexe.datasets.photos import Photos
from annexe.evaluation.records import Record
from annexe.metrics import depth_errors
from annexe.models.annexe import Annexe
from annexe.models.mask_postprocessing import postprocess
from annexe.structures.prediction import RawResponse
from annexe.structures.sample import Sample
from annexe.workers import in_threads


class EvaluationSet(Dataset):
    """The images of a data set as evaluation samples."""

    def __init__(
        self, dataset: EgoIRGBench | EgoHOS | Photos, queries_per_annotation: int | str
    ) -> None:
        self.dataset, self.queries_per_annotation = dataset, queries_per_annotation

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset.evaluation_sample(index, self.queries_per_annotation)


def plan_batches(num_images: int, batch_size: int) -> list[list[int]]:
    """All batches of an evaluation in one fixed order; ranks take whole ones, so nothing is padded or repeated."""
    return [
        list(range(first, min(first + batch_size, num_images)))
        for first in range(0, num_images, batch_size)
    ]


def predict(
    model: Annexe,
    dataset: EgoIRGBench | EgoHOS | Photos,
    batches: list[list[int]],
    *,
    queries_per_annotation: int | str,
    max_new_tokens: int,
    num_workers: int,
    device: torch.device,
    autocast: Any,
) -> Iterator[list[Record]]:
    """Records of each batch in turn: an image line an image, a query line a query.

    ``num_workers`` processes load the batches ahead of the device, and as many threads make records of those behind it,
    off a GPU with masks brought to full size; with 0 the main thread does both.
    """
    tokenizer = model.language_model.tokenizer
    collate = Collator(
        tokenizer, model.num_image_tokens, model.pixel_decoder.num_slots, responses=False
    )
    loader = DataLoader(
        EvaluationSet(dataset, queries_per_annotation),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )

    def drafts() -> Iterator[list[tuple[Sample, list[RawResponse]]]]:
        for batch in loader:
            with autocast():
                drafted = iter(model.generate_raw(batch.to(device), max_new_tokens))
            yield [(sample, list(islice(drafted, len(sample.turns)))) for sample in batch.samples]

    training = model.training
    model.eval()
    for records in in_threads(records_of, drafts(), num_workers):
        yield list(chain.from_iterable(records))
    model.train(training)
    model.text_decoder.release()


def records_of(drafted: tuple[Sample, list[RawResponse]]) -> list[Record]:
    """The lines of ``predictions.jsonl`` for one image."""
    sample, drafts = drafted
    depth = depth_errors(drafts[0].depth, sample.depth)
    records: list[Record] = [
        {"kind": "image", "image": sample.stem, "analysis": drafts[0].analysis, "depth": depth},
    ]
    for turn, draft in zip(sample.turns, drafts, strict=True):
        response = postprocess(draft)
        masks = [
            {"slot": t.slot, "phrase": t.phrase, "score": round(t.score, 6), "rle": t.rle}
            for t in response.targets
        ]
        records.append(
            {
                "kind": "query",
                "image": sample.stem,
                "annotation": turn.annotation,
                "query_id": turn.query_id,
                "query": turn.query,
                "answer": response.answer,
                "presence": round(response.presence, 6),
                "slot_scores": [
                    round(score, 12) for score in draft.scores
                ],  # thresholds are set by them
                "masks": masks,
            }
        )
    return records
