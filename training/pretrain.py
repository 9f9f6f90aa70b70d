"""The pretraining loop, in the open: pictures → views → loss → step, and out comes models/NAME."""

import math
import signal
import sys
import tempfile
import threading
import time
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from service import IntArray
from service.encoding.card import square_preprocessing
from service.encoding.model_folder import check_out
from service.encoding.voting import headline_accuracy
from service.errors import InvalidRequest, InvalidSource
from training.augment import augment
from training.backbones import build_backbone
from training.checkpoint import read_checkpoint, run_folder, write_checkpoint
from training.data import Canvas, Cursor, ahead, batches, open_training_source, spread
from training.export import Encoder, export
from training.log import Log
from training.material import Material, check_pictures, prepare
from training.methods import METHODS, Batch, Method, build_method
from training.recipe import Recipe

_TIMED_STEPS = 50
_WATCHED = 20  # steps between two looks at loss and spread
_BANK = 4000  # pictures that vote in online k-NN
_KNN_TIMES = 5  # in a run


@dataclass(frozen=True)
class Run:
    """What a pretraining run came to: steps done, seconds they took, the last loss, and the precision it ran in."""

    steps: int
    seconds: float
    loss: float
    precision: str


def pretrain(
    source_name: str,
    recipe: Recipe,
    out: Path,
    minutes: float | None,
    device: str,
    data_root: Path,
    init: str | None = None,
    resume: bool = False,
    checkpoint_minutes: float = 3.0,
) -> None:
    """Pretrain an encoder on a source and export it to the folder `out`; checkpoint and log lie in OUT.run.

    Args:
        source_name: SOURCE; labels serve the methods that need them and online k-NN.
        recipe: the run.
        out: a new or an earlier model folder; written whole or not at all.
        minutes: time for the steps, in place of the recipe's epochs.
        device: "auto", "cpu" or "cuda".
        data_root: where named sets lie.
        init: where the backbone's weights come from; see build_backbone.
        resume: go on from the run's checkpoint, if there is one.
        checkpoint_minutes: between two checkpoints.

    Raises:
        InvalidSource, InvalidRequest, InvalidOutput, InvalidModel.
        KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint has been written.
    """
    on = choose_device(device)
    check_out(out)  # now, not after hours of training
    folder = run_folder(out)
    identity = {"source": source_name, "recipe": recipe.facts(), "init": init, "minutes": minutes}
    earlier = read_checkpoint(folder)
    if earlier and resume:
        check_same(earlier["identity"], identity, folder)
    elif earlier and 0 < earlier["step"] != earlier["total"]:
        raise InvalidRequest(
            f"{folder} holds a run that stopped at step {earlier['step']}: go on with --resume, or remove the folder"
        )
    elif resume:
        print(f"{folder}: no checkpoint there; starting from the beginning", file=sys.stderr)
    earlier = earlier if resume else None

    torch.manual_seed(recipe.seed)
    source = open_training_source(source_name, data_root)
    if METHODS[recipe.method].needs_labels and (source.labels is None or len(np.unique(source.labels.codes)) < 2):
        raise InvalidSource(
            f"{source_name}: {recipe.method} needs pictures of two labels or more; expected each picture in a folder "
            "named for its class. Without labels take simclr, moco, byol, simsiam, barlow, vicreg or clusters"
        )
    backbone = build_backbone(recipe.backbone, recipe.channels, recipe.side, init)
    method = build_method(recipe, backbone, len(source))
    folder.mkdir(exist_ok=True)
    material = prepare(source, recipe, folder, on, earlier)
    try:
        run = train(method, material, recipe, minutes, folder, identity, earlier, checkpoint_minutes * 60)
        print(f"{run.steps} steps in {run.seconds:.0f} s, loss {run.loss:.4f}")
        finish(method, material, identity, run, on.type, out)
    finally:
        material.canvas.list_bad(folder / "bad-pictures.txt")
        material.canvas.close()
    if material.canvas.bad:
        print(f"{len(material.canvas.bad)} bad pictures were passed over, listed in {folder / 'bad-pictures.txt'}")
    material.canvas.remove()
    print(f"wrote {out}; checkpoint and log are in {folder}")


def export_run(folder: Path, out: Path, data_root: Path) -> None:
    """Export the encoder of a run's checkpoint, finished or not, as `pretrain` does in the end.

    Args:
        folder: of the run, OUT.run; its source must be where it was.
        out: the model folder.
        data_root: where named sets lie.

    Raises:
        InvalidSource, InvalidRequest, InvalidOutput, InvalidModel.
    """
    check_out(out)
    earlier = read_checkpoint(folder)
    if earlier is None:
        raise InvalidRequest(f"{folder}: holds no checkpoint; expected the folder OUT.run of a pretraining run")
    identity = earlier["identity"]
    recipe = Recipe.model_validate(identity["recipe"])
    source = open_training_source(identity["source"], data_root)
    method = build_method(recipe, build_backbone(recipe.backbone, recipe.channels, recipe.side), len(source))
    method.load_state_dict(earlier["method"])
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # the run's own canvas may be in use
        material = prepare(source, recipe, Path(scratch), torch.device("cpu"), earlier)
        try:
            run = Run(earlier["step"], earlier["seconds"], earlier["loss"], earlier["precision"])
            finish(method, material, identity, run, earlier["device"], out)
        finally:
            material.canvas.close()
    print(f"wrote {out}, the encoder of step {earlier['step']} of {earlier['total'] or 'a total not fixed yet'}")


def finish(method: Method, material: Material, identity: dict[str, Any], run: Run, device: str, out: Path) -> None:
    """Export the encoder of a run, checked on its own pictures, with what is known of the run in its card."""
    recipe = Recipe.model_validate(identity["recipe"])
    pictures = check_pictures(material)
    facts = {
        "method": recipe.method,
        "recipe": identity["recipe"],
        "data": {
            "source": identity["source"],
            "pictures": len(material.canvas.source) - len(material.canvas.bad),
            "held_out": len(material.held_out),
            "tones": material.tones,
        },
        "run": {
            "steps": run.steps,
            "seconds": round(run.seconds),
            "loss": round(run.loss, 4),
            "device": device,
            "precision": run.precision,
            **({"init": identity["init"]} if identity["init"] else {}),
        },
    }
    encoder = Encoder(method.backbone, material.mean, material.std, recipe.channels)
    export(encoder, pictures, square_preprocessing(recipe.side), facts, out)


def train(
    method: Method,
    material: Material,
    recipe: Recipe,
    minutes: float | None,
    folder: Path,
    identity: dict[str, Any],
    earlier: dict[str, Any] | None = None,
    checkpoint_s: float = 180.0,
) -> Run:
    """Run the loop.

    Args:
        method: its parameters are changed in place.
        material: what is trained on.
        recipe: the run.
        minutes: None for the recipe's epochs; else the first 50 steps, or those of the first tenth of the
            time, are timed and the total is fixed by it.
        folder: of the run; gets checkpoint.pt, log.jsonl and TensorBoard events.
        identity: what a resumed run must have in common with this one.
        earlier: the checkpoint to go on from.
        checkpoint_s: seconds between two checkpoints.

    Raises:
        InvalidRequest: the loss stopped being a number, or the embeddings collapsed.
        InvalidOutput: a checkpoint cannot be written.
        KeyboardInterrupt: Ctrl-C or SIGTERM came, and a checkpoint has been written.
    """
    canvas, on = material.canvas, material.canvas.device
    method.to(on).to(memory_format=torch.channels_last).train()
    weights = [weight for weight in method.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    randomness = Generator(on).manual_seed(recipe.seed)
    mean, std = material.mean.to(on).view(-1, 1, 1), material.std.to(on).view(-1, 1, 1)
    labels = None if material.labels is None else torch.from_numpy(material.labels)

    def make_views(pixels: Tensor) -> Tensor:
        pictures = pixels.float() / 255  # (N, C, S, S)
        views = torch.stack([augment(pictures, recipe.augmentation, randomness) for _ in range(recipe.views)])
        return views.sub_(mean).div_(std)  # (V, N, C, S, S)

    step, seconds, waited, cursor, loss, precision = 0, 0.0, 0.0, Cursor(), math.nan, "float32"
    total: int | None = None
    if earlier:
        step, seconds, waited, total = (earlier[key] for key in ("step", "seconds", "waited", "total"))
        cursor, loss, precision = Cursor(*earlier["cursor"]), earlier["loss"], earlier["precision"]
        method.load_state_dict(earlier["method"])
        optimizer.load_state_dict(earlier["optimizer"])
        set_random_states(earlier["random"], randomness)
    else:
        precision = choose_precision(recipe, method.backbone, on)
        if minutes is None:
            total = max(1, recipe.epochs * (len(material.trained) // recipe.batch_size) // recipe.accumulate)

    def save() -> None:
        content = {
            "identity": identity,
            "step": step,
            "total": total,
            "seconds": seconds,
            "waited": waited,
            "cursor": list(cursor),
            "loss": loss,
            "precision": precision,
            "device": on.type,
            "method": method.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": random_states(randomness),
            "canvas": canvas.state(),
            "source_checksum": material.checksum,
            "pictures": len(canvas.source),
            "statistics": {"mean": material.mean, "std": material.std, "tones": material.tones},
        }
        write_checkpoint(folder, content)
        canvas.list_bad(folder / "bad-pictures.txt")

    log = Log(folder, step)
    loader = ahead(batches(canvas, material.trained, recipe.batch_size, recipe.seed, cursor))
    bar = tqdm(total=total, initial=step, desc="pretraining", unit=" steps", mininterval=0.5)
    begun, seconds_before, saved = time.perf_counter(), seconds, time.perf_counter()
    with StopSignal() as stop, bar, closing(loader), closing(log):
        while total is None or step < total:
            # While the steps are being timed nobody knows the total: the rate stays up after its warm-up.
            horizon = total or 10**9
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * schedule(step, horizon, min(recipe.warmup, horizon // 10))
            for _ in range(recipe.accumulate):
                waiting = time.perf_counter()
                pixels, positions, cursor = next(loader)
                waited += time.perf_counter() - waiting
                chosen = torch.from_numpy(positions).long()  # (N,)
                named = None if labels is None else labels[chosen].to(on)
                batch = Batch(make_views(pixels), chosen.to(on), named)
                with torch.autocast(on.type, torch.bfloat16, enabled=precision == "bfloat16"):
                    result = method.step(batch)
                (result.loss / recipe.accumulate).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            method.update(step / horizon)
            seconds = seconds_before + time.perf_counter() - begun

            if minutes is not None and total is None and (step == _TIMED_STEPS or seconds > minutes * 6):
                bar.total = total = fixed_total(step, seconds, waited, minutes * 60, step * len(positions), canvas)
            # Looked at once: a signal that comes further down waits for the next step, or it would go unsaved.
            last, stopping = step == total, bool(stop.asked)
            saving = last or stopping or time.perf_counter() - saved > checkpoint_s
            if step % _WATCHED == 0 or saving:
                loss, spread = float(result.loss.detach()), per_dimension_std(result.embeddings)
                check_health(loss, spread, result.embeddings.shape[1], step)
                pace = (step * recipe.batch_size * recipe.accumulate) / seconds
                diagnostics = {name: float(value) for name, value in result.diagnostics.items()}
                rate = optimizer.param_groups[0]["lr"]
                log.write(
                    step, seconds=seconds, loss=loss, std=spread, learning_rate=rate, pictures_per_s=pace, **diagnostics
                )
                bar.set_postfix_str(f"loss {loss:.4f}, {pace:.0f} pictures/s", refresh=False)
            if total and len(material.held_out) and step * _KNN_TIMES // total > (step - 1) * _KNN_TIMES // total:
                accuracy = online_knn(method.backbone, material, precision)
                log.write(step, knn=accuracy)
                bar.write(f"step {step}: k-NN of held-out pictures {accuracy:.4f}", file=sys.stderr)
            bar.update()
            if saving:
                save()
                saved = time.perf_counter()
            if stopping and not last:
                bar.write(f"stopped at step {step}; the same command with --resume goes on from here", file=sys.stderr)
                stop.end()
    return Run(step, seconds, loss, precision)


def fixed_total(step: int, seconds: float, waited: float, time_s: float, touched: int, canvas: Canvas) -> int:
    """Return how many steps fit a time, after the first `step` of them took `seconds`.

    Waiting for pictures that are decoded once is not counted as pace: what is left of it is taken off the time.
    """
    left = canvas.untouched()
    if canvas.residence == "nowhere":
        waited = 0.0
    decoding = waited / max(1, touched) * left
    pace = (seconds - waited) / step
    return step + max(0, int((time_s - seconds - decoding) / pace))


@torch.no_grad()
def online_knn(backbone: nn.Module, material: Material, precision: str) -> float:
    """Return the headline k-NN accuracy of the held-out pictures, up to 4,000 trained ones voting."""
    assert material.labels is not None
    on, mean, std = material.canvas.device, material.mean.view(-1, 1, 1), material.std.view(-1, 1, 1)
    backbone.eval()

    def embed(positions: IntArray) -> tuple[Any, IntArray]:
        embeddings, kept = [], []
        for start in range(0, len(positions), 500):
            pixels, good = material.canvas.take(positions[start : start + 500])
            if not len(good):
                continue
            with torch.autocast(on.type, torch.bfloat16, enabled=precision == "bfloat16"):
                found = backbone((pixels.float() / 255 - mean.to(on)) / std.to(on))
            embeddings.append(F.normalize(found.float(), dim=1).cpu())
            kept.append(good)
        return torch.cat(embeddings).numpy(), np.concatenate(kept)

    bank, bank_positions = embed(spread(material.trained, _BANK))
    queries, query_positions = embed(material.held_out)
    backbone.train()
    return headline_accuracy(bank, material.labels[bank_positions], queries, material.labels[query_positions])


def schedule(step: int, total: int, warmup: int) -> float:
    """Return the share of the peak learning rate at a step: linear warm-up, then a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def per_dimension_std(embeddings: Tensor) -> float:
    """Return the mean standard deviation per dimension of the normalised embeddings; healthy is near 1/√D."""
    return float(F.normalize(embeddings.float(), dim=1).std(0).mean())


def check_health(loss: float, spread: float, dimension: int, step: int) -> None:
    """Stop a run that has gone wrong with a sentence that says what to change.

    Raises:
        InvalidRequest: loss not finite, or spread under a hundredth of 1/√D.
    """
    if not math.isfinite(loss):
        raise InvalidRequest(f"the loss is {loss} at step {step}; lower learning_rate or raise temperature")
    if spread < 0.01 / math.sqrt(dimension):
        raise InvalidRequest(
            f"the embeddings collapsed to one point by step {step} (standard deviation {spread:.1e} a dimension); "
            "are the pictures all alike? Otherwise lower learning_rate or strengthen the augmentation"
        )


def check_same(earlier: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Make sure that a run is gone on with as it was begun.

    Raises:
        InvalidRequest: the first thing that differs.
    """

    def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in content.items():
            found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return found

    then, today = flat(earlier), flat(now)
    for key in [key for key in (*then, *today) if key != "recipe.name"]:
        if then.get(key) != today.get(key):
            raise InvalidRequest(
                f"{folder}: the run was begun with {key.removeprefix('recipe.')} {then.get(key)}, "
                f"now it is {today.get(key)}; --resume goes on with the same, another run wants another --out"
            )


def choose_device(name: str) -> torch.device:
    """Turn auto, cpu or cuda into a device.

    Raises:
        InvalidRequest: cuda was asked for and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("device cuda was asked for, but torch finds no CUDA GPU; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(recipe: Recipe, backbone: nn.Module, on: torch.device) -> str:
    """Return the recipe's precision; for auto on a CPU, time a copy of the backbone in either."""
    if recipe.precision != "auto":
        return recipe.precision
    if on.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    tried = deepcopy(backbone)
    pictures = torch.randn(recipe.batch_size, recipe.channels, recipe.side, recipe.side, generator=Generator())
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with torch.random.fork_rng(devices=[]):  # dropout draws numbers
        for _ in range(5):  # in turn, and the least of each: other work on the machine must not decide
            for enabled, taken in seconds.items():
                start = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    embeddings = tried(pictures)
                embeddings.float().square().mean().backward()
                taken.append(time.perf_counter() - start)
    return "bfloat16" if min(seconds[True]) < 0.9 * min(seconds[False]) else "float32"


def random_states(views: Generator) -> dict[str, Tensor]:
    """Return the states of all random numbers that a run draws."""
    states = {"views": views.get_state(), "torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if views.device.type == "cuda" else {})


def set_random_states(states: dict[str, Tensor], views: Generator) -> None:
    """Go on drawing where random_states was called."""
    views.set_state(states["views"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


class StopSignal:
    """Ctrl-C and SIGTERM as a wish, `asked`, so that the step in hand is finished; the second one interrupts."""

    asked: int = 0

    def __enter__(self) -> "StopSignal":
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python takes signals nowhere else
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def end(self) -> None:
        """Do what the signal asked for."""
        if self.asked == signal.SIGTERM:
            sys.exit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
