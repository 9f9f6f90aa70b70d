"""The page's Duplicates in a real browser, in front of the real service and the real process that finds groups."""

import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from tests.conftest import encoded, scene
from tests.serving import serving

pytestmark = pytest.mark.slow("waits for groups")

HOSTILE = ["$(touch hacked).png", "-rf.png", 'it\'s `id` "quoted" \\.png', "<img src=x onerror=alert(1)>.png"]


def rows(page: Page) -> Locator:
    return page.locator(".groups").get_by_role("group")


def row(page: Page, name: str) -> Locator:
    """The group whose best copy has this name."""
    return page.locator(".groups").get_by_role("group", name=re.compile(rf": {re.escape(name)}, "))


def state(page: Page, name: str) -> Locator:
    return row(page, name).locator(".state")


def asked_json(url: str, path: str) -> Any:
    with urllib.request.urlopen(f"{url}/{path}") as answer:
        return json.load(answer)


def ids(url: str) -> list[str]:
    return [item["id"] for item in asked_json(url, "images?limit=1000&order=id")["items"]]


def saved(page: Page, button: str) -> str:
    """Press a button that saves a file; return the file's text."""
    with page.expect_download() as download:
        page.get_by_role("button", name=button).click()
    return Path(download.value.path()).read_text()


@pytest.fixture(scope="module", autouse=True)
def patience() -> Iterator[None]:
    """Wait up to a minute: the process that finds groups has the lowest priority, so other work may hold it up."""
    expect.set_options(timeout=60_000)
    yield
    expect.set_options(timeout=5_000)


def write_pictures(folder: Path) -> Path:
    """Write three groups of exact copies, a smaller copy of the first, and two strangers; return the folder."""
    (folder / "old").mkdir(parents=True)
    for number in range(3):
        content = encoded(scene(seed=number))
        (folder / f"{number}.png").write_bytes(content)
        (folder / "old" / f"{number} again.png").write_bytes(content)
    (folder / "0 small.png").write_bytes(encoded(scene(seed=0).resize((48, 36))))
    for number in (5, 6):
        (folder / f"{number}.png").write_bytes(encoded(scene(seed=number)))
    return folder


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service with copies, for tests that change nothing in it."""
    folder = tmp_path_factory.mktemp("copies")
    with serving(folder, str(write_pictures(folder / "pictures"))) as address:
        yield address


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """The folder of the pictures that `own_url` serves."""
    return write_pictures(tmp_path / "pictures")


@pytest.fixture
def own_url(tmp_path: Path, pictures: Path) -> Iterator[str]:
    """The address of a service with copies for one test."""
    with serving(tmp_path, str(pictures)) as address:
        yield address


def test_presets_and_the_slider_are_in_the_address(page: Page, url: str) -> None:
    page.goto(f"{url}/#duplicates?preset=exact")
    expect(page.get_by_role("heading", name="Duplicates")).to_be_visible()
    expect(rows(page)).to_have_count(3)
    expect(page).to_have_title("Duplicates · Lookalike")
    expect(page.get_by_role("status").filter(has_text="3 groups")).to_contain_text("3 copies beside the best")
    expect(page.locator("output")).to_have_text("same bytes")
    expect(page.locator("#duplicates-count")).to_have_text("3")
    expect(page.get_by_role("link", name="Exact")).to_have_attribute("aria-current", "true")
    slider = page.get_by_role("slider", name="Least score")
    slider.focus()
    slider.press("ArrowLeft")
    expect(page).to_have_url(re.compile(r"#duplicates\?threshold=0\.995$"))
    expect(page.locator("output")).to_have_text("scores from 0.995")
    expect(slider).to_be_focused()
    expect(page.get_by_role("link", name="Exact")).not_to_have_attribute("aria-current", "true")
    page.get_by_role("link", name="Near").click()
    expect(page).to_have_url(re.compile(r"#duplicates\?preset=near$"))
    expect(row(page, "0.png")).to_be_visible()
    page.reload()
    expect(page.get_by_role("link", name="Near")).to_have_attribute("aria-current", "true")
    expect(row(page, "0.png")).to_be_visible()


def test_a_moved_slider_gives_up_the_earlier_question(page: Page, url: str) -> None:
    waiting: list[Route] = []

    def hold(route: Route) -> None:
        waiting.append(route)

    page.route("**/duplicates?threshold=0.99&*", hold)
    page.goto(f"{url}/#duplicates?threshold=0.99")
    expect(page.get_by_text("Comparing …")).to_be_visible()
    expect(page.get_by_role("slider")).to_have_value("0.99")
    with page.expect_event("requestfailed", lambda request: "threshold=0.99&" in request.url):
        page.get_by_role("slider").press("End")
    expect(rows(page)).to_have_count(3)
    expect(page.locator("output")).to_have_text("same bytes")
    assert len(waiting) == 1


def test_progress_is_shown_and_can_be_cancelled(page: Page, url: str, asked: list[str]) -> None:
    answers = iter(
        [
            {"status": 202, "headers": {"Retry-After": "0"}, "json": {"progress": 0.1}},
            {"status": 202, "headers": {"Retry-After": "3600"}, "json": {"progress": 0.42}},
        ]
    )
    page.route("**/duplicates?preset=near*", lambda route: route.fulfill(**next(answers)))
    page.goto(f"{url}/#duplicates")
    expect(page.get_by_role("progressbar")).to_have_attribute("value", "0.42")
    expect(page.get_by_text("42 %")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("Cancelled.")).to_be_visible()
    again = page.get_by_role("button", name="Find duplicates")
    expect(again).to_be_focused()
    assert len([one for one in asked if "preset=near" in one]) == 2
    page.unroute("**/duplicates?preset=near*")
    again.press("Enter")
    expect(row(page, "0.png")).to_be_visible()


def test_the_best_is_chosen_and_says_why(page: Page, url: str) -> None:
    page.goto(f"{url}/#duplicates?threshold=0.999")
    group = row(page, "0.png")
    expect(group).to_contain_text("Best: most pixels, 64 × 48; first added of 2 that are equal")
    expect(group.get_by_role("checkbox", name="Keep 0.png")).to_be_checked()
    expect(group.get_by_role("checkbox", name="Keep 0 small.png")).not_to_be_checked()
    expect(group.get_by_role("button", name="Keep 1, remove 2")).to_be_attached()
    marks = group.locator("mark")
    expect(marks.filter(has_text="48 × 36")).to_have_count(1)
    expect(marks.filter(has_text="old")).to_have_count(1)
    expect(group.get_by_text(re.compile(r"^score [01]\.\d{3}$"))).to_be_visible()
    expect(group.get_by_text("same bytes", exact=True)).to_be_visible()


def test_decisions_outlive_back_and_a_reload(page: Page, url: str) -> None:
    page.goto(f"{url}/#duplicates?preset=exact")
    row(page, "0.png").get_by_role("button", name="Keep 1, remove 1").click()
    expect(state(page, "0.png")).to_have_text("1 to remove")
    expect(row(page, "0.png").get_by_role("button", name="Take back")).to_be_attached()
    row(page, "1.png").get_by_role("button", name="Skip").click()
    other = row(page, "2.png").get_by_role("checkbox", name="Keep old/2 again.png")
    other.check()
    expect(row(page, "2.png").get_by_role("button", name="Keep all")).to_be_visible()
    row(page, "2.png").get_by_role("checkbox", name="Keep 2.png").uncheck()
    other.uncheck()
    expect(row(page, "2.png").get_by_role("button", name="Choose one to keep")).to_be_disabled()
    other.check()
    for way in ("back", "reload"):
        if way == "reload":
            page.reload()
        else:
            page.goto(f"{url}/#about")
            expect(rows(page)).to_have_count(0)
            page.go_back()
        expect(state(page, "0.png")).to_have_text("1 to remove")
        expect(state(page, "1.png")).to_have_text("Skipped")
        expect(state(page, "2.png")).to_have_count(0)
        expect(row(page, "2.png").get_by_role("checkbox", name="Keep 2.png")).not_to_be_checked()
        expect(page.get_by_label("What is to be removed")).to_contain_text("1 to remove")
        expect(page.get_by_label("What is to be removed")).to_contain_text("2 of 3 groups decided")
    row(page, "1.png").get_by_role("button", name="Take back").click()
    expect(state(page, "1.png")).to_have_count(0)
    page.get_by_role("button", name="Take all back").click()
    expect(page.locator(".state")).to_have_count(0)
    expect(row(page, "2.png").get_by_role("checkbox", name="Keep 2.png")).to_be_checked()


def test_not_duplicates_stays_for_good_and_can_be_undone(page: Page, own_url: str) -> None:
    page.goto(f"{own_url}/#duplicates?preset=exact")
    row(page, "1.png").get_by_role("button", name="Not duplicates").click()
    expect(state(page, "1.png")).to_have_text("Not duplicates")
    page.reload()
    expect(rows(page)).to_have_count(2)
    expect(row(page, "1.png")).to_have_count(0)
    row(page, "2.png").get_by_role("button", name="Not duplicates").click()
    page.get_by_role("button", name="Undo").click()
    expect(state(page, "2.png")).to_have_count(0)
    page.reload()
    expect(rows(page)).to_have_count(2)
    expect(row(page, "2.png")).to_be_visible()


def test_the_keyboard_does_everything(page: Page, url: str) -> None:
    page.goto(f"{url}/#duplicates?preset=exact")
    first, second, third = (row(page, f"{number}.png") for number in range(3))
    first.focus()
    first.press("j")
    expect(second).to_be_focused()
    second.press("ArrowDown")
    expect(third).to_be_focused()
    third.press("k")
    second.press("ArrowUp")
    expect(first).to_be_focused()
    # A number keeps one copy alone, with Shift another one, too.
    first.press("2")
    expect(first.get_by_role("checkbox", name="Keep old/0 again.png")).to_be_checked()
    expect(first.get_by_role("checkbox", name="Keep 0.png")).not_to_be_checked()
    first.press("Shift+Digit1")
    expect(first.get_by_role("checkbox", name="Keep 0.png")).to_be_checked()
    first.press("1")
    first.press("Enter")
    expect(state(page, "0.png")).to_have_text("1 to remove")
    expect(second).to_be_focused()
    second.press("s")
    expect(state(page, "1.png")).to_have_text("Skipped")
    expect(third).to_be_focused()
    third.press("n")
    expect(state(page, "2.png")).to_have_text("Not duplicates")
    third.press("u")
    expect(state(page, "2.png")).to_have_count(0)
    # Only the current group's controls are in the tab order.
    for control in first.locator("a, button, input").all():
        expect(control).to_have_attribute("tabindex", "-1")
    third.press("Tab")
    expect(third.get_by_role("button", name="Keep 1, remove 1")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    expect(third).to_be_focused()
    third.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_contain_text("the next group")
    page.keyboard.press("Escape")
    third.press("c")
    expect(page.get_by_role("heading", name="Group 3 of 3")).to_be_visible()


def test_a_comparison_by_keyboard(page: Page, url: str) -> None:
    page.goto(f"{url}/#duplicates?threshold=0.999")
    group = row(page, "0.png")
    group.focus()
    group.press("c")
    expect(page).to_have_url(re.compile("compare=0$"))
    expect(page).to_have_title("Group 1 · Duplicates · Lookalike")
    stages = page.locator(".stage")
    transform = "(one) => one.querySelector('img').style.transform"
    names = stages.locator("img").evaluate_all("(all) => all.map((one) => one.alt)")
    assert sorted(names) == ["0 again.png", "0 small.png", "0.png"]
    stages.first.focus()
    page.keyboard.press("+")
    page.keyboard.press("ArrowRight")
    moved = {one.evaluate(transform) for one in stages.all()}
    assert len(moved) == 1
    assert "scale(1.4)" in moved.pop()
    page.keyboard.press("x")
    swapped = stages.locator("img").evaluate_all("(all) => all.map((one) => one.alt)")
    assert swapped == [names[1], names[0], names[2]]
    assert all("scale(1.4)" in one.evaluate(transform) for one in stages.all())
    page.get_by_role("button", name="Slider").press("Enter")
    divider = page.get_by_role("slider", name="Divider")
    clip = "(one) => getComputedStyle(one).clipPath"
    assert stages.nth(1).evaluate(clip) == "inset(0px 0px 0px 50%)"
    divider.press("Home")
    assert stages.nth(1).evaluate(clip) in ("inset(0px)", "inset(0px 0px 0px 0%)")
    page.get_by_role("button", name="Difference").press("Enter")
    expect(divider).to_be_hidden()
    page.get_by_role("button", name="Swap").focus()
    page.keyboard.press("2")
    page.keyboard.press("s")
    page.go_back()
    expect(state(page, "0.png")).to_have_text("Skipped")


def test_the_divider_follows_the_pointer(page: Page, url: str) -> None:
    page.goto(f"{url}/#duplicates?preset=exact&compare=1")
    expect(page.get_by_role("heading", name="Group 2 of 3")).to_be_visible()
    page.get_by_role("button", name="Slider").click()
    box = page.locator(".panes").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 120, steps=4)
    page.mouse.up()
    expect(page.get_by_role("slider", name="Divider")).to_have_value("25")
    page.get_by_role("button", name="Next →").click()
    expect(page.get_by_role("heading", name="Group 3 of 3")).to_be_visible()
    expect(page.get_by_role("button", name="Next →")).to_be_disabled()
    page.get_by_role("button", name="All groups").click()
    expect(rows(page)).to_have_count(3)


def test_list_and_script_name_hostile_files(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, name in enumerate(HOSTILE):
        content = encoded(scene(seed=number))
        (folder / f"{number}.png").write_bytes(content)
        (folder / name).write_bytes(content)
    with serving(tmp_path, str(folder)) as url:
        page.goto(f"{url}/#duplicates?preset=exact")
        expect(rows(page)).to_have_count(len(HOSTILE))
        for number in range(len(HOSTILE)):
            # The names that do harm are those to remove.
            rows(page).nth(number).get_by_role("checkbox", name=re.compile(r"^Keep \d\.png$")).check()
            for name in HOSTILE:
                box = rows(page).nth(number).get_by_role("checkbox", name=f"Keep {name}", exact=True)
                if box.count():
                    box.uncheck()
        page.get_by_role("button", name="Keep the best of each group").click()
        paths = [str(folder / name) for name in HOSTILE]
        assert sorted(saved(page, "Save list").splitlines()) == sorted(paths)
        script = saved(page, "Save script")
    # A file that has changed since stays, and so does one of which no copy would stay.
    (folder / HOSTILE[1]).write_bytes(b"changed")
    (folder / "0.png").unlink()
    ran = subprocess.run(["sh"], input=script, text=True, capture_output=True, cwd=tmp_path, check=True)
    assert {one.name for one in folder.iterdir()} == {"1.png", "2.png", "3.png", HOSTILE[0], HOSTILE[1]}
    assert sorted(one.name for one in tmp_path.iterdir()) == ["pictures", "serve.log", "store"]
    assert "left, as it has changed since it was indexed" in ran.stderr
    assert "left, as no copy of it would stay" in ran.stderr


def test_a_script_takes_any_name(page: Page, url: str, tmp_path: Path) -> None:
    names = ["a\nrm -r *\n", "b'; rm -r *; '", "\r\t", "ü\u202egnp.exe", "*"]
    kept = tmp_path / "kept"
    kept.write_bytes(b"content")
    digest = "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    work = tmp_path / "work"
    work.mkdir()

    def copy(source: str | None) -> dict[str, Any]:
        own = {"id": "id", "source": source, "digest": digest, "size_bytes": 7}
        return {"copy": own, "kept": [{"source": str(kept)}]}

    for name in names:
        (work / name).write_bytes(b"content")
    marked = [copy(str(work / name)) for name in names]
    # Neither no path, nor half a character, nor a file that another item has, nor the copy that stays can be removed.
    marked += [copy(None), copy("digits/7\nrm -r *"), copy("/\udcff"), copy("/shared"), copy(str(kept))]
    (work / "link").symlink_to(kept)
    marked += [copy(str(work / "link"))]
    page.goto(f"{url}/#about")
    made = """async ([text, staying]) => {
        const { makeList, makeScript } = await import("./page/duplicates/script.js");
        const marked = JSON.parse(text);
        return [makeScript(marked, new Set(staying)), makeList(marked)];
    }"""
    script, listed = page.evaluate(made, [json.dumps(marked), ["/shared"]])
    comments = [line for line in script.splitlines() if line.startswith("# not removed")]
    assert len(comments) == 4
    assert "digits/7\\u{a}rm -r *" in script
    assert "Removes 7 files, 49 bytes" in script
    assert len(listed.splitlines()) == len(marked)
    subprocess.run(["sh"], input=script, text=True, capture_output=True, cwd=work, check=True)
    assert [one.name for one in work.iterdir()] == ["link"]
    assert kept.exists()


def test_removal_from_the_index_and_undo(page: Page, own_url: str, pictures: Path) -> None:
    change = urllib.request.Request(f"{own_url}/images/old/1%20again.png", b'{"metadata": {"n": 1}}', method="PATCH")
    change.add_header("Content-Type", "application/merge-patch+json")
    urllib.request.urlopen(change).close()
    # The service has the only bytes of a picture that came over HTTP.
    content = (pictures / "2.png").read_bytes()
    upload = urllib.request.Request(f"{own_url}/images/uploaded.png", content, method="PUT")
    urllib.request.urlopen(upload).close()
    include = "include=digest&include=source&include=embedding"
    before = {id: asked_json(own_url, f"images/{id.replace(' ', '%20')}?{include}") for id in ids(own_url)}
    page.goto(f"{own_url}/#duplicates?preset=exact")
    page.get_by_role("button", name="Keep the best of each group").click()
    expect(page.get_by_label("What is to be removed")).to_contain_text("4 to remove")
    page.get_by_role("button", name="Remove from the index").click()
    expect(page.get_by_text("4 pictures are no longer in the index")).to_be_visible()
    expect(page.get_by_text("No duplicates at this threshold.")).to_be_visible()
    assert len(ids(own_url)) == len(before) - 4
    assert len([*pictures.rglob("*.png")]) == len(before) - 1
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_text("4 pictures are in the index again.")).to_be_visible()
    expect(rows(page)).to_have_count(3)
    after = {id: asked_json(own_url, f"images/{id.replace(' ', '%20')}?{include}") for id in ids(own_url)}
    for id, item in after.items():
        # It is made unit length again, in float32.
        assert item.pop("embedding") == pytest.approx(before[id].pop("embedding"), abs=1e-6)
        assert item == before[id]
    assert after.keys() == before.keys()
    with urllib.request.urlopen(f"{own_url}/images/uploaded.png/content") as answer:
        assert answer.read() == content


def test_what_cannot_be_removed_is_named(page: Page, own_url: str, expected: list[str]) -> None:
    expected.append("503")
    page.goto(f"{own_url}/#duplicates?preset=exact")
    page.get_by_role("button", name="Keep the best of each group").click()
    gone = next(id for id in ids(own_url) if id.startswith("old/1"))
    problem = {"detail": "the store cannot be written: the disk is full", "code": "store_paused"}
    refused = {"status": 503, "json": problem}
    page.route(
        "**/images/old/1*",
        lambda route: route.fulfill(**refused) if route.request.method == "DELETE" else route.continue_(),
    )
    page.get_by_role("button", name="Remove from the index").click()
    expect(page.get_by_text("2 pictures are no longer in the index")).to_be_visible()
    expect(page.get_by_text(f"{gone}: The store cannot be written: the disk is full")).to_be_visible()
    expect(rows(page)).to_have_count(1)


def test_an_empty_result_says_what_to_do(page: Page, empty_url: str) -> None:
    page.goto(f"{empty_url}/#duplicates?preset=exact")
    expect(page.get_by_text("No duplicates at this threshold.")).to_be_visible()
    expect(page.get_by_text("Move the slider to the left")).to_be_visible()
    expect(page.locator("#duplicates-count")).to_be_hidden()


def test_the_header_counts_what_is_known_and_begins_nothing(page: Page, own_url: str, asked: list[str]) -> None:
    page.goto(f"{own_url}/#about")
    with page.expect_response(lambda answer: "begin=false" in answer.url) as answer:
        page.reload()
    assert answer.value.status == 202
    expect(page.locator("#duplicates-count")).to_be_hidden()
    page.goto(f"{own_url}/#duplicates?preset=exact")
    expect(rows(page)).to_have_count(3)
    page.goto(f"{own_url}/#about")
    page.reload()
    expect(page.get_by_role("link", name="Duplicates 3")).to_be_visible()


def test_only_groups_in_sight_are_in_the_document(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(150):
        content = encoded(scene(8, 6, seed=number))
        for letter in "ab":
            (folder / f"{number:03}{letter}.png").write_bytes(content)
    with serving(tmp_path, str(folder)) as url:
        page.goto(f"{url}/#duplicates?preset=exact")
        expect(row(page, "000a.png")).to_be_visible()
        assert rows(page).count() < 20
        row(page, "000a.png").focus()
        page.keyboard.press("End")
        expect(row(page, "149a.png")).to_be_focused()
        assert rows(page).count() < 20
        # Back restores the place in the list, and the focus.
        page.keyboard.press("c")
        expect(page.get_by_role("heading", name="Group 150 of 150")).to_be_visible()
        page.go_back()
        expect(row(page, "149a.png")).to_be_in_viewport()


def test_all_fits_a_phone(page: Page, url: str) -> None:
    page.set_viewport_size({"width": 320, "height": 700})
    page.goto(f"{url}/#duplicates?threshold=0.999")
    row(page, "0.png").get_by_role("button", name=re.compile("^Keep 1")).click()
    expect(page.get_by_role("button", name="Save script")).to_be_visible()
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) <= 320
    row(page, "0.png").get_by_role("link", name="Compare").click()
    expect(page.get_by_role("heading", name=re.compile("Group 1 of"))).to_be_visible()
    assert page.evaluate(width) <= 320
