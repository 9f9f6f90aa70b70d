"""The bytes of an item's picture where the store does not keep them: in the file that the picture came from."""

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from unicodedata import normalize

from service.errors import InvalidRequest, ItemNotFound
from service.store import Item, Store

# No picture is larger (images.OWN_FILES), so a file that has grown beyond it has changed.
_MAX_BYTES = 1_000_000_000
# The fact in which a store remembers the folders whose files `index` recorded: a list of real paths in JSON.
FOLDERS = "folders"


def read_source(item: Item) -> bytes:
    """Return the bytes of an item's picture from its source, which must hold the same bytes as when it was embedded.

    Raises:
        ItemNotFound: the source is no file, cannot be read, or has changed. The message says which.

    Cost: reads and hashes the file.
    """
    if item.source is None:
        raise ItemNotFound("the store does not keep this item's own bytes (keep_originals is off)")
    try:
        data = _read(_spelled_as_on_disk(Path(item.source)))
    except OSError as error:
        reason = error.strerror or error
        raise ItemNotFound(
            f"its picture was not kept and cannot be read from {item.source}: {reason}; index it where it is now"
        ) from error
    if hashlib.sha256(data).hexdigest() != item.digest:
        raise ItemNotFound(f"its picture was not kept, and {item.source} has another by now; index that file again")
    return data


def mtime_of_same(source: str, data: bytes) -> int | None:
    """Return when a file was changed last, if a source is its path on this machine and it holds these bytes.

    Returns:
        Nanoseconds since 1970; None for any other source.

    Cost: reads the file, if it has as many bytes.
    """
    path = Path(source)
    try:
        status = path.stat() if path.is_absolute() else None
        same = status is not None and status.st_size == len(data) and _read(path) == data
        return status.st_mtime_ns if same and status is not None else None
    # The second is of a text that no path can be.
    except (OSError, ValueError):
        return None


def note_folder(store: Store, folder: str) -> None:
    """Let a store remember a folder whose files `index` recorded as the sources of items."""
    known = folders(store.facts())
    if folder not in known:
        store.note({FOLDERS: json.dumps([*known, folder])})


def folders(facts: dict[str, str]) -> list[str]:
    """Return the folders that `note_folder` noted, from the facts of a store."""
    noted: list[str] = json.loads(facts.get(FOLDERS, "[]"))
    return noted


def own_file(item: Item, known: Sequence[str]) -> Path:
    """Return the file of an item, if `index` recorded it and it still has the same bytes.

    Args:
        item: of the store.
        known: folders whose files `index` recorded, real paths.

    Raises:
        InvalidRequest: the item came from no such folder, a link leads elsewhere, or the file has changed. The message
            says which.

    Cost: reads and hashes the file.
    """
    if item.source is None:
        raise InvalidRequest("it came from no file")
    path = Path(item.source)
    root = max((Path(one) for one in known if path.is_relative_to(one)), key=lambda one: len(one.parts), default=None)
    if root is None or ".." in path.parts:
        raise InvalidRequest("it is in no folder whose files `index` recorded; index that folder again")
    try:
        path = _spelled_as_on_disk(path)
        real = path.resolve(strict=True)
        if real != path or root.resolve() != root or real == root:
            raise InvalidRequest("a link leads to it, so it may lie outside its source")
        if hashlib.sha256(_read(path)).hexdigest() != item.digest:
            raise InvalidRequest("its file has other bytes by now")
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"its file cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return path


def remove_file(item: Item, known: Sequence[str]) -> None:
    """Remove the file of an item. Raises InvalidRequest as `own_file`, and if it cannot be removed."""
    path = own_file(item, known)
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            os.unlink(path.name, dir_fd=folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise InvalidRequest(f"its file cannot be removed: {error.strerror}") from error


def _read(path: Path) -> bytes:
    # A pipe in place of the file would block the thread that opens it.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("not an ordinary file")
        return file.read(_MAX_BYTES + 1)


def _spelled_as_on_disk(path: Path) -> Path:
    """Return the path with the names of the disk: ids are in composed Unicode, and names on a disk may not be."""
    if path.exists():
        return path
    found = Path(path.anchor)
    for name in path.parts[1:]:
        composed = normalize("NFC", name)
        if not (found / name).exists():
            name = next((one.name for one in found.iterdir() if normalize("NFC", one.name) == composed), name)
        found /= name
    return found
