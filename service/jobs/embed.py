"""`lookalike embed`: a source → a folder of Parquet parts; resumed after an interruption."""

import hashlib
import json
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from service import FloatArray, PixelArray
from service.account import Account, Failure, printable
from service.encoding.batcher import Batcher
from service.encoding.card import read_card
from service.encoding.encoder import Encoder
from service.encoding.images import decode_pixels
from service.errors import InvalidOutput, InvalidRequest, InvalidSource, LookalikeError, Outcome
from service.jobs.parquet_parts import FAILURES, META, part_path, read_facts, write_parquet
from service.jobs.reading import progress, read_ahead, use_good
from service.settings import Settings
from service.sources.source import Source

_PART_ROWS = 8192


class _Embedded(NamedTuple):
    """The outcome of one position: the embedding (D,) of its picture or an error, and the digest of its bytes."""

    position: int
    row: Outcome[FloatArray]
    digest: str | None


def embed_source(source: Source, model: Path, out: Path, settings: Settings) -> Account:
    """Embed a source into a folder of Parquet parts that reads as one table: id, label, embedding, digest.

    Each part is written whole or not at all. A job that was interrupted resumes after its last part when it is run
    again. What was left out, such as pictures that cannot be read, is listed in _failures.jsonl if there is any.

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
    earlier, known = list(parts), sum(part["read"] for part in parts)
    # A folder that an earlier version began has no digests in any part.
    digests = not parts or "digest" in parts[0].get("columns", ())
    bar = progress("embedding", len(source), known)
    with bar, closing(Batcher(encoder.lanes, encoder.max_batch)) as batcher:
        for start in range(known, len(source), _PART_ROWS):
            positions = range(start, min(start + _PART_ROWS, len(source)))
            outcomes = _embed(source, positions, encoder, batcher, settings, bar)
            failures = [
                Failure.of(printable(source.ids[one.position]), one.row)
                for one in outcomes
                if isinstance(one.row, LookalikeError)
            ]
            part = identity | {"read": len(positions), "failures": failures, "variant": encoder.variant}
            part |= {"last": positions.stop == len(source), "columns": ["digest"] if digests else []}
            write_parquet(_table(source, outcomes, encoder.dimension, part), part_path(out, start // _PART_ROWS))
            parts.append(part)
    account = Account.of(source)
    account.failures = [Failure(*failure) for part in parts for failure in part["failures"]]
    account.known = sum(part["read"] - len(part["failures"]) for part in earlier)
    account.added = len(source) - account.known - account.bad
    account.save(out / FAILURES)
    return account


def _embed(
    source: Source,
    positions: range,
    encoder: Encoder,
    batcher: Batcher[PixelArray],
    settings: Settings,
    bar: "tqdm[Any]",
) -> list[_Embedded]:
    """Return the embedding (D,) of each position, or the error that its picture gave."""
    digests: dict[int, str] = {}

    def read(position: int) -> PixelArray:
        data = source.entry(position).data
        # os.fsdecode turns bytes that are not UTF-8 into surrogates, which Parquet cannot hold.
        if not source.ids[position].isascii() and any("\ud800" <= one <= "\udfff" for one in source.ids[position]):
            raise InvalidRequest("its name is not UTF-8; rename it")
        digests[position] = hashlib.sha256(data).hexdigest()
        return decode_pixels(data, encoder.card.preprocessing, settings.limits)

    outcomes: list[_Embedded] = []
    for chunk in read_ahead(positions, read):
        outcomes += (_Embedded(at, row, digests.get(at)) for at, row in use_good(chunk, batcher.embed))
        bar.update(len(chunk))
    return outcomes


def _table(source: Source, outcomes: list[_Embedded], dimension: int, part: dict[str, Any]) -> pa.Table:
    """Return the pictures that have an embedding as a table, with the facts about the part in its schema."""
    good = [(at, row, digest) for at, row, digest in outcomes if not isinstance(row, LookalikeError)]
    rows = np.stack([row for _, row, _ in good]) if good else np.empty((0, dimension), np.float32)
    columns = {
        "id": pa.array([source.ids[at] for at, _, _ in good], pa.string()),
        "label": pa.array([source.labels[at] if source.labels else None for at, _, _ in good], pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(rows.ravel(), dimension),
    }
    if part["columns"]:
        columns["digest"] = pa.array([digest for _, _, digest in good], pa.string())
    return pa.table(columns).replace_schema_metadata({META: json.dumps(part).encode()})


def _finished_parts(out: Path, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the facts that the parts in `out` hold about themselves, in order, up to the first missing part."""
    if out.exists() and not out.is_dir():
        raise InvalidOutput(f"{out}: is a file; --out names a folder of Parquet parts")
    ours = (".parquet", ".parquet.tmp", FAILURES, f"{FAILURES}.tmp")
    strangers = [path.name for path in out.glob("*") if not path.name.endswith(ours)]
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
