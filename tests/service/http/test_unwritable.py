"""A store that takes no changes, over HTTP: what a writer is told, and what an operator sees."""

import errno
import time
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.errors import InvalidStore
from service.gallery import Gallery
from service.settings import Settings
from service.store import commits
from service.store.embedded import EmbeddedStore
from tests.service.conftest import Served
from tests.service.http.rows import PICTURE
from tests.service.store.quota import no_room
from tests.service.store.test_commits import writer_of


def put(client: TestClient, id: str) -> tuple[int, str, str | None]:
    """Put a picture; return the status, the code of an error, and Retry-After."""
    answer = client.put(f"/images/{id}", content=PICTURE, headers={"Content-Type": "image/png"})
    return answer.status_code, answer.json().get("code", ""), answer.headers.get("retry-after")


def state_of(client: TestClient) -> Any:
    """Return the state of the HTTP app behind the guard."""
    guard: Any = client.app
    return guard._app.state


def store_of(client: TestClient) -> EmbeddedStore:
    store = state_of(client).gallery.store
    assert isinstance(store, EmbeddedStore)
    return store


def writable(client: TestClient) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("lookalike_store_writable ")).split()[1])


def wait_until_writable(client: TestClient) -> None:
    deadline = time.monotonic() + 10
    while writable(client) == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_full_disk_or_quota_is_told_and_passes(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "_PROBE_S", 0.3)
    client = served()
    assert put(client, "a") == (201, "", None)
    assert writable(client) == 1
    database = writer_of(store_of(client))._database
    pages = next(database.execute("PRAGMA page_count"))[0]
    database.execute(f"PRAGMA max_page_count = {pages}").fetchall()
    number = 0
    while (answer := put(client, f"b{number}"))[0] == 201:
        number += 1
    assert answer == (503, "store_paused", "5")
    assert writable(client) == 0
    assert client.post("/search", content=PICTURE).status_code == 200
    database.execute("PRAGMA max_page_count = 1000000").fetchall()
    wait_until_writable(client)
    assert put(client, "c") == (201, "", None)
    with no_room(errno.EDQUOT):
        assert put(client, "d") == (503, "store_paused", "5")
        assert writable(client) == 0
    wait_until_writable(client)
    assert client.get("/info").json()["count"] == number + 2


def test_another_fault_of_the_disk_promises_nothing(served: Served) -> None:
    client = served()
    store_of(client)._commits.refuse(InvalidStore("the store cannot be written"))
    assert put(client, "a") == (503, "invalid_store", None)
    assert writable(client) == 0


def test_a_read_only_service_says_so(served: Served) -> None:
    client = served()
    assert put(client, "a")[0] == 201
    state = state_of(client)
    gallery = state.gallery
    reader = EmbeddedStore(gallery.store.folder, gallery.card, gallery.encoder.dimension, read_only=True)
    replica = Gallery(gallery.encoder, reader, Settings())
    state.gallery = replica
    try:
        assert put(client, "b") == (403, "read_only", None)
        for answer in (client.delete("/images/a"), client.patch("/images/a", json={"metadata": {"n": 1}})):
            assert (answer.status_code, answer.json()["code"]) == (403, "read_only")
        assert client.get("/images/a").status_code == 200
    finally:
        state.gallery = gallery
        replica.close()
