"""OpenAI's form of a chat: what is asked in one, and how the answer is told."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from annexe.inference.server.errors import ApiError, invalid
from annexe.inference.server.schemas import ChatBody, ImagePart, Message

DONE = "data: [DONE]\n\n"


def image_and_question(body: ChatBody) -> tuple[str, str]:
    """What a chat asks: the latest photo of the user, and the text of the last message.

    Earlier turns are not read, because the model answers one question about one photo at a time.

    Returns:
        The photo as a data URL or an address, and the question; empty asks for the analysis.

    Raises:
        ApiError: there is no photo, the last message is not the user's, or a message tries to
            instruct the model.
    """
    for index, message in enumerate(body.messages):
        if message.role in ("system", "developer"):
            raise invalid(
                "unsupported_message",
                f"messages[{index}].role: this model takes no instructions; leave the message out",
            )
    last = body.messages[-1]
    if last.role != "user":
        raise invalid(
            "unsupported_message", "the last message must be of role user; end with a question"
        )

    # The photo, which a question later in the chat need not bring again
    for message in reversed(body.messages):
        images = _images(message)
        if len(images) > 1:
            raise invalid(
                "too_many_images", "a message has several images; send one at a time, each alone"
            )
        if images and message.role == "user":
            return images[0], _text(last)
    raise invalid("missing_image", "no message has an image; add a part of type image_url")


def require_all_tokens(body: ChatBody, max_new_tokens: int) -> None:
    """Refuse to cut an answer short, which all requests of a batch would have to agree on.

    Raises:
        ApiError: for a lower limit than the server's.
    """
    for name in ("max_tokens", "max_completion_tokens"):
        limit = getattr(body, name)
        if limit is not None and limit < max_new_tokens:
            raise invalid(
                "unsupported_limit",
                f"{name} is {limit}, but answers may have {max_new_tokens} tokens here; "
                "leave it out",
            )


def _images(message: Message) -> list[str]:
    if isinstance(message.content, str):
        return []
    return [part.image_url.url for part in message.content if isinstance(part, ImagePart)]


def _text(message: Message) -> str:
    """All text of a message, its parts joined by lines."""
    if isinstance(message.content, str):
        return message.content.strip()
    texts = [part.text for part in message.content if not isinstance(part, ImagePart)]
    return "\n".join(texts).strip()


@dataclass
class Completion:
    """An answer in OpenAI's form.

    Args:
        model: its name.
    """

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, content: str, records: str) -> str:
        """The response, as JSON.

        Args:
            content: text of the answer.
            records: JSON list of the records of the photo, for the key ``annexe``.
        """
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        return self._json("chat.completion", choice, records)

    def start(self) -> str:
        """The first event of a stream."""
        return self._event({"role": "assistant", "content": ""})

    def words(self, text: str) -> str:
        """The event of a stream that brings some words."""
        return self._event({"content": text})

    def end(self, records: str) -> Iterator[str]:
        """The last events of a stream; the records of the photo come with the first of them."""
        yield self._event({}, "stop", records)
        yield DONE

    def _event(
        self, delta: dict[str, str], finish_reason: str | None = None, records: str | None = None
    ) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        text = self._json("chat.completion.chunk", choice, records)
        # In ASCII: some clients also end a line at rare characters, such as U+2028
        return f"data: {json.dumps(json.loads(text))}\n\n"

    def _json(self, kind: str, choice: dict[str, Any], records: str | None) -> str:
        value = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": [choice],
        }
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        # Records stay the very lines of predictions.jsonl
        return text if records is None else f'{text[:-1]}, "annexe": {{"records": {records}}}}}'


def error_event(error: ApiError) -> str:
    """The event that ends a stream which fails. Clients wait for the empty line behind it."""
    return f"data: {json.dumps(error.body)}\n\n"
