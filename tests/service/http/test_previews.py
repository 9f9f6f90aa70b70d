"""Previews, addresses that name a picture's digest, hits with their files, and an item that is put back."""

import base64
import hashlib
import io
import json
import os
import urllib.parse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from service.encoding.encoder import Encoder
from service.gallery import Gallery, open_gallery
from service.http.guard import Guard
from service.http.routes import create_app
from service.http.slots import Slots
from service.jobs.index import index_source
from service.previews import PreviewCache
from service.settings import Settings
from service.sources import open_source
from service.store import NewItem
from tests.conftest import MODEL, encoded, scene
from tests.service.conftest import Served
from tests.service.http.rows import OTHER, PICTURE, assert_refused

KEPT, FOREVER = "private, no-cache", "private, max-age=31536000, immutable"


def opened(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    assert picture.format == "WEBP"
    return picture


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def client(served: Served) -> TestClient:
    return served()


@pytest.mark.parametrize(
    ("stored", "side", "size"),
    [
        ((1400, 700), 512, (512, 256)),
        ((1400, 700), 1024, (1024, 512)),
        ((300, 600), 512, (256, 512)),
        ((300, 200), 1024, (300, 200)),
        ((16, 8), 512, (16, 8)),
    ],
)
def test_a_preview_has_at_most_the_side_asked_for(
    client: TestClient, stored: tuple[int, int], side: int, size: tuple[int, int]
) -> None:
    picture = scene(*stored)
    for format in ("JPEG", "PNG"):
        client.put("/images/a", content=encoded(picture, format, quality=95))
        answer = client.get("/images/a/preview", params={"size": side})
        shown = opened(answer.content)
        assert (answer.headers["content-type"], shown.size) == ("image/webp", size)
        difference = np.abs(np.asarray(shown.convert("RGB"), int) - np.asarray(picture.resize(size), int))
        # A JPEG of few pixels is far from what it was made of.
        assert difference.mean() < (4 if max(stored) > 64 else 20)
        if max(stored) <= 64 and format == "PNG":
            assert not difference.any()


def test_a_preview_is_upright_and_on_white(client: TestClient) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    client.put("/images/turned", content=encoded(scene(600, 300), "JPEG", exif=exif, quality=95))
    turned = opened(client.get("/images/turned/preview?size=512").content)
    assert turned.size == (256, 512)
    expected = np.asarray(scene(600, 300).transpose(Image.Transpose.ROTATE_270).resize((256, 512)), int)
    assert np.abs(np.asarray(turned.convert("RGB"), int) - expected).mean() < 4
    client.put("/images/clear", content=encoded(Image.new("RGBA", (600, 300), (255, 0, 0, 0))))
    assert opened(client.get("/images/clear/preview").content).convert("RGB").getpixel((5, 5)) == (255, 255, 255)


def test_a_client_that_has_a_preview_does_not_get_it_again(client: TestClient) -> None:
    client.put("/images/a", content=PICTURE)
    whole = client.get("/images/a/preview?size=512")
    tag = whole.headers["etag"]
    assert (whole.headers["cache-control"], whole.headers["accept-ranges"]) == (KEPT, "bytes")
    same = client.get("/images/a/preview?size=512", headers={"if-none-match": tag})
    assert (same.status_code, same.content) == (304, b"")
    assert client.get("/images/a/preview?size=1024", headers={"if-none-match": tag}).status_code == 200
    part = client.get("/images/a/preview", headers={"range": "bytes=3-9"})
    assert (part.status_code, part.content) == (206, whole.content[3:10])
    assert_refused(client.get("/images/a/preview", headers={"range": "bytes=999999-"}), 416, "range_not_satisfiable")
    assert client.head("/images/a/preview").headers["content-length"] == str(len(whole.content))
    client.put("/images/a", content=OTHER)
    assert client.get("/images/a/preview?size=512", headers={"if-none-match": tag}).status_code == 200


def test_there_is_no_preview_without_a_picture(client: TestClient) -> None:
    vector = {"embedding": [1.0] * 128}
    broken = base64.b64encode(PICTURE[:100]).decode()
    items = [{"id": "bare", **vector}, {"id": "broken", **vector, "original": broken}]
    client.post("/images", json={"items": items})
    assert_refused(client.get("/images/bare/preview"), 404, "not_found")
    refused = client.get("/images/broken/preview")
    assert_refused(refused, 404, "not_found")
    assert "there is no preview of this item: the picture is damaged" in refused.json()["detail"]
    assert_refused(client.get("/images/nobody/preview"), 404, "not_found")
    for size in ("0", "513", "x", "512.0", ""):
        assert_refused(client.get("/images/bare/preview", params={"size": size}), 400, "invalid_request")


def test_items_that_are_called_as_a_picture_are_reached(client: TestClient) -> None:
    for id in ("a/preview", "preview", "a"):
        assert client.put(f"/images/{urllib.parse.quote(id, safe='')}", content=PICTURE).status_code == 201
        assert client.get(f"/images/{urllib.parse.quote(id, safe='')}").json()["id"] == id
    assert client.get("/images/a/preview").headers["content-type"] == "image/webp"
    assert client.get("/images/a%2Fpreview/preview").headers["content-type"] == "image/webp"
    assert client.get("/images/preview").json()["id"] == "preview"
    assert client.delete("/images/a%2Fpreview").status_code == 204


@pytest.mark.parametrize("picture", ["thumbnail", "preview", "content"])
def test_an_address_with_the_digest_is_kept_for_good(client: TestClient, picture: str) -> None:
    client.put("/images/a", content=PICTURE)
    path, own, other = f"/images/a/{picture}", digest_of(PICTURE)[:16], digest_of(OTHER)[:16]
    whole = client.get(path, params={"v": own})
    assert whole.headers["cache-control"] == FOREVER
    tag = {"if-none-match": whole.headers["etag"]}
    assert client.get(path, params={"v": own}, headers=tag).headers["cache-control"] == FOREVER
    assert client.get(path, params={"v": own}, headers={"range": "bytes=0-3"}).headers["cache-control"] == FOREVER
    for given in ({}, {"v": other}, {"v": own[:15]}, {"v": ""}, {"v": own + "0"}):
        answer = client.get(path, params=given)
        assert (answer.content, answer.headers["cache-control"]) == (whole.content, KEPT)
    client.put("/images/a", content=OTHER)
    assert client.get(path, params={"v": own}).headers["cache-control"] == KEPT
    assert client.get(path, params={"v": other}).headers["cache-control"] == FOREVER
    assert_refused(client.get(path, params={"v": "0" * 65}), 400, "invalid_request")


# On disk -----------------------------------------------------------------------------------------


def test_previews_are_kept_within_a_limit(tmp_path: Path) -> None:
    folder, digests = tmp_path / "previews", [f"{n:064x}" for n in range(4)]

    def webp(size: int) -> bytes:
        return b"RIFF" + (size - 8).to_bytes(4, "little") + bytes(size - 8)

    cache = PreviewCache(folder, 1000)
    assert cache.get(digests[0], 512) is None
    for digest in digests[:3]:
        cache.put(digest, 512, webp(300))
    cache.put("a text", 512, webp(300))
    cache.put(digests[3], 512, webp(1001))
    assert sorted(path.name for path in folder.iterdir()) == [f"{digest}-512.webp" for digest in digests[:3]]
    assert cache.get(digests[0], 1024) is None
    cache.put(digests[3], 1024, webp(301))
    assert [cache.get(digest, 512) for digest in digests] == [None, webp(300), webp(300), None]
    assert cache.get(digests[3], 1024) == webp(301)
    # A file that is not whole is none, and is written again.
    (folder / f"{digests[1]}-512.webp").write_bytes(webp(300)[:200])
    assert cache.get(digests[1], 512) is None
    cache.put(digests[1], 512, webp(299))
    for number, name in enumerate((f"{digests[1]}-512", f"{digests[3]}-1024", f"{digests[2]}-512")):
        os.utime(folder / f"{name}.webp", ns=(number, number))
    (folder / "x.webp.tmp").write_bytes(b"a part")
    # Another process goes on with the files, and may keep fewer of them.
    cache = PreviewCache(folder, 650)
    assert sorted(path.name for path in folder.iterdir()) == [f"{digests[2]}-512.webp", f"{digests[3]}-1024.webp"]
    assert cache.get(digests[2], 512) == webp(300)


def test_a_preview_on_disk_is_that_of_the_items_picture(served: Served, tmp_path: Path) -> None:
    client = served(preview_cache_bytes="1000000", store=str(tmp_path / "store"))
    folder = tmp_path / "store" / "previews"
    assert not folder.exists()
    client.put("/images/a", content=PICTURE)
    made = client.get("/images/a/preview?size=512").content
    (kept,) = folder.iterdir()
    assert kept.name == f"{digest_of(PICTURE)}-512.webp"
    assert kept.read_bytes() == made
    # What is on disk is what is answered.
    other = opened(made).rotate(180)
    other.save(kept, "WEBP", lossless=True)
    assert client.get("/images/a/preview?size=512").content == kept.read_bytes() != made
    client.put("/images/a", content=OTHER)
    assert client.get("/images/a/preview?size=512").content not in (made, kept.read_bytes())
    # An imported item may have a digest that is not of its picture: nothing is kept under it.
    store = client.app._app.state.gallery.store  # type: ignore[attr-defined]
    vector = np.eye(1, 128, dtype=np.float32)[0]
    store.add([NewItem("b", {}, None, "1" * 64, "fp32", vector, b"", PICTURE)])
    assert client.get("/images/b/preview?size=512").content == made
    assert {path.name.partition("-")[0] for path in folder.iterdir()} == {digest_of(PICTURE), digest_of(OTHER)}


def test_without_the_setting_nothing_is_kept(served: Served, tmp_path: Path) -> None:
    client = served(store=str(tmp_path / "store"))
    client.put("/images/a", content=PICTURE)
    assert client.get("/images/a/preview").status_code == 200
    assert not (tmp_path / "store" / "previews").exists()


# Hits, and items that are put back ---------------------------------------------------------------


def test_hits_have_their_files_and_the_answer_the_querys_digest(client: TestClient) -> None:
    for id, data in (("a", PICTURE), ("b", OTHER), ("c", PICTURE)):
        client.put(f"/images/{id}", content=data)
    include = ["digest", "file", "source"]
    found = client.post("/search", params={"include": include}, content=PICTURE).json()
    assert found["digest"] == digest_of(PICTURE)
    assert [hit["digest"] == found["digest"] for hit in found["hits"]] == [True, True, False]
    listed = {item["id"]: item for item in client.get("/images", params={"include": include}).json()["items"]}
    for hit in found["hits"]:
        item = listed[hit["id"]]
        assert hit == {"id": hit["id"], "score": hit["score"], **{name: item[name] for name in include}}
    text = base64.b64encode(OTHER).decode()
    asked: list[tuple[dict[str, Any], str | None]] = [
        ({"image": text}, digest_of(OTHER)),
        ({"id": "a"}, digest_of(PICTURE)),
        ({"vector": [1.0] * 128}, None),
        ({"all": [{"image": text}]}, None),
    ]
    for query, digest in asked:
        assert client.post("/search", json=query | {"include": ["digest"]}).json().get("digest") == digest
        assert set(client.post("/search", json=query).json()) == {"hits"}
    several = client.post("/search", json={"queries": [query for query, _ in asked], "include": ["digest"]}).json()
    assert [result.get("digest") for result in several["results"]] == [digest for _, digest in asked]
    assert_refused(client.post("/search?include=variant", content=PICTURE), 400, "invalid_request")


def item_as_it_is(client: TestClient, id: str) -> dict[str, Any]:
    """All that GET gives of an item, its pictures as bytes."""
    path = f"/images/{urllib.parse.quote(id, safe='')}"
    include = ["embedding", "digest", "source"]
    item: dict[str, Any] = client.get(path, params={"include": include, "encoding_format": "base64"}).json()
    for name in ("thumbnail", "content"):
        answer = client.get(f"{path}/{name}")
        item[name] = answer.content if answer.status_code == 200 else None
    return item


def test_a_removed_item_is_put_back_exactly(tmp_path: Path, encoder: Encoder) -> None:
    """As the page's Undo does, for pictures that the store keeps, that lie in files, and that nobody has any more."""
    files = tmp_path / "pictures"
    files.mkdir()
    for name in ("here.png", "gone.jpg"):
        (files / name).write_bytes(encoded(scene(seed=len(name)), "PNG" if name.endswith("png") else "JPEG"))
        os.utime(files / name, ns=(-5, 1_700_000_000_123_456_789))
    settings = Settings(store=tmp_path / "store", model=MODEL)
    gallery = open_gallery(settings)
    index_source(open_source(str(files)), gallery)
    app = create_app()
    app.state.gallery, app.state.slots = gallery, Slots(settings.max_waiting, settings.work_timeout_s)
    client = TestClient(Guard(app, settings), raise_server_exceptions=False)
    try:
        client.put("/images/sent%2F1", content=PICTURE, params={"metadata": '{"a": [1, null], "b": "é"}'})
        client.post("/images", json={"items": [{"id": "bare", "embedding": [3.0] * 128, "metadata": {"x": 1}}]})
        (files / "gone.jpg").unlink()
        for id in ("here.png", "gone.jpg", "sent/1", "bare"):
            put_back(client, gallery, id)
    finally:
        app.state.slots.close()
        gallery.close()


def put_back(client: TestClient, gallery: Gallery, id: str) -> None:
    before, original = item_as_it_is(client, id), gallery.store.original(id)
    row = {name: before[name] for name in ("id", "metadata", "embedding", "digest", "source", "variant", "file")}
    for name, data in (("thumbnail", before["thumbnail"]), ("original", before["content"])):
        if data is not None:
            row[name] = base64.b64encode(data).decode()
    assert client.delete(f"/images/{urllib.parse.quote(id, safe='')}").status_code == 204
    answer = client.post("/images", json={"items": [row]})
    assert json.loads(answer.text) == {"index": 0, "id": id, "status": 201}
    assert item_as_it_is(client, id) == before
    # A picture that lies in a file is not copied.
    assert gallery.store.original(id) == original


# Without a store ---------------------------------------------------------------------------------


def test_a_service_without_a_store_has_a_page_that_says_so() -> None:
    settings = Settings(model=MODEL, no_store=True, root_path="/below")
    app = create_app()
    app.state.gallery = open_gallery(settings)
    app.state.slots = Slots(settings.max_waiting, settings.work_timeout_s)
    client = TestClient(Guard(app, settings), raise_server_exceptions=False)
    page = client.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert '<base href="/below/">' in page.text
    assert "--no-store" in page.text
    assert "Content-Security-Policy" in page.text
    assert "<script" not in page.text
    assert client.get("/page/styles/page.css").status_code == 200
    assert_refused(client.get("/images"), 404, "no_store")
    assert_refused(client.get("/folders"), 404, "no_store")
    assert_refused(client.get("/scores"), 404, "no_store")
    app.state.slots.close()
    app.state.gallery.close()


def test_the_pages_own_files_need_no_key(served: Served) -> None:
    client = served(api_keys="read:a-key-of-some-length")
    for path in ("/page/page.js", "/page/styles/page.css", "/page/views/browse.js", "/page/example.png"):
        assert client.get(path).status_code == 200, path
    for path in (
        "/page/views",
        "/page/a/b/c.js",
        "/page/%2e%2e/app.py",
        "/page/views/%2e%2e",
    ):
        assert client.get(path).status_code in (401, 404), path
        assert b"def " not in client.get(path).content
