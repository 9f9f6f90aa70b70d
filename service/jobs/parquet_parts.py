"""Reading the folders of Parquet parts that `lookalike embed` writes: embeddings of one source by one encoder.

The parts are part-00000.parquet and so on, with the columns id, label, embedding and digest (sha256 of the image file)
among others. The metadata of each part's schema holds source and encoder as JSON, and in a finished job's last part
`"last": true`. Beside them lies _failures.jsonl if anything was left out. Earlier versions wrote _failures.parquet, and
no digests.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from service import FloatArray
from service.errors import InvalidOutput, InvalidSource
from service.files import replace_file
from service.sources.compact import Labels, Names
from service.sources.source import Source, slice_source

META = b"lookalike"
FAILURES = "_failures.jsonl"
EARLIER_FAILURES = "_failures.parquet"
_SLICED = re.compile(r"(.+)(\[[^\[\]]*\])")


@dataclass(frozen=True)
class Embeddings:
    """Embeddings that were read from a folder, without their pictures.

    Attributes:
        name: the folder and slice as the user wrote them.
        ids: of the N pictures.
        labels: of the N pictures, or None when none has one.
        rows: (N, D) float32, rows of L2 norm 1.
        fingerprint: of the encoder that made them.
        variant: of that encoder; several, separated by commas, if parts differ.
        origin: what the embeddings were made of, as its user wrote it.
        digests: sha256 (hex) of the N image files; None if a part does not have them.
    """

    name: str
    ids: Sequence[str]
    labels: Labels | None
    rows: FloatArray
    fingerprint: str
    variant: str
    origin: str = ""
    digests: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.ids)


def part_path(folder: Path, number: int) -> Path:
    """Return the path of a part; the first one has number 0."""
    return folder / f"part-{number:05d}.parquet"


def read_facts(part: Path) -> dict[str, Any] | None:
    """Return the facts in a part's metadata (source, fingerprint, …), or None if another program wrote the file.

    Raises:
        InvalidSource: the file cannot be read.
    """
    try:
        metadata = pq.read_schema(part).metadata or {}
        return dict(json.loads(metadata[META])) if META in metadata else None
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise _damaged(part, error) from error


def open_embeddings(name: str) -> Embeddings | None:
    """Read a folder that `lookalike embed` wrote; return None for any other folder or name.

    Args:
        name: the folder; a slice may follow, as in emb[:8000].

    Raises:
        InvalidSource: a part is missing, damaged, or of another encoder than the first; the job has not finished;
             there is no embedding, or the slice leaves none.
    """
    sliced = None if Path(name).exists() else _SLICED.fullmatch(name)
    folder, slicing = (Path(sliced[1]), sliced[2]) if sliced else (Path(name), "")
    parts = sorted(folder.glob("part-*.parquet"))
    if not parts or read_facts(parts[0]) is None:
        return None
    for number, part in enumerate(parts):
        if part != part_path(folder, number):
            raise InvalidSource(f"{name}: expected {part_path(folder, number).name} next, found {part.name}")
    facts = [read_facts(part) or {} for part in parts]
    if not facts[-1].get("last") and not (folder / EARLIER_FAILURES).exists():
        raise InvalidSource(f"{name}: is not finished, its last part is not there; run its `lookalike embed` again")
    for part, own in zip(parts, facts, strict=True):
        if own.get("fingerprint") != facts[0].get("fingerprint"):
            raise InvalidSource(f"{part}: holds embeddings of another encoder than {parts[0].name}")
    tables = [_read_part(part) for part in parts]
    ids = Names(id for table in tables for id in table[0])
    labels = Labels.of(label for table in tables for label in table[1])
    rows = np.concatenate([table[2] for table in tables])
    if not len(ids):
        raise InvalidSource(f"{name}: holds no embedding")
    known = all(table[3] is not None for table in tables)
    digests = Names(digest for table in tables for digest in table[3] or ()) if known else None
    kept = slice_source(Source(name, ids, lambda _: b"", labels if labels.used() else None), slicing)
    start = ids.index(kept.ids[0]) if slicing else 0
    return Embeddings(
        name,
        kept.ids,
        kept.labels,
        rows[start : start + len(kept)],
        str(facts[0].get("fingerprint")),
        ", ".join(sorted({str(own.get("variant", "fp32")) for own in facts})),
        str(facts[0].get("source")),
        digests[start : start + len(kept)] if digests is not None else None,
    )


def _read_part(part: Path) -> tuple[list[str], list[str | None], FloatArray, list[str] | None]:
    """Return a part's ids, labels (None for a picture without one), embeddings (N, D), and digests or None."""
    try:
        with pq.ParquetFile(part) as file:
            columns = [name for name in ("id", "label", "embedding", "digest") if name in file.schema_arrow.names]
            table = file.read(columns, use_threads=False).combine_chunks()
        table.validate(full=True)
        ids, labels, vectors = (table[name] for name in ("id", "label", "embedding"))
        kind = vectors.type
        floats = pa.types.is_fixed_size_list(kind) and kind.value_type in (pa.float32(), pa.float16())
        if not floats or ids.null_count:
            raise ValueError(f"expected an id and a list of float32 in each row, got {ids.type} and {kind}")
        rows = np.asarray(vectors.combine_chunks().flatten(), np.float32).reshape(-1, kind.list_size)
        # Each norm is compared with `<`, because NaN must fail the check.
        if len(rows) != len(ids) or not np.all(np.abs(np.linalg.norm(rows, axis=1) - 1) < 1e-3):
            raise ValueError("expected embeddings of length 1 in every row")
        if kind.value_type == pa.float16():
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        digests = table["digest"].to_pylist() if "digest" in columns and not table["digest"].null_count else None
        return ids.to_pylist(), labels.to_pylist(), rows, digests
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise _damaged(part, error) from error


def _damaged(part: Path, error: Exception) -> InvalidSource:
    return InvalidSource(f"{part}: damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}")


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a table as a Parquet file, whole or not at all; its folder is made if it is missing.

    Raises:
        InvalidOutput: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as temporary:
            # Only texts repeat; a dictionary of embeddings would be as large as they are.
            texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
            pq.write_table(table, temporary, use_dictionary=texts)
    except OSError as error:
        raise InvalidOutput(f"{path}: cannot be written: {error.strerror or error}") from error
