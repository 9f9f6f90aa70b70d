"""A torch module → an ONNX graph, as bytes."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn


def to_graph(module: nn.Module, examples: dict[str, Tensor], axes: dict[int, Any]) -> bytes:
    """Return the ONNX graph of a module with one output, `embedding`.

    Args:
        module: on the CPU, in the mode to export.
        examples: an input for each argument, by the name that it gets in the graph.
        axes: the axes of every input that may have any length, as torch.export.Dim.

    Cost: seconds; the weights are copied three times.
    """
    with warnings.catch_warnings():
        # Inputs may share an axis, which the exporter warns of.
        warnings.filterwarnings("ignore", "# The axis name")
        program = torch.onnx.export(
            module,
            tuple(examples.values()),
            input_names=list(examples),
            output_names=["embedding"],
            dynamic_shapes=dict.fromkeys(examples, axes),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    # The exporter notes where in which file each node came from, with the paths of this machine.
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        del part.metadata_props[:]
    return bytes(model.SerializeToString())
