"""Memory of a training process per picture, from runs on 10,000 and on 100,000 small files."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import typer
from PIL import Image
from tqdm import tqdm

from benchmarks.machine import describe

_COUNTS = (10_000, 100_000)
_SIDE = 8
# Runs in a separate process: opens the folder, decodes an epoch into the canvas, and prints its memory.
_PROGRAM = """
import gc, re, sys, numpy as np, torch
from pathlib import Path
from service.encoding.card import square_preprocessing
from training.data import Canvas, Cursor, batches
from service.sources import open_source
source = open_source(sys.argv[1])
trained = np.arange(len(source), dtype=np.int32)
canvas = Canvas(source, square_preprocessing({side}), 1, Path(sys.argv[1]).parent, torch.device("cpu"))
for number, batch in enumerate(batches(canvas, trained, 500, 0, Cursor())):
    # The first batch of the second epoch.
    if number == len(source) // 500:
        break
gc.collect()
print(int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


def main() -> None:
    """Print the table."""
    held = []
    with TemporaryDirectory() as folder:
        for count in _COUNTS:
            root = Path(folder) / f"{count}-pictures"
            write_pictures(root, count)
            command = [sys.executable, "-c", _PROGRAM.format(side=_SIDE), str(root)]
            held.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    per_picture = (held[1] - held[0]) / (_COUNTS[1] - _COUNTS[0])
    print(f"\n{describe()}\n\n| pictures | held by the process, MB |\n|---|---|")
    for count, size in zip(_COUNTS, held, strict=True):
        print(f"| {count:,} | {size / 1e6:.1f} |")
    print(f"\nPer picture: {per_picture:.0f} bytes, {_SIDE * _SIDE} of them its pixels; the limit is 200.")


def write_pictures(root: Path, count: int) -> None:
    """Write pictures in 100 folders, with names like a camera's."""
    generator = np.random.default_rng(0)
    for number in tqdm(range(count), f"writing {count} pictures", leave=False):
        folder = root / f"album-{number % 100:03d}"
        if number < 100:
            folder.mkdir(parents=True)
        pixels = generator.integers(0, 256, (_SIDE, _SIDE), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"IMG_2026_{number:08d}.png", compress_level=1)


if __name__ == "__main__":
    typer.run(main)
