"""The page in a real browser, in front of the real service."""

import base64
import json
import re
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import FilePayload, Locator, Page, Request, Route, expect

from tests.conftest import encoded, scene
from tests.serving import serving

ODD_ID = "holiday 2024/50% #1?/./Größe ü+&.png"


def hits(page: Page) -> Locator:
    return page.locator("#hits").get_by_role("button")


def items(page: Page) -> Locator:
    return page.locator("#items").get_by_role("button")


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        body: bytes = answer.read()
        return body


def digit(url: str, number: int) -> FilePayload:
    """The file of one of the gallery's own digits."""
    return {"name": "digit.png", "mimeType": "image/png", "buffer": fetch(f"{url}/images/digits/{number:05d}/content")}


def stroke(page: Page, points: Iterable[tuple[float, float]]) -> None:
    """Draw a line through points given in sides of the canvas."""
    expect(page.locator("#canvas")).to_be_visible()
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=5)
    page.mouse.up()


def hand_over(page: Page, event: str, field: str, file: FilePayload | None) -> None:
    """Dispatch a drop or a paste of a file, or of a text where file is None."""
    page.evaluate(
        """([event, field, file]) => {
            const transfer = new DataTransfer();
            if (file) {
                const bytes = Uint8Array.from(atob(file.content), (character) => character.charCodeAt(0));
                transfer.items.add(new File([bytes], file.name, { type: file.type }));
            } else transfer.setData("text/plain", "words");
            const kind = event === "paste" ? ClipboardEvent : DragEvent;
            document.body.dispatchEvent(new kind(event, { [field]: transfer, bubbles: true, cancelable: true }));
        }""",
        [
            event,
            field,
            file
            and {
                "name": file["name"],
                "type": file["mimeType"],
                "content": base64.b64encode(file["buffer"]).decode(),
            },
        ],
    )


def test_loads_with_the_count_and_asks_nobody_else(page: Page, digits_url: str, asked: list[str]) -> None:
    page.goto(digits_url)
    expect(page.locator("#facts")).to_contain_text("1,797 pictures")
    expect(page.locator("#notice")).to_be_hidden()
    expect(items(page)).to_have_count(48)
    expect(items(page).first).to_contain_text("digits/00000")
    expect(page.locator("#gallery-words code")).to_have_text("make serve IMAGES=folder")
    page.get_by_role("button", name="More pictures").click()
    expect(items(page)).to_have_count(96)
    expect(items(page).last).to_contain_text("digits/00095")
    page.wait_for_load_state("networkidle")
    assert len(asked) > 10
    assert [url for url in asked if not url.startswith((f"{digits_url}/", "data:", "blob:"))] == []


def test_links_to_the_api(page: Page, digits_url: str) -> None:
    page.goto(digits_url)
    page.get_by_role("link", name="API").click()
    expect(page).to_have_title(re.compile("Lookalike.*Swagger"))


def test_a_chosen_file_shows_its_lookalikes(page: Page, digits_url: str) -> None:
    page.goto(digits_url)
    page.set_input_files("#file", digit(digits_url, 7))
    expect(hits(page)).to_have_count(24)
    expect(hits(page).first).to_contain_text("digits/00007")
    assert hits(page).locator(".score").first.text_content() == "1.000"
    scores = hits(page).locator(".score").all_text_contents()
    assert all(re.fullmatch(r"\d\.\d{3}", score) for score in scores)
    assert scores == sorted(scores, reverse=True)
    expect(page.locator("#query-picture")).to_have_js_property("naturalWidth", 8)
    expect(hits(page).first.locator("img")).to_have_css("image-rendering", "pixelated")
    expect(page.get_by_role("status")).to_contain_text("24 pictures")


def test_a_drawn_one_finds_ones(page: Page, digits_url: str) -> None:
    page.goto(digits_url)
    stroke(page, [(0.5, 0.2), (0.5, 0.8)])
    expect(hits(page)).to_have_count(24)
    labels = [text.partition("label ")[2] for text in hits(page).locator(".metadata").all_text_contents()][:10]
    assert labels.count("1") > 5, labels


def test_a_drawing_is_set_out_as_mnist_is(page: Page, digits_url: str) -> None:
    page.goto(digits_url)
    # The drawing is small, in a corner, and heavier on the left.
    stroke(page, [(0.1, 0.1), (0.1, 0.4), (0.2, 0.4)])
    expect(hits(page)).to_have_count(24)
    left, top, right, bottom, x, y, width = page.locator("#query-picture").evaluate(
        """(picture) => {
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
            const context = canvas.getContext("2d");
            context.drawImage(picture, 0, 0);
            const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
            let [left, top, right, bottom, mass, x, y] = [1e9, 1e9, 0, 0, 0, 0, 0];
            for (let i = 0; i < data.length / 4; i += 1) {
                const [column, row, ink] = [i % canvas.width, Math.floor(i / canvas.width), data[4 * i]];
                if (ink < 128) continue;
                [left, right] = [Math.min(left, column), Math.max(right, column + 1)];
                [top, bottom] = [Math.min(top, row), Math.max(bottom, row + 1)];
                [mass, x, y] = [mass + ink, x + ink * (column + 0.5), y + ink * (row + 0.5)];
            }
            const row = Math.round(top + (bottom - top) / 3) * canvas.width;
            const reds = data.slice(4 * row, 4 * (row + canvas.width)).filter((_, i) => i % 4 === 0);
            const width = reds.filter((red) => red >= 128).length;
            return [left, top, right, bottom, x / mass, y / mass, width];
        }"""
    )
    assert max(right - left, bottom - top) == pytest.approx(200, abs=2)
    assert (x, y) == pytest.approx((140, 140), abs=2)
    # A small drawing does not become a thick one.
    assert width == pytest.approx(20, abs=2)


def test_strokes_make_one_drawing_until_it_is_cleared(page: Page, digits_url: str) -> None:
    page.goto(digits_url)
    expect(page.get_by_role("button", name="Clear")).to_be_disabled()
    stroke(page, [(0.3, 0.2), (0.3, 0.5), (0.7, 0.5)])
    expect(hits(page)).to_have_count(24)
    before = page.locator("#query-picture").get_attribute("src")
    stroke(page, [(0.6, 0.2), (0.6, 0.8)])
    expect(page.locator("#query-picture")).not_to_have_attribute("src", before or "")
    page.get_by_role("button", name="Clear").click()
    expect(page.get_by_role("button", name="Clear")).to_be_disabled()
    assert not page.locator("#canvas").evaluate(
        "(canvas) => canvas.getContext('2d').getImageData(0, 0, 280, 280).data.some((value, at) => at % 4 < 3 && value)"
    )
    # Both strokes were one drawing, and the gallery came before it.
    page.go_back()
    expect(items(page).first).to_be_visible()
    expect(page.locator("#answer")).to_be_hidden()


def test_a_hit_is_searched_by_and_back_returns(page: Page, digits_url: str) -> None:
    page.goto(digits_url)
    items(page).nth(3).click()
    expect(page.get_by_role("heading", name="Most like digits/00003")).to_be_focused()
    expect(hits(page)).to_have_count(24)
    chosen = hits(page).nth(1).get_attribute("title")
    hits(page).nth(1).click()
    expect(page.locator("#answer-title")).to_have_text(f"Most like {chosen}")
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "false")
    shown = [button.get_attribute("title") for button in hits(page).all()]
    assert len(shown) == 24
    assert chosen not in shown
    page.reload()
    expect(page.locator("#answer-title")).to_have_text(f"Most like {chosen}")
    page.go_back()
    expect(page.locator("#answer-title")).to_have_text("Most like digits/00003")
    expect(page.locator(f'#hits [title="{chosen}"]')).to_be_visible()
    page.go_back()
    expect(items(page).first).to_be_visible()
    expect(page.locator("#answer")).to_be_hidden()


def test_back_returns_to_a_picture_of_the_visitors(page: Page, digits_url: str) -> None:
    page.goto(digits_url)
    page.set_input_files("#file", digit(digits_url, 7))
    hits(page).nth(2).click()
    expect(page.locator("#answer-title")).to_contain_text("Most like digits/")
    page.go_back()
    expect(page.locator("#answer-title")).to_have_text("Most like digit.png")
    expect(hits(page).first).to_contain_text("digits/00007")
    page.get_by_role("link", name="All pictures").click()
    expect(items(page).first).to_be_visible()


def test_the_keyboard_is_enough(page: Page, digits_url: str) -> None:
    page.goto(digits_url)
    items(page).nth(1).focus()
    page.keyboard.press("Tab")
    expect(items(page).nth(2)).to_be_focused()
    expect(items(page).nth(2)).to_have_css("outline-style", "solid")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Most like digits/00002")).to_be_focused()


@pytest.mark.parametrize(("event", "field"), [("drop", "dataTransfer"), ("paste", "clipboardData")])
def test_a_picture_can_be_dropped_and_pasted(page: Page, digits_url: str, event: str, field: str) -> None:
    page.goto(digits_url)
    expect(items(page).first).to_be_visible()
    hand_over(page, event, field, None)
    expect(page.locator("#file-error")).not_to_be_empty()
    hand_over(page, event, field, digit(digits_url, 11))
    expect(hits(page).first).to_contain_text("digits/00011")
    expect(page.locator("#file-error")).to_be_empty()


@pytest.mark.parametrize(("name", "type"), [("notes.txt", "text/plain"), ("notes.json", "application/json")])
def test_a_file_that_is_no_picture_shows_the_services_message(
    page: Page, digits_url: str, complaints: list[str], name: str, type: str
) -> None:
    page.goto(digits_url)
    page.set_input_files("#file", {"name": name, "mimeType": type, "buffer": b'{"id": "digits/00001"}'})
    expect(page.locator("#error")).to_contain_text("expected the bytes of one of JPEG, PNG")
    expect(page.locator("#answer-title")).to_have_text(f"Cannot search by {name}")
    expect(page.locator("#query-picture")).to_be_hidden()
    expect(hits(page)).to_have_count(0)
    assert [complaint for complaint in complaints if "415" not in complaint] == []
    complaints.clear()
    # The page still works.
    page.set_input_files("#file", digit(digits_url, 7))
    expect(hits(page).first).to_contain_text("digits/00007")
    expect(page.locator("#error")).to_be_empty()


def field(page: Page) -> Locator:
    return page.get_by_role("searchbox", name="Words to search by")


def test_words_find_pictures_and_back_returns(page: Page, colours_url: str) -> None:
    page.goto(colours_url)
    expect(page).to_have_title("Lookalike")
    expect(field(page)).to_be_visible()
    box = page.locator("#words").bounding_box()
    # The column is 19 rem wide.
    assert box is not None and box["width"] <= 304
    field(page).fill("  a GREEN thing & 50% #1 ")
    page.get_by_role("button", name="Search").click()
    expect(page.locator("#answer-title")).to_have_text("Most like “a GREEN thing & 50% #1”")
    expect(hits(page).first).to_have_attribute("title", "green.png")
    expect(page.locator("#query-picture")).to_be_hidden()
    expect(page.get_by_role("status")).to_contain_text("5 pictures")
    expect(page).to_have_title("“a GREEN thing & 50% #1” · Lookalike")
    assert page.url == f"{colours_url}/#text=a%20GREEN%20thing%20%26%2050%25%20%231"
    field(page).fill("red")
    field(page).press("Enter")
    expect(hits(page).first).to_have_attribute("title", "red.png")
    hits(page).nth(1).click()
    expect(page.locator("#answer-title")).to_have_text("Most like purple.png")
    expect(page.locator("#query-picture")).to_be_visible()
    expect(field(page)).to_have_value("")
    page.go_back()
    expect(page.locator("#answer-title")).to_have_text("Most like “red”")
    expect(hits(page).first).to_have_attribute("title", "red.png")
    expect(field(page)).to_have_value("red")
    page.reload()
    expect(page.locator("#answer-title")).to_have_text("Most like “red”")
    expect(hits(page).first).to_have_attribute("title", "red.png")
    page.go_back()
    page.go_back()
    expect(items(page).first).to_be_visible()
    expect(page).to_have_title("Lookalike")


def test_words_may_be_pasted_and_blank_ones_ask_nothing(page: Page, colours_url: str, asked: list[str]) -> None:
    page.goto(colours_url)
    expect(field(page)).to_be_visible()
    field(page).fill("   ")
    field(page).press("Enter")
    field(page).fill("")
    field(page).focus()
    page.evaluate(
        """() => {
            const transfer = new DataTransfer();
            transfer.setData("text/plain", "words");
            const field = document.activeElement;
            for (const [kind, name] of [[ClipboardEvent, "paste"], [DragEvent, "dragover"], [DragEvent, "drop"]]) {
                const data = { clipboardData: transfer, dataTransfer: transfer, bubbles: true, cancelable: true };
                // The browser inserts the words only if nobody prevents it.
                if (!field.dispatchEvent(new kind(name, data))) throw new Error(name);
            }
        }"""
    )
    expect(page.locator("#file-error")).to_be_empty()
    assert not [url for url in asked if url.endswith("/search")]


def test_a_text_in_which_nothing_is_seen_shows_the_services_message(
    page: Page, colours_url: str, complaints: list[str]
) -> None:
    page.goto(f"{colours_url}/#text=nothing")
    expect(page.locator("#error")).to_contain_text("gives this text no embedding")
    expect(page.locator("#answer-title")).to_have_text("Cannot search by “nothing”")
    assert [complaint for complaint in complaints if "422" not in complaint] == []
    complaints.clear()


def test_there_is_no_field_for_words_where_nobody_reads_them(
    page: Page, digits_url: str, complaints: list[str]
) -> None:
    page.goto(digits_url)
    expect(page.locator("#facts")).to_contain_text("1,797 pictures")
    expect(field(page)).to_be_hidden()
    page.goto(f"{digits_url}/#text=seven")
    expect(page.locator("#error")).to_contain_text("The encoder mnist reads no texts", ignore_case=True)
    assert [complaint for complaint in complaints if "400" not in complaint] == []
    complaints.clear()


def test_a_newer_query_overrides_an_older_ones_answer(page: Page, digits_url: str) -> None:
    held: list[Request] = []

    def hold_the_first(route: Route) -> None:
        if held:
            route.continue_()
        else:
            held.append(route.request)

    page.route("**/search?*", hold_the_first)
    page.goto(digits_url)
    with page.expect_request("**/search?*") as first:
        page.set_input_files("#file", digit(digits_url, 7))
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "true")
    with page.expect_event("requestfailed") as dropped:
        page.set_input_files("#file", digit(digits_url, 11))
    expect(hits(page).first).to_contain_text("digits/00011")
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "false")
    assert dropped.value == first.value == held[0]


def test_a_picture_that_comes_before_the_info_is_asked_for_once(page: Page, digits_url: str) -> None:
    held: list[Route] = []
    asked: list[str] = []
    page.route("**/info", lambda route: held.append(route))
    page.on("request", lambda request: asked.append(request.url) if "/search" in request.url else None)
    with page.expect_request("**/info"):
        page.goto(digits_url, wait_until="commit")
    page.set_input_files("#file", digit(digits_url, 7))
    expect(hits(page).first).to_contain_text("digits/00007")
    held[0].continue_()
    expect(page.locator("#facts")).to_contain_text("1,797 pictures")
    # Earlier requests are answered before this one.
    page.evaluate("fetch('livez')")
    expect(hits(page).first).to_contain_text("digits/00007")
    assert len(asked) == 1


@pytest.mark.slow("starts a service of its own")
def test_an_empty_gallery_says_how_to_fill_it_and_shows_what_comes(page: Page, empty_url: str) -> None:
    page.goto(empty_url)
    expect(page.locator("#facts")).to_contain_text("0 pictures")
    expect(page.locator("#gallery-words")).to_contain_text("lookalike index FOLDER --store DIR")
    expect(page.locator("#drawing")).to_be_hidden()

    markup = "<img src=x onerror=alert(1)>"
    for seed, id in enumerate([ODD_ID, "plain.png"]):
        where = f"{empty_url}/images/{quote(id, safe='')}?metadata={quote(json.dumps({'artist': markup}))}"
        urllib.request.urlopen(urllib.request.Request(where, encoded(scene(seed=seed)), method="PUT")).close()
    page.reload()
    expect(page.locator("#facts")).to_contain_text("2 pictures")
    expect(page.locator("#notice")).to_be_visible()
    # The pictures are coloured scenes, but the encoder is for digits.
    expect(page.locator("#notice")).to_contain_text("expect poor matches")
    expect(page.locator("#notice code").first).to_contain_text("lookalike reindex --store")
    expect(page.locator("#drawing")).to_be_hidden()
    expect(items(page).first).to_contain_text(f"{ODD_ID}artist {markup}")
    expect(items(page).first.locator("img")).to_have_js_property("naturalWidth", 64)
    items(page).first.click()
    expect(page.locator("#answer-title")).to_have_text(f"Most like {ODD_ID}")
    expect(hits(page)).to_have_count(1)
    expect(hits(page).first).to_contain_text("plain.png")
    page.reload()
    expect(page.locator("#answer-title")).to_have_text(f"Most like {ODD_ID}")
    expect(page.locator("#query-picture")).to_have_js_property("naturalWidth", 64)


@pytest.mark.slow("starts a service of its own")
def test_the_page_asks_for_a_key_and_shows_pictures_with_it(page: Page, tmp_path: Path, complaints: list[str]) -> None:
    key = "a-key-that-may-write"
    with serving(tmp_path, "digits[:5]", api_keys=f"write:{key}") as url:
        page.once("dialog", lambda dialog: dialog.accept(key))
        page.goto(url)
        expect(items(page)).to_have_count(5)
        expect(items(page).first.locator("img")).to_have_js_property("naturalWidth", 8)
        # A reload does not prompt for the key again.
        page.reload()
        items(page).first.click()
        expect(hits(page)).to_have_count(4)
    assert [text for text in complaints if "401" not in text] == []
    complaints.clear()
