"""A run's folder, OUT.run, and its checkpoint, written whole or not at all."""

import io
from pathlib import Path
from typing import Any

import torch

from service.errors import InvalidOutput, InvalidRequest
from service.files import write_file

FILE = "checkpoint.pt"


def run_folder(out: Path) -> Path:
    """Return the folder of the run that makes the model folder `out`: OUT.run, beside it."""
    return out.with_name(f"{out.name}.run")


def write_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    """Replace the run's checkpoint; after this it survives a power cut, and until then the earlier one does.

    Raises:
        InvalidOutput: the disk is full or will not take it; the earlier checkpoint is as it was.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)  # to memory first: torch's own writer turns a full disk into an error without a name
    try:
        write_file(folder / FILE, buffer.getbuffer())
    except OSError as error:
        raise InvalidOutput(
            f"{folder / FILE}: a checkpoint of {buffer.tell() / 2**20:.0f} MiB cannot be written: {error.strerror}; "
            "the earlier one, if any, is whole: mend this and go on with --resume"
        ) from error


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the run's checkpoint, on the CPU, or None where there is none.

    Raises:
        InvalidRequest: the file is no checkpoint of ours.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything on a file of another kind
        raise InvalidRequest(f"{path}: not a checkpoint that can be read: {type(error).__name__}") from error
    if not isinstance(content, dict) or "step" not in content:
        raise InvalidRequest(f"{path}: not a checkpoint of a pretraining run")
    return content
