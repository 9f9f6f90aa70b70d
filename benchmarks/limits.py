"""The machine's limits without HTTP: decoding alone, onnxruntime alone, and both in a bare loop."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

import numpy as np
import onnxruntime as ort

from service import PixelArray
from service.encoding.card import VARIANTS, Card, read_card
from service.encoding.images import decode_pixels
from service.encoding.limits import Limits

_THREADS = 2
_BATCH = 16
# Pictures decoded ahead of the running batch.
_AHEAD = 3 * _BATCH


def decoding(model: Path, photos: list[bytes], seconds: float, threads: int = _THREADS) -> float:
    """Return pictures/s that threads of this process decode and resize as the service does."""
    card = read_card(model)

    def decode_on(photos: list[bytes]) -> int:
        count, end = 0, time.perf_counter() + seconds
        for photo in cycle(photos):
            _decode(photo, card)
            count += 1
            if time.perf_counter() > end:
                break
        return count

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(decode_on, [photos] * threads)) / seconds


def inference(model: Path, variant: str, batch: int, seconds: float) -> float:
    """Return pictures/s that onnxruntime embeds on two threads, in batches."""
    run, side = _session(model, variant), read_card(model).preprocessing.side
    pixels = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    run(pixels)
    count, begun = 0, time.perf_counter()
    while time.perf_counter() < begun + seconds:
        run(pixels)
        count += batch
    return count / (time.perf_counter() - begun)


def bare_loop(model: Path, variant: str, photos: list[bytes], seconds: float) -> float:
    """Return pictures/s of the whole work without HTTP: two threads decode ahead of a loop that runs batches."""
    card, run = read_card(model), _session(model, variant)
    source = cycle(photos)
    with ThreadPoolExecutor(_THREADS) as threads:
        decoded = [threads.submit(_decode, next(source), card) for _ in range(_AHEAD)]
        count, begun = 0, time.perf_counter()
        while time.perf_counter() < begun + seconds:
            batch, decoded = decoded[:_BATCH], decoded[_BATCH:]
            decoded += [threads.submit(_decode, next(source), card) for _ in range(_BATCH)]
            run(np.stack([one.result() for one in batch]))
            count += _BATCH
        return count / (time.perf_counter() - begun)


def _decode(photo: bytes, card: Card) -> PixelArray:
    return decode_pixels(photo, card.preprocessing, Limits())


def _session(model: Path, variant: str) -> Callable[[PixelArray], object]:
    """Open a session with the service's options; return a function that runs pixels (N, S, S, 3)."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = _THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(model / VARIANTS[variant]), options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixels": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))})
