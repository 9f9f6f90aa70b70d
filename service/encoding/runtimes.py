"""Run one ONNX graph in onnxruntime, on a CPU or a GPU: pixels → unit embeddings."""

import ctypes
import logging
import time
from collections.abc import Sequence
from platform import machine
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from service import FloatArray, PixelArray, cores, metrics
from service.encoding.card import OUTPUTS, VARIANTS, Card, Output, choose_output
from service.errors import InvalidModel, NoEmbedding, OutOfMemory

log = logging.getLogger("bentoml.lookalike")
VERSION: str = ort.__version__
# Larger batches are no faster per picture on a CPU, and every caller in them waits longer. 4 pictures of 224 × 224
# are as fast each there as 16, and their activations need 150 MB less.
LARGEST_BATCH = {"cpu": 16, "cuda": 64}
_LEAST_BATCH, _CPU_BATCH_PIXELS = 4, 4 * 224 * 224

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}
_NO_MEMORY = ("out of memory", "failed to allocate", "bad_alloc", "failed to grow", "cublas_status_alloc_failed")
_MEASURED_S = 0.3
# The sizes of batches that a GPU runs.
_BUCKETS = [2**power for power in range(LARGEST_BATCH["cuda"].bit_length())]


class Device(NamedTuple):
    """A processor that runs graphs: "cpu", or "cuda" with a GPU's number; if required, nothing replaces it."""

    kind: str
    number: int = 0
    required: bool = False


def find_devices(name: str) -> list[Device]:
    """Return every GPU that CUDA shows, or the CPU.

    Args:
        name: "cpu", "cuda", or "auto": CUDA if this onnxruntime has it and there is a GPU; without a GPU it warns.

    Raises:
        InvalidModel: "cuda", and this onnxruntime has no CUDA, or there is no GPU.
    """
    if name == "cpu" or _PROVIDERS["cuda"] not in ort.get_available_providers():
        if name == "cuda":
            raise InvalidModel(f"device cuda was asked for, but this onnxruntime has {ort.get_available_providers()}")
        return [Device("cpu")]
    # onnxruntime would try, print a page of errors, and take the CPU.
    gpus = _count_gpus()
    if not gpus:
        if name == "cuda":
            raise InvalidModel("device cuda was asked for, but CUDA finds no GPU here")
        log.warning("CUDA finds no GPU here: the encoder runs on the CPU")
        return [Device("cpu")]
    ort.preload_dlls()
    return [Device("cuda", number, name == "cuda") for number in range(gpus)]


def _count_gpus() -> int:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return count.value if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


class Graph:
    """One ONNX graph in an onnxruntime session. One thread at a time may call it.

    Attributes:
        path: its file, for messages.
        provider: the onnxruntime provider that really runs it.
        kind: the kind of device that really runs it, "cpu" or "cuda".
        fixed_batch: the only number of pictures that the graph takes, or None if it takes any.
        max_batch: the most pictures that are worth running together.
    """

    def __init__(self, card: Card, variant: str, model: bytes, device: Device, threads: int | None = None) -> None:
        """Open a graph.

        Args:
            card: the model folder, whose preprocessing the graph's input must fit.
            variant: the graph's name in VARIANTS.
            model: its bytes.
            device: runs it. onnxruntime may fall back to the CPU, unless the device is required.
            threads: on a CPU; as many as it may keep busy if None.

        Raises:
            InvalidModel: a graph outside the contract, or a required device that cannot be used.
        """
        self.path = card.folder / VARIANTS[variant]
        self._name, self._preprocessing = card.name, card.preprocessing
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or cores()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        settings: dict[str, Any] = {}
        if device.kind == "cuda":
            # HEURISTIC: a search for the best algorithm costs up to a second for each new shape.
            settings = {
                "device_id": device.number,
                "cudnn_conv_algo_search": "HEURISTIC",
                "arena_extend_strategy": "kSameAsRequested",
            }
        try:
            # Loaded from the verified bytes, so a graph that refers to data in other files fails.
            self._session = ort.InferenceSession(model, options, providers=[(_PROVIDERS[device.kind], settings)])
        # onnxruntime raises a class of its own for every status.
        except Exception as error:
            raise InvalidModel(f"{self.path}: onnxruntime cannot load it: {_first_line(error)}") from error
        self.provider: str = self._session.get_providers()[0]
        # onnxruntime falls back to the CPU silently.
        if device.required and self.provider != _PROVIDERS[device.kind]:
            raise InvalidModel(f"device {device.kind} was asked for, but onnxruntime runs on {self.provider}")
        self.kind = device.kind if self.provider == _PROVIDERS[device.kind] else "cpu"
        self._input, self._type, self.fixed_batch = self._image_input()
        self.max_batch = self.fixed_batch or LARGEST_BATCH[self.kind]
        if self.kind == "cpu" and not self.fixed_batch:
            fitting = _CPU_BATCH_PIXELS // (card.preprocessing.height * card.preprocessing.width)
            self.max_batch = min(self.max_batch, max(_LEAST_BATCH, fitting))
        self._output = self._embedding_output(card.output)

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
            (raw,) = self._session.run([self._output.name], {self._input: self._prepare(batch)})
        except Exception as error:
            if any(words in str(error).lower() for words in _NO_MEMORY):
                raise OutOfMemory(f"{self._name}: no memory for a batch of {len(batch)} pictures") from error
            raise InvalidModel(f"{self._name}: inference failed: {_first_line(error)}") from error
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
        """Return the shortest time of 2 to 10 runs, about 0.3 s in all."""
        taken: list[float] = []
        while len(taken) < 2 or (len(taken) < 10 and sum(taken) < _MEASURED_S):
            start = time.perf_counter()
            self.run(pixels)
            taken.append(time.perf_counter() - start)
        return min(taken)

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

    def _image_input(self) -> tuple[str, type[Any], int | None]:
        """Return the name, the type and the fixed batch of the graph's one input."""
        images = [node for node in self._session.get_inputs() if len(node.shape) == 4]
        if len(images) != 1 or len(self._session.get_inputs()) != 1 or images[0].type not in _TYPES:
            have = ", ".join(f"{node.name} {node.type} {node.shape}" for node in self._session.get_inputs())
            raise InvalidModel(
                f"{self.path}: expected one image input (N, 3, height, width) of uint8, float32 or float16; "
                f"it has {have}"
            )
        node, height, width = images[0], self._preprocessing.height, self._preprocessing.width
        if any(
            isinstance(have, int) and have != want
            for have, want in zip(node.shape[1:], (3, height, width), strict=True)
        ):
            raise InvalidModel(
                f"{self.path}: input {node.name} is {node.shape}, preprocessing gives 3x{height}x{width}"
            )
        fixed = node.shape[0] if isinstance(node.shape[0], int) else None
        return node.name, _TYPES[node.type], fixed

    def _embedding_output(self, named: Output | None) -> Output:
        outputs = {node.name: len(node.shape) for node in self._session.get_outputs()}
        output = choose_output(outputs, named)
        if output is None:
            expected = f"{' or '.join(OUTPUTS)}, or a single 2-D one" if named is None else named.name
            raise InvalidModel(f"{self.path}: expected an output named {expected}; it has {', '.join(outputs)}")
        return output


def _pool(values: FloatArray, pooling: str | None) -> FloatArray:
    """Return the embeddings (N, D) of tokens (N, T, D) or of a feature map (N, D, H, W); anything else as it is."""
    if pooling == "class" and values.ndim == 3:
        return values[:, 0]
    if pooling == "mean" and values.ndim in (3, 4):
        return np.asarray(values.mean((2, 3) if values.ndim == 4 else 1))
    return values


def worth_trying(variant: str, kind: str) -> bool:
    """Whether a variant can be the fastest on a kind of device.

    onnxruntime computes in float16 on GPUs and ARM. On an x86 CPU it converts every tensor to float32 and back.
    """
    return variant != "fp16" or kind != "cpu" or machine() not in ("x86_64", "AMD64")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
