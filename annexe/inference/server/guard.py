"""What every request passes first: token, size of the body, load; and its time is taken."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from annexe.inference.server.engine import Engine
from annexe.inference.server.errors import ApiError
from annexe.inference.server.limits import Limits
from annexe.inference.server.metrics import Metrics

_API = "/v1/"
_OPEN = "/health"  # also without a token, for load balancers
_METHODS = {
    "/v1/predict": "POST",
    "/v1/chat/completions": "POST",
    "/v1/models": "GET",
    "/health": "GET",
    "/metrics": "GET",
}
_DISCARDED = 10  # times the limit, of a body that is read to its end although it is refused


class Guard:
    """Middleware around an app.

    Bodies of the API are read here as a whole, so that their size is limited also where it is not
    announced, and slow ones have an end.

    Args:
        app: what is guarded.
        engine: whose load counts.
        limits: of the server.
        metrics: that count requests.
        token: what clients have to send; None lets all in.
        has_page: browsers may send the token as the password of HTTP's basic form.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        engine: Engine,
        limits: Limits,
        metrics: Metrics,
        token: str | None,
        has_page: bool = False,
    ) -> None:
        self.app = app
        self.engine = engine
        self.limits = limits
        self.metrics = metrics
        self.token = token
        self.has_page = has_page
        self.num_requests = 0  # with a body, under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        path = scope["path"]
        status = 500

        async def noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, _Incoming(receive), noting_status)
        finally:
            label = path if path in _METHODS else "other"
            self.metrics.requests.labels(label, str(status)).inc()
            self.metrics.seconds.labels(label).observe(time.perf_counter() - start)

    async def _pass(self, scope: Scope, incoming: _Incoming, send: Send) -> None:
        """Check a request, and answer it."""
        is_counted = False
        receive: Receive = incoming
        try:
            if scope["path"] != _OPEN:
                self._check_token(scope)
            _check_route(scope)
            has_body = scope["method"] == "POST" and scope["path"].startswith(_API)
            if has_body:
                self._check_load()
                self.num_requests += 1
                is_counted = True
                receive = await self._read(scope, incoming)
            await self.app(scope, receive, send)
        except ApiError as error:
            await self._discard(incoming)
            await error.response()(scope, receive, send)
        finally:
            self.num_requests -= is_counted

    def _check_token(self, scope: Scope) -> None:
        """Refuse a client without the token.

        Raises:
            ApiError: 401.
        """
        if self.token is None:
            return
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, credentials = header.partition(b" ")
        given = b""
        if scheme.lower() == b"bearer":
            given = credentials.strip()
        elif scheme.lower() == b"basic" and self.has_page:
            given = _password(credentials)
        if not hmac.compare_digest(given, self.token.encode()):
            is_page = self.has_page and not scope["path"].startswith(_API)
            challenge = 'Basic realm="annexe"' if is_page else "Bearer"
            raise ApiError(
                401,
                "invalid_api_key",
                "the token is missing or wrong; send the header 'Authorization: Bearer TOKEN'",
                {"WWW-Authenticate": challenge},
            )

    def _check_load(self) -> None:
        """Refuse what would be refused once its body is read.

        Raises:
            ApiError: 429.
        """
        if self.engine.is_full or self.num_requests >= self.engine.capacity:
            raise self.engine.too_busy()

    async def _read(self, scope: Scope, incoming: _Incoming) -> Receive:
        """Read a body.

        Returns:
            What gives it to the app as one message.

        Raises:
            ApiError: it is too large or too slow.
        """
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        limit = self.limits.max_body_bytes
        if announced.isdigit() and int(announced) > limit:
            raise self._too_large()
        try:
            body = await asyncio.wait_for(self._collect(incoming, limit), self.limits.timeout)
        except asyncio.TimeoutError:
            raise ApiError(408, "slow_request", "the body does not come; send it faster") from None

        is_given = False

        async def receive_whole() -> Message:
            nonlocal is_given
            if is_given:
                return await incoming()
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return receive_whole

    async def _collect(self, incoming: _Incoming, limit: int) -> bytes:
        """All of a body.

        Raises:
            ApiError: it is too large.
        """
        chunks: list[bytes] = []
        size = 0
        while not incoming.is_complete:
            message = await incoming()
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > limit:
                raise self._too_large()
        return b"".join(chunks)

    async def _discard(self, incoming: _Incoming) -> None:
        """Read a refused body to its end: many clients do not listen before they have sent it."""
        limit = _DISCARDED * self.limits.max_body_bytes

        async def read() -> None:
            size = 0
            while not incoming.is_complete and size <= limit:
                message = await incoming()
                size += len(message.get("body", b""))

        try:
            await asyncio.wait_for(read(), self.limits.timeout)
        except asyncio.TimeoutError:
            return

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            "body_too_large",
            f"the request has more than {self.limits.max_body_mb:g} MB; scale the photo down",
        )


class _Incoming:
    """The body of a request as it comes in.

    Attributes:
        is_complete: there is no more of it, or the client is gone.
    """

    def __init__(self, receive: Receive) -> None:
        self.is_complete = False
        self._receive = receive

    async def __call__(self) -> Message:
        """The next message."""
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self.is_complete = True
        return message


def _check_route(scope: Scope) -> None:
    """Refuse what no route of the API takes, before a page beside them answers in its own form.

    Raises:
        ApiError: 404 or 405.
    """
    method = _METHODS.get(scope["path"])
    if method is None:
        if scope["path"].startswith(_API):
            raise ApiError(404, "not_found", "there is no such path; see /openapi.json")
    elif scope["method"] != method:
        raise ApiError(
            405, "method_not_allowed", f"the method must be {method}; set it", {"Allow": method}
        )


def _password(credentials: bytes) -> bytes:
    """The password in credentials of HTTP's basic form; empty where there is none."""
    try:
        decoded = base64.b64decode(credentials.strip(), validate=True)
    except (binascii.Error, ValueError):
        return b""
    return decoded.partition(b":")[2]
