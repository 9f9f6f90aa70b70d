"""The client against the real service, and against little servers that refuse, stumble and hang up."""

import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn

from service.client import Client
from service.client.connection import Connections, ServiceError
from service.client.wire import Upload
from service.encoding.encoder import Encoder
from service.errors import InvalidRequest
from service.gallery import Gallery
from service.http.guard import Guard
from service.http.routes import create_app
from service.http.slots import Slots
from service.queries import ItemQuery, PictureQuery, SumQuery, VectorQuery
from service.settings import Settings
from service.store.embedded import EmbeddedStore
from tests.conftest import encoded, scene

KEY = "0123456789abcdef"
PICTURES = [encoded(scene(seed=n)) for n in range(6)]


class Service:
    """The HTTP app behind a real socket."""

    def __init__(self, url: str, gallery: Gallery) -> None:
        self.url, self.gallery = url, gallery


@contextmanager
def listening(folder: Path, encoder: Encoder, **settings: Any) -> Iterator[Service]:
    """Serve an empty store on a socket of its own until the block ends."""
    app, read = create_app(), Settings(store=folder / "store", **settings)
    app.state.gallery = Gallery(encoder, EmbeddedStore(read.store, encoder.card, encoder.dimension), read)
    app.state.slots = Slots(read.max_waiting, read.work_timeout_s)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(Guard(app, read), log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield Service(f"http://127.0.0.1:{listener.getsockname()[1]}", app.state.gallery)
        finally:
            server.should_exit = True
            thread.join()
            app.state.groupings.close()
            app.state.maps.close()
            app.state.slots.close()
            app.state.gallery.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, encoder: Encoder) -> Iterator[Service]:
    """The service with a key, for all tests of this module; each leaves the store empty."""
    with listening(tmp_path_factory.mktemp("client"), encoder, api_keys=f"write:{KEY}") as opened:
        yield opened


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    """A client of it, which removes all items in the end."""
    with Client(service.url, KEY) as opened:
        yield opened
        opened.delete_many([item.id for item in opened.items()])


def test_the_life_of_an_item(client: Client, service: Service, tmp_path: Path) -> None:
    for id in ("a b/ü.png", "thumbnail", "x/content", "..x", 'quote".png', "e\u0301", "a%2Fb;c"):
        path = tmp_path / "picture.png"
        path.write_bytes(PICTURES[0])
        assert client.put(id, path, {"year": 2001, "tags": ["é"]})
        assert not client.put(id, PICTURES[1])
        item = client.get(id)
        assert item is not None and item.metadata == {"year": 2001, "tags": ["é"]}
        assert client.patch(id, {"year": None, "seen": True}).metadata == {"seen": True, "tags": ["é"]}
        assert client.content(id) == PICTURES[1]
        assert (client.thumbnail(id) or b"")[8:12] == b"WEBP"
        assert client.delete(id)
        assert not client.delete(id)
        assert (client.get(id), client.content(id), client.thumbnail(id)) == (None, None, None)


def test_many_pictures_with_what_is_wrong_with_some(client: Client, tmp_path: Path) -> None:
    uploads = [Upload(f"{n}.png", PICTURES[n % 6], {"n": n}) for n in range(100)]
    uploads[41] = Upload("41.png", b"no picture")
    uploads[42] = Upload("42.png", tmp_path / "missing.png")
    uploads[43] = Upload("\x00", PICTURES[0])
    uploads[44] = Upload("44.png", bytes(11_000_000))
    uploads[45] = Upload("40.png", PICTURES[1], {"n": "later"})
    done = list(client.add(iter(uploads)))
    assert [one.id for one in done] == [one.id for one in uploads]
    assert {n: one.error.code for n, one in enumerate(done) if one.error is not None} == {
        41: "unsupported_format",
        42: "invalid_request",
        43: "invalid_request",
        44: "too_large",
    }
    assert [one.is_new for one in done] == [n not in (41, 42, 43, 44, 45) for n in range(100)]
    assert client.count() == 95
    items = {item.id: item.metadata["n"] for item in client.items(page=7)}
    assert items == {f"{n}.png": n for n in range(100) if n not in (40, 41, 42, 43, 44, 45)} | {"40.png": "later"}


def test_two_pictures_of_one_id_do_not_share_what_is_said_by_id(client: Client) -> None:
    done = list(client.add([Upload("a", PICTURES[0], {"n": 1}, source="elsewhere"), Upload("a", PICTURES[1])], 1))
    assert [one.is_new for one in done] == [True, False]
    item = client.get("a", include=["source"])
    assert item is not None and (item.source, item.metadata) == (None, {"n": 1})
    assert client.content("a") == PICTURES[1]


def test_arrays_go_in_and_come_out(client: Client, service: Service) -> None:
    embeddings = client.embed([PICTURES[n % 6] for n in range(70)])
    assert embeddings.shape == (70, 128) and embeddings.dtype == np.float32
    ours = [service.gallery.embed_soon(data).result() for data in PICTURES]
    assert np.allclose(embeddings[:6], ours, atol=1e-6)
    assert client.embed([]).shape == (0, 128)
    list(client.add(Upload(f"{n}", data, {"even": n % 2 == 0}) for n, data in enumerate(PICTURES)))
    (best, *_) = client.search(PictureQuery(PICTURES[2]), k=3)
    assert (best.id, best.score, best.metadata) == ("2", 1.0, {"even": True})
    (found,) = client.search(VectorQuery(embeddings[3]), k=1, include=["embedding"])
    assert found.id == "3" and found.embedding is not None and np.array_equal(found.embedding, embeddings[3])
    assert "4" not in [hit.id for hit in client.search(ItemQuery("4"))]
    even = client.search(SumQuery([(ItemQuery("1"), 1), (PictureQuery(PICTURES[0]), 0.5)]), filter={"even": True})
    assert [hit.id for hit in even if int(hit.id) % 2] == []
    many = client.search_many([ItemQuery(f"{n % 6}") for n in range(70)], k=2)
    assert [len(hits) for hits in many] == [2] * 70
    assert [hit.id for hit in many[0]] == [hit.id for hit in many[66]]


def test_errors_are_those_of_the_service(client: Client, service: Service) -> None:
    with pytest.raises(ServiceError, match="no item has this id") as refused:
        client.search(ItemQuery("nobody"))
    assert (refused.value.status, refused.value.code) == (404, "not_found")
    with pytest.raises(ServiceError, match="--key or LOOKALIKE_KEY") as unknown:
        Client(service.url).info()
    assert unknown.value.code == "unauthorized"
    with pytest.raises(ServiceError, match="cannot be reached"):
        Client("127.0.0.1:1").info()
    for url in ("ftp://x", "http://", "http://a:99999", "http://a?b"):
        with pytest.raises(InvalidRequest, match="the URL of the service"):
            Client(url)


# Little servers ----------------------------------------------------------------------------------

Script = Callable[[int, bytes], bytes]


@contextmanager
def stumbling(script: Script) -> Iterator[tuple[str, list[bytes]]]:
    """Answer the n-th request with what the script returns for it; b"" hangs up. Yields the URL and the requests."""
    seen: list[bytes] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while True:
                head = b""
                while (line := self.rfile.readline()) not in (b"\r\n", b""):
                    head += line
                if not head:
                    return
                length = [int(line[15:]) for line in head.lower().splitlines() if line.startswith(b"content-length:")]
                seen.append(head + self.rfile.read(length[0] if length else 0))
                told = script(len(seen), seen[-1])
                self.wfile.write(told)
                if not told:
                    return

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, allow_reuse_address = True, True

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", seen
        finally:
            server.shutdown()


def http(status: int, content: Any, *headers: str) -> bytes:
    body = json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


BUSY = {"code": "busy", "detail": "busy"}


def test_a_busy_service_is_asked_again_when_it_says() -> None:
    def script(n: int, _: bytes) -> bytes:
        return http(200, {"n": n}) if n > 3 else http(429 if n < 3 else 503, BUSY, "Retry-After: 0")

    with stumbling(script) as (url, seen):
        assert Connections(url, None, 5, 20).request("GET", "/x").json() == {"n": 4}
        assert len(seen) == 4


def test_patience_ends_and_a_lasting_refusal_is_one() -> None:
    with stumbling(lambda *_: http(429, BUSY, "Retry-After: 60")) as (url, seen):
        with pytest.raises(ServiceError, match="busy") as late:
            Connections(url, None, 5, 1).request("GET", "/x")
        assert (late.value.status, len(seen)) == (429, 1)
    with stumbling(lambda *_: http(503, {"code": "invalid_store", "detail": "gone"})) as (url, seen):
        with pytest.raises(ServiceError, match="gone"):
            Connections(url, None, 5, 20).request("GET", "/x")
        assert len(seen) == 1
    with stumbling(lambda *_: http(500, "<html>")) as (url, _), pytest.raises(ServiceError, match="a Lookalike"):
        Connections(url, None, 5, 20).request("GET", "/x")


def test_a_connection_that_was_closed_meanwhile_is_no_error() -> None:
    with stumbling(lambda n, _: b"" if n == 2 else http(200, {"n": n})) as (url, seen):
        # Without patience, so that it is no second try.
        connections = Connections(url, "k", 5, 0)
        assert [connections.request("GET", "/x").json()["n"] for _ in range(2)] == [1, 3]
        assert b"Authorization: Bearer k" in seen[0]


def test_what_must_not_come_twice_is_not_sent_twice() -> None:
    with stumbling(lambda n, _: b"" if n == 2 else http(200, {"n": n})) as (url, seen):
        connections = Connections(url, None, 5, 20)
        connections.request("GET", "/x")
        with pytest.raises(ServiceError, match="cannot be reached"):
            connections.request("DELETE", "/images", again=False)
        assert len(seen) == 2


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_that_lost_the_service_is_asked_again(status: int) -> None:
    def script(n: int, _: bytes) -> bytes:
        return http(200, {"n": n}) if n > 2 else http(status, "<html>")

    with stumbling(script) as (url, seen):
        assert Connections(url, None, 5, 20).request("POST", "/embed").json() == {"n": 3}
    with stumbling(script) as (url, seen):
        with pytest.raises(ServiceError, match=f"its proxy answered {status}") as lost:
            Connections(url, None, 5, 20).request("DELETE", "/images", again=False)
        assert (lost.value.code, len(seen)) == ("unreachable", 1)


def test_pictures_that_were_refused_for_now_are_sent_again() -> None:
    limits = {"limits": {"max_request_bytes": 1000, "max_images": 4}, "dimension": 2}

    def script(n: int, request: bytes) -> bytes:
        if request.startswith(b"GET /info"):
            return http(200, limits)
        files = request.count(b"filename*=")
        # The first answer is cut short after one picture, and the second one refuses one of the others for now.
        lines = [{"index": at, "id": "x", "status": 201} for at in range(files)]
        if n == 2:
            lines = lines[:1]
        if n == 3:
            lines[0] |= {"status": 503, "code": "store_paused", "detail": "full"}
        body = "".join(json.dumps(line) + "\n" for line in lines).encode()
        return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    with stumbling(script) as (url, seen), Client(url) as client:
        done = list(client.add(Upload(f"{n}", b"data") for n in range(4)))
        assert [(one.id, one.is_new, one.error) for one in done] == [(f"{n}", True, None) for n in range(4)]
        posts = [request for request in seen if request.startswith(b"POST")]
        assert [[n for n in range(4) if f"UTF-8''{n}\r".encode() in post] for post in posts][:2] == [
            [0, 1, 2, 3],
            [1, 2],
        ]


def test_the_later_of_two_pictures_of_one_id_stays(client: Client) -> None:
    # The first one's request takes longer than the second one's.
    first = [Upload("twice", PICTURES[0], {"n": 1}), *(Upload(f"{n}", PICTURES[n % 6]) for n in range(20))]
    for _ in range(5):
        done = list(client.add([*first, Upload("twice", PICTURES[1], {"n": 2})]))
        assert [one.error for one in done] == [None] * 22
        item = client.get("twice")
        assert item is not None and item.metadata == {"n": 2}
        client.delete("twice")
