"""A store's folder on disk: its lock, and which of its generations is current.

The first generation lies in the store's folder itself. Each later one, made when another encoder embedded the store
again, lies in a folder within it: `generation-2` and so on. The file CURRENT names the current generation; without
that file it is the first.
"""

import fcntl
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

from service.errors import InvalidStore
from service.files import sync, temporary_path, write_file
from service.store.catalog import FILE
from service.store.snapshot import SNAPSHOT
from service.store.vector_map import VECTORS

_LOCK = "LOCK"
_CURRENT = "CURRENT"
# A reader of the lock's file holds the lock for an instant; a process that wants it tries again so often.
_TRIES, _PAUSE_S = 10, 0.02
_NAME = re.compile(r"generation-([1-9][0-9]{0,8})")


def current(folder: Path) -> Path:
    """Return the folder of the current generation.

    Raises:
        InvalidStore: CURRENT cannot be read, or names a generation that is not there.
    """
    return _folder_of(folder, generation(folder))


def generation(folder: Path) -> int:
    """Return the number of the current generation. Raises as `current`."""
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
    """Return the folder of the generation after the current one, whether it exists or not. Raises as `current`."""
    return _folder_of(folder, generation(folder) + 1)


def generations(folder: Path) -> dict[int, Path]:
    """Return the folders of all generations that are there, finished or not, by their numbers."""
    found = {1: folder} if (folder / FILE).exists() else {}
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match is not None and (path / FILE).exists():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def remove(home: Path, folder: Path) -> int:
    """Remove a generation that is not the current one, and return the bytes of its files.

    Its catalog goes first: a removal that is interrupted leaves no generation.

    Raises:
        InvalidStore: a file cannot be removed.
    """
    copies = [folder / name for name in (SNAPSHOT, VECTORS)]
    owned = [*(folder / f"{FILE}{ending}" for ending in ("", "-wal", "-shm")), *copies, *map(temporary_path, copies)]
    paths = [path for path in owned if path.exists()]
    size = sum(path.stat().st_size for path in paths)
    try:
        for path in paths:
            path.unlink()
            sync(folder)
        if folder != home:
            shutil.rmtree(folder)
            sync(home)
    except OSError as error:
        raise InvalidStore(f"{folder}: cannot be removed: {error.strerror}") from error
    return size


def is_store(folder: Path) -> bool:
    """Return whether a folder holds a store, or one of its generations."""
    return ((folder / FILE).exists() and (folder / _LOCK).exists()) or (folder / _CURRENT).exists()


def publish(folder: Path, new: Path) -> None:
    """Make a generation the current one. Durable when it returns. Raises OSError."""
    if new == folder:
        (folder / _CURRENT).unlink(missing_ok=True)
        sync(folder)
    else:
        write_file(folder / _CURRENT, f"{new.name}\n".encode())


def _folder_of(folder: Path, number: int) -> Path:
    return folder if number == 1 else folder / f"generation-{number}"


def lock(folder: Path) -> int:
    """Lock a store's folder for this process, and make the folder if it is missing.

    Returns:
        A file descriptor. Closing it releases the lock, as does the end of the process.

    Raises:
        InvalidStore: another process holds the lock, the folder holds something else, or it cannot be used.
    """
    try:
        _make(folder)
        # A copy of a catalog that was interrupted leaves its temporary file.
        ours = (_LOCK, temporary_path(folder / FILE).name)
        strangers = [path.name for path in folder.iterdir() if path.name not in ours]
        if strangers and not (folder / FILE).exists() and not (folder / _CURRENT).exists():
            raise InvalidStore(f"{folder}: is not a store and not empty (it has {strangers[0]}); name another --store")
        guard = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except PermissionError as error:
        there, user = folder if folder.exists() else folder.parent, f"{os.getuid()}:{os.getgid()}"
        raise InvalidStore(
            f"{folder}: user {os.getuid()} may not write in {there}, whose owner is {there.stat().st_uid}; as root: "
            f"chown -R {user} {there} (in Docker: docker run --rm --user 0 --entrypoint chown -v VOLUME:{there} IMAGE "
            f"-R {user} {there})"
        ) from error
    except OSError as error:
        raise InvalidStore(f"{folder}: cannot be used as a store: {error.strerror}") from error
    try:
        _take(guard)
    except OSError as error:
        holder = os.read(guard, 32).decode(errors="replace").partition("\n")[0].strip()
        os.close(guard)
        raise InvalidStore(
            f"{folder}: in use by process {holder}; add pictures to a served store with POST /images, "
            "or open it with --read-only"
        ) from error
    try:
        os.ftruncate(guard, 0)
        os.write(guard, str(os.getpid()).encode())
    # On a full disk the lock holds all the same, without the process's number in it.
    except OSError:
        pass
    return guard


def announce(folder: Path, url: str) -> None:
    """Write into a store's lock where the process that holds it serves the store. Only that process may call it."""
    # Without room on the disk the service is there all the same, and has to be named by its URL.
    with suppress(OSError):
        guard = os.open(folder / _LOCK, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(guard, f"{os.getpid()}\n{url}\n".encode(), 0)
        finally:
            os.close(guard)


def served_at(folder: Path) -> str | None:
    """Return the URL at which a running process of this machine serves the store in a folder; None without one.

    What a process that was killed has left in the file does not count: the system released its lock.
    """
    try:
        guard = os.open(folder / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        try:
            fcntl.flock(guard, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            pid, _, url = os.read(guard, 4096).decode(errors="replace").partition("\n")
            # A process that has just taken the lock may not have emptied the file yet.
            return url.strip() or None if url.endswith("\n") and _runs(pid) else None
        except OSError:
            return None
        return None
    finally:
        os.close(guard)


def _runs(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    # A process of another user may run, too.
    except PermissionError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return True


def _take(guard: int) -> None:
    """Lock a file for this process. Raises OSError if another process holds it."""
    for tries in range(_TRIES, -1, -1):
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not tries:
                raise
            time.sleep(_PAUSE_S)


def _make(folder: Path) -> None:
    """Make a folder and its parents. Durable when it returns."""
    if folder.is_dir():
        return
    _make(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)
