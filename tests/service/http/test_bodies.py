"""Bodies that do not fit a table: without length, compressed, pickled, or with an address in them."""

import base64
import os
import pickle
import select
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from service.http.bodies import from_base64
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


# Its base64 has both characters that the alphabet for URLs has others for, and needs padding.
PADDED = next(
    data
    for data in (PICTURE + b"\xff\xfe\xfb" * more for more in range(3, 9))
    for text in [base64.b64encode(data).decode()]
    if text.endswith("=") and "+" in text and "/" in text
)
PLAIN = base64.b64encode(PADDED).decode()
SPELLINGS = {
    "76 columns": base64.encodebytes(PADDED).decode(),
    "76 columns of Windows": base64.encodebytes(PADDED).decode().replace("\n", "\r\n"),
    "indented lines": "".join(f"  {PLAIN[start : start + 64]}\n" for start in range(0, len(PLAIN), 64)),
    "for URLs": base64.urlsafe_b64encode(PADDED).decode(),
    "without padding": PLAIN.rstrip("="),
    "for URLs without padding": base64.urlsafe_b64encode(PADDED).decode().rstrip("="),
    "with a line's end": PLAIN + "\n",
    "data URI": f"data:image/png;base64,{PLAIN}",
    "data URI in capitals": f"DATA:IMAGE/PNG;BASE64,{PLAIN}",
    "data URI with a charset": f"data:image/png;charset=utf-8;base64,{PLAIN}",
    "data URI without a type": f"data:;base64,{PLAIN}",
    "data URI with percent signs": f"data:image/png;base64,{quote(PLAIN, safe='')}",
    "data URI of 76 columns": f" data:image/png;base64,\n{base64.encodebytes(PADDED).decode()}",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_base64_is_the_picture(client: TestClient, name: str) -> None:
    assert from_base64(SPELLINGS[name], len(PADDED)) == PADDED
    found = client.post("/search", json={"image": SPELLINGS[name], "k": 1})
    assert found.status_code in (200, 422), found.text


NO_BASE64 = ["A", "AAAAA", "A===", "AA=", "AA==BB==", "AA+_", "A A=", "AAAA BBBB", "AA\0A", "ÀAAA", "data:,AAAA"]


@pytest.mark.parametrize("text", [*NO_BASE64, "data:x,A"])
def test_what_is_no_base64_is_refused(client: TestClient, text: str) -> None:
    assert_refused(client.post("/embed", json={"images": [text]}), 400, "invalid_request", text.encode())


NAMES = {
    "plain": (b'filename="a.png"', "a.png"),
    "alone": (b"filename*=UTF-8''na%C3%AFve%20%E2%98%80.png", "naïve ☀.png"),
    "with a language": (b"filename*=utf-8'de'M%C3%BCller.png", "Müller.png"),
    "in Latin-1": (b"filename*=iso-8859-1''M%FCller.png", "Müller.png"),
    "in quotes": (b"filename*=\"UTF-8''M%C3%BCller.png\"", "Müller.png"),
    "beside a replacement": (b"filename=\"M?ller.png\"; filename*=UTF-8''M%C3%BCller.png", "Müller.png"),
    "before a replacement": (b"filename*=UTF-8''M%C3%BCller.png; filename=\"M?ller.png\"", "Müller.png"),
    "in capitals": (b"FileName*=UTF-8''a%2Fb.png", "a/b.png"),
    "only in a name": (b"filename=\"; filename*=UTF-8''x.png\"", "; filename*=UTF-8''x.png"),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_file_in_every_spelling(client: TestClient, name: str) -> None:
    header, id = NAMES[name]
    content = form(("NAME", PICTURE)).replace(b'filename="NAME"', header)
    answer = client.post("/images", content=content, headers={"content-type": FORM})
    assert (answer.json()["id"], answer.json()["status"] in (200, 201)) == (id, True)


def test_a_name_in_another_charset_than_it_says_is_refused(client: TestClient) -> None:
    content = form(("NAME", PICTURE)).replace(b'filename="NAME"', b"filename*=UTF-8''M%FCller.png")
    assert_refused(client.post("/images", content=content, headers={"content-type": FORM}), 400, "invalid_request")


def test_json_behind_a_byte_order_mark(client: TestClient) -> None:
    body = b"\xef\xbb\xbf" + as_json(id="kept")
    assert client.post("/search", content=body, headers={"content-type": JSON}).status_code == 200


def test_put_does_not_offer_json(client: TestClient) -> None:
    answer = client.put("/images/x", json={"image": "x"})
    assert_refused(answer, 415, "unsupported_format")
    assert "json" not in answer.text.replace("problem+json", "")
    assert "or application/json" in client.post("/search", content=PICTURE, headers={"content-type": "text/x"}).text
