"""Whole sources at a time: source → embeddings.parquet, resumable; source → store."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from service.card import read_card
from service.embeddings import FAILURES, META, part_path, read_facts
from service.encoder import Encoder
from service.errors import InvalidOutput, InvalidRequest, InvalidSource, LookalikeError, NoEmbedding
from service.gallery import Gallery
from service.images import decode_pixels
from service.settings import Settings
from service.sources import Source
from service.store.catalog import Catalog
from service.store.embedded import EmbeddedStore
from service.store.folder import current, following, publish

_CHUNK = 64
_PART_ROWS = 8192

T = TypeVar("T")


class Tally(NamedTuple):
    """What a job came to: pictures done, pictures that were there already, pictures that could not be read."""

    done: int
    known: int
    bad: int


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


def index_source(source: Source, gallery: Gallery) -> Tally:
    """Add a source's pictures to a store; those that are there with the same bytes are passed over.

    The label, where the source has one, becomes the item's metadata. Every chunk is one commit, so an
    interrupted job goes on where it stopped when it is run again.
    """
    known, bad = 0, 0

    def read(position: int) -> Any:
        entry = source.entry(position)
        id = gallery.check_id(entry.id)
        item = gallery.store.get(id)
        if item is not None and item.digest == hashlib.sha256(entry.data).hexdigest():
            return None
        metadata = {} if entry.label is None else {"label": entry.label}
        return id, gallery.read(entry.data), metadata, f"{source.name}/{entry.id}"

    def add(good: list[tuple[int, Any]]) -> None:
        gallery.add_read([picture for _, picture in good])

    with progress("indexing", len(source), 0) as bar:
        for chunk in read_ahead(range(len(source)), read):
            fresh = [(position, result) for position, result in chunk if result is not None]
            known += len(chunk) - len(fresh)
            for position, error in use_good(fresh, add):
                bad += 1
                bar.write(f"skipped {source.ids[position]}: {error}", file=sys.stderr)
            bar.update(len(chunk))
    return Tally(len(source) - known - bad, known, bad)


def reindex(model: Path, settings: Settings) -> int:
    """Embed a store's pictures anew with another encoder, into its next generation; return how many it has then.

    The store is read as it lies there, and a service may go on changing it: what changed meanwhile is taken over at
    the end, and what changes after that when the generation is taken into use. An interrupted job goes on where it
    stopped when it is run again.

    Raises:
        InvalidModel: no such encoder.
        InvalidRequest: the store is that encoder's already.
        StoreMismatch: an interrupted job of still another encoder lies there.
        InvalidStore: no store; another process is at it; or some pictures are neither kept nor where they came from.
            Nothing is published then.
    """
    home = settings.store
    source, folder = current(home), following(home)
    encoder = Encoder(read_card(model), settings.device, settings.variant)
    earlier = Catalog(source, None)
    try:
        if earlier.meta["fingerprint"] == encoder.card.fingerprint:
            raise InvalidRequest(f"{home}: is of the encoder {encoder.card.name} already")
        gallery = Gallery(encoder, EmbeddedStore(folder, encoder.card, encoder.dimension), settings)
        try:
            since = int(gallery.store.facts().get("follows", -1))
            gallery.store.note("earlier", "" if source == home else source.name)
            with progress("embedding anew", 0, 0) as bar:
                while since < earlier.sequence():
                    since = gallery.follow(earlier, since, bar.update)
                    gallery.store.note("follows", str(since))
            gallery.store.note("follows", str(max(since, 0)))
            gallery.store.settle()
            count = gallery.store.count()
        finally:
            gallery.close()
    finally:
        earlier.close()
    publish(home, folder)
    return count


def read_ahead(positions: range, read: Callable[[int], T]) -> Iterator[list[tuple[int, T | LookalikeError]]]:
    """Yield chunks of (position, what was read or why not); the next chunk is read while this one is used."""

    def attempt(position: int) -> tuple[int, T | LookalikeError]:
        try:
            return position, read(position)
        except LookalikeError as error:
            return position, error

    chunks = [positions[start : start + _CHUNK] for start in range(0, len(positions), _CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead = pool.map(attempt, chunks[0]) if chunks else iter(())
        for following in [*chunks[1:], None]:
            current, ahead = ahead, pool.map(attempt, following or ())
            yield list(current)


def use_good(
    chunk: list[tuple[int, Any]], work: Callable[[list[tuple[int, Any]]], None]
) -> list[tuple[int, LookalikeError]]:
    """Do the work on what could be read, all together; return (position, why not) of the others.

    A picture that the encoder gives no embedding is one of the others: it is found by going one by one.
    """
    failed = [(position, result) for position, result in chunk if isinstance(result, LookalikeError)]
    good = [(position, result) for position, result in chunk if not isinstance(result, LookalikeError)]
    if good:
        try:
            work(good)
        except NoEmbedding as error:
            if len(good) == 1:
                failed.append((good[0][0], error))
            else:
                failed += [failure for one in good for failure in use_good([one], work)]
    return failed


def progress(what: str, total: int, done: int) -> "tqdm[Any]":
    return tqdm(total=total, initial=done, desc=what, unit=" pictures", mininterval=0.5)


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


def write_parquet(table: pa.Table, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, temporary)
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InvalidOutput(f"{path}: cannot be written: {error.strerror or error}") from error
