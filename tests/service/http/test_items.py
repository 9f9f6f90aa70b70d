"""Ids and metadata at their limits."""

import json

import pytest
from starlette.testclient import TestClient

from tests.service.http.rows import FORM, OTHER, PICTURE, assert_refused, form, nested

TEXTUAL_IDS = {
    "..%2Fx": "../x",
    "..%2F..%2Fetc%2Fpasswd": "../../etc/passwd",
    "%D7%A9%D7%9C%D7%95%D7%9D": "שלום",
    "a%E2%80%AEgnp.b": "a\u202egnp.b",
    "100%25": "100%",
    "a%20b%3Fc%23d": "a b?c#d",
    "%3Cscript%3E": "<script>",
    "x" * 256: "x" * 256,
}


@pytest.mark.parametrize("address", TEXTUAL_IDS)
def test_an_id_is_text_and_nothing_else(client: TestClient, address: str) -> None:
    url = f"/images/{address}"
    assert client.put(url, content=PICTURE).status_code == 201
    assert client.get(url).json()["id"] == TEXTUAL_IDS[address]
    assert client.get(url + "/content").content == PICTURE
    assert client.delete(url).status_code == 204


def test_metadata_that_is_not_given_stays(client: TestClient) -> None:
    url, mine = "/images/with%20metadata", {"mine": 1}
    given = client.put(url, params={"metadata": json.dumps(mine)}, content=PICTURE)
    assert (given.status_code, given.json()["metadata"]) == (201, mine)
    again = client.put(url, content=OTHER)
    assert (again.status_code, again.json()["metadata"]) == (200, mine)
    assert client.get(url).json()["metadata"] == mine
    many = form(("with metadata", PICTURE))
    assert client.post("/images", content=many, headers={"content-type": FORM}).json()["status"] == 200
    assert client.get(url).json()["metadata"] == mine
    for cleared in ({"metadata": "{}"}, {}):
        assert client.put(url, params=cleared, content=PICTURE).json()["metadata"] == {}
    assert client.delete(url).status_code == 204


def test_metadata_at_its_limits_is_taken(client: TestClient) -> None:
    for metadata in ('{"a": [%d, %d]}' % (2**70, -(10**4000)), nested(32), '{"a": "%s"}' % ("x" * (16_384 - 9))):
        answer = client.put(
            "/images/limits", content=form(("f", PICTURE), metadata=metadata), headers={"content-type": FORM}
        )
        assert answer.status_code in (200, 201)
        assert answer.json()["metadata"] == json.loads(metadata)
        found = client.post("/search?k=1000", content=PICTURE)
        assert {hit["id"]: hit["metadata"] for hit in found.json()["hits"]}["limits"] == json.loads(metadata)
    deeper = client.patch("/images/limits", json={"metadata": json.loads(nested(33))})
    assert_refused(deeper, 400, "invalid_request")
    larger = client.patch("/images/limits", json={"metadata": {"b": "x"}})
    assert_refused(larger, 400, "invalid_request")
