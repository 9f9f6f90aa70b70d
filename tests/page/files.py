"""Files handed over to the page: chosen, dropped or pasted, single or as folders."""

import base64
import urllib.request
from pathlib import Path

from playwright.sync_api import FilePayload, Locator, Page


def fetch(url: str) -> bytes:
    """Return what an address answers."""
    with urllib.request.urlopen(url) as answer:
        body: bytes = answer.read()
        return body


def payload(name: str, content: bytes, type: str = "image/png") -> FilePayload:
    """Return a file for an <input>."""
    return {"name": name, "mimeType": type, "buffer": content}


def digit(url: str, number: int, name: str = "digit.png") -> FilePayload:
    """Return the file of one of the gallery's own digits."""
    return payload(name, fetch(f"{url}/images/digits/{number:05d}/content"))


def hand_over(page: Page, event: str, *files: FilePayload) -> None:
    """Dispatch a drop or a paste of files, or of a text where there are none."""
    page.evaluate(
        """([event, files]) => {
            const transfer = new DataTransfer();
            for (const { name, type, content } of files) {
                const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
                transfer.items.add(new File([bytes], name, { type }));
            }
            if (!files.length) transfer.setData("text/plain", "words");
            const kind = event === "paste" ? ClipboardEvent : DragEvent;
            const field = event === "paste" ? "clipboardData" : "dataTransfer";
            document.body.dispatchEvent(new kind(event, { [field]: transfer, bubbles: true, cancelable: true }));
        }""",
        [
            event,
            [
                {
                    "name": file["name"],
                    "type": file["mimeType"],
                    "content": base64.b64encode(file["buffer"]).decode(),
                }
                for file in files
            ],
        ],
    )


def drop_paths(page: Page, *paths: Path) -> None:
    """Drop files and folders of this machine on the page, as a visitor's file manager does."""
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    devtools = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 400, "data": data})
    devtools.detach()


def names(tiles: Locator) -> list[str]:
    """Return the ids of tiles."""
    return [str(title) for title in tiles.evaluate_all("(all) => all.map((tile) => tile.title)")]
