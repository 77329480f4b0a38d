"""The one way from pixels and questions to answers and masks, outside of an evaluation.

A photo goes through three steps. The first and the last need no device and run in threads beside
it, the first ahead of it and the last behind:

    prepare    Photo -> Sample            decode, resize, check the questions
    generate   Samples -> ImageResponses  the model, a batch at a time
    finish     -> PhotoResult             masks at the size of the photo, run lengths, records

Legend: S side of the square that the model sees.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
import torch
from PIL import Image

from annexe.build import answer_format_of, load_config, restore_model
from annexe.checkpoints.run_folder import (
    evaluation_of,
    load_progress,
    run_of,
    without_sources,
)
from annexe.config import Config, device_settings
from annexe.distributed import make_accelerator
from annexe.errors import UserError, unknown_name_error
from annexe.evaluation.predict import prompt_collator, records_of_image
from annexe.evaluation.records import ImageRecord, QueryRecord
from annexe.hub.runs import require_run
from annexe.inference.results import Answer, ImageInput, Photo, PhotoResult, asked_of
from annexe.models.annexe import Annexe, TextListener
from annexe.models.language_model.tokenizer import PLACEHOLDER, TEMPLATE_TOKENS
from annexe.structures.prediction import ImageResponses
from annexe.structures.sample import Sample, Turn
from annexe.workers import in_threads, num_cores

# What a training may have set and a predictor does without
_SIMPLE = ("run.num_workers=0", "run.parallel=ddp")
_PRECISIONS = {"auto": "auto", "float32": "fp32", "bfloat16": "bf16"}
_MAX_THREADS = 8  # that decode photos and encode masks beside a GPU
_LAST_WORD = re.compile(r"\S+\Z")
# A placeholder, or a special token of chat models such as <|im_end|>
_PROMPT_TOKEN = re.compile(rf"{PLACEHOLDER.pattern}|<\|\w+\|>")


@dataclass(frozen=True)
class Prepared:
    """A photo as the model sees it."""

    photo: Photo
    sample: Sample


def check_question(question: str) -> None:
    """Refuse what is no question, and what would end the prompt before its end.

    Raises:
        UserError: naming the question.
    """
    if not isinstance(question, str):
        raise UserError(f"a question is of type {type(question).__name__}; give text")
    try:
        question.encode()
    except UnicodeEncodeError:
        raise UserError(f"question {question!r} is not UTF-8; write it again") from None
    if not question.strip():
        raise UserError("a question is empty; write one")
    holds_template_token = any(token in question for token in TEMPLATE_TOKENS)
    if holds_template_token or _PROMPT_TOKEN.search(question):
        raise UserError(
            f"question '{question}' holds a token of the prompt, such as <MSK_0> or [INST]; "
            "leave it out"
        )


def inference_config(
    run_folder: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    batch_size: int = 4,
    options: Sequence[str] = (),
) -> tuple[Config, Path]:
    """The configuration of a run as a predictor takes it, and the checkpoint that it restores.

    Args:
        run_folder: of a training run, or one of its checkpoints; of a run the best one counts.
            ``user/repo`` is a run on the hub, unless there is such a folder.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``auto`` (bfloat16 on a GPU), ``float32`` or ``bfloat16``.
        compile: compile the blocks, which takes minutes and pays for many photos.
        batch_size: photos at a time.
        options: settings ``a.b=c`` put over all of these.

    Raises:
        UserError: for a folder without a checkpoint, and for settings that do not fit.
    """
    if dtype not in _PRECISIONS:
        raise unknown_name_error("dtype", dtype, _PRECISIONS)
    checkpoint = require_run(run_folder)
    settings = [
        *_SIMPLE,
        f"run.device={device}",
        f"run.mixed_precision={_PRECISIONS[dtype]}",
        f"run.compile={str(compile).lower()}",
        "run.cuda_graphs=true",  # they are used where there is a GPU
        f"run.batch_size={batch_size}",
        *options,
    ]
    return load_config(checkpoint / "config.yaml", settings), checkpoint


class Predictor:
    """A trained model that analyzes photos, answers questions about them and draws masks.

    One thread at a time may use it.

    Args:
        model: ready to answer.
        device: where it is.
        autocast: of the precision that it computes in.
        answer_format: ``sentence`` or ``phrases``, as it was trained; None for free text.
        batch_size: photos that go through the model together.
        max_new_tokens: tokens of an analysis or answer, at most.
        about: what there is to know of the model, for people.
    """

    def __init__(
        self,
        model: Annexe,
        *,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        answer_format: str | None,
        batch_size: int = 4,
        max_new_tokens: int = 50,
        about: dict[str, Any] | None = None,
    ) -> None:
        self.model = model.eval()
        self.device = device
        self.autocast = autocast
        self.answer_format = answer_format
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.about = about or {}
        self.image_size = model.rgb_encoder.image_size
        self._num_threads = min(num_cores(), _MAX_THREADS) if device.type == "cuda" else 0
        self._collate = prompt_collator(model, max_new_tokens)

    @classmethod
    def from_run(
        cls,
        run_folder: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        compile: bool = False,
        batch_size: int = 4,
        max_new_tokens: int | None = None,
        options: Sequence[str] = (),
    ) -> Predictor:
        """The model of a training run.

        Args:
            max_new_tokens: tokens of an analysis or answer, at most (default: the run's setting).

        The others are those of `inference_config`.

        Raises:
            UserError: for a folder without a checkpoint, a damaged one, and settings that do not
                fit.
        """
        config, checkpoint = inference_config(
            run_folder,
            device=device,
            dtype=dtype,
            compile=compile,
            batch_size=batch_size,
            options=options,
        )
        if max_new_tokens is not None:
            config = replace(config, run=replace(config.run, max_new_tokens=max_new_tokens))
        return cls.from_config(config, checkpoint)

    @classmethod
    def from_config(cls, config: Config, checkpoint: Path) -> Predictor:
        """The model of a checkpoint, under a configuration that `inference_config` gave.

        Raises:
            UserError: for a damaged checkpoint, or one of another model than configured.
        """
        # The model: weights come from the checkpoint, not from where the training had them
        accelerator = make_accelerator(**device_settings(config.run))
        config = replace(config, model=without_sources(config.require_model(), checkpoint))
        answer_format = answer_format_of(config.datasets)
        model = restore_model(config, checkpoint, accelerator)

        # What the server and the page tell of it
        run_folder = run_of(checkpoint)
        about = {
            "run": str(run_folder),
            "checkpoint": str(checkpoint),
            "step": load_progress(checkpoint).step,
            "dataset": ", ".join(config.datasets),
            "data_root": str(next(iter(config.datasets.values())).get("data_root")),
            "answer_format": answer_format,
            "image_size": model.rgb_encoder.image_size,
            "num_slots": model.pixel_decoder.num_slots,
            "max_new_tokens": config.run.max_new_tokens,
            "scores": evaluation_of(run_folder).get("standard", {}),
        }
        return cls(
            model,
            device=accelerator.device,
            autocast=accelerator.autocast,
            answer_format=answer_format,
            batch_size=config.run.batch_size,
            max_new_tokens=config.run.max_new_tokens,
            about=about,
        )

    def predict(
        self,
        images: ImageInput | Sequence[ImageInput],
        questions: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
    ) -> list[PhotoResult]:
        """Analyze photos and answer questions about them.

        Args:
            images: one or many: paths, bytes of files, PIL images, or RGB arrays uint8[H, W, 3].
            questions: one or several that are asked of every photo, or a list of questions for
                each photo. Without any, photos are analyzed alone.

        Returns:
            A result for each photo, in order.

        Raises:
            UserError: the first photo that cannot be read, or question that cannot be asked.
        """
        results = []
        for result in self.iterate(_photos_of(images, questions)):
            if isinstance(result, UserError):
                raise result
            results.append(result)
        return results

    def iterate(self, photos: Iterable[Photo]) -> Iterator[PhotoResult | UserError]:
        """Results of any number of photos in order, made as they are asked for.

        Memory does not grow with their number. A photo that cannot be answered costs itself alone.

        Yields:
            A result, or why there is none.
        """
        prepared = in_threads(self.prepare, _in_groups(photos, self.batch_size), self._num_threads)
        generated = map(self.generate, prepared)
        for results in in_threads(finish, generated, self._num_threads):
            yield from results

    @torch.no_grad()
    def answer_batch(
        self, photos: Sequence[Photo], on_text: TextListener | None = None
    ) -> list[PhotoResult | UserError]:
        """Results of photos that go through the model together.

        Args:
            photos: as many as the device takes at once.
            on_text: is told how texts grow: which photo, which of its questions (None: the
                analysis), and the text so far. The last word of it may still change.

        Returns:
            For each photo a result, or why there is none.
        """
        prepared = list(map(self.prepare, photos))
        return list(map(finish, self.generate(prepared, on_text)))

    def stream(self, image: ImageInput, question: str) -> Iterator[str | PhotoResult]:
        """An answer word by word, as it is generated.

        Yields:
            Pieces of the answer's text; joined they are all of it. Then the result.

        Raises:
            UserError: for a photo that cannot be read, or a question that cannot be asked.
        """
        # The batch runs in a thread of its own, which tells this one what there is
        events: SimpleQueue[str | PhotoResult | Exception] = SimpleQueue()
        photo = Photo.of(image, [question])
        num_threads = torch.get_num_threads()

        def on_text(_: int, query: int | None, text: str) -> None:
            if query is not None:
                events.put(text)

        def answer() -> None:
            torch.set_num_threads(num_threads)  # a thread starts with one for every core
            try:
                events.put(self.answer_batch([photo], on_text)[0])
            except Exception as error:  # whatever it is, it is raised where the words are read
                events.put(error)

        Thread(target=answer, daemon=True).start()
        words = NewWords()
        while isinstance(event := events.get(), str):
            yield from words.grow(event)
        if isinstance(event, Exception):
            raise event
        yield from words.finish(event.answers[0].text)
        yield event

    # The three steps

    def prepare(self, photo: Photo) -> Prepared | UserError:
        """A photo as the model sees it, or why it cannot be."""
        try:
            for question in photo.questions:
                check_question(question)
                self._require_plain_words(question)
            sample = self._sample(photo)
            self._collate([sample])  # which refuses questions that are too long
            return Prepared(photo, sample)
        except UserError as error:
            return error

    def _require_plain_words(self, question: str) -> None:
        """Refuse a special word of the model's own tokenizer in a question.

        Raises:
            UserError: naming the word.
        """
        for word in self.model.language_model.tokenizer.special_words:
            if word in question:
                raise UserError(
                    f"question '{question}' holds '{word}', a token of the prompt; leave it out"
                )

    def _sample(self, photo: Photo) -> Sample:
        """A photo with its questions; a question is an annotation with one wording."""
        square = (self.image_size, self.image_size)
        size = photo.size
        pixels = photo.read(at_least=2 * self.image_size)  # as a data set reads it
        turns = []
        for index, question in enumerate(photo.questions):
            turns.append(Turn(index, 0, question, "", []))
        return Sample(
            stem=photo.name,
            image=np.asarray(pixels.resize(square, Image.Resampling.BICUBIC)),
            depth=np.zeros(square, np.float32),
            target_ids=np.zeros(square, np.uint8),
            analysis="",
            turns=turns,
            original_size=size,
            answer_format=self.answer_format,
        )

    def generate(
        self, prepared: Sequence[Prepared | UserError], on_text: TextListener | None = None
    ) -> list[tuple[Prepared, ImageResponses] | UserError]:
        """What the model says about each photo of a batch, or its error as it is."""
        places = [index for index, item in enumerate(prepared) if isinstance(item, Prepared)]
        readable = [item for item in prepared if isinstance(item, Prepared)]
        if not readable:
            return [item for item in prepared if isinstance(item, UserError)]

        def on_text_of_photo(image: int, query: int | None, text: str) -> None:
            assert on_text is not None
            on_text(places[image], query, text)

        batch = self._collate([item.sample for item in readable])
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        with torch.no_grad(), self.autocast():
            images = self.model.generate(
                batch.to(self.device),
                self.max_new_tokens,
                None if on_text is None else on_text_of_photo,
            )
        said = dict(zip(places, zip(readable, images, strict=True), strict=True))
        results: list[tuple[Prepared, ImageResponses] | UserError] = []
        for index, item in enumerate(prepared):
            results.append(item if isinstance(item, UserError) else said[index])
        return results


class NewWords:
    """Cuts a growing text into pieces of whole words, each told once.

    The last word of a text that still grows may change, and is held back.
    """

    def __init__(self) -> None:
        self.told = ""

    def grow(self, text: str) -> Iterator[str]:
        """The words that are new in ``text`` and complete, as one piece, if there are any."""
        yield from self._tell(_LAST_WORD.sub("", text))

    def finish(self, text: str) -> Iterator[str]:
        """What is left of the whole ``text``, as one piece, if there is anything."""
        yield from self._tell(text)

    def _tell(self, text: str) -> Iterator[str]:
        if len(text) > len(self.told) and text.startswith(self.told):
            piece = text[len(self.told) :]
            self.told = text
            yield piece


def finish(said: tuple[Prepared, ImageResponses] | UserError) -> PhotoResult | UserError:
    """The result of a photo, or its error as it is."""
    if isinstance(said, UserError):
        return said
    prepared, responses = said
    answers = []
    photo_record: ImageRecord | None = None
    for record in records_of_image(prepared.sample, responses):
        if isinstance(record, QueryRecord):
            answers.append(Answer(record, prepared.photo))
        else:
            photo_record = record
    assert photo_record is not None
    return PhotoResult(
        source=prepared.photo,
        size=prepared.sample.original_size,
        record=photo_record,
        depth=responses.depth,
        answers=answers,
    )


def _photos_of(
    images: ImageInput | Sequence[ImageInput],
    questions: str | Sequence[str] | Sequence[Sequence[str]] | None,
) -> Iterator[Photo]:
    """Photos with their questions.

    Raises:
        UserError: if there are lists of questions, and not one for each photo.
    """
    inputs: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
    asked = asked_of(questions)
    for_each: list[Any] = [asked] * len(inputs)
    if any(not isinstance(question, str) for question in asked):
        for_each = list(asked)
        if len(asked) != len(inputs):
            raise UserError(
                f"there are {len(asked)} lists of questions for {len(inputs)} photos; give one "
                "for each photo, or one list of texts for all"
            )
    for index, (image, own) in enumerate(zip(inputs, for_each, strict=True)):
        photo = Photo.of(image, own)
        is_unnamed = photo.name == Photo.name and len(inputs) > 1
        yield replace(photo, name=f"{photo.name}-{index + 1}") if is_unnamed else photo


def _in_groups(photos: Iterable[Photo], size: int) -> Iterator[list[Photo]]:
    """The photos, ``size`` at a time."""
    remaining = iter(photos)
    for first in remaining:
        yield list(chain([first], islice(remaining, size - 1)))
