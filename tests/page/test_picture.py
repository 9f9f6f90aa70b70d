"""One picture, large, in a real browser."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.conftest import encoded, scene
from tests.serving import serving

pytestmark = pytest.mark.slow("starts a service of its own and drives a browser through its pictures")


@pytest.fixture(scope="module")
def scenes_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service with six coloured scenes of 640 px in a folder."""
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "pictures" / "trip").mkdir(parents=True)
    for seed in range(6):
        (folder / "pictures" / "trip" / f"scene-{seed}.png").write_bytes(encoded(scene(640, 480, seed)))
    with serving(folder, str(folder / "pictures")) as url:
        yield url


def heading(page: Page, name: str) -> None:
    expect(page.get_by_role("heading", level=1)).to_have_text(name)


def test_shows_what_is_known_of_a_picture(page: Page, scenes_url: str) -> None:
    page.goto(f"{scenes_url}/#picture?id=trip%2Fscene-2.png")
    heading(page, "scene-2.png")
    expect(page).to_have_title("scene-2.png · Lookalike")
    expect(page.get_by_role("img", name="scene-2.png")).to_have_js_property("naturalWidth", 640)
    facts = page.locator(".facts").first
    expect(facts).to_contain_text("640 × 480")
    expect(facts).to_contain_text("PNG")
    expect(facts).to_contain_text("/pictures/trip/scene-2.png")
    expect(page.locator(".strip .tile")).to_have_count(5)
    page.get_by_role("link", name="trip", exact=True).click()
    heading(page, "trip")


def test_arrows_walk_through_the_listing_and_escape_returns(page: Page, scenes_url: str) -> None:
    page.goto(f"{scenes_url}/#browse?order=-id")
    page.locator('.grid .tile[title="trip/scene-4.png"]').click()
    heading(page, "scene-4.png")
    expect(page.get_by_role("link", name="Next →")).to_have_attribute("href", re.compile("scene-3"))
    page.keyboard.press("ArrowRight")
    heading(page, "scene-3.png")
    expect(page.get_by_role("link", name="← Previous")).to_have_attribute("href", re.compile("scene-4"))
    page.keyboard.press("ArrowLeft")
    heading(page, "scene-4.png")
    expect(page.get_by_role("link", name="← Previous")).to_have_attribute("href", re.compile("scene-5"))
    page.keyboard.press("Escape")
    heading(page, "All pictures")
    expect(page.locator('.grid .tile[title="trip/scene-4.png"]')).to_be_focused()


def test_a_picture_can_be_zoomed_by_keys_and_wheel(page: Page, scenes_url: str) -> None:
    page.goto(f"{scenes_url}/#picture?id=trip%2Fscene-1.png")
    stage = page.locator(".stage")
    image = page.get_by_role("img", name="scene-1.png")
    expect(page.get_by_role("button", name="Zoom out")).to_be_disabled()
    stage.focus()
    page.keyboard.press("+")
    expect(image).to_have_attribute("style", re.compile(r"scale\(1\.4\)"))
    before = image.get_attribute("style")
    page.keyboard.press("ArrowRight")
    expect(image).not_to_have_attribute("style", before or "")
    # It moved the picture, and did not open the next one.
    heading(page, "scene-1.png")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Zoom out")).to_be_disabled()
    stage.hover()
    page.mouse.wheel(0, -300)
    expect(page.get_by_role("button", name="Zoom out")).to_be_enabled()


def test_metadata_can_be_edited(page: Page, scenes_url: str) -> None:
    page.goto(f"{scenes_url}/#picture?id=trip%2Fscene-0.png")
    editor = page.get_by_role("region", name="Metadata")
    editor.get_by_role("button", name=re.compile("metadata$")).click()
    editor.get_by_label("Name", exact=True).last.fill("year")
    editor.get_by_placeholder("value").last.fill("2024")
    editor.get_by_role("button", name="Add a field").click()
    editor.get_by_label("Name", exact=True).last.fill("who")
    editor.get_by_placeholder("value").last.fill("<b>Ann</b>")
    editor.get_by_role("button", name="Save").click()
    expect(editor.get_by_role("button", name="Edit metadata")).to_be_focused()
    page.reload()
    expect(editor.locator("dd")).to_contain_text(["2024", "<b>Ann</b>"])
    assert page.evaluate("fetch('images/trip/scene-0.png').then((one) => one.json())")["metadata"]["year"] == 2024
    editor.get_by_role("button", name="Edit metadata").click()
    editor.get_by_role("button", name="Remove year").click()
    editor.get_by_role("button", name="Save").click()
    expect(editor.locator("dd")).not_to_contain_text(["2024"])


def test_removing_can_be_undone(page: Page, scenes_url: str) -> None:
    page.goto(scenes_url)
    page.locator('.grid .tile[title="trip/scene-5.png"]').click()
    heading(page, "scene-5.png")
    fetched = "fetch('images/trip/scene-5.png?include=embedding&include=digest').then((one) => one.json())"
    before = page.evaluate(fetched)
    page.get_by_role("button", name="Remove from the index").click()
    expect(page.locator(".position")).to_contain_text("5 pictures")
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_text("is in the index again")).to_be_visible()
    assert page.evaluate(fetched) == before


def test_an_item_that_is_not_there_is_said(page: Page, scenes_url: str, expected: list[str]) -> None:
    expected.append("404")
    page.goto(f"{scenes_url}/#picture?id=gone.png")
    expect(page.locator("#problem")).to_contain_text("no item has this id", ignore_case=True)
