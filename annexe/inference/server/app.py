"""The routes of a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from annexe import __version__
from annexe.errors import UserError
from annexe.evaluation.records import split_kinds
from annexe.inference.predictor import NewWords, check_question
from annexe.inference.results import Photo
from annexe.inference.server import chat
from annexe.inference.server.engine import Engine
from annexe.inference.server.errors import ApiError, internal_error, invalid, json_response
from annexe.inference.server.guard import Guard
from annexe.inference.server.limits import MAX_NAME_LENGTH, Limits
from annexe.inference.server.masks import MaskFormat, records_as_json
from annexe.inference.server.metrics import Metrics
from annexe.inference.server.photos import check_photo, decode_photo, fetch_photo, is_url
from annexe.inference.server.schemas import (
    ChatBody,
    PredictBody,
    PredictForm,
    read_body,
    validated,
)
from annexe.inference.server.worker import Done

Result = TypeVar("Result")

_JSON = "application/json"
_FORM = "multipart/form-data"


@dataclass(frozen=True)
class Settings:
    """How a server answers.

    Attributes:
        model_name: under which clients ask for the model.
        limits: of what they may ask.
        token: that they have to send; None lets all in.
        allow_urls: photos may be addresses, which the server fetches.
        has_page: the page is mounted beside the API.
    """

    model_name: str
    limits: Limits
    token: str | None = None
    allow_urls: bool = False
    has_page: bool = False


class ErrorFields(BaseModel):
    """What is wrong, and what helps."""

    message: str
    type: str
    code: str


class ErrorBody(BaseModel):
    """What every error looks like."""

    error: ErrorFields


def make_app(engine: Engine, settings: Settings, metrics: Metrics) -> FastAPI:
    """The API over an engine that has started."""
    app = FastAPI(title="annexe", version=__version__, docs_url=None, redoc_url=None)
    server = _Server(engine, settings, metrics)
    responses: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorBody}}
    app.add_api_route(
        "/v1/predict",
        server.predict,
        methods=["POST"],
        responses=responses,
        summary="Analyze a photo, and answer questions about it with masks",
        openapi_extra=_body_schema(PredictBody, PredictForm),
    )
    app.add_api_route(
        "/v1/chat/completions",
        server.complete_chat,
        methods=["POST"],
        responses=responses,
        summary="The same in OpenAI's form",
        openapi_extra=_body_schema(ChatBody),
    )
    app.add_api_route("/v1/models", server.list_models, methods=["GET"], responses=responses)
    app.add_api_route("/health", server.show_health, methods=["GET"], responses=responses)
    app.add_api_route("/metrics", server.show_metrics, methods=["GET"], responses=responses)

    # One form for all errors
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(Exception, _on_error)
    app.add_middleware(
        Guard,
        engine=engine,
        limits=settings.limits,
        metrics=metrics,
        token=settings.token,
        has_page=settings.has_page,
    )
    return app


class _Server:
    """Answers requests."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self.engine = engine
        self.settings = settings
        self.limits = settings.limits
        self.metrics = metrics
        self.start_time = int(time.time())

    # Routes

    async def predict(self, request: Request) -> Response:
        """All records of a photo."""
        body = await request.body()
        content_type = _content_type(request)
        if content_type == _JSON:
            photo, mask_format = await run_in_threadpool(self._photo_of_json, body)
        elif content_type == _FORM:
            photo, mask_format = await self._photo_of_form(request)
        else:
            raise _wrong_content_type(f"{_JSON} or {_FORM}")
        done = await self._answer(request, photo)
        records = await _records(done, mask_format)
        return Response(f'{{"records": {records}}}', media_type=_JSON)

    async def complete_chat(self, request: Request) -> Response:
        """The answer to one question, or the analysis, as a message or word by word."""
        start = time.perf_counter()
        if _content_type(request) != _JSON:
            raise _wrong_content_type(_JSON)
        body = await request.body()
        asked, photo = await run_in_threadpool(self._chat_of, body)
        completion = chat.Completion(asked.model)
        if asked.stream:
            events = self._stream(photo, completion, asked.mask_format, start)
            # The first event decides between an answer and an error with a status of its own
            first = await _unless_gone(request, anext(events))
            return StreamingResponse(_chained(first, events), media_type="text/event-stream")
        done = await self._answer(request, photo)
        records = await _records(done, asked.mask_format)
        return Response(completion.whole(_text_of(done), records), media_type=_JSON)

    async def list_models(self) -> Response:
        """The one model."""
        model = {
            "id": self.settings.model_name,
            "object": "model",
            "created": self.start_time,
            "owned_by": "annexe",
        }
        return json_response({"object": "list", "data": [model]})

    async def show_health(self) -> Response:
        """Whether there are workers: 200 or 503."""
        engine = self.engine
        if not engine.num_alive:
            raise ApiError(503, "no_worker", "no worker is ready; wait, and see the server's log")
        facts = {
            "status": "ok",
            "model": self.settings.model_name,
            "workers": engine.num_alive,
            "waiting": engine.num_waiting,
            "running": engine.num_running,
        }
        return json_response(facts)

    async def show_metrics(self) -> Response:
        """Metrics in Prometheus' form."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    # What is asked

    def _photo_of_json(self, body: bytes) -> tuple[Photo, MaskFormat]:
        asked = read_body(body, PredictBody)
        name = asked.name or Photo.name
        photo = self._photo(self._bytes_of(asked.image), asked.questions, name)
        return photo, asked.mask_format

    async def _photo_of_form(self, request: Request) -> tuple[Photo, MaskFormat]:
        """As `_photo_of_json`, from a form with the file ``image``."""
        limits = self.limits
        async with request.form(
            max_files=1, max_fields=limits.max_questions + 3, max_part_size=limits.max_body_bytes
        ) as form:
            file = form.get("image")
            if not isinstance(file, UploadFile):
                raise invalid("missing_image", "the form has no file 'image'; add one")
            data = await file.read()
            stem = PurePath((file.filename or "").replace("\\", "/")).stem
            fields: dict[str, Any] = {}
            for key in form:
                if key == "questions":
                    fields[key] = form.getlist(key)
                elif len(form.getlist(key)) > 1:
                    raise invalid("invalid_body", f"{key}: stands twice; send it once")
                elif key != "image":
                    fields[key] = form.get(key)
        asked = validated(fields, PredictForm)
        name = asked.name or stem[:MAX_NAME_LENGTH] or Photo.name
        photo = await run_in_threadpool(self._photo, data, asked.questions, name)
        return photo, asked.mask_format

    def _chat_of(self, body: bytes) -> tuple[ChatBody, Photo]:
        asked = read_body(body, ChatBody)
        if asked.model != self.settings.model_name:
            raise ApiError(
                404,
                "model_not_found",
                f"there is no such model here; ask for '{self.settings.model_name}'",
            )
        chat.require_all_tokens(asked, self.engine.facts.max_new_tokens)
        image, question = chat.image_and_question(asked)
        questions = [question] if question else []
        return asked, self._photo(self._bytes_of(image), questions, Photo.name)

    def _bytes_of(self, image: str) -> bytes:
        """The file of a photo that was sent as text, or under an address."""
        if not is_url(image):
            return decode_photo(image)
        if not self.settings.allow_urls:
            raise invalid(
                "urls_not_allowed",
                "this server fetches no images; send the image as a data URL, "
                "or start the server with --allow-urls",
            )
        return fetch_photo(image, self.limits)

    def _photo(self, data: bytes, questions: list[str], name: str) -> Photo:
        """A photo and its questions, checked as far as that takes no device."""
        if len(questions) > self.limits.max_questions:
            raise invalid(
                "too_many_questions",
                f"there are {len(questions)} questions; ask at most "
                f"{self.limits.max_questions} in a request",
            )
        try:
            name.encode()
            for question in questions:
                check_question(question)
        except UnicodeEncodeError:
            raise invalid("invalid_name", "the name is not UTF-8; write it again") from None
        except UserError as error:
            raise invalid("invalid_question", str(error)) from None
        return Photo.of(check_photo(data, name, self.limits), questions, name)

    # Answers

    async def _answer(self, request: Request, photo: Photo) -> Done:
        """The answer about a photo, given up when the client is gone."""

        async def last_event() -> Done:
            async with aclosing(self.engine.events(photo)) as events:
                async for event in events:
                    if isinstance(event, Done):
                        return event
            raise internal_error()

        return await _unless_gone(request, last_event())

    async def _stream(
        self, photo: Photo, completion: chat.Completion, mask_format: MaskFormat, start: float
    ) -> AsyncGenerator[str, None]:
        """The events of a stream.

        Raises:
            ApiError: before the first of them; later an error is an event.
        """
        words = NewWords()
        is_open = False
        try:
            async with aclosing(self.engine.events(photo, tells_words=True)) as events:
                async for event in events:
                    if isinstance(event, Done):
                        pieces = list(words.finish(_text_of(event)))
                    else:
                        pieces = list(words.grow(event.text))
                    if not is_open and (pieces or isinstance(event, Done)):
                        is_open = True
                        self.metrics.first_word.observe(time.perf_counter() - start)
                        yield completion.start()
                    for piece in pieces:
                        yield completion.words(piece)
                    if isinstance(event, Done):
                        records = await _records(event, mask_format)
                        for line in completion.end(records):
                            yield line
        except ApiError as error:
            if not is_open:
                raise
            yield chat.error_event(error)


# Helpers of routes


def _text_of(done: Done) -> str:
    """The first answer about a photo, or its analysis where nothing was asked."""
    images, queries = split_kinds(done.records)
    return queries[0].answer if queries else images[0].analysis


async def _records(done: Done, mask_format: MaskFormat) -> str:
    """Records as JSON.

    Raises:
        ApiError: a number in them is none.
    """
    try:
        return await run_in_threadpool(records_as_json, done.records, mask_format)
    except UserError as error:
        raise ApiError(500, "not_finite", str(error)) from None


async def _chained(first: str, others: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for other in others:
        yield other


async def _unless_gone(request: Request, answer: Awaitable[Result]) -> Result:
    """What an answer gives, which is cancelled when the client is gone.

    Raises:
        ApiError: the client is gone.
    """
    answering = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ApiError(499, "client_gone", "the client is gone")
        return answering.result()
    finally:
        answering.cancel()
        leaving.cancel()


async def _until_gone(request: Request) -> None:
    """Wait until the client of a request, whose body is read, is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _content_type(request: Request) -> str:
    """Media type of a body, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _wrong_content_type(wanted: str) -> ApiError:
    return ApiError(415, "wrong_content_type", f"the content type must be {wanted}; set it")


def _body_schema(json_model: type[BaseModel], form: type[BaseModel] | None = None) -> dict:
    """What OpenAPI says of a body that a route reads itself."""
    content = {_JSON: {"schema": _schema(json_model)}}
    if form is not None:
        schema = _schema(form)
        schema["properties"]["image"] = {"type": "string", "format": "binary"}
        schema["required"] = ["image"]
        content[_FORM] = {"schema": schema}
    return {"requestBody": {"required": True, "content": content}}


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """JSON schema of a model in one piece, because OpenAPI looks for definitions elsewhere."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inlined(value: Any) -> Any:
        if isinstance(value, list):
            return [inlined(each) for each in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return inlined(definitions[value["$ref"].rpartition("/")[2]])
        return {key: inlined(each) for key, each in value.items() if key != "discriminator"}

    return inlined(schema)


# Errors


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_http_error(_: Request, error: Exception) -> Response:
    """Errors of the framework, such as an unknown path."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    message = f"{str(error.detail)[:200]}; see /openapi.json"
    return ApiError(error.status_code, code, message, error.headers).response()


async def _on_invalid_request(_: Request, __: Exception) -> Response:
    return invalid("invalid_request", "the request is not of a form that is known").response()


async def _on_error(_: Request, __: Exception) -> Response:
    return internal_error().response()
