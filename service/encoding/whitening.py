"""The step behind an encoder: subtract a mean from its embeddings, whiten them, make them unit length again.

Embeddings of contrastive encoders lie in a narrow cone, where two strangers have a cosine of 0.7 or 0.9. Learnt without
labels, this step opens the cone. It is one affine layer at the end of the graph, in float32 in every variant.
Source: Jégou and Chum, Negative evidences and co-occurrences in image retrieval, ECCV 2012.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from threadpoolctl import threadpool_limits

from service import FloatArray
from service.encoding.card import MODEL_FILE, Card, choose_output, fingerprint
from service.errors import InvalidModel

LEAST_LEARNT = 20  # pictures whose mean is one
_LEAST_WHITENED, _MOST_DIMENSIONS = 500, 512
_NOISE = 1e-6  # of float32 embeddings
_PREFIX = "whitening/"
_BARE = _PREFIX + "bare"  # the embedding that the encoder had before


class Whitening(NamedTuple):
    """An affine map of unit embeddings.

    mean: (D,) float32, subtracted.
    matrix: (D, d) float32 that the rest is multiplied by; None leaves it at centring.
    """

    mean: FloatArray
    matrix: FloatArray | None

    def apply(self, embeddings: FloatArray) -> FloatArray:
        """Return what the graph would give: (N, d) rows of L2 norm 1, of embeddings (N, D) of L2 norm 1."""
        rows = embeddings - self.mean
        if self.matrix is not None:
            rows = rows @ self.matrix
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def learn_whitening(embeddings: FloatArray, power: float, dimension: int) -> Whitening:
    """Learn mean and principal directions of embeddings.

    Args:
        embeddings: (N, D) of L2 norm 1, of pictures like those that will be searched.
        power: p, 0 <= p <= 1: a direction is divided by σ^p, its standard deviation; 0 rotates and truncates alone,
            1 whitens fully.
        dimension: d directions are kept, 1 <= d <= min(D, N − 1).

    Returns:
        The map. With power 0 and d = D nothing but centring is left, and there is no matrix.

    Raises:
        InvalidModel: all rows are the same.

    Cost: O(N · D²) in float64 on one thread, whose sums have one order: the same rows give the same bytes.
    """
    mean = embeddings.mean(0, dtype=np.float64)
    rows = embeddings - mean  # (N, D)
    if not (abs(rows) > _NOISE).any():
        raise InvalidModel("the encoder gives all these pictures the same embedding: there is nothing to learn")
    if power == 0 and dimension == embeddings.shape[1]:
        return Whitening(mean.astype(np.float32), None)
    with threadpool_limits(1, "blas"):
        _, values, directions = np.linalg.svd(rows, full_matrices=False)  # (min(N, D),), (min(N, D), D)
    values, directions = values[:dimension], directions[:dimension]
    # A direction and its opposite serve alike, and which one comes out differs between machines: fix the sign.
    largest = np.abs(directions).argmax(1)
    directions *= np.sign(directions[np.arange(len(directions)), largest])[:, None]
    # The scale is lost with the length: relative to the first direction, it keeps the numbers near 1.
    deviations: NDArray[np.float64] = np.maximum(values / values[0], np.finfo(np.float32).eps)
    return Whitening(mean.astype(np.float32), (directions / deviations[:, None] ** power).T.astype(np.float32))


def default_whitening(count: int, dimension: int) -> tuple[float, int]:
    """Return the power and the dimension that suit so many pictures to learn from.

    Measured on CIFAR-10 (docs/decisions/0016): of fewer than 500 pictures the smaller directions are noise, and only
    the mean is sure; from there on power 0.5 gains with every dimension that has a few pictures to learn it from.
    """
    if count < _LEAST_WHITENED:
        return 0.0, dimension
    return 0.5, min(dimension, _MOST_DIMENSIONS, count // 2)


def append_whitening(model: bytes, whitening: Whitening) -> bytes:
    """Return an encoder's ONNX graph with a whitening behind it; its output is `embedding`, of L2 norm 1.

    Args:
        model: a graph as the encoder takes it, without one; its embeddings need not be of length 1.

    Raises:
        InvalidModel: no output of it is an embedding.
    """
    proto = onnx.load_from_string(model)
    graph = proto.graph
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    name = choose_output({output.name: len(output.type.tensor_type.shape.dim) for output in graph.output})
    if name is None:
        raise InvalidModel(f"expected an output named embedding, or one that is 2-D; the graph has {_outputs(graph)}")
    (output,) = [output for output in graph.output if output.name == name]
    bare = graph.value_info.add()  # as what remove_whitening gives it back
    bare.CopyFrom(output)
    bare.name = _BARE
    _rename(graph, name, _BARE)

    def add(kind: str, inputs: list[str], **attributes: Any) -> str:
        name = f"{_PREFIX}{len(graph.node)}"
        graph.node.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(name: str, value: "NDArray[np.generic]") -> str:
        graph.initializer.append(numpy_helper.from_array(value, _PREFIX + name))
        return _PREFIX + name

    def unit(x: str) -> str:
        if opset < 18:  # axes were an attribute
            return add("Div", [x, add("ReduceL2", [x], axes=[1], keepdims=1)])
        return add("Div", [x, add("ReduceL2", [x, axis], keepdims=1)])

    axis = constant("axis", np.asarray([1], np.int64)) if opset >= 18 else ""
    x = _BARE
    if output.type.tensor_type.elem_type != TensorProto.FLOAT:
        x = add("Cast", [x], to=TensorProto.FLOAT)
    x = add("Sub", [unit(x), constant("mean", whitening.mean)])
    if whitening.matrix is not None:
        x = add("MatMul", [x, constant("matrix", whitening.matrix)])
    unit(x)
    graph.node[-1].output[0] = "embedding"
    dimension = whitening.mean.size if whitening.matrix is None else whitening.matrix.shape[1]
    _set_output(graph, helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", dimension]))
    return bytes(proto.SerializeToString(deterministic=True))


def remove_whitening(model: bytes) -> bytes | None:
    """Return an encoder's graph without the whitening behind it; None where it has none."""
    proto = onnx.load_from_string(model)
    graph = proto.graph
    bare = next((value for value in graph.value_info if value.name == _BARE), None)
    if bare is None:
        return None
    output = onnx.ValueInfoProto(name="embedding", type=bare.type)
    for parts in (graph.node, graph.initializer, graph.value_info):
        kept = [part for part in parts if not part.name.startswith(_PREFIX)]
        del parts[:]
        parts.extend(kept)
    _rename(graph, _BARE, "embedding")
    _set_output(graph, output)
    return bytes(proto.SerializeToString(deterministic=True))


def without_whitening(card: Card) -> Card:
    """Return an encoder's card with its graphs as they were before a whitening; of the facts, none is kept.

    Raises:
        InvalidModel: a variant has no whitening where model.onnx has one.
    """
    model = remove_whitening(card.model)
    if model is None:
        return replace(card, facts={})
    variants = {name: remove_whitening(graph) for name, graph in card.variants.items()}
    if missing := [name for name, graph in variants.items() if graph is None]:
        raise InvalidModel(f"{card.folder}: its variant {missing[0]} has no whitening, and {MODEL_FILE} has one")
    bare = {name: graph for name, graph in variants.items() if graph is not None}
    return replace(card, model=model, variants=bare, fingerprint=fingerprint(model, card.preprocessing), facts={})


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Give a tensor another name, wherever it is made and used."""
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == old:
                    names[place] = new


def _set_output(graph: onnx.GraphProto, output: onnx.ValueInfoProto) -> None:
    del graph.output[:]
    graph.output.append(output)


def _outputs(graph: onnx.GraphProto) -> str:
    return ", ".join(output.name for output in graph.output)
