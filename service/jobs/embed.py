"""`lookalike embed`: a source → a folder of Parquet parts; resumed after an interruption."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from service.encoding.card import read_card
from service.encoding.encoder import Encoder
from service.encoding.images import decode_pixels
from service.errors import InvalidOutput, InvalidSource
from service.jobs.parquet_parts import FAILURES, META, part_path, read_facts, write_parquet
from service.jobs.reading import Tally, progress, read_ahead, use_good
from service.settings import Settings
from service.sources.source import Source

_PART_ROWS = 8192


def embed_source(source: Source, model: Path, out: Path, settings: Settings) -> Tally:
    """Embed a source into a folder of Parquet parts that reads as one table: id, label, embedding.

    Parts are written whole or not at all. A job that was interrupted goes on after its last part when it
    is run again; pictures that cannot be read end up in _failures.parquet (id, error).

    Args:
        source: the pictures.
        model: the encoder's folder.
        out: the folder to make or to go on with.
        settings: device and picture limits.

    Raises:
        InvalidModel: no such encoder.
        InvalidOutput: `out` holds something else, or embeddings of another source or encoder.
    """
    encoder = Encoder(read_card(model), settings.device, settings.variant)
    ids = hashlib.sha256("\0".join(source.ids).encode(errors="surrogateescape")).hexdigest()
    identity = {"source": source.name, "ids": ids, "fingerprint": encoder.card.fingerprint}
    parts = _finished_parts(out, identity)
    known = sum(part["read"] for part in parts)
    schema = pa.schema(
        [("id", pa.string()), ("label", pa.string()), ("embedding", pa.list_(pa.float32(), encoder.dimension))]
    )
    preprocessing = encoder.card.preprocessing

    def read(position: int) -> Any:
        return decode_pixels(source.entry(position).data, preprocessing, settings.limits)

    def embed_part(positions: range, bar: "tqdm[Any]") -> tuple[pa.Table, dict[str, Any]]:
        kept: list[int] = []
        columns: list[pa.Array] = []
        failures: list[tuple[str, str]] = []

        def embed(good: list[tuple[int, Any]]) -> None:
            embeddings = encoder.encode([pixels for _, pixels in good])
            columns.append(pa.FixedSizeListArray.from_arrays(embeddings.ravel(), encoder.dimension))
            kept.extend(position for position, _ in good)

        for chunk in read_ahead(positions, read):
            failures += [(source.ids[position], str(error)) for position, error in use_good(chunk, embed)]
            bar.update(len(chunk))
        part = {"read": len(positions), "failures": failures, "variant": encoder.variant}
        table = pa.table(
            {
                "id": pa.array([source.ids[position] for position in kept], pa.string()),
                "label": pa.array([source.labels[p] if source.labels else None for p in kept], pa.string()),
                "embedding": pa.chunked_array(columns, schema.field("embedding").type),
            },
            schema=schema.with_metadata({META: json.dumps(identity | part).encode()}),
        )
        return table, part

    with progress("embedding", len(source), known) as bar:
        for start in range(known, len(source), _PART_ROWS):
            table, part = embed_part(range(start, min(start + _PART_ROWS, len(source))), bar)
            write_parquet(table, part_path(out, start // _PART_ROWS))
            parts.append(part)
    failed = [failure for part in parts for failure in part["failures"]]
    write_parquet(pa.table({"id": [f[0] for f in failed], "error": [f[1] for f in failed]}), out / FAILURES)
    return Tally(len(source) - known, known, len(failed))


def _finished_parts(out: Path, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """What the parts in `out` say of themselves, in order, up to the first that is missing."""
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
