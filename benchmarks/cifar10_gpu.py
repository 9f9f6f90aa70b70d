"""CIFAR-10 on one GPU: how many minutes until k-NN names nine test pictures in ten, in one call or in several.

    python -m benchmarks.cifar10_gpu --data DIR --state DIR --minutes 7

DIR has train.zip and test.zip, pictures in folders named for their classes. Each call trains --minutes more of
--total-minutes, leaves all that the next one needs in --state, and prints the table so far. The learning rate follows
the time that is used up, not a number of steps: a call on a slower machine ends the same schedule.

The whole set lies on the GPU as uint8; a batch is an index into it, its views are made there, and the networks run in
bfloat16 and channels_last, compiled where that is measured to be faster.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import typer
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.machine import describe
from service.encoding.card import square_preprocessing
from service.errors import InvalidRequest, InvalidSource, LookalikeError
from service.files import replace_file
from service.sources import open_source
from training.augment import augment
from training.backbones import build_backbone
from training.checkpoint import read_checkpoint, write_checkpoint
from training.data import Canvas, names_checksum
from training.material import statistics
from training.methods import Batch, Method, Step, build_method
from training.pretrain import (
    StopSignal,
    check_health,
    choose_device,
    per_dimension_std,
    random_states,
    set_random_states,
)
from training.recipe import Recipe

Trained = Literal["simclr", "byol", "moco", "supcon"]

_SIDE = 32
_HELD_OUT_EVERY = 20  # where there is no test.zip
_EVALUATIONS = 20  # in the whole run
_WATCHED = 50  # steps between two looks at the loss, for which the GPU is waited for
_WARM_UP = 0.01  # of the whole time
_SETTLING, _TIMED = 5, 15  # steps of a trial
_BARS = (0.88, 0.90)
# Neighbours and temperature: ours, dkobak's and lightly's way to ask (design/FACTS: k-NN protocols).
_HEADLINE = "weighted 20-NN, τ = 0.07"
_PROTOCOLS = {_HEADLINE: (20, 0.07), "10-NN": (10, math.inf), "weighted 200-NN, τ = 0.1": (200, 0.1)}
_CALLED = {
    "simclr": "SimCLR, self-supervised",
    "byol": "BYOL, self-supervised",
    "moco": "MoCo, self-supervised",
    "supcon": "SupCon, supervised: it is told the labels",
}


class Pictures(NamedTuple):
    """pixels (N, 3, S, S) uint8, labels (N,) int64 into names, in sorted order; checksum of the source's ids."""

    pixels: Tensor
    labels: Tensor
    names: list[str]
    checksum: int

    def at(self, positions: Tensor) -> "Pictures":
        """Return some of them."""
        return self._replace(pixels=self.pixels[positions], labels=self.labels[positions])

    def to(self, device: torch.device) -> "Pictures":
        """Return them on a device."""
        return self._replace(pixels=self.pixels.to(device), labels=self.labels.to(device))


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: steps done.
        seconds: of training alone.
        elapsed: seconds of all calls: training, decoding, compiling, k-NN and saving.
        held_out: whether the queries were held out of the training pictures, because there was no test.zip.
        history: one k-NN a row.
    """

    step: int = 0
    seconds: float = 0.0
    elapsed: float = 0.0
    held_out: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


def build_recipe(method: str, views: int, batch_size: int, learning_rate: float, backbone: str) -> Recipe:
    """Return the run's recipe: crop, colour, projector, temperature and optimizer as in dkobak/simclr-cifar10.

    Args:
        method, views, batch_size, backbone: as in a recipe.
        learning_rate: of SGD, for 256 pictures a batch.
    """
    return Recipe.model_validate(
        {
            "name": "cifar10-gpu",
            "method": method,
            "backbone": backbone,
            "side": _SIDE,
            "channels": 3,
            "epochs": 1,  # as many as the time allows
            "batch_size": batch_size,
            "views": views,
            "learning_rate": learning_rate * batch_size / 256,
            "weight_decay": 5e-4,
            "warmup": 0,
            "projection": (1024, 128),
            "augmentation": {"preset": "small-photos", "grey": 0.1},
            "simclr": {"temperature": 0.5},
        }
    )


def run(recipe: Recipe, data: Path, state: Path, minutes: float, total_minutes: float, device: str) -> Progress:
    """Train some minutes more, and print the table.

    Args:
        recipe: of build_recipe.
        data: folder with train.zip and perhaps test.zip; what `state` has decoded already need not be there.
        state: folder for checkpoint.pt, encoder.pt and the decoded pictures; made when it is not there.
        minutes: of training in this call.
        total_minutes: of training in all calls.
        device: "auto", "cpu" or "cuda".

    Raises:
        InvalidSource: no pictures, or not those that the run began with.
        InvalidRequest: `state` is of another run, or the loss stopped being a number.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came, and a checkpoint has been written.
    """
    begun = time.perf_counter()
    on = choose_device(device)
    torch.backends.cudnn.benchmark = True  # shapes do not change
    torch.manual_seed(recipe.seed)
    if not (0 < minutes < math.inf and 0 < total_minutes < math.inf):
        raise InvalidRequest(f"expected times above 0, got --minutes {minutes} --total-minutes {total_minutes}")
    kept = ("method", "views", "batch_size", "learning_rate", "backbone")
    identity = {key: getattr(recipe, key) for key in kept} | {"total_minutes": total_minutes, "device": on.type}
    earlier = read_checkpoint(state)
    if earlier:
        check_identity(earlier.get("identity", {}), identity, state)
    train, test = load_pictures(data, state, "train"), load_pictures(data, state, "test")
    if train is None:
        raise InvalidSource(f"{data / 'train.zip'}: no such file; expected pictures in folders named for their classes")
    progress = Progress(**earlier["progress"]) if earlier else Progress(held_out=test is None)
    elapsed_before = progress.elapsed
    if test is None and not progress.held_out:
        raise InvalidSource(f"{data / 'test.zip'}: no such file, and the run in {state} was begun with it")
    if test is not None and test.names != train.names:
        raise InvalidSource(f"{data / 'test.zip'}: its classes are {test.names}, those of train.zip {train.names}")
    everything = torch.arange(len(train.pixels))
    held_out = everything[::_HELD_OUT_EVERY] if progress.held_out else everything[:0]
    bank = train.at(everything[~torch.isin(everything, held_out)]).to(on)
    queries = (train.at(held_out) if test is None else test).to(on)
    asked = "test set" if test is not None else "held-out training pictures"
    if len(bank.pixels) < recipe.batch_size:
        raise InvalidSource(f"{data}: {len(bank.pixels)} pictures to train on make no batch of {recipe.batch_size}")
    mean, std = statistics(train.pixels[::10])

    total_s = 60 * total_minutes
    goal_s = min(total_s, progress.seconds + 60 * minutes)
    backbone = build_backbone(recipe.backbone, 3, _SIDE)
    method = build_method(recipe, backbone, len(bank.pixels)).to(on).to(memory_format=torch.channels_last).train()
    if earlier:
        method.load_state_dict(earlier["method"])
    shift, scale = mean.to(on).view(-1, 1, 1), std.to(on).view(-1, 1, 1)

    def learn(method: Method, chosen: Tensor, randomness: Generator) -> Step:
        """Return what the method makes of views of the chosen pictures (N,), after the backward pass."""
        views = make_views(bank.pixels[chosen], recipe, shift, scale, randomness)
        with torch.autocast(on.type, torch.bfloat16, enabled=on.type == "cuda"):
            result = method.step(Batch(views, chosen, bank.labels[chosen]))
        result.loss.backward()  # type: ignore[no-untyped-call]
        return result

    if on.type == "cuda" and progress.seconds < goal_s:
        first = torch.arange(recipe.batch_size, device=on)

        def trial(method: Method) -> float:
            return views_per_s(lambda: learn(method, first, Generator(on).manual_seed(0)), method, recipe)

        method = quicker(method, trial)
    weights = [weight for weight in method.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(
        weights, lr=recipe.learning_rate, momentum=0.9, weight_decay=recipe.weight_decay, fused=True
    )
    randomness = Generator(on).manual_seed(recipe.seed)
    if earlier:
        optimizer.load_state_dict(earlier["optimizer"])
        set_random_states(earlier["random"], randomness)

    def save() -> None:
        progress.elapsed = elapsed_before + time.perf_counter() - begun
        content = {
            "identity": identity,
            "step": progress.step,
            "progress": asdict(progress),
            "method": method.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": random_states(randomness),
        }
        write_checkpoint(state, content)

    with StopSignal() as stop:
        due_s, mark = next_due(progress.seconds, total_s), now(on)
        for chosen in batches(len(bank.pixels), recipe.batch_size, progress.step, on):
            if progress.seconds >= goal_s:
                break
            share = progress.seconds / total_s
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * rate(share)
            result = learn(method, chosen, randomness)
            optimizer.step()
            optimizer.zero_grad()
            method.update(share)
            progress.step += 1
            moment = time.perf_counter()
            progress.seconds, mark = progress.seconds + moment - mark, moment

            # Looked at once: a signal that comes further down waits for the next step, or it would go unsaved.
            stopping, due = bool(stop.asked), progress.seconds >= min(goal_s, due_s)
            if not (stopping or due or progress.step % _WATCHED == 0):
                continue
            loss, spread = float(result.loss.detach()), per_dimension_std(result.embeddings)
            progress.seconds += now(on) - mark  # what the GPU had still to do
            due = due or progress.seconds >= min(goal_s, due_s)
            check_health(loss, spread, result.embeddings.shape[1], progress.step)
            if due and not stopping:
                accuracy = evaluate(method.backbone, bank, queries, shift, scale)
                progress.elapsed = elapsed_before + time.perf_counter() - begun
                progress.history.append(
                    {
                        "minutes": progress.seconds / 60,
                        "elapsed_minutes": progress.elapsed / 60,
                        "epochs": progress.step * recipe.batch_size / len(bank.pixels),
                        "loss": loss,
                        "queries": asked,
                        "accuracy": accuracy,
                    }
                )
                headline = f"{_HEADLINE} {accuracy[_HEADLINE]:.4f} of the {asked}"
                print(f"{progress.seconds / 60:.2f} minutes, loss {loss:.4f}: {headline}", flush=True)
                due_s = next_due(progress.seconds, total_s)
            if due or stopping:
                save()
            if stopping:
                break
            mark = now(on)
        write_encoder(state / "encoder.pt", method.backbone, recipe, mean, std)
        print(f"\n{table(progress, recipe, total_minutes)}\n", flush=True)
        if stop.asked:
            print(f"stopped at step {progress.step}; the same command goes on from here", file=sys.stderr)
            stop.end()
    return progress


def load_pictures(data: Path, state: Path, part: str) -> Pictures | None:
    """Return the pictures of data/PART.zip, decoded once and kept in state/PART.pt; None where neither is there.

    Raises:
        InvalidSource: no folder `data`, a .zip that cannot be read or is not that of the kept pictures.
    """
    if not data.is_dir():
        raise InvalidSource(f"{data}: no such folder; expected one with train.zip and test.zip")
    archive, kept = data / f"{part}.zip", state / f"{part}.pt"
    source = open_source(str(archive)) if archive.exists() else None
    if kept.exists():
        content = torch.load(kept, weights_only=True)
        if source and names_checksum(source) != content["checksum"]:
            raise InvalidSource(f"{archive}: its pictures are not those that {kept} was decoded from")
        return Pictures(**content)
    if source is None:
        return None
    if source.labels is None or len(source.labels.names) < 2:
        raise InvalidSource(f"{archive}: expected pictures in two folders or more, named for their classes")
    state.mkdir(parents=True, exist_ok=True)
    canvas = Canvas(source, square_preprocessing(_SIDE), 3, state, torch.device("cpu"))
    pixels, good = canvas.take(np.arange(len(source)))
    canvas.remove()
    names, codes = np.unique(source.labels.names, return_inverse=True)  # sorted: two sources agree
    labels = torch.from_numpy(codes[source.labels.codes[good]].astype(np.int64))
    pictures = Pictures(pixels, labels, names.tolist(), names_checksum(source))
    write(kept, pictures._asdict())
    return pictures


def batches(count: int, size: int, step: int, on: torch.device) -> Iterator[Tensor]:
    """Yield the positions (size,) of each batch from a step on: a new order each epoch, the same whenever asked for."""
    an_epoch = count // size
    while True:
        epoch, done = divmod(step, an_epoch)
        order = torch.randperm(count, generator=Generator(on).manual_seed(epoch), device=on)
        for batch in range(done, an_epoch):
            yield order[batch * size : (batch + 1) * size]
        step = (epoch + 1) * an_epoch


def make_views(pixels: Tensor, recipe: Recipe, mean: Tensor, std: Tensor, randomness: Generator) -> Tensor:
    """Return normalised views (V, N, C, S, S) of uint8 pixels (N, C, S, S), in channels_last, all made in one go."""
    pictures = (pixels.float() / 255).repeat(recipe.views, 1, 1, 1)  # (V · N, C, S, S)
    views = ((augment(pictures, recipe.augmentation, randomness) - mean) / std).contiguous(
        memory_format=torch.channels_last
    )
    return views.view(recipe.views, *pixels.shape)


def next_due(seconds: float, total_s: float) -> float:
    """Return when the next k-NN is due, in seconds of training: a whole share of the total."""
    return (int(seconds / total_s * _EVALUATIONS) + 1) * total_s / _EVALUATIONS


def rate(share: float) -> float:
    """Return the share of the peak learning rate at a share of the time: linear warm-up, then a cosine down to 0."""
    return min(1.0, share / _WARM_UP) * (1 + math.cos(math.pi * min(1.0, share))) / 2


def quicker(method: Method, trial: Callable[[Method], float]) -> Method:
    """Return the method with its backbone compiled, or as it was where that is not quicker or fails.

    Args:
        method: its backbone is compiled in place.
        trial: gives views/s and leaves the weights as they were.
    """
    plain = deepcopy(method)
    eager = trial(plain)
    begun = time.perf_counter()
    try:
        method.backbone.compile()
        compiled = trial(method)
    except Exception as error:  # a compiler meeting its machine may raise anything
        print(f"the backbone cannot be compiled: {type(error).__name__}: {str(error)[:500]}")
        compiled = 0.0
    took = time.perf_counter() - begun
    print(f"views/s without the optimizer: {eager:,.0f}, compiled {compiled:,.0f} (in {took:.0f} s)", flush=True)
    return method if compiled > eager else plain


def views_per_s(learn: Callable[[], Step], method: Method, recipe: Recipe) -> float:
    """Return how many views a second a method learns from; its weights and buffers are put back."""
    before = deepcopy(method.state_dict())
    on = next(method.parameters()).device
    for number in range(_SETTLING + _TIMED):
        if number == _SETTLING:
            begun = now(on)
        learn()
        method.zero_grad()
    seconds = now(on) - begun
    method.load_state_dict(before)
    return _TIMED * recipe.views * recipe.batch_size / seconds


def now(on: torch.device) -> float:
    """Return the time, when the device has done all it was told."""
    if on.type == "cuda":
        torch.cuda.synchronize(on)
    return time.perf_counter()


@torch.no_grad()
def evaluate(backbone: nn.Module, bank: Pictures, queries: Pictures, mean: Tensor, std: Tensor) -> dict[str, float]:
    """Return the k-NN accuracy of queries by protocol; in float32, as the encoder is exported."""
    backbone.eval()

    def embed(pixels: Tensor) -> Tensor:
        # forward() goes round the compiled backbone, which is made for the training's batches alone.
        parts = [backbone.forward((part.float() / 255 - mean) / std) for part in torch.split(pixels, 2000)]
        return F.normalize(torch.cat(parts), dim=1)

    voting, asking = embed(bank.pixels), embed(queries.pixels)
    backbone.train()
    return {
        name: knn_accuracy(voting, bank.labels, asking, queries.labels, k, temperature)
        for name, (k, temperature) in _PROTOCOLS.items()
    }


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, k: int, temperature: float
) -> float:
    """Return the share of queries that k neighbours name rightly; votes weigh exp(cosine / temperature).

    As training.knn.headline_accuracy, where the embeddings are; infinite temperature weighs all votes alike.

    Args:
        bank, queries: (B, D), (N, D), rows of L2 norm 1; all B vote where there are fewer than k.
        bank_labels, query_labels: (B,), (N,) int64.
    """
    classes, right = int(bank_labels.max()) + 1, 0
    for part, named in zip(torch.split(queries, 1000), torch.split(query_labels, 1000), strict=True):
        scores, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)  # (n, k)
        votes = torch.zeros(len(part), classes, dtype=torch.float64, device=bank.device)
        votes.scatter_add_(1, bank_labels[nearest], (scores.double() / temperature).exp())
        right += int((votes.argmax(1) == named).sum())
    return right / len(queries)


def table(progress: Progress, recipe: Recipe, total_minutes: float) -> str:
    """Return the tables: each k-NN so far, then the figures beside their bars and peers."""
    computed = f"{_CALLED[recipe.method]}; {recipe.backbone}, {recipe.views} views of {recipe.batch_size} pictures"
    minutes, history = progress.seconds / 60, progress.history
    lines = [
        describe(),
        "",
        f"{computed}. {progress.step} steps in {minutes:.2f} of {total_minutes:g} minutes of training; "
        f"{progress.elapsed / 60:.2f} minutes with decoding, compiling, k-NN and saving. The pictures are the JPEG "
        "copy, which is lossy.",
        "",
        f"| minutes | with all | epochs | loss | queries | {' | '.join(_PROTOCOLS)} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in history:
        figures = " | ".join(f"{row['accuracy'][name]:.4f}" for name in _PROTOCOLS)
        lines.append(
            f"| {row['minutes']:.2f} | {row['elapsed_minutes']:.2f} | {row['epochs']:.0f} | {row['loss']:.3f} "
            f"| {row['queries']} | {figures} |"
        )
    now_asked = history[-1]["queries"] if history else "no queries yet"
    comparable = [row for row in history if row["queries"] == now_asked]
    lines += ["", "| figure | here | bar | beside |", "|---|---|---|---|"]
    for bar in _BARS:
        reached = next((row for row in comparable if row["accuracy"][_HEADLINE] >= bar), None)
        here = "not reached" if reached is None else f"{reached['minutes']:.2f} ({reached['elapsed_minutes']:.2f})"
        limit, peer = "", ""
        if bar == _BARS[-1]:
            limit = "20 on one H200"
            peer = "99 on an A100: dkobak's SimCLR, 500 epochs, 10-NN, lossless pictures"
        lines.append(f"| minutes to {bar:.2f} {_HEADLINE} (with all) | {here} | {limit} | {peer} |")
    last = f"{history[-1]['accuracy'][_HEADLINE]:.4f} ({now_asked})" if history else "not measured yet"
    final = "final" if minutes >= total_minutes else "latest"
    pace = progress.step * recipe.views * recipe.batch_size / max(progress.seconds, 1e-9)
    lines.append(f"| {final} {_HEADLINE} | {last} | 0.90 | |")
    lines.append(f"| views/s of the loop | {pace:,.0f} | 40,000 | about 23,000: airbench's ResNet-18 on an A100 |")
    return "\n".join(lines)


def check_identity(then: dict[str, Any], today: dict[str, Any], state: Path) -> None:
    """Make sure that a run is gone on with as it was begun.

    Raises:
        InvalidRequest: the first thing that differs.
    """
    for key, value in today.items():
        if then.get(key) != value:
            raise InvalidRequest(
                f"{state}: the run there was begun with {key} {then.get(key)}, now it is {value}; "
                "another run wants another --state"
            )


def write_encoder(path: Path, backbone: nn.Module, recipe: Recipe, mean: Tensor, std: Tensor) -> None:
    """Write the backbone alone, with what training.export.Encoder needs; `lookalike pretrain --init` reads it too."""
    weights = {
        name: value.float().cpu() if value.is_floating_point() else value.cpu()
        for name, value in backbone.state_dict().items()
    }
    about = {"backbone": recipe.backbone, "channels": 3, "side": _SIDE}
    write(path, {**about, "mean": mean, "std": std, "state_dict": weights})


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a file of tensors, whole or not at all."""
    with replace_file(path) as temporary:
        torch.save(content, temporary)


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
        recipe = build_recipe(method, views, batch_size, learning_rate, backbone)
        run(recipe, data, state, minutes, total_minutes, device)
    except (LookalikeError, OSError) as error:
        print(f"cifar10_gpu: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
