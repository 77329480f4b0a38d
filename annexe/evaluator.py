"""Predict a split, write the predictions, and score them from that file's records and the data root alone."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from annexe.datasets.collate import Batch, Collator, Sample
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.prompts import NO_TARGET_ANSWER
from annexe.datasets.transforms import read_id_map
from annexe.errors import UserError
from annexe.metrics import DepthMetrics, GroundingMetrics, TextMetrics, depth_errors, encode
from annexe.models.annexe import Annexe, Response

log = logging.getLogger(__name__)
Record = dict[str, Any]


class EvaluationSet(Dataset):
    """The images of a data set as evaluation samples."""

    def __init__(self, dataset: EgoIRGBench, queries_per_annotation: int) -> None:
        self.dataset, self.queries_per_annotation = dataset, queries_per_annotation

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset.evaluation_sample(index, self.queries_per_annotation)


def plan_batches(num_images: int, batch_size: int) -> list[list[int]]:
    """All batches of an evaluation in their one fixed order; ranks take whole ones, so nothing is padded or repeated."""
    return [list(range(first, min(first + batch_size, num_images))) for first in range(0, num_images, batch_size)]


def predict(
    model: Annexe,
    dataset: EgoIRGBench,
    batches: list[list[int]],
    *,
    queries_per_annotation: int,
    max_new_tokens: int,
    num_workers: int,
    device: torch.device,
    autocast: Any,
) -> Iterator[list[Record]]:
    """Records of each batch in turn: an image line an image, a query line a query."""
    tokenizer = model.language_model.tokenizer
    collate = Collator(tokenizer, model.num_image_tokens, model.pixel_decoder.num_slots, responses=False)
    loader = DataLoader(
        EvaluationSet(dataset, queries_per_annotation),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        generator=torch.Generator(),
    )
    training = model.training
    model.eval()
    for batch in loader:
        with autocast():
            responses = model.generate(batch.to(device), max_new_tokens)
        yield records_of(batch, responses)
    model.train(training)


def records_of(batch: Batch, responses: list[Response]) -> list[Record]:
    """The lines of ``predictions.jsonl`` for one batch."""
    records: list[Record] = []
    first = 0
    for sample in batch.samples:
        own = responses[first : first + len(sample.turns)]
        first += len(sample.turns)
        depth = depth_errors(own[0].depth, sample.depth)
        records.append({"kind": "image", "image": sample.stem, "analysis": own[0].analysis, "depth": depth})
        for turn, response in zip(sample.turns, own, strict=True):
            masks = [
                {"slot": t.slot, "phrase": t.phrase, "score": round(t.score, 6), "rle": encode(t.mask)}
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
                    "masks": masks,
                }
            )
    return records


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write JSON lines, whole or not at all."""
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(part, path)


def read_records(path: Path) -> list[Record]:
    """Read a predictions file; a line that is not JSON is named by its number."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"'{path}', line {number} is not JSON ({error}); remove or mend it") from None
    return records


class Truth:
    """What a data set says is right, by stem and annotation number; masks as RLE at the original size."""

    def __init__(self, dataset: EgoIRGBench) -> None:
        self.dataset = dataset
        self.index = {stem: number for number, stem in enumerate(dataset.stems)}

    def annotations(self, stem: str) -> list:
        if stem not in self.index:
            raise UserError(f"predicted image '{stem}' is not in split '{self.dataset.split}'; score the right split")
        return self.dataset.annotations[self.index[stem]]

    def masks(self, stem: str) -> dict[int, dict]:
        """Mask id -> RLE, for every id that an annotation of the image names."""
        ids = read_id_map(self.dataset.pixels.files(stem)[2])
        named = {mask_id for annotation in self.annotations(stem) for mask_id in annotation.slots.values()}
        return {mask_id: encode(ids == mask_id) for mask_id in sorted(named)}


def score(records: list[Record], truth: Truth) -> dict[str, float]:
    """The standard metrics of a set of records (ReLA, CVPR 2023, for the grounding ones)."""
    analysis, answer, grounding, depth = TextMetrics(), TextMetrics(), GroundingMetrics(), DepthMetrics()
    queries: dict[str, list[Record]] = {}
    images = [record for record in records if record["kind"] == "image"]
    for record in records:
        if record["kind"] == "query":
            queries.setdefault(record["image"], []).append(record)
    for record in images:
        analysis.update(record["image"], record["analysis"], truth.annotations(record["image"])[0].caption)
        if record["depth"]:
            depth.update(record["depth"])
    for stem, asked in queries.items():
        masks = truth.masks(stem)
        for record in asked:
            annotation = truth.annotations(stem)[record["annotation"]]
            key = f"{stem}/{record['annotation']}/{record['query_id']}"
            has_target = bool(annotation.slots)
            answer.update(key, record["answer"], truth.dataset.reference(annotation), has_target=has_target)
            targets = {slot: masks[mask_id] for slot, mask_id in annotation.slots.items()}
            labels = {slot: truth.dataset.label(stem, annotation.phrase(slot)) for slot in targets}
            grounding.update({m["slot"]: m["rle"] for m in record["masks"]}, targets, labels)
    metrics = analysis.compute("analysis") | answer.compute("answer") | grounding.compute() | depth.compute()
    num_queries = sum(len(asked) for asked in queries.values())
    return metrics | {"num_queries": num_queries, "num_images": len(set(queries) | {r["image"] for r in images})}
