"""A real service, started by the real command, and a real browser in front of it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, Request, sync_playwright

from tests.conftest import MODEL, ROOT, missing

COMMAND = Path(sys.executable).with_name("lookalike")
START_TIMEOUT_S = 120  # onnxruntime, FAISS and BentoML are imported on what may be one busy core
STOP_TIMEOUT_S = 20


@pytest.fixture(scope="module")
def digits_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where scikit-learn's 1,797 digits are served."""
    folder = tmp_path_factory.mktemp("digits")
    command: list[str | Path] = [COMMAND, "index", "digits", "--model", MODEL, "--store", folder / "store"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with serving(folder / "store", folder / "log") as url:
        yield url


@pytest.fixture
def empty_url(tmp_path: Path) -> Iterator[str]:
    """Where a store without pictures is served."""
    with serving(tmp_path / "store", tmp_path / "log") as url:
        yield url


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, asking nobody about updates."""
    chromium = shutil.which("chromium")
    if chromium is None:
        missing("no Chromium: install Debian's package chromium")
    flags = ["no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"]
    flags += ["disable-component-update", "disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=[f"--{flag}" for flag in flags])
        yield browser
        browser.close()


@pytest.fixture
def asked() -> list[str]:
    """The address of every request that the page has made, in order."""
    return []


@pytest.fixture
def complaints() -> list[str]:
    """What the browser's console has said against the page. A test that provokes some takes it out."""
    return []


@pytest.fixture
def page(browser: Browser, asked: list[str], complaints: list[str]) -> Iterator[Page]:
    """An empty tab as wide as a laptop's; at its end nothing stands in `complaints`."""

    def note_request(request: Request) -> None:
        asked.append(request.url)

    def note_message(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    def note_error(error: Error) -> None:
        complaints.append(str(error))

    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.on("request", note_request)
    page.on("console", note_message)
    page.on("pageerror", note_error)
    yield page
    context.close()
    assert complaints == []


@contextmanager
def serving(store: Path, log: Path) -> Iterator[str]:
    """Serve a store until the block ends, and see the service end too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command: list[str | Path] = [COMMAND, "serve", "--model", MODEL, "--store", store]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as out:
        service = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
    workers: list[int] = []
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}", service, log)
        workers = [int(pid) for pid in Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()]
        yield f"http://127.0.0.1:{port}"
        service.send_signal(signal.SIGINT)
        service.wait(STOP_TIMEOUT_S)
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, "the service has ended, and its port is still open"
    except subprocess.TimeoutExpired:
        pytest.fail(f"the service did not end within {STOP_TIMEOUT_S} s of Ctrl-C:\n{log.read_text()}")
    finally:
        for pid in [service.pid, *workers]:  # a worker outlives a parent that was killed
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        service.wait()


def _wait_until_ready(url: str, service: "subprocess.Popen[bytes]", log: Path) -> None:
    latest = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < latest and service.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    pytest.fail(f"the service did not get ready:\n{log.read_text()}")
