"""The training material of a run: the source's pixels, their statistics, and the held-out pictures."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from service import IntArray, PixelArray
from service.encoding.card import Card
from service.encoding.images import tones
from service.encoding.limits import OWN_FILES, Limits
from service.encoding.variants import Pictures
from service.errors import InvalidRequest, InvalidSource, LookalikeError
from service.sources.source import Source
from training.captions import Captions, read_captions
from training.checkpoint import Checkpoint
from training.data import Canvas, names_checksum, sample, spread
from training.methods import METHODS
from training.recipe import Recipe
from training.weights import Normalisation

if TYPE_CHECKING:
    from service.encoding.encoder import Encoder

# All counts are of pictures.
_SAMPLED = 2048
_HELD_OUT = 1000
# A twentieth of fewer pictures is too few queries for a meaningful accuracy.
_LEAST_HELD_FROM = 400
_CHECK_BANK, _CALIBRATION = 2000, 512
# A whitening is learnt on so many pictures, whose pixels take at most so many bytes.
_LEARNT_ON, _LEARNT_BYTES = 20_000, 1_000_000_000


@dataclass(frozen=True)
class Material:
    """The training material of a run.

    Attributes:
        canvas: the pixels.
        labels: (count,) int64, −1 for a picture without a label; or None.
        trained, held_out: positions. The held-out ones are the queries of online k-NN; without labels there are none,
            but for a method that learns from captions, whose held-out pairs are searched in the end.
        mean, std: (C,) of the pixels, 0..1.
        tones: the pictures' tone histogram (images.tones).
        checksum: of the source's ids.
        captions: of the pictures, for a method that learns from them.
        locked: the card of a locked encoder; the canvas holds its embeddings then, and mean, std and tones are empty.
    """

    canvas: Canvas
    labels: IntArray | None
    trained: IntArray
    held_out: IntArray
    mean: Tensor
    std: Tensor
    tones: list[float]
    checksum: int
    captions: Captions | None = None
    locked: Card | None = None

    @property
    def queries(self) -> IntArray:
        """Positions of the held-out pictures that have a label: those that k-NN is asked about."""
        return self.held_out[:0] if self.labels is None else self.held_out[self.labels[self.held_out] >= 0]

    @property
    def voters(self) -> IntArray:
        """Positions of the training pictures that may vote in k-NN: those with a label, or all if none has one."""
        return self.trained if self.labels is None else self.trained[self.labels[self.trained] >= 0]

    def drawn(self, recipe: Recipe) -> IntArray:
        """Return the positions that batches are drawn from: all training pictures, those with a label so many times
        that they are the share of a batch that supcon.labelled names."""
        voters, share = self.voters, recipe.supcon.labelled
        if recipe.method != "supcon" or not share or len(voters) == len(self.trained):
            return self.trained
        others = len(self.trained) - len(voters)
        wanted = max(len(voters), round(others * share / (1 - share)))
        return np.concatenate([self.trained, np.resize(voters, wanted - len(voters))])


def prepare(
    source: Source,
    recipe: Recipe,
    folder: Path,
    on: torch.device,
    earlier: Checkpoint | None = None,
    held_out: IntArray | None = None,
    limits: Limits = OWN_FILES,
    normalisation: Normalisation | None = None,
    locked: "Encoder | None" = None,
) -> Material:
    """Decode a sample, compute its statistics, and hold pictures out for online k-NN.

    Args:
        source: all pictures.
        recipe: the run's recipe.
        folder: of the run; the canvas may be a file in it.
        on: device on which batches are wanted.
        earlier: the checkpoint of the run to resume.
        held_out: positions to hold out; if None, up to 1,000 and a twentieth of 400 labelled pictures or more.
        limits: of a picture.
        normalisation: of the weights that the run begins with; None for that of the pictures.
        locked: the encoder whose embeddings the run learns from, in place of pixels.

    Raises:
        InvalidSource: too few pictures, bad ones, all alike; or not the source of the earlier run.
        InvalidRequest: the recipe wants all pixels on the device, and they do not fit.
    """
    if earlier and locked and earlier.statistics.get("fingerprint") != locked.card.fingerprint:
        raise InvalidRequest(
            f"{locked.card.folder}: is not the encoder that the run began with; --resume needs the same"
        )
    captions = read_captions(source, recipe.text) if METHODS[recipe.method].needs_captions else None
    checksum = names_checksum(source)
    if captions is not None:
        checksum = captions.checksum(checksum)
    if earlier and earlier.source_checksum != checksum:
        what = "pictures" if captions is None else "pictures or captions"
        raise InvalidSource(
            f"{source.name}: its {what} are not those that the run began with ({earlier.pictures} then, "
            f"{len(source)} now); export or --resume needs the same"
        )
    labels = source.labels.numbers if source.labels is not None else None
    trained, held_out = _split(source, labels, captions, recipe, held_out)
    preprocessing = recipe.preprocessing if locked is None else locked.card.preprocessing
    canvas = Canvas(source, preprocessing, recipe.channels, folder, on, limits, locked)
    if earlier:
        canvas.load_state(earlier.canvas)
    try:
        measured, shares = _look_at(canvas, locked is not None)
        if recipe.resident:
            canvas.load_all()
    except LookalikeError:
        canvas.list_bad(folder / "bad-pictures.txt")
        if earlier:
            canvas.close()
        else:
            canvas.remove()
        raise
    mean, std = _normalisation(recipe, measured, normalisation)
    if earlier:
        mean, std = earlier.statistics["mean"], earlier.statistics["std"]
    return Material(
        canvas, labels, trained, held_out, mean, std, shares, checksum, captions, locked.card if locked else None
    )


def _split(
    source: Source, labels: IntArray | None, captions: Captions | None, recipe: Recipe, held_out: IntArray | None
) -> tuple[IntArray, IntArray]:
    """Return the positions to train on and those to hold out, as `prepare` says.

    A method that needs a label or a caption for every picture trains on those that have one.

    Raises:
        InvalidSource: those to train on are fewer than a batch.
    """
    everything = np.arange(len(source))
    usable = everything if captions is None else np.flatnonzero(captions.counts)
    labelled = usable if labels is None else usable[labels[usable] >= 0]
    if held_out is None:
        held_out = everything[:0]
        if labels is not None and len(labelled) >= _LEAST_HELD_FROM and len(np.unique(labels[labelled])) > 1:
            held_out = spread(labelled, min(_HELD_OUT, len(labelled) // 20))
        elif captions is not None and len(usable) >= _LEAST_HELD_FROM:
            held_out = spread(usable, min(_HELD_OUT, len(usable) // 20))
    if len(held_out):
        print(f"{len(held_out)} pictures are held out for k-NN", file=sys.stderr)
    missing = "label" if captions is None or captions.of_labels else "caption"
    usable = labelled if METHODS[recipe.method].needs_labels == "all" else usable
    if len(usable) < len(source):
        print(f"{len(source) - len(usable)} pictures without a {missing} are left out", file=sys.stderr)
    trained: IntArray = np.setdiff1d(usable, held_out)
    if len(trained) < recipe.batch_size:
        raise InvalidSource(
            f"{source.name}: {len(trained)} pictures to train on make no batch of {recipe.batch_size}; "
            f"add pictures or lower batch_size, as in --set batch_size={max(2, len(trained) // 8)}"
        )
    return trained, held_out


def _normalisation(recipe: Recipe, measured: tuple[Tensor, Tensor], own: Normalisation | None) -> tuple[Tensor, Tensor]:
    """Return mean and std (C,): the recipe's, or those that the run's weights were trained with, or the measured."""
    if recipe.mean and recipe.std:
        own = Normalisation(recipe.mean, recipe.std)
    if own is None:
        return measured
    mean, std = torch.tensor(own.mean), torch.tensor(own.std)
    # A network for RGB takes grey pictures by the sum of its weights, so it has one mean and one deviation then.
    return (mean, std) if len(mean) == recipe.channels else (mean.mean(0, keepdim=True), std.mean(0, keepdim=True))


def _look_at(canvas: Canvas, locked: bool) -> tuple[tuple[Tensor, Tensor], list[float]]:
    """Return mean and deviation (C,) of a sample, and its tones; refuse pictures that are all flat or identical.

    With a locked encoder there is no normalisation, and there are no tones.
    """
    name = canvas.source.name
    seen = canvas.take(sample(canvas.source, _SAMPLED))[0].cpu()  # (n, C, S, S)
    if not len(seen):
        raise InvalidSource(f"{name}: no picture of it can be decoded")
    mean, std = (torch.zeros(1), torch.ones(1)) if locked else statistics(seen)
    if float(std.max()) == 0:
        raise InvalidSource(f"{name}: all pictures are one flat colour; there is nothing to learn")
    if bool((seen == seen[:1]).all()):
        raise InvalidSource(f"{name}: all pictures are identical; there is nothing to learn")
    if locked:
        return (mean, std), []
    # One channel may be empty, as in two-colour microscopy.
    std = std.clamp(min=1 / 255)
    return (mean, std), tones(seen.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())


def check_pictures(material: Material) -> Pictures:
    """Return pixels to check an export with: the held-out pictures, or training pictures if none were held out."""
    bank = spread(material.voters, _CHECK_BANK)
    held_out = material.queries if len(material.queries) else spread(material.trained[1:], _HELD_OUT)

    def take(positions: IntArray) -> tuple[PixelArray, IntArray]:
        pixels, good = material.canvas.take(positions)  # (n, C, S, S)
        return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy(), good

    (bank_pixels, bank), (held_out_pixels, held_out) = take(bank), take(held_out)
    labels = material.labels
    learnt_on = min(_LEARNT_ON, _LEARNT_BYTES // bank_pixels[0].nbytes)
    return Pictures(
        bank_pixels[np.linspace(0, len(bank) - 1, min(len(bank), _CALIBRATION)).astype(int)],
        held_out_pixels,
        bank_pixels,
        (labels[bank], labels[held_out]) if labels is not None and len(material.queries) else None,
        take(spread(material.trained, learnt_on))[0],
    )


def statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (C,) of uint8 pixels (N, C, S, S) scaled to 0..1, from their histograms."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(1)]).double()
    shares = counts / counts.sum(1, keepdim=True)  # (C, 256)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ values
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
    return mean.float(), std.float()
