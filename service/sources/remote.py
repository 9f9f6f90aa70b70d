"""Pictures below a URL that fsspec reads, such as s3://bucket/photos: one object, one picture."""

import errno
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, cast

from service.errors import InvalidSource
from service.sources.compact import Names
from service.sources.kinds import FIRST_BYTES, judge
from service.sources.paths import path_labels
from service.sources.source import LeftOut, Omissions, Source

# Each store has its own name for the time of the last change.
_TIMES = ("LastModified", "last_modified", "mtime", "updated")


def is_remote(name: str) -> bool:
    """Return whether this is a URL."""
    return "://" in name


def open_remote(name: str) -> Source:
    """Open the pictures below a URL, at any depth. Ids are sorted paths below it; labels are as path_labels says.

    Raises:
        InvalidSource: no package here reads such URLs, the URL cannot be read, or holds no picture.

    Cost: one listing. Files without an ending that we know are opened.
    """
    try:
        files, root = filesystem(name)
        listed = files.find(root, detail=True)
    # Each store raises errors of its own.
    except Exception as error:
        raise InvalidSource(f"{name}: cannot be read: {_reason(error)}") from error
    found: dict[str, _Object] = {}
    left_out: list[LeftOut] = []
    for path, facts in listed.items():
        below = path.removeprefix(root).lstrip("/") or path.rpartition("/")[2]
        reason = judge(below, _start(files, path))
        if reason:
            left_out.append(reason)
        else:
            found[below] = _Object(path, _Status(int(facts.get("size") or 0), _time_ns(facts)))
    if not found:
        raise InvalidSource(f"{name}: holds no picture")
    ids = Names(sorted(found))

    def read(position: int) -> bytes:
        try:
            content: bytes = files.cat_file(found[ids[position]].path)
        except Exception as error:
            raise _failure(found[ids[position]].path, error) from error
        return content

    return Source(
        name,
        ids,
        read,
        path_labels(list(ids)),
        left_out=Omissions(left_out),
        in_files=True,
        # A job asks a place for its size and time alone.
        place=lambda position: cast(Path, found[ids[position]]),
    )


def filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path within it.

    Raises:
        ImportError, ValueError: no package here reads such URLs.
    """
    import fsspec

    files, path = fsspec.core.url_to_fs(url)
    return files, path.rstrip("/")


class _Status(NamedTuple):
    """Size and time of an object, under the names of os.stat_result."""

    st_size: int
    st_mtime_ns: int


class _Object(NamedTuple):
    path: str
    status: _Status

    def stat(self) -> _Status:
        """Return size and time, or raise OSError where the store tells no time."""
        if not self.status.st_mtime_ns:
            raise OSError("the store tells no time")
        return self.status

    def __fspath__(self) -> str:
        return self.path


def _time_ns(facts: dict[str, Any]) -> int:
    time = next((facts[name] for name in _TIMES if facts.get(name)), 0)
    if isinstance(time, datetime):
        time = time.timestamp()
    return int(time * 1e6) * 1000 if isinstance(time, int | float) else 0


def _start(files: Any, path: str) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            # Only by name: s3fs has a version before them.
            content: bytes = files.cat_file(path, start=0, end=FIRST_BYTES)
        except Exception as error:
            raise _failure(path, error) from error
        return content

    return read


def _failure(path: str, error: Exception) -> Exception:
    """Return what to raise for an object that could not be read: OSError if it concerns this object.

    InvalidSource says that the store does not answer, after all the attempts of its own package. It ends a job: the
    following objects would take as long, and be listed as damaged.
    """
    reason = _reason(error)
    if isinstance(error, FileNotFoundError | PermissionError) or getattr(error, "errno", None) == errno.EINVAL:
        return OSError(reason)
    return InvalidSource(f"{path}: cannot be read now: {reason}; the same command goes on from here")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].replace(os.linesep, " ")[:300]
