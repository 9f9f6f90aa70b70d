"""`lookalike embed` beside what its pictures cost alone, and beside other ways to read them.

    python -m benchmarks.embed PHOTOS [--clip-retrieval PYTHON]

The folder PHOTOS is copied until it has so many files. Reading: with an encoder of a single layer, against decoding
with Pillow's drafts in as many threads as there are cores and nothing else, a torch DataLoader with torchvision's
transforms and as many workers, and clip-retrieval's reader, where PYTHON is of an environment that has it. Encoding:
with the encoder for photographs, against a bare loop that decodes ahead and runs onnxruntime. The two of a row take
turns, and the ratio is the median over the turns. The time to open an encoder is measured alone and subtracted.
Memory: the peak of a process for 10,000 and for 100,000 small pictures.
"""

import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import onnxruntime as ort
import typer
from onnx import TensorProto, helper
from PIL import Image

from benchmarks.held_memory import write_pictures
from service import PixelArray, cores
from service.encoding.card import read_card, square_preprocessing
from service.encoding.encoder import Encoder
from service.encoding.pretrained import default_encoder
from service.jobs.embed import embed_source
from service.settings import Settings
from service.sources import open_source

_SIDE, _DIMENSION = 32, 64
_PHOTO_SIDE, _PHOTO_EDGE, _BATCH = 224, 256, 16
_SMALL_COUNTS = (10_000, 100_000)
# The programs of other environments print the seconds that all batches took.
_TRANSFORMS = f"""
import sys, time
from torchvision import transforms as T
steps = [T.Resize({_SIDE}, T.InterpolationMode.BICUBIC), T.CenterCrop({_SIDE}), lambda one: one.convert("RGB")]
transform = T.Compose([*steps, T.ToTensor(), T.Normalize([0.5] * 3, [0.5] * 3)])
folder, workers = sys.argv[1], int(sys.argv[2])
"""
_DATALOADER = f"""{_TRANSFORMS}
import os, torch
from PIL import Image
class Photos(torch.utils.data.Dataset):
    files = sorted(os.scandir(folder), key=lambda entry: entry.name)
    files = [entry.path for entry in files]
    def __len__(self):
        return len(self.files)
    def __getitem__(self, at):
        return transform(Image.open(self.files[at]))
encoder = torch.nn.Linear(3 * {_SIDE} ** 2, {_DIMENSION})
start, rows = time.perf_counter(), []
with torch.no_grad():
    for batch in torch.utils.data.DataLoader(Photos(), 64, num_workers=workers):
        rows.append(torch.nn.functional.normalize(encoder(batch.flatten(1))))
assert len(torch.cat(rows)) == len(Photos.files)
print(time.perf_counter() - start)
"""
_CLIP_RETRIEVAL = f"""{_TRANSFORMS}
from clip_retrieval.clip_inference.reader import FilesReader
reader = FilesReader(lambda keys: keys, transform, None, folder, 64, workers, enable_text=False, enable_image=True)
start = time.perf_counter()
count = sum(len(batch["image_tensor"]) for batch in reader)
print(time.perf_counter() - start)
"""
_MEMORY = """
import re, sys
from pathlib import Path
from service.jobs.embed import embed_source
from service.settings import Settings
from service.sources import open_source
folder, model, out = map(Path, sys.argv[1:])
embed_source(open_source(str(folder)), model, out, Settings(device="cpu", variant="fp32"))
# The peak that getrusage tells may be that of the process which started this one.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


class Row(NamedTuple):
    """A line of the table: what is compared, the two rates in pictures/s, and the ratio that is expected."""

    what: str
    run: Callable[[], float]
    against: str
    run_against: Callable[[], float]
    expected: float


def main(
    photos: Annotated[Path, typer.Argument(help="A folder of JPEGs.")],
    files: Annotated[int, typer.Option(help="Files for reading; a tenth of them for encoding.")] = 10_000,
    turns: Annotated[int, typer.Option()] = 3,
    clip_retrieval: Annotated[Path | None, typer.Option(metavar="PYTHON")] = None,
    only: Annotated[str, typer.Option(help="reading, encoding, memory or all.")] = "all",
) -> None:
    """Print the tables."""
    # Imported late because torch would add to the memory of forked processes.
    from benchmarks.machine import describe

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        tiny = _tiny_encoder(folder / "tiny")
        print(f"{describe()}; load {os.getloadavg()[0]:.1f} before\n")
        rows: list[Row] = []
        if only in ("all", "reading"):
            rows += _reading(_copies(photos, folder / "many", files), tiny, folder, clip_retrieval)
        if only in ("all", "encoding"):
            rows += _encoding(_copies(photos, folder / "few", files // 10), folder)
        if rows:
            print("| what | ours, pictures/s | against | pictures/s | ratio | expected |\n|---|---|---|---|---|---|")
        for row in rows:
            rates = [(row.run(), row.run_against()) for _ in range(turns)]
            ours, theirs = np.median(rates, axis=0)
            ratio = float(np.median([one / other for one, other in rates]))
            kept = "" if ratio >= row.expected else ", missed"
            print(
                f"| {row.what} | {ours:.0f} | {row.against} | {theirs:.0f} | {ratio:.2f} | "
                f"≥ {row.expected:.2f}{kept} |",
                flush=True,
            )
        if rows and clip_retrieval is None and only != "encoding":
            print("\nclip-retrieval's reader is left out: --clip-retrieval names no Python that has it")
        if only in ("all", "memory"):
            _print_memory(tiny, folder)
        print(f"\nload {os.getloadavg()[0]:.1f} after")


def _reading(folder: Path, tiny: Path, work: Path, clip_retrieval: Path | None) -> list[Row]:
    count = len(list(folder.iterdir()))

    def ours() -> float:
        return _embed(folder, tiny, work / "out", "fp32")

    def other(python: Path, program: str) -> Callable[[], float]:
        command = [str(python), "-c", program, str(folder), str(cores())]
        return lambda: count / float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    what = f"{count:,} photographs, encoder of one layer"
    rows = [
        Row(what, ours, "Pillow's drafts alone", lambda: _decode_all(folder), 0.8),
        Row(what, ours, "torch DataLoader + torchvision", other(Path(sys.executable), _DATALOADER), 1.5),
    ]
    if clip_retrieval is not None:
        rows.append(Row(what, ours, "clip-retrieval's reader alone", other(clip_retrieval, _CLIP_RETRIEVAL), 2.0))
    return rows


def _encoding(folder: Path, work: Path) -> list[Row]:
    model, count = default_encoder(), len(list(folder.iterdir()))
    variants = ["fp32", *(name for name in read_card(model).variants if name == "int8")]
    return [
        Row(
            f"{count:,} photographs, the default encoder, {variant}",
            lambda variant=variant: _embed(folder, model, work / "out", variant),  # type: ignore[misc]
            "a bare loop of Pillow and onnxruntime",
            lambda variant=variant: _bare(folder, model, variant),  # type: ignore[misc]
            0.9,
        )
        for variant in variants
    ]


def _embed(folder: Path, model: Path, out: Path, variant: str) -> float:
    """Return the pictures/s of ours, from listing the files to the last part."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    Encoder(read_card(model), "cpu", variant)
    opened = time.perf_counter()
    done = embed_source(open_source(str(folder)), model, out, Settings(device="cpu", variant=variant))
    seconds = (time.perf_counter() - opened) - (opened - start)
    assert not done.bad, "a photograph could not be read"
    return done.added / seconds


def _decode_all(folder: Path) -> float:
    """Return the pictures/s of reading, decoding and resizing, and nothing else."""
    start = time.perf_counter()
    files = sorted(folder.iterdir())
    with ThreadPoolExecutor(cores()) as pool:
        # In pieces, as futures of all files would cost memory.
        for at in range(0, len(files), 1000):
            for pixels in pool.map(lambda path: _decode(path, _SIDE, _SIDE), files[at : at + 1000]):
                assert pixels.shape == (_SIDE, _SIDE, 3)
    return len(files) / (time.perf_counter() - start)


def _bare(folder: Path, model: Path, variant: str) -> float:
    """Return the pictures/s of a loop that decodes a batch ahead."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = cores()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    graph = model / ("model.onnx" if variant == "fp32" else f"model.{variant}.onnx")
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    session.run(None, {"pixels": np.zeros((_BATCH, 3, _PHOTO_SIDE, _PHOTO_SIDE), np.uint8)})
    start = time.perf_counter()
    files = sorted(folder.iterdir())
    chunks = [files[at : at + _BATCH] for at in range(0, len(files), _BATCH)]
    rows = []
    with ThreadPoolExecutor(cores()) as pool:

        def decode(path: Path) -> PixelArray:
            return _decode(path, _PHOTO_SIDE, _PHOTO_EDGE)

        ahead = pool.map(decode, chunks[0])
        for following in [*chunks[1:], []]:
            pixels, ahead = np.stack(list(ahead)), pool.map(decode, following)
            rows.append(session.run(None, {"pixels": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))})[0])
    assert len(np.concatenate(rows)) == len(files)
    return len(files) / (time.perf_counter() - start)


def _decode(path: Path, side: int, edge: int) -> PixelArray:
    """Return the pixels (side, side, 3): the shortest edge becomes `edge`, and the middle is cut out."""
    with Image.open(io.BytesIO(path.read_bytes())) as picture:
        picture.draft("RGB", (2 * side, 2 * side))
        small = picture.convert("RGB")
    scale = edge / min(small.size)
    width, height = (max(edge, round(length * scale)) for length in small.size)
    small = small.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return np.asarray(small.crop((left, top, left + side, top + side)))


def _tiny_encoder(folder: Path) -> Path:
    """Write an encoder of one layer, from pixels of 32×32 to 64 numbers."""
    weights = np.random.default_rng(0).standard_normal((3 * _SIDE**2, _DIMENSION)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["pixels"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["cast"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 3, _SIDE, _SIDE])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", _DIMENSION])],
        [helper.make_tensor("weights", TensorProto.FLOAT, weights.shape, weights.tobytes(), raw=True)],
    )
    folder.mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "preprocessor_config.json").write_text(square_preprocessing(_SIDE).canonical)
    return folder


def _copies(photos: Path, folder: Path, count: int) -> Path:
    """Write so many files into a folder: the photographs, again and again."""
    folder.mkdir()
    originals = sorted(photos.iterdir())
    for number in range(count):
        path = originals[number % len(originals)]
        shutil.copy(path, folder / f"{path.stem}-{number // len(originals):04}{path.suffix}")
    return folder


def _print_memory(tiny: Path, work: Path) -> None:
    peaks = []
    for count in _SMALL_COUNTS:
        folder = work / f"{count}-small"
        # A thousand files, each under so many names.
        write_pictures(folder, 1000)
        originals = sorted(folder.rglob("*.png"))
        for number in range(1000, count):
            original = originals[number % 1000]
            original.with_name(f"{number}-{original.name}").hardlink_to(original)
        command = [sys.executable, "-c", _MEMORY, str(folder), str(tiny), str(work / f"{count}-out")]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print("\n| small pictures | peak memory, MB |\n|---|---|")
    for count, peak in zip(_SMALL_COUNTS, peaks, strict=True):
        print(f"| {count:,} | {peak / 1e6:.1f} |")
    print(f"\n{(peaks[1] - peaks[0]) / 1e6:.1f} MB more for ten times as many; the limit is 50.")


if __name__ == "__main__":
    typer.run(main)
