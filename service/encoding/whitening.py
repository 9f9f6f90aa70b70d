"""Whitening at the end of an encoder: subtract a mean from its embeddings, whiten them, make them unit length again.

Embeddings of contrastive encoders lie in a narrow cone, where two unrelated pictures have a cosine of 0.7 or 0.9. This
step widens the cone, and is learnt without labels. It is one affine layer at the end of the graph, in float32 in every
variant.
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
from service.encoding.card import MODEL_FILE, Card, Output, choose_output, fingerprint
from service.errors import InvalidModel

# The fewest pictures to learn a mean from.
LEAST_LEARNT = 20
_LEAST_WHITENED, _MOST_DIMENSIONS = 500, 512
# Rounding of float32 embeddings.
_NOISE = 1e-6
_PREFIX = "whitening/"
# The name that the encoder's own embedding gets in the graph.
_BARE = _PREFIX + "bare"


class Whitening(NamedTuple):
    """An affine map of unit embeddings.

    mean: (D,) float32, subtracted first.
    matrix: (D, d) float32, multiplied then; None for centring alone.
    """

    mean: FloatArray
    matrix: FloatArray | None

    def apply(self, embeddings: FloatArray) -> FloatArray:
        """Return (N, d) rows of L2 norm 1 for embeddings (N, D) of L2 norm 1, as the graph computes them."""
        rows = embeddings - self.mean
        if self.matrix is not None:
            rows = rows @ self.matrix
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def learn_whitening(embeddings: FloatArray, power: float, dimension: int) -> Whitening:
    """Learn mean and principal directions of embeddings.

    Args:
        embeddings: (N, D) of L2 norm 1, of pictures like those that will be searched.
        power: p, 0 <= p <= 1: each direction is divided by σ^p, σ its standard deviation. 0 only rotates and truncates,
            1 whitens fully.
        dimension: d, the number of directions kept, 1 <= d <= min(D, N − 1).

    Returns:
        The map; it has no matrix if power is 0 and d = D, because a rotation changes no cosine.

    Raises:
        InvalidModel: all rows are the same.

    Cost: O(N · D²) in float64 on one thread, which sums in a fixed order: the same rows give the same bytes.
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
    # A direction and its opposite are equally good, and machines differ in which one they return: fix the sign.
    largest = np.abs(directions).argmax(1)
    directions *= np.sign(directions[np.arange(len(directions)), largest])[:, None]
    # The scale does not matter, since rows become unit length; relative to the first direction, numbers stay near 1.
    deviations: NDArray[np.float64] = np.maximum(values / values[0], np.finfo(np.float32).eps)
    return Whitening(mean.astype(np.float32), (directions / deviations[:, None] ** power).T.astype(np.float32))


def default_whitening(count: int, dimension: int) -> tuple[float, int]:
    """Return the power and the dimension that suit this number of pictures.

    Measured on CIFAR-10 (docs/decisions/0016): with fewer than 500 pictures the smaller directions are noise, and only
    the mean is reliable; with more, power 0.5 gains with each dimension that has a few pictures to learn it from.

    Args:
        count: of pictures to learn from.
        dimension: D, of the encoder.
    """
    if count < _LEAST_WHITENED:
        return 0.0, dimension
    return 0.5, min(dimension, _MOST_DIMENSIONS, count // 2)


def append_whitening(model: bytes, whitening: Whitening, named: Output | None = None) -> bytes:
    """Return an encoder's ONNX graph with a whitening at its end; its output is `embedding`, of L2 norm 1.

    Args:
        model: a graph within the contract, without a whitening; its embeddings need not be of length 1.
        whitening: the map to append.
        named: the output that the card names; its pooling becomes a part of the graph.

    Raises:
        InvalidModel: no output of the graph is an embedding.
    """
    proto = onnx.load_from_string(model)
    graph = proto.graph
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    axes = {output.name: len(output.type.tensor_type.shape.dim) for output in graph.output}
    chosen = choose_output(axes, named)
    if chosen is None:
        raise InvalidModel(f"expected an output named embedding, or one that is 2-D; the graph has {_outputs(graph)}")
    (output,) = [output for output in graph.output if output.name == chosen.name]
    if chosen.pooling is not None:
        output = _append_pooling(graph, output, chosen.pooling, opset)
    # remove_whitening makes this the output again.
    bare = graph.value_info.add()
    bare.CopyFrom(output)
    bare.name = _BARE
    _rename(graph, output.name, _BARE)

    def add(kind: str, inputs: list[str], **attributes: Any) -> str:
        name = f"{_PREFIX}{len(graph.node)}"
        graph.node.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(name: str, value: "NDArray[np.generic]") -> str:
        graph.initializer.append(numpy_helper.from_array(value, _PREFIX + name))
        return _PREFIX + name

    def unit(x: str) -> str:
        # Before opset 18, axes were an attribute.
        if opset < 18:
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
    """Return an encoder's graph without its whitening, or None if it has none."""
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
    """Return a card whose graphs have no whitening, and which has no facts but the output that it names.

    Raises:
        InvalidModel: model.onnx has a whitening, and a variant has none.
    """
    model = remove_whitening(card.model)
    if model is None:
        return replace(card, facts={key: value for key, value in card.facts.items() if key == "output"})
    variants = {name: remove_whitening(graph) for name, graph in card.variants.items()}
    if missing := [name for name, graph in variants.items() if graph is None]:
        raise InvalidModel(f"{card.folder}: its variant {missing[0]} has no whitening, and {MODEL_FILE} has one")
    bare = {name: graph for name, graph in variants.items() if graph is not None}
    return replace(card, model=model, variants=bare, fingerprint=fingerprint(model, card.preprocessing), facts={})


def _append_pooling(
    graph: onnx.GraphProto, output: onnx.ValueInfoProto, pooling: str, opset: int
) -> onnx.ValueInfoProto:
    """Append the pooling of a card's Output to a graph, and return the new value (N, D)."""
    name, places = f"{output.name}/{pooling}", len(output.type.tensor_type.shape.dim) == 4
    index: NDArray[np.int64]
    if pooling == "class":
        index = np.asarray(0, np.int64)
        node = helper.make_node("Gather", [output.name, f"{name}/index"], [name], name=name, axis=1)
    else:
        index = np.asarray([2, 3] if places else [1], np.int64)
        # Before opset 18, axes were an attribute.
        inputs, attributes = ([f"{name}/index"], {}) if opset >= 18 else ([], {"axes": index.tolist()})
        node = helper.make_node("ReduceMean", [output.name, *inputs], [name], name=name, keepdims=0, **attributes)
    if len(node.input) > 1:
        graph.initializer.append(numpy_helper.from_array(index, f"{name}/index"))
    graph.node.append(node)
    dim = output.type.tensor_type.shape.dim[1 if places else -1]
    size = dim.dim_value if dim.HasField("dim_value") else "D"
    return helper.make_tensor_value_info(name, output.type.tensor_type.elem_type, ["N", size])


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Rename a tensor in the nodes that make it and that use it."""
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
