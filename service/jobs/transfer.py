"""Items ↔ Parquet: export a store, and import an export, the parts of `lookalike embed` or other embeddings."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from service import FloatArray
from service.account import LEFT_OUT, Account, Failure
from service.errors import InvalidOutput, InvalidSource, LookalikeError, StoreMismatch, attempt
from service.gallery import Gallery
from service.jobs.parquet_parts import EARLIER_FAILURES, META, part_path, read_facts, write_parquet
from service.rows import item_of_row
from service.store import Item, NewItem

_ROWS_PER_PART = 8192
# Rows that contain image files are larger, so such a part has fewer.
_ROWS_PER_PICTURE_PART = 1024
_ROWS_PER_COMMIT = 1024
# Each column is read in pieces of this size, which bounds the memory.
_BUFFER_BYTES = 1 << 20
# The columns of an export beside id, label and embedding.
_COLUMNS = (
    {name: pa.string() for name in ("metadata", "source", "digest", "variant", "format", "date")}
    | {name: pa.binary() for name in ("thumbnail", "original")}
    | {name: pa.int64() for name in ("width", "height", "size_bytes", "mtime_ns")}
)


def export_store(gallery: Gallery, out: Path) -> tuple[int, list[Failure]]:
    """Write all items into a folder of Parquet parts.

    Each row has `id`, `label` (if the metadata has a label that is text), `embedding`, `metadata` (JSON), `source`,
    `digest`, `variant`, `thumbnail` and `original`. The parts of `lookalike embed` have the first three and `digest`,
    so programs that read those parts can read an export.

    Returns:
        The number of items, and those whose `original` is missing because its bytes are not where they were.

    Raises:
        InvalidOutput: `out` exists and is not empty, or cannot be written.
    """
    failures: list[Failure] = []
    facts = {"source": str(gallery.settings.store), "fingerprint": gallery.card.fingerprint}
    rows_a_part = _ROWS_PER_PICTURE_PART if gallery.settings.keep_originals else _ROWS_PER_PART

    def parts() -> Iterator[tuple[list[dict[str, Any]], bool]]:
        cursor: int | None = 0
        while cursor is not None:
            items, cursor = gallery.store.scan(rows_a_part, cursor)
            rows = [row for row in (_row(gallery, item, failures) for item in items) if row is not None]
            yield rows, cursor is None

    return write_export(out, gallery.encoder.dimension, facts, parts()), failures


def write_export(
    out: Path, dimension: int, facts: dict[str, Any], parts: Iterator[tuple[list[dict[str, Any]], bool]]
) -> int:
    """Write rows into a folder of Parquet parts, and return their number.

    Args:
        out: the folder.
        dimension: D of the embeddings.
        facts: of all parts: source and fingerprint.
        parts: the rows of each part, and whether it is the last one.

    Raises:
        InvalidOutput: `out` exists and is not empty, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidOutput(f"{out}: is there and not empty; name another --out")
    schema = pa.schema(
        {"id": pa.string(), "label": pa.string(), "embedding": pa.list_(pa.float32(), dimension)} | _COLUMNS
    )
    written = 0
    for number, (rows, last) in enumerate(parts):
        variants = ", ".join(sorted({row["variant"] for row in rows}))
        own = facts | {"failures": [], "read": len(rows), "variant": variants, "last": last}
        meta = {META: json.dumps(own).encode()}
        write_parquet(pa.Table.from_pylist(rows, schema.with_metadata(meta)), part_path(out, number))
        written += len(rows)
    return written


def _row(gallery: Gallery, item: Item, failures: list[Failure]) -> dict[str, Any] | None:
    """Return an item as a row; None if it was removed meanwhile. A picture that cannot be read is a failure."""
    embedding, thumbnail = gallery.store.embedding(item.id), gallery.store.thumbnail(item.id)
    if embedding is None:
        return None
    original = attempt(gallery.original, item.id) if thumbnail else None
    if isinstance(original, LookalikeError):
        if gallery.store.get(item.id) is None:
            return None
        failures.append(Failure.of(item.id, original))
        original = None
    return export_row(item, embedding, thumbnail, original)


def export_row(item: Item, embedding: FloatArray, thumbnail: bytes | None, original: bytes | None) -> dict[str, Any]:
    """Return an item as a row of an export."""
    label = item.metadata.get("label")
    return {
        "id": item.id,
        "label": label if isinstance(label, str) else None,
        "embedding": embedding,
        "metadata": json.dumps(item.metadata, ensure_ascii=False),
        "source": item.source,
        "digest": item.digest,
        "variant": item.variant,
        "thumbnail": thumbnail,
        "original": original,
        **item.facts._asdict(),
        "mtime_ns": item.mtime_ns,
    }


def import_items(source: Path, gallery: Gallery) -> Account:
    """Add or replace the items of Parquet files.

    A row needs the columns `id`, a text or a whole number, which is taken as text, and `embedding`, a vector of any
    norm but 0. It may have any other column of an export. The `label` becomes the metadata of a row without `metadata`;
    an item that is replaced keeps its other metadata then. If a file names no encoder, the caller vouches that the
    gallery's encoder made the embeddings.

    Args:
        source: a file, or a folder of files, from `export_store`, `lookalike embed` or elsewhere.
        gallery: gets the items.

    Returns:
        What became of the rows. One that is there already has the same digest; one that fails has an id, metadata or
        an embedding that cannot be, and is named by its id, or by its number in the file.

    Raises:
        InvalidSource: a file is missing or damaged, lacks a column, or has embeddings of another dimension.
        StoreMismatch: another encoder made the embeddings.
    """
    paths = parquet_files(source, gallery.card.fingerprint, gallery.card.name)
    account = Account()
    for path in paths:
        row = 0
        for rows in chunks_of(path, gallery.encoder.dimension):
            outcomes = [attempt(item_of_row, content, gallery) for content in rows]
            for number, (content, outcome) in enumerate(zip(rows, outcomes, strict=True), row):
                if isinstance(outcome, LookalikeError):
                    name = f"{path.name}, row {number}" if content["id"] is None else str(content["id"])
                    account.failures.append(Failure.of(name, outcome))
            items = [item for item in outcomes if not isinstance(item, LookalikeError)]
            _store(items, gallery, account)
            row += len(rows)
    account.save(gallery.settings.folder / LEFT_OUT)
    return account


def parquet_files(source: Path, fingerprint: str, name: str) -> list[Path]:
    """Return the files of a source of Parquet.

    Args:
        source: a file, or a folder of files.
        fingerprint, name: of the encoder that must have made the embeddings, if a file names one.

    Raises:
        InvalidSource: there is none.
        StoreMismatch: another encoder made them.
    """
    paths = [source]
    if source.is_dir():
        paths = sorted(path for path in source.glob("*.parquet") if path.name != EARLIER_FAILURES)
    if not paths or not paths[0].exists():
        raise InvalidSource(f"{source}: expected a .parquet file or a folder of them")
    for path in paths:
        made_by = (read_facts(path) or {}).get("fingerprint", fingerprint)
        if made_by != fingerprint:
            raise StoreMismatch(
                f"{path}: embeddings of the encoder {str(made_by)[:12]}…, not of {name} ({fingerprint[:12]}…)"
            )
    return paths


def _store(items: list[NewItem], gallery: Gallery, account: Account) -> None:
    """Store a chunk's items, and count those that are new, that replace others, and that are there already."""
    digests: dict[str, str] = {}
    fresh = []
    for item in items:
        if item.id not in digests and (have := gallery.store.get(item.id)) is not None:
            digests[item.id] = have.digest
        # An id that the file has twice replaces itself.
        if digests.get(item.id) == item.digest:
            account.known += 1
        else:
            digests[item.id] = item.digest
            fresh.append(item)
    new = gallery.store.add(fresh)
    account.added += sum(new)
    account.replaced += len(new) - sum(new)


def chunks_of(path: Path, dimension: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of a file in chunks. Raises InvalidSource: it is damaged, or has embeddings of another length."""
    try:
        # With Arrow's default settings the whole file ends up in memory.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            have = set(file.schema_arrow.names)
            if not {"id", "embedding"} <= have:
                raise InvalidSource(f"{path}: expected the columns id and embedding, found {', '.join(sorted(have))}")
            wanted = ("id", "embedding", "label", *_COLUMNS)
            lengths = _lengths(file.schema_arrow.field("embedding").type, path)
            for batch in file.iter_batches(_ROWS_PER_COMMIT, columns=[name for name in wanted if name in have]):
                rows = batch.to_pylist()
                lengths |= {len(row["embedding"]) for row in rows if isinstance(row["embedding"], list)}
                # Embeddings of another length alone are another encoder's; a row that differs from others is a bad row.
                if lengths and dimension not in lengths:
                    raise InvalidSource(f"{path}: expected embeddings of {dimension} numbers, as the encoder gives")
                yield rows
    except (OSError, pa.ArrowException) as error:
        raise InvalidSource(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error


def _lengths(type: Any, path: Path) -> set[int]:
    """Return the length of all embeddings, if a column's type says it. Raises InvalidSource for another column."""
    if pa.types.is_fixed_size_list(type):
        return {type.list_size}
    if pa.types.is_list(type) or pa.types.is_large_list(type):
        return set()
    raise InvalidSource(f"{path}: expected a list of numbers in the column embedding, found {type}")
