"""SOURCE → a stream of (id, bytes, label): a folder, .zip, .tar, .parquet, MNIST or digits. Never unpickles.

source.py defines Source. folder.py, zip.py and tar.py open pictures as files, listed.py those that a glob or a list
names, parquet.py opens tables, and named.py opens data sets by name. kinds.py tells pictures from other files, paths.py
makes ids and labels of paths, files.py expands patterns, and compact.py holds ids and labels in a few bytes each.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

from service.errors import InvalidSource
from service.sources.files import expand
from service.sources.folder import gather, open_folder
from service.sources.kinds import HIDDEN, holds_none
from service.sources.listed import glob_files, glob_root, is_glob, open_glob
from service.sources.named import open_digits, open_mnist
from service.sources.source import LeftOut, Omissions, Source, slice_source
from service.sources.tar import compressed, open_tars
from service.sources.zip import open_zip

DEFAULT_DATA_ROOT = Path("data")
_NAMED = re.compile(r"(mnist/train|mnist/test|digits)(\[.*\])?")
_SLICED = re.compile(r"(.+)(\[[^\[\]]*\])")
_PACKED = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_EXPECTED = (
    "expected a folder of pictures, a .zip of one, .tar or .parquet files (one, a folder of them, or several as "
    "in train-{000..009}.tar), a quoted pattern such as 'photos/**/*.jpg', mnist/train, mnist/test or digits"
)


def open_source(name: str, data_root: Path = DEFAULT_DATA_ROOT, image_key: str | None = None) -> Source:
    """Open the SOURCE argument of a command.

    Args:
        name: a folder of pictures, a .zip of one, a .tar or .parquet file, a folder of these, several of them
            as shards/train-{000..009}.tar, a glob such as photos/**/*.jpg or shards/*.tar, or mnist/train,
            mnist/test, digits. A slice such as [:8000] or [90%:] may follow. An existing path takes precedence over a
            slice or a pattern.
        data_root: the folder of named data sets, in torchvision's layout (data_root/MNIST/raw).
        image_key: of the picture to take where a sample in a .tar has several, such as input.jpg or mask.

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
            return slice_source(_open_path(name, sliced[1], image_key), sliced[2])
        return _open_path(name, name, image_key)
    except OSError as error:
        raise InvalidSource(f"{name}: cannot be read: {error.strerror or error}") from error


def origin_of(name: str) -> str:
    """Return where a SOURCE lies, without a slice: the name of its set, or its real path; a glob lies in its folder."""
    named = _NAMED.fullmatch(name)
    if named:
        return named[1]
    sliced = _SLICED.fullmatch(name)
    text = sliced[1] if sliced and not Path(name).exists() else name
    if is_glob(text) and not Path(text).exists():
        return os.path.realpath(glob_root(os.path.expanduser(text)))  # noqa: PTH111
    return os.path.realpath(text)


def _open_named(name: str, set_name: str, data_root: Path) -> Source:
    return open_digits(name) if set_name == "digits" else open_mnist(name, set_name.split("/")[1], data_root)


def _open_path(name: str, text: str, image_key: str | None) -> Source:
    """Open a folder, a file or a pattern of files: text is the path, name appears in messages."""
    path = Path(text)
    if path.is_dir():
        gathered = gather(path)
        if gathered.found:
            return open_folder(name, path, gathered)
        return _open_shards(name, path, gathered.left_out, image_key)
    paths = [path] if path.exists() else expand(text)
    if not paths and is_glob(text):
        return _open_glob(name, os.path.expanduser(text), image_key)  # noqa: PTH111
    if not paths:
        raise InvalidSource(f"{name}: no such source; {_EXPECTED}")
    packed = next((ending for ending in _PACKED if text.lower().endswith(ending)), None)
    if packed:
        raise compressed(name, packed)
    return _open_files(name, paths, image_key)


def _open_glob(name: str, pattern: str, image_key: str | None) -> Source:
    """Open what a glob names: .tar files, .parquet files or a .zip if it names nothing else, or pictures."""
    found = glob_files(pattern)
    if not found:
        raise InvalidSource(f"{name}: nothing has a name of this pattern")
    endings = {path.suffix.lower() for path in found}
    if endings in ({".tar"}, {".parquet"}) or (endings == {".zip"} and len(found) == 1):
        return _open_files(name, found, image_key)
    return open_glob(name, pattern, found)


def _open_shards(name: str, folder: Path, files: list[LeftOut], image_key: str | None) -> Source:
    """Open a folder that holds no picture: its .tar files, or its .parquet files."""
    shown = sorted(one.name for one in files if one.reason != HIDDEN)
    tars = [file for file in shown if file.lower().endswith(".tar")]
    # Names such as _metadata.parquet are reserved for metadata about the other files.
    tables = [file for file in shown if file.lower().endswith(".parquet") and not Path(file).name.startswith("_")]
    if tars:
        # img2dataset writes a table of facts beside each .tar.
        tables = [table for table in tables if table.removesuffix(".parquet") + ".tar" not in tars]
    if tars and tables:
        raise InvalidSource(f"{name}: expected files of one kind, found {tars[0]} and {tables[0]}; name one of them")
    taken = set(tars or tables)
    if not taken:
        raise holds_none(name, files, ", then for .tar and .parquet")
    source = _open_files(name, [folder / file for file in tars or tables], image_key)
    left_out = [*source.left_out, *(one for one in files if one.name not in taken)]
    return replace(source, left_out=Omissions(left_out))


def _open_files(name: str, paths: list[Path], image_key: str | None) -> Source:
    match paths[0].suffix.lower():
        case ".zip" if len(paths) == 1:
            return open_zip(name, paths[0])
        case ".tar":
            return open_tars(name, paths, image_key)
        case ".parquet":
            # Imported late because pyarrow loads slowly.
            from service.sources.parquet import open_parquet

            return open_parquet(name, paths)
    raise InvalidSource(f"{name}: not a kind of file that we read; {_EXPECTED}")
