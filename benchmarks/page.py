"""What a visitor of the page waits for, in Chromium, against the bars that the page was built for.

    python -m benchmarks.page --work DIR [--photos FOLDER] [--only duplicates]

Each part makes its store once, in DIR, serves it, and yields rows of the table. Service and browser share the machine;
Chromium draws without a graphics card.
"""

import io
import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.duplicates_scale import MODEL, fill
from benchmarks.machine import describe
from benchmarks.servers import running
from service.store.snapshot import SNAPSHOT
from tests.ports import free_port

_ITEMS, _GROUPS, _DIMENSION = 100_000, 5_000, 128
_THRESHOLD = 0.9
_PHOTOS = 2125
_TURNS = 5
# The window's height in px, and px a frame while scrolling. A third of a window a frame is the most that draws tiles.
_HEIGHT = 800
_SLOW, _FAST = _HEIGHT // 3 - 6, 4000

# Notes when the first element that matches a selector is on the screen, in ms since the page was opened.
_WATCH = """(selector) => {
    const observer = new MutationObserver(() => {
        if (!document.querySelector(selector)) return;
        observer.disconnect();
        requestAnimationFrame(() => setTimeout(() => { window.shownAt = performance.now(); }));
    });
    observer.observe(document, { childList: true, subtree: true });
}"""
# Scrolls by so many px a frame to the end of the page; returns the length of each frame in ms.
_SCROLL = """(step) => new Promise((resolve) => {
    const frames = [];
    let before = 0;
    const next = (now) => {
        if (before) frames.push(now - before);
        before = now;
        const top = window.scrollY;
        window.scrollBy(0, step);
        if (window.scrollY === top) resolve(frames);
        else requestAnimationFrame(next);
    };
    requestAnimationFrame(next);
})"""

# The bytes of all answers, headers included, to requests whose addresses have a text in them.
_TRANSFERRED = """(part) => [...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]
    .filter(({ name }) => name.includes(part)).reduce((sum, one) => sum + one.transferSize, 0)"""


class Row(NamedTuple):
    """A row of the table: what was measured, its bar and goal, and the figure."""

    what: str
    bar: str
    goal: str
    figure: str


def main(
    work: Annotated[Path, typer.Option(help="Folder for the stores, which are made once.")],
    photos: Annotated[
        Path | None, typer.Option(help="Photographs for the first view; without them it is left out.")
    ] = None,
    only: Annotated[str, typer.Option(help="One part.")] = "",
) -> None:
    """Print the table."""
    print(describe())
    print("| what | bar | goal | measured |")
    print("|---|---|---|---|")
    with _chromium() as browser:
        parts = dict(PARTS)
        if photos is not None:
            parts["first"] = partial(first_view, photos)
        for name, part in parts.items():
            if only in ("", name):
                for row in part(work, browser):
                    print("| " + " | ".join(row) + " |", flush=True)


def duplicates(work: Path, browser: Browser) -> Iterator[Row]:
    """Yield how soon the first groups are on the screen once they are known, and how smoothly they scroll."""
    with _served(_large_store(work), work / "log") as url:
        question = f"duplicates?threshold={_THRESHOLD}"
        total = _ready(f"{url}/{question}&limit=1")["total"]
        name = f"{_ITEMS:,} items, {total:,} groups"
        waits = []
        for _ in range(_TURNS):
            page = browser.new_page(viewport={"width": 1280, "height": _HEIGHT})
            page.add_init_script(f"({_WATCH})('.group img')")
            page.goto(f"{url}/#{question}")
            page.wait_for_function("() => window.shownAt !== undefined", timeout=120_000)
            waits.append(page.evaluate("window.shownAt") - _response_start(page, question))
            if len(waits) < _TURNS:
                page.close()
        yield Row(f"{name}: first groups shown after they are known", "≤ 2 s", "1 s", f"{_median(waits) / 1e3:.2f} s")
        # All groups are there a moment later.
        page.wait_for_load_state("networkidle")
        yield from _scrolls(page, name, _SLOW, _FAST)
        page.close()


def grid(work: Path, browser: Browser) -> Iterator[Row]:
    """Yield how smoothly a grid of 100,000 items scrolls from end to end."""
    folder = _large_store(work)
    with _served(folder, work / "log") as url:
        page = browser.new_page(viewport={"width": 1280, "height": _HEIGHT})
        page.goto(url)
        page.wait_for_selector(".grid .tile img")
        yield from _scrolls(page, f"grid of {_ITEMS:,}", _FAST, 10 * _FAST)
        page.close()


def _scrolls(page: Page, name: str, *steps: int) -> Iterator[Row]:
    """Yield the longest frame while a list scrolls from end to end by so many px a frame."""
    for step in steps:
        page.evaluate("window.scrollTo(0, 0)")
        frames: list[float] = page.evaluate(_SCROLL, step)
        longest, most = max(frames), sorted(frames)[int(0.99 * len(frames))]
        figure = f"{longest:.0f} ms (99 % within {most:.0f} ms, {len(frames):,} frames)"
        yield Row(f"{name}: from end to end, {step:,} px a frame, longest frame", "≤ 100 ms", "50 ms", figure)


def first_view(photos: Path, work: Path, browser: Browser) -> Iterator[Row]:
    """Yield what the first view of 2,125 photographs fetches, when it can be used, and what a reload fetches."""
    folder = work / f"page-first-{_PHOTOS}"
    if not folder.exists():
        pictures = work / "first-pictures"
        originals = sorted(photos.iterdir())
        for number in range(_PHOTOS):
            place = pictures / f"{number // len(originals):02}"
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(originals[number % len(originals)], place)
        command = [str(Path(sys.executable).with_name("lookalike")), "index", str(pictures), "--model", str(MODEL)]
        subprocess.run([*command, "--store", str(folder)], check=True)
    with _served(folder, work / "log") as url:
        fetched, ready, again = [], [], []
        for _ in range(_TURNS):
            page = browser.new_context(viewport={"width": 1280, "height": _HEIGHT}).new_page()
            page.add_init_script(f"({_WATCH})('.grid .tile')")
            page.goto(url)
            page.wait_for_function("() => window.shownAt !== undefined")
            page.wait_for_load_state("networkidle")
            ready.append(page.evaluate("window.shownAt"))
            fetched.append(page.evaluate(_TRANSFERRED, ""))
            page.reload()
            page.wait_for_load_state("networkidle")
            again.append(page.evaluate(_TRANSFERRED, "/thumbnail"))
            page.context.close()
        yield Row(
            f"first view of {_PHOTOS:,} items: everything fetched",
            "≤ 300 kB",
            "200 kB",
            f"{_median(fetched) / 1e3:.0f} kB",
        )
        yield Row("the same: tiles there, and taking clicks", "≤ 1 s", "0.5 s", f"{_median(ready) / 1e3:.2f} s")
        yield Row("the same, loaded again: bytes of thumbnails", "0", "0", f"{max(again):.0f}")


def _large_store(work: Path) -> Path:
    """Return the store of 100,000 items with 5,000 planted groups, which is made once."""
    folder = work / f"page-duplicates-{_ITEMS}-{_GROUPS}"
    if not (folder / SNAPSHOT).exists():
        picture = io.BytesIO()
        Image.effect_noise((128, 96), 60).save(picture, "WEBP")
        fill(folder, _ITEMS, _GROUPS, _DIMENSION, _ITEMS, picture.getvalue())
    return folder


# The parts of the table by name.
PARTS: dict[str, Callable[[Path, Browser], Iterator[Row]]] = {"duplicates": duplicates, "grid": grid}


def _response_start(page: Page, path: str) -> float:
    """Return when the first answer to a request began to come, in ms since the page was opened."""
    script = "(path) => performance.getEntriesByType('resource').find(({ name }) => name.includes(path)).responseStart"
    started: float = page.evaluate(script, path)
    return started


def _ready(address: str) -> Any:
    """Ask until the answer is not 202; return its JSON."""
    while True:
        with urllib.request.urlopen(address) as answer:
            content = json.load(answer)
            if answer.status != 202:
                return content
        time.sleep(1)


@contextmanager
def _served(folder: Path, log: Path) -> Iterator[str]:
    """Serve a store until the end of the block; yield the address."""
    port = free_port()
    environment = {"LOOKALIKE_MODEL": str(MODEL), "LOOKALIKE_STORE": str(folder), "LOOKALIKE_VARIANT": "fp32"}
    command = [str(Path(sys.executable).with_name("lookalike")), "serve", "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with running(command, f"{address}/readyz", environment | {"BENTOML_DO_NOT_TRACK": "True"}, log):
        yield address


@contextmanager
def _chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        yield browser
        browser.close()


def _median(numbers: list[float]) -> float:
    return sorted(numbers)[len(numbers) // 2]


if __name__ == "__main__":
    typer.run(main)
