"""What runs an encoder's graph: pixels → unit embeddings, whichever runtime computes them."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from service import FloatArray, PixelArray, metrics
from service.encoding.card import VARIANTS, Card, Output, Preprocessing
from service.errors import InvalidModel, NoEmbedding, OutOfMemory

# Larger batches are no faster per picture on a CPU, and every caller in them waits longer. 4 pictures of 224 × 224
# are as fast each there as 16, and their activations need 150 MB less.
LARGEST_BATCH = {"cpu": 16, "cuda": 64}
_LEAST_BATCH, _CPU_BATCH_PIXELS = 4, 4 * 224 * 224

_NO_MEMORY = ("out of memory", "failed to allocate", "bad_alloc", "failed to grow", "cublas_status_alloc_failed")
# The sizes of batches that a GPU runs.
_BUCKETS = [2**power for power in range(LARGEST_BATCH["cuda"].bit_length())]


class Device(NamedTuple):
    """A processor that runs graphs: "cpu", or "cuda" with a GPU's number; if required, nothing replaces it."""

    kind: str
    number: int = 0
    required: bool = False


class Graph(ABC):
    """One ONNX graph, opened by a runtime in one arithmetic.

    A subclass opens it, sets all attributes below, and computes its output.

    Attributes:
        runtime: "onnxruntime" or "openvino".
        variant: its arithmetic: a name in VARIANTS, or "bf16" for model.onnx computed in bfloat16.
        path: its file, for messages.
        provider: what really runs it: a provider of onnxruntime, or "OpenVINO".
        kind: the kind of device that really runs it, "cpu" or "cuda".
        fixed_batch: the only number of pictures that the graph takes, or None if it takes any.
        max_batch: the most pictures that are worth running together.
        lanes: how many batches are worth running at a time.
    """

    runtime: ClassVar[str]
    provider: str
    kind: str
    fixed_batch: int | None
    max_batch: int
    lanes: int = 1
    _input: str
    _type: type[Any]
    _output: Output

    def __init__(self, card: Card, variant: str) -> None:
        """Note the encoder's name, file and preprocessing."""
        self.variant = variant
        self.path: Path = card.folder / VARIANTS.get(variant, VARIANTS["fp32"])
        self._name: str = card.name
        self._preprocessing: Preprocessing = card.preprocessing

    @abstractmethod
    def _infer(self, batch: PixelArray | FloatArray) -> Any:
        """Return the graph's output for its input (N, 3, height, width), as an array that stays as it is."""

    def _limit_batch(self) -> None:
        """Set max_batch, from fixed_batch and kind."""
        self.max_batch = self.fixed_batch or LARGEST_BATCH[self.kind]
        if self.kind == "cpu" and not self.fixed_batch:
            fitting = _CPU_BATCH_PIXELS // (self._preprocessing.height * self._preprocessing.width)
            self.max_batch = min(self.max_batch, max(_LEAST_BATCH, fitting))

    def encode(self, pixels: Sequence[PixelArray] | PixelArray) -> FloatArray:
        """Embed a batch of pixels. See Encoder.encode."""
        with metrics.inference_seconds.time():
            count = len(pixels)
            return self.run(np.asarray(self._padded(pixels)))[:count]

    def run(self, pixels: PixelArray) -> FloatArray:
        """Embed pixels (N, height, width, 3) in batches of the size that the graph fixes, or else in one.

        Raises as Encoder.encode.
        """
        size = self.fixed_batch or len(pixels)
        if len(pixels) == size:
            return self._run(pixels)
        parts = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        filled = [np.concatenate([part, part[-1:].repeat(size - len(part), 0)]) for part in parts]
        return np.concatenate([self._run(part) for part in filled])[: len(pixels)]

    def _run(self, pixels: PixelArray) -> FloatArray:
        batch = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        try:
            raw = self._infer(self._prepare(batch))
        # Each runtime raises classes of its own.
        except Exception as error:
            if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY):
                raise OutOfMemory(f"{self._name}: no memory for a batch of {len(batch)} pictures") from error
            raise InvalidModel(f"{self._name}: inference failed: {reason(error)}") from error
        embeddings = _pool(np.asarray(raw, np.float32), self._output.pooling)
        if embeddings.ndim != 2 or len(embeddings) != len(batch):
            pooled = f" after pooling by {self._output.pooling}" if self._output.pooling else ""
            raise InvalidModel(f"{self._name}: output {self._output.name} is {embeddings.shape}{pooled}, not (N, D)")
        norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or not norms.all():
            raise NoEmbedding(f"the encoder {self._name} gives this picture no embedding: zero or not finite")
        return np.asarray(embeddings / norms, np.float32)

    def warm_buckets(self, pixels: PixelArray) -> None:
        """Run every batch size that `encode` pads to: a new shape costs a GPU time, and a CPU memory.

        Args:
            pixels: (height, width, 3) of one picture.
        """
        for size in [self.max_batch] if self.fixed_batch or self.kind == "cpu" else _BUCKETS:
            self.warm_up(np.repeat(pixels[None], size, axis=0))

    def _padded(self, pixels: Sequence[PixelArray] | PixelArray) -> Sequence[PixelArray] | PixelArray:
        """Pad a batch to a size that was warmed up; a CPU runs any size equally well, and `run` fills a fixed one."""
        if self.kind == "cpu" or self.fixed_batch:
            return pixels
        size = next((bucket for bucket in _BUCKETS if bucket >= len(pixels)), len(pixels))
        return [*pixels, *[pixels[-1]] * (size - len(pixels))]

    def warm_up(self, pixels: PixelArray) -> FloatArray:
        """Run as `run`; raise InvalidModel instead of NoEmbedding and OutOfMemory."""
        try:
            return self.run(pixels)
        except (NoEmbedding, OutOfMemory) as error:
            raise InvalidModel(f"{self.path}: {error}") from error

    def seconds(self, pixels: PixelArray) -> float:
        """Return the time that all lanes need for a batch each, divided by their number."""
        start = time.perf_counter()
        self._on_every_lane(self.run, pixels)
        return (time.perf_counter() - start) / self.lanes

    def _on_every_lane(self, work: Callable[[PixelArray], FloatArray], pixels: PixelArray) -> None:
        """Call a method on all lanes at a time."""
        with ThreadPoolExecutor(self.lanes) as threads:
            others = [threads.submit(work, pixels) for _ in range(self.lanes - 1)]
            work(pixels)
            for other in others:
                other.result()

    def _prepare(self, batch: PixelArray) -> PixelArray | FloatArray:
        if self._type == np.uint8:
            return batch
        preprocessing = self._preprocessing
        values = batch.astype(np.float32)
        if preprocessing.rescale is not None:
            values *= np.float32(preprocessing.rescale)
        if preprocessing.mean is not None and preprocessing.std is not None:
            values -= np.asarray(preprocessing.mean, np.float32).reshape(1, 3, 1, 1)
            values /= np.asarray(preprocessing.std, np.float32).reshape(1, 3, 1, 1)
        return values.astype(self._type, copy=False)


def _pool(values: FloatArray, pooling: str | None) -> FloatArray:
    """Return the embeddings (N, D) of tokens (N, T, D) or of a feature map (N, D, H, W); anything else as it is."""
    if pooling == "class" and values.ndim == 3:
        return values[:, 0]
    if pooling == "mean" and values.ndim in (3, 4):
        return np.asarray(values.mean((2, 3) if values.ndim == 4 else 1))
    return values


def reason(error: Exception) -> str:
    """Return the first line of an error's message that says what happened, at most 300 characters of it."""
    lines = [line.strip() for line in str(error).splitlines()]
    # OpenVINO tells the places in its source first.
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return told[0][:300] if told else type(error).__name__
