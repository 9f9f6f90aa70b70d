"""Adding pictures in a real browser."""

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image
from playwright.sync_api import Page, Request, Route, expect

from tests.conftest import encoded, scene
from tests.page.files import drop_paths, fetch, hand_over, names, payload
from tests.serving import serving

pytestmark = pytest.mark.slow("drives a browser through uploads")


@pytest.fixture(scope="module")
def store_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service with an empty store for pictures up to 200 kB; each test has its own folder."""
    with serving(tmp_path_factory.mktemp("store"), max_image_bytes="200000") as url:
        yield url


@pytest.fixture
def uploads(page: Page) -> list[Request]:
    """Every request that has sent pictures."""
    made: list[Request] = []
    page.on(
        "request", lambda request: made.append(request) if request.method == "POST" and is_upload(request) else None
    )
    return made


def is_upload(request: Request) -> bool:
    return request.url.endswith("/images")


def ids(url: str, prefix: str) -> list[str]:
    """The ids in a folder of the collection."""
    listed = json.loads(fetch(f"{url}/images?order=id&limit=1000&prefix={quote(prefix, safe='')}"))
    return [item["id"] for item in listed["items"]]


def pictures(count: int) -> dict[str, bytes]:
    return {f"{number:03}.png": encoded(scene(seed=number)) for number in range(count)}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def review(page: Page, url: str, files: dict[str, bytes], folder: str) -> None:
    """Choose files and name their folder."""
    page.goto(f"{url}/#add")
    with page.expect_file_chooser() as chosen:
        page.get_by_role("button", name="Choose files").press("Enter")
    chosen.value.set_files([payload(name, content) for name, content in files.items()])
    page.get_by_role("textbox", name="Put them in the folder").fill(folder)


def add(page: Page) -> None:
    page.locator("#add").click()


def test_files_are_added_to_a_folder(page: Page, store_url: str, uploads: list[Request]) -> None:
    review(page, store_url, pictures(120), "/trip/day 1/")
    expect(page).to_have_title("Add pictures · Lookalike")
    expect(page.get_by_role("heading", level=2)).to_contain_text("120 pictures")
    expect(page.get_by_text("The first one will be called trip/day 1/000.png")).to_be_visible()
    page.get_by_role("button", name="Add 120 pictures").press("Enter")
    expect(page.get_by_role("heading", level=2)).to_have_text("Done")
    expect(page.get_by_role("status").filter(has_text="added")).to_have_text("120 added.")
    assert ids(store_url, "trip/day 1/") == [f"trip/day 1/{name}" for name in pictures(120)]
    # A refusal that concerns all would have come with the first picture.
    assert len(uploads) >= 4
    expect(page.get_by_role("link", name="Find duplicates")).to_have_attribute("href", "#duplicates")
    page.get_by_role("link", name="Show them").click()
    expect(page.locator(".position")).to_contain_text("of 120 pictures")


def test_a_folder_keeps_its_paths_and_names_what_it_leaves_out(page: Page, store_url: str, tmp_path: Path) -> None:
    folder = write(
        tmp_path / "holiday", {"a/1.png": encoded(scene()), "2.png": encoded(scene(seed=1)), "notes.txt": b"x"}
    )
    page.goto(f"{store_url}/#add")
    with page.expect_file_chooser() as chosen:
        page.get_by_role("button", name="Choose a folder").click()
    chosen.value.set_files(folder)
    expect(page.get_by_role("heading", level=2)).to_contain_text("2 pictures in holiday")
    page.get_by_text("1 other file is left out").click()
    expect(page.get_by_role("listitem").filter(has_text="holiday/notes.txt")).to_be_visible()
    add(page)
    expect(page.get_by_role("heading", level=2)).to_have_text("Done")
    assert ids(store_url, "holiday/") == ["holiday/2.png", "holiday/a/1.png"]


def test_a_folder_dropped_on_the_view_is_reviewed_at_once(page: Page, store_url: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "dropped", {"1.png": encoded(scene())})
    page.goto(f"{store_url}/#add")
    expect(page.get_by_role("button", name="Choose files")).to_be_visible()
    drop_paths(page, folder)
    expect(page.get_by_role("heading", level=2)).to_contain_text("1 picture in dropped")
    page.get_by_role("button", name="Choose others").click()
    expect(page.get_by_role("button", name="Choose files")).to_be_visible()


def test_files_dropped_elsewhere_can_be_added(page: Page, store_url: str) -> None:
    page.goto(store_url)
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    hand_over(page, "drop", *[payload(name, content) for name, content in pictures(2).items()])
    page.get_by_role("button", name="Add to the collection").press("Enter")
    expect(page.get_by_role("button", name="Add 2 pictures")).to_be_visible()


@pytest.mark.parametrize(
    ("answer", "result"), [("Skip them", "1 added, 2 skipped."), ("Replace them", "1 added, 2 replaced.")]
)
def test_names_that_exist_are_asked_about_once(page: Page, store_url: str, answer: str, result: str) -> None:
    folder = answer.replace(" ", "-")
    review(page, store_url, pictures(2), folder)
    add(page)
    expect(page.get_by_role("heading", level=2)).to_have_text("Done")
    page.get_by_role("button", name="Add more").click()
    changed = {name: encoded(scene(seed=50)) for name in pictures(3)}
    review(page, store_url, changed, folder)
    add(page)
    dialog = page.get_by_role("dialog", name="2 of these names are in the collection already")
    dialog.get_by_text("Show the names").click()
    expect(dialog.get_by_role("listitem")).to_have_text([f"{folder}/000.png", f"{folder}/001.png"])
    dialog.get_by_role("button", name=answer).press("Enter")
    expect(page.get_by_role("status").filter(has_text="added")).to_have_text(result)
    kept = fetch(f"{store_url}/images/{folder}/000.png/content")
    assert kept == (pictures(1)["000.png"] if answer == "Skip them" else changed["000.png"])


def test_each_failure_has_a_line_and_can_be_tried_again(page: Page, store_url: str) -> None:
    noise = Image.effect_noise((900, 700), 90).convert("RGB")
    large = encoded(noise)
    assert len(large) > 200_000
    review(page, store_url, {"bad.png": b"no picture", "good.png": encoded(scene()), "large.png": large}, "failures")
    add(page)
    expect(page.get_by_role("heading", level=2)).to_have_text("Done, but not with all")
    lines = page.get_by_role("list", name="Not added").get_by_role("listitem")
    expect(lines).to_have_count(2)
    expect(lines.filter(has_text="failures/bad.png")).to_contain_text("expected the bytes of one of JPEG")
    expect(lines.filter(has_text="failures/large.png")).to_contain_text("this service takes at most 200 kB")
    expect(page.get_by_role("status").filter(has_text="added")).to_have_text("1 added, 2 not added.")
    # A picture is made smaller only if the visitor wants it.
    page.get_by_role("button", name="Shrink and add the one that is too large").press("Enter")
    expect(page.get_by_role("status").filter(has_text="added")).to_have_text("2 added, 1 not added.")
    assert ids(store_url, "failures/") == ["failures/good.png", "failures/large.png"]
    assert len(fetch(f"{store_url}/images/failures/large.png/content")) <= 200_000
    page.get_by_role("button", name="Try the failed ones again").click()
    expect(page.get_by_role("status").filter(has_text="added")).to_have_text("2 added, 1 not added.")
    expect(lines).to_have_count(1)


def test_two_files_of_one_name_are_told(page: Page, store_url: str) -> None:
    page.goto(f"{store_url}/#add")
    expect(page.get_by_role("button", name="Choose files")).to_be_visible()
    hand_over(page, "drop", payload("a.png", encoded(scene())), payload("a.png", encoded(scene(seed=1))))
    page.get_by_role("textbox", name="Put them in the folder").fill("twice")
    add(page)
    lines = page.get_by_role("list", name="Not added").get_by_role("listitem")
    expect(lines).to_have_text(["twice/a.pngAnother of these files has the same name."])


def test_names_arrive_as_they_are(page: Page, store_url: str) -> None:
    odd = ['50% #1?".png', "Größe 日本 & (1)'*.png", "a\\b;c=d.png"]
    review(page, store_url, {name: encoded(scene(seed=number)) for number, name in enumerate(odd)}, "odd ‘names’")
    add(page)
    expect(page.get_by_role("heading", level=2)).to_have_text("Done")
    assert sorted(ids(store_url, "odd ")) == sorted(f"odd ‘names’/{name}" for name in odd)


def test_a_busy_service_is_asked_again(page: Page, store_url: str, expected: list[str], uploads: list[Request]) -> None:
    expected.extend(["429", "503"])
    refused: list[Request] = []

    def refuse_twice(route: Route) -> None:
        if route.request.method != "POST" or len(refused) == 2:
            route.continue_()
            return
        refused.append(route.request)
        status = 429 if len(refused) == 1 else 503
        route.fulfill(status=status, headers={"Retry-After": "1"}, json={"detail": "busy", "code": "busy"})

    review(page, store_url, pictures(3), "busy")
    page.route("**/images", refuse_twice)
    add(page)
    expect(page.get_by_role("status").filter(has_text="added")).to_have_text("3 added.")
    assert len(refused) == 2


def test_a_lost_connection_stops_it_and_it_goes_on(page: Page, store_url: str, expected: list[str]) -> None:
    expected.append("ERR_FAILED")

    def lose(route: Route) -> None:
        if route.request.method == "POST" and ids(store_url, "lost/"):
            route.abort()
        else:
            route.continue_()

    review(page, store_url, pictures(60), "lost")
    page.route("**/images", lose)
    add(page)
    expect(page.get_by_role("heading", level=2)).to_have_text("Stopped")
    expect(page.get_by_role("alert").filter(has_text="cannot be reached")).to_be_visible()
    expect(page.get_by_role("status").filter(has_text="added")).to_have_text("1 added, 59 not sent.")
    page.unroute("**/images")
    page.get_by_role("button", name="Try again").press("Enter")
    expect(page.get_by_role("status").filter(has_text="added")).to_have_text("60 added.")
    expect(page.get_by_role("heading", level=2)).to_be_focused()
    assert len(ids(store_url, "lost/")) == 60


def test_progress_is_shown_and_leaving_the_view_does_not_end_it(page: Page, store_url: str) -> None:
    held: list[Route] = []

    def hold_later_ones(route: Route) -> None:
        if route.request.method == "POST" and ids(store_url, "progress/"):
            held.append(route)
        else:
            route.continue_()

    review(page, store_url, pictures(20), "progress")
    page.route("**/images", hold_later_ones)
    add(page)
    bar = page.get_by_role("progressbar", name="Pictures added")
    expect(bar).to_have_js_property("value", 1)
    expect(bar).to_have_js_property("max", 20)
    expect(page.locator(".figures")).to_contain_text("1 of 20 · ")
    expect(page.locator(".figures")).to_contain_text("per second · about")
    # The browser asks before the page is closed.
    assert page.evaluate("!window.dispatchEvent(new Event('beforeunload', { cancelable: true }))")
    page.get_by_role("link", name="Browse").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("All pictures")
    page.get_by_role("link", name="Add", exact=True).click()
    expect(page.get_by_role("heading", level=2)).to_have_text("Adding 20 pictures")
    hand_over(page, "drop", payload("a.png", encoded(scene())))
    expect(page.get_by_role("alert").filter(has_text="Wait until these pictures are added")).to_be_visible()
    page.get_by_role("link", name="Browse").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("All pictures")
    for route in held.copy():
        route.continue_()
    page.unroute("**/images")
    expect(page.locator("#toasts")).to_contain_text("Done: 20 added.")
    assert not page.evaluate("!window.dispatchEvent(new Event('beforeunload', { cancelable: true }))")


def test_it_can_be_cancelled_and_resumed(page: Page, store_url: str) -> None:
    held: list[Route] = []

    def hold_later_ones(route: Route) -> None:
        if route.request.method == "POST" and ids(store_url, "cancelled/"):
            held.append(route)
        else:
            route.continue_()

    review(page, store_url, pictures(20), "cancelled")
    page.route("**/images", hold_later_ones)
    add(page)
    expect(page.locator(".figures")).to_contain_text("1 of 20")
    page.get_by_role("button", name="Cancel").press("Enter")
    expect(page.get_by_role("heading", level=2)).to_have_text("Cancelled")
    # The button is gone, but the focus is not lost.
    expect(page.get_by_role("link", name="Show them")).to_be_focused()
    expect(page.get_by_role("status").filter(has_text="added")).to_have_text("1 added, 19 not sent.")
    page.unroute("**/images")
    page.get_by_role("button", name="Go on with the other 19").click()
    expect(page.get_by_role("status").filter(has_text="added")).to_have_text("20 added.")
    assert len(ids(store_url, "cancelled/")) == 20


@pytest.mark.slow("starts a service of its own")
def test_a_key_that_may_only_read_says_so_at_once(page: Page, tmp_path: Path, expected: list[str]) -> None:
    expected.extend(["401", "403"])
    refused: list[int] = []
    page.on("response", lambda response: refused.append(response.status) if response.status == 403 else None)
    keys = "write:a-key-that-may-write,read:a-key-that-may-read"
    with serving(tmp_path, "digits[:5]", api_keys=keys) as url:
        page.goto(f"{url}/#add")
        page.get_by_label("API key").last.fill("a-key-that-may-read")
        page.get_by_role("button", name="Use this key").click()
        with page.expect_file_chooser() as chosen:
            page.get_by_role("button", name="Choose files").click()
        chosen.value.set_files([payload(name, content) for name, content in pictures(70).items()])
        add(page)
        expect(page.get_by_role("alert").filter(has_text="may read only")).to_be_visible()
        expect(page.get_by_role("status").filter(has_text="sent")).to_have_text("70 not sent.")
        # It is asked once, with the first picture.
        assert refused == [403]


def test_an_empty_gallery_leads_here(page: Page, empty_url: str) -> None:
    page.goto(empty_url)
    page.get_by_role("main").get_by_role("link", name="Add pictures").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Add pictures")
    expect(page.get_by_text("Drop pictures or a folder here")).to_be_visible()
    hand_over(page, "drop", payload("first.png", encoded(scene())))
    add(page)
    page.get_by_role("link", name="Show them").click()
    expect(page.locator(".grid .tile")).to_have_count(1)
    assert names(page.locator(".grid .tile")) == ["first.png"]
