"""`lookalike index --sync` over files that have not changed, against a bare walk that looks at each of them.

    python -m benchmarks.sync

Makes a folder of many tiny files and a store that has them, without encoding. Both read the same folder and take turns;
the first turn warms the disk's cache and does not count. Ours begins when the imports are done, and opens and reads the
catalog.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.machine import describe
from service.encoding.card import read_card
from service.file_facts import FileFacts
from service.jobs.sync import Target
from service.settings import Settings, read_own_settings
from service.store import NewItem
from service.store.embedded import EmbeddedStore

_MODEL, _DIMENSION, _IN_A_FOLDER, _AT_ONCE = Path("models/mnist"), 128, 1000, 5000


def main(
    count: Annotated[int, typer.Option(help="Files.")] = 100_000,
    turns: Annotated[int, typer.Option()] = 5,
    work: Annotated[Path | None, typer.Option(help="Folder to make them in.")] = None,
) -> None:
    """Print seconds of both and their ratio."""
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        pictures, home = Path(temporary).resolve() / "pictures", Path(temporary) / "store"
        _fill(pictures, home, count)
        settings = read_own_settings(store=home, model=_MODEL)
        print(f"{describe()}\n\n{count} files; seconds")
        print("| turn | os.walk + stat | index --sync | ratio |\n|---|---|---|---|")
        ratios = []
        for turn in range(turns + 1):
            bare, ours = _bare(pictures, count), _sync(pictures, settings, count)
            if turn:
                ratios.append(ours / bare)
                print(f"| {turn} | {bare:.3f} | {ours:.3f} | {ours / bare:.2f} |", flush=True)
        print(f"median ratio {np.median(ratios):.2f}")


def _fill(pictures: Path, home: Path, count: int) -> None:
    card = read_card(_MODEL)
    store = EmbeddedStore(home, card, _DIMENSION)
    embedding = np.zeros(_DIMENSION, np.float32)
    embedding[0] = 1
    items = []
    for number in range(count):
        path = pictures / f"{number // _IN_A_FOLDER:04d}" / f"IMG_{number % _IN_A_FOLDER:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number)
        status = path.stat()
        facts = FileFacts(64, 48, status.st_size, "JPEG", "2026-11-27T10:00:00")
        items.append(
            NewItem(
                id=str(path.relative_to(pictures)),
                metadata={"label": path.parent.name},
                source=str(path),
                digest=f"{number:064x}",
                variant="fp32",
                embedding=embedding,
                thumbnail=b"",
                original=None,
                facts=facts,
                mtime_ns=status.st_mtime_ns,
            )
        )
        if len(items) == _AT_ONCE or number == count - 1:
            store.add(items)
            items = []
    store.close()


def _bare(pictures: Path, count: int) -> float:
    start = time.perf_counter()
    seen = 0
    for folder, _, names in os.walk(pictures):
        for name in names:
            os.stat(os.path.join(folder, name))  # noqa: PTH116, PTH118
            seen += 1
    seconds = time.perf_counter() - start
    assert seen == count
    return seconds


def _sync(pictures: Path, settings: Settings, count: int) -> float:
    start = time.perf_counter()
    done = Target(settings).sync(str(pictures))
    seconds = time.perf_counter() - start
    assert (done.changes.unchanged, done.any) == (count, False)
    return seconds


if __name__ == "__main__":
    typer.run(main)
