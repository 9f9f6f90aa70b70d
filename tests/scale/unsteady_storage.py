"""An object store that answers 500 when a test says so: moto's application, over HTTP as S3 itself."""

import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable
from threading import Thread
from typing import Any
from zlib import crc32

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

_ERROR = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"

Refusal = Callable[[str, int], bool]
"""Whether to answer 500, by a request, as in "GET /bucket/key", and how many like it came since `refuse` was called."""


def never(*_: object) -> bool:
    """Answer all requests."""
    return False


def now_and_then(request: str, before: int) -> bool:
    """Refuse half of the requests once, the same ones in each run."""
    return not before and crc32(request.encode()) % 2 == 0


class UnsteadyStorage:
    """A running server with an empty bucket, `pictures`, as a context.

    Attributes:
        environment: variables by which s3fs finds it. Two attempts instead of five shorten the tests.
        refused: how many requests were answered 500.
    """

    def __init__(self) -> None:
        self.refused = 0
        self.refuse(never)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._url = f"http://127.0.0.1:{self._server.port}"
        self.environment = {
            "AWS_ENDPOINT_URL": self._url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "2",
        }

    def __enter__(self) -> "UnsteadyStorage":
        Thread(target=self._server.serve_forever, daemon=True).start()
        # Buckets are of the process, not of the server.
        for method, path in (("POST", "moto-api/reset"), ("PUT", "pictures")):
            urllib.request.urlopen(urllib.request.Request(f"{self._url}/{path}", method=method)).close()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def refuse(self, refuses: Refusal) -> None:
        """Answer 500 to such requests from now on."""
        self._refuses, self._seen = refuses, Counter[str]()

    def stop(self) -> None:
        """Answer nothing any more."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        before, self._seen[request] = self._seen[request], self._seen[request] + 1
        if not self._refuses(request, before):
            answer: Iterable[bytes] = self._app(environ, start)
            return answer
        self.refused += 1
        # A connection whose body was not read cannot be used again.
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start("500 Internal Server Error", [("Content-Type", "application/xml"), ("Content-Length", str(len(_ERROR)))])
        return [] if request.startswith("HEAD ") else [_ERROR]
