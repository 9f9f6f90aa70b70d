"""The guard before every route: times and sizes of bodies, request ids, the log, the last resort."""

import asyncio
import io
import json
import logging
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from service.http import logs
from service.http.guard import Guard
from service.http.uploads import _groups
from service.settings import Settings
from tests.conftest import encoded, scene
from tests.service.conftest import Served

PICTURE = encoded(scene())


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """The records of the access log."""
    kept: list[logging.LogRecord] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(record)

    keeper = Keeper()
    logs.access.addHandler(keeper)
    logs.access.setLevel(logging.INFO)
    yield kept
    logs.access.setLevel(logging.NOTSET)
    logs.access.removeHandler(keeper)


async def call(app: Any, scope: dict[str, Any], body: list[tuple[float, bytes]]) -> tuple[list[Message], float]:
    """Call an ASGI app with a body that comes in (wait, bytes) pieces, and goes silent after the last one."""
    pieces = iter(body)
    sent: list[Message] = []

    async def receive() -> Message:
        piece = next(pieces, None)
        if piece is None:
            await asyncio.sleep(3600)
        assert piece is not None
        await asyncio.sleep(piece[0])
        return {"type": "http.request", "body": piece[1], "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    started = asyncio.get_running_loop().time()
    full = {"type": "http", "method": "POST", "path": "/embed", "raw_path": b"/embed", "query_string": b""} | scope
    await app(full | {"state": {}, "http_version": "1.1", "scheme": "http"}, receive, send)
    return sent, asyncio.get_running_loop().time() - started


def headers(message: Message) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in message["headers"]}


def test_a_slow_body_is_given_up_and_its_connection_closed(served: Served) -> None:
    app = served(body_timeout_s="0.3").app
    scope = {"headers": [(b"content-length", b"1000"), (b"content-type", b"image/png")]}
    sent, seconds = asyncio.run(call(app, scope, [(0.1, b"a"), (0.1, b"b")]))
    assert sent[0]["status"] == 408
    assert headers(sent[0])["connection"] == "close"
    assert json.loads(sent[1]["body"])["code"] == "slow_body"
    assert seconds < 5


def test_what_comes_after_a_refusal_is_taken_and_dropped(served: Served) -> None:
    """The body is drained, for a limited time, so that the client reads its answer instead of a reset connection."""
    app = served(max_image_bytes="1000", max_request_bytes="5000", body_timeout_s="5").app
    taken: list[bytes] = []

    def pieces() -> Iterator[tuple[float, bytes]]:
        for _ in range(100):
            taken.append(b"x" * 600)
            yield 0, taken[-1]

    scope = {"headers": [(b"transfer-encoding", b"chunked"), (b"content-type", b"image/png")]}
    sent, _ = asyncio.run(call(app, scope, pieces()))  # type: ignore[arg-type]
    assert sent[0]["status"] == 413
    assert [message.get("more_body", False) for message in sent[1:]] == [True, False]
    assert 5 < len(taken) < 20


def test_all_bodies_together_are_bounded(served: Served) -> None:
    app = served(max_buffered_bytes="1500", body_timeout_s="0.2").app
    scope = {"headers": [(b"content-length", b"2000"), (b"content-type", b"image/png")]}

    async def both() -> list[tuple[list[Message], float]]:
        return await asyncio.gather(*(call(app, dict(scope), [(0, b"x" * 1000)]) for _ in range(2)))

    statuses = sorted(sent[0]["status"] for sent, _ in asyncio.run(both()))
    assert statuses == [408, 503]
    sent, _ = asyncio.run(call(app, dict(scope), [(0, b"x" * 1000)]))
    assert sent[0]["status"] == 408, "what was buffered is not given back"


def test_a_request_id_is_taken_when_it_is_harmless(served: Served) -> None:
    client = served()
    given = client.get("/info", headers={"X-Request-ID": "abc-1.2_3"})
    assert given.headers["x-request-id"] == "abc-1.2_3"
    for bad in ("a b", "x" * 65, "<script>", ""):
        assert client.get("/info", headers={"X-Request-ID": bad}).headers["x-request-id"] not in (bad, "")


def test_the_log_has_one_harmless_line_for_a_request(served: Served, records: list[logging.LogRecord]) -> None:
    client = served(api_keys="write:a-key-of-some-length")
    client.get(
        "/images/a%0A%7B%22forged%22%3A1%7D",
        headers={"X-Request-ID": "me", "Authorization": "Bearer a-key-of-some-length"},
    )
    client.put("/images/x", content=PICTURE, headers={"Authorization": "Bearer a-key-of-some-length"})
    formatter = logs.handler().formatter
    assert formatter is not None
    lines = [formatter.format(record) for record in records]
    assert len(lines) == 2
    first, second = map(json.loads, lines)
    assert (first["status"], first["path"], first["request_id"]) == (400, '/images/a\n{"forged":1}', "me")
    assert (second["status"], second["bytes_in"], second["method"]) == (201, len(PICTURE), "PUT")
    assert all("\n" not in line and "a-key" not in line and "PNG" not in line for line in lines)


def test_a_failure_of_ours_is_a_problem_with_its_id_in_the_log(
    served: Served, records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = served()
    monkeypatch.setattr("service.http.routes.info._info", lambda _: 1 / 0)
    answer = client.get("/info")
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    failed = [record for record in records if record.exc_info]
    assert len(failed) == 1
    assert vars(failed[0])["request_id"] == answer.json()["request_id"]
    assert "division" not in answer.text


def test_a_client_that_goes_is_no_failure(served: Served, records: list[logging.LogRecord]) -> None:
    app = served().app

    async def gone() -> None:
        came: list[Message] = [{"type": "http.request", "body": b"abc", "more_body": True}, {"type": "http.disconnect"}]
        messages = iter(came)

        async def receive() -> Message:
            return next(messages)

        async def send(message: Message) -> None:
            pass

        scope = {"type": "http", "method": "POST", "path": "/embed", "raw_path": b"/embed", "query_string": b""}
        await app(scope | {"state": {}, "headers": [(b"content-length", b"9")]}, receive, send)

    asyncio.run(gone())
    assert [vars(record)["status"] for record in records] == [499]


def test_other_scopes_pass() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    asyncio.run(Guard(app, Settings())({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]


def test_metrics_have_routes_and_no_paths(served: Served) -> None:
    client = served()
    for path in ("/images/a-secret-id", "/a-secret-page"):
        client.get(path)
    text = client.get("/metrics").text
    assert 'lookalike_requests_total{method="GET"' in text
    assert "a-secret" not in text


def test_a_browser_must_not_guess_types(served: Served) -> None:
    client = served()
    client.put("/images/x", content=PICTURE)
    for path in ("/images/x/content", "/info", "/nowhere"):
        assert client.get(path).headers["x-content-type-options"] == "nosniff"


def test_a_form_of_many_texts_is_refused(served: Served) -> None:
    answer = served().put("/images/x", files={"file": ("x", PICTURE)}, data={f"f{n}": "x" for n in range(9)})
    assert answer.status_code == 400
    assert "a field that is not known here; expected file or metadata" in answer.json()["detail"]


def test_a_zip_of_more_members_than_pictures_is_refused_unread(served: Served) -> None:
    client = served(max_bulk_images="2", max_request_bytes="20000")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", PICTURE)
        for number in range(4):
            archive.writestr(f"{number}.txt", "")
    zipped = {"content-type": "application/zip"}
    assert client.post("/images", content=buffer.getvalue(), headers=zipped).status_code == 413
    large = io.BytesIO()
    with zipfile.ZipFile(large, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(250_000))
    answer = client.post("/images", content=large.getvalue(), headers=zipped)
    assert (answer.status_code, "unpacks to more" in answer.text) == (413, True)


def test_a_length_beyond_the_limit_is_refused_before_the_body_comes(served: Served) -> None:
    app = served(body_timeout_s="0.3").app
    scope = {"headers": [(b"content-length", b"10000001"), (b"content-type", b"image/png")]}
    sent, _ = asyncio.run(call(app, scope, []))
    assert sent[0]["status"] == 413


PART = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + PICTURE + b"\r\n"


@pytest.mark.parametrize(
    ("form", "says"),
    [
        (PART + b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\ntext\r\n--x--\r\n', "each with a filename"),
        (PART + b'--x\r\nContent-Disposition: form-data; name="y"; filename="a"\r\n\r\na\r\n--x--', "texts elsewhere"),
        (PART + b"--x\r\nContent-Disposition: form-da", "cut short"),
        (PART, "cut short"),
    ],
)
def test_forms_whose_first_part_is_good(served: Served, form: bytes, says: str) -> None:
    answer = served().post("/embed", content=form, headers={"content-type": "multipart/form-data; boundary=x"})
    assert answer.status_code == 400
    assert says in answer.json()["detail"]


def test_what_is_unpacked_together_is_bounded() -> None:
    assert list(_groups([1] * 70)) == [range(32), range(32, 64), range(64, 70)]
    assert list(_groups([10_000_000] * 7)) == [range(3), range(3, 6), range(6, 7)]
    assert list(_groups([50_000_000, 1, 50_000_000])) == [range(1), range(1, 2), range(2, 3)]


def test_a_text_field_has_a_limit(served: Served) -> None:
    answer = served().put("/images/x", files={"file": ("x", PICTURE)}, data={"metadata": "x" * 4_000_001})
    assert (answer.status_code, "a text field" in answer.text) == (413, True)


def test_base64_that_is_too_long_is_refused_undecoded(served: Served) -> None:
    answer = served(max_image_bytes="3000").post("/embed", json={"images": ["*" * 5000]})
    assert answer.status_code == 413


def test_headers_have_a_limit(served: Served) -> None:
    answer = served().get("/info", headers={"X-Some-Name": "x" * 32_768})
    assert (answer.status_code, "headers of at most" in answer.text) == (431, True)
