"""Listings, counts, removals by filter, stored files, and items with embeddings, against plain Python."""

import base64
import hashlib
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from starlette.testclient import TestClient

from service.encoding.encoder import Encoder
from service.file_facts import FileFacts
from service.gallery import Gallery
from service.http.guard import Guard
from service.http.routes import create_app
from service.http.slots import Slots
from service.settings import Settings
from service.store import NewItem
from service.store.embedded import EmbeddedStore
from tests.conftest import encoded, scene
from tests.service.http.rows import FORM, OTHER, PICTURE, assert_refused, form
from tests.service.store.test_filters import meets

IDS = [f"{folder}{n:02}" for folder in ("b/", "a/", "", "é/") for n in range(10)]
METADATA = {id: {"n": n, "odd": n % 2 == 1, "tags": [id[:1], "all"]} for n, id in enumerate(IDS)}
DIGEST = "0" * 64
# Some files are unknown, and some dates and sizes are equal.
FACTS = {
    id: FileFacts() if n % 4 == 0 else FileFacts(size_bytes=n % 7 * 100, date=f"2024-01-{n % 5 + 1:02}T00:00:00")
    for n, id in enumerate(IDS)
}
ROWS = np.random.default_rng(0).standard_normal((40, 128)).astype(np.float32)
ROWS /= np.linalg.norm(ROWS, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, encoder: Encoder) -> Iterator[TestClient]:
    """The service by its default settings with forty items; each test leaves them as they were."""
    app, settings = create_app(), Settings()
    store = EmbeddedStore(tmp_path_factory.mktemp("listing") / "store", encoder.card, encoder.dimension)
    store.add(
        [
            NewItem(id, METADATA[id], None, DIGEST, "fp32", row, b"", None, facts=FACTS[id])
            for id, row in zip(IDS, ROWS, strict=True)
        ]
    )
    app.state.gallery = Gallery(encoder, store, settings)
    app.state.slots = Slots(settings.max_waiting, settings.work_timeout_s)
    with TestClient(Guard(app, settings), raise_server_exceptions=False) as opened:
        yield opened
    app.state.slots.close()
    app.state.gallery.close()


FILTERS: list[dict[str, Any]] = [
    {},
    {"odd": True},
    {"n": {"$nin": [1, 2, 3]}},
    {"tags": "a"},
    {"n": {"$exists": False}},
]


def ordered(ids: list[str], order: str) -> list[str]:
    """The ids in an order of GET /images: those without a date or size come last, equal ones in the order of adding."""
    word, backwards = order.removeprefix("-"), order.startswith("-")
    if word in ("added", "id"):
        return sorted(ids, key=IDS.index if word == "added" else str.encode, reverse=backwards)
    values = {id: FACTS[id].date if word == "date" else FACTS[id].size_bytes for id in ids}
    places = {id: (str(values[id]).zfill(20), IDS.index(id)) for id in ids}
    known = sorted((id for id in ids if values[id] is not None), key=places.__getitem__, reverse=backwards)
    return known + sorted((id for id in ids if values[id] is None), key=IDS.index, reverse=backwards)


NAMED = [("", ""), ("a/", ""), ("e\u0301", ""), ("é/0", ""), ("", "É/0"), ("b/", "9"), ("nobody", "")]


@pytest.mark.parametrize("order", ["added", "-added", "id", "-id", "date", "-date", "size", "-size"])
def test_pages_are_the_slices_of_a_sorted_list(app: TestClient, order: str) -> None:
    for content in FILTERS:
        for prefix, name in NAMED:
            begin = unicodedata.normalize("NFC", prefix)
            wanted = [id for id in IDS if meets(METADATA[id], content) and id.startswith(begin) and name.lower() in id]
            wanted = ordered(wanted, order)
            asked: dict[str, Any] = {"filter": json.dumps(content), "prefix": prefix, "name": name, "order": order}
            for limit, offset in ((1000, 0), (7, 0), (3, 5), (2, 100)):
                found, cursor, pages = [], None, 0
                while True:
                    query = asked | {"limit": limit} | ({"offset": offset} if cursor is None else {"cursor": cursor})
                    page = app.get("/images", params=query).json()
                    assert page["total"] == len(wanted)
                    assert len(page["items"]) <= limit
                    found += [item["id"] for item in page["items"]]
                    pages += 1
                    if (cursor := page["next"]) is None:
                        break
                assert found == wanted[offset:], (content, prefix, limit, offset)
                assert pages == max(1, -(-len(wanted[offset:]) // limit))
            counted = app.post("/images/count", json={"filter": content, "prefix": prefix, "name": name}).json()
            assert counted == {"count": len(wanted)}


def test_a_cursor_stands_for_an_item_that_was_removed(app: TestClient) -> None:
    assert app.put("/images/a%2F04x", content=PICTURE).status_code == 201
    for order, last, following in (("id", 26, "a/05"), ("-id", 25, "a/04")):
        whole = [item["id"] for item in app.get("/images", params={"order": order, "limit": 1000}).json()["items"]]
        last = whole.index("a/04x") + 1
        cursor = app.get("/images", params={"order": order, "limit": last}).json()["next"]
        app.delete("/images/a%2F04x")
        page = app.get("/images", params={"order": order, "limit": 1, "cursor": cursor}).json()
        assert [item["id"] for item in page["items"]] == [following]
        assert app.put("/images/a%2F04x", content=PICTURE).status_code == 201
    app.delete("/images/a%2F04x")
    assert app.get("/images?cursor=99999&order=id").json() == {"items": [], "total": 40, "next": None}


@pytest.mark.parametrize("order", ["added", "id", "date", "-date", "size", "-size"])
def test_a_cursor_holds_when_its_item_changes_or_goes(app: TestClient, order: str) -> None:
    whole = ordered(IDS, order)
    for last in (3, 20, 33, 38):
        gone = whole[last - 1]
        cursor = app.get("/images", params={"order": order, "limit": last}).json()["next"]
        file = FACTS[gone]._asdict() | {"size_bytes": 10**6, "date": "2030-01-01T00:00:00"}
        move = {"id": gone, "digest": DIGEST, "to": gone, "file": file}
        for moved in (move, move | {"to": None}):
            assert app.post("/images/moves", json={"moves": [moved]}).json() == {"moved": 1}
            rest = app.get("/images", params={"order": order, "limit": 1000, "cursor": cursor}).json()
            assert [item["id"] for item in rest["items"] if item["id"] != gone] == whole[last:]
        rebuild(app)


def rebuild(app: TestClient) -> None:
    """Put all items back as they were, in their order."""
    app.delete("/images", params={"filter": "{}", "expect": app.get("/images?limit=1").json()["total"]})
    items = [
        {"id": id, "metadata": METADATA[id], "digest": DIGEST, "file": FACTS[id]._asdict()}
        | {"embedding": base64.b64encode(row.tobytes()).decode()}
        for id, row in zip(IDS, ROWS, strict=True)
    ]
    answer = app.post("/images", json={"items": items})
    assert [json.loads(line)["status"] for line in answer.text.splitlines()] == [201] * 40


def test_a_cursor_of_another_order_is_refused(app: TestClient) -> None:
    by_date = app.get("/images?order=date&limit=3").json()["next"]
    by_id = app.get("/images?order=id&limit=3").json()["next"]
    huge = f"7-{str(2**63).encode().hex()}"
    for order, cursor in (("id", by_date), ("date", by_id), ("size", by_date), ("date", "7-ff"), ("size", huge)):
        refused = app.get("/images", params={"order": order, "cursor": cursor})
        assert_refused(refused, 404, "page_not_found")
    assert_refused(app.get("/images?cursor=x"), 400, "invalid_request")


def test_a_name_is_found_in_any_case(app: TestClient) -> None:
    ids = ["names/Beach.JPG", "names/straße", "names/ΣΊΣΥΦΟΣ", "names/cafe\u0301", "names/İ.png", "names/100%_a.png"]
    for id in ids:
        assert app.put(f"/images/{quote(id, safe='')}", content=PICTURE).status_code == 201

    def found(name: str) -> list[str]:
        return [item["id"] for item in app.get("/images", params={"name": name, "prefix": "names/"}).json()["items"]]

    whole = [unicodedata.normalize("NFC", id) for id in ids]
    for name, at in (
        ("BEACH", 0), ("s/beach.jpg", 0), ("STRASSE", 1), ("σίσυφος", 2), ("ΣΊΣ", 2), ("CAFÉ", 3), ("Cafe\u0301", 3),
        ("i\u0307.PNG", 4), ("%_", 5),
    ):  # fmt: skip
        assert found(name) == [whole[at]], name
    assert found("") == found("NAMES") == whole
    assert found("EA") == [whole[0]]
    assert found("_b") == found("*") == found("x" * 2000) == []
    assert app.delete("/images", params={"filter": "{}", "name": "BEACH"}).json() == {"removed": 1}
    assert app.delete("/images", params={"filter": "{}", "prefix": "names/", "expect": 5}).json() == {"removed": 5}


def test_an_item_is_shown_with_what_was_asked_for(app: TestClient) -> None:
    shown = app.get("/images/00").json()
    assert set(shown.pop("file").values()) == {None}
    assert shown == {"id": "00", "metadata": METADATA["00"], "variant": "fp32"}
    whole = app.get("/images/00?include=embedding&include=digest&include=source").json()
    assert np.array_equal(np.asarray(whole["embedding"], np.float32), ROWS[20])
    assert (whole["digest"], whole["source"]) == (DIGEST, None)
    page = app.get("/images?limit=1000&include=embedding&encoding_format=base64").json()
    rows = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in page["items"]]
    assert np.array_equal(rows, ROWS)
    assert_refused(app.get("/images?include=metadata"), 400, "invalid_request")
    assert_refused(app.get("/images?order=name"), 400, "invalid_request")
    assert_refused(app.get("/images?filter=[]"), 400, "invalid_request")
    assert_refused(app.get('/images?filter={"a":{"$regex":"x"}}'), 400, "invalid_query")
    assert_refused(app.post("/images/count", json={"filter": {"$gt": 1}}), 400, "invalid_query")
    # An item may have the name of a route.
    assert app.put("/images/count", content=PICTURE).status_code == 201
    assert app.get("/images/count").json()["id"] == "count"
    assert app.delete("/images/count").status_code == 204


def test_a_listing_is_packed_for_a_client_that_takes_gzip(app: TestClient) -> None:
    asked: dict[str, Any] = {"limit": 1000, "include": ["digest", "source", "variant"]}
    plain = app.get("/images", params=asked, headers={"accept-encoding": "identity"})
    assert len(plain.content) > 4096 and "content-encoding" not in plain.headers
    for accepted in ("gzip", "br;q=1, gzip;q=0.5", "*", "GZIP"):
        packed = app.get("/images", params=asked, headers={"accept-encoding": accepted})
        assert packed.headers["content-encoding"] == "gzip"
        assert int(packed.headers["content-length"]) < len(plain.content) / 3
        assert packed.json() == plain.json()
    for accepted in ("", "gzip;q=0", "br", "*;q=0", "gzip;q=0.0, *"):
        assert "content-encoding" not in app.get("/images", params=asked, headers={"accept-encoding": accepted}).headers
    assert plain.headers["vary"] == "Accept-Encoding"
    small = app.get("/images?limit=3", headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in small.headers


@pytest.mark.parametrize("prefix", ["", "a/", "e\u0301", "é/0", "nobody"])
def test_a_search_finds_only_ids_that_begin_with_a_prefix(app: TestClient, prefix: str) -> None:
    begin = prefix.replace("e\u0301", "é")
    for content in FILTERS:
        wanted = {id for id in IDS if meets(METADATA[id], content) and id.startswith(begin)}
        query = {"vector": ROWS[3].tolist(), "k": 40}
        found = app.post("/search", json=query | {"filter": content, "prefix": prefix}).json()["hits"]
        by_url = app.post("/search", params={"filter": json.dumps(content), "prefix": prefix}, json=query).json()[
            "hits"
        ]
        assert {hit["id"] for hit in found} == wanted
        assert by_url == found


def test_a_removal_by_filter_removes_all_or_nothing(app: TestClient) -> None:
    def ids() -> list[str]:
        return [item["id"] for item in app.get("/images?limit=1000").json()["items"]]

    for n in range(6):
        assert app.put(f"/images/gone%2F{n}", content=PICTURE, params={"metadata": '{"gone": true}'}).status_code == 201
    gone = json.dumps({"gone": True})
    refused = app.delete("/images", params={"filter": gone, "expect": 5})
    assert_refused(refused, 409, "count_mismatch")
    assert "expected 5 items that match, found 6; nothing is removed" in refused.json()["detail"]
    assert len(ids()) == 46
    assert app.delete("/images", params={"filter": gone, "prefix": "gone/0", "expect": 1}).json() == {"removed": 1}
    assert app.delete("/images", params={"filter": gone}).json() == {"removed": 5}
    assert ids() == IDS
    assert app.delete("/images", params={"filter": gone, "expect": 0}).json() == {"removed": 0}
    assert_refused(app.delete("/images"), 400, "invalid_request")
    assert_refused(app.delete("/images?filter={}"), 400, "invalid_request")
    assert_refused(app.delete("/images?filter={}&expect=39"), 409, "count_mismatch")
    assert [hit["id"] for hit in app.post("/search", json={"id": "00", "k": 50}).json()["hits"]].count("gone/1") == 0
    assert ids() == IDS


# Stored files ------------------------------------------------------------------------------------


def test_a_client_that_has_a_picture_does_not_get_it_again(app: TestClient) -> None:
    assert app.put("/images/file", content=PICTURE).status_code == 201
    for path in ("/images/file/content", "/images/file/thumbnail"):
        whole = app.get(path)
        tag = whole.headers["etag"]
        assert whole.headers["cache-control"] == "private, no-cache"
        assert whole.headers["accept-ranges"] == "bytes"
        for given in (tag, f"W/{tag}", f'"x", {tag}', "*"):
            same = app.get(path, headers={"if-none-match": given})
            assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
        for given in ('"x"', tag.strip('"'), ""):
            assert app.get(path, headers={"if-none-match": given}).content == whole.content
        assert app.head(path).headers["content-length"] == str(len(whole.content))
    assert tag != app.get("/images/file/content").headers["etag"]
    assert app.get("/images/file/content").headers["etag"] == f'"{hashlib.sha256(PICTURE).hexdigest()}"'
    app.put("/images/file", content=OTHER)
    again = app.get("/images/file/content", headers={"if-none-match": f'"{hashlib.sha256(PICTURE).hexdigest()}"'})
    assert (again.status_code, again.content) == (200, OTHER)
    app.delete("/images/file")


SIZE = len(PICTURE)


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=3-9", slice(3, 10)),
        ("bytes=5-", slice(5, None)),
        ("bytes=-7", slice(-7, None)),
        (f"bytes=-{SIZE + 5}", slice(0, None)),
        ("BYTES = 3-99999999999999999999", slice(3, None)),
        (f"bytes={SIZE - 1}-", slice(-1, None)),
    ],
)
def test_a_range_is_a_part_of_the_picture(app: TestClient, asked: str, part: slice) -> None:
    app.put("/images/file", content=PICTURE)
    got = app.get("/images/file/content", headers={"range": asked})
    assert (got.status_code, got.content) == (206, PICTURE[part])
    start, stop, _ = part.indices(SIZE)
    assert got.headers["content-range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert app.get("/images/file/content", headers={"range": asked, "if-range": '"other"'}).content == PICTURE
    app.delete("/images/file")


def test_ranges_that_are_none_or_lie_behind_the_end(app: TestClient) -> None:
    app.put("/images/file", content=PICTURE)
    for asked in ("bytes=9-3", "bytes=-", "bytes=0-1,3-4", "lines=1-2", "bytes=a-b", "bytes=١-٢"):
        whole = app.get("/images/file/content", headers=[(b"range", asked.encode())])
        assert (whole.status_code, whole.content) == (200, PICTURE), asked
    for asked in (f"bytes={SIZE}-", "bytes=-0", "bytes=" + "9" * 5000 + "-"):
        late = app.get("/images/file/content", headers={"range": asked})
        assert_refused(late, 416, "range_not_satisfiable")
        assert late.headers["content-range"] == f"bytes */{SIZE}"
    app.delete("/images/file")


# Items with embeddings, and sources --------------------------------------------------------------


def test_items_come_with_their_embeddings(app: TestClient, encoder: Encoder) -> None:
    text = base64.b64encode((3 * ROWS[1]).tobytes()).decode()
    items: list[dict[str, Any]] = [
        {"id": "v/0", "embedding": [float(x) for x in ROWS[0]], "metadata": {"m": 1}, "source": "elsewhere"},
        {"id": "v/1", "embedding": text, "variant": "int8", "original": base64.b64encode(PICTURE).decode()},
        {"id": "v/2", "embedding": [0.0] * 128},
        {"id": "v/3", "embedding": [1.0] * 127},
        {"id": "v/4", "embedding": "AAAA"},
        {"id": "\u0000", "embedding": text},
        {"id": "v/0", "embedding": text},
    ]
    answer = app.post("/images", json={"items": items, "fingerprint": encoder.card.fingerprint})
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["status"] for line in lines] == [201, 201, 400, 400, 400, 400, 200]
    assert [line["index"] for line in lines] == [*range(7)]
    one = app.get("/images/v%2F1?include=embedding&include=digest").json()
    assert np.allclose(one["embedding"], ROWS[1], atol=1e-6)
    assert (one["digest"], one["variant"]) == (hashlib.sha256(PICTURE).hexdigest(), "int8")
    assert app.get("/images/v%2F1/content").content == PICTURE
    zero = app.get("/images/v%2F0?include=source").json()
    assert (zero["metadata"], zero["source"]) == ({"m": 1}, None)
    hits = app.post("/search", json={"vector": ROWS[1].tolist(), "k": 3}).json()["hits"]
    assert {hit["id"] for hit in hits} == {"v/0", "v/1", IDS[1]}
    assert_refused(app.post("/images", json={"items": items, "fingerprint": "other"}), 409, "fingerprint_mismatch")
    assert_refused(app.post("/images", json={"items": []}), 400, "invalid_request")
    assert_refused(app.post("/images", json={"items": [{"id": "a"}]}), 400, "invalid_request")
    assert app.delete("/images", params={"filter": "{}", "prefix": "v/", "expect": 2}).status_code == 200


def test_a_picture_that_is_a_file_of_this_machine_stays_in_it(app: TestClient, tmp_path: Path) -> None:
    same, other = tmp_path / "same.png", tmp_path / "other.png"
    same.write_bytes(PICTURE)
    # As many bytes, of which the last one differs.
    other.write_bytes(PICTURE[:-1] + b"x")
    sources = {"s/0": str(same), "s/1": str(other), "s/2": "shards.tar/7", "s/3": "/dev/zero", "s/4": "\u0000"}
    content = form(*((id, PICTURE) for id in sources), sources=json.dumps(sources))
    answer = app.post("/images", content=content, headers={"content-type": FORM})
    assert [json.loads(line)["status"] for line in answer.text.splitlines()] == [201] * 5
    for id, source in sources.items():
        assert app.get("/images/" + id.replace("/", "%2F"), params={"include": "source"}).json()["source"] == source
    store = app.app._app.state.gallery.store  # type: ignore[attr-defined]
    assert [store.original(id) for id in sources] == [None, *[PICTURE] * 4]
    assert app.get("/images/s%2F0/content").content == PICTURE
    for bad in ('{"s/9": "x"}', '{"s/0": 7}', "[]", json.dumps({"s/0": "x" * 5000})):
        refused = app.post("/images", content=form(("s/0", PICTURE), sources=bad), headers={"content-type": FORM})
        assert_refused(refused, 400, "invalid_request")
    assert app.delete("/images", params={"filter": "{}", "prefix": "s/", "expect": 5}).status_code == 200


# OpenAI ------------------------------------------------------------------------------------------


def test_a_batch_of_any_size_is_embedded(app: TestClient) -> None:
    models = app.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["mnist"]
    pictures = [encoded(scene(seed=n)) for n in range(5)]
    inputs = [base64.b64encode(pictures[n % 5]).decode() for n in range(83)]
    answer = app.post("/v1/embeddings", json={"model": "mnist", "input": inputs}).json()
    rows = np.asarray([one["embedding"] for one in answer["data"]], np.float32)
    assert [one["index"] for one in answer["data"]] == [*range(83)]
    assert rows.shape == (83, 128) and np.allclose(rows, rows[np.arange(83) % 5], atol=1e-6)
    inputs[70] = base64.b64encode(b"no picture").decode()
    refused = app.post("/v1/embeddings", json={"model": "mnist", "input": inputs})
    assert refused.status_code == 415
    assert "picture 70" in refused.json()["error"]["message"]
