"""Pixels → unit embeddings: open an encoder, warm it up, check it, and encode."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from service import FloatArray, PixelArray
from service.encoding.card import Card
from service.encoding.choice import Choice, check_asked, choose
from service.encoding.onnxruntime_graph import VERSION, OnnxruntimeGraph, find_devices
from service.encoding.runtimes import Device, Graph
from service.errors import InvalidModel

# Cosine of model.onnx here to model.onnx on the exporting machine, whose kernels round differently.
_LEAST_KNOWN_COSINE = 0.999
# Cosine of a graph to its own result when it was opened.
_LEAST_OWN_COSINE = 0.9999


class Encoder:
    """An ONNX image encoder in one embedding space. Opening one changes nothing outside it.

    The graph decides: a uint8 input gets pixels as they are, a float32 or float16 input gets them rescaled and
    normalised as the card's preprocessing says. The output is the one that the card names, else `embedding`, else
    `image_embeds`, else the only 2-D output.

    Attributes:
        card: the facts, the fingerprint among them.
        dimension: D.
        variant: the arithmetic that runs: a graph of the card, of which "fp32" is model.onnx itself, or "bf16" for
            model.onnx in bfloat16.
        runtime: "onnxruntime" or "openvino".
        compared: whether several runtimes or variants were tried when it was opened, to choose the fastest.
        lanes: `encode` for each batch that runs at a time, on one device or several. One thread at a time may call a
            lane; several lanes run together.
        max_batch: the most pictures that a lane takes at once.
    """

    def __init__(
        self,
        card: Card,
        device: str = "auto",
        variant: str = "fp32",
        threads: int | None = None,
        runtime: str = "onnxruntime",
        measured: str = "",
    ) -> None:
        """Open the graph, or the fastest of its variants and runtimes, and warm it up.

        Args:
            card: the verified model folder.
            device: "cpu", "cuda", or "auto" for CUDA where onnxruntime can use it, else CPU.
            variant: a name in VARIANTS, "bf16", or "auto" for the fastest here, as measured now.
            threads: of a graph on a CPU; as many as it may keep busy if None.
            runtime: "onnxruntime", "openvino", or "auto" for the faster, as measured now.
            measured: what `choice` was in another process of this machine, in place of a measurement; without effect if
                that was another encoder.

        Raises:
            InvalidModel: a graph outside the contract, a variant that the card lacks or that is another encoder,
                or "cuda", OpenVINO or "bf16" if they cannot be used.
        """
        fingerprint, _, known = measured.partition(":")
        asked = Choice(*known.split(":")) if fingerprint == card.fingerprint else Choice(runtime, variant)
        check_asked(card, asked, device)
        self.card = card
        devices = [Device("cpu")] if asked.runtime == "openvino" else find_devices(device)
        model = OnnxruntimeGraph(card, "fp32", card.model, devices[0], threads)
        self._canary = canary(card.preprocessing.height, card.preprocessing.width)
        self.dimension = self._check_canary(card, model)
        graph, self.compared = choose(card, model, asked, devices[0], threads)
        self.runtime, self.variant = graph.runtime, graph.variant
        content = card.variants.get(self.variant, card.model)
        more = devices[1:] if graph.kind == "cuda" else []
        self._graphs: list[Graph] = [graph, *(OnnxruntimeGraph(card, self.variant, content, one) for one in more)]
        for one in self._graphs:
            one.warm_sizes(self._canary)
        self._known = graph.warm_up(self._canary[None])[0]
        self.lanes: list[Callable[[Sequence[PixelArray]], FloatArray]] = [
            one.encode for one in self._graphs for _ in range(one.lanes)
        ]
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

    @property
    def provider(self) -> str:
        """What really runs it: a provider of onnxruntime, or "OpenVINO"."""
        return self._graphs[0].provider

    @property
    def choice(self) -> str:
        """The encoder and what runs it here, "FINGERPRINT:RUNTIME:VARIANT", for `measured` of another process."""
        return f"{self.card.fingerprint}:{self.runtime}:{self.variant}"

    def encode(self, pixels: Sequence[PixelArray] | PixelArray) -> FloatArray:
        """Embed a batch of pixels, on the first device.

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

    def drop_files(self) -> None:
        """Drop the bytes of the graphs, of which the sessions have copies. For a service: it writes no encoder."""
        self.card = replace(self.card, model=b"", variants={})

    def probe(self) -> FloatArray:
        """Return the embedding (D,) of the canary picture, after computing it on every device.

        Raises:
            InvalidModel: a device fails, or gives another embedding than when it was opened.
        """
        for one in self._graphs:
            embedding: FloatArray = one.warm_up(self._canary[None])[0]
            if not _alike(embedding, self._known, _LEAST_OWN_COSINE):
                raise InvalidModel(f"{one.path}: the canary picture has another embedding than at the start")
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
