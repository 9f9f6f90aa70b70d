"""No view and no state of the page has a fault that axe-core finds, light or dark, on a phone or a desktop."""

from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.conftest import ROOT, missing

pytestmark = pytest.mark.slow("opens each state four times")

AXE = ROOT / "requirements" / "node_modules" / "axe-core" / "axe.min.js"
# By the view that they open: the address, and what is there once it is open.
STATES = {
    "browse": ("#browse", ".grid .tile"),
    "browse, large tiles of a folder": ("#browse?folder=digits%2F&order=-id", ".grid .tile"),
    "browse, nothing found": ("#browse?name=nothing-has-this-name", "text=No picture matches"),
    "picture": ("#picture?id=digits%2F00003&at=3", ".strip .tile"),
    "search": ("#search?id=digits%2F00003", ".tile"),
    "duplicates": ("#duplicates?preset=near", "h1"),
    "map": ("#map", "h1"),
    "add": ("#add", "h1"),
    "about": ("#about", "dl"),
}


@pytest.fixture(scope="module")
def axe() -> str:
    """The source of axe-core."""
    if not AXE.exists():
        missing("no axe-core: `make requirements/node_modules/.done` installs it")
    return AXE.read_text()


def violations(page: Page, axe: str) -> list[str]:
    """Return what axe finds in the page as it stands, each with the elements at fault."""
    page.evaluate(axe)
    found: dict[str, Any] = page.evaluate("axe.run()")
    faults = found["violations"]
    return [f"{one['id']}: {one['help']}: {[node['html'][:120] for node in one['nodes']][:3]}" for one in faults]


@pytest.mark.parametrize("state", STATES)
def test_axe_finds_nothing(browser: Browser, digits_url: str, axe: str, state: str) -> None:
    address, shown = STATES[state]
    found = {}
    for scheme in ("light", "dark"):
        for width in (390, 1280):
            context = browser.new_context(
                viewport={"width": width, "height": 800}, color_scheme="light" if scheme == "light" else "dark"
            )
            page = context.new_page()
            page.goto(f"{digits_url}/{address}")
            expect(page.locator(shown).first).to_be_visible()
            if faults := violations(page, axe):
                found[scheme, width] = faults
            context.close()
    assert found == {}
