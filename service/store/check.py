"""What is wrong with a store's files, looked for everywhere rather than where a search happens to come by."""

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import apsw
import numpy as np

from service.errors import InvalidStore
from service.store import snapshot
from service.store.catalog import FILE, VECTOR_TYPES, Catalog
from service.store.faiss_index import FaissIndex
from service.store.snapshot import SNAPSHOT, DamagedSnapshot

_MOST_SHOWN = 20  # problems of SQLite's own


def examine(folder: Path) -> Iterator[str]:
    """Yield a sentence for everything that is wrong with the store in a folder; nothing where all is well.

    Looked at are SQLite's pages, tables and indexes; of every item its vector's checksum, length and norm, its
    metadata, its picture and, where the store keeps them, that the bytes have their digest; the snapshot of the index,
    with every code. Nothing is changed, and a service may go on meanwhile.

    Raises:
        InvalidStore: there is no store, or it cannot even be opened.

    Cost: reads everything once.
    """
    catalog = Catalog(folder, None)
    catalog.close()
    database = apsw.Connection(str(folder / FILE), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        with database:  # all of one moment
            yield from _structure(database)
            yield from _items(database, catalog.meta)
    except apsw.Error as error:
        yield f"{FILE}: cannot be read on: {error}"
    finally:
        database.close()
    yield from _index(folder)


def _structure(database: apsw.Connection) -> Iterator[str]:
    for (text,) in database.execute(f"PRAGMA integrity_check({_MOST_SHOWN})"):
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
    """The snapshot against the catalog, where there is one; it is made anew whenever it cannot be used."""
    path = folder / SNAPSHOT
    try:
        facts, arrays = snapshot.read(path)
        catalog = Catalog(folder, None)
        try:
            index = FaissIndex.of_arrays(int(catalog.meta["dimension"]), facts, arrays)
            later = set(catalog.changed(int(facts["sequence"])).tolist())
            for keys, vectors in catalog.vectors():
                same = np.asarray([key not in later for key in keys.tolist()])
                if not index.holds(keys[same], vectors[same]):
                    yield f"{SNAPSHOT}: holds other vectors than {FILE}; remove it, the index is made anew without it"
                    return
        finally:
            catalog.close()
    except FileNotFoundError:
        return
    except InvalidStore:
        return  # told already
    except (DamagedSnapshot, ValueError, KeyError, OSError) as error:
        yield f"{SNAPSHOT}: {error}; the index is made anew without it"
