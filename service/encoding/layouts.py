"""The layouts in which encoders lie on Hugging Face's hub: which file is which, and which output is the embedding."""

import json
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import onnx

from service.encoding.card import PREPROCESSOR_FILE, Output
from service.encoding.hub import Files
from service.errors import InvalidModel

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CONFIG_FILE = "config.json"
_IMAGE_TOWER, _TEXT_TOWER, _WHOLE = "vision_model", "text_model", "model"
# Endings of the names of graphs in other arithmetic; the first two lists are variants that we run.
_VARIANTS = {"fp16": ("_fp16",), "int8": ("_int8", "_quantized")}
_REDUCED = ("_fp16", "_int8", "_quantized", "_uint8", "_q8", "_q4", "_q4f16", "_bnb4")
# Kinds of files with weights that we refuse: reading them may run code, or needs the code of their network.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
# Types of models whose pooler was never trained, or that have none; row 0 of their tokens is the class token.
_CLASS_TOKEN = ("vit", "vit_mae", "vit_msn", "deit")
# Types of models with a pooler, and the pooling of their last hidden state that replaces it in exports without one.
_POOLED = {
    "dinov2": "class",
    "dinov2_with_registers": "class",
    "dinov3_vit": "class",
    "convnext": "mean",
    "convnextv2": "mean",
    "ijepa": "mean",
    "mobilenet_v1": "mean",
    "mobilenet_v2": "mean",
    "regnet": "mean",
    "resnet": "mean",
    "swin": "mean",
    "swinv2": "mean",
}


class Layout(NamedTuple):
    """The files of an encoder, by their paths in a repository.

    graph: the image tower as ONNX.
    variants: the same graph in other arithmetic, by our name of it.
    text: the text tower, or None.
    tokenizer: its tokenizer.json, or None.
    """

    graph: str
    variants: dict[str, str]
    text: str | None
    tokenizer: str | None


def find_layout(files: Files) -> Layout:
    """Find the graphs of a repository.

    Raises:
        InvalidModel: it has no ONNX graph, or several that could be meant.
    """
    graphs = [name for name in files.names if name.endswith(".onnx") and ".." not in PurePosixPath(name).parts]
    graph = _choose_graph(files, [name for name in graphs if _reduced(name) is None], graphs)
    path = PurePosixPath(graph)
    variants = {}
    for variant, endings in _VARIANTS.items():
        names = [str(path.with_stem(path.stem + ending)) for ending in endings]
        if found := [name for name in names if name in graphs]:
            variants[variant] = found[0]
    text = str(path.with_stem(_TEXT_TOWER))
    beside = [str(folder / TOKENIZER_FILE) for folder in (PurePosixPath(), path.parent)]
    tokenizer = next((name for name in beside if name in files.names), None)
    return Layout(graph, variants, text if text in graphs and text != graph else None, tokenizer)


def _choose_graph(files: Files, plain: list[str], graphs: list[str]) -> str:
    for stem in (_IMAGE_TOWER, _WHOLE, None):
        found = [name for name in plain if stem is None or PurePosixPath(name).stem == stem]
        if len(found) > 1:
            raise InvalidModel(
                f"{files.what}: has several graphs that could be meant, {', '.join(found[:5])}: download the right "
                "one and import it as a file, with --side, --mean and --std"
            )
        if found:
            return found[0]
    if graphs:
        raise InvalidModel(f"{files.what}: has its graph in reduced arithmetic alone, {', '.join(graphs[:5])}")
    weights = [name for name in files.names if name.endswith(WEIGHTS)]
    repository = files.origin.removeprefix("hf:").partition("@")[0]
    raise InvalidModel(
        f"{files.what}: has no ONNX graph, {f'only {weights[0]}' if weights else 'nor other weights'}: take it from "
        "timm, as in `lookalike import timm:NAME`, or write one in an environment of its own with "
        f"`optimum-cli export onnx --model {repository} FOLDER` and import that folder"
    )


def _reduced(name: str) -> str | None:
    return next((ending for ending in _REDUCED if PurePosixPath(name).stem.endswith(ending)), None)


def read_json(files: Files, name: str, graph: str) -> dict[str, Any]:
    """Return the content of a JSON file at the top or beside the graph; {} if there is none.

    Raises:
        InvalidModel: it is not a JSON object.
    """
    for path in (name, str(PurePosixPath(graph).with_name(name))):
        if path in files.names:
            try:
                content = json.loads(files.read(path))
            except (ValueError, RecursionError) as error:
                raise InvalidModel(f"{files.what}: {path} is not JSON: {error}") from error
            if not isinstance(content, dict):
                raise InvalidModel(f"{files.what}: {path}: expected a JSON object, not {type(content).__name__}")
            return content
    return {}


def read_preprocessor(files: Files, graph: str) -> dict[str, Any]:
    """Return preprocessor_config.json, or the same keys out of processor_config.json. Raises InvalidModel."""
    config = read_json(files, PREPROCESSOR_FILE, graph)
    if not config:
        nested = read_json(files, "processor_config.json", graph).get("image_processor")
        config = nested if isinstance(nested, dict) else {}
    if not config:
        raise InvalidModel(
            f"{files.what}: has no {PREPROCESSOR_FILE}: import {graph} as a file, with --side, --mean and --std"
        )
    return config


def read_graph(data: bytes, what: str) -> onnx.GraphProto:
    """Parse ONNX.

    Raises:
        InvalidModel: it is no ONNX, or keeps weights in other files.
    """
    try:
        graph = onnx.load_from_string(data).graph
    # Its parser raises a class of its own.
    except Exception as error:
        raise InvalidModel(f"{what}: is not an ONNX file, or a damaged one") from error
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors(graph)):
        raise InvalidModel(
            f"{what}: keeps weights in external data files, which we do not read: write it as one file, below 2 GB"
        )
    return graph


def _tensors(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """Return the constants of a graph and of the graphs within its nodes."""
    found = [*graph.initializer]
    for sparse in graph.sparse_initializer:
        found += [sparse.values, sparse.indices]
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        found += [attribute.t, *attribute.tensors]
        for inner in (attribute.g, *attribute.graphs):
            found += _tensors(inner)
    return found


def axes_of(graph: onnx.GraphProto) -> dict[str, int]:
    """Return the number of axes of each output of a graph, by name."""
    return {output.name: len(output.type.tensor_type.shape.dim) for output in graph.output}


def choose(outputs: dict[str, int], model_type: str | None, what: str) -> Output:
    """Choose the output that is the embedding, by the model's type.

    Args:
        outputs: the number of axes of each output, by name.
        model_type: config.json's, or None.
        what: names the graph in messages.

    Raises:
        InvalidModel: none is one.
    """
    if "image_embeds" in outputs:
        return Output("image_embeds")
    state = "last_hidden_state"
    if model_type in _CLASS_TOKEN and state in outputs:
        return Output(state, "class")
    if "pooler_output" in outputs:
        # ResNet's is (N, D, 1, 1).
        return Output("pooler_output", "mean" if outputs["pooler_output"] == 4 else None)
    if model_type in _POOLED and state in outputs:
        return Output(state, _POOLED[model_type])
    flat = [name for name, axes in outputs.items() if axes == 2]
    if len(flat) == 1 and flat != ["logits"]:
        return Output(flat[0])
    scores = "; logits are scores of classes, not an embedding" if "logits" in outputs else ""
    raise InvalidModel(
        f"{what}: cannot tell which output is the embedding, of {', '.join(outputs)}{scores}: name one with --output, "
        "and a pooling of its tokens, as in --output last_hidden_state:class or last_hidden_state:mean"
    )
