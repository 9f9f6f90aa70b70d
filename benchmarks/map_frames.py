"""Frames a second of the page's map while it is dragged, in Chromium without a graphics card.

    python -m benchmarks.map_frames --count 100000

The page is the real one; the answers of the service are synthetic.
"""

import json
import shutil
import time
from base64 import b64encode
from itertools import pairwise
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import typer
from playwright.sync_api import Browser, Route, sync_playwright

from benchmarks.machine import describe
from service.http.routes.info import PAGE

_URL = "http://map.test/"
_VALUES = 10
_BAR, _GOAL = 15, 30
# Without a graphics card the page draws by pixels. The other row is what WebGL2 on the processor would cost.
_WAYS = {"pixels": True, "WebGL2": False}
_HIDE_RENDERER = """
    const own = WebGL2RenderingContext.prototype.getExtension;
    WebGL2RenderingContext.prototype.getExtension = function (name) {
        return name === "WEBGL_debug_renderer_info" ? null : own.call(this, name);
    };
"""
_FRAMES = """() => {
    window.frames_seen = [];
    const note = (time) => { window.frames_seen.push(time); requestAnimationFrame(note); };
    requestAnimationFrame(note);
}"""


class Measured(NamedTuple):
    """Frames a second and the longest frame in ms while dragging, and ms until the first map is drawn."""

    rate: float
    longest: float
    first: float


def main(
    count: Annotated[int, typer.Option(min=1, help="Points.")] = 100_000,
    seconds: Annotated[float, typer.Option(min=1, help="Of dragging, in each row.")] = 5,
) -> None:
    """Print the table; exit code 1 below the bar."""
    chromium = shutil.which("chromium")
    answer = _map(count)
    rows = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for way in _WAYS:
            rows += [(way, zoom, _measure(browser, answer, way, zoom, seconds)) for zoom in (0, 3)]
        browser.close()
    print(describe())
    print(f"\n{count} points, window of 1280 × 900; bar {_BAR}, goal {_GOAL} frames/s\n")
    print("| drawn by | zoomed in | frames/s | longest frame, ms | first map after, ms |")
    print("|---|---|---|---|---|")
    for way, zoom, measured in rows:
        print(f"| {way} | {1.5**zoom:.1f}× | {measured.rate:.1f} | {measured.longest:.0f} | {measured.first:.0f} |")
    raise typer.Exit(0 if all(measured.rate >= _BAR for way, _, measured in rows if _WAYS[way]) else 1)


def _map(count: int) -> dict[str, Any]:
    """Return an answer of GET /map: groups of points of ten values."""
    random = np.random.default_rng(0)
    group = random.integers(0, 40, count)
    plane = random.uniform(0.1, 0.9, (40, 2))[group] + random.normal(0, 0.03, (count, 2))
    positions = (plane.clip(0, 1) * 65535).astype("<u2")
    return {
        "version": "t-sne.1",
        "sequence": 1,
        "method": "t-sne",
        "progress": None,
        "count": count,
        "ids": [f"folder/{number:06d}.jpg" for number in range(count)],
        "positions": b64encode(positions.tobytes()).decode(),
        "values": [str(value) for value in range(_VALUES)],
        "codes": b64encode((group % _VALUES + 1).astype("<u2").tobytes()).decode(),
    }


def _measure(browser: Browser, answer: dict[str, Any], way: str, zoom: int, seconds: float) -> Measured:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    if not _WAYS[way]:
        page.add_init_script(_HIDE_RENDERER)
    answers = {
        "/map": json.dumps(answer),
        "/metadata": json.dumps({"keys": [{"key": "label", "values": [{"value": "0", "count": 1}]}], "left_out": 0}),
        "/duplicates": json.dumps({"total": 0}),
        "/info": json.dumps({"queries": ["image"], "notice": None, "count": answer["count"], "limits": {}}),
    }

    def fulfil(route: Route) -> None:
        path = urlsplit(route.request.url).path
        if path in answers:
            route.fulfill(body=answers[path], content_type="application/json")
        elif path.startswith("/images/"):
            route.fulfill(path=PAGE / "example.png")
        else:
            route.fulfill(path=PAGE / (path.removeprefix("/page/").lstrip("/") or "index.html"))

    page.route("**/*", fulfil)
    begin = time.perf_counter()
    page.goto(f"{_URL}#map?colour=label")
    plane = page.locator(f"#plane[data-drawn-by='{way}']")
    page.locator("#map-count:not(:empty)").wait_for()
    first = time.perf_counter() - begin
    for _ in range(zoom):
        page.locator("#map-in").click()
    page.wait_for_timeout(1000)
    box = plane.bounding_box()
    assert box is not None, f"the map is not drawn by {way}"
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.evaluate(_FRAMES)
    end = time.perf_counter() + seconds
    step = 0
    while time.perf_counter() < end:
        step += 1
        page.mouse.move(x + 150 * np.sin(step / 8), y + 80 * np.sin(step / 5))
    times: list[float] = page.evaluate("window.frames_seen")
    page.mouse.up()
    page.close()
    gaps = [after - before for before, after in pairwise(times)]
    return Measured(1000 * len(gaps) / (times[-1] - times[0]), max(gaps), 1000 * first)


if __name__ == "__main__":
    typer.run(main)
