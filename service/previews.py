"""Previews that are kept on disk: files of a limited number of bytes, each named by its picture's digest and size."""

import re
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from service.files import write_file

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[0-9a-f]{64}-[0-9]+\.webp")


class PreviewCache:
    """Previews in a folder. Calls may come from any thread of one process."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        """Look at what an earlier process left.

        Args:
            folder: of the files; it is made with the first of them.
            most_bytes: of all files together. Beyond it the oldest ones are removed.
        """
        self._folder, self._most_bytes = folder, most_bytes
        self._lock = threading.Lock()
        # Bytes of each file, the oldest first.
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._bytes = 0
        with suppress(OSError):
            found = [(path.stat(), path) for path in folder.iterdir()]
            for status, path in sorted(found, key=lambda one: one[0].st_mtime_ns):
                if _NAME.fullmatch(path.name):
                    self._sizes[path.name] = status.st_size
                    self._bytes += status.st_size
                # A process that was killed left a part of a file.
                elif path.name.endswith(".webp.tmp"):
                    path.unlink()
            self._shrink()

    def get(self, digest: str, side: int) -> bytes | None:
        """Return the preview of a picture, a WebP file; None if it is not there in full."""
        name = f"{digest}-{side}.webp"
        if name not in self._sizes:
            return None
        try:
            data = (self._folder / name).read_bytes()
        except OSError:
            return None
        # The header of a WebP file tells its length.
        return data if data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 == len(data) else None

    def put(self, digest: str, side: int, data: bytes) -> None:
        """Keep a preview, unless it cannot be written: it can be made again."""
        if not _SHA256.fullmatch(digest) or len(data) > self._most_bytes:
            return
        name = f"{digest}-{side}.webp"
        with self._lock, suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            write_file(self._folder / name, data)
            self._bytes += len(data) - self._sizes.pop(name, 0)
            self._sizes[name] = len(data)
            self._shrink()

    def _shrink(self) -> None:
        while self._bytes > self._most_bytes:
            name, size = self._sizes.popitem(last=False)
            self._bytes -= size
            (self._folder / name).unlink(missing_ok=True)
