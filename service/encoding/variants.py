"""Variants of an encoder in float16 and int8: each is compared with model.onnx before it is written beside it."""

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from service import FloatArray, IntArray, PixelArray
from service.encoding.card import LEAST_VARIANT_COSINE, VARIANTS, Card
from service.encoding.voting import headline_accuracy
from service.errors import InvalidModel, NoEmbedding

if TYPE_CHECKING:
    from service.encoding.encoder import Encoder

# The k-NN accuracy that a variant may lose.
_MOST_LOST = 0.003
_BATCH = 50


class Pictures(NamedTuple):
    """Real pixels that an export is checked with, each (N, S, S, 3) uint8.

    calibration: training pictures; their activations give int8 its ranges.
    held_out: pictures that variants are compared on; not trained on, if the training held any out.
    bank: training pictures that vote on the held-out ones.
    labels: (N,) of the bank and of the held-out pictures, or None.
    learnt_on: training pictures that a whitening is learnt on, or None for no whitening.
    """

    calibration: PixelArray
    held_out: PixelArray
    bank: PixelArray
    labels: tuple[IntArray, IntArray] | None
    learnt_on: PixelArray | None = None


def keep_good(
    card: Card, made: dict[str, bytes], pictures: Pictures, quality: dict[str, dict[str, Any]]
) -> dict[str, bytes]:
    """Return model.onnx and the variants that are good enough, by name; report the others on stderr.

    Args:
        card: of model.onnx.
        made: the variants as ONNX, by name.
        pictures: for `judge`.
        quality: measurements by file; those of `judge` are added.
    """
    quality |= judge(card, made, pictures)
    graphs = {"fp32": card.model}
    for variant, graph in made.items():
        figures = quality[VARIANTS[variant]]
        if figures["belongs"]:
            graphs[variant] = graph
        else:
            print(
                f"{VARIANTS[variant]} is not written: it is too far from model.onnx: {json.dumps(figures)}",
                file=sys.stderr,
            )
    return graphs


def embed_pixels(encoder: "Encoder", pixels: PixelArray, what: str) -> FloatArray:
    """Return the embeddings (N, D) of pixels (N, S, S, 3), N > 0; `what` labels the progress bar."""
    starts = tqdm(range(0, len(pixels), _BATCH), what, unit=" batches", leave=False, delay=3)
    return np.concatenate([encoder.encode(pixels[start : start + _BATCH]) for start in starts])


def judge(card: Card, variants: dict[str, bytes], pictures: Pictures) -> dict[str, dict[str, Any]]:
    """Compare variants with model.onnx.

    Returns:
        Figures by file: bytes; pictures; cosine_p1, the 1st percentile of cosines to model.onnx; least_cosine; with
        labels knn, the headline accuracy on the held-out pictures, and knn_lost, the difference to model.onnx's; and
        `belongs`: whether cosine_p1 is at least 0.99 and knn_lost at most 0.003.
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
    # Imported late: a machine that only trains has no onnxruntime.
    from service.encoding.encoder import Encoder

    served, what = Encoder(card, "cpu", variant), f"checking {VARIANTS[variant]}"
    held_out = embed_pixels(served, pictures.held_out, what)
    if pictures.labels is None:
        return held_out, None
    return held_out, headline_accuracy(
        embed_pixels(served, pictures.bank, what), pictures.labels[0], held_out, pictures.labels[1]
    )
