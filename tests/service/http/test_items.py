"""Ids and metadata at their limits."""

import json
from urllib.parse import quote

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


LIKE_ROUTES = [
    "thumbnail",
    "content",
    "a/thumbnail",
    "a/content",
    "a/b/thumbnail/thumbnail",
    "/thumbnail",
    "thumbnail/",
]
LIKE_ROUTES += ["content/thumbnail", "../thumbnail", "a//b", "/", "a/", "a\\b", "?#&+;=", "..."]


@pytest.mark.parametrize("id", LIKE_ROUTES)
@pytest.mark.parametrize("by", ["address", "form"])
def test_every_id_that_can_be_added_can_be_read_changed_and_removed(client: TestClient, id: str, by: str) -> None:
    """The spelling of the docs: every character but letters, digits and - . _ ~ with percent signs, the slash, too."""
    url = f"/images/{quote(id, safe='')}"
    if by == "address":
        assert client.put(url, content=PICTURE).status_code == 201
    else:
        name = id.replace("\\", "\\\\")
        content = form((name, PICTURE))
        assert '"status": 201' in client.post("/images", content=content, headers={"content-type": FORM}).text
    found = client.get(url)
    assert (found.status_code, found.json().get("id")) == (200, id)
    assert client.patch(url, json={"metadata": {"label": "7"}}).json() == {"id": id, "metadata": {"label": "7"}}
    assert client.get(url + "/thumbnail").content[8:12] == b"WEBP"
    assert client.get(url + "/content").content == PICTURE
    assert client.delete(url).status_code == 204
    assert client.get(url).status_code == 404


def test_an_item_is_not_the_picture_of_another(client: TestClient) -> None:
    assert client.put("/images/x", content=PICTURE).status_code == 201
    assert client.put("/images/x%2Fcontent", content=OTHER).status_code == 201
    assert client.get("/images/x/content").content == PICTURE
    assert client.get("/images/x%2Fcontent").json()["id"] == "x/content"
    assert client.get("/images/x%2Fcontent/content").content == OTHER
    assert client.get("/images/x/content/content").content == OTHER
    # Only GET has a route for the picture of an item, so every other method means the whole id.
    assert client.delete("/images/x/content").status_code == 204
    assert client.delete("/images/x").status_code == 204


@pytest.mark.parametrize("id", [".", ".."])
def test_an_id_that_no_address_can_name_is_not_added(client: TestClient, id: str) -> None:
    answer = client.post("/images", content=form((id, PICTURE)), headers={"content-type": FORM})
    assert json.loads(answer.text)["code"] == "invalid_request"
