"""`lookalike store check`: read all files of a store and report each problem."""

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import numpy as np

from service.errors import InvalidStore
from service.store import snapshot
from service.store.catalog import FILE, VECTOR_TYPES
from service.store.catalog_reader import CatalogReader
from service.store.faiss_index import FaissIndex
from service.store.snapshot import SNAPSHOT, DamagedSnapshot
from service.store.vector_map import VECTORS, VectorMap

_MAX_SQLITE_PROBLEMS = 20


def examine(folder: Path) -> Iterator[str]:
    """Yield a sentence for each problem of the store in a folder.

    It checks SQLite's pages, tables and indexes; the checksum, length and norm of every vector; the metadata and the
    picture of every item, and the digest of the image file if the store keeps it; every code in the snapshot of the
    index. It changes nothing, and a service may use the store meanwhile.

    Raises:
        InvalidStore: there is no store, or it cannot be opened.

    Cost: reads everything once.
    """
    catalog = CatalogReader(folder)
    catalog.close()
    database = apsw.Connection(str(folder / FILE), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        # One transaction, so that everything is read as of one moment.
        with database:
            yield from _structure(database)
            yield from _items(database, catalog.meta)
    except apsw.Error as error:
        yield f"{FILE}: cannot be read on: {error}"
    finally:
        database.close()
    yield from _index(folder)


def _structure(database: apsw.Connection) -> Iterator[str]:
    for (text,) in database.execute(f"PRAGMA integrity_check({_MAX_SQLITE_PROBLEMS})"):
        if text != "ok":
            yield f"{FILE}: {text}"
    for table, *_ in database.execute("PRAGMA foreign_key_check"):
        yield f"{FILE}: a row of {table} belongs to no item"


def _items(database: apsw.Connection, meta: dict[str, str]) -> Iterator[str]:
    dtype, dimension = VECTOR_TYPES[meta["vector_type"]], int(meta["dimension"])
    query = (
        "SELECT id, metadata, digest, vector, checksum, thumbnail, original FROM items "
        "LEFT JOIN vectors USING (key) LEFT JOIN pictures USING (key) ORDER BY items.key"
    )
    for id, metadata, digest, vector, checksum, thumbnail, original in database.execute(query):
        name = f"{FILE}: item {json.dumps(id, ensure_ascii=False)}"
        if vector is None or thumbnail is None:
            yield f"{name}: has no {'vector' if vector is None else 'picture'}"
            continue
        if zlib.crc32(vector) != checksum:
            yield f"{name}: its vector does not have its checksum"
        elif len(vector) != np.dtype(dtype).itemsize * dimension:
            yield f"{name}: its vector has {len(vector)} bytes"
        elif not abs(float(np.linalg.norm(np.frombuffer(vector, dtype).astype(np.float64))) - 1) < 2e-3:
            yield f"{name}: its vector is not of length 1"
        if original is not None and hashlib.sha256(original).hexdigest() != digest:
            yield f"{name}: its picture does not have its digest"
        try:
            good = isinstance(json.loads(metadata), dict)
        except ValueError:
            good = False
        if not good:
            yield f"{name}: its metadata is not a JSON object"


def _index(folder: Path) -> Iterator[str]:
    """Compare the snapshot with the catalog, if there is a snapshot."""
    path = folder / SNAPSHOT
    try:
        facts, arrays = snapshot.read(path)
        catalog = CatalogReader(folder)
        try:
            index = FaissIndex.of_arrays(int(catalog.meta["dimension"]), facts, arrays)
            later = set(catalog.changed(int(facts["sequence"])).tolist())
            for keys, vectors in catalog.vectors():
                same = np.asarray([key not in later for key in keys.tolist()])
                if not index.holds(keys[same], vectors[same]):
                    yield f"{SNAPSHOT}: holds other vectors than {FILE}; remove it, the index is rebuilt without it"
                    return
            yield from _map(folder / VECTORS, facts, catalog)
        finally:
            catalog.close()
    except FileNotFoundError:
        return
    # The check of the catalog reports this error.
    except InvalidStore:
        return
    except (DamagedSnapshot, ValueError, KeyError, OSError) as error:
        yield f"{SNAPSHOT}: {error}; the index is rebuilt without it"


def _map(path: Path, facts: dict[str, Any], catalog: CatalogReader) -> Iterator[str]:
    """Compare the map of vectors with the catalog, if the snapshot names it."""
    try:
        map = VectorMap(path, str(facts.get("map")), *catalog.vector_shape, read_only=True)
    # A store without it, or with another, writes it anew.
    except (OSError, ValueError):
        return
    wrong = {key for keys, vectors in catalog.vectors() for key in keys[~map.holds(keys, vectors)].tolist()}
    # A service may have changed some meanwhile, and those that changed after the snapshot are written again.
    if wrong - set(catalog.changed(int(facts["sequence"])).tolist()):
        yield f"{VECTORS}: holds other vectors than {FILE}; remove it, it is written anew"
