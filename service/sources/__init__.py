"""SOURCE → a stream of (id, bytes, label): a folder, .zip, .tar, .parquet, MNIST or digits. Never unpickles.

source.py defines Source; files.py opens folders and archives, parquet.py opens tables, and named.py opens data sets
by name. compact.py holds their ids and labels in a few bytes each.
"""

import os
import re
from pathlib import Path

from service.encoding.images import SUFFIXES
from service.errors import InvalidSource
from service.sources.files import expand, find, open_folder, open_tars, open_zip
from service.sources.named import open_digits, open_mnist
from service.sources.source import Source, slice_source

DEFAULT_DATA_ROOT = Path("data")
_NAMED = re.compile(r"(mnist/train|mnist/test|digits)(\[.*\])?")
_SLICED = re.compile(r"(.+)(\[[^\[\]]*\])")
_PACKED = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_EXPECTED = (
    "expected a folder of pictures, a .zip of one, .tar or .parquet files (one, a folder of them, or several as "
    "in train-{000..009}.tar), mnist/train, mnist/test or digits"
)


def open_source(name: str, data_root: Path = DEFAULT_DATA_ROOT) -> Source:
    """Open the SOURCE argument of a command.

    Args:
        name: a folder of pictures, a .zip of one, a .tar or .parquet file, a folder of these, several of them
            as shards/train-{000..009}.tar, or mnist/train, mnist/test, digits. A slice such as [:8000] or
            [90%:] may follow. An existing path takes precedence over a slice or a pattern.
        data_root: the folder of named data sets, in torchvision's layout (data_root/MNIST/raw).

    Raises:
        InvalidSource: the source does not exist, is damaged, holds no picture, or the slice is empty.

    Cost: reads every header of a .tar once (a minute for a million pictures) and the ids and labels of a
    .parquet. Each picture takes the bytes of its id and 5 (folder) to 40 (.zip) more in memory.
    """
    try:
        named = _NAMED.fullmatch(name)
        if named:
            return slice_source(_open_named(name, named[1], data_root), named[2] or "")
        sliced = _SLICED.fullmatch(name)
        if sliced and not Path(name).exists():
            return slice_source(_open_path(name, sliced[1]), sliced[2])
        return _open_path(name, name)
    except OSError as error:
        raise InvalidSource(f"{name}: cannot be read: {error.strerror or error}") from error


def origin_of(name: str) -> str:
    """Return where a SOURCE lies, without a slice: the name of its set, or its real path."""
    named = _NAMED.fullmatch(name)
    if named:
        return named[1]
    sliced = _SLICED.fullmatch(name)
    return os.path.realpath(sliced[1] if sliced and not Path(name).exists() else name)


def _open_named(name: str, set_name: str, data_root: Path) -> Source:
    return open_digits(name) if set_name == "digits" else open_mnist(name, set_name.split("/")[1], data_root)


def _open_path(name: str, text: str) -> Source:
    """Open a folder, a file or a pattern of files: text is the path, name appears in messages."""
    path = Path(text)
    if path.is_dir():
        pictures = find(path, SUFFIXES)
        if pictures:
            return open_folder(name, path, pictures)
        tars, tables = find(path, (".tar",)), find(path, (".parquet",))
        # Names such as _metadata.parquet are reserved for metadata about the other files.
        tables = [table for table in tables if not Path(table).name.startswith("_")]
        if tars and tables:
            raise InvalidSource(
                f"{name}: expected files of one kind, found {tars[0]} and {tables[0]}; name one of them"
            )
        if not tars and not tables:
            raise InvalidSource(
                f"{name}: holds no picture; looked for {' '.join(SUFFIXES)} at any depth, then for .tar and .parquet"
            )
        paths = [path / file for file in tars or tables]
    else:
        paths = [path] if path.exists() else expand(text)
    match paths[0].suffix.lower() if paths else "":
        case ".zip" if len(paths) == 1:
            return open_zip(name, path)
        case ".tar":
            return open_tars(name, paths)
        case ".parquet":
            # Imported late because pyarrow loads slowly.
            from service.sources.parquet import open_parquet

            return open_parquet(name, paths)
    if paths and text.lower().endswith(_PACKED):
        raise InvalidSource(f"{name}: is a compressed tar; pictures are read from their place in it: unpack it to .tar")
    raise InvalidSource(f"{name}: {'not a kind of file that we read' if paths else 'no such source'}; {_EXPECTED}")
