"""POST /v1/embeddings: OpenAI's shape, of answers and of errors."""

import base64

import numpy as np
import pytest
from starlette.testclient import TestClient

from tests.service.http.rows import (
    BAD,
    BASE64,
    JSON,
    OTHER,
    PICTURE,
    TEXT,
    UNDECODABLE,
    Row,
    as_json,
    assert_openai,
    embedding,
    send,
)

OPENAI = [
    Row("address", 400, "invalid_request", as_json(model="mnist", input="https://a.example/some/picture.png")),
    Row("unknown model", 404, "model_not_found", as_json(model="text-embedding-3-small", input=BASE64)),
    Row("wrong dimensions", 400, "invalid_request", as_json(model="mnist", input=BASE64, dimensions=7)),
    Row("huge dimensions", 400, "invalid_request", as_json(model="mnist", input=BASE64, dimensions=10**30)),
    Row("no picture", 400, "invalid_request", as_json(model="mnist", input=[])),
    Row("an empty text", 400, "empty_picture", as_json(model="mnist", input="")),
    Row("a sentence", 400, "invalid_request", as_json(model="mnist", input="The food was delicious")),
    Row("tokens", 400, "invalid_request", as_json(model="mnist", input=[1, 2, 3])),
    Row("no model", 400, "invalid_request", as_json(input=BASE64)),
    Row("unknown encoding", 400, "invalid_request", as_json(model="mnist", input=BASE64, encoding_format="hexadecim")),
    Row("unknown field", 400, "invalid_request", as_json(model="mnist", input=BASE64, colour_of_hair="red")),
    Row("text as a picture", 415, "unsupported_format", as_json(model="mnist", input=base64.b64encode(TEXT).decode())),
    Row("cut short", 422, BAD, as_json(model="mnist", input=base64.b64encode(UNDECODABLE).decode())),
    Row("no JSON", 400, "invalid_request", b"this is no JSON"),
    Row("deep", 400, "invalid_request", b"[" * 100_000),
    Row("a picture", 415, "unsupported_format", PICTURE, "image/png"),
    Row("unknown route", 404, "unknown_route", b"{}", path="/v1/chat/completions"),
    Row("wrong method", 405, "method_not_allowed", b"", method="GET"),
]  # fmt: skip


@pytest.mark.parametrize("row", OPENAI, ids=lambda row: row.name)
def test_refused_in_openais_shape(client: TestClient, row: Row) -> None:
    path = "/v1/embeddings" if row.path == "/embed" else row.path
    answer = send(client, row._replace(path=path, type=row.type or JSON))
    assert_openai(answer, row.status, row.code, row.content)


def test_openais_shape(client: TestClient) -> None:
    expected = [embedding(client.post("/embed", content=data)) for data in (PICTURE, OTHER)]
    uris = [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in (PICTURE, OTHER)]
    asked = {"model": "mnist", "input": uris, "dimensions": len(expected[0]), "user": "somebody"}
    for form in ("float", "base64"):
        answer = client.post("/v1/embeddings", json=asked | {"encoding_format": form})
        assert answer.status_code == 200, answer.text
        content = answer.json()
        assert set(content) == {"object", "data", "model", "usage"}
        assert (content["object"], content["model"]) == ("list", "mnist")
        assert content["usage"] == {"prompt_tokens": 0, "total_tokens": 0}
        assert [(row["object"], row["index"]) for row in content["data"]] == [("embedding", 0), ("embedding", 1)]
        for row, numbers in zip(content["data"], expected, strict=True):
            got = row["embedding"]
            got = np.frombuffer(base64.b64decode(got), "<f4") if form == "base64" else np.asarray(got)
            assert np.abs(got - numbers).max() < 1e-6
    single = client.post("/v1/embeddings", json={"model": "mnist", "input": uris[0]}).json()
    assert np.abs(np.asarray(single["data"][0]["embedding"]) - expected[0]).max() < 1e-6
