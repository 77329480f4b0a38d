"""Measures an evaluation from photos on disk to scores, beside generation from memory."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

from accelerate import Accelerator

from annexe.benchmarks.generation_speed import model_without_end
from annexe.benchmarks.random_model import require_language_model, without_files
from annexe.benchmarks.timing import peak_memory, reset_peak
from annexe.benchmarks.units import Record
from annexe.build import build_dataset
from annexe.config import Config, device_settings
from annexe.datasets.ego_irgbench import EgoIRGBench
from annexe.distributed import from_main, make_accelerator
from annexe.evaluation.batches import by_size
from annexe.evaluation.clock import Clock, num_batches_of_start
from annexe.evaluation.predict import (
    PredictionSettings,
    answer_batches,
    load_batches,
    plan_batches,
)
from annexe.evaluator import Evaluation, evaluate_model
from annexe.models.annexe import Annexe
from annexe.models.language_model.tokenizer import TextTokenizer, train_tokenizer

_MOST_IN_MEMORY = 64  # batches of a process; one of 10 photos at 448 pixels takes 20 MB


def measure_evaluation(config: Config) -> tuple[Record, list[str]]:
    """Time the evaluation of ``run.split`` with random weights of the configured sizes.

    Afterwards the same model answers the same questions of the same batches, which are in memory
    by then: what the evaluation could reach if nothing but generation took time.

    Returns:
        The record, and notes on how it came about.

    Raises:
        UserError: for a configuration without a Llama, or data that cannot be used.
    """
    # Data and model
    require_language_model(config)
    dataset = build_dataset(config, config.run.split, cached=False)
    config, tokenizer, notes = without_files(config)
    config.require_model()["language_model"]["vocab_size"] = tokenizer.vocab_size
    if not isinstance(tokenizer, TextTokenizer):
        trained = train_tokenizer(dataset.texts(), tokenizer.num_slots)
        tokenizer = TextTokenizer(trained.base, tokenizer.num_slots, tokenizer.vocab_size)
    notes = [
        "weights are random: every response runs to its full length, and masks are noise",
        *notes,
    ]
    accelerator = make_accelerator(**device_settings(config.run))
    model = model_without_end(config, accelerator, tokenizer)
    reset_peak(accelerator.device)

    # The evaluation, from the start of this process on
    clock = Clock(num_batches_of_start(config.run))
    is_main = accelerator.is_main_process
    made = tempfile.mkdtemp(prefix="annexe-bench-") if is_main else ""
    folder = Path(from_main(accelerator, made))
    try:
        run = replace(config.run, output_dir=str(folder))
        (name,) = config.datasets
        meta = {"dataset": name, "split": run.split}
        evaluation = Evaluation(replace(config, run=run), accelerator, None, dataset, model, meta)
        evaluate_model(evaluation, clock)
        accelerator.wait_for_everyone()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    timing = clock.record()

    # Generation alone
    rate = _generation_rate(model, dataset, config, accelerator)
    seconds = timing.pop("seconds_of_batches", [])
    notes.append(f"seconds of each batch: {' '.join(f'{value:.2f}' for value in seconds)}")
    num_questions = sum(map(len, dataset.annotations))
    return {
        "processes": accelerator.num_processes,
        "images_per_batch": config.run.batch_size,
        "images": len(dataset),
        "annotations_per_image": num_questions / len(dataset),
        **timing,
        "photos_per_second_of_generation_alone": rate,
        "share_of_generation_alone": timing.get("photos_per_second", 0.0) / rate,
        "peak_memory_gb": peak_memory(accelerator.device),
    }, notes


def _generation_rate(
    model: Annexe, dataset: EgoIRGBench, config: Config, accelerator: Accelerator
) -> float:
    """Photos a second of all processes, from batches in memory, after a first round."""
    run = config.run
    batches = plan_batches(len(dataset), run.batch_size)
    order = by_size(dataset, batches, run.queries_per_annotation)
    shared_out = order[accelerator.process_index :: accelerator.num_processes]
    own = [batches[index] for index in islice(shared_out, _MOST_IN_MEMORY)]
    settings = PredictionSettings.of_run(run, accelerator)
    loaded = list(load_batches(model, dataset, own, settings))

    # Two rounds, of which the second counts
    for _ in range(2):
        accelerator.wait_for_everyone()
        started = time.perf_counter()
        num_photos = 0
        for images in answer_batches(model, loaded, settings):
            num_photos += len(images)
        seconds = time.perf_counter() - started
    return num_photos * accelerator.num_processes / seconds
