"""A store's folder: who may write in it, and which of its generations counts.

A store that another encoder embedded anew has a folder in its folder, `generation-2` and so on, and the file CURRENT
names the one that counts. Without that file the first generation counts, which lies in the store's folder itself.
"""

import fcntl
import os
import re
from pathlib import Path

from service.errors import InvalidStore
from service.files import sync, write_file
from service.store.catalog import FILE

_LOCK = "LOCK"
_CURRENT = "CURRENT"
_NAME = re.compile(r"generation-([1-9][0-9]{0,8})")


def current(folder: Path) -> Path:
    """Return the folder of the generation that counts.

    Raises:
        InvalidStore: CURRENT cannot be read, or names none that is there.
    """
    return _folder_of(folder, generation(folder))


def generation(folder: Path) -> int:
    """Return the number of the generation that counts. Raises as `current`."""
    path = folder / _CURRENT
    try:
        name = path.read_text().strip()
    except FileNotFoundError:
        return 1
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidStore(f"{path}: cannot be read: {error}") from error
    match = _NAME.fullmatch(name)
    if match is None or not (folder / name / FILE).exists():
        raise InvalidStore(f"{path}: damaged: it names no generation that is there; the file is left as it is")
    return int(match[1])


def following(folder: Path) -> Path:
    """Return the folder of the generation after the one that counts, there or not. Raises as `current`."""
    return _folder_of(folder, generation(folder) + 1)


def publish(folder: Path, new: Path) -> None:
    """Let a generation count from now on. Raises OSError."""
    write_file(folder / _CURRENT, f"{new.name}\n".encode())


def _folder_of(folder: Path, number: int) -> Path:
    return folder if number == 1 else folder / f"generation-{number}"


def lock(folder: Path) -> int:
    """Make the folder where it is missing, and take its lock for this process: a file descriptor to close.

    The system lets go of it however the process ends.

    Raises:
        InvalidStore: another process has it, or the folder holds something else or cannot be used.
    """
    try:
        _make(folder)
        strangers = [path.name for path in folder.iterdir() if path.name != _LOCK]
        if strangers and not (folder / FILE).exists() and not (folder / _CURRENT).exists():
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
