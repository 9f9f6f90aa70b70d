"""Quality of a whitening against the number of its training pictures.

    python -m benchmarks.whitening models/cifar10 --source cifar10-jpeg/train.zip

One source gives three disjoint sets: 20,000 pictures vote, 5,000 are queries, of which 1,000 also have a hard copy,
and up to 20,000 train the whitening. The baseline is the same encoder without a whitening.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.copies import find_copies, hard_copy
from service import FloatArray, IntArray
from service.encoding.card import read_card
from service.encoding.encoder import Encoder
from service.encoding.images import decode_pixels
from service.encoding.limits import Limits
from service.encoding.variants import embed_pixels
from service.encoding.voting import headline_accuracy
from service.encoding.whitening import Whitening, default_whitening, learn_whitening, without_whitening
from service.sources import open_source
from service.sources.source import Source

_BANK, _QUERIES, _COPIES = 20_000, 5_000, 1_000
_COUNTS = (100, 300, 1_000, 3_000, 10_000, 20_000)
_POWERS, _DIMENSIONS = (0.5, 0.75, 1.0), (1024, 512, 256, 128, 64)
_BLOCK = 512


def main(
    model: Annotated[Path, typer.Argument(help="Folder of the encoder.")],
    source: Annotated[str, typer.Option(help="SOURCE with labels, of pictures that suit the encoder.")],
    data_root: Annotated[Path, typer.Option()] = Path("data"),
    kept: Annotated[float, typer.Option(help="Share of each side that a hard copy keeps.")] = 0.5**0.5,
) -> None:
    """Print the table for one encoder."""
    pictures = open_source(source, data_root)
    assert pictures.labels is not None, "the source needs labels"
    labels = pictures.labels.numbers
    encoder = Encoder(without_whitening(read_card(model)), "cpu")
    order = np.random.default_rng(0).permutation(len(pictures))[: _BANK + _QUERIES + _COUNTS[-1]]
    bank, queries, learnt = np.split(order, [_BANK, _BANK + _QUERIES])
    rows = {name: _embed(encoder, pictures, part) for name, part in (("bank", bank), ("queries", queries))}
    trained_on = _embed(encoder, pictures, learnt)
    copies = _embed(encoder, pictures, queries[:_COPIES], kept)

    def line(count: int, power: float, dimension: int, whitening: Whitening | None) -> None:
        sides = [rows["bank"], rows["queries"], copies]
        if whitening is not None:
            sides = [whitening.apply(side) for side in sides]
        accuracy = headline_accuracy(sides[0], labels[bank], sides[1], labels[queries])
        found = find_copies(sides[1][:_COPIES], sides[2])
        usual = whitening is not None and (power, dimension) == default_whitening(count, trained_on.shape[1])
        print(
            f"| {count}{' (default)' * usual} | {power:g} | {dimension} | {accuracy:.4f} | {found.recall:.3f} "
            f"| {found.margin:+.3f} | {found.strangers:+.3f} |",
            flush=True,
        )

    print("| learnt on | power | dimensions | weighted 20-NN | recall@1 of copies | margin | strangers |")
    print("|---|---|---|---|---|---|---|")
    dimension = trained_on.shape[1]
    line(0, 0, dimension, None)
    for count in (count for count in _COUNTS if count <= len(trained_on)):
        line(count, 0, dimension, learn_whitening(trained_on[:count], 0, dimension))
        usual = default_whitening(count, dimension)[1]
        for size in sorted({usual, *_DIMENSIONS}, reverse=True):
            for power in _POWERS if size <= min(dimension, count - 1) else ():
                line(count, power, size, learn_whitening(trained_on[:count], power, size))


def _embed(encoder: Encoder, source: Source, positions: IntArray, kept: float | None = None) -> FloatArray:
    """Embed pictures of a source, or their hard copies."""
    blocks = []
    for start in range(0, len(positions), _BLOCK):
        data = [source.entry(int(position)).data for position in positions[start : start + _BLOCK]]
        if kept:
            data = [hard_copy(one, kept) for one in data]
        pixels = np.stack([decode_pixels(one, encoder.card.preprocessing, Limits()) for one in data])
        blocks.append(embed_pixels(encoder, pixels, "embedding"))
    return np.concatenate(blocks)


if __name__ == "__main__":
    typer.run(main)
