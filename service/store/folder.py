"""A store's folder: who may write in it."""

import fcntl
import os
from pathlib import Path

from service.errors import InvalidStore
from service.store.catalog import FILE
from service.store.snapshot import sync

_LOCK = "LOCK"


def lock(folder: Path) -> int:
    """Make the folder where it is missing, and take its lock for this process: a file descriptor to close.

    The system lets go of it however the process ends.

    Raises:
        InvalidStore: another process has it, or the folder holds something else or cannot be used.
    """
    try:
        _make(folder)
        strangers = [path.name for path in folder.iterdir() if path.name != _LOCK]
        if strangers and not (folder / FILE).exists():
            raise InvalidStore(f"{folder}: is not a store and not empty (it has {strangers[0]}); name another --store")
        guard = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise InvalidStore(f"{folder}: cannot be used as a store: {error.strerror}") from error
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(guard, 32).decode(errors="replace").strip()
        os.close(guard)
        raise InvalidStore(
            f"{folder}: in use by process {holder}; add pictures to a served store with POST /images, "
            "or open it with --read-only"
        ) from error
    try:
        os.ftruncate(guard, 0)
        os.write(guard, str(os.getpid()).encode())
    except OSError:  # a full disk: the lock holds without a name on it
        pass
    return guard


def _make(folder: Path) -> None:
    """Make a folder and its parents, so that a power cut leaves them."""
    if folder.is_dir():
        return
    _make(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)
