"""`lookalike embed`: a source → a folder of Parquet parts; resumed after an interruption."""

import hashlib
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from service import FloatArray, PixelArray
from service.encoding.batcher import Batcher
from service.encoding.card import read_card
from service.encoding.encoder import Encoder
from service.encoding.images import decode_pixels
from service.errors import InvalidOutput, InvalidSource, LookalikeError, Outcome
from service.jobs.parquet_parts import FAILURES, META, part_path, read_facts, write_parquet
from service.jobs.reading import Tally, progress, read_ahead, use_good
from service.settings import Settings
from service.sources.source import Source

_PART_ROWS = 8192

_Embedded = tuple[int, Outcome[FloatArray]]


def embed_source(source: Source, model: Path, out: Path, settings: Settings) -> Tally:
    """Embed a source into a folder of Parquet parts that reads as one table: id, label, embedding.

    Each part is written whole or not at all. A job that was interrupted resumes after its last part when it is run
    again. Pictures that cannot be read or embedded are listed in _failures.parquet (id, error).

    Args:
        source: the pictures.
        model: the encoder's folder.
        out: the folder to write, or to resume in.
        settings: device and picture limits.

    Raises:
        InvalidModel: there is no such encoder, or it failed.
        InvalidOutput: `out` holds something else, or embeddings of another source or encoder.
    """
    encoder = Encoder(read_card(model), settings.device, settings.variant)
    ids = hashlib.sha256("\0".join(source.ids).encode(errors="surrogateescape")).hexdigest()
    identity = {"source": source.name, "ids": ids, "fingerprint": encoder.card.fingerprint}
    parts = _finished_parts(out, identity)
    known = sum(part["read"] for part in parts)
    bar = progress("embedding", len(source), known)
    with bar, closing(Batcher(encoder.lanes, encoder.max_batch)) as batcher:
        for start in range(known, len(source), _PART_ROWS):
            positions = range(start, min(start + _PART_ROWS, len(source)))
            outcomes = _embed(source, positions, encoder, batcher, settings, bar)
            failures = [(source.ids[p], str(error)) for p, error in outcomes if isinstance(error, LookalikeError)]
            part = identity | {"read": len(positions), "failures": failures, "variant": encoder.variant}
            write_parquet(_table(source, outcomes, encoder.dimension, part), part_path(out, start // _PART_ROWS))
            parts.append(part)
    failed = [failure for part in parts for failure in part["failures"]]
    write_parquet(pa.table({"id": [f[0] for f in failed], "error": [f[1] for f in failed]}), out / FAILURES)
    return Tally(len(source) - known, known, len(failed))


def _embed(
    source: Source, positions: range, encoder: Encoder, batcher: Batcher, settings: Settings, bar: "tqdm[Any]"
) -> list[_Embedded]:
    """Return the embedding (D,) of each position, or the error that its picture gave."""

    def read(position: int) -> PixelArray:
        return decode_pixels(source.entry(position).data, encoder.card.preprocessing, settings.limits)

    outcomes: list[_Embedded] = []
    for chunk in read_ahead(positions, read):
        outcomes += use_good(chunk, batcher.embed)
        bar.update(len(chunk))
    return outcomes


def _table(source: Source, outcomes: list[_Embedded], dimension: int, part: dict[str, Any]) -> pa.Table:
    """Return the pictures that have an embedding as a table, with the facts about the part in its schema."""
    good = [(position, row) for position, row in outcomes if not isinstance(row, LookalikeError)]
    rows = np.stack([row for _, row in good]) if good else np.empty((0, dimension), np.float32)
    columns = {
        "id": pa.array([source.ids[position] for position, _ in good], pa.string()),
        "label": pa.array([source.labels[p] if source.labels else None for p, _ in good], pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(rows.ravel(), dimension),
    }
    return pa.table(columns).replace_schema_metadata({META: json.dumps(part).encode()})


def _finished_parts(out: Path, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the facts that the parts in `out` hold about themselves, in order, up to the first missing part."""
    if out.exists() and not out.is_dir():
        raise InvalidOutput(f"{out}: is a file; --out names a folder of Parquet parts")
    strangers = [path.name for path in out.glob("*") if not path.name.endswith((".parquet", ".parquet.tmp"))]
    if strangers:
        raise InvalidOutput(f"{out}: is not empty and not ours (it has {strangers[0]}); choose another --out")
    parts: list[dict[str, Any]] = []
    while (path := part_path(out, len(parts))).exists():
        try:
            part = read_facts(path)
        except InvalidSource as error:
            raise InvalidOutput(f"{path}: not a part that we wrote; choose another --out") from error
        if part is None:
            raise InvalidOutput(f"{path}: not a part that we wrote; choose another --out")
        if {key: part.get(key) for key in identity} != identity:
            raise InvalidOutput(f"{path}: holds embeddings of another source or encoder; choose another --out")
        parts.append(part)
    return parts
