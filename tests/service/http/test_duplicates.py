"""GET /duplicates and POST /duplicates/dismissals over HTTP, with the real process that finds the groups."""

import hashlib
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from service.gallery import Gallery
from service.store.catalog_reader import CatalogReader
from tests.conftest import encoded, scene
from tests.service.conftest import Served
from tests.service.http.rows import assert_refused


def ready(client: TestClient, address: str = "/duplicates?preset=exact") -> Any:
    """Ask until the groups are found; return the first page."""
    for _ in range(600):
        answer = client.get(address)
        if answer.status_code != 202:
            assert answer.status_code == 200, answer.text
            return answer.json()
        assert 0 <= answer.json()["progress"] < 1
        assert answer.headers["retry-after"] == "1"
        time.sleep(0.1)
    raise AssertionError("no groups were found in a minute")


def put(client: TestClient, id: str, seed: int) -> None:
    assert client.put(f"/images/{id}", content=encoded(scene(seed=seed))).is_success


def ids(page: Any) -> list[list[str]]:
    return [[item["id"] for item in group["items"]] for group in page["groups"]]


def test_groups_are_found_once_and_again_after_changes(served: Served) -> None:
    client = served()
    for id, seed in (("a", 1), ("b", 1), ("c", 2)):
        put(client, id, seed)
    address = "/duplicates?preset=exact"
    assert client.get(address).status_code == 202
    page = ready(client)
    assert ids(page) == [["a", "b"]]
    assert (page["total"], page["next"], page["sequence"]) == (1, None, 3)
    group = page["groups"][0]
    assert (group["best"], group["reason"]) == ("a", "first added")
    assert group["items"][1] == group["items"][0] | {"id": "b"}
    picture = encoded(scene(seed=1))
    assert (page["rest"], page["rest_bytes"]) == (1, len(picture))
    assert group["items"][0] == {
        "id": "a",
        "score": 1.0,
        "exact": True,
        "digest": hashlib.sha256(picture).hexdigest(),
        "source": None,
        "width": 64,
        "height": 48,
        "size_bytes": len(picture),
        "format": "PNG",
        "date": None,
    }
    # The answer is kept: no process runs.
    assert client.get(address).json() == page
    put(client, "d", 2)
    assert client.get(address).status_code == 202
    assert ids(ready(client)) == [["a", "b"], ["c", "d"]]
    assert client.delete("/images/a").status_code == 204
    assert ids(ready(client)) == [["c", "d"]]


def test_a_result_is_given_once_though_the_store_has_changed_since(served: Served) -> None:
    client = served()
    for id in "ab":
        put(client, id, 1)
    assert client.get("/duplicates?preset=exact").status_code == 202
    groupings = client.app._app.state.groupings  # type: ignore[attr-defined]
    while not groupings._job.process.done:
        time.sleep(0.05)
    put(client, "c", 1)
    page = client.get("/duplicates?preset=exact")
    assert (page.status_code, page.json()["sequence"], ids(page.json())) == (200, 2, [["a", "b"]])
    assert client.get("/duplicates?preset=exact").status_code == 202
    assert ids(ready(client)) == [["a", "b", "c"]]


def test_nothing_begins_where_only_known_groups_are_asked_for(served: Served) -> None:
    client = served()
    for id in "ab":
        put(client, id, 1)
    address = "/duplicates?preset=exact"
    groupings = client.app._app.state.groupings  # type: ignore[attr-defined]
    answer = client.get(f"{address}&begin=false")
    assert (answer.status_code, answer.json(), groupings._job) == (202, {"progress": 0}, None)
    page = ready(client)
    assert client.get(f"{address}&begin=false").json() == page
    put(client, "c", 1)
    # Groups of the store as it was are no answer.
    assert (client.get(f"{address}&begin=false").status_code, groupings._job) == (202, None)


def test_near_ones_go_by_the_threshold(served: Served) -> None:
    client = served()
    gallery: Gallery = client.app._app.state.gallery  # type: ignore[attr-defined]
    put(client, "a", 1)
    assert client.put("/images/b", content=encoded(scene(seed=1).resize((80, 60)).rotate(20))).is_success
    put(client, "c", 5)
    one, other = (gallery.store.embedding(id) for id in "ab")
    assert one is not None
    assert other is not None
    score = float(np.dot(one, other))
    page = ready(client, f"/duplicates?threshold={score - 0.01}")
    assert ids(page)[0][:2] == ["b", "a"]
    assert page["groups"][0]["items"][1]["score"] == pytest.approx(score, abs=1e-4)
    assert page["groups"][0]["reason"] == "most pixels, 80×60"
    assert score < 0.995
    above = ids(ready(client, f"/duplicates?threshold={score + 1e-4}"))
    assert not any({"a", "b"} <= set(group) for group in above)
    # The preset's threshold is that of the store's strangers, as the card of this encoder names none.
    ready(client, "/duplicates")


def test_pages_follow_each_other_until_the_groups_are_rebuilt(served: Served) -> None:
    client = served()
    for number in range(7):
        for letter in "ab":
            put(client, f"{number}{letter}", number)
    ready(client)
    pages, cursor = [], ""
    while True:
        page = client.get(f"/duplicates?preset=exact&limit=3{cursor}").json()
        pages.append(ids(page))
        if page["next"] is None:
            break
        cursor = f"&cursor={page['next']}"
    assert [len(page) for page in pages] == [3, 3, 1]
    assert [group for page in pages for group in page] == [[f"{number}a", f"{number}b"] for number in range(7)]
    put(client, "7a", 7)
    # Pages of what was found go on.
    assert client.get(f"/duplicates?preset=exact&limit=3{cursor}").status_code == 200
    ready(client)
    assert_refused(client.get(f"/duplicates?preset=exact&limit=3{cursor}"), 404, "page_not_found")
    assert_refused(client.get("/duplicates?preset=exact&cursor=7"), 404, "page_not_found")
    assert_refused(client.get(f"/duplicates?preset=exact&cursor={10**18 - 1}"), 404, "page_not_found")


def test_pictures_that_are_told_apart_leave_their_group_for_good(served: Served) -> None:
    client = served()
    for id in "ab":
        put(client, id, 1)
    assert ids(ready(client)) == [["a", "b"]]
    assert client.post("/duplicates/dismissals", json={"ids": ["a", "a"]}).json() == {"pairs": 0}
    answer = client.post("/duplicates/dismissals", json={"ids": ["a", "b", "a"]})
    assert (answer.status_code, answer.json()) == (200, {"pairs": 1})
    assert ids(ready(client)) == []
    client.delete("/images/b")
    put(client, "again", 1)
    assert ids(ready(client)) == []
    client.post("/duplicates/dismissals", json={"ids": ["again", "a"], "dismissed": False})
    assert ids(ready(client)) == [["a", "again"]]


@pytest.mark.parametrize(
    ("content", "status", "says"),
    [
        ({"ids": ["a"]}, 400, "ids: expected at least 2, got 1"),
        ({"ids": ["a"] * 101}, 400, "ids: expected at most 100, got 101"),
        ({"ids": ["a", 7]}, 400, "expected a text, got 7"),
        ({"ids": ["a", "\0"]}, 400, "id: expected text without control characters"),
        ({"ids": ["a", "b"], "dismissed": 1}, 400, "dismissed: expected true or false, got 1"),
        ({"ids": ["a", "b"], "dismised": True}, 400, "dismissed"),
        ({}, 400, "ids: is missing"),
        ({"ids": ["a", "none"]}, 404, "no item has this id"),
    ],
)
def test_dismissals_that_cannot_be(tmp_path: Path, served: Served, content: Any, status: int, says: str) -> None:
    client = served()
    for id in "ab":
        put(client, id, 1)
    answer = client.post("/duplicates/dismissals", json=content)
    assert answer.status_code == status
    assert says in answer.json()["detail"]
    with closing(CatalogReader(tmp_path / "store")) as reader:
        assert reader.dismissed() == set()


def test_a_key_that_may_read_finds_and_does_not_dismiss(served: Served) -> None:
    client = served(api_keys="read:a-key-that-may-read")
    headers = {"authorization": "Bearer a-key-that-may-read"}
    assert client.get("/duplicates?preset=exact", headers=headers).status_code == 202
    answer = client.post("/duplicates/dismissals", json={"ids": ["a", "b"]}, headers=headers)
    assert_refused(answer, 403, "read_only_key")
    assert_refused(client.get("/duplicates"), 401, "unauthorized")


@pytest.mark.parametrize(
    "query", ["threshold=0", "threshold=1.1", "threshold=nan", "preset=best", "limit=0", "cursor=a", "treshold=1"]
)
def test_parameters_that_cannot_be(served: Served, query: str) -> None:
    assert_refused(served().get(f"/duplicates?{query}"), 400, "invalid_request")
