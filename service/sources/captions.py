"""Captions in metadata.jsonl and metadata.csv, as Hugging Face lays them beside the pictures of a folder or .zip."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from service.errors import InvalidSource
from service.sources.paths import compose

# The columns that hold captions, in order of preference; in Parquet, too.
CAPTION_COLUMNS = ("caption", "text")
_FILES = ("metadata.jsonl", "metadata.csv")
_PICTURE = "file_name"


def is_metadata(path: str) -> bool:
    """Return whether a file within a source may hold captions, by its name."""
    return path.rpartition("/")[2] in _FILES


def metadata_captions(
    name: str, files: Sequence[str], read: Callable[[str], bytes], ids: Iterable[str]
) -> list[list[str]]:
    """Return the captions of pictures, a list for each.

    What they tell of pictures that are not there is counted on stderr.

    A row names its picture in file_name, relative to the file's own folder. Its captions are in the column caption,
    else in text: a text, or in JSON a list of texts. Several rows of a picture add to one another.

    Args:
        name: of the source, for messages.
        files: paths of the metadata files within the source.
        read: returns the bytes of one of them, or raises OSError.
        ids: of the pictures.

    Raises:
        InvalidSource: a file cannot be read, a row of it names no picture or has other captions than texts, or no row
            is of a picture that is there.
    """
    found: dict[str, list[str]] = {}
    for file in files:
        folder = file.rpartition("/")[0]
        try:
            content = read(file).decode("utf-8-sig")
            for number, row in _rows(file, content):
                picture = row.get(_PICTURE)
                if not isinstance(picture, str):
                    raise ValueError(f"line {number}: expected the path of a picture in {_PICTURE}")
                own = texts_of(next((row[column] for column in CAPTION_COLUMNS if row.get(column)), None))
                if own is None:
                    raise ValueError(f"line {number}: expected a text or a list of texts for a caption")
                found.setdefault(compose(f"{folder}/{picture}" if folder else picture), []).extend(own)
        except (OSError, ValueError, csv.Error) as error:
            raise InvalidSource(f"{name}: {file}: cannot be read as captions: {error}") from error
    captions = [found.pop(id, []) for id in ids]
    if any(found.values()) and not any(captions):
        raise InvalidSource(f"{name}: {', '.join(files)}: no row is of a picture of this source; {next(iter(found))}?")
    if found:
        absent = f"{len(found)} pictures of {', '.join(files)} are not there, such as {next(iter(found))!r}"
        print(f"note: {name}: {absent}", file=sys.stderr)
    return captions


def texts_of(value: Any) -> list[str] | None:
    """Return a caption as a list of texts: a text, a list of texts, or nothing; None for anything else."""
    if value is None or isinstance(value, str):
        return [value] if value else []
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return value
    return None


def _rows(file: str, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a file, each with the number of its line."""
    if file.endswith(".csv"):
        table = csv.DictReader(io.StringIO(content, newline=""))
        yield from ((table.line_num, row) for row in table)
        return
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: expected a JSON object")
            yield number, row
