"""`annexe bench`: how fast this machine trains, generates, serves, reads data and scores."""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from annexe import terminal
from annexe.benchmarks.comparison import compare, tables
from annexe.benchmarks.evaluation_speed import measure_evaluation
from annexe.benchmarks.generation_speed import GenerationSettings, measure_generation
from annexe.benchmarks.loading_speed import measure_loading
from annexe.benchmarks.machine import describe_machine
from annexe.benchmarks.rewards_speed import measure_rewards
from annexe.benchmarks.scaling import beside, read_earlier
from annexe.benchmarks.scoring_speed import measure_scoring
from annexe.benchmarks.serving_speed import ServingSettings, measure_serving
from annexe.benchmarks.training_speed import DEFAULT_TOKENS, TrainingSettings, measure_training
from annexe.benchmarks.units import Record
from annexe.build import load_config
from annexe.errors import UserError
from annexe.files import require_writable, write_json
from annexe.workers import num_cores

_ABOUT = {
    "train": "time the training step on in-memory batches with random weights, or on its own data",
    "rewards": "time steps of training on rewards: drawing, scoring, the trained pass",
    "generate": "time the answers to random prompts, masks at full size and encoded included",
    "evaluate": "time an evaluation, from the configured photos to scores, with random weights",
    "serve": "time photos through the server, the predictor and generation, with random weights",
    "data": "time the training loader with an empty and with a filled cache of resized pixels",
    "metrics": "time the scoring of random predictions on drawn scenes",
}
_EXAMPLE = """\
example:
  annexe bench {words}
      a table of rates and times, and the same numbers as JSON
"""
# Options of each action that take whole numbers: name, default, meaning
_NUMBERS: dict[str, list[tuple[str, int | None, str]]] = {
    "train": [
        ("queries", None, "questions an image (default 1)"),
        ("tokens", None, f"packed tokens of an image, prefix included (default: {DEFAULT_TOKENS})"),
        ("steps", 20, "steps that count (default %(default)s)"),
        ("warmup", 5, "steps before them (default %(default)s)"),
    ],
    "rewards": [
        ("queries", None, "questions an image (default 1)"),
        ("steps", 5, "steps that count (default %(default)s)"),
        ("warmup", 2, "steps before them (default %(default)s)"),
    ],
    "generate": [
        ("queries", 1, "questions an image (default %(default)s)"),
        ("batch-size", None, "images a batch (default: run.batch_size)"),
        ("new-tokens", 50, "tokens of every response (default %(default)s)"),
        ("batches", 5, "batches that count (default %(default)s)"),
        ("warmup", 1, "batches before them (default %(default)s)"),
        ("height", 1080, "of the photos whose masks are made, in pixels (default %(default)s)"),
        ("width", 1920, "of the photos whose masks are made, in pixels (default %(default)s)"),
    ],
    "evaluate": [],
    "serve": [
        ("queries", 1, "questions a photo (default %(default)s)"),
        ("batch-size", None, "photos a batch (default: run.batch_size)"),
        ("new-tokens", 50, "tokens of every response (default %(default)s)"),
        ("batches", 5, "batches without the server (default %(default)s)"),
        ("warmup", 1, "batches before them (default %(default)s)"),
        ("clients", None, "clients at once (default: three batches)"),
        ("seconds", 30, "that clients ask (default %(default)s)"),
        ("words", 20, "answers streamed by an idle server (default %(default)s)"),
        ("height", 1080, "of the photos, in pixels (default %(default)s)"),
        ("width", 1920, "of the photos, in pixels (default %(default)s)"),
    ],
    "data": [("images", 256, "images to read (default %(default)s)")],
    "metrics": [
        ("queries", 1000, "questions (default %(default)s)"),
        ("workers", num_cores(), "processes (default: all cores)"),
    ],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="WHAT")
    for name, about in _ABOUT.items():
        words = f"{name} --json bench/{name}.json"
        if name != "metrics":
            words = f"{words} --cfg-path train_configs/annexe_tiny.yaml"
        action = terminal.add_command(actions, name, about, _EXAMPLE.format(words=words))

        # What is measured
        if name != "metrics":
            help = "configuration file with a model block"
            path = os.path.expanduser
            action.add_argument("--cfg-path", required=True, type=path, metavar="YAML", help=help)
            help = "settings put over the file"
            action.add_argument("--options", nargs="+", default=[], metavar="A.B=C", help=help)
        if name in ("train", "rewards", "generate"):
            help = "measure once more with these settings put over the others"
            action.add_argument("--against", nargs="+", metavar="A.B=C", help=help)
            help = "the configured weights, and to train the configured data, in place of random"
            action.add_argument("--real", action="store_true", help=help)
        if name == "generate":
            help = "draft run.draft_tokens; nearly all are right, for photos are answered again"
            action.add_argument("--drafts", action="store_true", help=help)
        if name == "train":
            help = "what --json wrote of one process and more, to be shown with the efficiency"
            action.add_argument("--beside", type=Path, nargs="+", metavar="FILE", help=help)
            help = "patches come with the batch, as with run.store_patches"
            action.add_argument("--stored", action="store_true", help=help)
        if name == "data":
            help = "processes (default: run.num_workers)"
            action.add_argument("--workers", type=int, nargs="+", metavar="N", help=help)

        # How much of it
        for option, default, help in _NUMBERS[name]:
            action.add_argument(f"--{option}", type=int, default=default, metavar="N", help=help)
        help = "write the numbers there too"
        action.add_argument("--json", type=Path, metavar="FILE", help=help)


def run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    if arguments.json is not None:
        require_writable(arguments.json)
    report: dict[str, Any] = {"what": arguments.action, "machine": describe_machine()}
    columns = _measure(arguments, report)
    if int(os.environ.get("RANK", "0")) != 0:
        return  # the main process tells
    for table in tables(report, columns):
        terminal.table(table.headers, table.rows, title=table.title)
    for note in report.get("notes", ()):
        terminal.say(f"- {note}")
    if arguments.json is not None:
        write_json(arguments.json, report)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse numbers that make no sense, and options that exclude each other."""
    # Whole numbers, alone or in lists; workers and warm-up may be 0
    for name, value in vars(arguments).items():
        may_be_zero = name in ("warmup", "workers") and arguments.action != "metrics"
        least = 0 if may_be_zero else 1
        for count in value if isinstance(value, list) else [value]:
            if isinstance(count, int) and not isinstance(count, bool) and count < least:
                raise UserError(f"--{name.replace('_', '-')} {count} must be at least {least}")

    # What is configured takes no numbers
    if arguments.action in ("train", "rewards") and arguments.real:
        for option in ("queries", "tokens", "stored"):
            if vars(arguments).get(option):
                raise UserError(f"--{option} is of in-memory batches; leave it out, or --real")
    if arguments.action == "train" and arguments.beside and arguments.against:
        raise UserError("--beside is of one configuration; leave --against out")


def _measure(arguments: argparse.Namespace, report: Record) -> dict[str, Record]:
    """Measure what was asked for and put it into the report; gives the columns of the table."""
    # Scoring and loading
    if arguments.action == "metrics":
        report["measured"] = measure_scoring(arguments.queries, arguments.workers)
        return {"": report["measured"]}
    report |= {"config": arguments.cfg_path, "options": arguments.options}
    if arguments.action == "data":
        config = load_config(arguments.cfg_path, arguments.options)
        report["measured"] = measure_loading(config, arguments.workers, arguments.images)
        return {f"{workers} workers": record for workers, record in report["measured"].items()}
    if arguments.action == "evaluate":
        config = load_config(arguments.cfg_path, arguments.options)
        report["measured"], report["notes"] = measure_evaluation(config)
        return {"": report["measured"]}
    if arguments.action == "serve":
        config = load_config(arguments.cfg_path, arguments.options)
        serving = ServingSettings(
            num_queries=arguments.queries,
            num_new_tokens=arguments.new_tokens,
            num_batches=arguments.batches,
            num_warmup_batches=arguments.warmup,
            batch_size=arguments.batch_size,
            num_clients=arguments.clients,
            seconds=arguments.seconds,
            num_first_words=arguments.words,
            photo_size=(arguments.height, arguments.width),
        )
        report["measured"], report["notes"] = measure_serving(config, serving)
        return {"": report["measured"]}

    # Training or generation, of one configuration or of two
    earlier = []
    if arguments.action in ("train", "rewards"):
        is_supervised = arguments.action == "train"
        training = TrainingSettings(
            num_queries=arguments.queries or 1,
            num_tokens=arguments.tokens if is_supervised else None,
            num_steps=arguments.steps,
            num_warmup_steps=arguments.warmup,
            real=arguments.real,
            stored=is_supervised and arguments.stored,
        )
        measure = partial(measure_rewards, settings=training)
        if is_supervised:
            earlier = read_earlier(arguments.beside or [], report)
            since_start = time.time() - psutil.Process().create_time()
            measure = partial(measure_training, settings=training, since_start=since_start)
    else:
        generation = GenerationSettings(
            num_queries=arguments.queries,
            num_new_tokens=arguments.new_tokens,
            num_batches=arguments.batches,
            num_warmup_batches=arguments.warmup,
            batch_size=arguments.batch_size,
            mask_size=(arguments.height, arguments.width),
            real=arguments.real,
            drafts=arguments.drafts,
        )
        measure = partial(measure_generation, settings=generation)
    compared, columns = compare(measure, arguments.cfg_path, arguments.options, arguments.against)
    report |= compared
    return beside(report["measured"], earlier) if earlier else columns
