"""The encoder in 8-bit arithmetic: weights are quantised by channel, activations by ranges of calibration pictures."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx

from service import PixelArray

_BATCH = 50
_QUANTISED = ["Conv", "Gemm", "MatMul", "Relu", "Add", "MaxPool", "AveragePool", "GlobalAveragePool"]


def to_int8(model: bytes, calibration: PixelArray) -> bytes:
    """Return the graph with 8-bit weights and activations.

    Weights are quantised by channel and use 7 of the 8 bits, since products of 8 bits saturate on processors without
    VNNI. Activations are quantised by the ranges that the calibration pixels (N, S, S, 3) cause.
    """
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[PixelArray] = iter(np.array_split(calibration, -(-len(calibration) // _BATCH)))

        def get_next(self) -> dict[str, PixelArray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"pixels": np.ascontiguousarray(batch.transpose(0, 3, 1, 2))}

    with tempfile.TemporaryDirectory() as folder:
        simplified, quantised = Path(folder) / "simplified.onnx", Path(folder) / "quantised.onnx"
        options = ort.SessionOptions()
        # The basic optimisations fold batch norms into weights.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(simplified)
        options.log_severity_level = 3
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        graph = onnx.load(simplified)
        # Without this mark quantize_static warns that the graph was not prepared.
        graph.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
        quantize_static(
            graph,
            quantised,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_QUANTISED,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return quantised.read_bytes()
