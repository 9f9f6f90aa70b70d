"""Encoder → models/NAME: ONNX with its preprocessing and card, checked against torch on real pictures."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from service.encoding.card import MODEL_FILE, TEXT_FILE, Card, Preprocessing, fingerprint
from service.encoding.model_folder import check_new, check_out, write_model
from service.encoding.variants import Pictures, embed_pixels, keep_good
from service.encoding.voting import headline_accuracy
from service.encoding.whitening import LEAST_LEARNT, Whitening, append_whitening, default_whitening, learn_whitening
from service.errors import InvalidModel, InvalidRequest
from training.encoder import Encoder
from training.onnx_graph import to_graph
from training.text_export import TextSide
from training.variants import to_int8

_CHECKED_PICTURES = 256
_LEAST_COSINE = 0.9999
# The whitenings to choose from.
_POWERS, _DIMENSIONS = (0.5, 1.0), (512, 256, 128, 64)


def export(
    encoder: Encoder,
    pictures: Pictures | None,
    preprocessing: Preprocessing,
    facts: dict[str, Any],
    out: Path,
    text: TextSide | None = None,
    variants: Sequence[str] = ("fp16", "int8"),
) -> None:
    """Write a model folder, whole or not at all: model.onnx, the variants close enough to it, and the card.

    Args:
        encoder: trained.
        pictures: real ones to check the export with; None checks with random pixels and makes no variants.
        preprocessing: of the encoder, written beside the graph.
        facts: for the card: method, data and other facts of the run.
        out: the folder; an earlier model in it is replaced.
        text: the text tower, if it has one. No whitening is appended then: it would take pictures out of the space
            that they share with texts.
        variants: to make from pictures: fp16 and int8.

    Raises:
        InvalidModel: onnxruntime's embeddings differ from torch's (cosine below 0.9999 at batch 1 or 64).
        InvalidOutput: as check_out.
    """
    encoder = encoder.cpu().eval()
    side = preprocessing.side
    check_out(out)
    model = to_onnx(encoder, side)
    card = Card(out, out.name, fingerprint(model, preprocessing), model, preprocessing, {})
    pixels = pictures.calibration[:_CHECKED_PICTURES] if pictures else _random_pixels(side)
    quality: dict[str, dict[str, Any]] = {
        MODEL_FILE: {"pictures": len(pixels)}
        | {f"least_cosine_to_torch_batch_{size}": compare(encoder, card, pixels, size) for size in (1, 64)}
    }
    graphs = {"fp32": model}
    if pictures:
        makers: dict[str, Callable[[], bytes]] = {
            "fp16": lambda: to_onnx(encoder.in_float16(), side),
            "int8": lambda: to_int8(model, pictures.calibration),
        }
        made = {variant: makers[variant]() for variant in variants}
        if text is None and (chosen := choose_whitening(card, pictures)):
            whitening, told = chosen
            made = {variant: append_whitening(graph, whitening) for variant, graph in made.items()}
            model = append_whitening(model, whitening)
            card = replace(card, model=model, fingerprint=fingerprint(model, preprocessing))
            facts = facts | {"whitening": told}
        graphs = keep_good(card, made, pictures, quality)
    if text is not None:
        facts, quality[TEXT_FILE] = facts | text.facts, text.quality
    write_model(out, graphs, preprocessing, facts, quality, more=None if text is None else text.files)


def export_locked(card: Card, text: TextSide, facts: dict[str, Any], out: Path) -> None:
    """Write a model folder: an encoder as it is, in the same embedding space, with a text tower.

    Args:
        card: of the encoder.
        text: the text tower.
        facts: of the text tower's run; they become a part of the card's `text`.
        out: the folder; an earlier model in it is replaced.

    Raises:
        InvalidOutput: as check_out.
    """
    check_out(out)
    written = ("name", "dimension", "fingerprint", "sha256", "canary", "quality")
    kept = {key: value for key, value in card.facts.items() if key not in written}
    own = {**text.facts, "text": text.facts["text"] | facts}
    quality = card.facts.get("quality", {}) | {TEXT_FILE: text.quality}
    graphs = {"fp32": card.model, **card.variants}
    write_model(out, graphs, card.preprocessing, kept | own, quality, card.facts.get("canary"), more=text.files)


def check_export(out: Path, overwrite: bool = True) -> None:
    """Make sure, before hours of training, that a model can be exported to `out`.

    Args:
        out: the model folder.
        overwrite: whether an earlier model may be replaced.

    Raises:
        InvalidRequest: a package that the export needs is not installed.
        InvalidOutput: as check_new.
    """
    for package, extra in (("onnxruntime", "cpu or gpu"), ("onnxscript", "train")):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InvalidRequest(
                f"the export needs {package}, which is not installed here: install the extra {extra} of lookalike"
            ) from error
    check_new(out, overwrite)


def choose_whitening(card: Card, pictures: Pictures) -> tuple[Whitening, dict[str, Any]] | None:
    """Learn a whitening from a run's own pictures, without their labels.

    With labels, power and dimension are those with the highest k-NN accuracy of the held-out pictures; without, they
    follow from the number of pictures.

    Returns:
        The whitening and its facts for the card, or None: too few pictures were given, or no whitening helps.
    """
    if pictures.learnt_on is None or len(pictures.learnt_on) < LEAST_LEARNT:
        return None
    # Imported late: a machine that only trains has no onnxruntime.
    from service.encoding.encoder import Encoder as OnnxEncoder

    served = OnnxEncoder(card, device="cpu")
    rows = embed_pixels(served, pictures.learnt_on, "learning a whitening")
    count, dimension = rows.shape
    told = {"of": card.fingerprint, "pictures": count}
    power, kept = default_whitening(count, dimension)
    labels = pictures.labels
    if labels is None:
        return learn_whitening(rows, power, kept), told | {"power": power, "dimension": kept}
    bank, held_out = (embed_pixels(served, pixels, "trying") for pixels in (pictures.bank, pictures.held_out))

    def accuracy(whitening: Whitening | None) -> float:
        sides = [side if whitening is None else whitening.apply(side) for side in (bank, held_out)]
        return headline_accuracy(sides[0], labels[0], sides[1], labels[1])

    best, most = None, accuracy(None)
    for power, kept in _candidates(count, dimension):
        whitening = learn_whitening(rows, power, kept)
        if (found := accuracy(whitening)) > most:
            most, best = found, (whitening, told | {"power": power, "dimension": kept, "knn_held_out": round(found, 4)})
    return best


def _candidates(count: int, dimension: int) -> list[tuple[float, int]]:
    """Return the powers and dimensions to try with `count` pictures."""
    sizes = [size for size in sorted({dimension, *_DIMENSIONS}, reverse=True) if size <= min(dimension, count // 2)]
    return [(0.0, dimension), *((power, size) for size in sizes for power in _POWERS)]


def compare(encoder: Encoder, card: Card, pixels: np.ndarray[Any, Any], batch: int) -> float:
    """Return the least cosine between torch's and onnxruntime's embeddings of the same pixels (N, S, S, 3).

    Raises:
        InvalidModel: it is below 0.9999.
    """
    from service.encoding.encoder import Encoder as OnnxEncoder

    served = OnnxEncoder(card, device="cpu")
    least = 1.0
    for start in range(0, len(pixels), batch):
        chunk = pixels[start : start + batch]  # (N, S, S, 3)
        with torch.inference_mode():
            expected = encoder(torch.from_numpy(chunk).permute(0, 3, 1, 2)).numpy()
        least = min(least, float((expected * served.encode(chunk)).sum(1).min()))
    if least < _LEAST_COSINE:
        raise InvalidModel(
            f"the export differs from torch: cosine {least:.6f} at batch {batch}, expected ≥ {_LEAST_COSINE}"
        )
    return round(least, 7)


def to_onnx(encoder: Encoder, side: int) -> bytes:
    """Return the ONNX graph of an encoder, for any batch size."""
    pixels = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    return to_graph(encoder, {"pixels": pixels}, {0: torch.export.Dim("N")})


def _random_pixels(side: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (128, side, side, 3), dtype=np.uint8)
