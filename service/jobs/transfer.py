"""A store's items ↔ Parquet: what a store holds out and in, and embeddings that were made elsewhere in."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from service.errors import InvalidOutput, InvalidRequest, InvalidSource, LookalikeError, StoreMismatch
from service.gallery import Gallery
from service.jobs.parquet_parts import FAILURES, META, part_path, read_facts, write_parquet
from service.jobs.reading import Tally
from service.store import Item, NewItem

_ROWS_A_PART = 8192
_ROWS_A_PICTURE_PART = 1024  # with pictures in it
_ROWS_A_COMMIT = 1024
_BUFFER = 1 << 20  # bytes of a column read at a time


def export_store(gallery: Gallery, out: Path) -> int:
    """Write all items into a folder of Parquet parts; return how many.

    Each row has `id`, `label` (where the metadata has one that is text), `embedding`, `metadata` (JSON), `source`,
    `digest`, `variant`, `thumbnail` and `original`. What `lookalike embed` writes has the first three; whatever reads
    those reads these.

    Raises:
        InvalidOutput: `out` is there and not empty, or cannot be written.
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
    rows_a_part = _ROWS_A_PICTURE_PART if gallery.settings.keep_originals else _ROWS_A_PART
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
    """An item as a row; None where it was removed meanwhile."""
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
    """Add or replace the items of Parquet files: what `export_store` or `lookalike embed` wrote, or others.

    A row needs `id` and `embedding`, a list of numbers in any length but 0; of the other columns of an export it may
    have any. Without `metadata` its `label` becomes that. Where the file names no encoder, the caller answers for the
    embeddings being of the gallery's.

    Returns:
        Rows stored; rows that are there already, with the same digest; rows whose id, metadata or embedding cannot be.

    Raises:
        InvalidSource: no such file, damaged, or without these columns or that many numbers.
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
            items: list[NewItem] = []
            for row in rows:
                try:
                    item = _item(row, gallery)
                except LookalikeError:
                    bad += 1
                    continue
                have = gallery.store.get(item.id)
                if have is not None and have.digest == item.digest:
                    known += 1
                else:
                    items.append(item)
            gallery.store.add(items)
            done += len(items)
    return Tally(done, known, bad)


def _chunks(path: Path, dimension: int) -> Iterator[list[dict[str, Any]]]:
    try:
        # With Arrow's own settings it comes to hold the whole file.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as file:
            have = set(file.schema_arrow.names)
            if not {"id", "embedding"} <= have:
                raise InvalidSource(f"{path}: expected the columns id and embedding, found {', '.join(sorted(have))}")
            wanted = ("id", "embedding", "label", "metadata", "source", "digest", "variant", "thumbnail", "original")
            for batch in file.iter_batches(_ROWS_A_COMMIT, columns=[name for name in wanted if name in have]):
                rows = batch.to_pylist()
                for row in rows:
                    if not isinstance(row["embedding"], list) or len(row["embedding"]) != dimension:
                        raise InvalidSource(f"{path}: expected embeddings of {dimension} numbers, as the encoder gives")
                yield rows
    except (OSError, pa.ArrowException) as error:
        raise InvalidSource(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error


def _item(row: dict[str, Any], gallery: Gallery) -> NewItem:
    """A row as an item. Raises InvalidRequest for one that cannot be."""
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
