"""Items ↔ Parquet: export a store, and import an export, the parts of `lookalike embed` or other embeddings."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from service.errors import InvalidOutput, InvalidRequest, InvalidSource, LookalikeError, StoreMismatch, attempt
from service.gallery import Gallery
from service.jobs.parquet_parts import FAILURES, META, part_path, read_facts, write_parquet
from service.jobs.reading import Tally
from service.store import Item, NewItem

_ROWS_PER_PART = 8192
# Rows that contain image files are larger, so such a part has fewer.
_ROWS_PER_PICTURE_PART = 1024
_ROWS_PER_COMMIT = 1024
# Each column is read in pieces of this size, which bounds the memory.
_BUFFER_BYTES = 1 << 20


def export_store(gallery: Gallery, out: Path) -> int:
    """Write all items into a folder of Parquet parts, and return their number.

    Each row has `id`, `label` (if the metadata has a label that is text), `embedding`, `metadata` (JSON), `source`,
    `digest`, `variant`, `thumbnail` and `original`. The parts of `lookalike embed` have the first three columns, so
    programs that read those parts can read an export.

    Raises:
        InvalidOutput: `out` exists and is not empty, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidOutput(f"{out}: is there and not empty; name another --out")
    columns = {name: pa.string() for name in ("metadata", "source", "digest", "variant")}
    columns |= {name: pa.binary() for name in ("thumbnail", "original")}
    embedding = pa.list_(pa.float32(), gallery.encoder.dimension)
    schema = pa.schema({"id": pa.string(), "label": pa.string(), "embedding": embedding} | columns)
    facts = {"source": str(gallery.settings.store), "fingerprint": gallery.card.fingerprint, "failures": []}
    cursor: int | None = 0
    written = number = 0
    rows_a_part = _ROWS_PER_PICTURE_PART if gallery.settings.keep_originals else _ROWS_PER_PART
    while cursor is not None:
        items, cursor = gallery.store.scan(rows_a_part, cursor)
        rows = [row for row in (_row(gallery, item) for item in items) if row is not None]
        own = facts | {"read": len(rows), "variant": ", ".join(sorted({item.variant for item in items}))}
        meta = {META: json.dumps(own).encode()}
        write_parquet(pa.Table.from_pylist(rows, schema.with_metadata(meta)), part_path(out, number))
        written, number = written + len(rows), number + 1
    write_parquet(pa.table({"id": pa.array([], pa.string()), "error": pa.array([], pa.string())}), out / FAILURES)
    return written


def _row(gallery: Gallery, item: Item) -> dict[str, Any] | None:
    """Return an item as a row; None if it was removed meanwhile."""
    embedding = gallery.store.embedding(item.id)
    if embedding is None:
        return None
    label = item.metadata.get("label")
    return {
        "id": item.id,
        "label": label if isinstance(label, str) else None,
        "embedding": embedding,
        "metadata": json.dumps(item.metadata, ensure_ascii=False),
        "source": item.source,
        "digest": item.digest,
        "variant": item.variant,
        "thumbnail": gallery.store.thumbnail(item.id),
        "original": gallery.store.original(item.id),
    }


def import_items(source: Path, gallery: Gallery) -> Tally:
    """Add or replace the items of Parquet files.

    A row needs the columns `id` and `embedding`, a vector of any norm but 0. It may have any other column of an
    export. The `label` becomes the metadata of a row without `metadata`. If a file names no encoder, the caller
    vouches that the gallery's encoder made the embeddings.

    Args:
        source: a file, or a folder of files, from `export_store`, `lookalike embed` or elsewhere.
        gallery: gets the items.

    Returns:
        Numbers of rows: stored; already there with the same digest; bad, by their id, metadata or embedding.

    Raises:
        InvalidSource: a file is missing or damaged, lacks a column, or has embeddings of another dimension.
        StoreMismatch: another encoder made the embeddings.
    """
    paths = sorted(path for path in source.glob("*.parquet") if path.name != FAILURES) if source.is_dir() else [source]
    if not paths or not paths[0].exists():
        raise InvalidSource(f"{source}: expected a .parquet file or a folder of them")
    for path in paths:
        made_by = (read_facts(path) or {}).get("fingerprint", gallery.card.fingerprint)
        if made_by != gallery.card.fingerprint:
            raise StoreMismatch(
                f"{path}: embeddings of the encoder {str(made_by)[:12]}…, not of {gallery.card.name} "
                f"({gallery.card.fingerprint[:12]}…)"
            )
    done = known = bad = 0
    for path in paths:
        for rows in _chunks(path, gallery.encoder.dimension):
            outcomes = [attempt(_item, row, gallery) for row in rows]
            items = [item for item in outcomes if not isinstance(item, LookalikeError)]
            new = [item for item in items if not _has(gallery, item)]
            gallery.store.add(new)
            done, known, bad = done + len(new), known + len(items) - len(new), bad + len(rows) - len(items)
    return Tally(done, known, bad)


def _has(gallery: Gallery, item: NewItem) -> bool:
    """Whether the store has this item, with the same digest."""
    have = gallery.store.get(item.id)
    return have is not None and have.digest == item.digest


def _chunks(path: Path, dimension: int) -> Iterator[list[dict[str, Any]]]:
    try:
        # With Arrow's default settings the whole file ends up in memory.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
            have = set(file.schema_arrow.names)
            if not {"id", "embedding"} <= have:
                raise InvalidSource(f"{path}: expected the columns id and embedding, found {', '.join(sorted(have))}")
            wanted = ("id", "embedding", "label", "metadata", "source", "digest", "variant", "thumbnail", "original")
            for batch in file.iter_batches(_ROWS_PER_COMMIT, columns=[name for name in wanted if name in have]):
                rows = batch.to_pylist()
                for row in rows:
                    if not isinstance(row["embedding"], list) or len(row["embedding"]) != dimension:
                        raise InvalidSource(f"{path}: expected embeddings of {dimension} numbers, as the encoder gives")
                yield rows
    except (OSError, pa.ArrowException) as error:
        raise InvalidSource(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error


def _item(row: dict[str, Any], gallery: Gallery) -> NewItem:
    """Return a row as an item. Raises InvalidRequest for a bad row."""
    try:
        vector = np.asarray(row["embedding"], np.float64)
        length = np.linalg.norm(vector)
        metadata = json.loads(row["metadata"]) if row.get("metadata") else {}
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"a row cannot be read: {error}") from error
    if not isinstance(row["id"], str) or not isinstance(metadata, dict) or not np.isfinite(length) or not length:
        raise InvalidRequest("a row has no id, no object of metadata, or an embedding without direction")
    if not row.get("metadata") and row.get("label") is not None:
        metadata = {"label": str(row["label"])}
    embedding = np.asarray(vector / length, np.float32)
    return NewItem(
        id=gallery.check_id(row["id"]),
        metadata=gallery.check_metadata(metadata),
        source=row.get("source"),
        digest=row.get("digest") or hashlib.sha256(embedding.tobytes()).hexdigest(),
        variant=row.get("variant") or "fp32",
        embedding=embedding,
        thumbnail=row.get("thumbnail") or b"",
        original=row.get("original"),
    )
