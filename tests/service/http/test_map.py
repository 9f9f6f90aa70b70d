"""GET /map over HTTP, with the real process that makes the maps."""

import time
from base64 import b64decode
from typing import Any

import numpy as np
from starlette.testclient import TestClient

from tests.conftest import encoded, scene
from tests.service.conftest import Served
from tests.service.http.rows import assert_refused


def ready(client: TestClient, query: str = "?method=pca") -> Any:
    """Ask until the map is made; return it."""
    for _ in range(2000):
        answer = client.get(f"/map{query}")
        assert answer.status_code in (200, 202), answer.text
        if answer.status_code == 200:
            return answer.json()
        assert 0 <= answer.json()["progress"] < 1
        assert answer.headers["retry-after"] == "1"
        time.sleep(0.1)
    raise AssertionError("no map was made in minutes")


def put(client: TestClient, id: str, seed: int, metadata: str = "{}") -> None:
    content = encoded(scene(seed=seed))
    assert client.put(f"/images/{id}", params={"metadata": metadata}, content=content).is_success


def numbers(text: str) -> Any:
    return np.frombuffer(b64decode(text), "<u2")


def test_a_map_has_a_place_for_each_item_in_the_order_of_ids(served: Served) -> None:
    client = served()
    for number, id in enumerate(("b/2.png", "a.png", "c.png")):
        put(client, id, number, '{"label": "%d"}' % (number % 2))
    assert client.get("/map?method=pca").status_code == 202
    made = ready(client)
    assert made | {"positions": ""} == {
        "version": "pca.3",
        "sequence": 3,
        "method": "pca",
        "progress": None,
        "count": 3,
        "ids": ["b/2.png", "a.png", "c.png"],
        "positions": "",
    }
    positions = numbers(made["positions"]).reshape(3, 2)
    assert np.ptp(positions.astype(int), axis=0).max() == 65535
    coloured = client.get("/map?method=pca&colour=label").json()
    assert coloured["values"] == ["0", "1"]
    assert numbers(coloured["codes"]).tolist() == [1, 2, 1]
    nothing = client.get("/map?method=pca&colour=none").json()
    assert (nothing["values"], numbers(nothing["codes"]).tolist()) == ([], [0, 0, 0])
    assert {key: coloured[key] for key in made} == made


def test_an_earlier_map_stays_until_the_next_one(served: Served) -> None:
    client = served()
    put(client, "a", 1)
    first = ready(client)
    put(client, "b", 2)
    stale = client.get("/map?method=pca").json()
    assert (stale["ids"], stale["sequence"], stale["progress"]) == (["a"], 1, 0.0)
    # A client that has it waits for the next one.
    known = client.get(f"/map?method=pca&known={first['version']}")
    assert known.status_code == 202
    following = ready(client, f"?method=pca&known={first['version']}")
    assert (following["ids"], following["progress"], following["version"]) == (["a", "b"], None, "pca.2")
    # A map that has no better one is given again.
    assert client.get("/map?method=pca&known=pca.2").json() == following


def test_an_empty_store_has_an_empty_map(served: Served) -> None:
    made = ready(served(), "")
    assert (made["count"], made["ids"], made["positions"]) == (0, [], "")


def test_what_is_no_method_is_refused(served: Served) -> None:
    client = served()
    assert_refused(client.get("/map?method=umap"), 400, "invalid_request")
    assert_refused(client.get("/map?color=label"), 400, "invalid_request")
    assert_refused(client.get(f"/map?colour={'x' * 2001}"), 400, "invalid_request")
