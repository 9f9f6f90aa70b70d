"""The service in processes of its own, over real sockets."""

import re
import socket
from collections.abc import Iterator

import httpx2
import psutil
import pytest

from tests.service.http.rows import PICTURE, assert_refused
from tests.serving import serving


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service that runs in processes of its own."""
    with serving(tmp_path_factory.mktemp("process"), max_buffered_bytes="50000000") as found:
        yield found


def connect(address: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=2)


def raw(address: str, request: bytes) -> bytes:
    """Send bytes as they are; return what comes back until the other side ends or is silent for two seconds."""
    with connect(address) as connection:
        received = b""
        try:
            connection.sendall(request)
            while part := connection.recv(65536):
                received += part
        except (TimeoutError, ConnectionError):
            pass
        return received


LENGTH = b"Content-Length: %d\r\n" % len(PICTURE)
PARSED = {
    "two lengths": LENGTH + b"Content-Length: 5\r\n",
    "two lengths, the other way round": b"Content-Length: 5\r\n" + LENGTH,
    "a length and chunks": LENGTH + b"Transfer-Encoding: chunked\r\n",
    "a negative length": b"Content-Length: -5\r\n",
    "a length that is no number": b"Content-Length: five zebras\r\n",
    "a header of 100 KB": LENGTH + b"X-Some-Name: " + b"five zebras " * 9_000 + b"\r\n",
    "a header without a name": LENGTH + b": five zebras\r\n",
    "a header with NUL": LENGTH + b"X-Some-Name: five\0zebras\r\n",
}


@pytest.mark.parametrize("name", PARSED)
def test_what_the_http_parser_refuses(address: str, name: str) -> None:
    """A valid picture with one fault in its request's headers. The answer is the HTTP parser's own, in plain text."""
    request = b"POST /embed HTTP/1.1\r\nHost: a\r\nConnection: close\r\n%s\r\n" + PICTURE
    assert raw(address, request.replace(b"%s", LENGTH)).startswith(b"HTTP/1.1 200 ")
    answer = raw(address, request.replace(b"%s", PARSED[name]))
    assert re.match(rb"HTTP/1\.1 4\d\d ", answer), answer[:200]
    assert b"zebras" not in answer
    assert httpx2.get(address + "/info").status_code == 200


def test_a_body_without_length_is_stopped_while_it_comes_in(address: str) -> None:
    """The rest of the body is read and dropped, so that the client receives the answer."""
    answer = httpx2.post(address + "/embed", content=(b"some text " * 10_000 for _ in range(200)))
    assert_refused(answer, 413, "too_large", b"some text " * 2)
    assert answer.headers["connection"] == "close"


def memory() -> int:
    """Memory of the service's processes in bytes; they are the only children of this process."""
    return sum(one.memory_info().rss for one in psutil.Process().children(recursive=True))


def test_clients_that_leave_in_mid_upload_leave_nothing_behind(address: str) -> None:
    assert httpx2.get(address + "/info").status_code == 200
    before = memory()
    assert before > 50_000_000
    for _ in range(10):
        with connect(address) as connection:
            connection.sendall(b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: 9000000\r\n\r\n")
            connection.sendall(b"\0" * 8_000_000)
        assert httpx2.get(address + "/info", timeout=1).status_code == 200
    assert memory() - before < 30_000_000
    # They are no longer counted either: if most of them were, no other body would fit.
    assert httpx2.post(address + "/embed", content=PICTURE).status_code == 200
