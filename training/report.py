"""Evaluation → a folder with report.json, report.html and tsne.png: the figures and their pictures."""

import base64
import colorsys
import io
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from sklearn.manifold import TSNE

from service import FloatArray, IntArray, PixelArray
from service.account import LEFT_OUT
from service.encoding.voting import HEADLINE_TEMPERATURE
from service.errors import InvalidOutput
from service.files import write_folder
from training.evaluate import Evaluation, Rows
from training.knn import DoubleArray

REPORT_FILE = "report.json"
FILES = {REPORT_FILE, "report.html", "tsne.png", LEFT_OUT}

_MOST_POINTS, _FEWEST_POINTS = 2000, 10
_THUMBNAIL, _PICTURE = 48, 96  # pixels
# Classes of a legible confusion matrix; with more, the report lists so many pairs. Also the most in tsne.png's legend.
_MOST_CLASSES = 30
_HITS, _MISSES, _NEIGHBOURS = 12, 24, 8
# The histogram of similarities samples so many pairs, and has so many bins.
_PAIRS, _STEPS = 20_000, 50
# Pictures up to this side in pixels are enlarged with square pixels, as on the service's page.
_SMALL = 64

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def check_folder(folder: Path) -> None:
    """Make sure that a report may be written to `folder`, and make its parent folder.

    Raises:
        InvalidOutput: `folder` is a file or holds more than an earlier report; or its parent cannot be written to.
    """
    if folder.name in ("", ".."):
        raise InvalidOutput(f"{folder}: expected a folder with a name of its own, such as reports/mine")
    try:
        if folder.exists() and not folder.is_dir():
            raise InvalidOutput(f"{folder}: is a file; choose another --report")
        present = {path.name for path in folder.iterdir()} if folder.exists() else set()
        ours = present <= FILES and REPORT_FILE in present and b'"fingerprint"' in (folder / REPORT_FILE).read_bytes()
        if present and not ours:
            raise InvalidOutput(f"{folder}: is there and holds more than an earlier report; choose another --report")
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=folder.parent).cleanup()
    except OSError as error:
        raise InvalidOutput(f"{folder}: cannot be written: {error.strerror}") from error


def write_report(folder: Path, evaluation: Evaluation) -> None:
    """Write report.json, report.html and tsne.png, all or none; an earlier report is replaced.

    report.json is the evaluation's report and {"confusion": {"classes", "counts"}}: counts[i][j] queries
    of class i were classified as j. report.html needs no other file and no network. Fewer than 10 queries make no map,
    and no tsne.png.

    Raises:
        InvalidOutput: as check_folder, or the disk is full.

    Cost: t-SNE of at most 2,000 queries, about 15 s on one core.
    """
    check_folder(folder)
    queries, classes = evaluation.queries, evaluation.classes
    counts = confusion(queries.labels, evaluation.predicted, len(classes))
    shown = np.linspace(0, len(queries.ids) - 1, min(len(queries.ids), _MOST_POINTS)).astype(np.int64)
    places = scatter(queries.embeddings[shown]) if len(shown) >= _FEWEST_POINTS else None
    page = _page(evaluation, counts, shown, places)
    report = evaluation.report | {"confusion": {"classes": classes, "counts": counts.tolist()}}
    files = {
        REPORT_FILE: (json.dumps(report, allow_nan=False) + "\n").encode(),
        # A name that is not UTF-8 shows its odd bytes as \udcff.
        "report.html": page.encode("utf-8", "backslashreplace"),
    }
    if places is not None:
        files["tsne.png"] = _draw(evaluation, queries.labels[shown], places)
    try:
        write_folder(files, folder)
    except OSError as error:
        raise InvalidOutput(f"{folder}: cannot be written: {error.strerror}") from error


def confusion(labels: IntArray, predicted: IntArray, classes: int) -> IntArray:
    """Return the counts (classes, classes) of pictures by label (row) and predicted label (column)."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def scatter(embeddings: FloatArray) -> FloatArray:
    """Return a place (N, 2) in 0..1 for each embedding (N, D), by t-SNE; the same on every run.

    Source: van der Maaten & Hinton, Visualizing data using t-SNE, JMLR 9 (2008).
    """
    print(f"t-SNE of {len(embeddings):,} pictures …", file=sys.stderr)
    # Identical embeddings have principal components of length 0, by which TSNE would divide.
    alike = float(embeddings.std(0).max()) < 1e-6
    tsne = TSNE(perplexity=min(30, (len(embeddings) - 1) / 3), init="random" if alike else "pca", random_state=0)
    places = tsne.fit_transform(embeddings)
    low, high = places.min(0), places.max(0)
    return np.asarray((places - low) / np.maximum(high - low, 1e-9), np.float32)


def sample_scores(evaluation: Evaluation, own_class: bool) -> FloatArray:
    """Return cosines of up to 20,000 random pairs of a query and a bank picture, of one class or of two."""
    bank, queries, random = evaluation.bank, evaluation.queries, np.random.default_rng(0)
    order = np.argsort(bank.labels, kind="stable")
    asked = random.integers(0, len(queries.ids), _PAIRS)
    first = np.searchsorted(bank.labels[order], queries.labels[asked], "left")
    inside = np.searchsorted(bank.labels[order], queries.labels[asked], "right") - first
    eligible = inside if own_class else len(order) - inside
    asked, first, inside, eligible = (values[eligible > 0] for values in (asked, first, inside, eligible))
    drawn = random.integers(0, eligible)
    place = first + drawn if own_class else drawn + (drawn >= first) * inside
    scores = np.einsum("nd,nd->n", queries.embeddings[asked], bank.embeddings[order[place]])
    return np.asarray(scores.clip(-1, 1), np.float32)


def choose_queries(evaluation: Evaluation) -> tuple[list[int], list[int], FloatArray]:
    """Return positions of 12 correctly classified queries, of as many classes as possible, and of the 24 surest misses.

    The third value is the share (N,) of the soft votes that each query's predicted label got.
    """
    labels, predicted = evaluation.queries.labels, evaluation.predicted
    votes = np.exp((evaluation.scores - evaluation.scores.max(1, keepdims=True)) / HEADLINE_TEMPERATURE)
    agree = evaluation.bank.labels[evaluation.neighbours] == predicted[:, None]
    shares = np.asarray((votes * agree).sum(1) / votes.sum(1), np.float32)
    misses = np.flatnonzero(predicted != labels)
    misses = misses[np.lexsort((-evaluation.scores[misses].mean(1), -shares[misses].round(3)))]
    hits = np.random.default_rng(0).permutation(np.flatnonzero(predicted == labels))
    # The number of each hit within its class: the first of every class come before the second.
    turn = np.zeros(len(hits), np.int64)
    for label in np.unique(labels[hits]):
        turn[labels[hits] == label] = np.arange((labels[hits] == label).sum())
    hits = hits[np.argsort(turn, kind="stable")][:_HITS]
    return hits[np.argsort(labels[hits], kind="stable")].tolist(), misses[:_MISSES].tolist(), shares


def palette(count: int) -> list[str]:
    """Return `count` colours, #rrggbb, as distinguishable as possible on white and on black."""
    if count <= 20:
        chart = mpl.colormaps["tab10" if count <= 10 else "tab20"]
        return [mpl.colors.to_hex(chart(number)) for number in range(count)]
    wheel = (colorsys.hls_to_rgb(number / count, (0.4, 0.55, 0.68)[number % 3], 0.65) for number in range(count))
    return [mpl.colors.to_hex(colour) for colour in wheel]


def _page(evaluation: Evaluation, counts: IntArray, shown: IntArray, places: FloatArray | None) -> str:
    classes, queries, bank = evaluation.classes, evaluation.queries, evaluation.bank
    hits, misses, shares = choose_queries(evaluation)

    def picture(rows: Rows, position: int) -> dict[str, Any]:
        source = None if rows.pixels is None else _data_uri(_shrunk(rows.pixels[position], _PICTURE))
        return {"source": source, "id": rows.ids[position], "label": classes[rows.labels[position]]}

    def strip(query: int) -> dict[str, Any]:
        near = zip(evaluation.neighbours[query].tolist(), evaluation.scores[query].tolist(), strict=True)
        neighbours = [
            picture(bank, position) | {"score": score, "match": bank.labels[position] == queries.labels[query]}
            for position, score in list(near)[:_NEIGHBOURS]
        ]
        named = {"named": classes[evaluation.predicted[query]], "share": float(shares[query])}
        return picture(queries, query) | named | {"neighbours": neighbours}

    wrong = counts * (1 - np.eye(len(classes), dtype=np.int64))
    worst = [divmod(int(place), len(classes)) for place in np.argsort(-wrong, axis=None, kind="stable")[:_MOST_CLASSES]]
    page: str = _TEMPLATES.get_template("report.html").render(
        report=evaluation.report,
        notes=evaluation.notes(),
        classes=classes,
        colours=palette(len(classes)),
        sizes=counts.sum(1).tolist(),
        drawn=np.bincount(queries.labels[shown], minlength=len(classes)).tolist(),
        small=any(rows.pixels is not None and rows.pixels.shape[1] <= _SMALL for rows in (queries, bank)),
        counts=counts.tolist() if len(classes) <= _MOST_CLASSES else None,
        worst=[(true, named) for true, named in worst if wrong[true, named]],
        wrong=wrong,
        points=[(queries.ids[at], int(queries.labels[at]), int(evaluation.predicted[at])) for at in shown.tolist()],
        places=None if places is None else places.round(4).tolist(),
        sprite=None if queries.pixels is None or places is None else _sprite(queries.pixels[shown]),
        histogram=_histogram(sample_scores(evaluation, True), sample_scores(evaluation, False)),
        hits=[strip(query) for query in hits],
        misses=[strip(query) for query in misses],
        missed=int(wrong.sum()),
    )
    return page


def _histogram(within: FloatArray, across: FloatArray) -> dict[str, Any]:
    """Return the histogram for the page: outlines in a unit square, tick places, medians."""
    low = min(0.9, float(np.floor(10 * np.concatenate([within, across]).min())) / 10)
    edges = np.linspace(low, 1, _STEPS + 1)
    shares = [np.histogram(scores, edges)[0] / max(len(scores), 1) for scores in (within, across)]
    top = max(float(share.max()) for share in shares)

    def outline(share: DoubleArray) -> str:
        places, heights = np.repeat((edges - low) / (1 - low), 2), np.concatenate([[0], np.repeat(share / top, 2), [0]])
        return " ".join(f"{x:.4g},{y:.4g}" for x, y in zip(places, heights, strict=True))

    ticks = [tick / 10 for tick in range(-10, 11, 2 if low < 0 else 1) if tick / 10 >= low]
    return {
        "outlines": [outline(share) for share in shares],
        "medians": [float(np.median(scores)) if len(scores) else None for scores in (within, across)],
        "ticks": [(tick, (tick - low) / (1 - low)) for tick in ticks],
        "top": top,
    }


def _shrunk(pixels: PixelArray, side: int) -> Image.Image:
    """Return pixels (S, S, 3) as a picture with sides of at most `side`."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def _sprite(pixels: PixelArray) -> dict[str, Any]:
    """One picture of all thumbnails, row by row."""
    thumbnails = [np.asarray(_shrunk(picture, _THUMBNAIL)) for picture in pixels]
    columns, side = int(np.ceil(np.sqrt(len(thumbnails)))), len(thumbnails[0])
    rows = -(-len(thumbnails) // columns)
    cells = np.zeros((rows * columns, side, side, 3), np.uint8)
    cells[: len(thumbnails)] = thumbnails
    sheet = cells.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3)
    return {"source": _data_uri(Image.fromarray(sheet)), "columns": columns, "rows": rows, "side": side}


def _data_uri(picture: Image.Image) -> str:
    """Return a picture as WebP in a data: address; grey ones lossless, which is no larger."""
    pixels, buffer = np.asarray(picture), io.BytesIO()
    picture.save(buffer, "WebP", quality=85, lossless=bool((pixels == pixels[..., :1]).all()))
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _draw(evaluation: Evaluation, labels: IntArray, places: FloatArray) -> bytes:
    """Return tsne.png, 1200 × 900."""
    names, colours = evaluation.classes, palette(len(evaluation.classes))
    listed = np.unique(labels).tolist()
    texts = [_printable(names[label], 24) for label in listed[:_MOST_CLASSES]]
    handles = [Line2D([], [], marker="o", linestyle="", color=colours[label]) for label in listed[:_MOST_CLASSES]]
    heading = f"{len(texts)} of {len(listed)} classes" if len(listed) > len(texts) else None
    # In random order, so that no class covers all the others.
    order = np.random.default_rng(0).permutation(len(labels))
    with warnings.catch_warnings(), mpl.rc_context({"text.parse_math": False}):
        # A box stands for the glyph.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = Figure(figsize=(12, 9), dpi=100, layout="constrained")
        axes = figure.add_subplot(xticks=[], yticks=[])
        x, y = places[order].T
        axes.scatter(x, y, s=14, c=[colours[label] for label in labels[order]], alpha=0.8, linewidths=0)
        # As in report.html, whose y axis points down.
        axes.invert_yaxis()
        axes.set_title(_printable(f"{evaluation.report['model']}: {len(labels):,} of {evaluation.queries.name}, t-SNE"))
        figure.legend(handles, texts, title=heading, loc="outside right upper", frameon=False)
        figure.savefig(buffer := io.BytesIO(), format="png")
    return buffer.getvalue()


def _printable(name: str, most: int = 90) -> str:
    """Return a name without control characters, cut to length."""
    text = "".join(letter if letter.isprintable() else "�" for letter in name)
    return text if len(text) <= most else f"{text[: most - 1]}…"
