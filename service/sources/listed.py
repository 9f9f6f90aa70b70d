"""Pictures that are named one by one: by a glob such as photos/**/*.jpg, or in a list of paths."""

import glob
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from service.errors import InvalidSource
from service.sources.folder import open_folder
from service.sources.kinds import FIRST_BYTES, holds_none, judge
from service.sources.paths import Gathered
from service.sources.source import LeftOut, Source

_MAGIC = "*?["


def is_glob(text: str) -> bool:
    """Return whether a path has a wildcard: *, ? or […]."""
    return any(mark in text for mark in _MAGIC)


def glob_root(pattern: str) -> Path:
    """Return the folder above the first part of a glob that has a wildcard: photos for photos/**/*.jpg."""
    parts = Path(pattern).parts
    return Path(*parts[: next(at for at, part in enumerate(parts) if is_glob(part))])


def glob_files(pattern: str) -> list[Path]:
    """Return the files and folders that a glob names, sorted; ** stands for folders at any depth, hidden ones aside."""
    return sorted(map(Path, glob.iglob(pattern, recursive=True)))  # noqa: PTH207


def open_glob(name: str, pattern: str, found: Iterable[Path]) -> Source:
    """Open the pictures that a glob names. Ids are paths below its folder, as for the folder itself.

    Args:
        name: for messages.
        pattern: the glob.
        found: what it names.

    Raises:
        InvalidSource: it names no picture.
    """
    root = glob_root(pattern)
    return _open(name, root, (os.path.relpath(path, root) for path in found))


def open_list(name: str, listed: Iterable[str]) -> Source:
    """Open the pictures that a list names. Their ids are the paths as listed, without ./ before them.

    A path that is listed twice counts once. One that leads nowhere is a picture that cannot be read.

    Args:
        name: for messages.
        listed: the paths; empty ones are passed over.

    Raises:
        InvalidSource: the list names no picture.
    """
    return _open(name, Path(), (path.removeprefix("./") for path in listed if path), missing=True)


def _open(name: str, root: Path, paths: Iterable[str], missing: bool = False) -> Source:
    gathered: Gathered[None] = Gathered(lambda one, other: one[0] == other[0])
    for path in paths:
        left_out = _judge(root, path, missing)
        if left_out:
            gathered.left_out.append(left_out)
        elif path not in gathered.found:
            gathered.add(path, None)
    if not gathered.found:
        raise holds_none(name, gathered.left_out)
    return open_folder(name, root, gathered)


def _judge(root: Path, path: str, missing: bool) -> LeftOut | None:
    """Return why a path is left out. One that was named on purpose may be hidden, or lie in a hidden folder."""
    try:
        mode = (root / path).stat().st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return None if missing else LeftOut(path, f"unreadable: {reason}", True)
    if stat.S_ISDIR(mode):
        return LeftOut(path, "a folder", False)
    if not stat.S_ISREG(mode):
        return LeftOut(path, "not an ordinary file", False)
    left_out = judge(path.rpartition("/")[2].lstrip(".") or "hidden", lambda: _start(root / path))
    return left_out and left_out._replace(name=path)


def _start(path: Path) -> bytes:
    with path.open("rb", buffering=0) as file:
        return file.read(FIRST_BYTES)


def read_list(content: bytes, nul: bool) -> list[str]:
    """Return the paths in a list, separated by line ends or by NUL.

    Raises:
        InvalidSource: there is a NUL in lines of text: the list is one of -print0.
    """
    if not nul and b"\0" in content:
        raise InvalidSource("-: the list has NUL characters; expected a path a line, or the option -0")
    lines = content.split(b"\0") if nul else [line.removesuffix(b"\r") for line in content.split(b"\n")]
    return [os.fsdecode(line) for line in lines]
