"""`lookalike whiten`: an encoder and pictures of the kind to be searched → a new encoder with a whitening."""

import sys
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from service import FloatArray, IntArray, PixelArray
from service.account import Account, Failure, left_out_beside, printable
from service.encoding.batcher import Batcher
from service.encoding.card import MODEL_FILE, TEXT_FILE, Card, fingerprint, read_card
from service.encoding.encoder import Encoder
from service.encoding.images import decode_pixels
from service.encoding.model_folder import check_new, write_model
from service.encoding.variants import Pictures, keep_good
from service.encoding.whitening import (
    LEAST_LEARNT,
    Whitening,
    append_whitening,
    default_whitening,
    learn_whitening,
    without_whitening,
)
from service.errors import InvalidModel, InvalidRequest, InvalidSource, LookalikeError
from service.jobs.reading import progress, read_ahead, use_good
from service.settings import Settings
from service.sources.source import Source

# The quality stops rising with fewer pictures than these.
_MOST_READ = 20_000
# One picture in 10, and at most 1,000, is held out of the learning to judge variants on; 2,000 others vote on them.
_KEPT_OUT, _MOST_KEPT_OUT = 10, 1000
_VOTING = 2000
# Entries of the card that are computed for the new encoder, and the output, which is named embedding there.
_COMPUTED = ("name", "dimension", "fingerprint", "sha256", "canary", "quality", "whitening", "output")


class Sample(NamedTuple):
    """The pictures that were read from a source.

    rows: (N, D) embeddings to learn on.
    pictures: pixels to judge variants with.
    failures: the pictures that could not be read.
    """

    rows: FloatArray
    pictures: Pictures
    failures: list[Failure]


def whiten(
    model: Path,
    source: Source,
    out: Path,
    settings: Settings,
    power: float | None = None,
    dimension: int | None = None,
    overwrite: bool = False,
) -> Account:
    """Learn a whitening on a source's pictures, without their labels, and write a new encoder that ends in it.

    It replaces an earlier whitening. One picture in ten, up to 1,000, is held out: the variants are compared on these,
    and if there are labels, up to 2,000 of the others vote on them. What was left out is listed in
    OUT.left_out.jsonl, if there is any.

    Args:
        model: the encoder's folder.
        source: pictures like those that will be searched; if there are more than 20,000, that many, evenly spread.
        out: the new model folder.
        settings: device and picture limits.
        power, dimension: as in learn_whitening; None for values that suit the number of pictures.
        overwrite: replace an encoder that is there; it stays until the new one is whole.

    Returns:
        What became of the pictures: added are those learnt on, known those held out.

    Raises:
        InvalidModel: no such encoder, one with a text tower, or one that embeds all pictures alike.
        InvalidRequest: the dimension is larger than the encoder's.
        InvalidSource: too few pictures.
        InvalidOutput: `out` is there, and `overwrite` is not set; or it cannot be written.

    Cost: embeds each picture once, and those that judge variants once more with each variant; then O(N · D²).
    """
    check_new(out, overwrite)
    card = _card_of_pictures(model)
    bare = without_whitening(card)
    encoder = Encoder(bare, settings.device, "fp32")
    if dimension is not None and not 1 <= dimension <= encoder.dimension:
        raise InvalidRequest(f"--dimension: expected 1 to {encoder.dimension}, got {dimension}")
    rows, pictures, failures = _take_sample(source, encoder, settings)
    whitening, told = _learn(source.name, rows, power, dimension)
    whitened = append_whitening(bare.model, whitening, bare.output)
    named = Card(out, out.name, fingerprint(whitened, card.preprocessing), whitened, card.preprocessing, {})
    quality: dict[str, dict[str, Any]] = {MODEL_FILE: {"pictures": len(pictures.held_out)}}
    variants = {name: append_whitening(graph, whitening, bare.output) for name, graph in bare.variants.items()}
    graphs = keep_good(named, variants, pictures, quality)
    facts = {key: value for key, value in card.facts.items() if key not in _COMPUTED}
    facts["whitening"] = {"of": card.facts.get("whitening", {}).get("of", card.fingerprint), **told}
    write_model(out, graphs, card.preprocessing, facts, quality)
    account = Account.of(source)
    account.added, account.known, account.failures = len(rows), len(pictures.held_out), failures
    account.save(left_out_beside(out))
    return account


def _card_of_pictures(model: Path) -> Card:
    """Return the card of an encoder. Raises InvalidModel if it encodes texts, too."""
    if (model / TEXT_FILE).exists():
        raise InvalidModel(
            f"{model}: has a text tower; a whitening would take pictures out of the space that they share with texts"
        )
    return read_card(model)


def _learn(name: str, rows: FloatArray, power: float | None, dimension: int | None) -> tuple[Whitening, dict[str, Any]]:
    """Learn a whitening on embeddings (N, D) of the source `name`; return it with its facts for the card.

    Raises:
        InvalidSource: the rows are too few for the dimension.
    """
    usual = default_whitening(*rows.shape)
    power, dimension = usual[0] if power is None else power, usual[1] if dimension is None else dimension
    if dimension >= len(rows) and (power, dimension) != (0, rows.shape[1]):
        raise InvalidSource(
            f"{name}: {len(rows)} pictures to learn on do not show {dimension} directions; give more pictures, "
            "or lower --dimension"
        )
    told = {"source": name, "pictures": len(rows), "power": power, "dimension": dimension}
    return learn_whitening(rows, power, dimension), told


def _take_sample(source: Source, encoder: Encoder, settings: Settings) -> Sample:
    """Embed a source's pictures, or 20,000 of them. Raises InvalidSource if too few can be read."""
    positions: IntArray = np.linspace(0, len(source) - 1, min(len(source), _MOST_READ)).astype(np.int64)
    if len(positions) < len(source):
        print(f"{source.name}: {len(positions)} of {len(source)} pictures are read, evenly spread", file=sys.stderr)
    labels = source.labels.numbers[positions] if source.labels is not None else None
    # Pictures without a label have no vote and cannot be judged by one. Where most have none, nothing is.
    able = np.arange(len(positions)) if labels is None else np.flatnonzero(labels >= 0)
    if 2 * len(able) < len(positions):
        able, labels = np.arange(len(positions)), None
    kept_out = set(able[_KEPT_OUT // 2 :: max(_KEPT_OUT, -(-len(able) // _MOST_KEPT_OUT))].tolist())
    voting: set[int] = set()
    if labels is not None and len(np.unique(labels[able])) > 1:
        voting = set(able[np.linspace(0, len(able) - 1, min(_VOTING, len(able))).astype(int)].tolist()) - kept_out
    rows: list[FloatArray] = []
    held_out: dict[int, PixelArray] = {}
    bank: dict[int, PixelArray] = {}
    failures: list[Failure] = []

    def read(number: int) -> PixelArray:
        data = source.entry(int(positions[number])).data
        return decode_pixels(data, encoder.card.preprocessing, settings.limits)

    with closing(Batcher(encoder.lanes, encoder.max_batch)) as batcher, progress("embedding", len(positions), 0) as bar:
        for chunk in read_ahead(range(len(positions)), read):
            for (number, pixels), (_, row) in zip(chunk, use_good(chunk, batcher.embed), strict=True):
                if isinstance(row, LookalikeError):
                    id = source.ids[int(positions[number])]
                    failures.append(Failure.of(id, row))
                    bar.write(f"skipped {printable(id)}: {row}", file=sys.stderr)
                    continue
                assert not isinstance(pixels, LookalikeError)
                if number in kept_out:
                    held_out[number] = pixels
                else:
                    rows.append(row)
                    if number in voting:
                        bank[number] = pixels
            bar.update(len(chunk))
    if len(rows) < LEAST_LEARNT or not held_out:
        raise InvalidSource(
            f"{source.name}: {len(rows)} pictures are too few to learn a whitening on; expected {LEAST_LEARNT} or more "
            "of the kind that will be searched"
        )
    asked = np.stack(list(held_out.values()))
    known = (labels[list(bank)], labels[list(held_out)]) if bank and labels is not None else None
    return Sample(np.stack(rows), Pictures(asked, asked, np.stack([*bank.values()] or [asked[0]]), known), failures)
