"""Texts over HTTP: an encoder of colours finds, embeds and names pictures by words; what is no text is refused."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from service.errors import InvalidModel
from service.gallery import open_gallery
from service.http.guard import Guard
from service.http.routes import create_app
from service.http.slots import Slots
from service.settings import Settings
from tests.colours import RGB, picture, text_graph, write_colours
from tests.service.http.rows import BASE64, JSON, Row, as_json, assert_openai, assert_refused, send

PICTURES = {name: base64.b64encode(picture(name)).decode() for name in RGB}


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A service whose encoder knows colours, and their pictures in it under their names."""
    folder = tmp_path_factory.mktemp("colours")
    settings = Settings(model=write_colours(folder / "colours"), store=folder / "store")
    app = create_app()
    app.state.gallery = open_gallery(settings)
    app.state.slots = Slots(settings.max_waiting, settings.work_timeout_s)
    with TestClient(Guard(app, settings), raise_server_exceptions=False) as opened:
        for name in RGB:
            assert opened.put(f"/images/{name}", content=picture(name)).status_code == 201
        yield opened
    app.state.slots.close()
    app.state.gallery.close()


def found(client: TestClient, **query: Any) -> list[str]:
    answer = client.post("/search", json={"k": 3, **query})
    assert answer.status_code == 200, answer.text
    return [hit["id"] for hit in answer.json()["hits"]]


def embeddings(client: TestClient, **body: Any) -> Any:
    answer = client.post("/embed", json=body)
    assert answer.status_code == 200, answer.text
    return np.asarray(answer.json()["embeddings"])


def test_words_find_pictures(colours: TestClient) -> None:
    assert found(colours, text="a RED thing")[0] == "red"
    assert found(colours, text="green", threshold=0.9) == ["green"]
    several = colours.post("/search", json={"queries": [{"text": "blue"}, {"id": "red"}, {"text": "white"}], "k": 1})
    assert [one["hits"][0]["id"] for one in several.json()["results"]] == ["blue", "purple", "white"]


@pytest.mark.parametrize(
    ("parts", "hits"),
    [
        ([{"text": "red"}, {"text": "blue"}], ["purple"]),
        ([{"text": "red"}, {"text": "blue", "weight": 0.1}], ["red"]),
        ([{"text": "white"}, {"text": "red", "weight": -0.5}, {"text": "blue", "weight": -0.5}], ["green"]),
        ([{"image": PICTURES["purple"]}, {"text": "blue", "weight": -1}], ["red"]),
        ([{"image": PICTURES["purple"]}, {"vector": [0, 0, 1, 0], "weight": -0.7}], ["red"]),
        # The items of a sum are not among its hits.
        ([{"id": "red"}, {"id": "blue"}], ["purple", "white", "green"]),
        ([{"id": "red", "weight": 7}], ["purple", "white", "green"]),
    ],
)
def test_a_weighted_sum_is_one_query(colours: TestClient, parts: list[Any], hits: list[str]) -> None:
    assert found(colours, all=parts)[: len(hits)] == hits
    several = colours.post("/search", json={"queries": [{"all": parts}], "k": len(hits)}).json()["results"]
    assert [hit["id"] for hit in several[0]["hits"]] == hits


def test_a_sum_is_that_of_unit_vectors_in_plain_numpy(colours: TestClient) -> None:
    words, pictures = embeddings(colours, texts=["red", "green"]), embeddings(colours, images=[PICTURES["blue"]])
    expected = 2 * words[0] - 0.5 * words[1] + 1e-3 * pictures[0] + 3 * np.array([0, 0.6, 0.8, 0])
    expected /= np.linalg.norm(expected)
    parts = [
        {"text": "red", "weight": 2},
        {"text": "green", "weight": -0.5},
        {"image": PICTURES["blue"], "weight": 1e-3},
        {"vector": [0, 3, 4, 0], "weight": 3},
    ]
    answer = colours.post("/search", json={"all": parts, "include": ["embedding"]}).json()["hits"]
    assert len(answer) == len(RGB)
    for hit in answer:
        assert hit["score"] == pytest.approx(float(expected @ np.asarray(hit["embedding"])), abs=1e-6)


def test_texts_are_embedded_beside_pictures(colours: TestClient) -> None:
    texts = ["red", "GREEN thing", "blue"]
    rows = embeddings(colours, texts=texts)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(embeddings(colours, texts=texts[1:2]), rows[1:2], atol=1e-6)
    pictures = embeddings(colours, images=[PICTURES[name] for name in ("red", "green", "blue")])
    assert ((rows @ pictures.T).argmax(1) == [0, 1, 2]).all()
    answer = colours.post("/embed", json={"texts": texts, "encoding_format": "base64"}).json()
    decoded = [np.frombuffer(base64.b64decode(row), "<f4") for row in answer["embeddings"]]
    np.testing.assert_allclose(decoded, rows, atol=1e-6)


def openai(client: TestClient, **body: Any) -> Any:
    answer = client.post("/v1/embeddings", json={"model": "colours", **body})
    assert answer.status_code == 200, answer.text
    return np.asarray([row["embedding"] for row in answer.json()["data"]])


def test_openais_clients_send_texts_and_data_uris(colours: TestClient) -> None:
    uri = f"data:image/png;base64,{PICTURES['red']}"
    text, image = embeddings(colours, texts=["blue"])[0], embeddings(colours, images=[PICTURES["red"]])[0]
    np.testing.assert_allclose(openai(colours, input=["blue", uri]), [text, image], atol=1e-6)
    np.testing.assert_allclose(openai(colours, input="blue", modality="text"), [text], atol=1e-6)
    np.testing.assert_allclose(openai(colours, input=PICTURES["red"], modality="image"), [image], atol=1e-6)
    # Base64 without the head of a data URI is a text of odd words.
    odd = embeddings(colours, texts=[PICTURES["red"]])
    np.testing.assert_allclose(openai(colours, input=PICTURES["red"]), odd, atol=1e-6)
    # What begins like a data URI may be a text.
    np.testing.assert_allclose(
        openai(colours, input="data: blue", modality="text"), embeddings(colours, texts=["data: blue"]), atol=1e-6
    )


def test_pictures_are_named_by_labels(colours: TestClient) -> None:
    labels, templates = ["green", "red", "purple"], ["a {label} one", "{label} and white"]
    answer = colours.post(
        "/classify", json={"images": [PICTURES["red"], PICTURES["purple"]], "labels": labels, "templates": templates}
    )
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert (content["model"], content["logit_scale"], len(content["results"])) == ("colours", 100, 2)
    pictures = embeddings(colours, images=[PICTURES["red"], PICTURES["purple"]])
    for result, seen in zip(content["results"], pictures, strict=True):
        expected = {}
        for label in labels:
            rows = [embeddings(colours, texts=[template.replace("{label}", label)])[0] for template in templates]
            mean = (rows[0] + rows[1]) / 2
            expected[label] = float(seen @ mean / np.linalg.norm(mean))
        total = sum(np.exp(100 * score) for score in expected.values())
        assert [one["label"] for one in result["labels"]] == sorted(labels, key=lambda label: -expected[label])
        for one in result["labels"]:
            assert one["score"] == pytest.approx(expected[one["label"]], abs=1e-5)
            assert one["probability"] == pytest.approx(np.exp(100 * expected[one["label"]]) / total, abs=1e-3)
        assert sum(one["probability"] for one in result["labels"]) == pytest.approx(1, abs=1e-5)


def test_the_cards_logit_scale_counts(tmp_path: Path) -> None:
    settings = Settings(model=write_colours(tmp_path / "colours", {"logit_scale": 2.5}), no_store=True)
    app = create_app()
    app.state.gallery = open_gallery(settings)
    app.state.slots = Slots(settings.max_waiting, settings.work_timeout_s)
    client = TestClient(Guard(app, settings), raise_server_exceptions=False)
    content = client.post("/classify", json={"images": [PICTURES["red"]], "labels": ["red", "green"]}).json()
    first, second = content["results"][0]["labels"]
    assert content["logit_scale"] == client.get("/info").json()["text"]["logit_scale"] == 2.5
    odds = np.exp(2.5 * (first["score"] - second["score"]))
    assert first["probability"] / second["probability"] == pytest.approx(odds, rel=1e-4)
    app.state.slots.close()
    app.state.gallery.close()


def test_odd_texts_are_embedded(colours: TestClient) -> None:
    odd = [
        "\0",
        "red\0",
        "مرحبا",
        "שלום",
        "🚲",
        "👨‍👩‍👧‍👦",
        "e\u0301",
        "\u202ered",
        "\ufeff red",
        "a" * 10_000,
        "red " * 2500,
    ]
    rows = embeddings(colours, texts=odd)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    # What is beyond the eighth token is cut.
    np.testing.assert_allclose(
        embeddings(colours, texts=["red " * 8 + "blue " * 100]), embeddings(colours, texts=["red"]), atol=1e-6
    )
    for text in odd:
        assert len(found(colours, text=text)) == 3


LONG = "zebras jump " * 9000
SURROGATE = b"\\ud83d zebras jump"
IMAGES = [PICTURES["red"]]
FORMS = (
    ("/embed", '{"texts": [%s]}'),
    ("/search", '{"text": %s}'),
    ("/search", '{"all": [{"text": %s}]}'),
    ("/search", '{"queries": [{"text": %s}]}'),
)


def labelled(name: str, status: int, code: str, **fields: Any) -> Row:
    """A request to /classify."""
    return Row(name, status, code, as_json(**{"images": IMAGES, "labels": ["red"]} | fields), JSON, "/classify")


REFUSED = [
    *(
        row
        for path, one in FORMS
        for row in (
            Row(f"empty {one} {path}", 400, "invalid_request", (one % '""').encode(), JSON, path),
            Row(f"blank {one} {path}", 400, "invalid_request", (one % '" \\n "').encode(), JSON, path),
            Row(f"long {one} {path}", 413, "too_large", (one % json.dumps(LONG)).encode(), JSON, path),
            Row(f"surrogate {one} {path}", 400, "invalid_request",
                one.encode().replace(b"%s", b'"' + SURROGATE + b'"'), JSON, path),
            Row(f"number {one} {path}", 400, "invalid_request", (one % "12345678901").encode(), JSON, path),
            Row(f"null {one} {path}", 400, "invalid_request", (one % "null").encode(), JSON, path),
            Row(f"nothing seen {one} {path}", 422, "no_embedding", (one % '"nothing"').encode(), JSON, path),
        )
    ),
    Row("10,000 texts", 413, "too_large", as_json(texts=["red"] * 10_000), JSON),
    Row("no texts", 400, "invalid_request", as_json(texts=[]), JSON),
    Row("texts and images", 400, "invalid_request", as_json(texts=["red"], images=IMAGES), JSON),
    Row("texts as a text", 400, "invalid_request", as_json(texts="red bicycle"), JSON),
    Row("unknown field of texts", 400, "invalid_request", as_json(texts=["red"], colour_of_hair="red"), JSON),
    Row("two kinds in a query", 400, "invalid_request", as_json(text="red", id="red"), JSON, "/search"),
    Row("no part", 400, "invalid_request", as_json(all=[]), JSON, "/search"),
    Row("17 parts", 400, "invalid_request", as_json(all=[{"id": "red"}] * 17), JSON, "/search"),
    Row("a sum in a sum", 400, "invalid_request", as_json(all=[{"all": [{"id": "red"}]}]), JSON, "/search"),
    Row("a part of no kind", 400, "invalid_request", as_json(all=[{"weight": 1}]), JSON, "/search"),
    Row("a part of an unknown id", 404, "not_found", as_json(all=[{"id": "red"}, {"id": "gone"}]), JSON, "/search"),
    Row("weights of 0", 400, "invalid_query", as_json(all=[{"id": "red", "weight": 0}]), JSON, "/search"),
    Row("parts that cancel", 400, "invalid_query",
        as_json(all=[{"text": "red"}, {"text": "red", "weight": -1}]), JSON, "/search"),
    Row("a huge weight", 400, "invalid_request", as_json(all=[{"id": "red", "weight": 1e300}]), JSON, "/search"),
    Row("a weight of NaN", 400, "invalid_request", b'{"all": [{"id": "red", "weight": NaN}]}', JSON, "/search"),
    Row("a weight as a text", 400, "invalid_request", as_json(all=[{"id": "red", "weight": "half"}]), JSON, "/search"),
    Row("a weight of a query", 400, "invalid_request", as_json(id="red", weight=1), JSON, "/search"),
    Row("33 pictures in sums", 413, "too_large",
        as_json(queries=[{"all": [{"image": PICTURES["red"]}] * 11}] * 3), JSON, "/search"),
    Row("257 texts in sums", 413, "too_large",
        as_json(queries=[{"all": [{"text": "red"}] * 16}] * 17), JSON, "/search"),
    labelled("no labels", 400, "invalid_request", labels=[]),
    labelled("no pictures", 400, "invalid_request", images=[]),
    Row("labels left out", 400, "invalid_request", as_json(images=IMAGES), JSON, "/classify"),
    labelled("equal labels", 400, "invalid_request", labels=["red", "red"]),
    labelled("a blank label", 400, "invalid_request", labels=["red", " "]),
    labelled("a long label", 400, "invalid_request", labels=["zebras jump" * 100]),
    labelled("a template without a place", 400, "invalid_request", templates=["a zebra"]),
    labelled("a template of Python", 400, "invalid_request", templates=["{label.__class__}"]),
    labelled("a template of two places", 400, "invalid_request", templates=["{label}{label}"]),
    labelled("no template", 400, "invalid_request", templates=[]),
    labelled("257 sentences", 413, "too_large", labels=[f"zebra {n}" for n in range(257)]),
    labelled("10,000 labels", 413, "too_large", labels=["zebra"] * 10_000),
    labelled("3 times 100 sentences", 413, "too_large", labels=["a", "b", "c"], templates=["{label}"] * 100),
    labelled("10,000 templates", 400, "invalid_request", templates=["{label}"] * 10_000),
    labelled("33 pictures", 413, "too_large", images=IMAGES * 33),
    labelled("a label that says nothing", 422, "no_embedding", labels=["nothing", "red"]),
    labelled("a picture that is none", 400, "invalid_request", images=["zebras jump"]),
    Row("a form", 415, "unsupported_format", b"", "multipart/form-data; boundary=x", "/classify"),
    Row("another encoder", 409, "fingerprint_mismatch", as_json(texts=["red"], fingerprint="zebrasjump"), JSON),
    labelled("another encoder's labels", 409, "fingerprint_mismatch", fingerprint="zebrasjump"),
]  # fmt: skip


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
def test_refused(colours: TestClient, row: Row) -> None:
    assert_refused(send(colours, row), row.status, row.code, row.content.replace(b"nothing", b""))


def test_a_sum_whose_parts_cancel_says_so(colours: TestClient) -> None:
    answer = colours.post("/search", json={"all": [{"text": "red"}, {"text": "red", "weight": -1}]})
    assert answer.json()["detail"].startswith("all: expected a sum with a direction")


def test_bad_texts_are_named_by_their_place(colours: TestClient) -> None:
    answer = colours.post("/embed", json={"texts": ["red", "", "nothing", " "]})
    assert answer.status_code == 400
    assert [(part["index"], part["code"]) for part in answer.json()["errors"]] == [
        (1, "invalid_request"),
        (3, "invalid_request"),
    ]
    answer = colours.post("/embed", json={"texts": ["red", "nothing", "blue"]})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("text 1: ")


WITHOUT = [
    ("/embed", {"texts": ["a red bicycle"]}),
    ("/search", {"text": "a red bicycle"}),
    ("/search", {"queries": [{"id": "kept"}, {"text": "a red bicycle"}]}),
    ("/search", {"all": [{"id": "kept"}, {"text": "a red bicycle"}]}),
    ("/classify", {"images": [BASE64], "labels": ["red", "blue"]}),
    ("/v1/embeddings", {"model": "mnist", "input": "a red bicycle", "modality": "text"}),
]


@pytest.mark.parametrize(("path", "body"), WITHOUT)
def test_without_a_text_tower_the_refusal_names_the_remedy(client: TestClient, path: str, body: Any) -> None:
    answer = client.post(path, json=body)
    (assert_openai if path.startswith("/v1") else assert_refused)(answer, 400, "no_text_tower")
    assert "the encoder mnist reads no texts; `lookalike import hf:Xenova/clip-vit-base-patch32" in answer.text


def test_the_info_says_which_queries_the_encoder_takes(client: TestClient, colours: TestClient) -> None:
    without, read = client.get("/info").json(), colours.get("/info").json()
    assert (without["queries"], without["text"]) == (["image", "vector", "id", "all"], None)
    assert read["queries"] == ["image", "text", "vector", "id", "all"]
    assert read["text"] == {"max_tokens": 8, "logit_scale": 100}
    assert read["limits"]["max_texts"] == 256


def test_the_document_is_that_of_the_encoder(client: TestClient, colours: TestClient) -> None:
    without, read = client.get("/openapi.json").text, colours.get("/openapi.json").text
    for name in ('"/classify"', "ByText", "SearchByText", "PartByText", "EmbedTextsBody", "OpenAITextBody"):
        assert name in read and name not in without, name
    assert "SearchByAll" in without


def test_readiness_asks_the_text_tower(tmp_path: Path) -> None:
    gallery = open_gallery(Settings(model=write_colours(tmp_path / "colours"), no_store=True))
    gallery.probe()
    gallery.texts.tower._known = -gallery.texts.tower._known
    with pytest.raises(InvalidModel, match="the text tower embeds a text otherwise than at the start"):
        gallery.probe()
    gallery.close()


def test_a_store_is_not_kept_open_by_a_text_tower_that_is_refused(tmp_path: Path) -> None:
    settings = Settings(model=write_colours(tmp_path / "colours"), store=tmp_path / "store")
    open_gallery(settings).close()
    write_colours(tmp_path / "colours", text=text_graph(dimension=5))
    for _ in range(2):
        # A store has one writer, so the second attempt shows that the first one let it go.
        with pytest.raises(InvalidModel, match="gives 5 numbers a text"):
            open_gallery(settings)
