"""Bodies of requests, and how they are read: strictly, with one error for each that is wrong."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from annexe.evaluation.records import unique_keys
from annexe.inference.server.errors import ApiError, invalid
from annexe.inference.server.limits import MAX_MESSAGES, MAX_NAME_LENGTH, MAX_QUESTION_LENGTH
from annexe.inference.server.masks import MaskFormat

Question = Annotated[str, Field(min_length=1, max_length=MAX_QUESTION_LENGTH)]
_TAGS = ("<text>", "<image_url>", "<string>", "<parts>")
Body = TypeVar("Body", bound="StrictModel")


class StrictModel(BaseModel):
    """Takes no other keys than its own, and no values of other types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class PredictBody(StrictModel):
    """What `POST /v1/predict` takes as JSON."""

    image: Annotated[
        str, Field(min_length=1, description="bytes of a JPEG or PNG in base64, or a data URL")
    ]
    questions: Annotated[
        list[Question], Field(description="each gets an answer; none: the analysis alone")
    ] = []
    mask_format: MaskFormat = "rle"
    name: Annotated[
        str | None,
        Field(min_length=1, max_length=MAX_NAME_LENGTH, description="of the photo, in records"),
    ] = None


class PredictForm(StrictModel):
    """The fields beside the file of `POST /v1/predict` as a form."""

    questions: list[Question] = []
    mask_format: MaskFormat = "rle"
    name: Annotated[str | None, Field(min_length=1, max_length=MAX_NAME_LENGTH)] = None


class ImageUrl(StrictModel):
    """Where a photo is: a data URL or, if the server allows it, an address."""

    url: Annotated[str, Field(min_length=1)]
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(StrictModel):
    """A photo in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(StrictModel):
    """Text in a message."""

    type: Literal["text"]
    text: Annotated[str, Field(max_length=MAX_QUESTION_LENGTH)]


def _tag_of_part(part: Any) -> str | None:
    """Which kind of part this is, so that an error is about that one alone."""
    kind = part.get("type") if isinstance(part, dict) else None
    return f"<{kind}>" if kind in ("text", "image_url") else None


def _tag_of_content(content: Any) -> str | None:
    """Which kind of content this is."""
    if isinstance(content, str):
        return "<string>"
    return "<parts>" if isinstance(content, list) else None


Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")],
    Discriminator(
        _tag_of_part,
        custom_error_type="part",
        custom_error_message="must be an object whose type is text or image_url",
    ),
]
Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[Part], Tag("<parts>")],
    Discriminator(
        _tag_of_content,
        custom_error_type="content",
        custom_error_message="must be a text or a list of parts",
    ),
]


class Message(StrictModel):
    """One message of a chat."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    name: str | None = None


class StreamOptions(StrictModel):
    """What OpenAI's clients may ask of a stream."""

    include_usage: Literal[False] | None = None


class ChatBody(StrictModel):
    """What `POST /v1/chat/completions` takes of OpenAI's form.

    Answers are greedy and deterministic, so that settings of sampling are taken only where they do
    not ask for something else.
    """

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    temperature: Annotated[float, Field(ge=0, le=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None
    mask_format: MaskFormat = "rle"


def read_body(body: bytes, schema: type[Body]) -> Body:
    """The body of a request of JSON.

    Raises:
        ApiError: it is no JSON, or not of the form of ``schema``.
    """
    try:
        value = json.loads(body, object_pairs_hook=unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # also for thousands of digits or brackets
        reason = " ".join(str(error).split())[:100]
        raise invalid("invalid_json", f"the body is not JSON ({reason!a}); fix it") from None
    return validated(value, schema)


def validated(value: Any, schema: type[Body]) -> Body:
    """A value of the form of ``schema``.

    Raises:
        ApiError: naming the first place where it is not.
    """
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise _explained(error) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _explained(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body, without what was sent, which may be a photo."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ""
    for step in first["loc"]:
        if step in _TAGS:
            continue  # it says which kind of value was looked at
        place += f"[{step}]" if isinstance(step, int) else f".{str(step)[:50]}"
    place = place.removeprefix(".").encode("ascii", "backslashreplace").decode() or "the body"
    problem = first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "extra_forbidden":
        problem = "is not a key that this server knows; leave it out"
    elif first["type"] == "model_type":
        problem = "must be an object"
    elif first["type"] == "missing":
        problem = "is missing; give it"
    elif place == "temperature":
        problem = "must be 0, because answers are greedy; leave it out"
    return invalid("invalid_body", f"{place}: {problem}")
