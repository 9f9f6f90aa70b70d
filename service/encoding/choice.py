"""Which runtime and which arithmetic run an encoder here: measured when it is opened."""

import logging
from typing import NamedTuple

import numpy as np

from service import FloatArray, PixelArray
from service.encoding import openvino_graph
from service.encoding.card import LEAST_VARIANT_COSINE, MODEL_FILE, Card
from service.encoding.onnxruntime_graph import OnnxruntimeGraph, worth_trying
from service.encoding.openvino_graph import OpenvinoGraph
from service.encoding.runtimes import Device, Graph
from service.errors import InvalidModel

log = logging.getLogger("bentoml.lookalike")
RUNTIMES = ("onnxruntime", "openvino")
# Pictures that measure and compare graphs.
_CANARIES = 8
# Of a file of the card to model.onnx, on noise. The card has measured it on real pictures; noise only tells whether it
# is another encoder, and no variant was calibrated for it.
_LEAST_FILE_COSINE = 0.9
# A graph must save a tenth of the time of a more exact one to be worth its difference.
_GAIN = 0.9
_MEASURED_S = 0.6


class Choice(NamedTuple):
    """A runtime and a variant; either is "auto" in what a user asks for, neither in what was chosen."""

    runtime: str
    variant: str


def check_asked(card: Card, asked: Choice, device: str) -> None:
    """Raise InvalidModel unless an encoder can have the runtime and the variant that a user asks for.

    Args:
        card: the encoder's.
        asked: by the user.
        device: "auto", "cpu" or "cuda".
    """
    runtime, variant = asked
    have = ("fp32", *card.variants)
    if variant not in ("auto", "bf16", *have):
        raise InvalidModel(f"{card.folder}: has no variant {variant}; it has {', '.join(have)}")
    if runtime == "openvino" and device == "cuda":
        raise InvalidModel("runtime openvino runs on the CPU, but device cuda was asked for")
    if variant == "bf16" and (runtime == "onnxruntime" or device == "cuda"):
        raise InvalidModel("variant bf16 needs the runtime openvino, on a CPU")
    if (runtime == "openvino" or variant == "bf16") and not openvino_graph.is_installed():
        wanted = "runtime openvino" if runtime == "openvino" else "variant bf16"
        raise InvalidModel(
            f"{wanted} was asked for, but OpenVINO is not installed; requirements/serve-openvino.txt has it"
        )
    if variant == "bf16" and not openvino_graph.computes_bf16():
        raise InvalidModel("variant bf16 was asked for, but this processor has no instructions for bfloat16")


def choose(
    card: Card, model: OnnxruntimeGraph, asked: Choice, device: Device, threads: int | None
) -> tuple[Graph, bool]:
    """Return the fastest graph whose embeddings are near enough to model.onnx's, and whether several were tried.

    A graph in OpenVINO must give each canary an embedding of cosine 0.99 or more to that of the same file in
    onnxruntime. How near a file of the card is to model.onnx, the card has measured.

    Args:
        card: the encoder's, with the bytes of its variants.
        model: model.onnx in onnxruntime.
        asked: has passed `check_asked`.
        device: of `model`.
        threads: of a graph on a CPU; as many as it may keep busy if None.

    Raises:
        InvalidModel: a file is another encoder than model.onnx, or nothing that was asked for can be used.

    Cost: about 0.6 s for each graph after the first, beside the time to load it.
    """
    return _Trial(card, model, asked, device, threads).choose()


def canaries(height: int, width: int) -> PixelArray:
    """Return 8 pictures (8, height, width, 3) that graphs are compared on; every machine makes the same ones.

    Each has coarse and fine colours, whose amplitude falls with the frequency as in photographs, and a bright figure
    with a sharp edge. Half of them are in grey, and a quarter has a black background, as drawings have.
    """
    generator = np.random.default_rng(0)
    y, x = np.indices((height, width))
    made = []
    for number in range(_CANARIES):
        picture = np.zeros((height, width, 3))
        for cells in (2, 4, 8, 16):
            grid = generator.normal(0, 70 / cells**0.7, (cells, cells, 3))
            picture += grid[y * cells // height, x * cells // width]
        picture += 128
        if number % 2:
            picture = picture.mean(2, keepdims=True).repeat(3, 2)
        if number % 4 == 3:
            picture[:] = 0
        top, left, size = generator.uniform(0.2, 0.8), generator.uniform(0.2, 0.8), generator.uniform(0.15, 0.35)
        distance = np.hypot(y / height - top, x / width - left)
        figure = (distance < size) & (distance > size / 2)
        picture[figure] = generator.uniform(150, 255, 1 if number % 2 else 3)
        made.append(picture.clip(0, 255))
    return np.stack(made).astype(np.uint8)


class _Trial:
    """The graphs of one choice, each opened once at most."""

    def __init__(self, card: Card, model: OnnxruntimeGraph, asked: Choice, device: Device, threads: int | None) -> None:
        self._card, self._asked, self._device, self._threads = card, asked, device, threads
        self._files = {"fp32": model}
        self._canaries = canaries(card.preprocessing.height, card.preprocessing.width)

    def choose(self) -> tuple[Graph, bool]:
        wanted = [one for one in self._possible() if self._asked.variant in ("auto", one.variant)]
        if wanted == [Choice("onnxruntime", "fp32")]:
            return self._files["fp32"], False
        chosen, refused = None, ""
        for one in wanted:
            try:
                graph = self._open(one)
            except _Unusable as error:
                refused = str(error)
                log.log(error.level, "%s; it is not used", refused)
                continue
            if chosen is None or _saves_time(graph, chosen, self._canaries):
                chosen = graph
        if chosen is None:
            raise InvalidModel(refused)
        return chosen, len(wanted) > 1

    def _possible(self) -> list[Choice]:
        """Return all that may be the fastest here or was asked for by name, from exact to less exact."""
        runtime, variant = self._asked
        kind = self._files["fp32"].kind
        files = [name for name in self._card.variants if variant == name or worth_trying(name, kind)]
        found = [] if runtime == "openvino" else [Choice("onnxruntime", name) for name in ("fp32", *files)]
        if runtime != "onnxruntime" and kind == "cpu" and openvino_graph.is_installed():
            bf16 = ["bf16"] if openvino_graph.computes_bf16() else []
            found += [Choice("openvino", name) for name in ("fp32", *bf16, *files)]
        order = ("fp32", "bf16", "fp16", "int8")
        return sorted(found, key=lambda one: order.index(one.variant))

    def _open(self, one: Choice) -> Graph:
        """Open a graph and compare it.

        Raises:
            InvalidModel: the file is another encoder than model.onnx.
            _Unusable: OpenVINO cannot use it.
        """
        file = "fp32" if one.variant == "bf16" else one.variant
        like = self._file(file)
        if one.runtime == "onnxruntime":
            return like
        expected = _embed(like, self._canaries)
        try:
            graph = OpenvinoGraph(
                self._card, one.variant, self._card.variants.get(file, self._card.model), like, self._threads
            )
            embeddings = _embed(graph, self._canaries)
        except InvalidModel as error:
            raise _Unusable(str(error), logging.WARNING) from error
        if embeddings.shape != expected.shape:
            raise _Unusable(f"{graph.path}: OpenVINO gives other dimensions than onnxruntime", logging.WARNING)
        cosine = (expected * embeddings).sum(1).min()
        if not cosine >= LEAST_VARIANT_COSINE:
            told = (
                f"{graph.path}: OpenVINO in {one.variant} gives other embeddings than onnxruntime: cosine {cosine:.3f}"
            )
            raise _Unusable(told, logging.INFO)
        return graph

    def _file(self, name: str) -> OnnxruntimeGraph:
        """Return a file of the card in onnxruntime. Raises InvalidModel if it is another encoder than model.onnx."""
        if name not in self._files:
            graph = OnnxruntimeGraph(self._card, name, self._card.variants[name], self._device, self._threads)
            shape = (_CANARIES, self._card.preprocessing.height, self._card.preprocessing.width, 3)
            noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
            expected, embeddings = _embed(self._files["fp32"], noise), _embed(graph, noise)
            if embeddings.shape != expected.shape or (expected * embeddings).sum(1).min() < _LEAST_FILE_COSINE:
                raise InvalidModel(f"{graph.path}: is another encoder than {MODEL_FILE}")
            self._files[name] = graph
        return self._files[name]


def _embed(graph: Graph, pixels: PixelArray) -> FloatArray:
    """Return a graph's embeddings of pixels, in batches as it serves them."""
    size = graph.max_batch
    return np.concatenate([graph.warm_up(pixels[start : start + size]) for start in range(0, len(pixels), size)])


def _saves_time(graph: Graph, than: Graph, pixels: PixelArray) -> bool:
    """Whether a graph saves a tenth of another's time: the shortest of 2 to 10 runs of each, 0.6 s in all.

    The two take turns, so that other work on the machine slows both.
    """
    pixels = pixels[: graph.max_batch]
    taken: dict[Graph, list[float]] = {graph: [], than: []}
    while len(taken[graph]) < 2 or (len(taken[graph]) < 10 and sum(map(sum, taken.values())) < _MEASURED_S):
        for one, seconds in taken.items():
            seconds.append(one.seconds(pixels))
    return min(taken[graph]) < _GAIN * min(taken[than])


class _Unusable(Exception):
    """OpenVINO cannot run a graph as onnxruntime does; `level` is the one to log it at."""

    def __init__(self, message: str, level: int) -> None:
        super().__init__(message)
        self.level = level
