"""The check names every fault of a damaged store and none of an intact one."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from service.store import NewItem, snapshot
from service.store.catalog import FILE
from service.store.check import examine
from service.store.embedded import EmbeddedStore
from service.store.snapshot import SNAPSHOT, section
from tests.service.store.test_embedded import D, card, item, unit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store = EmbeddedStore(tmp_path, card(), D)
    store.add([item(f"p{n}", vector, n=n) for n, vector in enumerate(unit(30, D))])
    store.add([NewItem("kept", {}, None, "0" * 64, "fp32", unit(D), b"t", b"other bytes than the digest's")])
    store.remove("kept")
    store.close()
    assert list(examine(tmp_path)) == []
    return tmp_path


def sql(script: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        database = sqlite3.connect(folder / FILE)
        database.executescript(script)
        database.close()

    return damage


def codes(folder: Path) -> None:
    facts, arrays = snapshot.read(folder / SNAPSHOT)
    arrays["codes"][-1] ^= 1
    sections = [section(name, array) for name, array in arrays.items()]
    snapshot.publish(snapshot.write(folder / SNAPSHOT, facts, sections), folder / SNAPSHOT)


def page(folder: Path) -> None:
    content = bytearray((folder / FILE).read_bytes())
    content[2 * 16384 + 8 : 2 * 16384 + 200] = np.random.default_rng(0).bytes(192)
    (folder / FILE).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            sql("UPDATE vectors SET checksum = checksum + 1 WHERE key = 3"),
            '"p2": its vector does not have its checksum',
        ),
        (sql("UPDATE items SET metadata = '[]' WHERE key = 4"), '"p3": its metadata is not a JSON object'),
        (sql("UPDATE items SET metadata = '{' WHERE key = 4"), '"p3": its metadata is not a JSON object'),
        (sql("UPDATE pictures SET original = x'00' WHERE key = 5"), '"p4": its picture does not have its digest'),
        (sql("DELETE FROM vectors WHERE key = 6"), '"p5": has no vector'),
        (sql("DELETE FROM pictures WHERE key = 6"), '"p5": has no picture'),
        (sql("PRAGMA foreign_keys = OFF; DELETE FROM items WHERE key = 7"), "a row of vectors belongs to no item"),
        (page, FILE),
        (codes, "holds other vectors than catalog.sqlite"),
        (lambda folder: (folder / SNAPSHOT).write_bytes(b""), "it does not begin like a snapshot"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(folder)
    before = (folder / FILE).read_bytes()
    found = list(examine(folder))
    assert any(says in problem for problem in found), found
    assert (folder / FILE).read_bytes() == before


def test_a_vector_that_is_none_is_named(folder: Path) -> None:
    import zlib

    long, short = np.full(D, 2, "<f4").tobytes(), b"\0" * 4
    database = sqlite3.connect(folder / FILE)
    for key, blob in ((1, long), (2, short)):
        database.execute("UPDATE vectors SET vector = ?, checksum = ? WHERE key = ?", (blob, zlib.crc32(blob), key))
    database.commit()
    database.close()
    found = "\n".join(examine(folder))
    assert '"p0": its vector is not of length 1' in found
    assert '"p1": its vector has 4 bytes' in found
