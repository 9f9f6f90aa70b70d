"""Pictures in Parquet files, as image sets lie on the Hugging Face Hub. Imports pyarrow, which takes a while."""

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from service.errors import InvalidSource
from service.sources.compact import Labels, Names
from service.sources.files import stems
from service.sources.source import Source

_HELD_BYTES = 256 * 2**20
_PICTURES = ("image", "img", "bytes")  # which column, where several hold bytes


class _Table(NamedTuple):
    """What is held of a file: its footer, where its pictures are, and its small columns."""

    path: Path
    footer: Any  # pq.FileMetaData
    leaf: str  # of the picture's bytes, such as image.bytes
    paths: Any  # pa.ChunkedArray of large_string, or None
    labels: tuple[Any, list[str]] | None  # codes (N,) and what they stand for; None where a picture has none


def open_parquet(name: str, paths: Sequence[Path]) -> Source:
    """Open Parquet files that hold the bytes of pictures.

    The picture is a struct column with a binary field `bytes`, else a binary column: image or img if there is
    one, else the only one. The label is the column `label`, else the only ClassLabel of the Hugging Face
    metadata, which also names its numbers; a source in which a picture has none has no labels. An id is the
    struct's `path` where all are there and no two the same, else the file's name and the row's number
    (train-00000-of-00002/00000123).

    Raises:
        InvalidSource: not Parquet, damaged, no column of pictures, or no row.

    Cost: a row group is read and decoded whole; the last 256 MiB of them are held, and those being read.
    """
    tables = [_read_table(path) for path in paths]
    groups = [
        (table.path, table.footer, table.leaf, number)
        for table in tables
        for number in range(table.footer.num_row_groups)
        if table.footer.row_group(number).num_rows
    ]
    if not groups:
        raise InvalidSource(f"{name}: holds no picture; its Parquet files have no row")
    starts = np.cumsum([0] + [footer.row_group(number).num_rows for _, footer, _, number in groups])

    def load(group: int) -> Any:
        path, footer, leaf, number = groups[group]
        try:
            with pq.ParquetFile(path, metadata=footer) as file:
                column = file.read_row_group(number, columns=[leaf], use_threads=False).flatten().column(0)
        except (pa.ArrowException, ValueError) as error:
            raise OSError(_first_line(error)) from error
        rows = starts[group + 1] - starts[group]
        if len(column) != rows:
            raise OSError(f"its row group is damaged: expected {rows} rows, got {len(column)}")
        return column

    held = RowGroups(load, _HELD_BYTES)

    def read(position: int) -> bytes:
        group = int(starts.searchsorted(position, "right")) - 1
        data: bytes | None = held[group][position - int(starts[group])].as_py()
        if data is None:
            raise OSError("there are no bytes in its row")
        return data

    return Source(name, _ids(tables), read, _merged(tables), starts[:-1].tolist())


class RowGroups:
    """The row groups that were asked for last, each loaded by one thread while others wait for it.

    Args:
        load: a group's column of pictures.
        most_bytes: what is held after a load; one group alone may be larger.
    """

    def __init__(self, load: Callable[[int], Any], most_bytes: int) -> None:
        self._load = load
        self._most_bytes = most_bytes
        self._lock = Lock()
        self._held: OrderedDict[int, Future[Any]] = OrderedDict()  # the one asked for last at the end
        self._sizes: dict[int, int] = {}  # of those that are loaded
        self._total = 0

    def __getitem__(self, group: int) -> Any:
        with self._lock:
            column = self._held.get(group)
            if waits := column is not None:
                self._held.move_to_end(group)
            else:
                column = self._held[group] = Future()
        if not waits:
            self._fill(group, column)
        return column.result()

    def _fill(self, group: int, column: "Future[Any]") -> None:
        try:
            loaded = self._load(group)
        except BaseException as error:  # who waits must not wait for ever, and the next one tries again
            with self._lock:
                del self._held[group]
            column.set_exception(error)
            return
        with self._lock:
            self._sizes[group] = loaded.nbytes
            self._total += loaded.nbytes
            while self._total > self._most_bytes and len(self._sizes) > 1:
                oldest = next(one for one in self._held if one in self._sizes and one != group)
                del self._held[oldest]
                self._total -= self._sizes.pop(oldest)
        column.set_result(loaded)


def _read_table(path: Path) -> _Table:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            leaf = _picture_leaf(path, schema)
            features = _features(schema)
            label = _label_column(schema, features)
            picture_path = leaf.removesuffix(".bytes") + ".path"
            wanted = [picture_path] if _has_paths(schema, leaf) else []
            small = file.read(columns=wanted + ([label] if label else []), use_threads=False).flatten()
            small.validate(full=True)  # text that is not UTF-8 shows here
            counts = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
            if sum(counts) != file.metadata.num_rows or (small.num_columns and len(small) != file.metadata.num_rows):
                raise ValueError(f"expected {file.metadata.num_rows} rows, got {len(small)}")
            paths = small.column(picture_path).cast(pa.large_string()) if wanted else None
            labels = _codes(small.column(label), features.get(label)) if label else None
            return _Table(path, file.metadata, leaf, paths, labels)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InvalidSource(f"{path}: not a Parquet file that can be read: {_first_line(error)}") from error


def _picture_leaf(path: Path, schema: Any) -> str:
    """The column of pictures, as image.bytes or image."""
    structs = [
        field.name
        for field in schema
        if pa.types.is_struct(field.type) and any(part.name == "bytes" and _is_binary(part.type) for part in field.type)
    ]
    for names, ending in ((structs, ".bytes"), ([field.name for field in schema if _is_binary(field.type)], "")):
        chosen = [name for name in _PICTURES if name in names] or (names if len(names) == 1 else [])
        if chosen:
            return chosen[0] + ending
    if b"lookalike" in (schema.metadata or {}):
        raise InvalidSource(f"{path}: holds embeddings that `lookalike embed` wrote; expected the pictures themselves")
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise InvalidSource(
        f"{path}: expected a column of pictures: a struct with binary `bytes`, as on the Hugging Face Hub, or a "
        f"binary column, named image where there are several; found {columns or 'no column'}"
    )


def _is_binary(type: Any) -> bool:
    return bool(pa.types.is_binary(type) or pa.types.is_large_binary(type) or pa.types.is_binary_view(type))


def _is_text(type: Any) -> bool:
    return bool(pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type))


def _has_paths(schema: Any, leaf: str) -> bool:
    if not leaf.endswith(".bytes") or leaf in schema.names:
        return False
    return any(part.name == "path" and _is_text(part.type) for part in schema.field(leaf.removesuffix(".bytes")).type)


def _features(schema: Any) -> dict[str, list[str]]:
    """The names of every ClassLabel in the metadata that Hugging Face's datasets leaves in a file."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {
            name: [str(label) for label in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and name in schema.names
        }
    except (KeyError, TypeError, ValueError, AttributeError):  # none there, or not as they write it
        return {}


def _label_column(schema: Any, features: dict[str, list[str]]) -> str | None:
    name = "label" if "label" in schema.names else next(iter(features)) if len(features) == 1 else None
    if name is None:
        return None
    type = schema.field(name).type
    if pa.types.is_dictionary(type):
        type = type.value_type
    return name if pa.types.is_integer(type) or _is_text(type) else None


def _codes(column: Any, names: list[str] | None) -> tuple[Any, list[str]] | None:
    """A column's labels as codes and what they stand for; None where a row has no label.

    Hugging Face writes −1 for a label that is not known.
    """
    if column.null_count:
        return None
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kinds = column.unique()
    values = kinds.to_pylist()
    if names and pa.types.is_integer(column.type):
        if not all(0 <= value < len(names) for value in values):
            return None
        values = [names[value] for value in values]
    return pc.index_in(column, value_set=kinds).to_numpy(), [str(value) for value in values]


def _merged(tables: Sequence[_Table]) -> Labels | None:
    """The labels of all files, in which one label may have another code in each."""
    names = dict[str, int]()
    codes = []
    for table in tables:
        if table.labels is None:
            return None
        own_codes, own_names = table.labels
        shared = np.array([names.setdefault(label, len(names)) for label in own_names], np.int64)
        codes.append(shared[own_codes])
    return Labels(np.concatenate(codes), tuple(names))


def _ids(tables: Sequence[_Table]) -> Names:
    if all(table.paths is not None for table in tables):
        paths = pa.chunked_array([chunk for table in tables for chunk in table.paths.chunks], pa.large_string())
        named = not paths.null_count and pc.min(pc.binary_length(paths)).as_py() > 0
        if named and pc.count_distinct(paths).as_py() == len(paths):
            return Names(path.as_py() for path in paths)
    return Names(
        f"{stem}/{row:08d}"
        for stem, table in zip(stems([table.path for table in tables]), tables, strict=True)
        for row in range(table.footer.num_rows)
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
