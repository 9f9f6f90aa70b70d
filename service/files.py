"""Replace a file or a folder as a whole: a crash or a power cut leaves either the earlier one or the new one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from service.errors import InvalidOutput


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file to write; at the end of the block it takes the place of `path` for good.

    The temporary file lies beside `path`, named PATH.tmp. If the block raises, it is removed and `path` stays as it
    was.

    Raises:
        OSError: the file cannot be synced or renamed; `path` stays as it was.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        publish(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Replace a file by this content. Raises OSError; the earlier file stays then."""
    with replace_file(path) as temporary:
        temporary.write_bytes(content)


def temporary_path(path: Path) -> Path:
    """Return the path that a new version of a file has until it is published."""
    return path.with_name(path.name + ".tmp")


def publish(temporary: Path, path: Path) -> None:
    """Give a written file or folder its name so that it survives a power cut. Raises OSError.

    A folder's files must be synced already.
    """
    sync(temporary)
    temporary.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Force the content of a file, or the entries of a folder, out to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_folder(files: dict[str, bytes], out: Path) -> None:
    """Replace a folder by one that holds these files, by name.

    Between the two renames there is no folder at `out` for an instant; if the second one fails, the earlier folder
    gets its name back.

    Raises:
        InvalidOutput: it cannot be written; the earlier folder stays then.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
            folder, earlier = Path(temporary) / out.name, Path(temporary) / "earlier"
            folder.mkdir()
            for file, data in files.items():
                (folder / file).write_bytes(data)
                sync(folder / file)
            if out.exists():
                out.rename(earlier)
            try:
                publish(folder, out)
            except OSError:
                if earlier.exists():
                    earlier.rename(out)
                raise
    except OSError as error:
        raise InvalidOutput(f"{out}: cannot be written: {error.strerror or error}") from error
