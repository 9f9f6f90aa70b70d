"""The report in a real browser: its map answers to mouse and keyboard, and names are shown as text only."""

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from tests.conftest import MODEL
from training.evaluate import Evaluation, evaluate
from training.report import write_report

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "\"'><svg onload=alert(2)>",
    "`${alert(3)}` {{ 7 * 7 }}",
    "&lt;b&gt; \u2028 ü",
    "caf\udce9",
]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """The shipped encoder on digits."""
    return evaluate(MODEL, "digits[:300]", "digits[300:350]", tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def address(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report") / "digits"
    write_report(folder, evaluation)
    return (folder / "report.html").as_uri()


def points(page: Page) -> Locator:
    return page.locator(".plot circle:not(#ring)")


def test_pointing_at_a_query_shows_its_picture_and_names(
    page: Page, address: str, evaluation: Evaluation, asked: list[str]
) -> None:
    page.goto(address)
    expect(page.locator("#tip")).to_be_hidden()
    expect(points(page)).to_have_count(50)
    queries = evaluation.queries
    assert queries.pixels is not None
    for number in (0, 23, 49):
        points(page).nth(number).hover(force=True)
        expect(page.locator("#tip-id")).to_have_text(queries.ids[number])
        expect(page.locator("#tip-label")).to_have_text(evaluation.classes[queries.labels[number]])
        named = evaluation.classes[evaluation.predicted[number]]
        right = queries.labels[number] == evaluation.predicted[number]
        expect(page.locator("#tip-named")).to_have_text("named so" if right else f"named {named}")
        with Image.open(io.BytesIO(page.locator("#thumbnail").screenshot())) as shot:
            seen = np.asarray(shot.convert("L").resize((28, 28)), np.float32)
        distances = np.square(queries.pixels[..., 0] - seen).mean((1, 2))
        assert int(distances.argmin()) == number
    page.mouse.move(0, 0)
    expect(page.locator("#tip")).to_be_hidden()
    assert {request for request in asked if not request.startswith("data:")} == {address}


@pytest.mark.slow("walks a map by keys")
def test_the_keyboard_walks_the_map(page: Page, address: str) -> None:
    page.goto(address)
    page.locator(".plot svg").focus()
    met = set()
    for key in ["ArrowRight"] * 10 + ["ArrowLeft"] * 50:
        page.keyboard.press(key)
        expect(page.locator("#tip")).to_be_visible()
        met.add(page.locator("#tip-id").text_content())
    assert len(met) > 8
    leftmost = min(float(cx) for cx in points(page).evaluate_all("all => all.map(c => c.getAttribute('cx'))"))
    expect(page.locator("#ring")).to_have_attribute("cx", f"{leftmost:g}")
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_hidden()


def test_choosing_a_class_dims_the_others(page: Page, address: str, evaluation: Evaluation) -> None:
    page.goto(address)
    button = page.locator(".legend").get_by_role("button").nth(3)
    button.focus()
    page.keyboard.press("Enter")
    expect(button).to_have_attribute("aria-pressed", "true")
    others = np.flatnonzero(evaluation.queries.labels != 3).tolist()
    dimmed = points(page).evaluate_all("all => all.flatMap((c, at) => c.classList.contains('dim') ? [at] : [])")
    assert dimmed == others
    expect(points(page).nth(others[0])).to_have_css("opacity", "0.07")
    # The dimmed point shows no tip, or that of a bright neighbour.
    points(page).nth(others[0]).hover(force=True)
    expect(page.locator("#tip-id")).not_to_have_text(evaluation.queries.ids[others[0]])
    button.click()
    expect(button).to_have_attribute("aria-pressed", "false")
    expect(page.locator(".dim")).to_have_count(0)


def test_names_stay_text(page: Page, evaluation: Evaluation, tmp_path: Path) -> None:
    classes = HOSTILE + evaluation.classes[len(HOSTILE) :]
    ids = [f"{HOSTILE[number % len(HOSTILE)]}/{number}" for number in range(50)]
    queries = replace(evaluation.queries, ids=ids)
    bank = replace(evaluation.bank, ids=[f"{HOSTILE[0]}/{id}" for id in evaluation.bank.ids])
    source = {"source": HOSTILE[1], "pictures": 50, "left_out": {}, "in_bank": 0}
    report = evaluation.report | {"model": HOSTILE[0], "queries": source}
    write_report(tmp_path / "r", replace(evaluation, classes=classes, bank=bank, queries=queries, report=report))
    page.on("dialog", lambda dialog: pytest.fail(f"a name was run: {dialog.message}"))
    page.goto((tmp_path / "r" / "report.html").as_uri())
    expect(page).to_have_title(f"{HOSTILE[0]} on {HOSTILE[1]}")
    expect(page.locator("dl")).to_contain_text(HOSTILE[1])
    for number in range(len(HOSTILE)):
        points(page).nth(number).hover(force=True)
        for place, name in (("id", ids[number]), ("label", classes[evaluation.queries.labels[number]])):
            shown = page.locator(f"#tip-{place}").text_content() or ""
            assert re.fullmatch(re.escape(name).replace("\udce9", "[\ud800-\udfff\ufffd]"), shown)
    assert page.locator("img:not([src^='data:image/webp']), svg[onload]").count() == 0
    alts = page.locator(".query img").evaluate_all("all => all.map(picture => picture.alt)")
    assert all(any(alt.startswith(name.replace("\udce9", "\\udce9")) for name in HOSTILE) for alt in alts)


def test_the_browser_keeps_it_from_asking(page: Page, address: str, expected: list[str]) -> None:
    expected.append("Content Security Policy")
    page.goto(address)
    with page.expect_console_message(lambda message: "Content Security Policy" in message.text):
        page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/spy.png'}))")
    with page.expect_console_message(lambda message: "Content Security Policy" in message.text):
        assert page.evaluate("fetch('http://127.0.0.1:9/spy').catch(() => 'refused')") == "refused"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.slow("opens the report at the width of a phone")
def test_it_fits_a_phone(browser: Browser, address: str, evaluation: Evaluation, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 400, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(address)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    for number in range(0, 50, 5):
        points(page).nth(number).hover(force=True)
        box, plot = page.locator("#tip").bounding_box(), page.locator(".plot").bounding_box()
        assert box is not None
        assert plot is not None
        assert plot["x"] <= box["x"]
        assert box["x"] + box["width"] <= plot["x"] + plot["width"]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(250, 249, 246)" if scheme == "light" else "rgb(21, 24, 27)")
    context.close()
