"""The map of the page in a real browser, in front of the real service."""

import json
import math
import re
import time
import urllib.request
from base64 import b64decode
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import FloatRect, Page, Route, expect

from tests.serving import serving

pytestmark = pytest.mark.slow("waits for maps")


@pytest.fixture(scope="module")
def map_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service with 300 digits whose map by t-SNE is made."""
    with serving(tmp_path_factory.mktemp("map"), "digits[:300]") as url:
        # A busy machine has little time for a process of low priority.
        for _ in range(2000):
            if fetch(f"{url}/map").get("progress", 0) is None:
                break
            time.sleep(0.1)
        yield url


@pytest.fixture(autouse=True)
def quiet(expected: list[str]) -> None:
    """Let drivers speak about their speed: without a graphics card WebGL is slow."""
    expected.append("GL Driver Message")


def fetch(url: str) -> Any:
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


def positions(made: Any) -> Any:
    return np.frombuffer(b64decode(made["positions"]), "<u2").reshape(-1, 2).astype(float)


def open_map(page: Page, url: str, address: str = "#map") -> FloatRect:
    """Open the map and wait until it rests; return where it is."""
    page.goto(f"{url}/{address}")
    expect(page.locator("#map-count")).to_contain_text("picture")
    rest(page)
    box = page.locator("#plane").bounding_box()
    assert box is not None
    return box


def rest(page: Page) -> None:
    """Wait until nothing moves, and the lists and the address say what is in sight."""
    expect(page.locator("#plane")).not_to_have_attribute("aria-busy", "true")


def place_on(box: FloatRect, point: Any) -> tuple[float, float]:
    """Where a point of the whole map is on the page."""
    scale = (min(box["width"], box["height"]) - 2) * 0.88 / 65535
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    x, y = (np.asarray(point) - 65535 / 2) * scale + middle
    return float(x), float(y)


def lonely(places: Any) -> int:
    """The point whose nearest other is farthest away."""
    gaps = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(gaps, np.inf)
    return int(gaps.min(1).argmax())


def drawn(page: Page) -> Any:
    """What the map looks like: (H, W, 3)."""
    with Image.open(BytesIO(page.locator("#plane").screenshot())) as shot:
        return np.asarray(shot.convert("RGB"))


def colours_drawn(page: Page) -> int:
    """How many colours at least 20 pixels have."""
    counts = np.unique(drawn(page).reshape(-1, 3), axis=0, return_counts=True)[1]
    return int((counts > 20).sum())


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(50):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("it does not come true")


def in_sight(page: Page) -> int:
    text = page.locator("#map-count").inner_text().replace(",", "")
    return int(text.split()[0])


def test_all_items_are_drawn_and_the_nearest_are_links(page: Page, map_url: str, asked: list[str]) -> None:
    open_map(page, map_url)
    expect(page).to_have_title("Map · Lookalike")
    expect(page.locator("#map-count")).to_have_text("300 pictures")
    expect(page.locator("#nearby h2")).to_have_text("In sight 300")
    expect(page.locator("#nearby a")).to_have_count(200)
    expect(page.locator("#nearby")).to_contain_text("and 100 more")
    expect(page.locator("#map-note")).to_contain_text("Laid out by t-SNE")
    # Something is drawn, in more than one colour.
    wait_until(lambda: colours_drawn(page) > 1)
    assert all(url.startswith((map_url, "data:")) for url in asked)


def test_pointing_shows_a_picture_and_a_click_opens_it(page: Page, map_url: str) -> None:
    made = fetch(f"{map_url}/map")
    places = positions(made)
    point = lonely(places)
    box = open_map(page, map_url)
    expect(page.locator(".preview")).to_be_hidden()
    x, y = place_on(box, places[point])
    page.mouse.move(x, y)
    name = made["ids"][point].rsplit("/", 1)[-1]
    expect(page.locator(".preview b")).to_have_text(name)
    expect(page.locator(".preview")).to_be_visible()
    page.mouse.move(box["x"] + 3, box["y"] + 3)
    expect(page.locator(".preview")).to_be_hidden()
    page.mouse.click(x, y)
    expect(page).to_have_url(re.compile(r"#picture\?id=digits%2F" + name))
    page.go_back()
    expect(page.locator("#map-count")).to_have_text("300 pictures")


def test_wheel_drag_and_buttons_move_the_map_and_few_points_become_pictures(page: Page, map_url: str) -> None:
    # In the middle of the window is a picture, and most of the others are in sight. Where they are, depends on the
    # processor.
    across, down = min(positions(fetch(f"{map_url}/map")), key=lambda at: math.dist(at, (32768, 32768)))
    box = open_map(page, map_url, f"#map?at={across:.0f},{down:.0f},60000")
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    expect(page.locator(".layer span")).to_have_count(0)
    page.mouse.move(x, y)
    page.mouse.wheel(0, -300)
    expect(page.locator("#map-count")).to_contain_text("in sight")
    rest(page)
    zoomed = in_sight(page)
    assert 0 < zoomed < 300
    for _ in range(3):
        page.locator("#map-in").click()
    rest(page)
    assert 0 < in_sight(page) < zoomed
    expect(page.locator(".layer span")).to_have_count(in_sight(page))
    before = page.url
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 60, y, steps=4)
    page.mouse.move(x + 120, y, steps=4)
    page.mouse.up()
    # A drag opens nothing; the address follows, so that Back and a reload come to the same place.
    rest(page)
    moved = page.url
    assert moved != before
    assert "#map?at=" in moved
    count = page.locator("#map-count").inner_text()
    page.reload()
    expect(page.locator("#map-count")).to_have_text(count)
    rest(page)
    assert page.url == moved
    page.locator("#map-whole").click()
    expect(page.locator("#map-count")).to_have_text("300 pictures")


def test_an_outline_selects_and_the_ids_can_be_copied(page: Page, map_url: str) -> None:
    made = fetch(f"{map_url}/map")
    places = positions(made)
    # The left half, drawn around with Shift.
    box = open_map(page, map_url)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    corners = [place_on(box, corner) for corner in ((-2000, -2000), (-2000, 67000), (32000.5, 67000), (32000.5, -2000))]
    page.keyboard.down("Shift")
    page.mouse.move(*corners[0])
    page.mouse.down()
    for corner in (*corners[1:], corners[0]):
        page.mouse.move(*corner, steps=6)
    page.mouse.up()
    page.keyboard.up("Shift")
    near = int((np.abs(places[:, 0] - 32000.5) < 200).sum())
    count = int((places[:, 0] < 32000.5).sum())
    expect(page.locator("#selection h2")).to_contain_text("Selected")
    got = int(page.locator("#selection h2 .count").inner_text())
    assert abs(got - count) <= near
    page.locator("#copy-ids").click()
    expect(page.locator(".toast")).to_contain_text(f"{got} ids")
    copied = page.evaluate("navigator.clipboard.readText()").split("\n")
    assert len(copied) == got
    assert set(copied) <= set(made["ids"])
    assert page.locator("#selection a").first.get_attribute("title") == copied[0]
    page.locator("#clear-selection").click()
    expect(page.locator("#selection")).to_be_hidden()
    # The button draws, too; an outline around nothing says so.
    page.locator("#map-select").click()
    page.mouse.move(box["x"] + 4, box["y"] + 4)
    page.mouse.down()
    page.mouse.move(box["x"] + 14, box["y"] + 4, steps=3)
    page.mouse.move(box["x"] + 14, box["y"] + 14, steps=3)
    page.mouse.up()
    expect(page.locator("#selection")).to_contain_text("no point inside")
    expect(page.locator("#map-select")).to_have_attribute("aria-pressed", "false")


def test_points_are_coloured_by_a_metadata_key(page: Page, map_url: str) -> None:
    open_map(page, map_url)
    plain = colours_drawn(page)
    page.locator("#map-colour").select_option("label")
    expect(page.locator(".legend h2")).to_have_text("label")
    legend = page.locator(".legend button")
    expect(legend).to_have_count(10)
    assert "colour=label" in page.url
    wait_until(lambda: colours_drawn(page) > plain + 5)
    made = fetch(f"{map_url}/map?colour=label")
    codes = np.frombuffer(b64decode(made["codes"]), "<u2")
    assert legend.first.inner_text().split() == [made["values"][0], str((codes == 1).sum())]
    # One value alone stands out.
    legend.nth(2).click()
    expect(legend.nth(2)).to_have_attribute("aria-pressed", "true")
    page.reload()
    expect(legend).to_have_count(10)
    expect(page.locator("#map-colour")).to_have_value("label")
    page.locator("#map-colour").select_option("")
    expect(page.locator(".legend")).to_be_hidden()
    assert "colour" not in page.url


def test_a_query_is_marked_with_its_lookalikes(page: Page, map_url: str) -> None:
    open_map(page, map_url, "#map?id=digits%2F00007")
    section = page.locator("aside section").first
    expect(section.locator("h2")).to_have_text("Most like 00007 24")
    request = urllib.request.Request(
        f"{map_url}/search", json.dumps({"id": "digits/00007", "k": 24}).encode(), {"Content-Type": "application/json"}
    )
    hits = [hit["id"] for hit in fetch(request)["hits"]]  # type: ignore[arg-type]
    assert [link.get_attribute("title") for link in section.locator("a").all()] == hits
    section.get_by_role("button", name="Remove the marks").click()
    expect(page.locator("#map-count")).to_have_text("300 pictures")
    expect(section).to_be_hidden()
    assert "id=" not in page.url


def test_the_keyboard_alone_moves_selects_and_opens(page: Page, map_url: str) -> None:
    open_map(page, map_url)
    page.locator("#plane").focus()
    for _ in range(4):
        page.keyboard.press("+")
    expect(page.locator("#map-count")).to_contain_text("in sight")
    rest(page)
    before = page.url
    page.keyboard.press("ArrowRight")
    rest(page)
    assert page.url != before
    page.keyboard.press("0")
    expect(page.locator("#map-count")).to_have_text("300 pictures")
    # Select by keys.
    page.locator("#map-select").focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Select all in sight").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#selection h2")).to_have_text("Selected 300")
    expect(page.locator("#copy-ids")).to_be_focused()
    # One link of a list is in the tab order; arrows move on and show the picture on the map.
    links = page.locator("#nearby a")
    assert page.locator("#nearby a[tabindex='0']").count() == 1
    links.first.focus()
    page.keyboard.press("ArrowDown")
    expect(links.nth(1)).to_be_focused()
    expect(page.locator(".preview b")).to_have_text(links.nth(1).inner_text())
    page.keyboard.press("End")
    expect(links.last).to_be_focused()
    page.keyboard.press("Home")
    # Enter on the map opens what is nearest its middle: the first of the list.
    name = links.first.inner_text()
    page.locator("#plane").focus()
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"#picture\?id=digits%2F" + name))
    page.go_back()
    expect(page.locator("#plane")).to_be_focused()


def test_the_first_map_is_waited_for_with_progress_and_cancel(page: Page, map_url: str) -> None:
    made = [False]

    def answer(route: Route) -> None:
        if made[0]:
            route.continue_()
        else:
            route.fulfill(status=202, json={"progress": 0.42}, headers={"Retry-After": "1"})

    page.route(re.compile(r"/map(\?.*)?$"), answer)
    page.goto(f"{map_url}/#map")
    bar = page.get_by_role("progressbar", name="Making the map")
    expect(bar).to_be_visible()
    assert bar.evaluate("bar => bar.value") == 0.42
    page.get_by_role("button", name="Cancel").click()
    expect(bar).to_be_hidden()
    page.get_by_role("button", name="Wait for the map").click()
    expect(bar).to_be_visible()
    made[0] = True
    expect(page.locator("#map-count")).to_have_text("300 pictures")


def test_a_better_map_takes_the_place_of_the_first(page: Page, map_url: str) -> None:
    first = fetch(f"{map_url}/map?method=pca")
    answers = [first | {"progress": 0.1}, first | {"progress": 0.1}]

    def answer(route: Route) -> None:
        if not answers:
            route.continue_()
        elif "known" in route.request.url:
            answers.clear()
            route.fulfill(status=202, json={"progress": 0.6}, headers={"Retry-After": "1"})
        else:
            route.fulfill(json=answers.pop())

    page.route(re.compile(r"/map(\?.*)?$"), answer)
    open_map(page, map_url)
    expect(page.locator("#map-note")).to_contain_text("Laid out by PCA for now. A better map is being made: 10 %.")
    expect(page.locator("#map-note")).to_contain_text("60 %")
    expect(page.locator("#map-note")).to_contain_text("Laid out by t-SNE")


def test_an_empty_store_offers_to_add(page: Page, empty_url: str) -> None:
    page.goto(f"{empty_url}/#map")
    expect(page.get_by_text("There is no picture yet.")).to_be_visible()
    expect(page.locator("main").get_by_role("link", name="Add pictures")).to_have_attribute("href", "#add")


def test_webgl_and_pixels_show_the_same(map_url: str, page: Page) -> None:
    """The points are at the same places."""
    open_map(page, map_url)
    expect(page.locator("#plane")).to_have_attribute("data-drawn-by", "pixels")
    by_pixels = drawn(page).astype(int)
    # A page that is not told who draws takes it for a graphics card.
    page.add_init_script("""
        const own = WebGL2RenderingContext.prototype.getExtension;
        WebGL2RenderingContext.prototype.getExtension = function (name) {
            return name === "WEBGL_debug_renderer_info" ? null : own.call(this, name);
        };
    """)
    page.reload()
    expect(page.locator("#plane")).to_have_attribute("data-drawn-by", "WebGL2")
    expect(page.locator("#map-count")).to_have_text("300 pictures")
    by_webgl = drawn(page).astype(int)
    points, others = (np.abs(seen - seen[10, 10]).max(axis=2) > 60 for seen in (by_pixels, by_webgl))
    assert points.sum() > 1000
    assert (points & others).sum() > 0.7 * (points | others).sum()
