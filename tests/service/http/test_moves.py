"""POST /images/moves, and what an item's file says."""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.conftest import encoded, scene
from tests.service.conftest import Served


@pytest.fixture
def client(served: Served) -> TestClient:
    """Return a client of a service with the items a, b and c."""
    client = served()
    for n, id in enumerate("abc"):
        client.put(f"/images/{id}", content=encoded(scene(50, 40, seed=n)), headers={"Content-Type": "image/png"})
        client.patch(f"/images/{id}", json={"metadata": {"told": id}})
    return client


def move(client: TestClient, id: str, to: str | None, **more: Any) -> dict[str, Any]:
    digest = client.get(f"/images/{id}?include=digest").json()["digest"]
    return {"id": id, "digest": digest, "to": to} | more


def test_items_exchange_their_ids_and_keep_the_rest(client: TestClient) -> None:
    vector = client.get("/images/a?include=embedding").json()["embedding"]
    moves = [move(client, "a", "b"), move(client, "b", "a"), move(client, "c", None)]
    assert client.post("/images/moves", json={"moves": moves}).json() == {"moved": 3}
    assert client.get("/images/b").json()["metadata"] == {"told": "a"}
    assert client.get("/images/b?include=embedding").json()["embedding"] == vector
    assert client.get("/images/a").json()["metadata"] == {"told": "b"}
    assert client.get("/images/c").status_code == 404
    assert client.post("/search", json={"vector": vector, "k": 3}).json()["hits"][0]["id"] == "b"
    # The same request again finds other pictures under these ids, and changes nothing.
    assert client.post("/images/moves", json={"moves": moves}).json() == {"moved": 0}
    assert client.get("/images/b").json()["metadata"] == {"told": "a"}


def test_an_id_that_is_taken_refuses_all_moves(client: TestClient) -> None:
    moves = [move(client, "a", "new"), move(client, "b", "c")]
    answer = client.post("/images/moves", json={"moves": moves})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")
    assert [item["id"] for item in client.get("/images").json()["items"]] == ["a", "b", "c"]
    # The id of one that is removed in the same step is free.
    moves = [move(client, "b", "c"), move(client, "c", None)]
    assert client.post("/images/moves", json={"moves": moves}).json() == {"moved": 2}
    assert client.get("/images/c").json()["metadata"] == {"told": "b"}


@pytest.mark.parametrize(
    "change", [{"to": "a\nb"}, {"id": ""}, {"to": 1}, {"file": {"date": "today"}}, {"file": {"width": -1}}, {"no": 1}]
)
def test_moves_that_cannot_be(client: TestClient, change: dict[str, Any]) -> None:
    answer = client.post("/images/moves", json={"moves": [move(client, "a", "d") | change]})
    assert answer.status_code == 400
    assert client.get("/images/a").status_code == 200


def test_an_item_shows_what_its_file_says(client: TestClient, tmp_path: Path) -> None:
    file = client.get("/images/a").json()["file"]
    size = len(encoded(scene(50, 40)))
    expected = {"width": 50, "height": 40, "size_bytes": size, "format": "PNG", "date": None, "mtime_ns": None}
    assert file == expected
    exif = scene(50, 40).getexif()
    exif[0x0132] = "2020:01:02 03:04:05"
    data = encoded(scene(50, 40), "JPEG", exif=exif)
    client.put("/images/dated", content=data, headers={"Content-Type": "image/jpeg"})
    assert client.get("/images/dated").json()["file"]["date"] == "2020-01-02T03:04:05"
    (path := tmp_path / "a.jpg").write_bytes(data)
    sources = {"sources": json.dumps({"sent": str(path)})}
    assert client.post("/images", files=[("file", ("sent", data))], data=sources).status_code == 200
    (listed,) = client.get("/images?include=file&include=source&prefix=sent").json()["items"]
    assert listed["source"] == str(path)
    assert (listed["file"]["format"], listed["file"]["mtime_ns"]) == ("JPEG", path.stat().st_mtime_ns)
    moved = move(client, "a", "a", source="/far/a.png", file=expected | {"mtime_ns": 7, "date": "2021-01-01T00:00:00"})
    assert client.post("/images/moves", json={"moves": [moved]}).json() == {"moved": 1}
    assert client.get("/images/a").json()["file"]["date"] == "2021-01-01T00:00:00"
