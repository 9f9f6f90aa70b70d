"""A graph in onnxruntime, on a CPU or a GPU."""

import ctypes
import logging
from platform import machine
from typing import Any

import numpy as np
import onnxruntime as ort

from service import FloatArray, PixelArray, cores
from service.encoding.card import OUTPUTS, Card, Output, choose_output
from service.encoding.runtimes import Device, Graph, reason
from service.errors import InvalidModel

log = logging.getLogger("bentoml.lookalike")
VERSION: str = ort.__version__
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}


def find_devices(name: str) -> list[Device]:
    """Return every GPU that CUDA shows, or the CPU.

    Args:
        name: "cpu", "cuda", or "auto": CUDA if this onnxruntime has it and there is a GPU; without a GPU it warns.

    Raises:
        InvalidModel: "cuda", and this onnxruntime has no CUDA, or there is no GPU.
    """
    if name == "cpu" or _PROVIDERS["cuda"] not in ort.get_available_providers():
        if name == "cuda":
            raise InvalidModel(f"device cuda was asked for, but this onnxruntime has {ort.get_available_providers()}")
        return [Device("cpu")]
    # onnxruntime would try, print a page of errors, and take the CPU.
    gpus = cuda_gpus()
    if not gpus:
        if name == "cuda":
            raise InvalidModel("device cuda was asked for, but CUDA finds no GPU here")
        log.warning("CUDA finds no GPU here: the encoder runs on the CPU")
        return [Device("cpu")]
    ort.preload_dlls()
    return [Device("cuda", number, name == "cuda") for number in range(gpus)]


def cuda_gpus() -> int:
    """Return how many GPUs this onnxruntime can use by CUDA."""
    if _PROVIDERS["cuda"] not in ort.get_available_providers():
        return 0
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return count.value if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


class OnnxruntimeGraph(Graph):
    """A graph in an onnxruntime session. See Graph."""

    runtime = "onnxruntime"

    def __init__(self, card: Card, variant: str, model: bytes, device: Device, threads: int | None = None) -> None:
        """Open a graph.

        Args:
            card: the model folder, whose preprocessing the graph's input must fit.
            variant: the graph's name in VARIANTS.
            model: its bytes.
            device: runs it. onnxruntime may fall back to the CPU, unless the device is required.
            threads: on a CPU; as many as it may keep busy if None.

        Raises:
            InvalidModel: a graph outside the contract, or a required device that cannot be used.
        """
        super().__init__(card, variant)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or cores()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        settings: dict[str, Any] = {}
        if device.kind == "cuda":
            # HEURISTIC: a search for the best algorithm costs up to a second for each new shape.
            settings = {
                "device_id": device.number,
                "cudnn_conv_algo_search": "HEURISTIC",
                "arena_extend_strategy": "kSameAsRequested",
            }

        def load() -> ort.InferenceSession:
            try:
                # Loaded from the verified bytes, so a graph that refers to data in other files fails.
                return ort.InferenceSession(model, options, providers=[(_PROVIDERS[device.kind], settings)])
            # onnxruntime raises a class of its own for every status.
            except Exception as error:
                raise InvalidModel(f"{self.path}: onnxruntime cannot load it: {reason(error)}") from error

        self._session = load()
        self.provider = self._session.get_providers()[0]
        # onnxruntime falls back to the CPU silently.
        if device.required and self.provider != _PROVIDERS[device.kind]:
            raise InvalidModel(f"device {device.kind} was asked for, but onnxruntime runs on {self.provider}")
        self.kind = device.kind if self.provider == _PROVIDERS[device.kind] else "cpu"
        self._input, self._type, fixed = self._image_input()
        self._limit_batch(fixed)
        self._output = self._embedding_output(card.output)
        # CUDA's convolutions are planned anew whenever the size of the batch changes, which takes seconds: a session
        # sees one size.
        self._sessions = {size: load() for size in self.sizes[1:]}

    def _infer(self, batch: PixelArray | FloatArray) -> Any:
        session = self._sessions.get(len(batch), self._session)
        (raw,) = session.run([self._output.name], {self._input: batch})
        return raw

    def _image_input(self) -> tuple[str, type[Any], int | None]:
        """Return the name, the type and the fixed batch of the graph's one input."""
        images = [node for node in self._session.get_inputs() if len(node.shape) == 4]
        if len(images) != 1 or len(self._session.get_inputs()) != 1 or images[0].type not in _TYPES:
            have = ", ".join(f"{node.name} {node.type} {node.shape}" for node in self._session.get_inputs())
            raise InvalidModel(
                f"{self.path}: expected one image input (N, 3, height, width) of uint8, float32 or float16; "
                f"it has {have}"
            )
        node, height, width = images[0], self._preprocessing.height, self._preprocessing.width
        if any(
            isinstance(have, int) and have != want
            for have, want in zip(node.shape[1:], (3, height, width), strict=True)
        ):
            raise InvalidModel(
                f"{self.path}: input {node.name} is {node.shape}, preprocessing gives 3x{height}x{width}"
            )
        fixed = node.shape[0] if isinstance(node.shape[0], int) else None
        return node.name, _TYPES[node.type], fixed

    def _embedding_output(self, named: Output | None) -> Output:
        outputs = {node.name: len(node.shape) for node in self._session.get_outputs()}
        output = choose_output(outputs, named)
        if output is None:
            expected = f"{' or '.join(OUTPUTS)}, or a single 2-D one" if named is None else named.name
            raise InvalidModel(f"{self.path}: expected an output named {expected}; it has {', '.join(outputs)}")
        return output


def worth_trying(variant: str, kind: str) -> bool:
    """Whether a variant can be the fastest on a kind of device.

    onnxruntime computes in float16 on GPUs and ARM. On an x86 CPU it converts every tensor to float32 and back.
    """
    return variant != "fp16" or kind != "cpu" or machine() not in ("x86_64", "AMD64")
