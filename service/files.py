"""Write a folder whole or not at all."""

import tempfile
from pathlib import Path

from service.errors import InvalidOutput


def write_folder(files: dict[str, bytes], out: Path) -> None:
    """Write files, by name, as a folder; an earlier one stays until the new one has its place.

    Raises:
        InvalidOutput: it cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
            folder, earlier = Path(temporary) / out.name, Path(temporary) / "earlier"
            folder.mkdir()
            for file, data in files.items():
                (folder / file).write_bytes(data)
            if out.exists():
                out.rename(earlier)
            try:
                folder.rename(out)
            except OSError:
                if earlier.exists():
                    earlier.rename(out)
                raise
    except OSError as error:
        raise InvalidOutput(f"{out}: cannot be written: {error.strerror or error}") from error
