"""A SQLite VFS that simulates power loss and failing writes. The store uses it unchanged.

SQLite reads its writes back at once, but only xSync puts them on the platter. After a power loss each unsynced
512-byte sector is on the platter or not, independently of all others. Files made or removed since the last sync of
their folder are undone, the latest first.
"""

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw

SECTOR = 512
# SQLite's own VFS handles locks and shared memory.
_UNIX = "unix"


class _Content:
    """The content of a file in SQLite's view and on the platter.

    Attributes:
        seen: the bytes that SQLite reads.
        platter: the bytes that survive a power loss.
        pending: unsynced writes: (offset, data), or (size, None) for a truncation.
        named: whether the file's name is on the platter.
    """

    def __init__(self, data: bytes, named: bool) -> None:
        self.seen, self.platter = bytearray(data), bytearray(data)
        self.pending: list[tuple[int, bytes | None]] = []
        self.named = named

    def write(self, offset: int, data: bytes | None) -> None:
        self.pending.append((offset, data))
        _put(self.seen, offset, data)

    def sync(self) -> None:
        self.platter[:] = self.seen
        self.pending.clear()

    def torn(self, chance: random.Random) -> bytes:
        """Return the content after a power loss."""
        found, share = bytearray(self.platter), chance.choice([0.0, 0.5, 0.9, 1.0])
        for offset, data in self.pending:
            if data is None:
                if chance.random() < share:
                    _put(found, offset, None)
                continue
            at = offset
            while at < offset + len(data):
                end = min((at // SECTOR + 1) * SECTOR, offset + len(data))
                if chance.random() < share:
                    _put(found, at, data[at - offset : end - offset])
                # The file system may have allocated the sector without writing it: it then holds garbage.
                elif end > len(found) and chance.random() < 0.5:
                    _put(found, at, chance.randbytes(end - at))
                at = end
        return bytes(found)


def _put(content: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del content[offset:]
        return
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


class Disk(apsw.VFS):
    """The default VFS while registered: keeps every file in memory, after reading existing ones.

    Attributes:
        count: writes and syncs so far.
        before: called before each with its number, the file's name and "write" or "sync". SQLite receives its
            exceptions.
    """

    def __init__(self, before: Callable[[int, str, str], None]) -> None:
        self.count, self.before = 0, before
        self._files: dict[str, _Content] = {}
        # Removed files whose names are still on the platter.
        self._removed: dict[str, _Content] = {}
        self._using = threading.RLock()
        self._name = f"disk {id(self)}"
        super().__init__(self._name, _UNIX, makedefault=True)

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, *_: object) -> None:
        apsw.set_default_vfs(_UNIX)
        self.unregister()

    def after_power_loss(self, chance: random.Random) -> dict[str, bytes]:
        """Return the name and content of each file after a power loss now."""
        with self._using:
            found = {name: content.torn(chance) for name, content in self._files.items() if content.named}
            kept = True
            for name, content in self._files.items():
                # The file system writes names in order: a lost name loses all later ones.
                kept = kept and chance.random() < 0.7
                if not content.named and kept:
                    found[name] = content.torn(chance)
            for name, content in self._removed.items():
                if chance.random() < 0.5 and name not in self._files:
                    found[name] = content.torn(chance)
            return {Path(name).name: data for name, data in found.items()}

    def after_kill(self) -> dict[str, bytes]:
        """Return the name and content of each file after a kill now, without a power loss."""
        with self._using:
            return {Path(name).name: bytes(content.seen) for name, content in self._files.items()}

    def at_work(self, name: str, what: str) -> None:
        """Count a write or a sync and call `before`."""
        self.count += 1
        self.before(self.count, name, what)

    # Methods called by SQLite ------------------------------------------------------------------------

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:  # noqa: N802
        if name is None:
            return apsw.VFSFile(_UNIX, name, flags)
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        with self._using:
            there = Path(path).exists()
            file = _File(name, flags)
            if path not in self._files:
                self._files[path] = _Content(Path(path).read_bytes() if there else b"", there)
            file.place(self, path, self._files[path], self._using)
        return file

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        with self._using:
            self.at_work(filename, "write")
            content = self._files.pop(filename, None)
            if content is not None and content.named:
                self._removed[filename] = content
            if syncdir:
                self.sync_names()
        super().xDelete(filename, syncdir)

    def xAccess(self, pathname: str, flags: int) -> bool:  # noqa: N802
        if flags == apsw.SQLITE_ACCESS_EXISTS and pathname in self._files:
            # SQLite's Unix VFS also reports an empty file as missing.
            return bool(self._files[pathname].seen)
        return bool(super().xAccess(pathname, flags))

    def sync_names(self) -> None:
        """Put all names on the platter and take all removed ones off it."""
        for content in self._files.values():
            content.named = True
        self._removed.clear()

    def excepthook(self, *_: object) -> bool:
        # SQLite ignores the outcome of some calls, such as closing a file, so their exceptions end here.
        return True


class _File(apsw.VFSFile):
    def __init__(self, name: Any, flags: list[int]) -> None:
        super().__init__(_UNIX, name, flags)

    def place(self, disk: Disk, name: str, content: _Content, using: "threading.RLock") -> None:
        self._disk, self._name, self._content, self._using = disk, name, content, using

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        with self._using:
            return bytes(self._content.seen[offset : offset + amount])

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        with self._using:
            self._disk.at_work(self._name, "write")
            self._content.write(offset, bytes(data))

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        with self._using:
            self._disk.at_work(self._name, "write")
            self._content.write(newsize, None)

    def xSync(self, flags: int) -> None:  # noqa: ARG002, N802
        with self._using:
            self._disk.at_work(self._name, "sync")
            self._content.sync()
            # SQLite syncs the folder after a new file.
            if not self._content.named:
                self._disk.sync_names()

    def xFileSize(self) -> int:  # noqa: N802
        with self._using:
            return len(self._content.seen)
