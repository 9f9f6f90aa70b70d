"""Pictures per second of SimCLR pretraining on a CPU: our loop against lightly's example.

Both train the same small CNN with a projection head 256 → 512 → 128 on the same pictures in batches of 256. lightly
runs its example for plain PyTorch: its SimCLRTransform, its NTXentLoss, SGD, and a DataLoader with two workers.
"""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms.simclr_transform import SimCLRTransform
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.machine import describe
from service import PixelArray
from service.sources.source import from_arrays
from training.backbones import build_backbone
from training.checkpoint import Identity
from training.material import prepare
from training.methods import build_method
from training.pretrain import train
from training.recipe import Recipe, read_recipe

_SIDE, _BATCH, _PICTURES = 32, 256, 10_000
_WARM_UP_STEPS = 5


class _Pictures(Dataset[Any]):
    """Like torchvision's CIFAR10: a PIL picture, passed through `transform`, and a label."""

    transform: Callable[[Image.Image], Any] | None = None

    def __init__(self, pixels: PixelArray) -> None:
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture = Image.fromarray(self._pixels[index])
        return self.transform(picture) if self.transform else picture, 0


def lightly_pace(pixels: PixelArray, steps: int) -> float:
    """Return lightly's pictures/s."""
    backbone = build_backbone("small-cnn", 3, _SIDE)
    model = torch.nn.Sequential(backbone.module, SimCLRProjectionHead(backbone.dimension, 512, 128))
    dataset = LightlyDataset.from_torch_dataset(_Pictures(pixels), transform=SimCLRTransform(input_size=_SIDE))
    loader = DataLoader(dataset, batch_size=_BATCH, shuffle=True, drop_last=True, num_workers=2)
    criterion, optimizer = NTXentLoss(), torch.optim.SGD(model.parameters(), lr=0.06)
    done, begun = 0, 0.0
    while True:
        for (x0, x1), *_ in loader:
            if done == _WARM_UP_STEPS:
                begun = time.perf_counter()
            loss = criterion(model(x0), model(x1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done == _WARM_UP_STEPS + steps:
                return steps * _BATCH / (time.perf_counter() - begun)


def our_pace(pixels: PixelArray, steps: int, precision: str) -> float:
    """Return our pictures/s, including decoding."""
    source = from_arrays("pictures", pixels, ["picture"] * len(pixels), "pictures")
    content = read_recipe("small-photos-simclr").model_dump() | {
        "backbone": "small-cnn",
        "side": _SIDE,
        "view_side": None,
        "batch_size": _BATCH,
        "precision": precision,
        "projection": (512, 128),
        "epochs": 1,
    }

    def run(pictures: int) -> float:
        recipe = Recipe.model_validate(content | {"epochs": max(1, pictures // len(pixels))})
        with TemporaryDirectory() as folder:
            material = prepare(source, recipe, Path(folder), torch.device("cpu"))
            method = build_method(recipe, build_backbone("small-cnn", 3, _SIDE), len(source))
            done = train(method, material, Identity(source.name, recipe), Path(folder)).progress
            material.canvas.close()
        return done.step * _BATCH / done.seconds

    return run(steps * _BATCH)


def main(
    steps: Annotated[int, typer.Option(help="Timed steps of each program.")] = 117,
    rounds: Annotated[int, typer.Option(help="Rounds in which programs take turns; the table has medians.")] = 3,
) -> None:
    """Print a table of both."""
    smooth = np.random.default_rng(0).integers(0, 256, (_PICTURES, 5, 5, 3), dtype=np.uint8)
    pixels = np.stack(
        [np.asarray(Image.fromarray(one).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)) for one in smooth]
    )
    paces: dict[str, list[float]] = {"lightly's SimCLR example": [], "ours, float32": [], "ours, precision auto": []}
    for _ in range(rounds):
        paces["lightly's SimCLR example"].append(lightly_pace(pixels, steps))
        paces["ours, float32"].append(our_pace(pixels, steps, "float32"))
        paces["ours, precision auto"].append(our_pace(pixels, steps, "auto"))
    peer = float(np.median(paces["lightly's SimCLR example"]))
    print(f"\n{describe()}\n\n| program | pictures/s | ratio |\n|---|---|---|")
    for name, found in paces.items():
        print(f"| {name} | {np.median(found):.0f} | {np.median(found) / peer:.2f} |")


if __name__ == "__main__":
    typer.run(main)
