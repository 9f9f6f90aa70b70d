"""HEAD answers wherever GET does, with the same status and headers, and without a body."""

import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from service.http.routes import create_app
from tests.service.conftest import Served

GETS = [route.path for route in create_app().routes if isinstance(route, Route) and "GET" in (route.methods or ())]


@pytest.mark.parametrize("path", [*GETS, "/page/page.js", "/swagger/swagger-ui.css", "/nowhere", "/images/nobody"])
def test_head_is_get_without_its_body(client: TestClient, path: str) -> None:
    path = path.replace("{id:path}", "kept")
    got, headed = client.get(path), client.head(path)
    assert headed.status_code == got.status_code
    assert headed.content == b""
    changing = ("date", "x-request-id") + (("content-length",) if path == "/metrics" else ())
    assert {k: v for k, v in headed.headers.items() if k not in changing} == {
        k: v for k, v in got.headers.items() if k not in changing
    }


def test_a_route_without_get_has_no_head(client: TestClient) -> None:
    answer = client.head("/search")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert client.post("/info").headers["allow"] == "GET, HEAD"


def test_head_is_counted_and_needs_a_key_as_get_does(served: Served) -> None:
    client = served(api_keys="read:a-key-of-some-length")
    assert client.head("/info").status_code == 401
    assert client.head("/info", headers={"Authorization": "Bearer a-key-of-some-length"}).status_code == 200
    assert client.head("/").status_code == 200
