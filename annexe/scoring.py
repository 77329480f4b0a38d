"""Score predictions from their records and the data root alone, so that those of any system can be scored.

The records are the lines of ``predictions.jsonl``; nothing here needs a model.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from annexe.datasets.ego_irgbench import Annotation, EgoIRGBench, read_annotations
from annexe.datasets.prompts import NO_TARGET_ANSWER
from annexe.datasets.transforms import read_id_map
from annexe.errors import UserError
from annexe.metrics import DepthMetrics, GroundingMetrics, TextMetrics, encode

Record = dict[str, Any]


class Truth:
    """What a data set says is right, by stem and annotation number; masks as RLE at the original size."""

    def __init__(self, dataset: EgoIRGBench) -> None:
        self.dataset = dataset
        self._index = {stem: number for number, stem in enumerate(dataset.stems)}
        self._masks: dict[str, dict[int, dict]] = {}

    def annotations(self, stem: str) -> list[Annotation]:
        """Annotations of an image of the split."""
        if stem not in self._index:
            raise UserError(f"predicted image '{stem}' is not in split '{self.dataset.split}'; score the right split")
        return self.dataset.annotations[self._index[stem]]

    def masks(self, stem: str) -> dict[int, dict]:
        """Mask id -> RLE, for every id that an annotation of the image names."""
        if stem not in self._masks:
            ids = read_id_map(self.dataset.pixels.files(stem)[2])
            named = {mask_id for annotation in self.annotations(stem) for mask_id in annotation.slots.values()}
            self._masks[stem] = {mask_id: encode(ids == mask_id) for mask_id in sorted(named)}
        return self._masks[stem]


def score(records: list[Record], truth: Truth) -> dict[str, float]:
    """The standard metrics of a set of records (grounding after ReLA, CVPR 2023)."""
    analysis, answer, grounding, depth = TextMetrics(), TextMetrics(), GroundingMetrics(), DepthMetrics()
    images, queries = (_of_kind(records, kind) for kind in ("image", "query"))
    for record in images:
        analysis.update(record["image"], record["analysis"], truth.annotations(record["image"])[0].caption)
        if record["depth"]:
            depth.update(record["depth"])
    for record in queries:
        stem, number = record["image"], record["annotation"]
        annotation, masks = truth.annotations(stem)[number], truth.masks(stem)
        reference = truth.dataset.reference(annotation)
        key = f"{stem}/{number}/{record['query_id']}"
        answer.update(key, record["answer"], reference, has_target=bool(annotation.slots))
        targets = {slot: masks[mask_id] for slot, mask_id in annotation.slots.items()}
        labels = {slot: truth.dataset.label(stem, annotation.phrase(slot)) for slot in targets}
        grounding.update({mask["slot"]: mask["rle"] for mask in record["masks"]}, targets, labels)
    metrics = analysis.compute("analysis") | answer.compute("answer") | grounding.compute() | depth.compute()
    num_images = len({record["image"] for record in records})
    return metrics | {"num_queries": len(queries), "num_images": num_images}


def score_all(records: list[Record], truth: Truth) -> dict[str, Any]:
    """Standard metrics of the records, of the constant baselines on the same queries, and of the root's subsets."""
    metrics = {"standard": score(records, truth)}
    metrics["baselines"] = {name: score(made, truth) for name, made in constant_baselines(records, truth).items()}
    metrics["subsets"] = {}
    for path in sorted((truth.dataset.root / "subsets").glob("*.txt")):
        stems = set(path.read_text(encoding="utf-8").split())
        chosen = [record for record in records if record["image"] in stems]
        if chosen:
            metrics["subsets"][path.stem] = score(chosen, truth)
    return metrics


def constant_baselines(records: list[Record], truth: Truth) -> dict[str, list[Record]]:
    """Predictions that look at nothing, for the queries of ``records``.

    ``constant``: the most frequent training analysis and answer, and as mask the union of all hands and active objects
    (which no blind system could know: a generous bound). ``reject``: no query ever has a target.
    """
    analysis, answer = _frequent_texts(truth.dataset)
    images = [{**record, "analysis": analysis, "depth": None} for record in _of_kind(records, "image")]
    constant, reject = list(images), list(images)
    for record in _of_kind(records, "query"):
        masks = list(truth.masks(record["image"]).values())
        union = [{"slot": 0, "phrase": "", "score": 1.0, "rle": coco_mask.merge(masks)}] if masks else []
        constant.append({**record, "answer": answer, "masks": union})
        reject.append({**record, "answer": NO_TARGET_ANSWER, "masks": []})
    return {"constant": constant, "reject": reject}


def _of_kind(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def _frequent_texts(dataset: EgoIRGBench) -> tuple[str, str]:
    """Most frequent analysis and answer of the train split, or of the data set itself where there is none."""
    files = sorted(Path(dataset.root / "dataset_split" / "train").glob("*.json"))
    images = [read_annotations(path) for path in files] or dataset.annotations
    analyses = Counter(annotations[0].caption for annotations in images)
    answers = Counter(dataset.reference(annotation) for annotations in images for annotation in annotations)
    return analyses.most_common(1)[0][0], answers.most_common(1)[0][0]
