"""How fast predictions are scored."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from annexe import prompts
from annexe.benchmarks.loading_speed import _QUERIES_OF_SCENE
from annexe.benchmarks.random_model import scratch
from annexe.benchmarks.timing import Record, SampledMemory
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.pixels import read_id_map
from annexe.evaluation.records import Record as Prediction
from annexe.evaluation.scoring import score_all
from annexe.evaluation.truth import Truth
from annexe.rle import encode
from annexe.synthetic.generate import generate


def measure_scoring(num_queries: int, workers: int) -> Record:
    """Time `score_all` on predictions for drawn scenes: the true masks moved by some pixels, some left out."""
    with scratch(own_cache=True) as folder:
        number = -(-num_queries // _QUERIES_OF_SCENE)
        generate(
            folder / "data",
            num_images=number,
            seed=0,
            val_fraction=0,
            test_fraction=1,
            num_workers=workers,
        )
        dataset = EgoIRGBench("test", 1, 0, None, data_root=str(folder / "data"))
        records, asked = [], 0
        for record in random_predictions(Truth(dataset)):
            records.append(record)
            asked += record["kind"] == "query"
            if asked == num_queries:
                break
        started = time.perf_counter()
        with SampledMemory() as memory:
            score_all(records, Truth(dataset), workers=workers, progress=True)
        seconds = time.perf_counter() - started
    return {
        "queries": asked,
        "images": sum(record["kind"] == "image" for record in records),
        "workers": workers,
        "seconds": seconds,
        "queries_per_second": asked / seconds,
        "peak_memory_gb": {"all processes": memory.peak},
    }


def random_predictions(truth: Truth) -> Iterator[Prediction]:
    """Lines of a predictions file for every question of a data set."""
    random = np.random.default_rng(0)
    for stem in truth.dataset.stems:
        annotations, ids = truth.annotations(stem), read_id_map(truth.id_map(stem))
        moved = {
            (i, by): encode(np.roll(ids == i, 10 * by, axis=1))
            for i in truth.named(stem)
            for by in range(4)
        }
        yield {"kind": "image", "image": stem, "analysis": annotations[0].caption, "depth": None}
        for number, annotation in enumerate(annotations):
            for question in annotation.questions:
                by, there = int(random.integers(4)), random.random() < 0.9
                masks = [
                    {
                        "slot": slot,
                        "phrase": annotation.phrase(slot),
                        "score": 0.9,
                        "rle": moved[i, by],
                    }
                    for slot, i in annotation.slots.items()
                    if there
                ]
                yield {
                    "kind": "query",
                    "image": stem,
                    "annotation": number,
                    "query_id": question["id"],
                    "query": question["query"],
                    "answer": annotation.answer if there else prompts.NO_TARGET_ANSWER,
                    "presence": float(random.random()),
                    "masks": masks,
                }
