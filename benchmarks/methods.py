"""All methods on MNIST at the same budget, 200 steps of 256 pictures, beside the untrained encoder."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.machine import describe
from service import FloatArray
from service.encoding.card import square_preprocessing
from service.encoding.voting import headline_accuracy
from service.sources import open_source
from training.backbones import build_backbone
from training.checkpoint import Identity
from training.data import Canvas
from training.material import Material, prepare
from training.methods import METHODS, build_method
from training.pretrain import train
from training.recipe import Recipe, read_recipe

# 1,000 pictures are held out of the first: 51,400 make 200 batches of 256. The queries are seen by no method.
_TRAINED, _BANK, _QUERIES = "mnist/train[:52400]", 20_000, "mnist/train[52400:]"

# At 0.99 the target has hardly left its random start by step 200. DINO's running mean needs more steps, and so do 1,024
# prototypes; a small crop of a digit may be black. Chosen on other pictures: docs/experiments.md.
_OF_SHORT_RUNS = {
    "byol": ["byol.momentum=0.8"],
    "dino": [
        "dino.momentum=0.8",
        "dino.centering=sinkhorn",
        "dino.prototypes=64",
        "dino.local_views=0",
    ],
}


def main(
    data_root: Annotated[Path, typer.Option(help="Folder with MNIST/raw.")] = Path("data"),
    methods: Annotated[str, typer.Option(help="Which, with commas; all if left out.")] = "",
) -> None:
    """Print the table."""
    shared = ["epochs=1", "batch_size=256", "views=2", "ema=0", "warmup=20"]
    # Digits have no words for clip to learn from.
    able = [name for name, method in METHODS.items() if not method.needs_captions]
    chosen = methods.split(",") if methods else able
    rows = [(name, [f"method={name}"]) for name in chosen]
    rows = [(name, changes + _OF_SHORT_RUNS.get(name, [])) for name, changes in rows]
    if not methods:
        rows += [("triplet, hard", ["method=triplet", "triplet.mining=hard"])]
        rows += [("simclr, 4 views, 128 pictures", ["method=simclr", "views=4", "batch_size=128", "epochs=1"])]
    with TemporaryDirectory() as folder:
        root = Path(folder)
        source, queries_source = open_source(_TRAINED, data_root), open_source(_QUERIES, data_root)
        recipe = read_recipe("mnist-simclr", shared)
        material = prepare(source, recipe, root, torch.device("cpu"))
        queries = Canvas(queries_source, square_preprocessing(recipe.side), 1, root, torch.device("cpu"))
        lines = [f"| untrained | 0 | | {_accuracy(_untrained(recipe), material, queries):.4f} | | |"]
        for name, changes in rows:
            recipe = read_recipe("mnist-simclr", shared + changes)
            torch.manual_seed(recipe.seed)
            backbone = build_backbone(recipe.backbone, recipe.channels, recipe.side)
            method = build_method(recipe, backbone, len(source))
            (root / name).mkdir()
            run = train(method, material, Identity(_TRAINED, recipe), root / name).progress
            accuracy = _accuracy(method.backbone, material, queries)
            pace = run.step * recipe.batch_size / run.seconds
            lines.append(f"| {name} | {run.step} | {run.seconds:.0f} | {accuracy:.4f} | {run.loss:.3f} | {pace:.0f} |")
    print(f"\n{describe()}\n")
    print("| method | steps | seconds | weighted 20-NN | last loss | pictures/s |\n|---|---|---|---|---|---|")
    print("\n".join(lines))


def _untrained(recipe: Recipe) -> nn.Module:
    """The network that every method begins with."""
    torch.manual_seed(recipe.seed)
    return build_backbone(recipe.backbone, recipe.channels, recipe.side).module


def _accuracy(backbone: nn.Module, material: Material, queries: Canvas) -> float:
    mean, std = material.mean.view(-1, 1, 1), material.std.view(-1, 1, 1)

    @torch.no_grad()
    def embed(pixels: Tensor) -> FloatArray:
        parts = [backbone((part.float() / 255 - mean) / std) for part in torch.split(pixels, 1000)]
        embeddings: FloatArray = F.normalize(torch.cat(parts), dim=1).numpy()
        return embeddings

    bank = material.trained[:_BANK]
    bank_pixels, query_pixels = material.canvas.take(bank)[0], queries.take(np.arange(len(queries.source)))[0]
    assert material.canvas.source.labels is not None and queries.source.labels is not None
    backbone.eval()
    bank_labels = np.array(list(material.canvas.source.labels))[bank]
    return headline_accuracy(
        embed(bank_pixels), bank_labels, embed(query_pixels), np.array(list(queries.source.labels))
    )


if __name__ == "__main__":
    typer.run(main)
