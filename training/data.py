"""SOURCE → pixel canvas: every picture decoded once, by the service's own function, and kept for all epochs."""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor
from torchvision import datasets
from tqdm import tqdm

from service import PixelArray
from service.card import Preprocessing
from service.errors import InvalidSource, LookalikeError
from service.images import Limits, decode_pixels, tones
from service.sources import Source, from_arrays, open_source, slice_source

_MOST_BAD = 0.05
_CHUNK = 64
_TONED = 4  # pictures of each chunk that the tone histogram looks at


@dataclass(frozen=True)
class Canvas:
    """Decoded pictures, ready for batches.

    Attributes:
        pixels: (N, C, S, S) uint8.
        tones: the pictures' tone histogram (images.tones).
    """

    pixels: Tensor
    tones: list[float]


def open_training_source(name: str, data_root: Path) -> Source:
    """Open a SOURCE for training: as in serving, plus cifar10/train and cifar10/test, and downloads.

    Raises:
        InvalidSource: as open_source, or the download failed.
    """
    set_name, bracket, slicing = name.partition("[")
    known = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}.get(set_name.split("/")[0])
    if known is None or set_name.split("/")[1:] not in (["train"], ["test"]):
        return open_source(name, data_root)
    train = set_name.endswith("/train")
    try:
        data = known(str(data_root), train=train)
    except RuntimeError:  # torchvision's word for: not there
        try:
            data = known(str(data_root), train=train, download=True)
        except Exception as error:
            raise InvalidSource(
                f"{set_name} is not under {data_root} and cannot be downloaded: {' '.join(str(error).split())}; "
                f"name the folder that has it, in torchvision's layout, with --data-root"
            ) from error
    if set_name.startswith("mnist"):
        return open_source(name, data_root)
    labels = [data.classes[label] for label in data.targets]
    source = from_arrays(name, np.asarray(data.data), labels, set_name)
    return slice_source(source, bracket + slicing)


def decode_canvas(source: Source, preprocessing: Preprocessing, channels: int) -> Canvas:
    """Decode a source once.

    Args:
        source: the pictures.
        preprocessing: gives S.
        channels: 1 keeps luminance only, 3 keeps RGB.

    Raises:
        InvalidSource: more than 5 % of the pictures are bad.

    Cost: N · C · S · S bytes of memory, said before the start.
    """
    side = preprocessing.side
    pixels = torch.empty((len(source), channels, side, side), dtype=torch.uint8)
    limits = Limits()

    def read(position: int) -> PixelArray | LookalikeError:
        try:
            return decode_pixels(source.entry(position).data, preprocessing, limits)
        except LookalikeError as error:
            return error

    def read_chunk(start: int) -> list[PixelArray | LookalikeError]:
        return [read(position) for position in range(start, min(start + _CHUNK, len(source)))]

    tqdm.write(f"{source.name}: {len(source)} pictures, {pixels.nbytes / 2**20:.0f} MiB decoded", file=sys.stderr)
    kept, bad = 0, 0
    histogram = np.zeros(16)
    # Threads hand over chunks: for pictures of a few pixels, passing each by itself costs more than decoding it.
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(source), desc="decoding", unit=" pictures", leave=False) as bar,
    ):
        for chunk in pool.map(read_chunk, range(0, len(source), _CHUNK)):
            for offset, result in enumerate(chunk):
                if isinstance(result, LookalikeError):
                    bad += 1
                    bar.write(f"skipped {source.ids[bar.n + offset]}: {result}", file=sys.stderr)
            good = [result for result in chunk if not isinstance(result, LookalikeError)]
            if good:
                stacked = np.stack(good)  # (n, S, S, 3)
                histogram += tones(stacked[:_TONED])
                pictures = torch.from_numpy(stacked).permute(0, 3, 1, 2)
                pixels[kept : kept + len(good)] = to_luminance(pictures) if channels == 1 else pictures
                kept += len(good)
            bar.update(len(chunk))
    if bad > _MOST_BAD * len(source):
        raise InvalidSource(f"{source.name}: {bad} of {len(source)} pictures are bad; mend or remove them")
    return Canvas(pixels[:kept], [round(share, 4) for share in histogram / histogram.sum()])


def to_luminance(pictures: Tensor) -> Tensor:
    """Return (..., 1, S, S) uint8 luminance of (..., 3, S, S) uint8; grey stays exactly what it was."""
    r, g, b = pictures.int().unbind(-3)
    grey: Tensor = (299 * r + 587 * g + 114 * b + 500) // 1000
    return grey.to(torch.uint8).unsqueeze(-3)


def batches(count: int, size: int, generator: Generator) -> Iterator[Tensor]:
    """Yield positions (size,) int64 without end: a new random order each epoch, the short last batch left out."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from torch.split(order[: count - count % size], size)
