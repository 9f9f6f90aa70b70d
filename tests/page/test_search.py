"""Searches in a real browser: by items, words and the visitor's own pictures."""

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Route, expect

from tests.colours import write_colours
from tests.conftest import encoded, scene
from tests.page.files import digit, drop_paths, fetch, hand_over, names, payload
from tests.serving import serving

pytestmark = pytest.mark.slow("drives a browser through searches")

# The pictures of `mixed_url` have these longer sides.
LARGE, HUGE = 3000, 6000


def tiles(page: Page, band: str = "") -> Locator:
    return page.get_by_role("region", name=band).locator(".tile") if band else page.locator(".hits .tile")


def heading(page: Page) -> Locator:
    return page.get_by_role("heading", level=1)


def params(page: Page) -> dict[str, str]:
    """Return the parameters of the address."""
    return {key: value[0] for key, value in parse_qs(urlsplit(page.url).fragment.partition("?")[2]).items()}


def colour(*rgb: int) -> bytes:
    return encoded(Image.new("RGB", (8, 8), rgb))


@pytest.fixture(scope="module")
def large() -> bytes:
    """A JPEG longer than what is sent whole, red at its left and blue at its right."""
    picture = Image.new("RGB", (LARGE, 2000), (255, 0, 0))
    picture.paste((0, 0, 255), (LARGE // 2, 0, LARGE, 2000))
    return encoded(picture, "JPEG", quality=90)


@pytest.fixture(scope="module")
def mixed_url(tmp_path_factory: pytest.TempPathFactory, large: bytes) -> Iterator[str]:
    """The address of a service that reads words, with forty colours, three copies of one, and a large picture."""
    folder = tmp_path_factory.mktemp("mixed")
    chance = np.random.default_rng(0)
    files = {f"colours/{number:02}.png": colour(*chance.integers(0, 256, 3).tolist()) for number in range(40)}
    copied = colour(10, 200, 30)
    files |= {"green.png": copied, "copies/green.png": copied, "copies/again/green.png": copied}
    files |= {"red.png": colour(255, 0, 0), "blue.png": colour(0, 0, 255), "large.jpg": large}
    for name, content in files.items():
        path = folder / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with serving(folder, str(folder / "pictures"), write_colours(folder / "colours")) as url:
        yield url


# Playwright does not show a body that is a file.
RECORD = """
    window.sent = [];
    const ask = window.fetch;
    window.fetch = (address, options) => {
        if (String(address).startsWith("search?")) window.sent.push(options.body);
        return ask(address, options);
    };
"""


@pytest.fixture
def searches(page: Page) -> Callable[[], list[bytes]]:
    """A function that returns the body of every search since the page was loaded."""
    page.add_init_script(RECORD)

    def read() -> list[bytes]:
        bodies = page.evaluate(
            """() => Promise.all(window.sent.map(async (body) =>
                Array.from(new Uint8Array(await new Response(body).arrayBuffer()))))"""
        )
        return [bytes(body) for body in bodies]

    return read


def test_an_item_shows_its_lookalikes_in_bands(page: Page, digits_url: str) -> None:
    scores = json.loads(fetch(f"{digits_url}/scores"))
    page.goto(f"{digits_url}/#search?id=digits%2F00007")
    expect(heading(page)).to_have_text("Looks like 00007")
    expect(page).to_have_title("00007 · Lookalike")
    alike = tiles(page, "Alike")
    expect(alike.first).to_be_visible()
    assert re.fullmatch(r"0\.\d{3}", alike.first.locator(".score").inner_text())
    values = [float(text) for text in tiles(page).locator(".score").all_inner_texts()]
    assert values == sorted(values, reverse=True)
    # What is less alike is folded.
    assert all(value >= round(scores["alike"], 3) for value in values)
    assert "digits/00007" not in names(tiles(page))
    expect(page.locator(".query-picture")).to_have_js_property("naturalWidth", 8)
    expect(page.get_by_role("link", name="Show on the map")).to_have_attribute("href", "#map?id=digits%2F00007")
    # A tile is a link with an address of its own.
    assert (alike.first.get_attribute("href") or "").startswith("#picture?id=digits%2F")


def test_the_same_file_is_called_so(page: Page, digits_url: str, searches: Callable[[], list[bytes]]) -> None:
    page.goto(digits_url)
    file = digit(digits_url, 7)
    page.set_input_files("#ask-files", file)
    expect(heading(page)).to_have_text("Looks like digit.png")
    expect(tiles(page, "Same file")).to_have_count(1)
    expect(tiles(page, "Same file")).to_contain_text("00007")
    # A small picture is sent as it is, and once.
    assert searches() == [file["buffer"]]


def test_the_less_alike_are_folded_and_more_of_them_keep_the_focus(page: Page, digits_url: str) -> None:
    page.goto(f"{digits_url}/#search?id=digits%2F00007&near=0.999&alike=0.998")
    expect(page.get_by_text("No picture here is alike.")).to_be_visible()
    expect(tiles(page)).to_have_count(0)
    fold = page.get_by_role("button", name="100 or more that are less alike")
    expect(fold).to_have_attribute("aria-expanded", "false")
    fold.press("Enter")
    expect(tiles(page, "Less alike")).to_have_count(100)
    expect(page.get_by_role("button", name="Hide those that are less alike")).to_be_focused()
    before = set(names(tiles(page)))
    page.get_by_role("button", name="More", exact=True).press("Enter")
    expect(tiles(page)).to_have_count(200)
    focused = page.evaluate("document.activeElement.title")
    assert focused == names(tiles(page))[100]
    assert focused not in before
    # Back from a picture shows as many, and gives the focus back.
    page.keyboard.press("Enter")
    expect(page.get_by_role("link", name="Search by this")).to_be_visible()
    page.go_back()
    expect(tiles(page)).to_have_count(200)
    expect(page.locator(f'.tile[title="{focused}"]')).to_be_focused()


def test_arrows_move_through_hits_that_are_one_tab_stop(page: Page, digits_url: str) -> None:
    page.goto(f"{digits_url}/#search?id=digits%2F00007&near=0.9&alike=0.5")
    expect(tiles(page, "Alike").first).to_be_visible()
    assert tiles(page).evaluate_all("(all) => all.filter((tile) => tile.tabIndex === 0).length") == 1
    order = names(tiles(page))
    tiles(page).first.focus()
    for key, place in [("ArrowRight", 1), ("End", len(order) - 1), ("Home", 0)]:
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.title") == order[place]
    top = tiles(page).first.bounding_box()
    page.keyboard.press("ArrowDown")
    below = page.locator(".tile:focus").bounding_box()
    assert top and below and below["y"] > top["y"] and below["x"] == pytest.approx(top["x"], abs=1)
    assert tiles(page).evaluate_all("(all) => all.filter((tile) => tile.tabIndex === 0).length") == 1


def test_the_bands_can_be_moved_by_keyboard_and_stay_after_a_reload(page: Page, digits_url: str) -> None:
    scores = json.loads(fetch(f"{digits_url}/scores"))
    page.goto(f"{digits_url}/#search?id=digits%2F00007")
    usual = f"Nearly the same from {scores['near']:.3f}, alike from {scores['alike']:.3f}"
    page.get_by_text(usual).click()
    slider = page.get_by_role("slider", name="Alike from")
    expect(slider).to_have_value(f"{scores['alike']:.3f}".rstrip("0"))
    slider.press("End")
    # What is nearly the same is alike, so the other slider went along.
    expect(page.get_by_role("slider", name="Nearly the same from")).to_have_value("1")
    expect(tiles(page)).to_have_count(0)
    slider.press("Home")
    expect(tiles(page, "Alike")).to_have_count(100)
    assert params(page)["alike"] == slider.input_value()
    page.reload()
    expect(tiles(page, "Alike")).to_have_count(100)
    page.locator(".band-tools summary").click()
    page.get_by_role("button", name="Back to the usual scores").click()
    expect(page.get_by_text(usual)).to_be_visible()
    assert "alike" not in params(page) and "near" not in params(page)


def test_copies_collapse_into_one_tile(page: Page, mixed_url: str) -> None:
    page.goto(f"{mixed_url}/#search?id=green.png")
    expect(tiles(page, "Same file")).to_have_count(2)
    page.get_by_role("checkbox", name="Collapse copies").check()
    expect(tiles(page, "Same file")).to_have_count(1)
    expect(tiles(page, "Same file")).to_contain_text("+1 copy")
    assert params(page)["copies"] == "1"
    page.reload()
    expect(tiles(page, "Same file")).to_contain_text("+1 copy")
    page.get_by_role("checkbox", name="Collapse copies").uncheck()
    expect(tiles(page, "Same file")).to_have_count(2)
    expect(page.get_by_text("+1 copy")).to_have_count(0)


def test_several_files_are_tabs_and_none_is_dropped(page: Page, digits_url: str, expected: list[str]) -> None:
    expected.append("415")
    page.goto(digits_url)
    bad = payload("notes.json", b'{"id": "digits/00001"}', "application/json")
    page.set_input_files("#ask-files", [digit(digits_url, 7, "seven.png"), bad, digit(digits_url, 11, "eleven.png")])
    tab = page.get_by_role("tab")
    expect(page.get_by_role("tablist", name="3 pictures")).to_be_visible()
    expect(tab).to_have_text(["seven.png", "notes.json", "eleven.png"])
    expect(page.get_by_role("tabpanel", name="seven.png")).to_be_visible()
    expect(tiles(page, "Same file")).to_contain_text("00007")
    tab.first.focus()
    page.keyboard.press("ArrowRight")
    expect(tab.nth(1)).to_be_focused()
    expect(tab.nth(1)).to_have_attribute("aria-selected", "true")
    expect(page.locator(".found")).to_contain_text("expected the bytes of one of JPEG, PNG")
    expect(heading(page)).to_have_text("Cannot search by notes.json")
    expect(page.get_by_role("button", name="Choose another picture")).to_be_visible()
    page.keyboard.press("End")
    expect(tiles(page, "Same file")).to_contain_text("00011")
    expect(page).to_have_title("eleven.png · Lookalike")
    page.reload()
    expect(tab.nth(2)).to_have_attribute("aria-selected", "true")
    expect(tiles(page, "Same file")).to_contain_text("00011")
    page.keyboard.press("Tab")


def test_each_tab_keeps_its_own_part(page: Page, mixed_url: str, large: bytes) -> None:
    page.goto(mixed_url)
    files = [payload("large.jpg", large, "image/jpeg"), payload("red.png", colour(255, 0, 0))]
    page.set_input_files("#ask-files", files)
    expect(tiles(page, "Same file")).to_contain_text("large.jpg")
    page.goto(f"{page.url}&crop=0.6,0.1,0.3,0.6")
    expect(heading(page)).to_have_text("Like a part of large.jpg")
    page.get_by_role("tab", name="red.png").click()
    expect(heading(page)).to_have_text("Looks like red.png")
    expect(tiles(page, "Same file")).to_contain_text("red.png")
    assert params(page)["tab"] == "1" and "crop" not in params(page)
    tiles(page).first.click()
    expect(page.get_by_role("link", name="Search by this")).to_be_visible()
    page.go_back()
    expect(heading(page)).to_have_text("Looks like red.png")
    page.get_by_role("tab", name="large.jpg").click()
    expect(heading(page)).to_have_text("Like a part of large.jpg")
    expect(tiles(page).first).to_contain_text("blue.png")


def test_a_tab_that_is_left_does_not_show_its_late_answer(page: Page, digits_url: str) -> None:
    held: list[Route] = []
    page.goto(digits_url)
    page.set_input_files("#ask-files", [digit(digits_url, 7, "seven.png"), digit(digits_url, 11, "eleven.png")])
    expect(tiles(page, "Same file")).to_contain_text("00007")
    page.route("**/search?*", lambda route: held.append(route) if not held else route.continue_())
    with page.expect_request("**/search?*"):
        page.get_by_role("tab", name="eleven.png").click()
    with page.expect_event("requestfailed"):
        page.get_by_role("tab", name="seven.png").click()
    expect(tiles(page, "Same file")).to_contain_text("00007")
    page.get_by_role("tab", name="eleven.png").click()
    expect(tiles(page, "Same file")).to_contain_text("00011")


def test_a_search_that_takes_long_can_be_cancelled(page: Page, digits_url: str) -> None:
    held: list[Route] = []
    page.goto(digits_url)
    page.set_input_files("#ask-files", [digit(digits_url, 7, "seven.png"), digit(digits_url, 11, "eleven.png")])
    expect(tiles(page, "Same file")).to_contain_text("00007")
    page.route("**/search?*", lambda route: held.append(route))
    page.get_by_role("tab", name="eleven.png").click()
    expect(page.locator(".found").get_by_role("status")).to_contain_text("Searching")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".found")).to_contain_text("The search was cancelled.")
    page.unroute("**/search?*")
    page.get_by_role("button", name="Try again").click()
    expect(tiles(page, "Same file")).to_contain_text("00011")


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_one_file_is_searched_by_at_once_and_may_be_added_instead(page: Page, digits_url: str, event: str) -> None:
    page.goto(digits_url)
    expect(page.locator(".tile").first).to_be_visible()
    hand_over(page, event)
    expect(page.locator("#toasts")).to_contain_text("not a file" if event == "drop" else "no picture")
    hand_over(page, event, digit(digits_url, 7))
    expect(tiles(page, "Same file")).to_contain_text("00007")
    page.get_by_role("button", name="Add it instead").click()
    expect(heading(page)).to_have_text("Add pictures")
    expect(page.get_by_role("button", name="Add 1 picture")).to_be_visible()


def test_several_dropped_files_ask_what_they_are_for(page: Page, digits_url: str) -> None:
    page.goto(digits_url)
    expect(page.locator(".tile").first).to_be_visible()
    files = [digit(digits_url, number, f"{number}.png") for number in (7, 11)]
    hand_over(page, "drop", *files)
    dialog = page.get_by_role("dialog", name="2 pictures")
    expect(dialog.get_by_role("button")).to_have_text(["Search by these", "Add to the collection", "Cancel"])
    dialog.get_by_role("button", name="Cancel").press("Enter")
    expect(dialog).to_have_count(0)
    hand_over(page, "drop", *files)
    page.get_by_role("button", name="Search by these").press("Enter")
    expect(page.get_by_role("tab")).to_have_text(["7.png", "11.png"])


def test_a_dropped_folder_is_walked_and_what_is_left_out_is_named(page: Page, digits_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "trip"
    (folder / "day 2").mkdir(parents=True)
    for number, name in enumerate(["b10.png", "b9.png", "day 2/a.png"]):
        (folder / name).write_bytes(digit(digits_url, number)["buffer"])
    (folder / "notes.txt").write_text("words")
    (folder / "day 2" / "._a.png").write_bytes(b"hidden")
    page.goto(digits_url)
    expect(page.locator(".tile").first).to_be_visible()
    drop_paths(page, folder)
    dialog = page.get_by_role("dialog", name="3 pictures in trip")
    dialog.get_by_text("2 other files are left out").click()
    expect(dialog.get_by_role("listitem")).to_have_text(["trip/day 2/._a.png", "trip/notes.txt"])
    dialog.get_by_role("button", name="Search by these").click()
    expect(page.get_by_role("tab")).to_have_text(["trip/b9.png", "trip/b10.png", "trip/day 2/a.png"])
    expect(tiles(page, "Same file")).to_contain_text("00001")


def test_a_folder_without_pictures_says_so(page: Page, digits_url: str, tmp_path: Path) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "notes.txt").write_text("words")
    page.goto(digits_url)
    expect(page.locator(".tile").first).to_be_visible()
    drop_paths(page, tmp_path / "papers")
    expect(page.locator("#toasts")).to_contain_text("There is no picture in papers, but 1 other file")


def test_more_files_than_queries_can_be_added(page: Page, digits_url: str) -> None:
    page.goto(digits_url)
    content = digit(digits_url, 7)["buffer"]
    page.set_input_files("#ask-files", [payload(f"{number}.png", content) for number in range(201)])
    dialog = page.get_by_role("dialog", name="201 pictures")
    expect(dialog).to_contain_text("at most 200 pictures")
    expect(dialog.get_by_role("button")).to_have_text(["Add to the collection", "Cancel"])
    dialog.get_by_role("button", name="Add to the collection").click()
    expect(page.get_by_role("button", name="Add 201 pictures")).to_be_visible()


def picture_of(body: bytes) -> Image.Image:
    return Image.open(io.BytesIO(body)).convert("RGB")


def test_a_part_is_drawn_by_mouse_and_searched_by(
    page: Page, mixed_url: str, large: bytes, searches: Callable[[], list[bytes]]
) -> None:
    page.goto(mixed_url)
    page.set_input_files("#ask-files", payload("large.jpg", large, "image/jpeg"))
    expect(tiles(page, "Same file")).to_contain_text("large.jpg")
    expect(page.locator(".query-picture")).to_have_js_property("naturalWidth", LARGE)
    box = page.locator(".query-picture").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.1 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.7 * box["height"], steps=4)
    page.mouse.up()
    expect(heading(page)).to_have_text("Like a part of large.jpg")
    expect(tiles(page).first).to_contain_text("blue.png")
    # A part is no copy of the file.
    expect(tiles(page, "Same file")).to_have_count(0)
    shares = [float(share) for share in params(page)["crop"].split(",")]
    assert shares == pytest.approx([0.6, 0.1, 0.3, 0.6], abs=0.02)
    sent = picture_of(searches()[-1])
    assert max(sent.size) == 1024
    assert sent.width / sent.height == pytest.approx(0.3 * LARGE / (0.6 * 2000), abs=0.06)
    page.reload()
    expect(heading(page)).to_have_text("Like a part of large.jpg")
    expect(tiles(page).first).to_contain_text("blue.png")
    page.get_by_role("button", name="Whole picture").click()
    expect(tiles(page, "Same file")).to_contain_text("large.jpg")
    assert "crop" not in params(page)
    page.go_back()
    expect(tiles(page).first).to_contain_text("blue.png")


def test_a_part_of_an_item_is_chosen_by_keyboard(
    page: Page, mixed_url: str, searches: Callable[[], list[bytes]]
) -> None:
    page.goto(f"{mixed_url}/#search?id=large.jpg")
    expect(tiles(page).first).to_be_visible()
    page.get_by_role("button", name="Select a part").press("Enter")
    frame = page.get_by_role("group", name="Part of the picture, 60 % by 60 % from 20 %, 20 %")
    expect(frame).to_be_focused()
    for _ in range(15):
        page.keyboard.press("Shift+ArrowLeft")
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(heading(page)).to_have_text("Like a part of large.jpg")
    expect(tiles(page).first).to_contain_text("blue.png")
    assert params(page)["crop"] == "0.7,0.2,0.3,0.6"
    red, _, blue = np.asarray(picture_of(searches()[-1])).mean(axis=(0, 1))
    assert blue > 200 and red < 50


def test_a_part_is_chosen_by_finger(browser: Browser, mixed_url: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(f"{mixed_url}/#search?id=large.jpg")
    expect(page.locator(".query-picture")).to_have_js_property("naturalWidth", 1024)
    expect(tiles(page).first).to_be_visible()
    box = page.locator(".query-picture").bounding_box()
    assert box is not None
    devtools = context.new_cdp_session(page)

    def drag(shares: list[tuple[float, float]]) -> None:
        points = [{"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]} for x, y in shares]
        devtools.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": points[:1]})
        # The finger rests at the end: else the page scrolls on, and takes the next tap as the wish to stop it.
        for point in [*points[1:], points[-1]]:
            devtools.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
            page.wait_for_timeout(100)
        devtools.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    # Without a wish to select, a finger scrolls.
    drag([(0.1, 0.9), (0.1, 0.5), (0.1, 0.1)])
    expect(page.locator("#crop-frame")).to_be_hidden()
    assert page.locator(".crop-sheet").evaluate("(sheet) => getComputedStyle(sheet).touchAction") == "auto"
    page.get_by_role("button", name="Select a part").tap()
    page.evaluate("scrollTo(0, 0)")
    drag([(0.85, 0.05), (0.9, 0.4), (0.95, 0.7)])
    expect(page.get_by_role("group", name=re.compile("Part of the picture, 1[01] % by 6[45] %"))).to_be_visible()
    page.get_by_role("button", name="Search by this part").tap()
    expect(heading(page)).to_have_text("Like a part of large.jpg")
    expect(tiles(page).first).to_contain_text("blue.png")
    context.close()


def test_a_large_picture_is_made_smaller_and_still_called_the_same_file(
    page: Page, mixed_url: str, large: bytes, searches: Callable[[], list[bytes]]
) -> None:
    page.goto(mixed_url)
    page.set_input_files("#ask-files", payload("mine.jpg", large, "image/jpeg"))
    expect(tiles(page, "Same file")).to_contain_text("large.jpg")
    expect(page.get_by_text("Your picture was made smaller before it was sent.")).to_be_visible()
    assert picture_of(searches()[0]).size == (1024, 683)


def test_a_picture_beyond_the_limits_is_turned_as_its_camera_says(
    page: Page, mixed_url: str, searches: Callable[[], list[bytes]]
) -> None:
    # 36 megapixels, of which the left half is red once it is turned.
    picture = Image.new("RGB", (HUGE, HUGE), (0, 0, 255))
    picture.paste((255, 0, 0), (0, HUGE // 2, HUGE, HUGE))
    exif = Image.Exif()
    # Turned by 90° to the right.
    exif[0x0112] = 6
    page.goto(mixed_url)
    page.set_input_files("#ask-files", payload("phone.jpg", encoded(picture, "JPEG", exif=exif), "image/jpeg"))
    expect(tiles(page).first).to_be_visible()
    sent = picture_of(searches()[0])
    assert sent.size == (1024, 1024)
    left = np.asarray(sent)[:, :400].mean(axis=(0, 1))
    assert left[0] > 200 and left[2] < 50


def test_an_avif_beyond_the_limits_is_a_query(page: Page, mixed_url: str, searches: Callable[[], list[bytes]]) -> None:
    picture = encoded(Image.new("RGB", (5200, 5000), (255, 0, 0)), "AVIF", speed=10)
    page.goto(mixed_url)
    page.set_input_files("#ask-files", payload("phone.avif", picture, "image/avif"))
    expect(tiles(page).first).to_contain_text("red.png")
    assert picture_of(searches()[0]).size == (1024, 985)


def test_a_request_that_is_too_large_for_a_proxy_is_tried_smaller(
    page: Page, digits_url: str, expected: list[str], searches: Callable[[], list[bytes]]
) -> None:
    expected.append("413")
    refused: list[Route] = []

    def refuse_once(route: Route) -> None:
        if refused:
            route.continue_()
            return
        refused.append(route)
        route.fulfill(status=413, body="<html>")

    page.goto(digits_url)
    page.route("**/search?*", refuse_once)
    file = encoded(scene(900, 600))
    page.set_input_files("#ask-files", payload("scene.png", file))
    expect(page.locator(".query-picture")).to_be_visible()
    page.get_by_role("button", name="Shrink and search").click()
    expect(page.get_by_text("Your picture was made smaller before it was sent.")).to_be_visible()
    expect(page.get_by_role("button", name="less alike")).to_be_visible()
    first, second = searches()
    assert first == file
    assert second.startswith(b"\xff\xd8")


def field(page: Page) -> Locator:
    return page.get_by_role("searchbox", name="Words to search by")


def test_words_find_pictures_and_back_returns(page: Page, colours_url: str) -> None:
    page.goto(colours_url)
    field(page).fill("  a GREEN thing & 50% #1 ")
    field(page).press("Enter")
    expect(heading(page)).to_have_text("“a GREEN thing & 50% #1”")
    expect(page).to_have_title("“a GREEN thing & 50% #1” · Lookalike")
    # The scores of words are of another kind, so there are no bands.
    expect(tiles(page, "Best matches")).to_have_count(5)
    expect(tiles(page).first).to_have_attribute("title", "green.png")
    expect(page.locator(".query-picture")).to_have_count(0)
    expect(page.get_by_role("slider")).to_have_count(0)
    field(page).fill("red")
    field(page).press("Enter")
    expect(tiles(page).first).to_have_attribute("title", "red.png")
    page.go_back()
    expect(heading(page)).to_have_text("“a GREEN thing & 50% #1”")
    expect(field(page)).to_have_value("a GREEN thing & 50% #1")
    page.reload()
    expect(tiles(page).first).to_have_attribute("title", "green.png")


def test_words_show_24_pictures_and_more(page: Page, mixed_url: str) -> None:
    page.goto(f"{mixed_url}/#search?text=red")
    expect(tiles(page, "Best matches")).to_have_count(24)
    expect(tiles(page).first).to_have_attribute("title", "red.png")
    page.get_by_role("button", name="More", exact=True).press("Enter")
    expect(tiles(page)).to_have_count(46)
    assert page.evaluate("document.activeElement.title") == names(tiles(page))[24]
    expect(page.get_by_role("button", name="More", exact=True)).to_have_count(0)


def test_blank_words_ask_nothing(page: Page, colours_url: str, searches: Callable[[], list[bytes]]) -> None:
    page.goto(colours_url)
    field(page).fill("   ")
    field(page).press("Enter")
    field(page).fill("blue")
    field(page).press("Enter")
    expect(tiles(page).first).to_have_attribute("title", "blue.png")
    assert len(searches()) == 1


def test_words_are_added_to_a_picture(page: Page, mixed_url: str) -> None:
    page.goto(f"{mixed_url}/#search?id=red.png")
    expect(tiles(page).first).to_be_visible()
    page.get_by_role("textbox", name="and …").fill("blue")
    page.get_by_role("button", name="Search", exact=True).click()
    expect(heading(page)).to_have_text("Looks like red.png and “blue”")
    expect(tiles(page, "Best matches").first).to_be_visible()
    assert params(page)["plus"] == "blue"
    by_item = names(tiles(page, "Best matches"))
    page.goto(mixed_url)
    page.set_input_files("#ask-files", payload("red.png", colour(255, 0, 0)))
    expect(tiles(page).first).to_contain_text("red.png")
    page.get_by_role("textbox", name="and …").fill("blue")
    page.keyboard.press("Enter")
    expect(heading(page)).to_have_text("Looks like red.png and “blue”")
    # Both are the same sum; an item is left out of its own hits.
    by_file = [name for name in names(tiles(page)) if name != "red.png"]
    assert len(by_item) == 24 and len(by_file) >= 23
    assert by_file[:23] == by_item[:23]


def test_words_and_errors_where_the_encoder_reads_none(page: Page, digits_url: str, expected: list[str]) -> None:
    expected.extend(["400", "404"])
    page.goto(f"{digits_url}/#search?id=digits%2F00007")
    expect(tiles(page).first).to_be_visible()
    expect(page.get_by_label("and …")).to_have_count(0)
    page.goto(f"{digits_url}/#search?text=seven")
    expect(page.get_by_role("alert")).to_contain_text("reads no texts")
    page.goto(f"{digits_url}/#search?id=nobody")
    expect(page.get_by_role("alert")).to_contain_text("no item has this id", ignore_case=True)


def test_folder_and_metadata_narrow_a_search(page: Page, mixed_url: str) -> None:
    page.goto(f"{mixed_url}/#search?id=green.png")
    expect(tiles(page, "Same file")).to_have_count(2)
    page.get_by_role("combobox", name="Folder").select_option("copies")
    expect(tiles(page)).to_have_count(2)
    assert params(page)["folder"] == "copies/"
    page.get_by_role("combobox", name="Folder").select_option("copies/again")
    expect(tiles(page)).to_have_count(1)
    assert names(tiles(page)) == ["copies/again/green.png"]
    page.get_by_role("combobox", name="Folder").select_option("All folders")
    expect(tiles(page, "Same file")).to_have_count(2)


def test_chips_of_metadata_narrow_a_search(page: Page, digits_url: str) -> None:
    page.goto(f"{digits_url}/#search?id=digits%2F00007&near=0.9&alike=0.1")
    page.get_by_text("Metadata", exact=True).click()
    page.get_by_role("link", name=re.compile("^3 ")).click()
    condition = page.get_by_role("link", name="label: 3. Take this condition away")
    expect(condition).to_be_visible()
    expect(tiles(page).first).to_contain_text("label 3")
    labels = set(tiles(page).locator(".metadata").all_inner_texts())
    assert labels == {"label 3"}
    condition.click()
    expect(condition).to_have_count(0)


def test_pictures_that_are_no_longer_kept_say_so(page: Page, digits_url: str) -> None:
    page.goto(f"{digits_url}/#search?kept=12345")
    expect(heading(page)).to_have_text("This picture is no longer kept")
    with page.expect_file_chooser() as chosen:
        page.get_by_role("button", name="Choose a picture").press("Enter")
    chosen.value.set_files(digit(digits_url, 7))
    expect(tiles(page, "Same file")).to_contain_text("00007")


def test_a_service_that_is_away_leaves_what_was_there(page: Page, digits_url: str, expected: list[str]) -> None:
    expected.append("ERR_INTERNET_DISCONNECTED")
    page.goto(f"{digits_url}/#picture?id=digits%2F00007")
    link = page.get_by_role("link", name="Search by this")
    expect(link).to_be_visible()
    page.context.set_offline(True)
    link.click()
    expect(page.get_by_role("alert").first).to_contain_text("cannot be reached")
    expect(link).to_be_visible()
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    expect(heading(page)).to_have_text("Looks like 00007")
    expect(tiles(page).first).to_be_visible()
