"""Pictures in a folder, at any depth.

A source opens the file at every read. So threads and processes may read at once, and no handle stays open.
"""

import filecmp
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from service.sources.captions import is_metadata, metadata_captions
from service.sources.compact import Names
from service.sources.kinds import FIRST_BYTES, HIDDEN, is_hidden, judge
from service.sources.paths import Gathered, path_labels
from service.sources.source import LeftOut, Omissions, Source

# How the reason begins for which a link is left out whose file or folder is not there, now.
NOWHERE = "a link that leads nowhere"


def gather(root: Path) -> Gathered[None]:
    """Return the pictures in a folder, at any depth, and what it holds besides. Raises OSError if it is unreadable."""
    gathered: Gathered[None] = Gathered(lambda one, other: _same(root / one[0], root / other[0]))
    for path, left_out in walk(root):
        left_out = left_out or judge(path, lambda path=path: _start(root / path))  # type: ignore[misc]
        if left_out:
            gathered.left_out.append(left_out)
        else:
            gathered.add(path, None)
    return gathered


Stamp = tuple[int, int]
"""What a disk says of a file without opening it: bytes, and when it was changed last in nanoseconds since 1970."""


class Stamped(Gathered[Stamp]):
    """The pictures of a folder with their stamps.

    Attributes:
        unchanged: number of pictures that have the stamp they had earlier.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(lambda one, other: _same(root / one[0], root / other[0]))
        self.unchanged = 0


def gather_stamped(root: Path, known: Mapping[str, tuple[int | None, int | None]]) -> Stamped:
    """Return what `gather` returns, with the stamp of each picture.

    Args:
        root: the folder.
        known: stamps of pictures that were in the folder earlier, by composed path. One with the same stamp is a
            picture still, and is not opened, whatever its ending.

    Cost: twice that of a bare walk, so the loop has no call that it can do without.
    """
    gathered = Stamped(root)
    found, status_of, stamp_of = gathered.found, os.stat, known.get
    top = os.path.join(root, "")  # noqa: PTH118
    for path, left_out in walk(root):
        if left_out is None:
            try:
                status = status_of(top + path)
            except FileNotFoundError:
                continue
            except OSError as error:
                gathered.left_out.append(LeftOut(path, f"unreadable: {error.strerror}", not is_hidden(path)))
                continue
            stamp = (status.st_size, status.st_mtime_ns)
            if stamp_of(path) == stamp:
                gathered.unchanged += 1
                if path not in found:
                    found[path] = path, stamp
                    continue
            else:
                left_out = judge(path, lambda path=path: _start(root / path))  # type: ignore[misc]
            if left_out is None:
                gathered.add(path, stamp)
                continue
        gathered.left_out.append(left_out)
    return gathered


def open_folder(name: str, root: Path, gathered: Gathered[Any]) -> Source:
    """Open a folder of pictures. Ids are sorted paths in composed Unicode; labels are as path_labels says."""
    pictures = sorted(gathered.found)
    ids = Names(pictures)
    metadata = [one.name for one in gathered.left_out if is_metadata(one.name)]
    # Most paths are composed already.
    stored = {at: gathered.found[id][0] for at, id in enumerate(pictures) if gathered.found[id][0] != id}

    def place(position: int) -> Path:
        return root / stored.get(position, ids[position])

    return Source(
        name,
        ids,
        lambda position: place(position).read_bytes(),
        path_labels(pictures),
        left_out=Omissions(gathered.left_out),
        in_files=True,
        captions=(
            (lambda: metadata_captions(name, metadata, lambda path: (root / path).read_bytes(), ids))
            if metadata
            else None
        ),
        place=place,
    )


def walk(root: Path) -> Iterator[tuple[str, LeftOut | None]]:
    """Yield what is under root, by path relative to it: files, and with the reason what is left out.

    Hidden folders are not entered. Links are followed, but every folder is entered once, and its real path wins over
    a link to it; of several links, the first in sorted order. So the result is the same on every disk.

    Raises:
        OSError: root cannot be read.
    """
    entered: set[str] = set()
    links: list[str] = []
    yield from _enter(root, "", os.path.realpath(root), entered, links)
    while links:
        links, earlier = [], links
        # Folders come first, so that a link to a file within one of them is recognised.
        for link in sorted(earlier, key=lambda link: (not os.path.isdir(root / link), link)):  # noqa: PTH112
            yield from _follow(root, link, entered, links)


def _enter(
    root: Path, folder: str, real: str, entered: set[str], links: list[str]
) -> Iterator[tuple[str, LeftOut | None]]:
    """Yield what is in a folder, whose real path is given, and below; links are appended to `links`, not followed."""
    pending = [(folder, real)]
    while pending:
        above, real = pending.pop()
        if real in entered:
            yield above, LeftOut(above, "a link to a folder that is read already", False)
            continue
        entered.add(real)
        try:
            with os.scandir(root / above) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            if not above:
                raise
            yield above, LeftOut(above, f"unreadable: {error.strerror}", True)
            continue
        folders = []
        for entry in entries:
            path = above + entry.name
            if entry.is_dir(follow_symlinks=False):
                if is_hidden(entry.name):
                    yield path + "/", LeftOut(path + "/", HIDDEN, False)
                else:
                    folders.append((path + "/", f"{real.rstrip('/')}/{entry.name}"))
            elif entry.is_symlink() and not is_hidden(entry.name):
                links.append(path)
            elif entry.is_file(follow_symlinks=False) or is_hidden(entry.name):
                yield path, None
            else:
                yield path, LeftOut(path, "not an ordinary file", False)
        pending += reversed(folders)


def _follow(root: Path, link: str, entered: set[str], links: list[str]) -> Iterator[tuple[str, LeftOut | None]]:
    """Yield what a link leads to."""
    try:
        mode = (root / link).stat().st_mode
    except OSError as error:
        picture = judge(link, lambda: b"") is None
        yield link, LeftOut(link, f"{NOWHERE}: {error.strerror}", picture)
        return
    real = os.path.realpath(root / link)
    if stat.S_ISDIR(mode):
        if os.path.realpath(root).startswith(real.rstrip("/") + "/"):
            yield link, LeftOut(link, "a link to a folder that holds this source", False)
        else:
            yield from _enter(root, link + "/", real, entered, links)
    elif not stat.S_ISREG(mode):
        yield link, LeftOut(link, "not an ordinary file", False)
    elif os.path.dirname(real) in entered and not is_hidden(os.path.basename(real)):  # noqa: PTH119, PTH120
        yield link, LeftOut(link, "a link to a file that is read already", False)
    else:
        yield link, None


def _same(one: Path, other: Path) -> bool:
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


def _start(path: Path) -> bytes:
    with path.open("rb", buffering=0) as file:
        return file.read(FIRST_BYTES)
