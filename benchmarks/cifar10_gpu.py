"""CIFAR-10 on one GPU: minutes until k-NN labels nine test pictures in ten correctly, in one call or in several.

    python -m benchmarks.cifar10_gpu --data DIR --state DIR --minutes 7

DIR has train.zip and test.zip, pictures in folders named for their classes. Each call trains --minutes more of
--total-minutes with the product's own loop, leaves checkpoint and log in --state, and prints the table so far.

The whole set lies on the GPU as uint8; a batch is an index into it, its views are made there, and the network runs in
bfloat16 and channels_last, compiled if that is measured to be faster. All of these are keys of the recipe.
"""

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer

from benchmarks.machine import describe
from service import IntArray
from service.errors import InvalidRequest, InvalidSource, LookalikeError
from service.files import replace_file
from service.sources import open_source
from service.sources.compact import Labels
from service.sources.source import Source
from training.backbones import build_backbone
from training.checkpoint import Checkpoint, Identity, check_same, read_checkpoint
from training.device import choose_device
from training.knn import MOST_K, find_neighbours, neighbour_figures
from training.log import FILE as LOG_FILE
from training.material import Material, prepare
from training.methods import Method, build_method
from training.pretrain import embed, train
from training.recipe import Recipe

Trained = Literal["simclr", "byol", "moco", "supcon"]
Figures = dict[str, float | None]

_SIDE = 32
_BARS = (0.88, 0.90)
_HEADLINE = "weighted 20-NN, τ = 0.07"
# The protocols of this project, of dkobak/simclr-cifar10 and of lightly's benchmarks.
_PROTOCOLS = {"weighted_k20": _HEADLINE, "k10": "10-NN", "weighted_k200": "weighted 200-NN, τ = 0.1"}
_CALLED = {
    "simclr": "SimCLR, self-supervised",
    "byol": "BYOL, self-supervised",
    "moco": "MoCo, self-supervised",
    "supcon": "SupCon, supervised: it is told the labels",
}


def build_recipe(
    method: str, views: int, batch_size: int, learning_rate: float, backbone: str, compile: bool = False
) -> Recipe:
    """Return the run's recipe: crop, colour, projector, temperature and optimizer as in dkobak/simclr-cifar10.

    Args:
        method, views, batch_size, backbone, compile: as in a recipe.
        learning_rate: of SGD, for 256 pictures a batch.
    """
    return Recipe.model_validate(
        {
            "name": "cifar10-gpu",
            "method": method,
            "backbone": backbone,
            "side": _SIDE,
            "channels": 3,
            "epochs": 1,  # replaced by the time
            "batch_size": batch_size,
            "views": views,
            "optimizer": "sgd",
            "learning_rate": learning_rate * batch_size / 256,
            "weight_decay": 5e-4,
            "warmup": 400,
            "projection": (1024, 128),
            "compile": compile,
            "resident": True,
            "knn_times": 20,
            "knn_bank": 50_000,
            "augmentation": {"preset": "small-photos", "grey": 0.1},
            "simclr": {"temperature": 0.5},
        }
    )


def run(recipe: Recipe, data: Path, state: Path, minutes: float, total_minutes: float, device: str) -> Checkpoint:
    """Train some minutes more, and print the table.

    Args:
        recipe: of build_recipe.
        data: folder with train.zip and perhaps test.zip.
        state: folder for checkpoint.pt, log.jsonl and encoder.pt; made if it does not exist.
        minutes: of training in this call.
        total_minutes: of training in all calls.
        device: "auto", "cpu" or "cuda".

    Raises:
        InvalidSource: no pictures, or not those that the run began with.
        InvalidRequest: `state` holds another run, or the loss became NaN or infinite.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came, and a checkpoint has been written.
    """
    on = choose_device(device)
    # The shapes of the batches do not change.
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(recipe.seed)
    if not (0 < minutes < math.inf and 0 < total_minutes < math.inf):
        raise InvalidRequest(f"expected times above 0, got --minutes {minutes} --total-minutes {total_minutes}")
    source, held_out = open_pictures(data)
    identity = Identity(source.name, recipe, minutes=total_minutes)
    earlier = read_checkpoint(state)
    if earlier:
        check_same(earlier.identity, identity, state)
    state.mkdir(parents=True, exist_ok=True)
    method = build_method(recipe, build_backbone(recipe.backbone, 3, _SIDE), len(source))
    material = prepare(source, recipe, state, on, earlier, held_out)
    try:
        # A call for all minutes of a run ends its schedule, whose deadline the loop keeps.
        session_s = math.inf if minutes >= total_minutes else 60 * minutes
        checkpoint = train(method, material, identity, state, earlier, session_s=session_s)
        figures = measure(method, material)
    finally:
        material.canvas.close()
    write_encoder(state / "encoder.pt", method, material)
    asked = "held-out training pictures" if held_out is None else "test set"
    print(f"\n{table(checkpoint, knn_rows(state), figures, len(material.trained), asked)}\n", flush=True)
    return checkpoint


def open_pictures(data: Path) -> tuple[Source, IntArray | None]:
    """Return the pictures of train.zip and test.zip as one source, and the positions of the test pictures.

    Without test.zip the positions are None: training pictures will be held out.

    Raises:
        InvalidSource: no train.zip, no labels, or other classes in test.zip.
    """
    parts = [open_source(str(data / name)) for name in ("train.zip", "test.zip") if (data / name).exists()]
    if not (data / "train.zip").exists():
        raise InvalidSource(f"{data / 'train.zip'}: no such file; expected pictures in folders named for their classes")
    labels = [part.labels for part in parts if part.labels is not None]
    if len(labels) < len(parts):
        raise InvalidSource(f"{data}: expected pictures in folders named for their classes")
    if len(parts) == 1:
        return parts[0], None
    (train, test), names = parts, sorted(labels[0].names)
    if sorted(labels[1].names) != names:
        raise InvalidSource(f"{test.name}: its classes are {sorted(labels[1].names)}, those of {train.name} {names}")
    codes = [np.array([names.index(name) for name in part.names])[part.numbers] for part in labels]
    count = len(train)
    both = Source(
        "train.zip and test.zip",
        [*(f"train/{name}" for name in train.ids), *(f"test/{name}" for name in test.ids)],
        lambda position: train.read(position) if position < count else test.read(position - count),
        Labels(np.concatenate(codes), names),
    )
    return both, np.arange(count, len(both))


def measure(method: Method, material: Material) -> Figures:
    """Return the figures of the held-out pictures, all training pictures voting; in float32, as exported."""
    assert material.labels is not None
    bank, voting = embed(method.backbone, material, material.trained, "float32")
    queries, asked = embed(method.backbone, material, material.held_out, "float32")
    labels = material.labels[voting], material.labels[asked]
    found = find_neighbours(bank, labels[0], queries, labels[1], MOST_K, "in the end")
    return neighbour_figures(found, *labels)[0]


def knn_rows(state: Path) -> list[dict[str, Any]]:
    """Return a row for each k-NN that the run's log has: its step and accuracy, with the time and loss logged last."""
    rows, seen = [], {"seconds": 0.0, "loss": math.nan}
    for line in map(json.loads, (state / LOG_FILE).read_text().splitlines()):
        if "knn" in line:
            rows.append(seen | line)
        else:
            seen = {"seconds": line["seconds"], "loss": line["loss"]}
    return rows


def table(checkpoint: Checkpoint, rows: list[dict[str, Any]], figures: Figures, pictures: int, asked: str) -> str:
    """Return the tables: each k-NN so far, then the figures beside their bars and peers."""
    recipe, progress = checkpoint.identity.recipe, checkpoint.progress
    computed = f"{_CALLED[recipe.method]}; {recipe.backbone}, {recipe.views} views of {recipe.batch_size} pictures"
    total = checkpoint.identity.minutes or 0
    lines = [
        describe(),
        "",
        f"{computed}, {checkpoint.precision}{', compiled' if checkpoint.compiled else ''}. {progress.step} of "
        f"{progress.total or 'not yet known'} steps in {progress.seconds / 60:.2f} of {total:g} minutes, k-NN and "
        f"saving included. The queries are the {asked}. The pictures are the JPEG copy, which is lossy.",
        "",
        f"| minutes | epochs | loss | {_HEADLINE} |",
        "|---|---|---|---|",
    ]
    for row in rows:
        epochs = row["step"] * recipe.batch_size / pictures
        lines.append(f"| {row['seconds'] / 60:.2f} | {epochs:.0f} | {row['loss']:.3f} | {row['knn']:.4f} |")
    lines += ["", "| figure | here | bar | beside |", "|---|---|---|---|"]
    for bar in _BARS:
        reached = next((f"{row['seconds'] / 60:.2f}" for row in rows if row["knn"] >= bar), "not reached")
        limit, peer = "", ""
        if bar == _BARS[-1]:
            limit = "20 on one H200"
            peer = "99 on an A100: dkobak's SimCLR, 500 epochs, 10-NN, lossless pictures"
        lines.append(f"| minutes to {bar:.2f} {_HEADLINE} | {reached} | {limit} | {peer} |")
    when = "final" if progress.step == progress.total else "latest"
    for key, name in _PROTOCOLS.items():
        here = "needs a bank of 200" if figures[key] is None else f"{figures[key]:.4f}"
        lines.append(f"| {when} {name} | {here} | {'0.90' if name == _HEADLINE else ''} | |")
    lines.append(
        f"| views/s of the loop | {pace(checkpoint):,.0f} | 40,000 | about 23,000: airbench's ResNet-18 on an A100 |"
    )
    return "\n".join(lines)


def pace(checkpoint: Checkpoint) -> float:
    """Return the views/s of the loop so far, k-NN and saving included."""
    recipe, progress = checkpoint.identity.recipe, checkpoint.progress
    return progress.step * recipe.views * recipe.batch_size / max(progress.seconds, 1e-9)


def write_encoder(path: Path, method: Method, material: Material) -> None:
    """Write the backbone and the arguments of training.encoder.Encoder; `lookalike pretrain --init` reads the file."""
    weights = {
        name: value.float().cpu() if value.is_floating_point() else value.cpu()
        for name, value in method.backbone.state_dict().items()
    }
    about = {"backbone": method.recipe.backbone, "channels": 3, "side": _SIDE}
    with replace_file(path) as temporary:
        torch.save({**about, "mean": material.mean, "std": material.std, "state_dict": weights}, temporary)


def main(
    data: Annotated[Path, typer.Option(help="Folder with train.zip and test.zip.")],
    state: Annotated[Path, typer.Option(help="Folder for what goes from call to call; a run of its own each.")],
    minutes: Annotated[float, typer.Option(help="Minutes of training in this call.")] = 7,
    total_minutes: Annotated[float, typer.Option(help="Minutes of training in all calls.")] = 20,
    method: Annotated[Trained, typer.Option(help="supcon is told the labels.")] = "simclr",
    views: Annotated[int, typer.Option(min=2, max=16, help="Of each picture.")] = 2,
    batch_size: Annotated[int, typer.Option(min=2, help="Pictures a batch.")] = 512,
    learning_rate: Annotated[float, typer.Option(min=1e-6, help="Of SGD, for 256 pictures a batch.")] = 0.03,
    backbone: Annotated[str, typer.Option(help="As in a recipe.")] = "resnet18",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Train some minutes more, and print the table."""
    try:
        on_gpu = choose_device(device).type == "cuda"
        recipe = build_recipe(method, views, batch_size, learning_rate, backbone, compile=on_gpu)
        run(recipe, data, state, minutes, total_minutes, device)
    except (LookalikeError, OSError) as error:
        print(f"cifar10_gpu: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
