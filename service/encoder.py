"""Pixels → unit embeddings, through onnxruntime."""

import math
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from service import FloatArray, PixelArray
from service.card import MODEL_FILE, VARIANTS, Card
from service.errors import InvalidModel, NoEmbedding

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}
_OUTPUTS = ("embedding", "image_embeds")
_CANARIES = 8  # pictures of the batch that measures variants
_LEAST_CANARY_COSINE = 0.9  # of noise, which no variant was calibrated for
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
        canary: pixels (S, S, 3) that it can embed, for a look at whether it still does.
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
        side = card.preprocessing.side
        canaries = np.random.default_rng(0).integers(0, 256, (_CANARIES, side, side, 3), dtype=np.uint8)
        self.canary = canaries[0]
        self.variant, self._graph = "fp32", _Graph(card, "fp32", card.model, device)
        self.dimension = self._graph.warm_up(canaries[:1]).shape[1]  # the graph's own shape may be symbolic
        if card.facts.get("dimension", self.dimension) != self.dimension:
            raise InvalidModel(
                f"{card.folder}: the graph gives {self.dimension} dimensions, card.json says {card.facts['dimension']}"
            )
        tried = {name: model for name, model in card.variants.items() if variant in ("auto", name)}
        if not tried:
            return
        expected = self._graph.warm_up(canaries)
        least = _GAIN * self._graph.seconds(canaries) if variant == "auto" else math.inf
        for name, model in tried.items():
            graph = _Graph(card, name, model, device)
            embeddings = graph.warm_up(canaries)
            if embeddings.shape != expected.shape or (expected * embeddings).sum(1).min() < _LEAST_CANARY_COSINE:
                raise InvalidModel(f"{graph.path}: is another encoder than {MODEL_FILE}")
            seconds = graph.seconds(canaries) if variant == "auto" else 0.0
            if seconds < least:
                self.variant, self._graph, least = name, graph, seconds

    @property
    def provider(self) -> str:
        """The onnxruntime provider that really runs it."""
        return self._graph.provider

    def encode(self, pixels: Sequence[PixelArray] | PixelArray) -> FloatArray:
        """Embed a batch of pixels.

        Args:
            pixels: N arrays (S, S, 3) uint8, or one (N, S, S, 3).

        Returns:
            (N, D) float32, rows of L2 norm 1.

        Raises:
            InvalidModel: the graph failed, or its output is not (N, D).
            NoEmbedding: a row of its output is zero or not finite.
        """
        return self._graph.run(np.asarray(pixels))


class _Graph:
    """One ONNX file in an onnxruntime session."""

    def __init__(self, card: Card, variant: str, model: bytes, device: str) -> None:
        self.path = card.folder / VARIANTS[variant]
        self._name, self._preprocessing = card.name, card.preprocessing
        options = ort.SessionOptions()
        options.intra_op_num_threads = _cores()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        wanted = device
        if device == "auto":
            wanted = "cuda" if _PROVIDERS["cuda"] in ort.get_available_providers() else "cpu"
        if wanted == "cuda":
            ort.preload_dlls()
        try:
            # From bytes: they are the ones that were verified, and a graph that points to data in other
            # files does not load at all.
            self._session = ort.InferenceSession(model, options, providers=[_PROVIDERS[wanted]])
        except Exception as error:  # onnxruntime raises a class of its own for every status
            raise InvalidModel(f"{self.path}: onnxruntime cannot load it: {_first_line(error)}") from error
        self.provider: str = self._session.get_providers()[0]
        if device == "cuda" and self.provider != _PROVIDERS["cuda"]:  # onnxruntime falls back silently
            raise InvalidModel(f"device cuda was asked for, but onnxruntime runs on {self.provider}")
        self._input, self._type = self._image_input()
        self._output = self._embedding_output()

    def run(self, pixels: PixelArray) -> FloatArray:
        """See Encoder.encode."""
        batch = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        try:
            (raw,) = self._session.run([self._output], {self._input: self._prepare(batch)})
        except Exception as error:
            raise InvalidModel(f"{self._name}: inference failed: {_first_line(error)}") from error
        embeddings = np.asarray(raw, np.float32)
        if embeddings.ndim != 2 or len(embeddings) != len(batch):
            raise InvalidModel(f"{self._name}: output {self._output} has shape {embeddings.shape}, not (N, D)")
        norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or not norms.all():
            raise NoEmbedding(f"the encoder {self._name} gives this picture no embedding: zero or not finite")
        return np.asarray(embeddings / norms, np.float32)

    def warm_up(self, pixels: PixelArray) -> FloatArray:
        """Run, and raise InvalidModel where that gives no embedding."""
        try:
            return self.run(pixels)
        except NoEmbedding as error:
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
        outputs = {node.name: node.shape for node in self._session.get_outputs()}
        for name in _OUTPUTS:
            if name in outputs:
                return name
        flat = [name for name, shape in outputs.items() if len(shape) == 2]
        if len(flat) != 1:
            raise InvalidModel(
                f"{self.path}: expected an output named embedding or image_embeds, or a single 2-D one; "
                f"it has {', '.join(outputs)}"
            )
        return str(flat[0])


def _cores() -> int:
    """The cores that this process may use, where the system tells; else all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
