"""The service below a path of a proxy."""

import re

import pytest
from starlette.testclient import TestClient

from tests.service.conftest import Served
from tests.service.http.rows import PICTURE

KEY = "a-key-of-some-length"
ALLOWED = {"Authorization": f"Bearer {KEY}"}
TRAEFIK = {"X-Forwarded-Prefix": "/look/alike"}


def check_pages(client: TestClient, page: str, docs: str, root: str, **headers: str) -> None:
    """The page, the docs and the document link to addresses below `root`."""
    assert f'<base href="{root}/">' in client.get(page, headers=headers).text
    links = re.findall(r'(?:src|href)="([^"]+)"', client.get(docs, headers=headers).text)
    assert len(links) >= 2
    assert not [link for link in links if link.startswith(("/", "http"))]
    assert client.get(docs.replace("docs", "openapi.json"), headers=headers).json()["servers"] == [{"url": root}]


@pytest.mark.parametrize("told", ["/look/alike", "look/alike", "/look/alike/"])
@pytest.mark.parametrize("left", ["", "/look/alike"], ids=["removed", "left"])
def test_below_a_path_that_the_settings_name(served: Served, told: str, left: str) -> None:
    client = served(root_path=told)
    check_pages(client, f"{left}/", f"{left}/docs", "/look/alike")
    assert client.get("/look/alike").text == client.get("/look/alike/").text
    assert client.put(f"{left}/images/a%2Fthumbnail", content=PICTURE).status_code == 201
    assert client.get(f"{left}/images/a%2Fthumbnail").json()["id"] == "a/thumbnail"
    assert client.get(f"{left}/page/styles/page.css").status_code == 200
    assert client.get(f"{left}/swagger/swagger-ui.css").status_code == 200
    assert client.post(f"{left}/search?k=1", content=PICTURE).json()["hits"][0]["id"] == "a/thumbnail"
    assert "error" in client.post(f"{left}/v1/embeddings", json={}).json()
    assert client.get(f"{left}/nowhere").json()["detail"].endswith("; /look/alike/docs lists the routes")
    assert client.get("/look/alike2/info").status_code == 404


def test_a_prefix_that_is_forwarded_counts_where_it_is_trusted(served: Served) -> None:
    check_pages(served(trust_forwarded_prefix="true"), "/", "/docs", "/look/alike", **TRAEFIK)


@pytest.mark.parametrize("prefix", ["/look, /alike", "/look/,/alike/", "/look/alike/"])
def test_a_prefix_of_several_proxies(served: Served, prefix: str) -> None:
    client = served(trust_forwarded_prefix="true")
    check_pages(client, "/", "/docs", "/look/alike", **{"X-Forwarded-Prefix": prefix})


def test_a_prefix_that_is_forwarded_is_not_trusted_by_itself(served: Served) -> None:
    client = served()
    assert "<base" not in client.get("/", headers=TRAEFIK).text
    assert "servers" not in client.get("/openapi.json", headers=TRAEFIK).json()


def test_a_prefix_that_is_forwarded_does_not_replace_that_of_the_settings(served: Served) -> None:
    client = served(root_path="/of/settings")
    assert (
        client.get("/openapi.json", headers=TRAEFIK).json()["servers"] == client.get("/openapi.json").json()["servers"]
    )


@pytest.mark.parametrize("bad", ['/"><script>', "//elsewhere.example", "/..", "https://elsewhere.example", "/a b", ""])
def test_a_prefix_that_is_no_path_is_none(served: Served, bad: str) -> None:
    client = served(trust_forwarded_prefix="true")
    assert "<base" not in client.get("/", headers={"X-Forwarded-Prefix": bad}).text


@pytest.mark.parametrize("prefix", ["/page", "/images", "/search", "/livez"])
def test_no_prefix_opens_what_needs_a_key(served: Served, prefix: str) -> None:
    client = served(trust_forwarded_prefix="true", root_path="/page", api_keys=f"write:{KEY}")
    # Behind this prefix its address looks like that of a file of the page, which needs no key.
    assert client.put("/page/images/a.png", headers=ALLOWED, content=PICTURE).status_code == 201
    for headers in ({}, {"X-Forwarded-Prefix": prefix}):
        for path in ("/images", "/page/images", "/page/images/a.png", "/info", "/page/info", "/page/page/../info"):
            assert client.get(path, headers=headers).status_code in (401, 404), (path, headers)
        assert client.delete("/page/page/x", headers=headers).status_code != 204
    assert client.get("/page/info", headers=ALLOWED).status_code == 200


def test_a_prefix_named_like_a_route_that_the_proxy_leaves(served: Served) -> None:
    client = served(root_path="/search")
    assert client.put("/search/images/a", content=PICTURE).status_code == 201
    assert client.post("/search/search", content=PICTURE).json()["hits"][0]["id"] == "a"
    assert client.get("/search/").status_code == 200


def test_links_of_a_page_whose_prefix_nobody_tells_are_relative(served: Served) -> None:
    text = served().get("/").text
    links = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert not [link for link in links if link.startswith(("/", "http"))]
