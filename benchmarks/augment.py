"""Views per second: training/augment.py against kornia's augmentations, on the CPU, in one run.

    python -m benchmarks.augment

Kornia runs the nearest set of augmentations, with random numbers for every sample; it has no equivalent of stroke.
Both take turns on the same batch, and the table shows medians.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import kornia
import torch
import typer
from kornia import augmentation as peer
from torch import Generator, Tensor, nn

from benchmarks.machine import describe
from training.augment import augment
from training.recipe import Augmentation

SHAPES = {"photos": (3, 64), "small-photos": (3, 32), "glyphs": (1, 28)}  # (C, S)


def main(
    count: Annotated[int, typer.Option(help="N pictures in a batch.")] = 256,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 7,
) -> None:
    """Print the table."""
    print(f"{describe()}, kornia {kornia.__version__}\n")
    print("| preset | N × C × S × S | Lookalike, ms a batch of views | kornia, ms | kornia / Lookalike | pictures/s |")
    print("|---|---|---:|---:|---:|---:|")
    for preset, (channels, side) in SHAPES.items():
        recipe = Augmentation.model_validate({"preset": preset})
        pictures = torch.rand(count, channels, side, side, generator=Generator().manual_seed(0))
        ours, theirs = _alternate(pictures, _ours(recipe), _kornias(recipe, side), rounds)
        print(
            f"| {preset} | {count} × {channels} × {side} × {side} | {ours * 1e3:.1f} | {theirs * 1e3:.1f} "
            f"| {theirs / ours:.1f} | {count / ours:.0f} |"
        )


def _ours(recipe: Augmentation) -> Callable[[Tensor], Tensor]:
    generator = Generator().manual_seed(0)
    return lambda pictures: augment(pictures, recipe, generator)


def _kornias(recipe: Augmentation, side: int) -> nn.Module:
    """Return the nearest equivalent in kornia.augmentation; elastic moves pixels about as far and as smoothly."""
    r, changes = recipe, list[Any]()
    if r.crop_area < 1:
        changes.append(peer.RandomResizedCrop((side, side), scale=(r.crop_area, 1)))
    if r.flip:
        changes.append(peer.RandomHorizontalFlip(p=r.flip))
    if r.rotation:
        zoom, slant = (1 - r.scale, 1 + r.scale) * 2, math.degrees(math.atan(r.shear))
        changes.append(peer.RandomAffine(r.rotation, (r.shift, r.shift), zoom, slant, p=1))
    if r.elastic:
        taps = 2 * (side // 2) - 1
        changes.append(peer.RandomElasticTransform((taps, taps), (side / 6, side / 6), p=1))
    if r.jitter:
        factor = r.jitter_strength
        changes.append(peer.ColorJitter(factor, factor, factor, r.hue, p=r.jitter))
    if r.grey:
        changes.append(peer.RandomGrayscale(p=r.grey))
    if r.blur:
        taps = 2 * math.ceil(2 * r.blur_radius * side) + 1
        changes.append(peer.RandomGaussianBlur((taps, taps), (0.1, r.blur_radius * side), p=r.blur))
    if r.solarise:
        changes.append(peer.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=r.solarise))
    if r.erase:
        changes.append(peer.RandomErasing(((1 / 6) ** 2, (1 / 3) ** 2), (1, 1), p=r.erase))
    return nn.Sequential(*changes)


def _alternate(
    pictures: Tensor, ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], rounds: int
) -> tuple[float, float]:
    """Return the median seconds of each; they take turns, after two rounds of warm-up."""
    seconds: list[tuple[float, float]] = []
    for _ in range(2 + rounds):
        start = time.perf_counter()
        ours(pictures)
        middle = time.perf_counter()
        theirs(pictures)
        seconds.append((middle - start, time.perf_counter() - middle))
    first, second = zip(*seconds[2:], strict=True)
    return statistics.median(first), statistics.median(second)


if __name__ == "__main__":
    # kornia draws from torch's global generator.
    torch.manual_seed(0)
    typer.run(main)
