"""A tiny encoder with a text tower: it knows the colours of pictures and their names, by two graphs of a few nodes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from service.encoding.card import square_preprocessing
from service.encoding.model_folder import write_model
from service.encoding.text import TextConfig
from tests.conftest import encoded

SIDE = 4
# A last dimension that is never 0: black has a direction, too.
NAMES = {
    "[PAD]": (0, 0, 0, 0),
    "[UNK]": (0, 0, 0, 0.01),
    "red": (1, 0, 0, 0.1),
    "green": (0, 1, 0, 0.1),
    "blue": (0, 0, 1, 0.1),
    "purple": (1, 0, 1, 0.1),
    "white": (1, 1, 1, 0.1),
    "black": (0, 0, 0, 0.1),
    "nothing": (0, 0, 0, 0),
}
RGB = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "purple": (255, 0, 255), "white": (255,) * 3}
CONFIG = TextConfig(
    max_length=8, padding="longest", padding_side="right", pad_token="[PAD]", pad_id=0, lowercase=False,
    output="embedding",
)  # fmt: skip


def picture(name: str) -> bytes:
    """Return a PNG of one colour."""
    return encoded(Image.new("RGB", (8, 8), RGB[name]))


def image_graph() -> bytes:
    """Return pixels uint8 (N, 3, 4, 4) → (N, 4): the mean colour, and a constant."""
    weights = np.hstack([np.eye(3), np.zeros((3, 1))]).astype(np.float32) / 255
    nodes = [
        helper.make_node("Cast", ["pixels"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["values", "axes"], ["means"], keepdims=0),
        helper.make_node("Gemm", ["means", "weights", "bias"], ["embedding"]),
    ]
    constants = {"axes": np.array([2, 3]), "weights": weights, "bias": np.array([0, 0, 0, 0.1], np.float32)}
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 3, SIDE, SIDE])
    return _model(nodes, [pixels], ["N", 4], constants)


def text_graph(dimension: int = 4, words: int = len(NAMES), batch: int | str = "N", length: int | str = "T") -> bytes:
    """Return tokens and their mask, int64 (N, T), → (N, D): the sum of the words' colours.

    Args:
        dimension: D; above 4, the rest is zeros.
        words: rows of the table.
        batch, length: N and T, a number if the graph fixes it.
    """
    table = np.zeros((words, dimension), np.float32)
    table[: len(NAMES), :4] = list(NAMES.values())[:words]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["words"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["words", "column"], ["known"]),
        helper.make_node("ReduceSum", ["known", "axes"], ["embedding"], keepdims=0),
    ]
    constants = {"table": table, "last": np.array([2]), "axes": np.array([1])}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, [batch, length])
        for name in ("input_ids", "attention_mask")
    ]
    return _model(nodes, inputs, [batch, dimension], constants)


def tokenizer(*more: str) -> bytes:
    """Return a tokenizer.json whose words are NAMES and some more."""
    words = {word: number for number, word in enumerate([*NAMES, *more])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made.to_str().encode()


def write_colours(folder: Path, facts: dict[str, Any] | None = None, **more: bytes) -> Path:
    """Write the encoder as a model folder and return it.

    Args:
        folder: its name is the encoder's.
        facts: further entries of its card.
        more: `text`, `tokenizer` or `config` in place of the usual bytes.
    """
    files = {"text": text_graph(), "tokenizer": tokenizer(), "config": CONFIG.to_json()} | more
    names = {"text": "text.onnx", "tokenizer": "tokenizer.json", "config": "text_config.json"}
    write_model(
        folder,
        {"fp32": image_graph()},
        square_preprocessing(SIDE),
        {"method": "made by hand", "data": {"source": "nothing"}} | (facts or {}),
        {},
        more={names[key]: data for key, data in files.items()},
    )
    return folder


def _model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    shape: list[int | str],
    constants: dict[str, Any],
) -> bytes:
    output = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, shape)
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "colours", inputs, [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def as_json(config: TextConfig, **changed: Any) -> bytes:
    """Return a text_config.json with some entries changed, which may be invalid."""
    return json.dumps(config._asdict() | changed).encode()
