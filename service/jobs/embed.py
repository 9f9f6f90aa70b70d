"""`lookalike embed`: a source → a folder of Parquet parts or NumPy files, kept in step with the source.

An engine turns positions of the source into rows: `embedded` in this process, ray_embed.py on a cluster.
"""

import hashlib
import json
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from service import FloatArray, PixelArray
from service.account import Account, Failure, printable
from service.encoding.apart import STORED_SIZE
from service.encoding.batcher import Batcher
from service.encoding.card import Preprocessing, read_card
from service.encoding.encoder import Encoder
from service.encoding.images import decode, to_pixels
from service.encoding.limits import Limits
from service.errors import InvalidOutput, InvalidRequest, LookalikeError, Outcome
from service.jobs.description import Description
from service.jobs.keeping import MEASURED, Stamp, keep
from service.jobs.parquet_parts import META
from service.jobs.part_folder import EMBEDDING, PartFolder
from service.jobs.reading import progress, read_ahead, use_good
from service.jobs.remote_parts import part_folder
from service.settings import Settings
from service.sources.source import Source

# A part is written when it has so many rows or is so old, whichever comes first: a kill costs a minute at most.
_PART_ROWS = 8192
_PART_S = 60.0

Dtype = Literal["float32", "float16"]


class Measured(NamedTuple):
    """The values of a picture in the columns MEASURED."""

    width: int
    height: int
    digest: str
    size_bytes: int
    modified: int | None


class _Embedded(NamedTuple):
    """The position of a picture in the source, its embedding (D,), and what was measured of it."""

    position: int
    row: FloatArray
    measured: Measured


Embeddings = Sequence[tuple[int, Outcome[tuple[FloatArray, Measured]]]]
"""What became of the pictures at these positions: an embedding (D,) and the measures, or an error."""
Engine = Callable[[Source, Encoder, Settings, Sequence[int]], Generator[Embeddings]]
"""Embeds the pictures of a source at ascending positions, and yields them in order."""


def embedded(source: Source, encoder: Encoder, settings: Settings, todo: Sequence[int]) -> Generator[Embeddings]:
    """Embed in this process: threads read and decode while the encoder runs."""
    reader = _Reader(source, encoder.card.preprocessing, settings.limits)
    with (
        closing(Batcher(encoder.lanes, encoder.max_batch)) as batcher,
        closing(read_ahead(todo, reader.read)) as chunks,
    ):

        def embed(read: Sequence[tuple[PixelArray, Measured]]) -> list[Outcome[tuple[FloatArray, Measured]]]:
            rows = batcher.embed([pixels for pixels, _ in read])
            return [
                row if isinstance(row, LookalikeError) else (row, measured)
                for row, (_, measured) in zip(rows, read, strict=True)
            ]

        for chunk in chunks:
            yield use_good(chunk, embed)


def embed_source(
    source: Source,
    model: Path,
    out: Path | str,
    settings: Settings,
    dtype: Dtype = "float32",
    npy: bool = False,
    engine: Engine = embedded,
) -> Account:
    """Embed a source into a folder of parts that reads as one table.

    The columns are id, label, what else the source tells (`Description`), embedding, width, height, digest, size_bytes
    and modified. Each part is written whole or not at all. Run again, also after an interruption, it embeds what is new
    or has changed, and drops what the source has no longer. What was left out, such as pictures that cannot be read, is
    listed in _failures.jsonl if there is any.

    Args:
        source: the pictures.
        model: the encoder's folder.
        out: the folder to write, or to bring in step; or a URL that fsspec writes, such as s3://bucket/embeddings.
        settings: device and picture limits.
        dtype: of the embeddings that are written.
        npy: write the layout of clip-retrieval in place of Parquet parts.
        engine: where the pictures are embedded.

    Raises:
        InvalidModel: there is no such encoder, or it failed.
        InvalidOutput: `out` holds something else, or embeddings of another source, encoder or dtype.
        InvalidSource: the source's other columns cannot be read.
        KeyboardInterrupt: after all that is embedded was written.
    """
    encoder = Encoder(read_card(model), settings.device, settings.variant, runtime=settings.runtime)
    description = Description(source, [EMBEDDING, *MEASURED.names], npy)
    account = Account.of(source)
    account.notes += description.notes
    embedding = pa.field(EMBEDDING, pa.list_(getattr(pa, dtype)(), encoder.dimension))
    schema = pa.schema([*description.schema, embedding, *MEASURED])
    with part_folder(out, npy) as parts:
        _check(parts, encoder, embedding.type)
        kept = keep(source, parts, schema, description)
        facts = {"source": source.name, "fingerprint": encoder.card.fingerprint, "variant": encoder.variant}
        job = _Embedding(source, _Writer(parts, schema, description, facts), kept.changed)
        try:
            job.run(kept.todo, engine(source, encoder, settings, kept.todo))
        finally:
            account.failures = job.failures
            account.known = len(source) - len(kept.todo)
            account.added, account.replaced = job.added, job.replaced
            parts.list_left_out(account)
        if kept.removed:
            account.notes.append(f"{kept.removed} pictures that {source.name} has no longer have left {out}")
    return account


def _check(parts: PartFolder, encoder: Encoder, type: Any) -> None:
    """Refuse parts of another encoder or dtype."""
    for number in range(parts.count):
        if parts.facts(number).get("fingerprint") != encoder.card.fingerprint:
            raise InvalidOutput(f"{parts.folder}: holds embeddings of another encoder; choose another --out")
        if parts.is_whole(number) and (have := parts.type(number)) != type:
            raise InvalidOutput(f"{parts.folder}: expected embeddings of {type}, found {have}; choose another --out")


class _Writer:
    """Collects rows, and writes them as parts.

    The rows that wait and the number of their part are one value: Ctrl-C may come between any two steps, and rows that
    are written twice have to be written into the same part.
    """

    def __init__(self, parts: PartFolder, schema: Any, description: Description, facts: dict[str, Any]) -> None:
        self._parts, self._schema, self._description, self._facts = parts, schema, description, facts
        self._waiting: tuple[int, list[_Embedded]] = (parts.count, [])
        self._since = time.monotonic()

    def add(self, rows: Sequence[_Embedded]) -> None:
        """Take rows, and write a part if it is full or a minute old."""
        self._waiting[1].extend(rows)
        while len(self._waiting[1]) > _PART_ROWS:
            self._write(_PART_ROWS, last=False)
        if time.monotonic() - self._since >= _PART_S:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait."""
        if self._waiting[1]:
            self._write(len(self._waiting[1]), last=False)

    def finish(self) -> None:
        """Write the rows that wait, and that they are the last."""
        if self._waiting[1] or not self._parts.count:
            self._write(len(self._waiting[1]), last=True)
        elif not self._parts.facts(self._parts.count - 1).get("last"):
            self._parts.mark_finished()

    def _write(self, count: int, last: bool) -> None:
        number, waiting = self._waiting
        rows = waiting[:count]
        columns = self._description.all([row.position for row in rows])
        width = self._schema.field(EMBEDDING).type.list_size
        matrix = np.stack([row.row for row in rows]) if rows else np.empty((0, width), np.float32)
        matrix = matrix.astype(self._schema.field(EMBEDDING).type.value_type.to_pandas_dtype())
        measured = {
            field.name: pa.array([getattr(row.measured, field.name) for row in rows], field.type) for field in MEASURED
        }
        measured[EMBEDDING] = pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), width)
        arrays = [measured[name] if name in measured else columns[name] for name in self._schema.names]
        meta = {META: json.dumps(self._facts | {"last": last}).encode()}
        self._parts.write(number, pa.table(arrays, schema=self._schema.with_metadata(meta)))
        self._waiting = (number + 1, waiting[count:])
        self._since = time.monotonic()


class _Embedding:
    """Takes embedded pictures from an engine, and gives them to the writer.

    Attributes:
        failures: the pictures that could not be read or embedded.
        added, replaced: how many were embedded, those of `changed` apart.
    """

    def __init__(self, source: Source, writer: _Writer, changed: frozenset[int]) -> None:
        self._source, self._writer, self._changed = source, writer, changed
        self.failures: list[Failure] = []
        self.added = self.replaced = 0

    def run(self, todo: Sequence[int], chunks: Generator[Embeddings]) -> None:
        """Take the pictures at ascending positions; what is embedded is written, whatever ends it."""
        with progress("embedding", len(self._source), len(self._source) - len(todo)) as bar:
            try:
                with closing(chunks):
                    for chunk in chunks:
                        self._writer.add(self._rows(chunk))
                        bar.update(len(chunk))
            except BaseException:
                self._writer.flush()
                raise
            self._writer.finish()

    def _rows(self, chunk: Embeddings) -> list[_Embedded]:
        """Return the rows of a chunk's good pictures, and note the others."""
        rows = []
        for position, one in chunk:
            if isinstance(one, LookalikeError):
                self.failures.append(Failure.of(printable(self._source.ids[position]), one))
            else:
                rows.append(_Embedded(position, *one))
        replaced = sum(row.position in self._changed for row in rows)
        self.replaced += replaced
        self.added += len(rows) - replaced
        return rows


class _Reader(NamedTuple):
    source: Source
    preprocessing: Preprocessing
    limits: Limits

    def read(self, position: int) -> tuple[PixelArray, Measured]:
        """Return the pixels (height, width, 3) of a picture, and its measures."""
        source, preprocessing = self.source, self.preprocessing
        stamp = Stamp.of(source, position)
        data = source.entry(position).data
        # os.fsdecode turns bytes that are not UTF-8 into surrogates, which Parquet cannot hold.
        if not source.ids[position].isascii() and any("\ud800" <= one <= "\udfff" for one in source.ids[position]):
            raise InvalidRequest("its name is not UTF-8; rename it")
        picture = decode(data, preprocessing.decoded_side, self.limits)
        width, height = picture.info[STORED_SIZE]
        measured = Measured(width, height, hashlib.sha256(data).hexdigest(), len(data), stamp.modified)
        return to_pixels(picture, preprocessing), measured
