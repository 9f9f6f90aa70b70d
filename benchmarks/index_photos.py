"""`lookalike index` against its upper limit: a bare loop of Pillow and onnxruntime that stores nothing.

    python -m benchmarks.index_photos PHOTOS

The folder PHOTOS is copied twenty times. Both read the same files, decode JPEGs at a reduced size in two threads, run
onnxruntime with a thread a core, and decode ahead of the encoder. Ours also makes thumbnails, keeps the originals and
commits to disk. The two take turns.
"""

import io
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime as ort
import typer
from PIL import Image

from service import FloatArray, PixelArray, cores
from service.encoding.card import read_card
from service.encoding.encoder import Encoder
from service.encoding.pretrained import default_encoder
from service.gallery import Gallery
from service.jobs.index import index_source
from service.settings import Settings
from service.sources import open_source
from service.store.embedded import EmbeddedStore

_BATCH, _SIDE, _EDGE = 16, 224, 256


def main(
    photos: Annotated[Path, typer.Argument(help="A folder of JPEGs.")],
    copies: Annotated[int, typer.Option()] = 20,
    turns: Annotated[int, typer.Option()] = 3,
) -> None:
    """Print pictures/s of both and their ratio."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "photos"
        folder.mkdir()
        for path in sorted(photos.iterdir()):
            for copy in range(copies):
                shutil.copy(path, folder / f"{path.stem}-{copy:02}{path.suffix}")
        count = len(list(folder.iterdir()))
        print(f"{count} files; pictures/s")
        print("| turn | bare Pillow + onnxruntime | lookalike index | ratio |\n|---|---|---|---|")
        ratios = []
        for turn in range(turns):
            bare = count / _bare(folder)
            ours = count / _index(folder, Path(work) / f"store-{turn}")
            ratios.append(ours / bare)
            print(f"| {turn + 1} | {bare:.1f} | {ours:.1f} | {ours / bare:.2f} |", flush=True)
        print(f"median ratio {np.median(ratios):.2f}")


def _index(folder: Path, store: Path) -> float:
    """Return the seconds of indexing, from listing the files to the last commit and a snapshot."""
    encoder = Encoder(read_card(default_encoder()), "cpu", "fp32")
    settings = Settings(store=store)
    gallery = Gallery(encoder, EmbeddedStore(store, encoder.card, encoder.dimension), settings)
    start = time.perf_counter()
    tally = index_source(open_source(str(folder)), gallery)
    gallery.store.settle()
    seconds = time.perf_counter() - start
    assert not tally.bad, "a photograph could not be read"
    gallery.close()
    return seconds


def _bare(folder: Path) -> float:
    """Return the seconds of the bare loop."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = cores()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(default_encoder() / "model.onnx", options, providers=["CPUExecutionProvider"])
    session.run(None, {"pixels": np.zeros((_BATCH, 3, _SIDE, _SIDE), np.uint8)})
    start = time.perf_counter()
    files = sorted(folder.iterdir())
    chunks = [files[at : at + _BATCH] for at in range(0, len(files), _BATCH)]
    rows: list[FloatArray] = []
    with ThreadPoolExecutor(cores()) as pool:
        ahead = pool.map(_decode, chunks[0])
        for following in [*chunks[1:], []]:
            pixels, ahead = np.stack(list(ahead)), pool.map(_decode, following)
            rows.append(session.run(None, {"pixels": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))})[0])
    assert len(np.concatenate(rows)) == len(files)
    return time.perf_counter() - start


def _decode(path: Path) -> PixelArray:
    with Image.open(io.BytesIO(path.read_bytes())) as picture:
        picture.draft("RGB", (2 * _SIDE, 2 * _SIDE))
        small = picture.convert("RGB")
    scale = _EDGE / min(small.size)
    width, height = (max(_EDGE, round(length * scale)) for length in small.size)
    small = small.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - _SIDE) // 2, (height - _SIDE) // 2
    return np.asarray(small.crop((left, top, left + _SIDE, top + _SIDE)))


if __name__ == "__main__":
    typer.run(main)
