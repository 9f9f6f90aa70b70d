"""Pictures in Parquet files, in the layout of the Hugging Face Hub. Imports pyarrow, which loads slowly."""

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
from service.sources.captions import CAPTION_COLUMNS, texts_of
from service.sources.compact import Labels, Names
from service.sources.files import stems
from service.sources.paths import compose
from service.sources.source import Columns, Source

_CACHE_BYTES = 256 * 2**20
# Column names in order of preference, for a file with several binary columns.
_PICTURE_COLUMNS = ("image", "img", "bytes")


class _Table(NamedTuple):
    """The footer and the small columns of one Parquet file.

    Attributes:
        path: the file.
        footer: pq.FileMetaData.
        leaf: the column of the pictures' bytes, such as image.bytes.
        paths: pa.ChunkedArray of large_string, or None without such a column.
        labels: codes (N,), −1 for a picture without a label, and the label of each code; None without such a column.
        label: the column of labels; None without one.
        note: a sentence on a column that cannot be a label, or an empty text.
    """

    path: Path
    footer: Any
    leaf: str
    paths: Any
    labels: tuple[Any, list[str]] | None
    label: str | None
    note: str


def open_parquet(name: str, paths: Sequence[Path]) -> Source:
    """Open Parquet files that hold the bytes of pictures.

    Pictures come from a struct column with a binary field `bytes`, else from a binary column. Of several such
    columns `image`, `img` or `bytes` is taken, in this order. Labels come from the column `label`, else from the
    only ClassLabel in the Hugging Face metadata, which also names its numbers. A row of null, of empty text, or of a
    number without a name has no label. Ids are the `path` fields of the struct when all are present and distinct, else
    the file's name and the row's number (train-00000-of-00002/00000123).

    Raises:
        InvalidSource: a file is not Parquet, is damaged or has no column of pictures, or all files are empty.

    Cost: reads and decodes whole row groups. A cache holds the last 256 MiB of them.
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

    cache = RowGroups(load, _CACHE_BYTES)

    def read(position: int) -> bytes:
        group = int(starts.searchsorted(position, "right")) - 1
        data: bytes | None = cache[group][position - int(starts[group])].as_py()
        if data is None:
            raise OSError("there are no bytes in its row")
        return data

    notes = list(dict.fromkeys(table.note for table in tables if table.note))
    captioned = any(_caption_column(table.footer.schema.to_arrow_schema()) for table in tables)
    captions = (lambda: [own for path in paths for own in _captions(path)]) if captioned else None
    return Source(
        name,
        _ids(tables),
        read,
        _merged(tables),
        starts[:-1].tolist(),
        notes=notes,
        captions=captions,
        place=lambda position: groups[int(starts.searchsorted(position, "right")) - 1][0],
        columns=_columns(tables, [(path, footer, number) for path, footer, _, number in groups], starts),
    )


class RowGroups:
    """An LRU cache of row groups. One thread loads a group while others wait for its result.

    Args:
        load: reads the column of pictures of a row group.
        most_bytes: the limit after each load. A single larger group stays cached.
    """

    def __init__(self, load: Callable[[int], Any], most_bytes: int) -> None:
        self._load = load
        self._most_bytes = most_bytes
        self._lock = Lock()
        # Ordered from the least to the most recently used group.
        self._columns: OrderedDict[int, Future[Any]] = OrderedDict()
        # Groups still being loaded have no size yet.
        self._sizes: dict[int, int] = {}
        self._total = 0

    def __getitem__(self, group: int) -> Any:
        with self._lock:
            column = self._columns.get(group)
            if waits := column is not None:
                self._columns.move_to_end(group)
            else:
                column = self._columns[group] = Future()
        if not waits:
            self._fill(group, column)
        return column.result()

    def _fill(self, group: int, column: "Future[Any]") -> None:
        try:
            loaded = self._load(group)
        # Any exception must reach the waiting threads; otherwise they block forever. The next reader loads again.
        except BaseException as error:
            with self._lock:
                del self._columns[group]
            column.set_exception(error)
            return
        with self._lock:
            self._sizes[group] = loaded.nbytes
            self._total += loaded.nbytes
            while self._total > self._most_bytes and len(self._sizes) > 1:
                oldest = next(one for one in self._columns if one in self._sizes and one != group)
                del self._columns[oldest]
                self._total -= self._sizes.pop(oldest)
        column.set_result(loaded)


def _read_table(path: Path) -> _Table:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            leaf = _picture_leaf(path, schema)
            features = _features(schema)
            label, note = _label_column(schema, features)
            picture_path = leaf.removesuffix(".bytes") + ".path"
            wanted = [picture_path] if _has_paths(schema, leaf) else []
            small = file.read(columns=wanted + ([label] if label else []), use_threads=False).flatten()
            # Full validation finds text that is not UTF-8.
            small.validate(full=True)
            counts = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
            if sum(counts) != file.metadata.num_rows or (small.num_columns and len(small) != file.metadata.num_rows):
                raise ValueError(f"expected {file.metadata.num_rows} rows, got {len(small)}")
            paths = small.column(picture_path).cast(pa.large_string()) if wanted else None
            labels = _codes(small.column(label), features.get(label)) if label else None
            return _Table(path, file.metadata, leaf, paths, labels, label, note)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InvalidSource(f"{path}: not a Parquet file that can be read: {_first_line(error)}") from error


def _columns(tables: Sequence[_Table], groups: Sequence[tuple[Path, Any, int]], starts: Any) -> Columns | None:
    """Return the columns that are neither pictures nor the labels.

    Args:
        tables: the files.
        groups: path, footer and number of each row group.
        starts: (len(groups) + 1,) the first position of each row group, and the number of rows.
    """
    left_out: list[str] = []
    types: dict[str, Any] = {}
    for table in tables:
        for field in table.footer.schema.to_arrow_schema():
            taken = table.leaf == field.name or table.leaf.startswith(f"{field.name}.")
            if taken or (table.label == field.name == "label"):
                continue
            if _holds_bytes(field.type) or types.setdefault(field.name, field.type) != field.type:
                left_out.append(field.name)
    schema = pa.schema([(name, type) for name, type in types.items() if name not in left_out])
    if not schema.names and not left_out:
        return None

    def read(positions: Sequence[int]) -> Any:
        if not schema.names:
            return schema.empty_table()
        places, parts = np.asarray(positions, np.int64), [schema.empty_table()]
        numbers = starts.searchsorted(places, "right") - 1
        for group in np.unique(numbers).tolist():
            path, footer, number = groups[group]
            rows = places[numbers == group] - starts[group]
            have = [name for name in schema.names if name in footer.schema.to_arrow_schema().names]
            try:
                with pq.ParquetFile(path, metadata=footer) as file:
                    part = file.read_row_group(number, columns=have, use_threads=False).take(rows)
                # Full validation finds text that is not UTF-8.
                part.validate(full=True)
            except (pa.ArrowException, OSError, ValueError, IndexError) as error:
                raise InvalidSource(f"{path}: its other columns cannot be read: {_first_line(error)}") from error
            missing = [name for name in schema.names if name not in have]
            for name in missing:
                part = part.append_column(name, pa.nulls(len(rows), schema.field(name).type))
            parts.append(part.select(schema.names).cast(schema))
        return pa.concat_tables(parts)

    return Columns(read, tuple(dict.fromkeys(left_out)))


def _holds_bytes(type: Any) -> bool:
    if pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type):
        return _holds_bytes(type.value_type)
    return _is_binary(type) or (pa.types.is_struct(type) and any(_holds_bytes(part.type) for part in type))


def _caption_column(schema: Any) -> str | None:
    """Return the column of captions, a text or a list of texts, or None."""
    for name in CAPTION_COLUMNS:
        if name in schema.names:
            type = schema.field(name).type
            if _is_text(type) or (
                (pa.types.is_list(type) or pa.types.is_large_list(type)) and _is_text(type.value_type)
            ):
                return name
    return None


def _captions(path: Path) -> list[list[str]]:
    """Return the captions of each row of a file."""
    try:
        with pq.ParquetFile(path) as file:
            column = _caption_column(file.schema_arrow)
            if column is None:
                return [[]] * file.metadata.num_rows
            table = file.read(columns=[column], use_threads=False)
            # Full validation finds text that is not UTF-8.
            table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InvalidSource(f"{path}: its captions cannot be read: {_first_line(error)}") from error
    values = table.column(column).to_pylist()
    # A list may hold nulls.
    return [[one for one in value if one] if isinstance(value, list) else texts_of(value) or [] for value in values]


def _picture_leaf(path: Path, schema: Any) -> str:
    """Return the column of pictures, such as image.bytes or image."""
    structs = [
        field.name
        for field in schema
        if pa.types.is_struct(field.type) and any(part.name == "bytes" and _is_binary(part.type) for part in field.type)
    ]
    for names, ending in ((structs, ".bytes"), ([field.name for field in schema if _is_binary(field.type)], "")):
        chosen = [name for name in _PICTURE_COLUMNS if name in names] or (names if len(names) == 1 else [])
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
    """Return the names of every ClassLabel in the metadata that Hugging Face's datasets writes into a file."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {
            name: [str(label) for label in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and name in schema.names
        }
    # The metadata is missing or not in the format of datasets.
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _label_column(schema: Any, features: dict[str, list[str]]) -> tuple[str | None, str]:
    """Return the column of labels, or None; and a sentence on a column that bears the name and cannot be it."""
    name = "label" if "label" in schema.names else next(iter(features)) if len(features) == 1 else None
    if name is None:
        return None, ""
    type = schema.field(name).type
    if pa.types.is_dictionary(type):
        type = type.value_type
    if pa.types.is_integer(type) or _is_text(type):
        return name, ""
    return None, f"the column {name} ({type}) is not taken for labels: expected whole numbers or text"


def _codes(column: Any, names: list[str] | None) -> tuple[Any, list[str]]:
    """Return the codes of a column, −1 for a row without a label, and the label of each code, empty for no label.

    Hugging Face writes −1 for an unknown label.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kinds = column.unique().drop_null()
    values = kinds.to_pylist()
    if names and pa.types.is_integer(column.type):
        values = [names[value] if 0 <= value < len(names) else "" for value in values]
    codes = pc.fill_null(pc.index_in(column, value_set=kinds), -1).to_numpy().astype(np.int64)
    return codes, [compose(str(value)) for value in values]


def _merged(tables: Sequence[_Table]) -> Labels | None:
    """Return the labels of all files under common codes: one label may have different codes in two files."""
    names = dict[str, int]()
    codes = []
    for table in tables:
        if table.labels is None:
            codes.append(np.full(table.footer.num_rows, -1))
            continue
        own_codes, own_names = table.labels
        # The number at the end is for codes of −1.
        shared = [names.setdefault(label, len(names)) if label else -1 for label in own_names] + [-1]
        codes.append(np.array(shared, np.int64)[own_codes])
    joined = np.concatenate(codes)
    return Labels(np.where(joined < 0, len(names), joined), tuple(names)) if names else None


def _ids(tables: Sequence[_Table]) -> Names:
    if all(table.paths is not None for table in tables):
        paths = pa.chunked_array([chunk for table in tables for chunk in table.paths.chunks], pa.large_string())
        named = not paths.null_count and pc.min(pc.binary_length(paths)).as_py() > 0
        paths = pc.utf8_normalize(paths, form="NFC") if named else paths
        if named and pc.count_distinct(paths).as_py() == len(paths):
            return Names(path.as_py() for path in paths)
    return Names(
        f"{compose(stem)}/{row:08d}"
        for stem, table in zip(stems([table.path for table in tables]), tables, strict=True)
        for row in range(table.footer.num_rows)
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
