"""The offline job: figures of an exported encoder, computed through the code that serves it, beside baselines."""

import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import numpy_helper
from tqdm import tqdm

from service import FloatArray, IntArray, PixelArray, cores
from service.account import LEFT_OUT, Account, left_out_beside
from service.encoding.card import Card, Preprocessing, read_card
from service.encoding.encoder import Encoder
from service.encoding.images import decode_pixels
from service.encoding.limits import OWN_FILES, Limits
from service.encoding.variants import embed_pixels
from service.encoding.voting import HEADLINE_K, nearest, vote
from service.encoding.whitening import without_whitening
from service.errors import InvalidModel, InvalidOutput, InvalidSource, LookalikeError
from service.jobs.parquet_parts import Embeddings, open_embeddings
from service.sources import origin_of
from service.sources.compact import Labels, Names
from service.sources.source import LeftOut, Source, select
from training.data import open_training_source
from training.figures import alignment, effective_rank, linear_probe, uniformity
from training.knn import MOST_K, find_neighbours, neighbour_figures
from training.overlap import NO_OVERLAP, Identities, Overlap, find_overlap
from training.zero_shot import check_reads_texts, labels_as_text

_CHUNK = 64
# Bytes of memory for each value of a pixel: uint8, and the float32 rows that raw pixels are compared as.
_BYTES = 9
# Pictures up to this side are mostly so small that two threads, waiting for each other, are slower than one.
_SMALL_SIDE = 64


@dataclass(frozen=True)
class Rows:
    """One side of the evaluation: N pictures as the encoder sees them.

    Attributes:
        name: as the user wrote it.
        ids: N of them.
        labels: (N,) positions in Evaluation.classes.
        embeddings: (N, D), of L2 norm 1.
        pixels: (N, S, S, 3), or None where only embeddings were given.
        digests: sha256 (hex) of the image files, or None if they are not known.
        origin: where the pictures lie (sources.origin_of).
    """

    name: str
    ids: Sequence[str]
    labels: IntArray
    embeddings: FloatArray
    pixels: PixelArray | None
    digests: Sequence[str] | None = None
    origin: str = ""


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        report: the figures, ready for JSON: {"model", "fingerprint", "variant", "bank": {"source", "pictures",
            "left_out": {reason: number}}, "queries": {"source", "pictures", "left_out", "in_bank": number of those that
            the bank holds too}, "figures": {…}, "baselines": {"raw_pixels": {…}, "without_whitening": {…} if there is
            one, "random_encoder": {…}} or None}, and "zero_shot" as of labels_as_text if it was asked for; each {…}
            having the figures of neighbour_figures, linear_probe, alignment, uniformity and effective_rank. A figure
            that does not exist is None.
        classes: all labels of both sides, in sorted order.
        bank, queries: the two compared sides.
        neighbours: (N, 20) positions in the bank, each query's most alike first.
        scores: (N, 20) their cosines.
        predicted: (N,) positions in classes, by the weighted vote of 20.
        account: what was left out of both sides.
    """

    report: dict[str, Any]
    classes: list[str]
    bank: Rows
    queries: Rows
    neighbours: IntArray
    scores: FloatArray
    predicted: IntArray
    account: Account = field(default_factory=Account)

    def notes(self) -> list[str]:
        """Return the caveats that belong beside the figures."""
        count, unknown = len(self.bank.labels), ~np.isin(self.queries.labels, self.bank.labels)
        notes = []
        if shared := self.report["queries"]["in_bank"]:
            notes.append(
                f"{shared} of {len(self.queries.ids)} queries are in the bank, too, by id or content: none of them "
                "votes for itself, and the linear probe learns on the rest of the bank"
            )
        if self.report["figures"]["weighted_k200"] is None:
            beside = " beside a query" if shared else ""
            notes.append(f"weighted_k200 is left out: it needs a bank of {MOST_K} pictures{beside}, not {count}")
        if unknown.any():
            names = [self.classes[label] for label in np.unique(self.queries.labels[unknown])]
            notes.append(
                f"{unknown.sum()} queries are of classes that the bank does not have ({_few(names)}): every answer to "
                f"them is wrong, and map_at_r and r_precision leave them out"
            )
        if self.report["baselines"] is None:
            notes.append("raw pixels and the other encoders are left out: embeddings were given, not pictures")
        return notes


def list_left_out(account: Account, report: Path | None) -> None:
    """List what was left out: in the report's folder, or without one in .lookalike/evaluate.left_out.jsonl.

    A report comes with its list. Without one, figures do not depend on a working folder that can be written to; that
    the list is missing becomes a note of the account.

    Raises:
        InvalidOutput: the list of a report cannot be written.
    """
    if report is not None:
        account.save(report / LEFT_OUT)
        return
    try:
        account.save(left_out_beside(Path(".lookalike", "evaluate")))
    except InvalidOutput as error:
        account.notes.append(str(error))


def print_table(evaluation: Evaluation, bank: str, queries: str) -> None:
    """Print the figures and those of the baselines side by side; `bank` and `queries` are named as the user did."""
    found = evaluation.report
    counts = found["bank"]["pictures"], found["queries"]["pictures"]
    print(f"{counts[0]} of {bank} vote on {counts[1]} of {queries}; variant {found['variant']}")
    columns = [(found["model"], found["figures"])]
    columns += [(name.replace("_", " "), figures) for name, figures in (found["baselines"] or {}).items()]
    print("".join([f"{'':14}", *(f"  {name:>17}" for name, _ in columns)]))
    for key in found["figures"]:
        values = ("-" if figures[key] is None else f"{figures[key]:.4f}" for _, figures in columns)
        print("".join([f"{key:14}", *(f"  {value:>17}" for value in values)]))
    if named := found.get("zero_shot"):
        print(f"{'zero_shot':14}  {named['accuracy']:>17.4f}  by the words of {named['classes']} labels alone")


class Measured(NamedTuple):
    """The figures of one representation, and the neighbours they come from."""

    figures: dict[str, float | None]
    neighbours: IntArray  # (N, 20)
    scores: FloatArray  # (N, 20)
    predicted: IntArray  # (N,)


def evaluate(
    model: Path,
    bank_name: str,
    queries_name: str,
    data_root: Path,
    variant: str = "auto",
    image_key: str | None = None,
    limits: Limits = OWN_FILES,
    as_text: Sequence[str] | None = None,
    runtime: str = "auto",
) -> Evaluation:
    """Measure an encoder: classify each query by its nearest bank pictures, and examine the embeddings' distribution.

    Raw pixels are compared as rows minus each picture's mean, scaled to length 1; their k5 is by Euclidean distance on
    0..255. One channel represents pictures that are all grey.

    Args:
        model: the encoder's folder.
        bank_name, queries_name: SOURCEs with labels, or folders of `lookalike embed`, whose embeddings are used.
        data_root: folder of the named sets.
        variant: of the encoder, "auto" for the one that serves here; the random encoder derives from model.onnx.
        image_key: as in open_source, for both sides.
        limits: of a picture.
        as_text: name the queries by the words of their labels, too, in these templates; empty for those of the encoder.
        runtime: "onnxruntime", "openvino", or "auto" for the faster one here.

    Raises:
        InvalidModel, InvalidSource: no such encoder, variant or source; no labels or one alone; fewer than 20 bank
            pictures; embeddings of another encoder.
        UndecodablePicture or another picture error for the first picture that cannot be read: figures need them all.

    Cost: mnist/train against mnist/test 2 minutes on 2 cores. Beside the pictures, 8 bytes for each value of a pixel.
    """
    card = read_card(model)
    if as_text is not None:
        check_reads_texts(card)
    opened = [_open(name, data_root, card, image_key) for name in (bank_name, queries_name)]
    accounts = [Account.of(side) if isinstance(side, Source) else Account() for side in opened]
    sides = [_labelled(side, account) for side, account in zip(opened, accounts, strict=True)]
    _check(*sides)
    made = {side.variant for side in sides if isinstance(side, Embeddings)}
    encoder = None
    if any(isinstance(side, Source) for side in sides):
        encoder = Encoder(card, variant=variant, runtime=runtime)
        made.add(encoder.variant)
    classes = sorted({label for side in sides for label in _names(side)})
    bank, queries = (_rows(side, classes, card, encoder, limits) for side in sides)
    _check_lengths(bank, queries)
    overlap = _overlap(bank, queries)
    ours = measure(card.name, bank.embeddings, bank.labels, queries.embeddings, queries.labels, overlap)
    report = {
        "model": card.name,
        "fingerprint": card.fingerprint,
        "variant": ", ".join(sorted(made)),
        "bank": _counts(bank, accounts[0]),
        "queries": _counts(queries, accounts[1]) | {"in_bank": len(overlap)},
        "figures": ours.figures,
        "baselines": _baselines(card, encoder, bank, queries, overlap),
    }
    if as_text is not None:
        report["zero_shot"] = labels_as_text(card, queries.embeddings, queries.labels, classes, as_text)
    account = accounts[0] + accounts[1]
    return Evaluation(report, classes, bank, queries, ours.neighbours, ours.scores, ours.predicted, account)


def measure(
    name: str,
    bank: FloatArray,
    bank_labels: IntArray,
    queries: FloatArray,
    query_labels: IntArray,
    overlap: Overlap = NO_OVERLAP,
) -> Measured:
    """Return all figures of a representation, rounded to 4 decimals; alignment and uniformity are of the queries,
    the effective rank is of the bank.

    Args:
        name: of the representation, for bars.
        bank, queries: (B, D), (N, D), rows of L2 norm 1, or 0; B >= 20.
        bank_labels, query_labels: (B,), (N,), whole numbers from 0, two of them or more on each side.
        overlap: the queries that the bank holds too. They have no vote for themselves, and the linear probe does not
            learn on them; it is None if fewer than two labels are left.
    """
    found = find_neighbours(bank, bank_labels, queries, query_labels, MOST_K, name, overlap)
    figures, predicted = neighbour_figures(found, bank_labels, query_labels)
    learnt = np.setdiff1d(np.arange(len(bank)), np.concatenate([[], *overlap.values()]))
    able = len(np.unique(bank_labels[learnt])) > 1
    figures |= {
        "linear_probe": linear_probe(bank[learnt], bank_labels[learnt], queries, query_labels, name) if able else None,
        "alignment": alignment(queries, query_labels),
        "uniformity": uniformity(queries),
        "effective_rank": effective_rank(bank),
    }
    rounded = {key: None if value is None else round(value, 4) for key, value in figures.items()}
    return Measured(rounded, found.positions[:, :HEADLINE_K], found.scores[:, :HEADLINE_K], predicted)


def _baselines(
    card: Card, encoder: Encoder | None, bank: Rows, queries: Rows, overlap: Overlap
) -> dict[str, Any] | None:
    """Return the figures of raw pixels, of the encoder without its whitening, if any, and of the untrained encoder.

    None unless both sides are pictures.
    """
    if bank.pixels is None or queries.pixels is None:
        return None
    labels = bank.labels, queries.labels
    banked, asked = _one_channel(bank.pixels, queries.pixels)
    raw = measure("raw pixels", centred(banked), labels[0], centred(asked), labels[1], overlap).figures
    raw["k5"] = round(float((vote(labels[0][nearest_pixels(banked, asked, 5, overlap)]) == labels[1]).mean()), 4)
    bare = without_whitening(card)
    others = {"random_encoder": Encoder(replace(bare, model=randomised(bare)), variant="fp32")}
    if bare.fingerprint != card.fingerprint:
        variant, runtime = ("fp32", "onnxruntime") if encoder is None else (encoder.variant, encoder.runtime)
        others = {"without_whitening": Encoder(bare, variant=variant, runtime=runtime)} | others
    figures = {"raw_pixels": raw}
    for name, other in others.items():
        rows = [embed_pixels(other, pixels, name) for pixels in (bank.pixels, queries.pixels)]
        figures[name] = measure(name, rows[0], labels[0], rows[1], labels[1], overlap).figures
    return figures


def read_pixels(
    source: Source, preprocessing: Preprocessing, digests: list[str] | None = None, limits: Limits = OWN_FILES
) -> PixelArray:
    """Return all of a source's pixels (N, H, W, 3), decoded as in the service.

    Args:
        source: N pictures.
        preprocessing: of the encoder.
        digests: gets the sha256 (hex) of the N image files, if given.
        limits: of a picture.

    Raises:
        InvalidSource: they do not fit into memory.
        UndecodablePicture and its like for the first picture that cannot be read: figures need them all.
    """
    shape = (len(source), preprocessing.height, preprocessing.width, 3)
    need, have = _BYTES * math.prod(shape), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise InvalidSource(
            f"{source.name}: the pixels of {len(source)} pictures need {need / 1e9:.0f} GB of memory, this machine has "
            f"{have / 1e9:.0f}; embed both sides with `lookalike embed` and give those folders"
        )
    pixels = np.empty(shape, np.uint8)
    found = [""] * len(source)

    def read(position: int) -> None:
        try:
            data = source.entry(position).data
            found[position] = hashlib.sha256(data).hexdigest()
            pixels[position] = decode_pixels(data, preprocessing, limits)
        except LookalikeError as error:
            raise type(error)(f"{source.name}: {source.ids[position]}: {error}") from error

    def read_chunk(start: int) -> int:
        positions = range(start, min(start + _CHUNK, len(source)))
        for position in positions:
            read(position)
        return len(positions)

    with (
        ThreadPoolExecutor(cores() if preprocessing.side > _SMALL_SIDE else 1) as pool,
        tqdm(desc=f"reading {source.name}", total=len(source), unit=" pictures", leave=False) as bar,
    ):
        for count in pool.map(read_chunk, range(0, len(source), _CHUNK)):
            bar.update(count)
    if digests is not None:
        digests += found
    return pixels


def nearest_pixels(bank: PixelArray, queries: PixelArray, k: int, overlap: Overlap = NO_OVERLAP) -> IntArray:
    """Return the positions (N, k) in the bank of each query's nearest by Euclidean distance on 0..255.

    A query that the bank holds too, as `overlap` tells, is not among its own.
    """
    banked, asked = (rows.reshape(len(rows), -1) for rows in _one_channel(bank, queries))
    # The least |q − b|² is the greatest q · b − |b|² / 2: one more column makes it an inner product.
    rows, ones = (np.empty((len(side), side.shape[1] + 1), np.float32) for side in (banked, asked))
    rows[:, :-1], ones[:, :-1] = banked, asked
    rows[:, -1], ones[:, -1] = np.einsum("nd,nd->n", rows[:, :-1], rows[:, :-1], dtype=np.float64) / -2, 1
    most = max(map(len, overlap.values()), default=0)
    found = nearest(rows, ones, k + most, "raw pixels")[1]
    for query, own in overlap.items():
        found[query, :k] = found[query][~np.isin(found[query], own)][:k]
    return found[:, :k]


def centred(pixels: PixelArray) -> FloatArray:
    """Return pixels (N, S, S, C) minus each picture's mean, as rows of length 1; a flat picture's row is 0."""
    rows = pixels.reshape(len(pixels), -1).astype(np.float32)
    rows -= rows.mean(1, keepdims=True)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
    return rows


def _one_channel(*sides: PixelArray) -> Sequence[PixelArray]:
    """Return pixels with one channel if all are grey: it gives the same order as three equal ones."""
    grey = all((pixels == pixels[..., :1]).all() for pixels in sides)
    return [pixels[..., :1] for pixels in sides] if grey else sides


def randomised(card: Card) -> bytes:
    """Return the card's ONNX graph with random weights: the same network, untrained.

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
                else:
                    # Convolutions and transposed products store outputs first, the others inputs first.
                    outputs_first = node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute)
                    fan_in = np.prod(shape[1:]) if outputs_first else shape[-2]
                    put(name, random.normal(0, np.sqrt(2 / fan_in), shape))
                    drawn = True
        elif node.op_type in ("BatchNormalization", "LayerNormalization"):
            for name, constant in zip(stored[1:], (1, 0, 0, 1), strict=False):
                if name:
                    put(name, np.full(tuple(values[name].dims), constant))
    if not drawn:
        raise InvalidModel(f"{card.folder}: no weight to draw at random in its graph; is it quantised?")
    return bytes(graph.SerializeToString())


def _open(name: str, data_root: Path, card: Card, image_key: str | None) -> Source | Embeddings:
    """Open a SOURCE or a folder of embeddings, which must be of the card's encoder."""
    embeddings = open_embeddings(name)
    if embeddings is None:
        return open_training_source(name, data_root, image_key)
    if embeddings.fingerprint != card.fingerprint:
        raise InvalidSource(
            f"{name}: holds embeddings of the encoder {embeddings.fingerprint}, not of {card.name}, {card.fingerprint}"
        )
    return embeddings


def _check(bank: Source | Embeddings, queries: Source | Embeddings) -> None:
    """Refuse sides without meaningful figures, before the long work."""
    if len(bank) < HEADLINE_K:
        raise InvalidSource(
            f"{bank.name}: {len(bank)} pictures cannot vote among {HEADLINE_K}; a bank needs {HEADLINE_K} or more, "
            f"{MOST_K} for weighted_k200"
        )
    for side in (bank, queries):
        names = _names(side)
        if len(names) == 1:
            raise InvalidSource(f"{side.name}: expected pictures of two classes or more, all are of {names[0]!r}")


def _check_lengths(bank: Rows, queries: Rows) -> None:
    lengths = [side.embeddings.shape[1] for side in (bank, queries)]
    if lengths[0] != lengths[1]:
        raise InvalidSource(
            f"embeddings of one length are expected, got {lengths[0]} numbers from {bank.name} "
            f"and {lengths[1]} from {queries.name}"
        )


def _counts(side: Rows, account: Account) -> dict[str, Any]:
    """Return the facts of a side for the report."""
    return {"source": side.name, "pictures": len(side.ids), "left_out": account.facts()["left_out"]}


def _names(side: Source | Embeddings) -> list[str]:
    """Return the labels of a side, each once."""
    if side.labels is None:
        raise InvalidSource(f"{side.name}: has no labels; evaluation needs pictures in folders named for their classes")
    return side.labels.used()


def _overlap(bank: Rows, queries: Rows) -> Overlap:
    """Find the queries that the bank holds too. Raises InvalidSource if too few other pictures are left to vote."""
    sides = (Identities(side.origin, side.ids, side.digests, side.embeddings) for side in (bank, queries))
    overlap = find_overlap(*sides)
    others = len(bank.ids) - max(map(len, overlap.values()), default=0)
    if others < HEADLINE_K:
        raise InvalidSource(
            f"{bank.name}: only {others} of its {len(bank.ids)} pictures can vote on a query that is in the bank, "
            f"too; expected {HEADLINE_K} or more"
        )
    return overlap


def _labelled(side: Source | Embeddings, account: Account) -> Source | Embeddings:
    """Return a side without the pictures that have no label, which go to the account."""
    if side.labels is None or not side.labels.missing:
        return side
    missing = np.flatnonzero(side.labels.numbers < 0).tolist()
    account.left_out.append([LeftOut(side.ids[at], "without a label", False) for at in missing])
    kept = np.flatnonzero(side.labels.numbers >= 0)
    if isinstance(side, Source):
        return select(side, kept)
    ids, labels = Names(side.ids[at] for at in kept.tolist()), Labels(side.labels.codes[kept], side.labels.names)
    digests = None if side.digests is None else Names(side.digests[at] for at in kept.tolist())
    return replace(side, ids=ids, labels=labels, rows=side.rows[kept], digests=digests)


def _rows(side: Source | Embeddings, classes: list[str], card: Card, encoder: Encoder | None, limits: Limits) -> Rows:
    assert side.labels is not None
    codes = {name: code for code, name in enumerate(classes)}
    labels = np.asarray([codes.get(name, -1) for name in side.labels.names], np.int64)[side.labels.numbers]
    if isinstance(side, Embeddings):
        return Rows(side.name, side.ids, labels, side.rows, None, side.digests, origin_of(side.origin))
    assert encoder is not None
    digests: list[str] = []
    pixels = read_pixels(side, card.preprocessing, digests, limits)
    rows = embed_pixels(encoder, pixels, "embedding")
    return Rows(side.name, side.ids, labels, rows, pixels, digests, origin_of(side.name))


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
