"""Measures serving: photos a second through HTTP beside those without it, and the first word.

One model with random weights is measured in three ways, one after the other: `Annexe.generate` on
in-memory batches as `annexe bench generate` does it, the predictor on files of photos, and the
server with the same predictor. The server's clients run in a process of their own.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from annexe.benchmarks.generation_speed import (
    GenerationSettings,
    measure_generation,
    model_without_end,
)
from annexe.benchmarks.http_clients import Load, first_word_seconds, run_clients
from annexe.benchmarks.machine import release_memory
from annexe.benchmarks.random_model import require_language_model, with_random_weights
from annexe.benchmarks.timing import percentiles
from annexe.benchmarks.units import Record
from annexe.config import Config, device_settings
from annexe.distributed import make_accelerator
from annexe.errors import UserError
from annexe.inference.predictor import Predictor
from annexe.inference.results import Photo
from annexe.inference.server.extra import require_extra

if TYPE_CHECKING:
    from annexe.inference.server.engine import Engine

_MODEL = "random"
_QUESTIONS = (
    "Where is the thing that the right hand holds?",
    "Which hand holds the bottle?",
    "What does the left hand do?",
    "Show all that moves.",
)
_NUM_PHOTOS = 8
_NUM_UNCOUNTED_WORDS = 3
_CLIENTS_OF_A_BATCH = 3  # a batch in the model, one that is prepared, and one on its way


@dataclass(frozen=True)
class ServingSettings:
    """How a server is measured."""

    num_queries: int  # of a photo
    num_new_tokens: int  # of every response
    num_batches: int  # without the server
    num_warmup_batches: int
    batch_size: int | None  # photos; None for run.batch_size
    num_clients: int | None  # at once; None for three batches
    seconds: int  # that clients ask
    num_first_words: int  # streamed requests at an idle server
    photo_size: tuple[int, int]  # height, width


def measure_serving(config: Config, settings: ServingSettings) -> tuple[Record, list[str]]:
    """Time generation, the predictor and the server.

    Returns:
        The record, and notes on how it came about.

    Raises:
        UserError: for a configuration without a Llama, more questions than there are, and without
            the libraries of a server.
    """
    require_extra()
    require_language_model(config)
    if settings.num_queries > len(_QUESTIONS):
        raise UserError(f"--queries is {settings.num_queries}; ask at most {len(_QUESTIONS)}")
    batch_size = settings.batch_size or config.run.batch_size
    num_clients = settings.num_clients or _CLIENTS_OF_A_BATCH * batch_size
    questions = list(_QUESTIONS[: settings.num_queries])
    photos = _photos(settings.photo_size)

    # Without a server
    generation = GenerationSettings(
        num_queries=settings.num_queries,
        num_new_tokens=settings.num_new_tokens,
        num_batches=settings.num_batches,
        num_warmup_batches=settings.num_warmup_batches,
        batch_size=batch_size,
        mask_size=settings.photo_size,
        real=False,
    )
    plain, notes = measure_generation(config, generation)
    release_memory()
    random, _ = with_random_weights(config)
    load = partial(random_predictor, random, batch_size, settings.num_new_tokens)
    num_direct = batch_size * settings.num_batches
    direct = _predictor_speed(load(), photos, questions, num_direct)
    release_memory()

    # With it
    sizes: list[int] = []
    with _served(load, num_clients, sizes) as (engine, port):
        words = []
        for _ in range(_NUM_UNCOUNTED_WORDS + settings.num_first_words):
            words.append(first_word_seconds(port, _MODEL, photos[0], questions[0]))
        sizes.clear()
        clients = Load(
            port=port,
            photos=photos,
            questions=questions,
            num_clients=num_clients,
            warmup_seconds=settings.seconds / 3,
            seconds=settings.seconds,
        )
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            answered = process.submit(run_clients, clients).result()
        device = engine.facts.device
    release_memory()

    generated = plain["images_per_second"]
    notes.append("every token is a word of its own, so that the first one can be told")
    notes.append(f"photos are JPEGs of {len(photos[0]) / 1000:.0f} kB in base64")
    return {
        "images_per_batch": batch_size,
        "queries_per_image": settings.num_queries,
        "tokens_per_response": plain["tokens_per_response"],
        "clients": num_clients,
        "on_gpu": float(device.startswith("cuda")),
        "photos_per_second": {
            "generation": generated,
            "predictor": direct,
            "server": answered.per_second,
        },
        "server_over_generation": answered.per_second / generated,
        "server_over_predictor": answered.per_second / direct,
        "photos_of_a_batch": float(np.mean(sizes)),
        "failed_requests": answered.num_failed,
        "request_ms": percentiles(answered.latencies),
        "first_word_ms": percentiles(words[_NUM_UNCOUNTED_WORDS:]),
    }, notes


def random_predictor(config: Config, batch_size: int, max_new_tokens: int) -> Predictor:
    """A predictor with random weights, whose answers have their full length.

    Args:
        config: of `with_random_weights`.
        batch_size: photos at a time.
        max_new_tokens: tokens of a response.
    """
    accelerator = make_accelerator(**device_settings(config.run))
    model = model_without_end(config, accelerator)
    setattr(model.language_model.tokenizer, "decode", _numbered)  # noqa: B010  (a method)
    return Predictor(
        model,
        device=accelerator.device,
        autocast=accelerator.autocast,
        answer_format=None,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )


def _numbered(ids: Iterable[int]) -> str:
    """Tokens as words: the vocabulary of random weights may have no others."""
    return " ".join(f"w{token}" for token in ids)


def _photos(size: tuple[int, int]) -> list[bytes]:
    """Files of JPEGs with large shapes and some noise, as cameras make them."""
    generator = np.random.default_rng(0)
    height, width = size
    files = []
    for _ in range(_NUM_PHOTOS):
        coarse = generator.integers(0, 256, (9, 16, 3), np.uint8)
        shapes = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noise = generator.normal(0, 6, (height, width, 3))
        pixels = np.clip(np.asarray(shapes) + noise, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=85)
        files.append(file.getvalue())
    return files


def _predictor_speed(
    predictor: Predictor, photos: list[bytes], questions: list[str], num_photos: int
) -> float:
    """Photos a second through a predictor, decoding included."""

    def asked(count: int) -> Iterator[Photo]:
        for index in range(count):
            yield Photo.of(photos[index % len(photos)], questions)

    for _ in predictor.iterate(asked(predictor.batch_size)):
        pass
    start = time.perf_counter()
    for _ in predictor.iterate(asked(num_photos)):
        pass
    return num_photos / (time.perf_counter() - start)


@contextmanager
def _served(
    load: partial[Predictor], num_clients: int, sizes: list[int]
) -> Iterator[tuple[Engine, int]]:
    """A server with one worker in a thread of this process; its engine and port.

    Args:
        load: makes the predictor.
        num_clients: that may wait.
        sizes: gets the size of every batch.
    """
    import uvicorn

    from annexe.inference.server.app import Settings, make_app
    from annexe.inference.server.engine import Engine
    from annexe.inference.server.lifecycle import bind, worker_makers
    from annexe.inference.server.limits import Limits
    from annexe.inference.server.metrics import Metrics

    # Its engine
    limits = Limits(max_body_mb=100, queue=2 * num_clients, timeout=600)
    makers = worker_makers(load, min(1, torch.cuda.device_count()))
    engine = Engine(makers, limits, on_batch=lambda size, _: sizes.append(size))

    # The server, until the caller is done
    with bind("127.0.0.1", 0) as bound:
        engine.start()
        app = make_app(engine, Settings(_MODEL, limits), Metrics())
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield engine, bound.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
            engine.stop()
