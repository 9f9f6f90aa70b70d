"""`lookalike store copy` to Milvus Lite: items a second, undisturbed and after kill -9 in the middle."""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from service.encoding.card import read_card
from service.store import NewItem
from service.store.embedded import EmbeddedStore
from service.store.milvus import MilvusStore
from service.store.milvus_address import MilvusAddress

_MODEL = Path("models/mnist")
_AT_ONCE = 1000
_LOOKALIKE = Path(sys.executable).with_name("lookalike")


def fill(folder: Path, count: int) -> int:
    """Make a store of random unit vectors with two fields of metadata, and return its dimension."""
    card = read_card(_MODEL)
    dimension = int(card.facts["dimension"])
    folder.mkdir()
    store = EmbeddedStore(folder, card, dimension, exact_limit=10**9)
    rng = np.random.default_rng(0)
    for start in range(0, count, _AT_ONCE):
        rows = rng.normal(size=(_AT_ONCE, dimension)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        store.add(
            [
                NewItem(f"p/{n}", {"n": n, "label": str(n % 10)}, f"/p/{n}", f"{n:064x}", "fp32", row, b"", None)
                for n, row in enumerate(rows, start)
            ]
        )
    store.close()
    return dimension


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200_000)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        dimension = fill(folder / "from", count)
        for killed in (False, True):
            where = MilvusAddress(str(folder / f"{killed}.db"), "pictures", True)
            command = [str(_LOOKALIKE), "store", "copy", str(folder / "from"), str(where)]
            if killed:
                first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
                assert first.stderr is not None
                said = ""
                while first.poll() is None:
                    said = said[-200:] + first.stderr.read(1)
                    if any(f"| {n}/" in said for n in range(count // 2, count, _AT_ONCE)):
                        break
                os.killpg(first.pid, signal.SIGKILL)
                first.communicate()
            before, start = os.times(), time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, after = time.perf_counter() - start, os.times()
            cpu = after.children_user + after.children_system - before.children_user - before.children_system
            store = MilvusStore(where, read_card(_MODEL), dimension)
            print(
                f"{'after kill -9' if killed else 'undisturbed'}: {count / seconds:.0f} items/s with start and check, "
                f"{seconds:.0f} s, {cpu:.0f} s of processor time; {store.count()} of {count} there; "
                f"{done.stderr.splitlines()[-1]}",
                flush=True,
            )
            store.close()


if __name__ == "__main__":
    main()
