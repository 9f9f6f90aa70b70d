"""A real service, started by the real command, and a real browser in front of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, Request

from tests.colours import RGB, picture, write_colours
from tests.serving import serving


@pytest.fixture(scope="module")
def digits_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service with scikit-learn's 1,797 digits."""
    with serving(tmp_path_factory.mktemp("digits"), "digits") as url:
        yield url


@pytest.fixture(scope="module")
def colours_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service whose encoder reads the names of colours, with a picture of each."""
    folder = tmp_path_factory.mktemp("colours")
    (folder / "pictures").mkdir()
    for name in RGB:
        (folder / "pictures" / f"{name}.png").write_bytes(picture(name))
    with serving(folder, str(folder / "pictures"), write_colours(folder / "colours")) as url:
        yield url


@pytest.fixture
def empty_url(tmp_path: Path) -> Iterator[str]:
    """The address of a service with an empty store."""
    with serving(tmp_path) as url:
        yield url


@pytest.fixture
def asked() -> list[str]:
    """The address of every request that the page has made, in order."""
    return []


@pytest.fixture
def expected() -> list[str]:
    """Parts of the errors and warnings in the browser's console that the test provokes."""
    return []


@pytest.fixture
def page(browser: Browser, asked: list[str], expected: list[str]) -> Iterator[Page]:
    """An empty tab as wide as a laptop's; its console must hold no error or warning but those `expected`."""
    complaints: list[str] = []

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
    # A message may come after what the page shows, so it is judged here alone.
    assert [text for text in complaints if not any(part in text for part in expected)] == []
