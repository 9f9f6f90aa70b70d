"""The bytes of an item's picture where the store does not keep them: in the file that the picture came from."""

import hashlib
import os
import stat
from pathlib import Path
from unicodedata import normalize

from service.errors import ItemNotFound
from service.store import Item

# No picture is larger (images.OWN_FILES), so a file that has grown beyond it has changed.
_MAX_BYTES = 1_000_000_000


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
