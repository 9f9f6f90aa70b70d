"""The pretraining loop, in the open: pictures → views → loss → step, and out comes models/NAME."""

import math
import shutil
import sys
import tempfile
import time
from collections.abc import Generator as Batches
from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from service import FloatArray, IntArray
from service.account import LEFT_OUT, Account
from service.encoding.limits import OWN_FILES, Limits
from service.encoding.voting import headline_accuracy
from service.errors import InvalidRequest, InvalidSource
from service.sources.source import LeftOut, Source
from service.stopping import StopSignal
from training.augment import augment
from training.backbones import Backbone, build_backbone
from training.captions import Texts
from training.checkpoint import (
    Checkpoint,
    Identity,
    Progress,
    check_same,
    earlier_run,
    random_states,
    read_checkpoint,
    run_folder,
    set_aside,
    set_random_states,
    weights_file,
    write_checkpoint,
)
from training.data import Canvas, Loaded, ahead, batches, open_training_source, resident_batches, spread
from training.device import choose_device, choose_precision, compile_if_faster, now
from training.distributed import check_divisible, first, from_first, largest, mean_gradients, own_folder
from training.encoder import Encoder
from training.export import check_export, export, export_locked
from training.locked import open_locked
from training.log import Log
from training.material import Material, check_pictures, prepare
from training.methods import METHODS, Batch, Method, Step, build_method
from training.methods.clip import CLIP
from training.optimizers import build_optimizer, follow_weights
from training.recipe import LOCKED, Recipe
from training.text_export import TextSide, export_text

if TYPE_CHECKING:
    from service.encoding.encoder import Encoder as OnnxEncoder

_STOPPED = "stopped at step {}; the same command with --resume goes on from here"
_TIMED_STEPS = 50
# Reading loss and deviation makes the device wait, so they are read once in so many steps.
_WATCHED = 20


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
    overwrite: bool = False,
    image_key: str | None = None,
    limits: Limits = OWN_FILES,
) -> Account:
    """Pretrain an encoder on a source and export it to the folder `out`; checkpoint and log lie in OUT.run.

    Args:
        source_name: SOURCE; its labels serve the methods that need them and online k-NN.
        recipe: the run's recipe.
        out: the model folder; written whole or not at all.
        minutes: time for the steps, in place of the recipe's epochs.
        device: "auto", "cpu" or "cuda".
        data_root: folder of the named sets.
        init: where the backbone's weights come from; see build_backbone and weights_file.
        resume: resume from the run's checkpoint, if it has one. More `minutes` than before extend the run.
        checkpoint_minutes: between two checkpoints.
        overwrite: replace an earlier encoder and its run; both stay until the new ones are whole.
        image_key: as in open_source.
        limits: of a picture.

    Returns:
        As `account_of`; what was left out is listed in the run's folder.

    Raises:
        InvalidSource, InvalidRequest, InvalidOutput, InvalidModel.
        KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint has been written.
    """
    on = choose_device(device)
    if first():
        check_export(out)
    check_divisible(recipe.batch_size, recipe.compile)
    folder, identity = run_folder(out), Identity(source_name, recipe, init, minutes, image_key)
    earlier = from_first(lambda: resumable(out, identity, resume, overwrite))
    torch.manual_seed(recipe.seed)
    source = open_training_source(source_name, data_root, image_key)
    check_labels(source, recipe)
    backbone, locked = image_tower(recipe, init, out)
    method = build_method(recipe, backbone, len(source))
    if overwrite and first():
        set_aside(folder)
    if first():
        folder.mkdir(exist_ok=True)
    folder = own_folder(folder)
    normalisation = backbone.normalisation
    material = prepare(source, recipe, folder, on, earlier, limits=limits, normalisation=normalisation, locked=locked)
    try:
        train_and_export(method, material, identity, out, folder, earlier, checkpoint_minutes * 60)
    finally:
        if not first():
            shutil.rmtree(folder, ignore_errors=True)
    account = account_of(material)
    if not first():
        return account
    shutil.rmtree(earlier_run(folder), ignore_errors=True)
    material.canvas.remove()
    print(f"wrote {out}; checkpoint and log are in {folder}", file=sys.stderr)
    account.save(folder / LEFT_OUT)
    return account


def image_tower(
    recipe: Recipe, init: str | None, out: Path, trained: bool = False
) -> tuple[Backbone, "OnnxEncoder | None"]:
    """Return the backbone of a run, and the locked encoder whose embeddings it passes on, if it is one.

    Args:
        recipe, init, out: as in `pretrain`.
        trained: a checkpoint will give the weights of a backbone that learns.

    Raises:
        InvalidRequest, InvalidModel.
    """
    if recipe.backbone == LOCKED:
        locked = open_locked(init, out)
        return Backbone(nn.Identity(), locked.dimension), locked
    if trained:
        return build_backbone(recipe.backbone, recipe.channels, recipe.side), None
    weights = weights_file(init) if init else None
    frozen = (recipe.frozen, recipe.frozen_statistics)
    return build_backbone(recipe.backbone, recipe.channels, recipe.side, weights, *frozen), None


def train_and_export(
    method: Method,
    material: Material,
    identity: Identity,
    out: Path,
    folder: Path,
    earlier: Checkpoint | None,
    checkpoint_s: float,
) -> None:
    """Train to the end, warn if that made it worse, and export; however it ends, the bad pictures have been listed.

    Args:
        out: the model folder; of several processes the first writes it.
        folder, earlier, checkpoint_s: as in `train`.
    """
    untrained = deepcopy(method.backbone)
    try:
        checkpoint = train(method, material, identity, folder, earlier, checkpoint_s)
        run = checkpoint.progress
        print(f"{run.step} steps in {run.seconds:.0f} s, loss {run.loss:.4f}", file=sys.stderr)
        if first():
            compare_with_untrained(untrained, method, material, checkpoint)
            finish(method, material, checkpoint, out)
    finally:
        material.canvas.list_bad(folder / "bad-pictures.txt")
        material.canvas.close()


def account_of(material: Material) -> Account:
    """Return what became of a run's pictures: how many were used, which could not be, and which lacked a label
    or a caption."""
    source, bad = material.canvas.source, material.canvas.bad
    used = np.concatenate([material.trained, material.held_out, np.array(list(bad), np.int64)])
    unlabelled = np.setdiff1d(np.arange(len(source)), used).tolist()
    account = Account.of(source)
    account.failures = [failure for _, failure in sorted(bad.items())]
    missing = "label" if material.captions is None or material.captions.of_labels else "caption"
    account.left_out.append([LeftOut(source.ids[at], f"without a {missing}", False) for at in unlabelled])
    account.added = len(source) - account.bad - len(unlabelled)
    return account


def export_run(folder: Path, out: Path, data_root: Path, overwrite: bool = False, limits: Limits = OWN_FILES) -> None:
    """Export the encoder of a run's checkpoint, finished or not, as `pretrain` does in the end.

    Args:
        folder: of the run, OUT.run; its source must be where it was.
        out: the model folder.
        data_root: folder of the named sets.
        overwrite: replace an encoder that is there; it stays until the new one is whole.
        limits: of a picture.

    Raises:
        InvalidSource, InvalidRequest, InvalidOutput, InvalidModel.
    """
    check_export(out, overwrite)
    earlier = read_checkpoint(folder)
    if earlier is None:
        raise InvalidRequest(f"{folder}: holds no checkpoint; expected the folder OUT.run of a pretraining run")
    recipe, run = earlier.identity.recipe, earlier.progress
    source = open_training_source(earlier.identity.source, data_root, earlier.identity.image_key)
    backbone, locked = image_tower(recipe, earlier.identity.init, out, trained=True)
    method = build_method(recipe, backbone, len(source))
    method.load_state_dict(earlier.method)
    if earlier.average:
        method.backbone.load_state_dict(earlier.average)
    # In a folder of its own: the run itself may be using its canvas.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        cpu = torch.device("cpu")
        material = prepare(source, recipe, Path(scratch), cpu, earlier, limits=limits, locked=locked)
        try:
            finish(method, material, earlier, out)
        finally:
            material.canvas.close()
    print(f"wrote {out}, the encoder of step {run.step} of {run.total or 'a total not fixed yet'}")


def resumable(out: Path, identity: Identity, resume: bool, overwrite: bool = False) -> Checkpoint | None:
    """Return the checkpoint to resume from, or None to begin at step 0.

    Args:
        out: the model folder.
        identity: settings of the run. More minutes than the earlier run had extend it.
        resume, overwrite: as the user asked.

    Raises:
        InvalidRequest: a finished encoder or an unfinished run is there, and neither `resume` nor `overwrite` says what
            to do with it; both do; or the run to resume has other settings.
    """
    folder = run_folder(out)
    if resume and overwrite:
        raise InvalidRequest("--resume goes on with a run, --overwrite begins another: expected one of them")
    if overwrite:
        return None
    earlier = read_checkpoint(folder)
    if earlier and resume:
        before = earlier.identity
        if before.minutes and identity.minutes and identity.minutes > before.minutes:
            before = replace(before, minutes=identity.minutes)
        check_same(before, identity, folder)
        return earlier
    if earlier and 0 < earlier.progress.step != earlier.progress.total:
        raise InvalidRequest(
            f"{folder} holds a run that stopped at step {earlier.progress.step}: "
            "go on with --resume, or begin again with --overwrite"
        )
    # The first checkpoint of a run that overwrites another comes after minutes, and --resume is right until then, too.
    if (out.exists() or earlier) and not (resume and earlier_run(folder).exists()):
        raise InvalidRequest(
            f"{out if out.exists() else folder}: an encoder was trained there already; train it longer with "
            "--resume and more --minutes, replace it with --overwrite, or name another --out"
        )
    if resume:
        print(f"{folder}: no checkpoint there; starting from the beginning", file=sys.stderr)
    return None


def check_labels(source: Source, recipe: Recipe) -> None:
    """Make sure that the source has the labels that the recipe's method needs.

    Raises:
        InvalidSource: it has none, or only one.
    """
    if METHODS[recipe.method].needs_labels and (source.labels is None or len(source.labels.used()) < 2):
        others = [name for name, method in METHODS.items() if not method.needs_labels and not method.needs_captions]
        raise InvalidSource(
            f"{source.name}: {recipe.method} needs pictures of two labels or more; expected each picture in a folder "
            f"named for its class. Without labels take {', '.join(others[:-1])} or {others[-1]}"
        )


def compare_with_untrained(untrained: nn.Module, method: Method, material: Material, checkpoint: Checkpoint) -> None:
    """Warn if the backbone labels the held-out pictures worse than the one that the run began with."""
    if not len(material.queries) or material.locked is not None:
        return
    recipe, precision = checkpoint.identity.recipe, checkpoint.precision
    untrained.to(material.canvas.device).to(memory_format=torch.channels_last)
    before, now = (
        online_knn(backbone, material, precision, recipe.knn_bank) for backbone in (untrained, method.backbone)
    )
    if now < before:
        what = "the weights that --init gave" if checkpoint.identity.init else "the random encoder that it began as"
        print(
            f"warning: k-NN of held-out pictures is {now:.4f}, below the {before:.4f} of {what}; "
            "train longer, or with another method or learning_rate",
            file=sys.stderr,
        )


def finish(method: Method, material: Material, checkpoint: Checkpoint, out: Path) -> None:
    """Export the encoder of a run, checked on the run's own pictures, with the facts of the run in its card."""
    identity, run = checkpoint.identity, checkpoint.progress
    recipe = identity.recipe
    facts = {
        "method": recipe.method,
        "recipe": recipe.facts(),
        "data": {
            "source": identity.source,
            **({"image_key": identity.image_key} if identity.image_key else {}),
            "pictures": len(material.canvas.source) - len(material.canvas.bad),
            "held_out": len(material.held_out),
            **({} if material.locked else {"tones": material.tones}),
        },
        "run": {
            "steps": run.step,
            "seconds": round(run.seconds),
            "loss": round(run.loss, 4),
            "device": checkpoint.device,
            "precision": checkpoint.precision,
            **({"init": identity.init} if identity.init else {}),
        },
    }
    text = text_side(method, material, recipe)
    if material.locked is not None:
        assert text is not None
        export_locked(material.locked, text, facts, out)
        return
    # A copy of a compiled backbone is not compiled, and only such a one can be exported.
    encoder = Encoder(deepcopy(method.backbone), material.mean, material.std, recipe.channels)
    export(encoder, check_pictures(material), recipe.preprocessing, facts, out, text, recipe.variants)


def text_side(method: Method, material: Material, recipe: Recipe) -> TextSide | None:
    """Return the text tower of a method that has one, exported and measured on the held-out pairs."""
    captions = material.captions
    if captions is None or not isinstance(method, CLIP):
        return None
    rows, positions = embed(method.backbone, material, material.held_out, "float32")
    return export_text(method, captions, material.canvas.source, recipe.text, rows, positions)


def train(
    method: Method,
    material: Material,
    identity: Identity,
    folder: Path,
    earlier: Checkpoint | None = None,
    checkpoint_s: float = 180.0,
    session_s: float = math.inf,
) -> Checkpoint:
    """Run the loop to its end and return its last checkpoint. The method's parameters change in place.

    Where the recipe averages the weights, the method's backbone has the average in the end.

    Args:
        folder: of the run; gets checkpoint.pt, log.jsonl and TensorBoard events. Of several processes each has one, and
            the first writes the checkpoints.
        earlier: the checkpoint to resume from.
        checkpoint_s: seconds between two checkpoints.
        session_s: seconds after which this session saves and ends, even if the run is not finished.

    Raises:
        InvalidRequest: the loss became NaN or infinite, or the embeddings collapsed.
        InvalidOutput: a checkpoint cannot be written.
        KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM came, and a checkpoint has been written.
    """
    recipe, canvas, minutes = identity.recipe, material.canvas, identity.minutes
    learner = Learner(method, material, recipe, earlier)
    progress, checkpoint = begin(material, identity, earlier), earlier
    log, loader = Log(folder, progress.step), load(material, recipe, progress)
    reached, revised_s = part(progress, recipe.knn_times), progress.seconds
    bar = tqdm(total=progress.total, initial=progress.step, desc="pretraining", unit=" steps", mininterval=0.5)
    begun, seconds_before, saved_s = time.perf_counter(), progress.seconds, progress.seconds
    with StopSignal() as stop, bar, closing(loader), closing(log):
        while progress.step != progress.total:
            result = learner.step(loader, progress)
            # Read once: if a later signal counted already for this step, the run would end without saving it. All
            # processes decide by the same clock, and a signal to one of them stops all.
            progress.seconds, asked = largest(seconds_before + time.perf_counter() - begun, stop.asked)
            if minutes and revising(progress, minutes * 60, revised_s):
                (progress.seconds,) = largest(seconds_before + now(canvas.device) - begun)
                revised_s, touched = progress.seconds, progress.step * recipe.batch_size * recipe.accumulate
                (total,) = largest(planned_total(progress, minutes * 60, touched, canvas))
                bar.total = progress.total = int(total)
            last = progress.step == progress.total
            stopping = bool(asked) or progress.seconds - seconds_before >= session_s
            saving = last or stopping or progress.seconds - saved_s > checkpoint_s
            if progress.step % _WATCHED == 0 or saving:
                watch(result, progress, learner, log, bar)
            if part(progress, recipe.knn_times) > reached and len(material.queries) and not material.locked:
                if first():
                    classify_held_out(learner, material, progress, log, bar)
                reached = part(progress, recipe.knn_times)
            bar.update()
            if saving:
                checkpoint = learner.checkpoint(material, identity, progress)
                if first():
                    write_checkpoint(folder, checkpoint)
                canvas.list_bad(folder / "bad-pictures.txt")
                (saved_s,) = largest(seconds_before + time.perf_counter() - begun)
            if asked and not last:
                bar.write(_STOPPED.format(progress.step), file=sys.stderr)
                stop.end(int(asked))
            if stopping:
                break
    assert checkpoint is not None
    method.backbone.load_state_dict(learner.encoder.state_dict())
    return checkpoint


class Learner:
    """A method with its optimizer and its random numbers on the run's device.

    Attributes:
        method, recipe: as given.
        precision: "float32" or "bfloat16".
        compiled: whether the backbone is compiled.
        learning_rate: of the last step, before the scale of a group.
        average: the average of the backbone's weights over the steps, or None.
    """

    learning_rate: float = 0.0

    def __init__(self, method: Method, material: Material, recipe: Recipe, earlier: Checkpoint | None) -> None:
        """Move the method to the device, and continue where `earlier` stopped if that is given."""
        self._on, self.method, self.recipe = material.canvas.device, method, recipe
        method.to(self._on).to(memory_format=torch.channels_last).train()
        self._optimizer = build_optimizer(method, recipe)
        self._scales = [group["scale"] for group in self._optimizer.param_groups]
        self.average = deepcopy(method.backbone).requires_grad_(False) if recipe.ema else None
        self._randomness = Generator(self._on).manual_seed(recipe.seed)
        self._mean, self._std = (value.to(self._on).view(-1, 1, 1) for value in (material.mean, material.std))
        self._labels = None if material.labels is None else torch.from_numpy(material.labels).to(self._on)
        self._locked = material.locked is not None
        self._texts = None if material.captions is None else Texts(material.captions, self._on)
        if earlier:
            self.precision, self.compiled = earlier.precision, earlier.compiled
            method.load_state_dict(earlier.method)
            self._optimizer.load_state_dict(earlier.optimizer)
            if self.average is not None and earlier.average:
                self.average.load_state_dict(earlier.average)
            set_random_states(earlier.random, self._randomness)
            if self.compiled:
                method.backbone.compile(dynamic=False)
        else:
            self.precision = from_first(lambda: choose_precision(recipe, method.backbone, self._on))
            self.compiled = recipe.compile and self._try_compiling(material)

    @property
    def encoder(self) -> nn.Module:
        """The network that is exported in the end: the backbone, or the average of its weights."""
        return self.method.backbone if self.average is None else self.average

    def step(self, loader: Batches[Loaded], progress: Progress) -> Step:
        """Make one optimizer step from the loader's next batches; return the result of the last one."""
        # The total is unknown while the first steps are timed, so the rate stays at its peak after the warm-up.
        horizon = progress.total or 10**9
        share = schedule(progress.step, horizon, min(self.recipe.warmup, horizon // 10))
        self.learning_rate = self.recipe.learning_rate * share
        for group, scale in zip(self._optimizer.param_groups, self._scales, strict=True):
            group["lr"] = self.learning_rate * scale
        for _ in range(self.recipe.accumulate):
            waiting = time.perf_counter()
            pixels, positions, progress.cursor = next(loader)
            progress.waited += time.perf_counter() - waiting
            result = self._learn(pixels, positions, self._randomness, progress.step / horizon)
        mean_gradients(self.method)
        self._optimizer.step()
        self._optimizer.zero_grad()
        progress.step += 1
        self.method.update(progress.step / horizon)
        if self.average is not None:
            follow_weights(self.average, self.method.backbone, self.recipe.ema, progress.step)
        return result

    def checkpoint(self, material: Material, identity: Identity, progress: Progress) -> Checkpoint:
        """Return all that a resumed run needs."""
        return Checkpoint(
            identity=identity,
            progress=progress,
            precision=self.precision,
            device=self._on.type,
            method=self.method.state_dict(),
            optimizer=self._optimizer.state_dict(),
            random=random_states(self._randomness),
            canvas=material.canvas.state(),
            source_checksum=material.checksum,
            pictures=len(material.canvas.source),
            statistics={
                "mean": material.mean,
                "std": material.std,
                "tones": material.tones,
                **({"fingerprint": material.locked.fingerprint} if material.locked else {}),
            },
            compiled=self.compiled,
            average=None if self.average is None else self.average.state_dict(),
        )

    def _learn(self, pixels: Tensor, positions: Tensor, randomness: Generator, progress: float = 0.0) -> Step:
        """Add the gradients of a batch to the accumulated ones."""
        labels = None if self._labels is None else self._labels[positions]  # (N,)
        draw = (self.recipe, self._mean, self._std, randomness)
        # Of a locked encoder they are embeddings (N, D).
        views = pixels[None] if self._locked else make_views(pixels, *draw)
        local = None
        if self.method.multi_crop and self.recipe.dino.local_views:
            local = make_views(pixels, *draw, local=True)
        captions = None if self._texts is None else self._texts.draw(positions, randomness)
        batch = Batch(views, positions, labels, local, progress, captions)
        with torch.autocast(self._on.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            result = self.method.step(batch)
        (result.loss / self.recipe.accumulate).backward()  # type: ignore[no-untyped-call]
        return result

    def _try_compiling(self, material: Material) -> bool:
        # Twice a batch is taken, because a few of the pictures may be bad.
        pixels, good = material.canvas.take(material.trained[: 2 * self.recipe.batch_size])
        positions = torch.from_numpy(good).to(self._on)
        pixels, positions = pixels[: self.recipe.batch_size], positions[: self.recipe.batch_size]
        # Dropout draws numbers, and the run's own must not depend on the trial.
        with torch.random.fork_rng():
            return compile_if_faster(
                self.method, lambda: self._learn(pixels, positions, Generator(self._on).manual_seed(0))
            )


def begin(material: Material, identity: Identity, earlier: Checkpoint | None) -> Progress:
    """Return the progress of a resumed run, or that of a new one; without a time limit the total is known at once."""
    recipe = identity.recipe
    if earlier:
        progress = replace(earlier.progress)
        if identity.minutes != earlier.identity.minutes and identity.minutes and progress.total is not None:
            touched = progress.step * recipe.batch_size * recipe.accumulate
            progress.total = planned_total(progress, identity.minutes * 60, touched, material.canvas)
            rate = recipe.learning_rate * schedule(progress.step, progress.total, 0)
            print(
                f"the run goes on from {earlier.identity.minutes:g} to {identity.minutes:g} minutes: the learning rate "
                f"begins again at {rate:.2g}, where a run of that length would be by now, and falls to 0 at the end",
                file=sys.stderr,
            )
        return progress
    batches_of_run = recipe.epochs * (len(material.drawn(recipe)) // recipe.batch_size)
    return Progress(total=None if identity.minutes else max(1, batches_of_run // recipe.accumulate))


def load(material: Material, recipe: Recipe, progress: Progress) -> Batches[Loaded]:
    """Yield the run's batches without end, from its cursor on."""
    order = material.canvas, material.drawn(recipe), recipe.batch_size, recipe.seed, progress.cursor
    return resident_batches(*order) if recipe.resident else ahead(batches(*order))


def make_views(
    pixels: Tensor, recipe: Recipe, mean: Tensor, std: Tensor, randomness: Generator, local: bool = False
) -> Tensor:
    """Return normalised random views (V, N, C, S, S) float32 of uint8 pixels (N, C, S, S); mean and std are (C, 1, 1).

    Views have the recipe's view_side if it names one. Local views are (L, N, C, s, s), as the recipe's table `dino`
    says. On a GPU the views lie in channels_last, the layout that its convolutions read without a conversion.
    """
    pictures = pixels.float() / 255  # (N, C, S, S)
    number, side, areas = recipe.views, recipe.view_side or recipe.side, None
    if local:
        number, side, areas = recipe.dino.local_views, recipe.local_side, recipe.dino.local_area
    if pixels.device.type == "cuda":
        # One call for all views launches fewer kernels.
        drawn = augment(
            pictures.repeat(number, 1, 1, 1), recipe.augmentation, randomness, side, areas, number
        )  # (VN, C, S, S)
        drawn = drawn.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)
        return drawn.view(number, -1, *drawn.shape[1:])
    views = torch.stack([augment(pictures, recipe.augmentation, randomness, side, areas) for _ in range(number)])
    return views.sub_(mean).div_(std)  # (V, N, C, S, S)


def part(progress: Progress, parts: int) -> int:
    """Return how many of so many equal parts of the run are done."""
    return 0 if progress.total is None else progress.step * parts // max(1, progress.total)


def revising(progress: Progress, time_s: float, revised_s: float) -> bool:
    """Return whether to revise the number of steps that fit a time.

    The first time is after 50 steps or a tenth of the time; later ones come every 20 steps, every fiftieth of the time,
    and when the time is over. So the schedule ends with the time on a busy machine, too.

    Args:
        progress: of the run.
        time_s: of the whole run, in seconds.
        revised_s: seconds of the run when it was revised last.
    """
    step, seconds = progress.step, progress.seconds
    if progress.total is None:
        return step == _TIMED_STEPS or seconds > time_s / 10
    return step % _WATCHED == 0 or seconds - revised_s > time_s / 50 or seconds >= time_s


def watch(result: Step, progress: Progress, learner: Learner, log: Log, bar: "tqdm[Any]") -> None:
    """Read the step's figures from the device, write them to log and bar, and check the health of the run.

    Raises:
        InvalidRequest: as check_health.
    """
    progress.loss, deviation = float(result.loss.detach()), per_dimension_std(result.embeddings)
    check_health(progress.loss, deviation, result.embeddings.shape[1], progress.step)
    recipe = learner.recipe
    pace = (progress.step * recipe.batch_size * recipe.accumulate) / progress.seconds
    log.write(
        progress.step,
        seconds=progress.seconds,
        loss=progress.loss,
        std=deviation,
        learning_rate=learner.learning_rate,
        pictures_per_s=pace,
        **{name: float(value) for name, value in result.diagnostics.items()},
    )
    bar.set_postfix_str(f"loss {progress.loss:.4f}, {pace:.0f} pictures/s", refresh=False)


def classify_held_out(learner: Learner, material: Material, progress: Progress, log: Log, bar: "tqdm[Any]") -> None:
    """Write the k-NN accuracy of the held-out pictures to the log and to stderr."""
    accuracy = online_knn(learner.encoder, material, learner.precision, learner.recipe.knn_bank)
    log.write(progress.step, knn=accuracy)
    bar.write(f"step {progress.step}: k-NN of held-out pictures {accuracy:.4f}", file=sys.stderr)


def planned_total(progress: Progress, time_s: float, touched: int, canvas: Canvas) -> int:
    """Return how many steps fit a time, judged by the steps that are done.

    The pace excludes the wait for pictures that are decoded once; the wait that is still to come is subtracted from the
    time.

    Args:
        progress: of the steps so far.
        time_s: for the whole run, in seconds.
        touched: pictures that these steps used.
        canvas: tells how many pictures are yet to be decoded.
    """
    left = canvas.untouched()
    waited = 0.0 if canvas.residence == "nowhere" else progress.waited
    decoding = waited / max(1, touched) * left
    pace = (progress.seconds - waited) / progress.step
    return progress.step + max(0, int((time_s - progress.seconds - decoding) / pace))


def online_knn(backbone: nn.Module, material: Material, precision: str, voters: int) -> float:
    """Return the headline k-NN accuracy of the held-out pictures, among up to `voters` training pictures."""
    assert material.labels is not None
    bank, bank_positions = embed(backbone, material, spread(material.voters, voters), precision)
    queries, query_positions = embed(backbone, material, material.queries, precision)
    return headline_accuracy(bank, material.labels[bank_positions], queries, material.labels[query_positions])


@torch.no_grad()
def embed(backbone: nn.Module, material: Material, positions: IntArray, precision: str) -> tuple[FloatArray, IntArray]:
    """Return unit embeddings (n, D) of the good pictures among these, without augmentation, and their positions (n,).

    The backbone is in eval mode meanwhile and in train mode afterwards, but for its frozen parts.
    """
    on = material.canvas.device
    mean, std = (value.to(on).view(-1, 1, 1) for value in (material.mean, material.std))
    backbone.eval()
    embeddings, kept = [], []
    for start in range(0, len(positions), 500):
        pixels, good = material.canvas.take(positions[start : start + 500])
        if not len(good):
            continue
        with torch.autocast(on.type, torch.bfloat16, enabled=precision == "bfloat16"):
            # With a locked encoder these are its embeddings.
            inputs = pixels if material.locked else (pixels.float() / 255 - mean) / std
            # forward() bypasses the compiled code, which is specialised on the training's batches.
            found = backbone.forward(inputs)
        embeddings.append(F.normalize(found.float(), dim=1).cpu())
        kept.append(good)
    backbone.train()
    if not kept:
        return np.empty((0, 0), np.float32), np.empty(0, np.int64)
    return torch.cat(embeddings).numpy(), np.concatenate(kept)


def schedule(step: int, total: int, warmup: int) -> float:
    """Return the share of the peak learning rate at a step: linear warm-up, then a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def per_dimension_std(embeddings: Tensor) -> float:
    """Return the mean standard deviation per dimension of the normalised embeddings (N, D); a healthy one is near 1/√D.

    The embeddings of a collapsed encoder are all alike, and its deviation is near 0.
    """
    return float(F.normalize(embeddings.float(), dim=1).std(0).mean())


def check_health(loss: float, deviation: float, dimension: int, step: int) -> None:
    """Stop a run that diverged or collapsed; the message proposes a change of its settings.

    Raises:
        InvalidRequest: the loss is not finite, or the deviation is under a hundredth of 1/√D.
    """
    if not math.isfinite(loss):
        raise InvalidRequest(f"the loss is {loss} at step {step}; lower learning_rate or raise temperature")
    if deviation < 0.01 / math.sqrt(dimension):
        raise InvalidRequest(
            f"the embeddings collapsed to one point by step {step} (standard deviation {deviation:.1e} a dimension); "
            "are the pictures all alike? Otherwise lower learning_rate or strengthen the augmentation"
        )
