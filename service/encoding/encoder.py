"""Pixels → unit embeddings: choose an encoder's variant, warm it up, check it, and encode."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from service import FloatArray, PixelArray
from service.encoding.card import MODEL_FILE, Card
from service.encoding.runtimes import VERSION, Device, Graph, find_devices, worth_trying
from service.errors import InvalidModel

# Noise pictures in the batch that measures and compares variants. No variant was calibrated for noise, so the cosine to
# model.onnx may be lower than for real pictures.
_CANARIES = 8
_LEAST_CANARY_COSINE = 0.9
# Cosine of model.onnx here to model.onnx on the exporting machine, whose kernels round differently.
_LEAST_KNOWN_COSINE = 0.999
# Cosine of a graph to its own result when it was opened.
_LEAST_OWN_COSINE = 0.9999
# A variant must save a tenth of model.onnx's time to be worth its difference.
_GAIN = 0.9


class Encoder:
    """An ONNX image encoder in one embedding space. Opening one changes nothing outside it.

    The graph decides: a uint8 input gets pixels as they are, a float32 or float16 input gets them rescaled and
    normalised as the card's preprocessing says. The output is the one that the card names, else `embedding`, else
    `image_embeds`, else the only 2-D output.

    Attributes:
        card: the facts, the fingerprint among them; without the bytes of the graphs, of which the sessions have copies.
        dimension: D.
        variant: the card's graph that runs; "fp32" is model.onnx itself.
        lanes: `encode` on each device. One thread at a time may call a lane; several lanes run together.
        max_batch: the most pictures that a lane takes at once.
    """

    def __init__(self, card: Card, device: str = "auto", variant: str = "fp32", threads: int | None = None) -> None:
        """Open the graph, or the fastest of its variants, and warm it up.

        Args:
            card: the verified model folder.
            device: "cpu", "cuda", or "auto" for CUDA where onnxruntime can use it, else CPU.
            variant: a name in VARIANTS, or "auto" for the fastest here, as measured now.
            threads: of a graph on a CPU; as many as it may keep busy if None.

        Raises:
            InvalidModel: a graph outside the contract, a variant that the card lacks or that is another encoder,
                or "cuda" if CUDA cannot be used.
        """
        if variant not in ("auto", "fp32", *card.variants):
            raise InvalidModel(f"{card.folder}: has no variant {variant}; it has {', '.join(('fp32', *card.variants))}")
        self.card = replace(card, model=b"", variants={})
        devices = find_devices(device)
        self.variant, graph = "fp32", Graph(card, "fp32", card.model, devices[0], threads)
        self._canary = canary(card.preprocessing.height, card.preprocessing.width)
        self.dimension = self._check_canary(card, graph)
        tried = {
            name: model
            for name, model in card.variants.items()
            if variant == name or (variant == "auto" and worth_trying(name, graph.kind))
        }
        if tried:
            graph = self._choose(card, graph, tried, variant == "auto", devices[0], threads)
        content = card.variants.get(self.variant, card.model)
        more = devices[1:] if graph.kind == "cuda" else []
        self._graphs = [graph, *(Graph(card, self.variant, content, one) for one in more)]
        for lane in self._graphs:
            lane.warm_buckets(self._canary)
        self._known = graph.warm_up(self._canary[None])[0]
        self.lanes: list[Callable[[Sequence[PixelArray]], FloatArray]] = [lane.encode for lane in self._graphs]
        self.max_batch = graph.max_batch

    def _check_canary(self, card: Card, graph: Graph) -> int:
        """Compare the canary's embedding with the card; return its dimension, which the graph may leave symbolic."""
        embedding = graph.warm_up(self._canary[None])[0]
        dimension = len(embedding)
        if card.facts.get("dimension", dimension) != dimension:
            raise InvalidModel(
                f"{card.folder}: the graph gives {dimension} dimensions, card.json says {card.facts['dimension']}"
            )
        if card.canary is not None and not _alike(embedding, card.canary, _LEAST_KNOWN_COSINE):
            raise InvalidModel(
                f"{graph.path}: onnxruntime {VERSION} ({graph.provider}) gives another embedding of the canary "
                "picture here than card.json tells from its export"
            )
        return dimension

    def _choose(
        self, card: Card, model: Graph, tried: dict[str, bytes], fastest: bool, device: Device, threads: int | None
    ) -> Graph:
        """Open the variants tried; return the fastest of them and `model`, or the one variant that was asked for."""
        shape = (_CANARIES, card.preprocessing.height, card.preprocessing.width, 3)
        canaries = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        expected = model.warm_up(canaries)
        chosen, least = model, _GAIN * model.seconds(canaries) if fastest else math.inf
        for name, content in tried.items():
            graph = Graph(card, name, content, device, threads)
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
            pixels: N arrays (height, width, 3) uint8, or one (N, height, width, 3).

        Returns:
            (N, D) float32, rows of L2 norm 1.

        Raises:
            InvalidModel: the graph failed, or its output is not (N, D).
            OutOfMemory: the device has too little memory for this batch.
            NoEmbedding: a row of its output is zero or not finite.
        """
        return self._graphs[0].encode(pixels)

    def probe(self) -> FloatArray:
        """Return the embedding (D,) of the canary picture, after computing it on every lane.

        Raises:
            InvalidModel: a lane fails, or gives another embedding than when it was opened.
        """
        for lane in self._graphs:
            embedding: FloatArray = lane.warm_up(self._canary[None])[0]
            if not _alike(embedding, self._known, _LEAST_OWN_COSINE):
                raise InvalidModel(f"{lane.path}: the canary picture has another embedding than at the start")
        return embedding


def canary(height: int, width: int | None = None) -> PixelArray:
    """Return the picture (height, width, 3) whose embedding a card records; without a width, a square one.

    It shows soft waves, computed in integers alone, so every machine makes the same one.
    """
    width = height if width is None else width
    y, x = np.indices((height, width)) * 256 // np.array([height, width]).reshape(2, 1, 1)
    waves = np.stack([x, (x + 2 * y) // 2, 255 - (3 * x + y) // 4], axis=2) * 2
    return np.asarray(255 - abs(waves % 511 - 255), np.uint8)


def _alike(one: FloatArray, other: FloatArray, least: float) -> bool:
    """Whether two unit embeddings (D,) have at least this cosine; NaN has not."""
    return one.shape == other.shape and float(one @ other) >= least
