"""Requests to a running service: connections that are kept alive, retries, and errors as the service tells them."""

import http.client
import json
import random
import ssl
import threading
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

from service.errors import InvalidRequest, LookalikeError

# Backoff of a service that says nothing about when to try again, and the longest that one wait may become, in seconds.
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 10.0
# Codes of answers that mean: nothing is wrong with the request, try again.
RETRYABLE = ("busy", "overloaded", "store_paused", "store_away", "out_of_memory")
# Statuses with which a proxy says, in words of its own, that it lost the service or did not reach it.
_OF_A_PROXY = (502, 503, 504)


class ServiceError(LookalikeError):
    """A running service refused a request, or could not be reached.

    Attributes:
        status: the HTTP status; 0 without an answer.
        code: the word of the answer that programs read, as docs/api.md lists them; "unreachable" without an answer, or
            if only a proxy answered.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Answer(NamedTuple):
    """An answer of the service: its status, its headers with names in lower case, and its body."""

    status: int
    headers: Mapping[str, str]
    data: bytes

    def json(self) -> Any:
        """Return the body, parsed. Raises ServiceError if it is no JSON."""
        try:
            return json.loads(self.data)
        except ValueError as error:
            raise ServiceError(
                self.status, "no_json", "the answer is not JSON; is this a Lookalike service?"
            ) from error


class Connections:
    """Connections to one service, each used by one thread at a time and kept alive for the next request.

    Attributes:
        url: of the service, without a slash at its end.
    """

    def __init__(self, url: str, key: str | None, timeout_s: float, patience_s: float) -> None:
        """Connect to nothing yet.

        Args:
            url: http:// or https://, with the path below which a proxy publishes the service. No redirect is followed,
                and no proxy of the environment is used.
            key: an API key, or None.
            timeout_s: longest silence of the service.
            patience_s: how long a request is tried again while the service is busy, paused or not reachable.

        Raises:
            InvalidRequest: the URL or the key cannot be one.
        """
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError as error:
            raise InvalidRequest("the URL of the service: expected a port of 1 to 65535") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise InvalidRequest("the URL of the service: expected one such as http://127.0.0.1:3000")
        if key is not None and (not key.isascii() or not key.isprintable() or not key.strip()):
            raise InvalidRequest("the API key: expected printable ASCII text")
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        self._host, self._port, self._path = parts.hostname, port, parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._timeout_s, self._patience_s = timeout_s, patience_s
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self._reached = False

    def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None = None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        again: bool = True,
    ) -> Answer:
        """Send a request and return its good answer.

        Args:
            method: of HTTP.
            path: of the route, with percent signs where it needs them.
            query: parameters; those that are None are left out.
            body: of the request.
            headers: besides the API key.
            again: whether the request may be sent twice, because its second time changes nothing more. Otherwise only
                answers that say that nothing was done lead to another try.

        Raises:
            ServiceError: the service refused it, or could not be reached within the patience.
        """
        given = urlencode([(name, value) for name, value in (query or {}).items() if value is not None], doseq=True)
        target = f"{self._path}{path}{'?' if given else ''}{given}"
        deadline, wait_s = time.monotonic() + self._patience_s, _FIRST_WAIT_S
        while True:
            try:
                answer = self._exchange(method, target, body, {**self._headers, **(headers or {})}, again)
            except (OSError, http.client.HTTPException) as error:
                # An address that never answered is more likely a wrong one than a service that starts.
                lasting = isinstance(error, ssl.SSLCertVerificationError) or not self._reached
                failure = ServiceError(0, "unreachable", f"{self.url}: the service cannot be reached: {_said(error)}")
                failure.__cause__ = error
                if lasting or not (again or isinstance(error, ConnectionRefusedError)):
                    raise failure from error
            else:
                self._reached = True
                if answer.status < 300:
                    return answer
                failure = _refusal(answer, self.url)
                asks_for_time = answer.status in (429, 503) and "retry-after" in answer.headers
                if not asks_for_time and not (again and failure.code == "unreachable"):
                    raise failure
                wait_s = max(wait_s, _retry_after_s(answer.headers.get("retry-after", "0")))
            # Clients that were refused together come back at different times.
            pause_s = wait_s * random.uniform(1, 1.25)  # noqa: S311  # nosec B311
            if time.monotonic() + pause_s > deadline:
                raise failure
            time.sleep(pause_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def close(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _exchange(self, method: str, target: str, body: bytes | None, headers: dict[str, str], again: bool) -> Answer:
        while True:
            with self._lock:
                # Only a new connection is surely open, and a request that must not come twice needs that.
                connection = self._idle.pop() if self._idle and again else None
            kept = connection is not None
            if connection is None:
                connection = self._new()
            try:
                answer = _send(connection, method, target, body, headers)
            except BaseException as error:
                connection.close()
                # The service closes connections that are idle for seconds, so the next one may be closed, too.
                if kept and isinstance(error, ConnectionError | http.client.BadStatusLine):
                    continue
                raise
            if answer.headers.get("connection", "").lower() == "close":
                connection.close()
            else:
                with self._lock:
                    self._idle.append(connection)
            return answer

    def _new(self) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        return http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout_s, context=self._tls)


def _send(
    connection: http.client.HTTPConnection, method: str, target: str, body: bytes | None, headers: dict[str, str]
) -> Answer:
    broken: ConnectionError | None = None
    try:
        connection.request(method, target, body, headers)
    except (BrokenPipeError, ConnectionResetError) as error:
        # The service may have answered before it closed the connection.
        broken = error
    try:
        answer = connection.getresponse()
    except (OSError, http.client.HTTPException):
        if broken is not None:
            raise broken from None
        raise
    told = {name.lower(): value for name, value in answer.getheaders()}
    return Answer(answer.status, told, answer.read())


def _refusal(answer: Answer, url: str) -> ServiceError:
    """Return the error of an answer, in problem+json or in OpenAI's shape."""
    try:
        content = json.loads(answer.data)
        told = content.get("error", content)
        code, detail = str(told["code"]), str(told.get("detail", told.get("message")))
    except (ValueError, KeyError, AttributeError, TypeError):
        if answer.status in _OF_A_PROXY:
            return ServiceError(answer.status, "unreachable", f"{url}: its proxy answered {answer.status}")
        return ServiceError(answer.status, "unknown", f"{url}: answered {answer.status}; is this a Lookalike service?")
    if answer.status == 401:
        detail = "the service asks for an API key: give one with --key or LOOKALIKE_KEY"
    return ServiceError(answer.status, code, f"{url}: {detail}")


def _retry_after_s(text: str) -> float:
    """Return the seconds of a header Retry-After, which may be a date (RFC 9110)."""
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return _FIRST_WAIT_S


def _said(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
