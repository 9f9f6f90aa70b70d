"""Folders, fields of metadata and scores of a store, against plain Python."""

import base64
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from tests.service.conftest import Served
from tests.service.http.rows import assert_refused

IDS = ["a/1", "a/b/2", "a/b/3", "c/4", "5", "/6", "É/7", "é/8"]
ODD: list[dict[str, Any]] = [
    {"a": 7, "b": True}, {"a": "7", "b": 1}, {"a": True}, {"a": None, "b": [1]}, {"a": False, "": {"x": 1}},
    {"a": 7, "é": "x" * 201}, {"a": 2.5, "b": "x" * 200}, {"a": "7"}, {},
]  # fmt: skip
Add = Callable[[dict[str, dict[str, Any]]], None]


@pytest.fixture
def client(served: Served) -> TestClient:
    return served()


@pytest.fixture
def add(client: TestClient) -> Add:
    """Return a function that adds items without pictures, given as metadata by id."""
    rows = np.random.default_rng(0).standard_normal((2000, 128)).astype(np.float32)

    def add_all(items: dict[str, dict[str, Any]]) -> None:
        embedded = [
            {"id": id, "embedding": base64.b64encode(row.tobytes()).decode(), "metadata": metadata}
            for (id, metadata), row in zip(items.items(), rows, strict=False)
        ]
        answer = client.post("/images", json={"items": embedded})
        assert {json.loads(line)["status"] for line in answer.text.splitlines()} == {201}

    return add_all


def test_folders_are_those_of_the_ids(client: TestClient, add: Add) -> None:
    def folders(**asked: str) -> list[tuple[str, int]]:
        answer = client.get("/folders", params=asked).json()
        assert answer["left_out"] == 0
        return [(folder["prefix"], folder["count"]) for folder in answer["folders"]]

    assert folders() == []
    add({id: {"odd": number % 2 == 1} for number, id in enumerate(IDS)})
    assert folders() == [("/", 1), ("a/", 3), ("c/", 1), ("É/", 1), ("é/", 1)]
    assert folders(prefix="a/") == [("a/b/", 2)]
    assert folders(prefix="e\u0301") == folders(prefix="é") == [("é/", 1)]
    assert folders(prefix="a/b/") == folders(prefix="nobody/") == []
    assert folders(name="B/") == [("a/", 2)]
    assert folders(filter='{"odd": true}') == [("/", 1), ("a/", 1), ("c/", 1), ("é/", 1)]
    assert folders(filter='{"odd": true}', name="É") == [("é/", 1)]
    assert folders(filter='{"odd": true}', prefix="a/", name="b") == [("a/b/", 1)]
    assert_refused(client.get("/folders?filter=[]"), 400, "invalid_request")
    client.delete("/images/c/4")
    assert folders() == [("/", 1), ("a/", 3), ("É/", 1), ("é/", 1)]


def test_what_an_answer_has_no_room_for_is_counted(client: TestClient, add: Add) -> None:
    add({f"m/{n:04}/a": {f"k{n % 60:02}": 1} for n in range(1003)})
    answer = client.get("/folders?prefix=m/").json()
    assert [folder["prefix"] for folder in answer["folders"]] == [f"m/{n:04}/" for n in range(1000)]
    assert answer["left_out"] == 3
    answer = client.get("/metadata").json()
    assert [(field["key"], field["count"]) for field in answer["keys"][42:44]] == [("k42", 17), ("k43", 16)]
    assert (len(answer["keys"]), answer["left_out"]) == (50, 10)


def counted(metadata: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what GET /metadata answers, with the values in no order."""
    by_key: dict[str, list[Any]] = {}
    for one in metadata:
        for key, value in one.items():
            by_key.setdefault(key, []).append(value)
    told = []
    for key, values in sorted(by_key.items(), key=lambda pair: (-len(pair[1]), pair[0].encode())):
        texts = Counter(json.dumps(value) for value in values if not isinstance(value, list | dict))
        # A text of 200 characters has quotes around it.
        shown = {(text, count) for text, count in texts.items() if len(text) <= 202}
        told.append({"key": key, "count": len(values), "distinct": len(texts), "values": shown})
    return told


def test_fields_are_those_of_the_metadata(client: TestClient, add: Add) -> None:
    def told(**asked: str) -> list[dict[str, Any]]:
        answer = client.get("/metadata", params=asked).json()
        assert answer["left_out"] == 0
        for field in answer["keys"]:
            counts = [value["count"] for value in field["values"]]
            assert counts == sorted(counts, reverse=True)
            field["values"] = {(json.dumps(value["value"]), value["count"]) for value in field["values"]}
        keys: list[dict[str, Any]] = answer["keys"]
        return keys

    assert told() == []
    add({f"o/{number}": metadata for number, metadata in enumerate(ODD)})
    assert told() == counted(ODD)
    assert told(filter='{"b": true}') == counted(ODD[:1])
    assert told(filter='{"b": true}', prefix="p") == []
    assert told(name="O/1") == counted(ODD[1:2])
    client.patch("/images/o%2F8", json={"metadata": {"a": 7.0}})
    assert told() == counted([*ODD[:-1], {"a": 7}])
    add({f"n/{number}": {"n": number // 2} for number in range(39)})
    (numbers,) = [field for field in told() if field["key"] == "n"]
    # Of the twenty numbers, the last one is in one item alone.
    assert numbers | {"values": None} == {"key": "n", "count": 39, "distinct": 20, "values": None}
    assert numbers["values"] == {(str(number), 2) for number in range(12)}
    assert_refused(client.get('/metadata?filter={"$gt": 1}'), 400, "invalid_query")


def test_scores_are_those_of_the_store(client: TestClient, add: Add) -> None:
    few = {"near": None, "alike": None, "strangers": None, "neighbours": None, "sampled": 0}
    assert client.get("/scores").json() == few
    add({f"s/{number}": {} for number in range(19)})
    assert client.get("/scores").json() == few
    add({"s/19": {}, **{f"t/{number}": {} for number in range(180)}})
    told = client.get("/scores").json()
    rows = np.random.default_rng(0).standard_normal((2000, 128)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    # The first rows came twice, under other ids.
    whole = np.concatenate([rows[:19], rows[:181]])
    scores = whole @ whole.T
    strangers = np.quantile(scores[np.triu_indices(200, 1)], [0.05, 0.5, 0.95])
    assert np.allclose(told["strangers"], strangers, atol=1e-3)
    assert told["sampled"] == 200
    # A copy is the same file: its digest is that of the embedding.
    other = np.where(scores > 0.999, -1, scores).max(1)
    assert np.allclose(told["neighbours"], np.quantile(other, [0.05, 0.5, 0.95]), atol=1e-3)
    # The best of 200 scores of strangers, were they normal, lies beyond the 0.95 quantile and below `near`.
    deviation = np.quantile(scores[np.triu_indices(200, 1)], 0.8413) - strangers[1]
    highest = strangers[1] + np.sqrt(2 * np.log(200)) * deviation
    assert told["alike"] == pytest.approx(min(highest, (strangers[2] + told["near"]) / 2), abs=2e-3)
    assert strangers[2] < told["alike"] < told["near"] < 1
