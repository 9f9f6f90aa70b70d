"""Where a search runs: a quick one, alone, on the event loop's thread; all others on a thread that may wait."""

import threading
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.http.guard import Guard
from service.http.slots import Slots
from service.store.embedded import EmbeddedStore


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads in which the store was searched."""
    names, search = [], EmbeddedStore.search

    def noted(*arguments: Any) -> Any:
        names.append(threading.current_thread().name)
        return search(*arguments)

    monkeypatch.setattr(EmbeddedStore, "search", noted)
    return names


def slots_of(client: TestClient) -> Slots:
    assert isinstance(client.app, Guard)
    slots: Slots = client.app._app.state.slots  # type: ignore[attr-defined]
    return slots


@pytest.mark.parametrize(
    ("body", "beside", "waits"),
    [
        ({}, 0, False),
        ({}, 1, True),
        ({"filter": {"label": "7"}}, 0, True),
        ({"prefix": "a"}, 0, True),
        ({"include": ["source"]}, 0, True),
        ({"include": ["embedding"]}, 0, True),
        ({"k": 101}, 0, True),
        ({"queries": 2}, 0, True),
    ],
)
def test_a_search_waits_on_a_thread_unless_it_is_quick_and_alone(
    client: TestClient, threads: list[str], body: dict[str, Any], beside: int, waits: bool
) -> None:
    vector = {"vector": [1.0] * client.get("/info").json()["dimension"]}
    body = {"queries": [vector, vector]} if "queries" in body else vector | body
    for _ in range(beside):
        slots_of(client).enter()
    try:
        answer = client.post("/search", json=body)
    finally:
        for _ in range(beside):
            slots_of(client).leave()
    assert answer.status_code == 200, answer.text
    assert slots_of(client).count == 0
    assert [name.startswith("work") for name in threads] == [waits]


def test_an_error_of_a_quick_search_gives_its_slot_back(client: TestClient, threads: list[str]) -> None:
    vector = [1.0] * client.get("/info").json()["dimension"]
    assert client.post("/search", json={"vector": vector, "k": 10**6}).status_code == 400
    assert slots_of(client).count == 0
    assert client.post("/search", json={"vector": vector}).status_code == 200
    assert not threads[0].startswith("work")
