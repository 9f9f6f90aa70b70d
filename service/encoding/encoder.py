"""Pixels → unit embeddings, through onnxruntime."""

import ctypes
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from service import FloatArray, PixelArray, cores, metrics
from service.encoding.card import MODEL_FILE, OUTPUTS, VARIANTS, Card, choose_output
from service.errors import InvalidModel, NoEmbedding, OutOfMemory

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}
_CANARIES = 8  # pictures of the batch that measures variants
_LEAST_CANARY_COSINE = 0.9  # of noise, which no variant was calibrated for
_LEAST_KNOWN_COSINE = 0.999  # of float32 here to float32 where it was exported: other kernels, other roundings
_LEAST_OWN_COSINE = 0.9999  # of a graph to itself when it was opened
_LARGEST_BATCH = {"cpu": 16, "cuda": 64}  # on a CPU more are no faster by the picture, and all of them wait longer
_NO_MEMORY = ("out of memory", "failed to allocate", "bad_alloc", "failed to grow", "cublas_status_alloc_failed")
_GAIN = 0.9  # a variant must save a tenth of model.onnx's time to be worth its difference
_MEASURED_S = 0.3


class Encoder:
    """An ONNX image encoder in one embedding space.

    The graph decides: a uint8 input gets pixels as they are, a float32 input gets them rescaled and
    normalised as the card's preprocessing says. Output: `embedding`, else `image_embeds`, else the only
    2-D one.

    Attributes:
        card: the facts, the fingerprint among them.
        dimension: D.
        variant: which of the card's graphs runs; "fp32" is model.onnx itself.
        provider: the onnxruntime provider that really runs it.
        lanes: `encode` on each device; one is for one thread at a time, several lanes run together.
        max_batch: pictures that a lane takes at once.
    """

    def __init__(self, card: Card, device: str = "auto", variant: str = "fp32") -> None:
        """Open the graph, or the fastest of its variants, and warm it up.

        Args:
            card: the verified model folder.
            device: "cpu", "cuda", or "auto" for CUDA where onnxruntime can use it, else CPU.
            variant: a name in VARIANTS, or "auto" for the fastest here, as measured now.

        Raises:
            InvalidModel: a graph outside the contract, a variant that the card lacks or that is another encoder,
                or "cuda" where CUDA cannot be used.
        """
        if variant not in ("auto", "fp32", *card.variants):
            raise InvalidModel(f"{card.folder}: has no variant {variant}; it has {', '.join(('fp32', *card.variants))}")
        self.card = card
        devices = _devices(device)
        self.variant, graph = "fp32", _Graph(card, "fp32", card.model, devices[0])
        self._canary = canary(card.preprocessing.side)
        embedding = graph.warm_up(self._canary[None])[0]
        self.dimension = len(embedding)  # the graph's own shape may be symbolic
        if card.facts.get("dimension", self.dimension) != self.dimension:
            raise InvalidModel(
                f"{card.folder}: the graph gives {self.dimension} dimensions, card.json says {card.facts['dimension']}"
            )
        if card.canary is not None and not _alike(embedding, card.canary, _LEAST_KNOWN_COSINE):
            raise InvalidModel(
                f"{graph.path}: onnxruntime {ort.__version__} ({graph.provider}) gives another embedding of the canary "
                "picture here than card.json tells from its export"
            )
        tried = {name: model for name, model in card.variants.items() if variant in ("auto", name)}
        if tried:
            graph = self._choose(graph, tried, variant == "auto", devices[0])
        content = card.variants.get(self.variant, card.model)
        more = devices[1:] if graph.kind == "cuda" else []
        self._graphs = [graph, *(_Graph(card, self.variant, content, one) for one in more)]
        for lane in self._graphs:
            lane.warm_buckets(self._canary)
        self._known = graph.warm_up(self._canary[None])[0]
        self.lanes: list[Callable[[Sequence[PixelArray]], FloatArray]] = [lane.encode for lane in self._graphs]
        self.max_batch = _LARGEST_BATCH[graph.kind]
        metrics.tell_encoder(card.name, self.variant, self.provider, len(self.lanes))

    def _choose(self, model: "_Graph", tried: dict[str, bytes], fastest: bool, device: "_Device") -> "_Graph":
        """The variant that was asked for, or the fastest; where that is model.onnx, itself."""
        side = self.card.preprocessing.side
        canaries = np.random.default_rng(0).integers(0, 256, (_CANARIES, side, side, 3), dtype=np.uint8)
        expected = model.warm_up(canaries)
        chosen, least = model, _GAIN * model.seconds(canaries) if fastest else math.inf
        for name, content in tried.items():
            graph = _Graph(self.card, name, content, device)
            embeddings = graph.warm_up(canaries)
            if embeddings.shape != expected.shape or (expected * embeddings).sum(1).min() < _LEAST_CANARY_COSINE:
                raise InvalidModel(f"{graph.path}: is another encoder than {MODEL_FILE}")
            seconds = graph.seconds(canaries) if fastest else 0.0
            if seconds < least:
                self.variant, chosen, least = name, graph, seconds
        return chosen

    @property
    def provider(self) -> str:
        """The onnxruntime provider that really runs it."""
        return self._graphs[0].provider

    def encode(self, pixels: Sequence[PixelArray] | PixelArray) -> FloatArray:
        """Embed a batch of pixels, on the first lane.

        Args:
            pixels: N arrays (S, S, 3) uint8, or one (N, S, S, 3).

        Returns:
            (N, D) float32, rows of L2 norm 1.

        Raises:
            InvalidModel: the graph failed, or its output is not (N, D).
            OutOfMemory: there is not enough for this batch.
            NoEmbedding: a row of its output is zero or not finite.
        """
        return self._graphs[0].encode(pixels)

    def probe(self) -> FloatArray:
        """Return the embedding (D,) of the canary picture, from every lane in turn.

        Raises:
            InvalidModel: a lane gives another one than when it was opened, or none.
        """
        for lane in self._graphs:
            embedding: FloatArray = lane.warm_up(self._canary[None])[0]
            if not _alike(embedding, self._known, _LEAST_OWN_COSINE):
                raise InvalidModel(f"{lane.path}: the canary picture has another embedding than at the start")
        return embedding


class _Device(NamedTuple):
    kind: str
    number: int = 0
    required: bool = False


def canary(side: int) -> PixelArray:
    """Return the picture (S, S, 3) whose embedding a card tells: soft waves, of integers alone, the same everywhere."""
    y, x = np.indices((side, side)) * 256 // side
    waves = np.stack([x, (x + 2 * y) // 2, 255 - (3 * x + y) // 4], axis=2) * 2
    return np.asarray(255 - abs(waves % 511 - 255), np.uint8)


def _alike(one: FloatArray, other: FloatArray, least: float) -> bool:
    return one.shape == other.shape and float(one @ other) >= least  # NaN is not


def _devices(device: str) -> list[_Device]:
    """The devices that a wish means: every GPU that CUDA shows, or the CPU."""
    if device == "cpu" or _PROVIDERS["cuda"] not in ort.get_available_providers():
        if device == "cuda":
            raise InvalidModel(f"device cuda was asked for, but this onnxruntime has {ort.get_available_providers()}")
        return [_Device("cpu")]
    ort.preload_dlls()
    return [_Device("cuda", number, device == "cuda") for number in range(max(1, _gpus()))]


def _gpus() -> int:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return count.value if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


class _Graph:
    """One ONNX file in an onnxruntime session."""

    def __init__(self, card: Card, variant: str, model: bytes, device: _Device) -> None:
        self.path = card.folder / VARIANTS[variant]
        self._name, self._preprocessing = card.name, card.preprocessing
        options = ort.SessionOptions()
        options.intra_op_num_threads = cores()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        settings: dict[str, Any] = {}
        if device.kind == "cuda":  # algorithms by rule: a search costs up to a second for each new shape
            settings = {
                "device_id": device.number,
                "cudnn_conv_algo_search": "HEURISTIC",
                "arena_extend_strategy": "kSameAsRequested",
            }
        try:
            # From bytes: they are the ones that were verified, and a graph that points to data in other
            # files does not load at all.
            self._session = ort.InferenceSession(model, options, providers=[(_PROVIDERS[device.kind], settings)])
        except Exception as error:  # onnxruntime raises a class of its own for every status
            raise InvalidModel(f"{self.path}: onnxruntime cannot load it: {_first_line(error)}") from error
        self.provider: str = self._session.get_providers()[0]
        if device.required and self.provider != _PROVIDERS[device.kind]:  # onnxruntime falls back silently
            raise InvalidModel(f"device {device.kind} was asked for, but onnxruntime runs on {self.provider}")
        self.kind = device.kind if self.provider == _PROVIDERS[device.kind] else "cpu"
        self._input, self._type = self._image_input()
        self._output = self._embedding_output()

    def encode(self, pixels: Sequence[PixelArray] | PixelArray) -> FloatArray:
        """See Encoder.encode."""
        with metrics.inference_seconds.time():
            count = len(pixels)
            return self.run(np.asarray(self._padded(pixels)))[:count]

    def run(self, pixels: PixelArray) -> FloatArray:
        """Embed pixels (N, S, S, 3), in this shape."""
        batch = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        try:
            (raw,) = self._session.run([self._output], {self._input: self._prepare(batch)})
        except Exception as error:
            if any(words in str(error).lower() for words in _NO_MEMORY):
                raise OutOfMemory(f"{self._name}: no memory for a batch of {len(batch)} pictures") from error
            raise InvalidModel(f"{self._name}: inference failed: {_first_line(error)}") from error
        embeddings = np.asarray(raw, np.float32)
        if embeddings.ndim != 2 or len(embeddings) != len(batch):
            raise InvalidModel(f"{self._name}: output {self._output} has shape {embeddings.shape}, not (N, D)")
        norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or not norms.all():
            raise NoEmbedding(f"the encoder {self._name} gives this picture no embedding: zero or not finite")
        return np.asarray(embeddings / norms, np.float32)

    def warm_buckets(self, pixels: PixelArray) -> None:
        """Run every shape that `encode` will: a new one costs a GPU time, and a CPU memory."""
        for size in _buckets(self.kind):
            self.warm_up(np.repeat(pixels[None], size, axis=0))

    def _padded(self, pixels: Sequence[PixelArray] | PixelArray) -> Sequence[PixelArray] | PixelArray:
        """On a GPU, a batch of one of the sizes that were warmed up; a CPU takes any size as well as another."""
        if self.kind == "cpu":
            return pixels
        size = next((bucket for bucket in _buckets(self.kind) if bucket >= len(pixels)), len(pixels))
        return [*pixels, *[pixels[-1]] * (size - len(pixels))]

    def warm_up(self, pixels: PixelArray) -> FloatArray:
        """Run, and raise InvalidModel where that gives no embedding."""
        try:
            return self.run(pixels)
        except (NoEmbedding, OutOfMemory) as error:
            raise InvalidModel(f"{self.path}: {error}") from error

    def seconds(self, pixels: PixelArray) -> float:
        """Return the least time of a few runs."""
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
        return values

    def _image_input(self) -> tuple[str, type[Any]]:
        images = [node for node in self._session.get_inputs() if len(node.shape) == 4]
        if len(images) != 1 or len(self._session.get_inputs()) != 1 or images[0].type not in _TYPES:
            have = ", ".join(f"{node.name} {node.type} {node.shape}" for node in self._session.get_inputs())
            raise InvalidModel(f"{self.path}: expected one image input (N, 3, S, S) of uint8 or float32; it has {have}")
        node, side = images[0], self._preprocessing.side
        if any(
            isinstance(have, int) and have != want for have, want in zip(node.shape[1:], (3, side, side), strict=True)
        ):
            raise InvalidModel(f"{self.path}: input {node.name} is {node.shape}, preprocessing gives 3x{side}x{side}")
        return node.name, _TYPES[node.type]

    def _embedding_output(self) -> str:
        outputs = {node.name: len(node.shape) for node in self._session.get_outputs()}
        output = choose_output(outputs)
        if output is None:
            raise InvalidModel(
                f"{self.path}: expected an output named {' or '.join(OUTPUTS)}, or a single 2-D one; "
                f"it has {', '.join(outputs)}"
            )
        return output


def _buckets(kind: str) -> list[int]:
    """The sizes of batch to warm up, the largest last."""
    largest = _LARGEST_BATCH[kind]
    return [largest] if kind == "cpu" else [2**power for power in range(largest.bit_length())]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
