"""Errors that a client gets: one JSON object of OpenAI's form for each."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.responses import Response

# Status -> OpenAI's name for the kind of error; all others of 4xx are invalid requests
_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """Why a request is not answered.

    Args:
        status: of HTTP.
        code: names the reason for programs, such as ``invalid_image``.
        message: names the thing and the fix for people. It does not repeat what was sent at
            length.
        headers: of the response, such as ``Retry-After``.
    """

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, dict[str, str]]:
        """``{"error": {"message", "type", "code"}}``"""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, default)
        return {"error": {"message": self.message, "type": kind, "code": self.code}}

    def response(self) -> Response:
        """What the client gets."""
        return json_response(self.body, self.status, self.headers)


def invalid(code: str, message: str) -> ApiError:
    """The error for a request that can never be answered as it is."""
    return ApiError(400, code, message)


def internal_error() -> ApiError:
    """The error for what is no fault of the request. The log has the details."""
    return ApiError(500, "internal_error", "the server failed; try again, and see its log")


def json_response(
    value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A response of JSON in ASCII, which any text has a form in, half surrogate pairs included."""
    return Response(
        json.dumps(value, allow_nan=False),
        status_code=status,
        headers=dict(headers or {}),
        media_type="application/json",
    )
