"""The gallery in a real browser: the grid, folders, names and metadata."""

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from tests.colours import RGB, picture, write_colours
from tests.conftest import MODEL, encoded, scene
from tests.serving import serving

ODD_ID = "holiday 2024/50% #1?/./Größe ü+&.png"
COUNT, PLACES = 460, ("2023/rome", "2023/paris", "2024", "2025/deep/er")


def tiles(page: Page) -> Locator:
    return page.locator(".grid .tile")


def patch(url: str, id: str, metadata: dict[str, object]) -> None:
    body = json.dumps({"metadata": metadata}).encode()
    headers = {"Content-Type": "application/json"}
    where = f"{url}/images/{quote(id, safe='')}"
    urllib.request.urlopen(urllib.request.Request(where, body, headers, method="PATCH")).close()


@pytest.fixture(scope="module")
def folders_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service with 460 pictures in four folders; each tenth has metadata."""
    folder = tmp_path_factory.mktemp("folders")
    colours = list(RGB)
    ids = [f"{PLACES[number % 4]}/img-{number:04}.png" for number in range(COUNT)]
    for number, id in enumerate(ids):
        path = folder / "pictures" / id
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(colours[number % len(colours)]))
    with serving(folder, str(folder / "pictures"), write_colours(folder / "colours")) as url:
        for number in range(0, COUNT, 40):
            patch(url, ids[number], {"mood": "calm" if number % 80 else "wild", "rank": number})
        yield url


def test_shows_the_first_pictures_and_asks_nobody_else(page: Page, digits_url: str, asked: list[str]) -> None:
    page.goto(digits_url)
    expect(page.get_by_role("heading", level=1)).to_have_text("All pictures")
    expect(page.locator(".position")).to_contain_text("of 1,797 pictures")
    expect(page.locator("#notice")).to_be_hidden()
    expect(tiles(page).first).to_contain_text("00000")
    expect(tiles(page).first.locator("img")).to_have_js_property("naturalWidth", 8)
    expect(tiles(page).first.locator("img")).to_have_css("image-rendering", "pixelated")
    page.wait_for_load_state("networkidle")
    assert len(asked) > 10
    assert [url for url in asked if not url.startswith((f"{digits_url}/", "data:", "blob:"))] == []


@pytest.mark.slow("loads the page twice and waits for all thumbnails")
def test_no_thumbnail_is_fetched_again_after_a_reload(page: Page, digits_url: str) -> None:
    page.goto(digits_url)
    page.wait_for_load_state("networkidle")
    fetched = "performance.getEntriesByType('resource').filter((one) => /thumbnail/.test(one.name))"
    assert page.evaluate(f"{fetched}.filter((one) => one.transferSize > 0).length") > 10
    page.reload()
    page.wait_for_load_state("networkidle")
    assert page.evaluate(f"{fetched}.length") > 10
    assert page.evaluate(f"{fetched}.filter((one) => one.transferSize > 0).length") == 0


@pytest.mark.slow("starts a service of its own")
def test_without_folders_and_metadata_the_grid_has_the_whole_width(page: Page, colours_url: str) -> None:
    page.goto(colours_url)
    expect(tiles(page).first).to_be_visible()
    expect(page.locator(".side")).to_be_hidden()
    widths = "['.browse .body', '.grid'].map((selector) => document.querySelector(selector).clientWidth)"
    body, grid = page.evaluate(widths)
    assert grid == body


def test_only_tiles_in_sight_are_in_the_document(page: Page, digits_url: str) -> None:
    page.goto(digits_url)
    expect(tiles(page).first).to_be_visible()
    assert tiles(page).count() < 150
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    expect(page.locator(".position")).to_contain_text("1,797 of 1,797 pictures")
    expect(page.locator('.tile[title="digits/01796"]')).to_be_visible()
    expect(page.locator('.tile[title="digits/00000"]')).to_have_count(0)
    assert tiles(page).count() < 150


@pytest.mark.slow("scrolls through a long gallery")
def test_what_flies_by_is_not_drawn(page: Page, digits_url: str) -> None:
    page.goto(digits_url)
    expect(tiles(page).first).to_be_visible()
    page.wait_for_load_state("networkidle")
    # By a window a frame.
    drawn = page.evaluate("""async () => {
        const names = () => [...document.querySelectorAll('.grid .tile')].map((tile) => tile.title);
        const before = new Set(names());
        let drawn = 0;
        await new Promise(requestAnimationFrame);
        for (let step = 0; step < 6; step += 1) {
            window.scrollBy(0, window.innerHeight);
            await new Promise(requestAnimationFrame);
            drawn += names().filter((name) => !before.has(name)).length;
        }
        return drawn;
    }""")
    assert drawn == 0
    expect(tiles(page).first).to_be_visible()
    expect(page.locator(".grid > .waiting")).to_have_count(0)


def test_a_tile_is_a_link_and_back_restores_position_and_focus(page: Page, digits_url: str) -> None:
    page.goto(digits_url)
    expect(tiles(page).first).to_be_visible()
    page.evaluate("window.scrollTo(0, 5000)")
    tile = page.locator(".grid .tile").nth(40)
    expect(tile).to_be_visible()
    name = tile.get_attribute("title")
    tile.scroll_into_view_if_needed()
    before = page.evaluate("window.scrollY")
    page.locator(f'.tile[title="{name}"]').click()
    expect(page.get_by_role("heading", level=1)).to_have_text((name or "").removeprefix("digits/"))
    expect(page.get_by_role("heading", level=1)).to_be_focused()
    expect(page).to_have_title(f"{(name or '').removeprefix('digits/')} · Lookalike")
    assert page.evaluate("window.scrollY") == 0
    page.go_back()
    expect(page.locator(f'.tile[title="{name}"]')).to_be_focused()
    assert page.evaluate("window.scrollY") == before
    # A link may be opened in a tab of its own.
    assert (page.locator(f'.tile[title="{name}"]').get_attribute("href") or "").startswith("#picture?id=digits%2F")


def test_the_grid_is_one_tab_stop_and_arrows_move_in_it(page: Page, digits_url: str) -> None:
    page.goto(digits_url)
    expect(tiles(page).first).to_be_visible()
    assert page.locator('.grid .tile[tabindex="0"]').count() == 1
    tiles(page).first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator('.tile[title="digits/00001"]')).to_be_focused()
    expect(page.locator('.tile[title="digits/00001"]')).to_have_css("outline-style", "solid")
    page.keyboard.press("End")
    expect(page.locator('.tile[title="digits/01796"]')).to_be_focused()
    page.keyboard.press("Home")
    expect(page.locator('.tile[title="digits/00000"]')).to_be_focused()
    page.keyboard.press("PageDown")
    page.keyboard.press("Enter")
    expect(page.get_by_role("link", name="Search by this")).to_be_visible()


@pytest.mark.slow("starts a service of its own")
def test_folders_lead_down_and_crumbs_lead_up(page: Page, folders_url: str) -> None:
    page.goto(folders_url)
    expect(page.locator(".position")).to_contain_text("460 pictures")
    side = page.locator(".folders")
    expect(side.get_by_role("link", name=re.compile("^2023"))).to_contain_text("230")
    side.get_by_role("link", name=re.compile("^2023")).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("2023")
    expect(page).to_have_title("2023 · Lookalike")
    side.get_by_role("link", name=re.compile("^rome")).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("2023/rome")
    expect(page.locator(".position")).to_contain_text("115 pictures")
    # File name first, folder second.
    expect(tiles(page).first.locator(".file")).to_have_text("img-0000.png")
    expect(tiles(page).first.locator(".folder")).to_have_text("2023/rome")
    page.locator(".crumbs").get_by_role("link", name="2023").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("2023")
    page.go_back()
    expect(page.get_by_role("heading", level=1)).to_have_text("2023/rome")
    page.reload()
    expect(page.get_by_role("heading", level=1)).to_have_text("2023/rome")


def test_names_metadata_and_order_choose(page: Page, folders_url: str) -> None:
    page.goto(folders_url)
    page.get_by_role("searchbox", name="File name", exact=True).fill("IMG-004")
    page.get_by_role("searchbox", name="File name", exact=True).press("Enter")
    expect(page.locator(".position")).to_contain_text("10 pictures")
    page.get_by_role("link", name=re.compile("^Name: IMG-004")).click()
    expect(page.locator(".position")).to_contain_text("460 pictures")
    page.locator(".chips").get_by_role("link", name=re.compile("^calm")).click()
    expect(page.locator(".position")).to_contain_text("6 pictures")
    page.get_by_role("combobox", name="Order").select_option(label="Name, backwards")
    expect(tiles(page).first).to_have_attribute("title", "2023/rome/img-0440.png")
    page.get_by_role("link", name=re.compile("^mood: calm")).click()
    expect(tiles(page).first).to_have_attribute("title", re.compile("^2025/deep/er/img-045"))


def test_three_sizes_of_tiles_are_remembered(page: Page, folders_url: str) -> None:
    page.goto(folders_url)
    medium = tiles(page).first.bounding_box()
    page.get_by_role("button", name="Large").click()
    expect(page.get_by_role("button", name="Large")).to_have_attribute("aria-pressed", "true")
    large = tiles(page).first.bounding_box()
    page.reload()
    expect(page.get_by_role("button", name="Large")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Small").click()
    expect(page.get_by_role("button", name="Small")).to_have_attribute("aria-pressed", "true")
    small = tiles(page).first.bounding_box()
    assert small and medium and large
    assert small["width"] < medium["width"] < large["width"]


def test_a_failure_keeps_what_was_there_and_offers_another_try(
    page: Page, digits_url: str, expected: list[str]
) -> None:
    expected.append("ERR_FAILED")
    page.goto(digits_url)
    expect(tiles(page).first).to_be_visible()
    page.route("**/images/digits/00003?*", lambda route: route.abort())
    page.locator('.tile[title="digits/00003"]').click()
    expect(page.locator("#problem")).to_contain_text("The service cannot be reached")
    expect(page.locator('.tile[title="digits/00003"]')).to_be_visible()
    page.unroute("**/images/digits/00003?*")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("00003")
    expect(page.locator(".problem")).to_have_count(0)


def test_a_view_that_takes_long_can_be_cancelled(page: Page, digits_url: str) -> None:
    page.goto(digits_url)
    expect(tiles(page).first).to_be_visible()
    held: list[Route] = []
    page.route("**/images/digits/00004?*", lambda route: held.append(route))
    page.locator('.tile[title="digits/00004"]').click()
    expect(page.get_by_role("progressbar", name="Loading")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("progressbar", name="Loading")).to_be_hidden()
    expect(page.locator('.tile[title="digits/00004"]')).to_be_focused()
    assert not page.url.endswith("00004")


@pytest.mark.slow("starts a service of its own")
def test_an_empty_gallery_offers_to_add_and_shows_what_comes(page: Page, empty_url: str) -> None:
    page.goto(empty_url)
    expect(page.get_by_role("link", name="Add pictures")).to_be_visible()
    expect(page.locator("#canvas")).to_be_hidden()
    markup = "<img src=x onerror=alert(1)>"
    for seed, id in enumerate([ODD_ID, "plain.png"]):
        where = f"{empty_url}/images/{quote(id, safe='')}?metadata={quote(json.dumps({'artist': markup}))}"
        urllib.request.urlopen(urllib.request.Request(where, encoded(scene(seed=seed)), method="PUT")).close()
    page.reload()
    expect(page.locator(".position")).to_contain_text("2 pictures")
    # The pictures are coloured scenes, but the encoder is for digits.
    expect(page.locator("#notice")).to_contain_text("expect poor matches")
    expect(page.locator("#notice code").first).to_contain_text("lookalike reindex --store")
    expect(tiles(page).first).to_contain_text(f"artist {markup}")
    expect(tiles(page).first.locator("img")).to_have_js_property("naturalWidth", 64)
    tiles(page).first.click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Größe ü+&.png")
    expect(page.locator(".stage img")).to_have_js_property("naturalWidth", 64)


@pytest.mark.slow("starts a service of its own")
def test_a_key_is_asked_for_until_it_is_right(page: Page, tmp_path: Path, expected: list[str]) -> None:
    expected.append("401")
    key = "a-key-that-may-write"
    with serving(tmp_path, "digits[:5]", api_keys=f"write:{key}") as url:
        page.goto(url)
        dialog = page.get_by_role("dialog", name="API key")
        dialog.get_by_label("API key").fill("a-wrong-key-of-somebody")
        dialog.get_by_label("API key").press("Enter")
        expect(dialog.get_by_role("alert")).to_contain_text("does not know that key")
        dialog.get_by_label("API key").fill(key)
        dialog.get_by_role("button", name="Use this key").click()
        expect(tiles(page)).to_have_count(5)
        expect(tiles(page).first.locator("img")).to_have_js_property("naturalWidth", 8)
        # A reload does not ask for the key again.
        page.reload()
        tiles(page).first.click()
        expect(page.get_by_role("heading", level=1)).to_have_text("00000")
        page.goto(f"{url}/#about")
        page.get_by_role("button", name="Forget the API key").click()
        dialog.get_by_role("button", name="Cancel").click()
        expect(page.locator("#problem")).to_contain_text("API key")
        page.get_by_role("button", name="Enter an API key").click()
        dialog.get_by_label("API key").fill(key)
        dialog.get_by_label("API key").press("Enter")
        expect(page.get_by_text("5 pictures")).to_be_visible()


def test_about_tells_how_good_the_encoder_was_at_its_export(page: Page, digits_url: str) -> None:
    page.goto(f"{digits_url}/#about")
    told = page.locator("dt", has_text="Measured: model.int8.onnx").locator("+ dd")
    quality = json.loads((MODEL / "card.json").read_text())["quality"]["model.int8.onnx"]
    expect(told).to_have_text(
        f"k-NN accuracy {quality['knn']:.3f}, cosine to fp32 at least {quality['cosine_p1']:.3f} for 99 %, "
        "of 1,000 pictures that it was not trained on"
    )


def test_the_first_tab_skips_the_header_and_stays_in_the_view(page: Page, digits_url: str) -> None:
    page.goto(f"{digits_url}/#about")
    expect(page.get_by_role("heading", level=1)).to_have_text("About this service")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    expect(page.get_by_role("heading", level=1)).to_have_text("About this service")


@pytest.mark.parametrize(
    ("link", "title", "heading"),
    [
        ("Duplicates", "Duplicates", "Duplicates"),
        ("Map", "Map", "Map"),
        ("Add", "Add pictures", "Add pictures"),
        ("About this service", "About this service", "About this service"),
    ],
)
@pytest.mark.slow("opens each view")
def test_each_view_has_a_link_a_title_and_a_heading(
    page: Page, digits_url: str, link: str, title: str, heading: str
) -> None:
    page.goto(digits_url)
    page.get_by_role("banner").get_by_role("link", name=re.compile(f"^{link}")).click()
    expect(page.get_by_role("heading", level=1)).to_have_text(heading)
    expect(page).to_have_title(f"{title} · Lookalike")
    expect(page.get_by_role("banner").locator("[aria-current=page]")).to_have_count(1)
