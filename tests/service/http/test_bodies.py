"""Bodies that do not fit a table: without length, compressed, pickled, or with an address in them."""

import os
import pickle
import select
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.service.http.rows import (
    FORM,
    JSON,
    PICTURE,
    TEXT,
    Row,
    as_json,
    assert_openai,
    assert_refused,
    form,
    send,
    sent_by,
)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A socket that listens on 127.0.0.1; no connection may arrive."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening
        assert not select.select([listening], [], [], 0.2)[0], "the service fetched an address that a client sent"


@pytest.mark.parametrize("path", ["/embed", "/search", "/images/never"])
def test_a_body_without_length_is_stopped_at_the_limit(client: TestClient, path: str) -> None:
    method = "PUT" if "/images" in path else "POST"
    answer = client.request(method, path, content=(b"some text " for _ in range(1_100_000)))
    assert_refused(answer, 413, "too_large", b"some text " * 2)


@pytest.mark.parametrize("type", ["", "image/png", JSON, FORM])
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "identity, gzip"])
def test_compressed_bodies(client: TestClient, encoding: str, type: str) -> None:
    headers = {"content-encoding": encoding} | ({"content-type": type} if type else {})
    body = zlib.compress(PICTURE)
    assert_refused(client.post("/embed", content=body, headers=headers), 415, "unsupported_format", body)


class Trap:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self._folder),)


@pytest.mark.parametrize("kind", ["application/x-pickle", "application/vnd.bentoml+pickle", "application/octet-stream"])
def test_a_pickle_is_not_opened(client: TestClient, kind: str, tmp_path: Path) -> None:
    trap, sprung = pickle.dumps(Trap(tmp_path / "sprung")), tmp_path / "sprung"
    for method, path in (("POST", "/embed"), ("POST", "/search"), ("PUT", "/images/never"), ("POST", "/images")):
        answer = client.request(method, path, content=trap, headers={"content-type": kind})
        assert_refused(answer, 415, "unsupported_format", trap)
    answer = client.post("/v1/embeddings", content=trap, headers={"content-type": kind})
    assert answer.status_code == 415
    assert not sprung.exists()
    pickle.loads(trap)
    # The trap does work when it is unpickled.
    assert sprung.exists()


@pytest.mark.parametrize("scheme", ["http://127.0.0.1:%d/a.png", "//127.0.0.1:%d/a.png", "ftp://127.0.0.1:%d/a"])
def test_an_address_is_no_picture_and_is_not_fetched(client: TestClient, listener: socket.socket, scheme: str) -> None:
    address = scheme % listener.getsockname()[1]
    for row in (
        Row("a text in a file field", 400, "invalid_request", form(file=address), FORM),
        Row("a text in a file field", 400, "invalid_request", form(file=address), FORM, "/search"),
        Row("a text in a file field", 400, "invalid_request", form(file=address), FORM, "/images/never", "PUT"),
        Row("a text in a file field", 400, "invalid_request", form(file=address), FORM, "/images"),
        Row("a file that holds it", 415, "unsupported_format", form(("a.png", address.encode())), FORM),
        Row("a file that has its name", 415, "unsupported_format", form((address, TEXT)), FORM),
        Row("a body", 415, "unsupported_format", address.encode()),
        Row("images", 400, "invalid_request", as_json(images=[address]), JSON),
        Row("image", 400, "invalid_request", as_json(image=address), JSON, "/search"),
        Row("queries", 400, "invalid_request", as_json(queries=[{"image": address}]), JSON, "/search"),
    ):
        assert_refused(send(client, row), row.status, row.code, sent_by(row))
    answer = client.post("/v1/embeddings", json={"model": "mnist", "input": address})
    assert_openai(answer, 400, "invalid_request", address.encode())
