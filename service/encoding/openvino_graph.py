"""A graph in OpenVINO, on a CPU. The package is an extra."""

import os
import sys
from functools import cache
from importlib.util import find_spec
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from service import FloatArray, PixelArray, cores
from service.encoding.card import Card
from service.encoding.runtimes import Graph, reason
from service.errors import InvalidModel

if TYPE_CHECKING:
    from openvino import Core, InferRequest


def is_installed() -> bool:
    """Whether OpenVINO can be imported."""
    return find_spec("openvino") is not None


@cache
def _core() -> "Core":
    """Import OpenVINO and return its one Core.

    On import, `openvino.tools.ovc` reports the use of OpenVINO to Google Analytics, and notes an identity in the home
    folder. It converts models, which we do not need, and OpenVINO does without it. To forbid it saves half of the
    import's time, too.
    """
    converter = "openvino.tools.ovc"
    forbidden = converter not in sys.modules
    if forbidden:
        sys.modules[converter] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        if forbidden:
            del sys.modules[converter]
    return openvino.Core()


def version() -> str:
    """Return the version of OpenVINO, which must be installed."""
    _core()
    import openvino

    return str(openvino.__version__).partition("-")[0]


def computes_bf16() -> bool:
    """Whether this processor has instructions for bfloat16 (AVX-512 or AMX), as OpenVINO finds.

    ONEDNN_MAX_CPU_ISA forbids OpenVINO's kernels some instructions, of which OpenVINO's own answer knows nothing: with
    AVX2 it crashes in bfloat16.
    """
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    allowed = most in ("", "ALL", "DEFAULT") or any(name in most for name in ("BF16", "FP16", "AMX", "AVX10"))
    return allowed and "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenvinoGraph(Graph):
    """A graph that OpenVINO compiled for the CPU. See Graph."""

    runtime = "openvino"
    provider, kind = "OpenVINO", "cpu"

    def __init__(self, card: Card, variant: str, model: bytes, like: Graph, threads: int | None = None) -> None:
        """Compile a graph.

        Args:
            card: the model folder.
            variant: the graph's name in VARIANTS, or "bf16" for model.onnx.
            model: its bytes.
            like: the same file in onnxruntime, which has checked its input and output.
            threads: as many as it may keep busy if None.

        Raises:
            InvalidModel: OpenVINO cannot read or compile it.
        """
        super().__init__(card, variant)
        self._input, self._type, self._output = like._input, like._type, like._output
        self.sizes, self.max_batch = like.sizes, like.max_batch
        # Threads of one batch wait for each other at each operation, and under load decoders take one of them away. Two
        # batches of half the threads each wait less.
        self.lanes = min(2, threads or cores())
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if variant == "bf16" else "f32",
            "INFERENCE_NUM_THREADS": threads or cores(),
            "NUM_STREAMS": self.lanes,
            # Several workers of a service would pin their threads to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        try:
            compiled = _core().compile_model(_core().read_model(model), "CPU", settings)
            # A request has one output tensor, which its next call overwrites.
            self._requests: SimpleQueue[InferRequest] = SimpleQueue()
            for _ in range(self.lanes):
                self._requests.put(compiled.create_infer_request())
            self._port = compiled.output(self._output.name)
        # OpenVINO raises RuntimeError for most, and others for some.
        except Exception as error:
            raise InvalidModel(f"{self.path}: OpenVINO cannot load it: {reason(error)}") from error

    def _infer(self, batch: PixelArray | FloatArray) -> Any:
        request = self._requests.get()
        try:
            request.infer({self._input: batch})
            return np.array(request.get_tensor(self._port).data)
        finally:
            self._requests.put(request)

    def warm_sizes(self, pixels: PixelArray) -> None:
        """Run every size up to the largest: OpenVINO prepares kernels for each new shape, which takes 0.1 s."""
        for size in self.sizes or range(1, self.max_batch + 1):
            self._on_every_lane(self.warm_up, np.repeat(pixels[None], size, axis=0))
