"""API keys and origins, over HTTP."""

import base64
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.service.conftest import Served
from tests.service.http.rows import BASE64, FORM, PICTURE, assert_openai, assert_refused, form

READ, WRITE = "a-key-that-may-read", "a-key-that-may-write"
KEYS = f"read:{READ},write:{WRITE}"
ASKED: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/embed", {"content": PICTURE}),
    ("POST", "/search", {"content": PICTURE}),
    ("POST", "/v1/embeddings", {"json": {"model": "mnist", "input": BASE64}}),
    ("GET", "/images", {}),
    ("GET", "/images/kept", {}),
    ("POST", "/images/count", {"json": {}}),
    ("GET", "/v1/models", {}),
    ("GET", "/info", {}),
    ("GET", "/docs", {}),
    ("GET", "/openapi.json", {}),
    ("GET", "/metrics", {}),
    ("PUT", "/images/kept", {"content": PICTURE}),
    ("PATCH", "/images/kept", {"json": {"metadata": {"a": 1}}}),
    ("POST", "/images", {"content": form(("b", PICTURE)), "headers": {"content-type": FORM}}),
    ("DELETE", "/images/kept", {}),
    ("DELETE", '/images?filter={"a": 1}', {}),
]
READING = 11


def ask(client: TestClient, method: str, path: str, authorization: str | None, options: dict[str, Any]) -> Any:
    headers = options.get("headers", {}) | ({} if authorization is None else {"authorization": authorization})
    return client.request(method, path, **options | {"headers": headers})


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer a-key-that-nobody-has",
        f"Bearer {READ[:-1]}",
        f"Bearer {READ}{READ}",
        f"Bearer {KEYS}",
        f"Bearer read:{READ}",
        f"Basic {READ}",
        f"Basic {base64.b64encode(f'user:{WRITE}'.encode()).decode()}",
        WRITE,
        "Bearer \xe9\xe8 some letters",
    ],
)
def test_no_key_that_is_known(served: Served, authorization: str | None) -> None:
    client = served(api_keys=KEYS)
    raw = None if authorization is None else authorization.encode("latin-1")
    for method, path, options in ASKED:
        answer = ask(client, method, path, raw, options)  # type: ignore[arg-type]
        assert answer.headers["www-authenticate"] == "Bearer"
        if path.startswith("/v1/"):
            assert_openai(answer, 401, "unauthorized", raw or b"")
        else:
            assert_refused(answer, 401, "unauthorized", raw or b"")


def test_keys_that_are_known(served: Served) -> None:
    client = served(api_keys=KEYS)
    for method, path, options in ASKED[READING:]:
        answer = ask(client, method, path, f"Bearer {READ}", options)
        assert_refused(answer, 403, "read_only_key", READ.encode())
    assert ask(client, "GET", "/info", f"Bearer {READ}", {}).json()["count"] == 0
    # To classify is to read, too; this encoder reads no texts.
    labelled: dict[str, Any] = {"json": {"images": [BASE64], "labels": ["red"]}}
    assert_refused(ask(client, "POST", "/classify", f"Bearer {READ}", labelled), 400, "no_text_tower")
    assert ask(client, "PUT", "/images/kept", f"bearer  {WRITE}", {"content": PICTURE}).status_code == 201
    for method, path, options in ASKED[:READING]:
        for key in (READ, WRITE):
            assert ask(client, method, path, f"Bearer {key}", options).status_code == 200, path
    for method, path, options in ASKED[READING:]:
        assert ask(client, method, path, f"Bearer {WRITE}", options).status_code in (200, 201, 204), path


def test_the_page_is_open_and_metrics_may_be(served: Served) -> None:
    client = served(api_keys=KEYS, metrics_public="true")
    for path in ("/", "/page/styles/page.css", "/metrics"):
        assert client.get(path).status_code == 200, path
    for path in (
        "/page/../info",
        "http://testserver//info",
        "/page/%2e%2e/info",
        "/info/",
        "/metrics/",
        "/page//info",
        "/page/a%2Fb",
    ):
        assert client.get(path).status_code in (401, 404), path
    assert_refused(client.get("/info"), 401, "unauthorized")
    assert_refused(client.delete("/page/styles/page.css"), 405, "method_not_allowed")


PREFLIGHT = {
    "origin": "https://a.example",
    "access-control-request-method": "PUT",
    "access-control-request-headers": "authorization,content-type",
}


def cors_headers(answer: Any) -> list[str]:
    return [name for name in answer.headers if name.lower().startswith("access-control")]


def test_other_origins_are_not_let_in_unless_they_are_named(served: Served) -> None:
    client = served()
    assert_refused(client.options("/images/a", headers=PREFLIGHT), 405, "method_not_allowed")
    for answer in (
        client.options("/images/a", headers=PREFLIGHT),
        client.get("/info", headers={"origin": "https://a.example"}),
        client.get("/images/nobody", headers={"origin": "https://a.example"}),
    ):
        assert not cors_headers(answer)


def test_named_origins_are_let_in(served: Served) -> None:
    client = served(api_keys=KEYS, cors_origins="https://a.example")
    # A browser sends no key with a preflight request.
    asked = client.options("/images/a", headers=PREFLIGHT)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == "https://a.example"
    assert "PUT" in asked.headers["access-control-allow-methods"]
    assert asked.headers["x-request-id"]
    refused = client.get("/info", headers={"origin": "https://a.example"})
    assert_refused(refused, 401, "unauthorized")
    # Without this header the page could not read the reason.
    assert refused.headers["access-control-allow-origin"] == "https://a.example"
    for origin in ("https://b.example", "https://a.example.b.example", "http://a.example", "null"):
        elsewhere = client.options("/images/a", headers=PREFLIGHT | {"origin": origin})
        assert elsewhere.status_code == 400
        assert "access-control-allow-origin" not in elsewhere.headers, origin
        answer = client.get("/info", headers={"origin": origin, "authorization": f"Bearer {READ}"})
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers, origin


def test_keys_are_read_again(served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text(f"read:{READ}\n")
    client = served(api_keys_file=str(file))

    def status(key: str) -> int:
        return client.get("/info", headers={"authorization": f"Bearer {key}"}).status_code

    assert (status(READ), status(WRITE)) == (200, 401)
    file.write_text(f"write:{WRITE}\n")
    assert (status(READ), status(WRITE)) == (200, 401)
    client.app.reread_keys()  # type: ignore[attr-defined]
    assert (status(READ), status(WRITE)) == (401, 200)
    # Without a key in the file everybody would be let in, so what was read last stays.
    for text in ("", "nonsense", None):
        file.unlink() if text is None else file.write_text(text)
        client.app.reread_keys()  # type: ignore[attr-defined]
        assert (status(READ), status(WRITE)) == (401, 200)
    assert caplog.text.count("the API keys stay as they were") == 3
