"""The encoder in other arithmetic, float16 and int8: each is measured against model.onnx before it belongs to it."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from tqdm import tqdm

from service import FloatArray, IntArray, PixelArray
from service.card import LEAST_VARIANT_COSINE, VARIANTS, Card
from service.errors import InvalidModel, NoEmbedding
from training.knn import headline_accuracy

_MOST_LOST = 0.003  # of k-NN accuracy
_BATCH = 50
_QUANTISED = ["Conv", "Gemm", "MatMul", "Relu", "Add", "MaxPool", "AveragePool", "GlobalAveragePool"]


class Pictures(NamedTuple):
    """Real pixels, (N, S, S, 3) uint8 each, that an export is checked with.

    calibration: training pictures, whose activations give int8 its ranges.
    held_out: pictures to compare on, outside the training where it held some out.
    bank: training pictures that vote on the held-out ones.
    labels: (N,) of the bank's and of the held-out ones, or None where there are none.
    """

    calibration: PixelArray
    held_out: PixelArray
    bank: PixelArray
    labels: tuple[IntArray, IntArray] | None


def to_int8(model: bytes, calibration: PixelArray) -> bytes:
    """Return the graph with 8-bit weights, by channel, and activations, by the ranges that calibration pixels give.

    Weights take 7 of the 8 bits: processors without VNNI would saturate on products of 8.
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
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC  # batch norms into weights
        options.optimized_model_filepath = str(simplified)
        options.log_severity_level = 3
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        graph = onnx.load(simplified)
        graph.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")  # or it warns
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


def judge(card: Card, variants: dict[str, bytes], pictures: Pictures) -> dict[str, dict[str, Any]]:
    """Compare variants with model.onnx.

    Returns:
        by file: bytes, pictures, cosine_p1 (the 1st percentile of cosines to model.onnx), least_cosine, with labels
        knn and knn_lost (headline accuracy of the held-out pictures, and how much less that is than
        model.onnx's), and `belongs`: cosine_p1 is 0.99 or more and knn_lost 0.003 or less.
    """
    expected, accuracy = _measure(card, "fp32", pictures)
    figures: dict[str, dict[str, Any]] = {}
    for variant, model in variants.items():
        found: dict[str, Any] = {"bytes": len(model), "pictures": len(pictures.held_out), "belongs": False}
        figures[VARIANTS[variant]] = found
        try:
            embeddings, its_accuracy = _measure(replace(card, variants={variant: model}), variant, pictures)
        except (InvalidModel, NoEmbedding) as error:
            found["refused"] = str(error).rpartition(": ")[2]
            continue
        cosines = (expected * embeddings).sum(1)
        p1 = float(np.percentile(cosines, 1))
        found |= {"cosine_p1": round(p1, 5), "least_cosine": round(float(cosines.min()), 5)}
        lost = 0.0
        if accuracy is not None and its_accuracy is not None:
            lost = accuracy - its_accuracy
            found |= {"knn": round(its_accuracy, 4), "knn_lost": round(lost, 4)}
        found["belongs"] = p1 >= LEAST_VARIANT_COSINE and lost <= _MOST_LOST + 1e-9
    return figures


def _measure(card: Card, variant: str, pictures: Pictures) -> tuple[FloatArray, float | None]:
    """Return a variant's embeddings of the held-out pictures and, with labels, their k-NN accuracy."""
    # Here, not above: a machine that only trains has no onnxruntime.
    from service.encoder import Encoder as OnnxEncoder

    served = OnnxEncoder(card, "cpu", variant)

    def embed(pixels: PixelArray) -> FloatArray:
        starts = range(0, len(pixels), _BATCH)
        bar = tqdm(starts, f"checking {VARIANTS[variant]}", unit=" batches", leave=False, delay=3)
        return np.concatenate([served.encode(pixels[start : start + _BATCH]) for start in bar])

    held_out = embed(pictures.held_out)
    if pictures.labels is None:
        return held_out, None
    return held_out, headline_accuracy(embed(pictures.bank), pictures.labels[0], held_out, pictures.labels[1])
