"""The pretraining loop, in the open: pictures → views → loss → step, and out comes models/NAME."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from service.errors import InvalidRequest, InvalidSource
from training.augment import augment
from training.backbones import build_backbone
from training.data import batches, decode_canvas, open_training_source
from training.export import Encoder, check_out, export, square_preprocessing
from training.methods import Method, build_method
from training.recipe import Recipe

_TIMED_STEPS = 50


@dataclass(frozen=True)
class Run:
    """What a pretraining run came to: steps done, seconds they took, the last loss, and the precision it ran in."""

    steps: int
    seconds: float
    loss: float
    precision: str


def pretrain(source_name: str, recipe: Recipe, out: Path, minutes: float | None, device: str, data_root: Path) -> None:
    """Pretrain an encoder on a source and export it to the folder `out`.

    Args:
        source_name: SOURCE, labels unused.
        recipe: the run.
        out: a new or an earlier model folder; written whole or not at all.
        minutes: time for the steps, in place of the recipe's epochs.
        device: "auto", "cpu" or "cuda".
        data_root: where named sets lie.

    Raises:
        InvalidSource, InvalidRequest, InvalidOutput, InvalidModel.
    """
    on = choose_device(device)
    check_out(out)  # now, not after hours of training
    torch.manual_seed(recipe.seed)
    source = open_training_source(source_name, data_root)
    preprocessing = square_preprocessing(recipe.side)
    canvas = decode_canvas(source, preprocessing, recipe.channels)
    pixels = canvas.pixels.to(on)
    if len(pixels) < recipe.batch_size:
        raise InvalidSource(
            f"{source_name}: {len(pixels)} pictures make no batch of {recipe.batch_size}; "
            "add pictures or lower batch_size in the recipe"
        )
    mean, std = _statistics(pixels)
    if float(std.max()) == 0:
        raise InvalidSource(f"{source_name}: all pictures are one flat colour; there is nothing to learn")
    std = std.clamp(min=1 / 255)  # one channel may be empty, as in two-colour microscopy
    backbone = build_backbone(recipe.backbone, recipe.channels, recipe.side)
    method = build_method(recipe, backbone.module, backbone.dimension)
    run = train(method, pixels, mean, std, recipe, minutes)
    print(f"{run.steps} steps in {run.seconds:.0f} s, loss {run.loss:.4f}")
    encoder = Encoder(method.backbone, mean, std, recipe.channels)
    facts = {
        "method": recipe.method,
        "recipe": recipe.model_dump(),
        "data": {"source": source_name, "pictures": len(pixels), "tones": canvas.tones},
        "run": {
            "steps": run.steps,
            "seconds": round(run.seconds),
            "loss": round(run.loss, 4),
            "device": on.type,
            "precision": run.precision,
        },
    }
    export(encoder, source, preprocessing, facts, out)
    print(f"wrote {out}")


def train(method: Method, pixels: Tensor, mean: Tensor, std: Tensor, recipe: Recipe, minutes: float | None) -> Run:
    """Run the loop.

    Args:
        method: its parameters are changed in place.
        pixels: (N, C, S, S) uint8, on the device to train on.
        mean, std: (C,) of the pixels, 0..1.
        recipe: the run.
        minutes: None for the recipe's epochs; else the first 50 steps, or those of the first tenth of the
            time, are timed and the total is fixed by it.

    Raises:
        InvalidRequest: the loss stopped being a number, or the embeddings collapsed.
    """
    assert isinstance(method, nn.Module)
    on = pixels.device
    method.to(on).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(
        method.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    order = batches(len(pixels), recipe.batch_size, Generator().manual_seed(recipe.seed))
    randomness = Generator(on).manual_seed(recipe.seed)
    shift, scale = mean.to(on).view(1, -1, 1, 1), std.to(on).view(1, -1, 1, 1)

    def make_views(positions: Tensor) -> Tensor:
        batch = pixels[positions.to(on)].float() / 255  # (N, C, S, S)
        views = [augment(batch, recipe.augmentation, randomness) for _ in range(2)]
        return torch.stack([(view - shift) / scale for view in views])  # (2, N, C, S, S)

    bfloat16 = bfloat16_pays(method, make_views(next(order)))
    total = recipe.epochs * (len(pixels) // recipe.batch_size)
    timing = minutes is not None
    start, loss_value = time.perf_counter(), math.nan
    with tqdm(total=total, desc="pretraining", unit=" steps", mininterval=0.5) as bar:
        step = 0
        while step < total or timing:
            # While the steps are being timed nobody knows the total: the rate stays up after its warm-up.
            horizon = 10**9 if timing else total
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * schedule(step, horizon, min(recipe.warmup, horizon // 10))
            views = make_views(next(order))
            with torch.autocast(on.type, torch.bfloat16, enabled=bfloat16):
                loss, embeddings = method.step(views)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            spent = time.perf_counter() - start
            if minutes is not None and timing and (step == _TIMED_STEPS or spent > minutes * 6):
                timing = False
                bar.total = total = max(step, round(minutes * 60 / spent * step))
            if step % 20 == 0 or step == total:
                loss_value = float(loss.detach())
                spread = per_dimension_std(embeddings)
                check_health(loss_value, spread, embeddings.shape[1], step)
                pace = step * recipe.batch_size / spent
                bar.set_postfix_str(f"loss {loss_value:.4f}, {pace:.0f} pictures/s", refresh=False)
            bar.update()
    return Run(step, time.perf_counter() - start, loss_value, "bfloat16" if bfloat16 else "float32")


def schedule(step: int, total: int, warmup: int) -> float:
    """Return the share of the peak learning rate at a step: linear warm-up, then a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def per_dimension_std(embeddings: Tensor) -> float:
    """Return the mean standard deviation per dimension of the normalised embeddings; healthy is near 1/√D."""
    return float(nn.functional.normalize(embeddings.float(), dim=1).std(0).mean())


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


def choose_device(name: str) -> torch.device:
    """Turn auto, cpu or cuda into a device.

    Raises:
        InvalidRequest: cuda was asked for and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("device cuda was asked for, but torch finds no CUDA GPU; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def bfloat16_pays(method: Method, views: Tensor) -> bool:
    """Time three forward and backward passes in either precision; bfloat16 wins only where it is faster."""
    if views.device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    seconds = []
    for enabled in (False, True):
        for attempt in range(4):
            if attempt == 1:
                start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = method.step(views).loss
            loss.backward()  # type: ignore[no-untyped-call]
        seconds.append(time.perf_counter() - start)
    return seconds[1] < 0.9 * seconds[0]


def _statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of uint8 pixels, scaled to 0..1, from the exact histogram of each channel."""
    counts = torch.zeros(pixels.shape[1], 256, dtype=torch.float64)
    for start in range(0, len(pixels), 1000):
        channels = pixels[start : start + 1000].unbind(1)
        counts += torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in channels]).cpu()
    shares = counts / counts.sum(1, keepdim=True)  # (C, 256)
    tones = torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ tones
    std = (shares * (tones - mean[:, None]).square()).sum(1).sqrt()
    return mean.float(), std.float()
