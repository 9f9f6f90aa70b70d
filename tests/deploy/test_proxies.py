"""One service with a store below a path, behind the real nginx and the real Caddy with the files of deploy/."""

import http.client
import io
import json
import posixpath
import re
import socket
import ssl
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from service.settings import Settings
from tests.conftest import encoded, scene
from tests.deploy.proxies import caddy, nginx, until
from tests.ports import free_port
from tests.serving import serving

ROOT_PATH = "/lookalike"
IMPORTED = re.compile(r'(?:from |import\()"(\.[^"]+\.js)"')
PICTURE = encoded(scene())


class Proxy(NamedTuple):
    """A proxy with TLS in front of a service.

    Attributes:
        name: nginx or caddy.
        port: of HTTPS, on localhost.
        plain_port: of HTTP, which leads to HTTPS.
        trusting: accepts the proxy's certificate alone.
        log: of the service.
    """

    name: str
    port: int
    plain_port: int
    trusting: ssl.SSLContext
    log: Path


class Answer(NamedTuple):
    """What a proxy answered."""

    status: int
    type: str
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """The port and the log of a service with a store."""
    folder = tmp_path_factory.mktemp("service")
    with serving(folder, root_path=ROOT_PATH) as address:
        yield int(address.removesuffix(ROOT_PATH).rpartition(":")[2]), folder / "serve.log"


@pytest.fixture(scope="module", params=["nginx", "caddy"])
def proxy(
    request: pytest.FixtureRequest, service: tuple[int, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("proxy")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    port, plain = free_port(), free_port()
    files = {
        "/etc/ssl/certs/lookalike.pem": str(certificate),
        "/etc/ssl/private/lookalike.key": str(key),
        "127.0.0.1:3000": f"127.0.0.1:{service[0]}",
    }
    if request.param == "nginx":
        listens = {"listen 443 ssl": f"listen 127.0.0.1:{port} ssl", "listen 80;": f"listen 127.0.0.1:{plain};"}
        running = nginx(folder, "nginx-site.conf", port, listens | files)
    else:
        first = f"\n{{\n\tadmin off\n\tdefault_bind 127.0.0.1\n\thttp_port {plain}\n\thttps_port {port}\n\tservers {{"
        running = caddy(
            folder, "Caddyfile", port, {"\n{\n\tservers {": first, "\npictures.example.org": "\nlocalhost"} | files
        )
    with running:
        yield Proxy(request.param, port, plain, ssl.create_default_context(cafile=certificate), service[1])


def ask(proxy: Proxy, method: str, path: str, body: bytes = b"", type: str = "image/png", client: str = "") -> Answer:
    """Send a request to a path of the service, from another address of this machine where one is named."""
    source = (client, 0) if client else None
    connection = http.client.HTTPSConnection("localhost", proxy.port, context=proxy.trusting, source_address=source)
    with closing(connection):
        connection.request(method, ROOT_PATH + path, body or None, {"Content-Type": type} if body else {})
        answer = connection.getresponse()
        return Answer(answer.status, answer.headers.get_content_type(), answer.read())


def lines_of(log: Path, path: str) -> list[dict[str, Any]]:
    """Return the service's log lines about requests to a path."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("path", "").endswith(path)]


def form(pictures: list[bytes]) -> tuple[bytes, str]:
    """Return a form of pictures, whose ids are large/0.png and so on, and its type."""
    boundary, written = uuid.uuid4().hex, io.BytesIO()
    for number, picture in enumerate(pictures):
        name = f'form-data; name="file"; filename="large/{number}.png"'
        written.write(f"--{boundary}\r\nContent-Disposition: {name}\r\n\r\n".encode() + picture + b"\r\n")
    written.write(f"--{boundary}--\r\n".encode())
    return written.getvalue(), f"multipart/form-data; boundary={boundary}"


@pytest.mark.slow("starts a service")
def test_page_and_files_lie_below_the_path(proxy: Proxy) -> None:
    page = ask(proxy, "GET", "/")
    assert (page.status, page.type) == (200, "text/html")
    files = re.findall(r'(?:src|href)="([^"#:]+\.(?:js|css))"', page.body.decode())
    fetched = set[str]()
    while files:
        if (path := files.pop()) in fetched:
            continue
        file = ask(proxy, "GET", f"/{path}")
        assert file.status == 200, path
        fetched.add(path)
        # Modules name each other by relative paths.
        files += [posixpath.join(posixpath.dirname(path), name) for name in IMPORTED.findall(file.body.decode())]
        files = [posixpath.normpath(name) for name in files]
    assert {"page/api.js", "page/views/map.js", "page/styles/page.css"} <= fetched
    assert ask(proxy, "GET", "/readyz").status == 200
    assert ask(proxy, "GET", "/openapi.json").json()["servers"] == [{"url": ROOT_PATH}]


@pytest.mark.slow("starts a service")
@pytest.mark.parametrize("path", ["", "/"])
def test_http_leads_to_the_page_over_https(proxy: Proxy, path: str) -> None:
    with closing(http.client.HTTPConnection("localhost", proxy.plain_port)) as connection:
        connection.request("GET", ROOT_PATH + path)
        answer = connection.getresponse()
        assert answer.status in (301, 308)
        assert re.fullmatch(rf"https://localhost(:{proxy.port})?{ROOT_PATH}{path}", answer.headers["Location"])
    # Without the slash at the end it is the page, or leads to it.
    answered = ask(proxy, "GET", path)
    assert answered.status == 200 or (path == "" and answered.status == 301)


@pytest.mark.slow("starts a service")
def test_a_slash_in_an_id_survives(proxy: Proxy) -> None:
    id = uuid.uuid4().hex
    # Decoded on the way, the first address would be that of the thumbnail of an item which is not there.
    for path, meant in ((f"{id}%2Fthumbnail", f"{id}/thumbnail"), (f"{id}%252F%20%C3%BC", f"{id}%2F \u00fc")):
        assert ask(proxy, "PUT", f"/images/{path}", PICTURE).status == 201
        assert ask(proxy, "GET", f"/images/{path}").json()["id"] == meant
        assert ask(proxy, "GET", f"/images/{path}/content").body == PICTURE
    hits = ask(proxy, "POST", "/search?k=1000", PICTURE).json()["hits"]
    assert f"{id}/thumbnail" in [hit["id"] for hit in hits]


@pytest.mark.slow("starts a service")
def test_the_service_itself_limits_bodies(proxy: Proxy) -> None:
    # What stands behind the end of a picture is part of its file.
    body, type = form([PICTURE + bytes(7_000_000)] * 3)
    answer = ask(proxy, "POST", "/images", body, type)
    assert [json.loads(line)["status"] // 100 for line in answer.body.splitlines()] == [2, 2, 2]
    before = len(lines_of(proxy.log, "/embed"))
    for size in (20_000_000, Settings().max_request_bytes + 1_000_000):
        try:
            refused = ask(proxy, "POST", "/embed", PICTURE + bytes(size))
        except OSError:
            # Caddy passes the refusal on at once and then closes the connection, on which this client still sends.
            assert proxy.name == "caddy"
        else:
            assert (refused.status, refused.type) == (413, "application/problem+json")
            assert refused.json()["code"] == "too_large"
    # A line is written after its answer.
    until(lambda: len(lines_of(proxy.log, "/embed")) == before + 2, 30)
    assert [line["status"] for line in lines_of(proxy.log, "/embed")[-2:]] == [413, 413]


@pytest.mark.slow("starts a service")
def test_lines_come_as_pictures_are_stored(proxy: Proxy) -> None:
    # Three groups, each of which is stored at once. Decoding takes longer than all else.
    body, type = form([encoded(Image.new("RGB", (900, 900), (number, 0, 0))) for number in range(96)])
    connection = http.client.HTTPSConnection("localhost", proxy.port, context=proxy.trusting)
    with closing(connection):
        connection.request("POST", ROOT_PATH + "/images", body, {"Content-Type": type})
        begin = time.monotonic()
        answer = connection.getresponse()
        assert answer.headers.get_content_type() == "application/x-ndjson"
        came = [time.monotonic() - begin for _ in answer]
    assert len(came) == 96
    # Held back to the end, all lines would come at once.
    assert came[0] < came[-1] / 2, came


@pytest.mark.slow("waits for a timeout of 10 s")
def test_unfinished_headers_are_cut_off(proxy: Proxy) -> None:
    with (
        socket.create_connection(("localhost", proxy.port)) as plain,
        proxy.trusting.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        connection.sendall(f"GET {ROOT_PATH}/info HTTP/1.1\r\nHost: localhost\r\nX-Slow: ".encode())
        begin = time.monotonic()
        connection.settimeout(30)
        # nginx says 408, or nothing; both close the connection.
        while connection.recv(1000):
            pass
        assert 8 < time.monotonic() - begin < 20


@pytest.mark.slow("starts a service")
def test_the_log_names_the_client(proxy: Proxy) -> None:
    path = f"/images/{uuid.uuid4().hex}"
    assert ask(proxy, "GET", path, client="127.0.0.2").status == 404
    until(lambda: len(lines_of(proxy.log, path)) > 0, 30)
    assert [line["client"] for line in lines_of(proxy.log, path)] == ["127.0.0.2"]
