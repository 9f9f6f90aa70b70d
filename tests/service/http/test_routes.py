"""HTTP through the real BentoML app: requests and their answers."""

import base64
import importlib.metadata
import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from service.encoding.encoder import Encoder
from service.gallery import open_gallery
from service.jobs.index import index_source
from service.settings import Settings
from service.sources import open_source
from tests.conftest import MODEL, encoded, scene
from tests.service.conftest import Served
from tests.service.encoding.test_images import png_header

PNG = {"content-type": "image/png"}
PICTURE = encoded(scene())


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The service with twenty digits in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_DO_NOT_TRACK", "True")
        from service.app import make_service

        app = make_service(Settings(store=tmp_path_factory.mktemp("api") / "store", model=MODEL)).to_asgi()
        with TestClient(app, raise_server_exceptions=False) as opened:
            digits = open_source("digits[:20]")
            for position in range(len(digits)):
                entry = digits.entry(position)
                answer = opened.put(
                    f"/images/{entry.id}",
                    content=entry.data,
                    headers=PNG,
                    params={"metadata": f'{{"label": "{entry.label}"}}'},
                )
                assert answer.status_code == 201
            yield opened


def digit(position: int) -> bytes:
    return open_source("digits").entry(position).data


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_every_form_of_a_picture_gives_the_same_embedding(client: TestClient, encoder: Encoder) -> None:
    data = digit(0)
    answers = [
        client.post("/embed", content=data, headers=PNG),
        client.post("/embed", content=data),
        client.post("/embed", files={"file": ("a.png", data, "image/png")}),
        client.post("/embed", json={"images": [as_base64(data)]}),
        client.post("/embed", json={"images": ["data:image/png;base64," + as_base64(data)]}),
    ]
    assert [answer.status_code for answer in answers] == [200] * 5
    first = answers[0].json()
    assert first["model"] == "mnist"
    assert first["fingerprint"] == encoder.card.fingerprint
    assert first["dimension"] == encoder.dimension == len(first["embeddings"][0])
    for answer in answers[1:]:
        assert np.allclose(answer.json()["embeddings"], first["embeddings"], atol=1e-5)
    assert abs(np.linalg.norm(first["embeddings"][0]) - 1) < 1e-5


def test_what_the_body_leaves_out_the_address_may_say(client: TestClient) -> None:
    picture = as_base64(digit(0))
    numbers = client.post("/embed", json={"images": [picture]}).json()["embeddings"][0]
    text = client.post("/embed?encoding_format=base64", json={"images": [picture]}).json()["embeddings"][0]
    assert np.allclose(np.frombuffer(base64.b64decode(text), "<f4"), numbers, atol=1e-6)
    body = {"images": [picture], "encoding_format": "float"}
    assert client.post("/embed?encoding_format=base64", json=body).json()["embeddings"][0] == numbers
    assert len(client.post("/search?k=3", json={"id": "digits/00001"}).json()["hits"]) == 3


def test_embed_takes_several(client: TestClient) -> None:
    files = [("file", (f"{n}.png", digit(n), "image/png")) for n in range(3)]
    many = client.post("/embed", files=files).json()["embeddings"]
    single = client.post("/embed", content=digit(2), headers=PNG).json()["embeddings"]
    assert len(many) == 3
    assert np.allclose(many[2], single[0], atol=1e-5)


def test_a_search_by_picture_finds_itself_and_by_id_does_not(client: TestClient) -> None:
    by_picture = client.post("/search", params={"k": 5}, content=digit(3), headers=PNG).json()["hits"]
    assert by_picture[0]["id"] == "digits/00003"
    assert by_picture[0]["score"] > 0.9999
    assert by_picture[0]["metadata"] == {"label": "3"}
    assert [hit["score"] for hit in by_picture] == sorted((hit["score"] for hit in by_picture), reverse=True)
    by_id = client.post("/search", json={"id": "digits/00003", "k": 4}).json()["hits"]
    assert [hit["id"] for hit in by_id] == [hit["id"] for hit in by_picture[1:]]


def test_search_in_json(client: TestClient) -> None:
    vector = client.post("/embed", content=digit(3), headers=PNG).json()["embeddings"][0]
    expected = client.post("/search", params={"k": 3}, content=digit(3), headers=PNG).json()["hits"]
    for body in (
        {"vector": vector, "k": 3},
        {"vector": [7 * x for x in vector], "k": 3},
        {"image": as_base64(digit(3)), "k": 3},
    ):
        hits = client.post("/search", json=body).json()["hits"]
        assert [hit["id"] for hit in hits] == [hit["id"] for hit in expected]
    assert len(client.post("/search", json={"vector": vector}).json()["hits"]) == 10
    assert len(client.post("/search", json={"vector": vector, "k": 1000}).json()["hits"]) == 20


def test_the_life_of_an_item(client: TestClient) -> None:
    url = "/images/holiday%20%E2%98%80/a%3Fb.png"
    assert client.get(url).status_code == 404
    assert client.put(url, content=PICTURE, headers=PNG).status_code == 201
    found = client.get(url).json()
    assert found.pop("variant") == client.get("/info").json()["variant"]
    assert found.pop("file")["format"] == "PNG"
    assert found == {"id": "holiday ☀/a?b.png", "metadata": {}}
    form = {"files": {"file": ("x", PICTURE)}, "data": {"metadata": '{"year": 2026}'}}
    assert client.put(url, **form).status_code == 200  # type: ignore[arg-type]
    assert client.get(url).json()["metadata"] == {"year": 2026}
    content = client.get(url + "/content")
    assert content.content == PICTURE
    assert content.headers["content-type"] == "image/png"
    assert content.headers["x-content-type-options"] == "nosniff"
    small = client.get(url + "/thumbnail")
    assert small.headers["content-type"] == "image/webp"
    assert small.content[8:12] == b"WEBP"
    assert client.delete(url).status_code == 204
    assert client.delete(url).status_code == 404
    assert client.get(url + "/thumbnail").status_code == 404
    assert client.get(url + "/content").json()["detail"] == "no item has this id"


def test_listing_pages_through_all(client: TestClient) -> None:
    seen: list[str] = []
    cursor = None
    while True:
        page = client.get("/images", params={"limit": 7} | ({"cursor": cursor} if cursor else {})).json()
        seen += [item["id"] for item in page["items"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert seen == [f"digits/{n:05d}" for n in range(20)]


def test_info(client: TestClient, encoder: Encoder) -> None:
    info = client.get("/info").json()
    assert info["model"] == "mnist"
    assert info["fingerprint"] == encoder.card.fingerprint
    assert (info["dimension"], info["count"], info["notice"]) == (encoder.dimension, 20, None)
    assert info["limits"]["max_k"] == 1000
    assert info["preprocessing"] == {
        "side": 28,
        "resize": 28,
        "resample": 3,
        "rescale": None,
        "mean": None,
        "std": None,
    }
    assert info["versions"]["lookalike"] == importlib.metadata.version("lookalike")
    assert info["commit"] is None


def test_info_of_an_image_tells_its_commit(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOKALIKE_COMMIT", "0123abc")
    assert client.get("/info").json()["commit"] == "0123abc"


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/", "/docs", "/openapi.json", "/page/styles/page.css"])
def test_pages_that_are_there(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 200


def test_docs_carry_their_scripts(client: TestClient) -> None:
    import re

    text = client.get("/docs").text
    addresses = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert len(addresses) >= 2
    for address in addresses:
        assert address.startswith("swagger/")
        assert client.get(f"/{address}").status_code == 200


VECTOR = [0.0] * 128
JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize(
    ("data", "headers", "status", "says"),
    [
        (b"", PNG, 400, "got none"),
        (b"hello, I am text", {}, 415, "JPEG, PNG, WEBP, GIF, BMP"),
        (b"hello, I am text", PNG, 415, "JPEG, PNG, WEBP, GIF, BMP"),
        (PICTURE, {"content-type": "text/plain"}, 415, "multipart/form-data with the field file"),
        (PICTURE, {"content-type": "application/vnd.bentoml+pickle"}, 415, "expected a picture"),
        (encoded(scene(), "JPEG")[:-200], {}, 422, "cut short"),
        (png_header(9_000, 9_000), {}, 413, "9000x9000; the limit is 25000000 pixels"),
        (png_header(10_000, 1), {}, 413, "the limit is 100:1"),
        (b"\0" * 10_000_001, {}, 413, "the limit is 10000000"),
        (b"{", JSON, 400, "not JSON"),
        (b"\xff\xfe\xff", JSON, 400, "not JSON"),
        (b"[" * 100_000, JSON, 400, "not JSON"),
        (b"[]", JSON, 400, 'expected an object with exactly one of "images" or "texts"'),
        (b'{"images": []}', JSON, 400, "images: expected at least 1, got 0"),
        (b'{"images": [1]}', JSON, 400, "images[0]: expected a text, got 1"),
        (b'{"images": ["http://127.0.0.1/x.png"]}', JSON, 400, "expected base64 or a data URI"),
        (b'{"images": ["data:image/png,abc"]}', JSON, 400, "data:image/"),
        (b'{"images": [""]}', JSON, 400, "got none"),
        (json.dumps({"images": ["aGVsbG8=", "aGVsbG8="]}).encode(), JSON, 415, "picture 0"),
        (json.dumps({"images": ["aGVsbG8="] * 33}).encode(), JSON, 413, "at most 32 pictures, got 33"),
        (b"no form", FORM, 400, "not a multipart form"),
        (b"no form", {"content-type": "multipart/form-data"}, 400, "not a multipart form"),
        (
            b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nhttp://127.0.0.1/\r\n--x--\r\n',
            FORM,
            400,
            "field file",
        ),
        (
            b'--x\r\nContent-Disposition: form-data; name="other"; filename="a"\r\n\r\na\r\n--x--\r\n',
            FORM,
            400,
            "field file",
        ),
        (
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n\r\n--x--\r\n',
            FORM,
            400,
            "got none",
        ),
        (b"--x\r\nContent-Disposition: nonsense\r\n\r\na\r\n--x--\r\n", FORM, 400, "not a multipart form"),
    ],
)
def test_bodies_that_are_refused(
    client: TestClient, data: bytes, headers: dict[str, str], status: int, says: str
) -> None:
    answer = client.post("/embed", content=data, headers=headers)
    assert_problem(answer, status, says)


def assert_problem(answer: Any, status: int, says: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert set(problem) - {"errors"} == {"type", "title", "status", "detail", "code", "request_id"}
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert says in problem["detail"]


@pytest.mark.parametrize("k", ["0", "-1", "1000000000", "x", "1.5", "", "1e3", "NaN"])
def test_k_in_the_address(client: TestClient, k: str) -> None:
    assert_problem(client.post(f"/search?k={k}", content=PICTURE, headers=PNG), 400, "k: ")


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ('{"vector": %s, "k": 0}' % ([1] * 128), 400, "k: expected 1 or more, got 0"),
        ('{"vector": %s, "k": "3"}' % ([1] * 128), 400, "k: expected a whole number, got a text"),
        ('{"vector": %s, "k": true}' % ([1] * 128), 400, "k: expected a whole number, got true or false"),
        ('{"vector": %s, "k": 1e30}' % ([1] * 128), 400, "k: expected a whole number from 1 to 1000"),
        ('{"vector": %s, "k": 1001}' % ([1] * 128), 400, "k: expected a whole number from 1 to 1000, got 1001"),
        ('{"vector": [1, 2, 3]}', 400, "vector: expected 128 numbers, got 3"),
        ('{"vector": []}', 400, "vector: expected 128 numbers, got 0"),
        ('{"vector": %s}' % VECTOR, 400, "only zeros"),
        ('{"vector": [NaN%s]}' % (", 0" * 255), 400, "vector[0]: expected a finite number"),
        ('{"vector": [1e999%s]}' % (", 0" * 255), 400, "vector[0]: expected a finite number"),
        ('{"vector": [1%s]}' % ("0" * 400), 400, "vector[0]: expected a finite number"),
        ('{"vector": [1%s]}' % ("0" * 5000), 400, "not JSON"),
        ('{"vector": "abc"}', 400, "vector: expected a list, got a text"),
        ('{"vector": [true, "x"]}', 400, "vector[0]: expected a number, got true or false"),
        ('{"id": "nobody"}', 404, "no item has this id"),
        ('{"id": 3}', 400, "id: expected a text, got 3"),
        ('{"id": ""}', 400, "id: expected 1 to 256 bytes, got 0"),
        ('{"id": "\\ud800"}', 400, "not JSON"),
        ('{"id": "digits/00001", "vector": [1]}', 400, "exactly one of"),
        ('{"image": "***"}', 400, "expected base64"),
        ("{}", 400, 'exactly one of "image", "text", "vector", "id", "all" or "queries"'),
        ('{"id": "digits/00001", "colour": "red"}', 400, "a field that is not known here"),
    ],
)
def test_searches_that_are_refused(client: TestClient, body: str, status: int, says: str) -> None:
    assert_problem(client.post("/search", content=body.encode(), headers=JSON), status, says)


def test_a_vector_of_extreme_numbers_is_a_direction_all_the_same(client: TestClient) -> None:
    for number in ("1e308", "1e-308", "1e-320"):
        answer = client.post("/search", content=('{"vector": [%s]}' % ", ".join([number] * 128)).encode(), headers=JSON)
        assert answer.status_code == 200, number


@pytest.mark.parametrize(
    ("id", "says"),
    [
        ("a%09b", "without control characters"),
        ("%00", "without control characters"),
        ("x" * 257, "1 to 256 bytes, got 257"),
        ("%C3%A9" * 129, "1 to 256 bytes, got 258"),
    ],
)
def test_ids_that_are_refused(client: TestClient, id: str, says: str) -> None:
    assert_problem(client.put(f"/images/{id}", content=PICTURE, headers=PNG), 400, says)


def test_one_id_however_its_accents_are_written(client: TestClient) -> None:
    composed, decomposed = "caf%C3%A9", "cafe%CC%81"
    assert client.put(f"/images/{decomposed}", content=PICTURE, headers=PNG).status_code == 201
    assert client.put(f"/images/{composed}", content=PICTURE, headers=PNG).status_code == 200
    assert client.delete(f"/images/{decomposed}").status_code == 204


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ("[]", "expected a JSON object, got list"),
        ("{", "not JSON"),
        ('{"a": NaN}', "finite numbers"),
        ('{"a": 1e999}', "finite numbers"),
        ('{"a": "\\ud800"}', "whole characters"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_metadata_that_is_refused(client: TestClient, metadata: str, says: str) -> None:
    form = {"files": {"file": ("x", PICTURE)}, "data": {"metadata": metadata}}
    assert_problem(client.put("/images/x", **form), 400, says)  # type: ignore[arg-type]
    assert client.get("/images/x").status_code == 404


def test_nothing_of_a_refused_picture_is_kept(client: TestClient) -> None:
    assert_problem(client.put("/images/bad", content=encoded(scene(), "JPEG")[:-200]), 422, "cut short")
    assert_problem(client.get("/images/bad"), 404, "no item has this id")
    assert client.get("/info").json()["count"] == 20


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/docs.json", 404),
        ("GET", "/static_content/x", 404),
        ("GET", "/page/../api.py", 404),
        ("GET", "/embed", 405),
        ("PATCH", "/images", 405),
        ("PUT", "/images/a/thumbnail", 405),
        ("PATCH", "/images/a/%63ontent", 405),
        ("DELETE", "/images/a/content", 405),
        ("DELETE", "/images/thumbnail", 404),
        ("DELETE", "/images/a%2Fthumbnail", 404),
        ("GET", "/images/a/content/thumbnail", 404),
        ("GET", "/images/nobody", 404),
        ("GET", "/images/nobody/content", 404),
        ("GET", "/images?limit=0", 400),
        ("GET", "/images?limit=1001", 400),
        ("GET", "/images?limit=x", 400),
        ("GET", "/images?cursor=-1", 400),
        ("GET", "/images?cursor=" + "9" * 30, 400),
        ("GET", "/images?cursor=%C2%B2", 400),
    ],
)
def test_addresses_that_are_refused(client: TestClient, method: str, path: str, status: int) -> None:
    assert_problem(client.request(method, path), status, "")


@pytest.mark.parametrize("path", ["/images/a%0Ab", "/images/a%7Fb", "/images/a%FFb", "/%0Aforged"])
def test_paths_that_are_refused_before_any_route(client: TestClient, path: str) -> None:
    assert_problem(client.put(path, content=PICTURE, headers=PNG), 400, "the path: expected")


def test_a_body_that_says_less_than_it_sends_is_stopped(client: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(200):
            yield b"\0" * 100_000

    assert_problem(client.post("/embed", content=chunks()), 413, "larger than the limit of 10000000 bytes")


def test_sixteen_bit_grey_and_eight_bit_grey_are_the_same_picture(client: TestClient) -> None:
    eight = encoded(Image.fromarray(np.asarray(scene().convert("L"))))
    sixteen = encoded(Image.fromarray(np.asarray(scene().convert("L")).astype(np.uint16) * 257))
    answers = [client.post("/embed", content=data, headers=PNG).json()["embeddings"] for data in (eight, sixteen)]
    assert np.allclose(answers[0], answers[1], atol=1e-6)


def test_originals_that_are_not_kept_are_404_with_the_reason(served: Served) -> None:
    client = served(keep_originals="false")
    assert client.put("/images/a", content=PICTURE, headers=PNG).status_code == 201
    assert_problem(client.get("/images/a/content"), 404, "keep_originals is off")
    assert client.get("/images/a/thumbnail").status_code == 200


def test_content_is_the_indexed_file_while_it_is_unchanged(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "pictures" / "a.png"
    file.parent.mkdir()
    file.write_bytes(PICTURE)
    gallery = open_gallery(Settings(store=tmp_path / "store", model=MODEL))
    index_source(open_source(str(file.parent)), gallery)
    gallery.close()
    client = served()
    assert client.get("/images/a.png/content").content == PICTURE
    file.write_bytes(encoded(scene(seed=1)))
    assert_problem(client.get("/images/a.png/content"), 404, "a.png has another by now; index that file again")
    assert client.get("/images/a.png/thumbnail").status_code == 200


def test_the_ztxt_bomb_and_other_chunks_are_harmless(client: TestClient) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 50_000_000, 9))
    head, tail = PICTURE[:33], PICTURE[33:]
    assert client.post("/embed", content=head + bomb + tail, headers=PNG).status_code in (200, 422)


def npy(array: np.ndarray[Any, Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["float32", "float64", ">f4", "columns", "version 2"])
def test_vectors_as_a_numpy_file_find_what_json_finds(client: TestClient, form: str) -> None:
    random = np.random.default_rng(0).normal(size=(5, client.get("/info").json()["dimension"]))
    vectors = np.asfortranarray(random) if form == "columns" else random.astype(form if form[0] in "f>" else "f4")
    body = npy(vectors, version=(2, 0) if form == "version 2" else None)
    where = {"filter": '{"label": {"$in": ["1", "2", "3"]}}', "k": "3"}
    answer = client.post("/search", content=body, params=where, headers={"content-type": "application/x-npy"})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    queries = [{"vector": vector.astype(float).tolist()} for vector in vectors]
    options = {"filter": json.loads(where["filter"]), "k": 3}
    expected = [
        result["hits"] for result in client.post("/search", json={"queries": queries} | options).json()["results"]
    ]
    assert found["ids"] == [[hit["id"] for hit in hits] for hits in expected]
    assert found["scores"] == [[hit["score"] for hit in hits] for hits in expected]
    assert len(found["ids"]) == 5
    assert len(found["ids"][0]) == 3


def test_a_numpy_file_of_anything_else_is_refused(client: TestClient) -> None:
    good = np.ones((2, client.get("/info").json()["dimension"]), "f4")
    wrong = {
        b"": "got other bytes",
        b"\x93NUMPY": "got other bytes",
        npy(good)[:-1]: "bytes follow",
        npy(good) + b"x": "bytes follow",
        npy(good[0]): "got float32 (",
        npy(good[:0]): "got float32 (0, ",
        npy(good.astype(int)): "got int64",
        npy(good.astype("f2")): "got float16",
        npy(good).replace(b"(2, ", b"(9, "): "bytes follow",
        npy(good).replace(b"'fortran_order'", b"'fortran_other'"): "got other bytes",
        npy(np.array([[{}]]), allow_pickle=True): "got object",
        npy(np.ones((2, 3), "f4")): "numbers, got 3",
        npy(np.zeros_like(good)): "got only zeros",
        npy(np.full_like(good, np.nan)): "NaN or infinity",
    }
    for body, says in wrong.items():
        answer = client.post("/search", content=body, headers={"content-type": "application/x-npy"})
        assert (answer.status_code, says in answer.text) == (400, True), (body[:100], answer.text)
    many = client.post("/search", content=npy(np.ones((65, 9), "f4")), headers={"content-type": "application/x-npy"})
    assert (many.status_code, many.json()["detail"]) == (413, "expected at most 64 vectors, got 65")
    k = client.post("/search?k=101", content=npy(good), headers={"content-type": "application/x-npy"})
    assert (k.status_code, k.json()["detail"]) == (400, "k: expected a whole number from 1 to 100, got 101")
