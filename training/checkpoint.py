"""The state of a run and the file in its folder, OUT.run, that holds it."""

import io
import math
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from service.errors import InvalidOutput, InvalidRequest
from service.files import write_file
from training.recipe import Recipe

FILE = "checkpoint.pt"


class Cursor(NamedTuple):
    """A place in the order of the pictures: the epoch, and how many of its pictures have been given out."""

    epoch: int = 0
    offset: int = 0


@dataclass
class Progress:
    """How far a run is. The loop changes it in place.

    Attributes:
        step: optimizer steps done.
        total: steps of the whole run; None while the first steps of a run with a time limit are being timed.
        seconds: from the first step on, over all sessions of the run.
        waited: seconds of these in which the loop waited for pictures.
        cursor: where the next batch begins.
        loss: the last one that was read from the device.
    """

    step: int = 0
    total: int | None = None
    seconds: float = 0.0
    waited: float = 0.0
    cursor: Cursor = field(default_factory=Cursor)
    loss: float = math.nan


@dataclass(frozen=True)
class Identity:
    """The settings that a resumed run must share with the run as it began.

    Attributes:
        source: SOURCE as the user wrote it.
        recipe: the run's recipe.
        init: where the backbone's weights came from, or None for random ones.
        minutes: time for the steps in place of the recipe's epochs, or None.
        image_key: which picture of a WebDataset sample is taken, or None for the usual one.
    """

    source: str
    recipe: Recipe
    init: str | None = None
    minutes: float | None = None
    image_key: str | None = None

    def facts(self) -> dict[str, Any]:
        """Return the settings as plain values, without the tables of other methods."""
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"recipe": self.recipe.facts()}


@dataclass(frozen=True)
class Checkpoint:
    """All that a resumed run needs beside its pictures.

    Attributes:
        identity, progress: see there.
        precision: "float32" or "bfloat16", as chosen when the run began.
        device: type of the device, "cpu" or "cuda".
        method, optimizer: state dicts.
        random: of random_states.
        canvas: of Canvas.state.
        source_checksum, pictures: checksum and number of the source's ids.
        statistics: mean (C,), std (C,) and tones of the pictures.
        compiled: whether the backbone was compiled, as chosen when the run began.
        average: state dict of the average of the backbone's weights, or None without `ema`.
    """

    identity: Identity
    progress: Progress
    precision: str
    device: str
    method: dict[str, Any]
    optimizer: dict[str, Any]
    random: dict[str, Tensor]
    canvas: dict[str, Any]
    source_checksum: int
    pictures: int
    statistics: dict[str, Any]
    compiled: bool = False
    average: dict[str, Any] | None = None


def run_folder(out: Path) -> Path:
    """Return the folder of the run that makes the model folder `out`: OUT.run, beside it."""
    return out.with_name(f"{out.name}.run")


def earlier_run(folder: Path) -> Path:
    """Return where a run's folder is kept while another run is to take its place: OUT.run.earlier."""
    return folder.with_name(f"{folder.name}.earlier")


def set_aside(folder: Path) -> None:
    """Keep a run's folder until the run that overwrites it is whole. An unfinished one that does so is removed.

    Raises:
        InvalidOutput: the folder cannot be renamed or removed.
    """
    kept = earlier_run(folder)
    try:
        if kept.exists() and _finished(folder):
            shutil.rmtree(kept)
        if kept.exists() and folder.exists():
            shutil.rmtree(folder)
        elif folder.exists():
            folder.rename(kept)
    except OSError as error:
        raise InvalidOutput(f"{folder}: cannot be set aside: {error.strerror}") from error


def _finished(folder: Path) -> bool:
    try:
        checkpoint = read_checkpoint(folder)
    except InvalidRequest:
        return False
    return checkpoint is not None and checkpoint.progress.step == checkpoint.progress.total


def weights_file(init: str) -> str:
    """Return the file of weights that --init names: of a run's or a model's folder the run's checkpoint.

    Raises:
        InvalidRequest: the folder has no checkpoint, and no run beside it has.
    """
    path = Path(init)
    if not path.is_dir():
        return init
    for folder in (path, run_folder(path)):
        if (folder / FILE).exists():
            return str(folder / FILE)
    raise InvalidRequest(
        f"{init}: has no {FILE}, and neither has {run_folder(path)}; an exported model alone cannot be trained "
        "further: expected DEFAULT, a state file, the folder OUT.run of a run, or a model's folder beside it"
    )


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the run's checkpoint. It survives a power cut from here on; until then the earlier one does.

    Raises:
        InvalidOutput: the disk is full or refuses the write; the earlier checkpoint is unchanged.
    """
    content = {each.name: getattr(checkpoint, each.name) for each in fields(checkpoint)}
    progress = asdict(content.pop("progress"))
    content |= {"identity": checkpoint.identity.facts(), **progress, "cursor": list(progress["cursor"])}
    # torch.save writes to memory, because on a full disk it raises an error that does not name the cause.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        write_file(folder / FILE, buffer.getbuffer())
    except OSError as error:
        raise InvalidOutput(
            f"{folder / FILE}: a checkpoint of {buffer.tell() / 2**20:.0f} MiB cannot be written: {error.strerror}; "
            "the earlier one, if any, is whole: mend this and go on with --resume"
        ) from error


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the run's checkpoint, its tensors on the CPU, or None if the folder has none.

    Raises:
        InvalidRequest: the file is damaged or is no checkpoint of a pretraining run.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # torch raises nearly any exception on a file of another kind.
    except Exception as error:
        raise InvalidRequest(f"{path}: not a checkpoint that can be read: {type(error).__name__}") from error
    try:
        progress = Progress(**{each.name: content.pop(each.name) for each in fields(Progress)})
        progress.cursor = Cursor(*progress.cursor)
        settings = content.pop("identity")
        recipe = Recipe.model_validate(settings.pop("recipe"))
        return Checkpoint(identity=Identity(recipe=recipe, **settings), progress=progress, **content)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise InvalidRequest(f"{path}: not a checkpoint of a pretraining run") from error


def check_same(earlier: Identity, now: Identity, folder: Path) -> None:
    """Make sure that a run is resumed with the settings that it began with.

    Raises:
        InvalidRequest: names the first setting that differs.
    """
    then, today = _flat(earlier.facts()), _flat(now.facts())
    for key in [key for key in (*then, *today) if key != "recipe.name"]:
        if then.get(key) != today.get(key):
            raise InvalidRequest(
                f"{folder}: the run was begun with {key.removeprefix('recipe.')} {then.get(key)}, "
                f"now it is {today.get(key)}; --resume goes on with the same, another run wants another --out"
            )


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, its keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def random_states(views: Generator) -> dict[str, Tensor]:
    """Return the states of all random number generators that a run draws from."""
    states = {"views": views.get_state(), "torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if views.device.type == "cuda" else {})


def set_random_states(states: dict[str, Tensor], views: Generator) -> None:
    """Put the generators back to the states that random_states returned."""
    views.set_state(states["views"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
