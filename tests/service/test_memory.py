"""The memory that a body may take in the real process: less than twice the limit of a request for pictures and
refusals, a little more for JSON, which is held as bytes and as texts at once."""

import http.client
import io
import json
import re
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.serving import serving

LIMIT = 64_000_000

pytestmark = pytest.mark.slow("starts a service of its own and sends it bodies at its limits")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("memory")) as address:
        yield address


def worker() -> Path:
    """The /proc folder of the serving process."""
    (found,) = (
        process.pid
        for process in psutil.Process().children(recursive=True)
        if "_bentoml_impl.worker.service" in " ".join(process.cmdline())
    )
    return Path(f"/proc/{found}")


def status_of(process: Path, name: str) -> int:
    """A figure of a process' memory, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", (process / "status").read_text())
    assert found
    return int(found[1]) * 1024


def form() -> Iterator[bytes]:
    """Seven files of 9 MB, just within the limit."""
    for number in range(7):
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="%d"\r\n\r\n' % number
        for _ in range(90):
            yield bytes(100_000)
        yield b"\r\n"
    yield b"--x--\r\n"


def text() -> Iterator[bytes]:
    """JSON just within the limit."""
    yield b'{"images": ["'
    for _ in range(630):
        yield b"A" * 100_000
    yield b'"]}'


@pytest.mark.parametrize(
    ("body", "kind", "status", "times"),
    [
        (form, "multipart/form-data; boundary=x", 415, 2.0),
        (text, "application/json", 413, 2.1),
    ],
)
def test_what_a_body_costs(url: str, body: Callable[[], Iterator[bytes]], kind: str, status: int, times: float) -> None:
    process = worker()
    # This resets the recorded peak.
    (process / "clear_refs").write_text("5")
    before = status_of(process, "VmRSS")
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    # A refusal may come before the whole body is sent; its answer can still be read.
    with suppress(BrokenPipeError):
        connection.request("POST", "/embed", body(), {"Content-Type": kind}, encode_chunked=True)
    answer = connection.getresponse()
    assert answer.status == status, answer.read()
    assert json.loads(answer.read())["status"] == status
    cost = status_of(process, "VmHWM") - before
    print(f"{cost / LIMIT:.2f} times the limit")
    assert cost < times * LIMIT


def test_what_a_zip_costs_when_it_unpacks_to_ten_times_the_limit(url: str) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(64):
            archive.writestr(f"{number}.png", bytes(9_900_000))
    process = worker()
    (process / "clear_refs").write_text("5")
    before = status_of(process, "VmRSS")
    request = urllib.request.Request(f"{url}/images", buffer.getvalue(), {"Content-Type": "application/zip"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = [json.loads(line) for line in answer]
    assert [line["status"] for line in lines] == [415] * 64
    cost = status_of(process, "VmHWM") - before
    print(f"{cost / LIMIT:.2f} times the limit")
    assert cost < 2 * LIMIT
