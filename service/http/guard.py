"""Middleware before every route, including BentoML's: request id, path, API key, body limits, log, last resort."""

import asyncio
import re
import time
import unicodedata
import uuid
from urllib.parse import unquote_to_bytes

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import metrics
from service.errors import HeadersTooLarge, InvalidRequest, LookalikeError, Overloaded, SlowBody
from service.http import logs
from service.http.keys import read_keys
from service.http.prefix import Prefix, route_path
from service.http.problems import answer, failure
from service.settings import Settings

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPEN = re.compile(r"/(livez|readyz|healthz|page/(\w+/)?[\w-]+\.\w+)?")
_READING_POSTS = ("/embed", "/search", "/classify", "/v1/embeddings", "/images/count")
# httptools has no limit of its own.
_MOST_HEADER_BYTES = 32_768
_QUIET = ("/livez", "/readyz", "/healthz", "/metrics")


class Guard:
    """ASGI middleware around BentoML's app, which contains ours."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._settings = settings
        self._keys = read_keys(settings)
        self._prefix = Prefix(settings)
        # Bytes of all bodies whose requests are not answered yet.
        self._buffered = 0
        self._app: ASGIApp = app
        origins = [origin.strip() for origin in self._settings.cors_origins.split(",") if origin.strip()]
        self._inner: ASGIApp = self._serve
        if origins:
            self._inner = CORSMiddleware(
                self._serve,
                allow_origins=origins,
                allow_methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"],
                allow_headers=["Authorization", "Content-Type", "If-None-Match", "If-Range", "Range", "X-Request-ID"],
                expose_headers=["Accept-Ranges", "Content-Range", "ETag", "Retry-After", "X-Request-ID"],
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request: check it, pass it on, count it and log it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._prefix.may_be:
            scope = self._prefix.place(scope)
        exchange = _Exchange(scope, receive, send, self._settings, self)
        started = time.perf_counter()
        try:
            await self._inner(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            pass
        except Exception as error:
            logs.access.exception("failed", extra={"request_id": exchange.request_id}, exc_info=error)
            if exchange.status is None:
                await failure(scope)(scope, exchange.receive, exchange.send)
        finally:
            self._buffered -= exchange.received
            self._note(scope, exchange, time.perf_counter() - started)

    def _note(self, scope: Scope, exchange: "_Exchange", seconds: float) -> None:
        # Without an answer the client has disconnected; nginx logs that as 499.
        status = exchange.status or 499
        metrics.count(scope["method"], scope["state"].get("route", "other"), status, seconds)
        if exchange.path in _QUIET and status == 200:
            return
        logs.request(
            {
                "request_id": exchange.request_id,
                "client": (scope.get("client") or ("",))[0],
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "bytes_in": exchange.received,
                "bytes_out": exchange.sent,
                "duration_ms": round(1e3 * seconds, 2),
            }
        )

    def reread_keys(self) -> None:
        """Read the API keys again. If they cannot be read, the earlier ones stay, and the log says why."""
        try:
            self._keys = read_keys(self._settings)
        except LookalikeError as error:
            logs.access.error("the API keys stay as they were: %s", error)
            return
        logs.access.info("%d API keys", len(self._keys))

    def take(self, size: int) -> None:
        """Add to the bytes that are buffered. Raises Overloaded above max_buffered_bytes."""
        self._buffered += size
        if self._buffered > self._settings.max_buffered_bytes:
            raise Overloaded("the service is receiving more than it may hold; try again in a few seconds")

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            _check_path(scope)
            if sum(len(name) + len(value) for name, value in scope["headers"]) > _MOST_HEADER_BYTES:
                raise HeadersTooLarge(f"expected headers of at most {_MOST_HEADER_BYTES} bytes")
            path, method = route_path(scope), scope["method"]
            if not (_OPEN.fullmatch(path) or (path == "/metrics" and self._settings.metrics_public)):
                reads = method in ("GET", "HEAD", "OPTIONS") or (method == "POST" and path in _READING_POSTS)
                self._keys.check(Headers(scope=scope).get("authorization", ""), writes=not reads)
        except LookalikeError as error:
            await answer(scope, error)(scope, receive, send)
            return
        if method == "HEAD":
            # No route has to know: `_Exchange.send` drops the body of its answer.
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


class _Exchange:
    """One request and its answer: wraps receive and send, with deadline, counters and headers."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, settings: Settings, guard: Guard) -> None:
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = self.request_id
        self.path = route_path(scope)
        self.status: int | None = None
        self.received = self.sent = 0
        self._is_head = scope["method"] == "HEAD"
        self._receive, self._send, self._guard = receive, send, guard
        self._timeout_s = settings.body_timeout_s
        self._most_drained = settings.max_request_bytes
        self._deadline = asyncio.get_running_loop().time() + settings.body_timeout_s
        self._complete = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers

    async def receive(self) -> Message:
        """Receive the next part of the body. Raises SlowBody after body_timeout_s, Overloaded."""
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            raise SlowBody(f"the body did not come in full within {self._timeout_s:g} s") from error
        self._complete = message["type"] != "http.request" or not message.get("more_body", False)
        size = len(message.get("body", b""))
        self.received += size
        self._guard.take(size)
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the answer. An answer before the end of the body closes the connection."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self.request_id
            headers["X-Content-Type-Options"] = "nosniff"
            if not self._complete:
                headers["Connection"] = "close"
        else:
            if self._is_head:
                message = {**message, "body": b""}
            self.sent += len(message.get("body", b""))
            if not message.get("more_body", False) and not self._complete:
                await self._send({**message, "more_body": True})
                await self._drain()
                message = {"type": "http.response.body"}
        await self._send(message)

    async def _drain(self) -> None:
        """Read and drop the rest of the body: a client that still sends would get a reset instead of its answer."""
        drained = 0
        try:
            async with asyncio.timeout_at(self._deadline):
                while not self._complete and drained <= self._most_drained:
                    message = await self._receive()
                    drained += len(message.get("body", b""))
                    self._complete = message["type"] != "http.request" or not message.get("more_body", False)
        except TimeoutError:
            pass
        self._complete = True


def _check_path(scope: Scope) -> None:
    """Raise InvalidRequest for a path that is not UTF-8, or with control characters, which could forge a log line."""
    if b"%" not in scope.get("raw_path", b"%") and scope["path"].isascii() and scope["path"].isprintable():
        return
    try:
        path = unquote_to_bytes(scope.get("raw_path") or scope["path"].encode()).decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest("the path: expected UTF-8 behind its percent signs") from error
    if any(unicodedata.category(character) == "Cc" for character in path):
        raise InvalidRequest("the path: expected text without control characters")
