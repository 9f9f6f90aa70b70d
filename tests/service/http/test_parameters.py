"""Unknown parameters, fields of JSON and fields of forms: refused, with the name of the nearest."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.service.http.rows import BASE64, FORM, PICTURE, TEXT, assert_refused, form


@pytest.mark.parametrize(
    ("method", "path", "says"),
    [
        ("POST", "/search?treshold=0.5", "the nearest is threshold"),
        ("POST", "/search?k=3&Threshold=0.5", "the nearest is threshold"),
        ("POST", "/search?K=3", "the nearest is k"),
        ("POST", "/search?filters=%7B%7D", "the nearest is filter"),
        ("POST", "/search?zebra", "expected filter, fingerprint, include, k, prefix or threshold"),
        ("POST", "/search?=1", "a parameter that is not known here"),
        ("POST", "/embed?fingerprnt=x", "the nearest is fingerprint"),
        ("POST", "/v1/embeddings?model=mnist", "where there are none"),
        (
            "GET",
            "/images?label=1",
            "expected cursor, encoding_format, filter, include, limit, name, offset, order or prefix",
        ),
        ("GET", "/images?ofset=10", "the nearest is offset"),
        ("DELETE", "/images?filter=%7B%22label%22%3A1%7D&expected=1", "the nearest is expect"),
        ("GET", "/images?limits=10", "the nearest is limit"),
        ("GET", "/images/kept?includes=embedding", "the nearest is include"),
        ("GET", "/images/kept/thumbnail?size=10", "expected v"),
        ("HEAD", "/images/kept/content?size=10", ""),
        ("PUT", "/images/kept?meta=%7B%7D", "the nearest is metadata"),
        ("PATCH", "/images/kept?metadata=%7B%7D", "where there are none"),
        ("DELETE", "/images/kept?dry_run=1", "where there are none"),
        ("POST", "/images?metadata=%7B%7D", "expected fingerprint"),
        ("GET", "/info?verbose=1", "where there are none"),
    ],
)
def test_an_unknown_parameter_is_refused(client: TestClient, method: str, path: str, says: str) -> None:
    answer = client.request(method, path, content=PICTURE if method in ("POST", "PUT") else b"")
    assert answer.status_code == 400
    assert says in answer.text
    assert client.get("/images/kept").status_code == 200


def test_known_parameters_are_taken(client: TestClient) -> None:
    for path in ("/search?k=3&threshold=0&include=metadata&include=embedding", "/embed?encoding_format=base64"):
        assert client.post(path, content=PICTURE).status_code == 200
    assert client.get("/images?limit=3&cursor=1").status_code == 200


@pytest.mark.parametrize(
    "path", ["/?utm_source=x", "/docs?x=1", "/openapi.json?x=1", "/metrics?x=1", "/page/page.js?v=2"]
)
def test_pages_and_metrics_take_any(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        (
            "/search",
            {"id": "kept", "treshold": 1},
            "the body: a field that is not known here; the nearest is threshold",
        ),
        ("/search", {"id": "kept", "top_k": 1}, "expected filter, fingerprint, id, include, k, prefix or threshold"),
        ("/search", {"queries": [{"id": "kept", "idd": 1}]}, "the nearest is id"),
        ("/search", {"queries": [{"id": "kept"}], "filters": {}}, "the nearest is filter"),
        ("/embed", {"images": [BASE64], "encoding": "float"}, "the nearest is encoding_format"),
        ("/v1/embeddings", {"model": "mnist", "input": BASE64, "dimension": 3}, "the nearest is dimensions"),
    ],
)
def test_an_unknown_field_of_json_is_refused(client: TestClient, path: str, body: dict[str, Any], says: str) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 400
    assert says in answer.text


@pytest.mark.parametrize(
    ("method", "path", "field", "says"),
    [
        ("POST", "/search", "k", "expected file; parameters belong in the address"),
        ("POST", "/embed", "encoding_format", "expected file; parameters belong in the address"),
        ("POST", "/images", "metdata", "the nearest is metadata"),
        ("PUT", "/images/kept", "Metadata", "the nearest is metadata"),
    ],
)
def test_an_unknown_field_of_a_form_is_refused(
    client: TestClient, method: str, path: str, field: str, says: str
) -> None:
    content = form(("a.png", PICTURE), **{field: TEXT.decode()})
    answer = client.request(method, path, content=content, headers={"content-type": FORM})
    assert_refused(answer, 400, "invalid_request", TEXT)
    assert says in answer.json()["detail"]
