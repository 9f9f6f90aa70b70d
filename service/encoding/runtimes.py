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
_GPU_SIZES = (1, 8, LARGEST_BATCH["cuda"])


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
        sizes: the numbers of pictures that it runs together, rising; none if it runs any number. Smaller batches are
            filled up.
        max_batch: the most pictures that are worth running together; the last of `sizes` if it has any.
        lanes: how many batches are worth running at a time.
    """

    runtime: ClassVar[str]
    provider: str
    kind: str
    sizes: tuple[int, ...]
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

    def _limit_batch(self, fixed: int | None) -> None:
        """Set sizes and max_batch, from kind and the only number of pictures that the graph takes, if it has one."""
        if fixed:
            self.sizes = (fixed,)
        elif self.kind == "cuda":
            self.sizes = _GPU_SIZES
        else:
            self.sizes = ()
        fitting = max(_LEAST_BATCH, _CPU_BATCH_PIXELS // (self._preprocessing.height * self._preprocessing.width))
        self.max_batch = self.sizes[-1] if self.sizes else min(LARGEST_BATCH["cpu"], fitting)

    def encode(self, pixels: Sequence[PixelArray] | PixelArray) -> FloatArray:
        """Embed a batch of pixels. See Encoder.encode."""
        with metrics.inference_seconds.time():
            return self.run(pixels)

    def run(self, pixels: Sequence[PixelArray] | PixelArray) -> FloatArray:
        """Embed pixels, in batches of the sizes that it runs, or else in one.

        Raises as Encoder.encode.
        """
        if not self.sizes:
            return self._run(pixels, len(pixels))
        parts = [pixels[start : start + self.max_batch] for start in range(0, len(pixels), self.max_batch)]
        return np.concatenate(
            [self._run(part, next(size for size in self.sizes if size >= len(part))) for part in parts]
        )

    def _run(self, pixels: Sequence[PixelArray] | PixelArray, size: int) -> FloatArray:
        batch = np.empty((size, 3, self._preprocessing.height, self._preprocessing.width), np.uint8)
        try:
            # It takes no other shape or type.
            np.stack([one.transpose(2, 0, 1) for one in pixels], out=batch[: len(pixels)])
            batch[len(pixels) :] = batch[len(pixels) - 1]
            raw = self._infer(self._prepare(batch))
        # Each runtime raises classes of its own.
        except Exception as error:
            if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY):
                raise OutOfMemory(f"{self._name}: no memory for a batch of {size} pictures") from error
            raise InvalidModel(f"{self._name}: inference failed: {reason(error)}") from error
        embeddings = _pool(np.asarray(raw, np.float32), self._output.pooling)
        if embeddings.ndim != 2 or len(embeddings) != size:
            pooled = f" after pooling by {self._output.pooling}" if self._output.pooling else ""
            raise InvalidModel(f"{self._name}: output {self._output.name} is {embeddings.shape}{pooled}, not (N, D)")
        embeddings = embeddings[: len(pixels)]
        norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or not norms.all():
            raise NoEmbedding(f"the encoder {self._name} gives this picture no embedding: zero or not finite")
        return np.asarray(embeddings / norms, np.float32)

    def warm_sizes(self, pixels: PixelArray) -> None:
        """Run every size of batch that will be served: a new one costs a GPU time, and a CPU memory.

        Args:
            pixels: (height, width, 3) of one picture.
        """
        for size in self.sizes or [self.max_batch]:
            self.warm_up(np.repeat(pixels[None], size, axis=0))

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
