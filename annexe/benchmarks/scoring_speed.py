"""Measures scoring: all metrics of random predictions for drawn scenes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from annexe import prompts
from annexe.benchmarks.machine import scratch_folder
from annexe.benchmarks.timing import SampledMemory
from annexe.benchmarks.units import Record
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.datasets.pixels import read_id_map
from annexe.evaluation import records
from annexe.evaluation.records import ImageRecord, PredictedMask, QueryRecord
from annexe.evaluation.scoring import score_all
from annexe.evaluation.truth import Truth
from annexe.rle import Rle, encode
from annexe.synthetic.generate import generate

_QUERIES_OF_SCENE = 60  # of a drawn image, at least
_NUM_SHIFTS = 4  # by which masks are moved
_SHIFT = 10  # pixels
_ANSWERED = 0.9  # share of the questions


def measure_scoring(num_queries: int, workers: int) -> Record:
    """Time `score_all` on predictions for drawn scenes.

    They are the true masks moved by some pixels; some are left out.
    """
    with scratch_folder(with_index_cache=True) as folder:
        # Scenes
        num_images = -(-num_queries // _QUERIES_OF_SCENE)
        generate(
            folder / "data",
            num_images=num_images,
            seed=0,
            val_fraction=0,
            test_fraction=1,
            num_workers=workers,
        )
        dataset = EgoIRGBench("test", 1, 0, None, data_root=str(folder / "data"))

        # Predictions, as many as were asked for
        predictions: list[records.Record] = []
        num_predicted = 0
        for record in random_predictions(Truth(dataset)):
            predictions.append(record)
            num_predicted += isinstance(record, QueryRecord)
            if num_predicted == num_queries:
                break

        # Scores
        started = time.perf_counter()
        with SampledMemory() as memory:
            score_all(predictions, Truth(dataset), workers=workers, progress=True)
        seconds = time.perf_counter() - started
    return {
        "queries": num_predicted,
        "images": sum(isinstance(record, ImageRecord) for record in predictions),
        "workers": workers,
        "seconds": seconds,
        "queries_per_second": num_predicted / seconds,
        "peak_memory_gb": {"all processes": memory.peak},
    }


def random_predictions(truth: Truth) -> Iterator[records.Record]:
    """Records for every question of a data set."""
    random = np.random.default_rng(0)
    for stem in truth.dataset.stems:
        annotations = truth.annotations(stem)
        shifted = _shifted_masks(truth, stem)

        # The image, then its questions, some of them refused
        yield ImageRecord(image=stem, analysis=annotations[0].caption)
        for index, annotation in enumerate(annotations):
            for question in annotation.questions:
                shift = int(random.integers(_NUM_SHIFTS))
                is_answered = random.random() < _ANSWERED
                masks = []
                for slot, mask_id in annotation.slots.items() if is_answered else ():
                    mask = shifted[mask_id, shift]
                    phrase = annotation.phrase(slot)
                    masks.append(PredictedMask(slot=slot, phrase=phrase, score=0.9, rle=mask))
                yield QueryRecord(
                    image=stem,
                    annotation=index,
                    query_id=question["id"],
                    query=question["query"],
                    answer=annotation.answer if is_answered else prompts.NO_TARGET_ANSWER,
                    presence=float(random.random()),
                    masks=masks,
                )


def _shifted_masks(truth: Truth, stem: str) -> dict[tuple[int, int], Rle]:
    """Every mask of an image by id and number of the shift that it was moved by."""
    id_map = read_id_map(truth.id_map(stem))
    masks = {}
    for mask_id in truth.named_ids(stem):
        for shift in range(_NUM_SHIFTS):
            masks[mask_id, shift] = encode(np.roll(id_map == mask_id, _SHIFT * shift, axis=1))
    return masks
