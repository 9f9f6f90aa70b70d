"""The offline job: k-NN accuracy of an exported encoder, through the code that serves it, beside baselines."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import onnx
from onnx import numpy_helper
from tqdm import tqdm

from service import FloatArray, IntArray, PixelArray
from service.card import Card, Preprocessing, read_card
from service.encoder import Encoder
from service.errors import InvalidModel, InvalidSource, LookalikeError
from service.images import Limits, decode_pixels
from service.sources import Source
from service.store.faiss_index import FaissIndex
from training.data import open_training_source
from training.knn import headline_accuracy, vote

_K = 5
_BATCH = 64


def evaluate(model: Path, bank_name: str, queries_name: str, data_root: Path) -> dict[str, Any]:
    """Measure an encoder: each query is named by a vote of its nearest bank pictures.

    Args:
        model: the encoder's folder.
        bank_name, queries_name: SOURCEs with labels.
        data_root: where named sets lie.

    Returns:
        {"model", "fingerprint", "bank", "queries", "knn": {"k5", "weighted_k20"}, "baselines": {"raw_pixels":
        {…}, "random_encoder": {…}}}. k5 is the share of queries that the unweighted majority of 5 names
        rightly, by cosine for embeddings, by Euclidean distance on 0..255 for raw pixels. weighted_k20, the
        headline, is that of 20 votes weighted by exp(cosine / 0.07), raw pixels less each picture's mean.

    Raises:
        InvalidModel, InvalidSource: no such encoder or source, no labels, fewer than 5 bank pictures.
    """
    card = read_card(model)
    encoder = Encoder(card)
    bank, queries = open_training_source(bank_name, data_root), open_training_source(queries_name, data_root)
    if len(bank) < _K:
        raise InvalidSource(f"{bank_name}: {len(bank)} pictures cannot vote among {_K}; a bank needs {_K} or more")
    bank_labels, query_labels = _labels(bank), _labels(queries)
    bank_pixels, query_pixels = read_pixels(bank, card.preprocessing), read_pixels(queries, card.preprocessing)

    def accuracy(neighbours: IntArray, bank_rows: FloatArray, query_rows: FloatArray) -> dict[str, float]:
        headline = headline_accuracy(bank_rows, bank_labels, query_rows, query_labels)
        return {
            "k5": round(float((vote(bank_labels[neighbours]) == query_labels).mean()), 4),
            "weighted_k20": round(headline, 4),
        }

    def accuracy_of(encoder: Encoder) -> dict[str, float]:
        bank_rows, query_rows = embed(encoder, bank_pixels), embed(encoder, query_pixels)
        return accuracy(nearest(bank_rows, query_rows, _K), bank_rows, query_rows)

    neighbours = nearest_pixels(bank_pixels, query_pixels, _K)
    return {
        "model": card.name,
        "fingerprint": card.fingerprint,
        "bank": {"source": bank_name, "pictures": len(bank)},
        "queries": {"source": queries_name, "pictures": len(queries)},
        "knn": accuracy_of(encoder),
        "baselines": {
            "raw_pixels": accuracy(neighbours, centred(bank_pixels), centred(query_pixels)),
            "random_encoder": accuracy_of(Encoder(replace(card, model=randomised(card), facts={}))),
        },
    }


def read_pixels(source: Source, preprocessing: Preprocessing) -> PixelArray:
    """Return all of a source's pixels (N, S, S, 3) as the service would make them.

    Raises:
        UndecodablePicture and its like for the first picture that cannot be read: figures need them all.
    """

    def read(position: int) -> PixelArray:
        try:
            return decode_pixels(source.entry(position).data, preprocessing, Limits())
        except LookalikeError as error:
            raise type(error)(f"{source.name}: {source.ids[position]}: {error}") from error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read_all = tqdm(
            pool.map(read, range(len(source))), f"reading {source.name}", len(source), unit=" pictures", leave=False
        )
        return np.stack(list(read_all))


def embed(encoder: Encoder, pixels: PixelArray) -> FloatArray:
    """Return the embeddings (N, D) of pixels (N, S, S, 3)."""
    starts = tqdm(range(0, len(pixels), _BATCH), "embedding", unit=" batches", leave=False)
    return np.concatenate([encoder.encode(pixels[start : start + _BATCH]) for start in starts])


def nearest(bank: FloatArray, queries: FloatArray, k: int) -> IntArray:
    """Return the positions (N, k) in the bank of each query's nearest by cosine, through the service's index."""
    index = FaissIndex(bank.shape[1])
    index.add(range(len(bank)), bank)
    return index.search(queries, k)[1]


def nearest_pixels(bank: PixelArray, queries: PixelArray, k: int) -> IntArray:
    """Return the positions (N, k) in the bank of each query's nearest by Euclidean distance on 0..255."""
    if all((pixels == pixels[..., :1]).all() for pixels in (bank, queries)):
        bank, queries = bank[..., :1], queries[..., :1]  # grey: one channel orders distances as three equal ones do
    index = faiss.IndexFlatL2(int(np.prod(bank.shape[1:])))
    index.add(bank.reshape(len(bank), -1).astype(np.float32))
    found: IntArray = index.search(queries.reshape(len(queries), -1).astype(np.float32), k)[1]
    return found


def centred(pixels: PixelArray) -> FloatArray:
    """Return pixels (N, S, S, 3) less each picture's mean, as rows of length 1; a flat picture's row is 0."""
    rows = pixels.reshape(len(pixels), -1).astype(np.float32)
    rows -= rows.mean(1, keepdims=True)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
    return rows


def randomised(card: Card) -> bytes:
    """Return the card's ONNX graph with every weight drawn anew: the same network, untrained.

    Weights of convolutions and matrix products become normal with variance 2 / fan-in (He et al.,
    arXiv:1502.01852), their biases 0, batch normalisation the identity. Seed 0.
    """
    graph = onnx.load_from_string(card.model)
    random = np.random.default_rng(0)
    values = {tensor.name: tensor for tensor in graph.graph.initializer}
    drawn = False

    def put(name: str, value: "np.ndarray[Any, Any]") -> None:
        values[name].CopyFrom(numpy_helper.from_array(value.astype(numpy_helper.to_array(values[name]).dtype), name))

    for node in graph.graph.node:
        stored = [name if name in values else None for name in node.input]
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            for name in filter(None, stored):
                shape = tuple(values[name].dims)
                if len(shape) < 2:
                    put(name, np.zeros(shape))
                else:  # convolutions and transposed products hold outputs first, the others inputs first
                    outputs_first = node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute)
                    fan_in = np.prod(shape[1:]) if outputs_first else shape[-2]
                    put(name, random.normal(0, np.sqrt(2 / fan_in), shape))
                    drawn = True
        elif node.op_type in ("BatchNormalization", "LayerNormalization"):
            for name, constant in zip(stored[1:], (1, 0, 0, 1), strict=False):
                if name:
                    put(name, np.full(tuple(values[name].dims), constant))
    if not drawn:
        raise InvalidModel(f"{card.folder}: no weight to draw anew in its graph; is it quantised?")
    return bytes(graph.SerializeToString())


def _labels(source: Source) -> "np.ndarray[Any, Any]":
    if source.labels is None:
        raise InvalidSource(
            f"{source.name}: has no labels; k-NN accuracy needs every picture in a folder named for its class"
        )
    return np.asarray(source.labels)
