"""The store compared with a dict and plain NumPy."""

import shutil
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import apsw
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from service import FloatArray
from service.encoding.card import Card, Preprocessing, read_card
from service.errors import InvalidStore, StoreMismatch
from service.file_facts import FileFacts
from service.store import NewItem
from service.store.catalog import FILE, CatalogWriter
from service.store.catalog_reader import CatalogReader
from service.store.embedded import EmbeddedStore, recorded_model
from service.store.snapshot import SNAPSHOT
from tests.conftest import MODEL

D = 8


def card(name: str = "encoder") -> Card:
    config = {"size": {"width": 8, "height": 8}, "do_normalize": False}
    return Card(Path(f"/models/{name}"), name, name * 4, b"", Preprocessing.from_config(config, name), {})


def unit(*shape: int, seed: int = 0) -> FloatArray:
    vectors = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32)


def item(id: str, embedding: FloatArray, **metadata: Any) -> NewItem:
    return NewItem(id, metadata, None, "digest of " + id, "fp32", embedding, b"thumbnail of " + id.encode(), None)


@pytest.mark.parametrize("vector_type", ["float32", "float16"])
def test_a_vector_scores_one_with_itself(tmp_path: Path, vector_type: str) -> None:
    """And what lies beside it scores less, in the order of plain NumPy in float64."""
    store = EmbeddedStore(tmp_path, card(), D, vector_type=vector_type)
    vectors = unit(300, D)
    store.add([item(str(n), vector) for n, vector in enumerate(vectors)])
    stored = np.stack([embedding for n in range(300) if (embedding := store.embedding(str(n))) is not None])
    exact = stored.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    for n, hits in enumerate(store.search(stored, 5)):
        assert (hits[0].id, hits[0].score) == (str(n), 1.0)
        assert [int(hit.id) for hit in hits] == np.argsort(-(exact @ exact[n]), kind="stable")[:5].tolist()
        assert hits[1].score < 1
    store.close()


@pytest.fixture
def store_folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "store"


def test_a_store_of_another_encoder_is_refused_with_both_names(store_folder: Path) -> None:
    EmbeddedStore(store_folder, card("first"), D).close()
    with pytest.raises(StoreMismatch, match=r"built by the encoder first \(firstfirstfi…\), not by second"):
        EmbeddedStore(store_folder, card("second"), D)
    assert recorded_model(store_folder) == (Path("/models/first"), "first")
    # The refused opening released the lock.
    EmbeddedStore(store_folder, card("first"), D).close()


def test_a_second_writer_is_refused_and_a_reader_is_not(store_folder: Path) -> None:
    store = EmbeddedStore(store_folder, card(), D)
    store.add([item("a", unit(D))])
    with pytest.raises(InvalidStore, match=r"in use by process \d+"):
        EmbeddedStore(store_folder, card(), D)
    reader = EmbeddedStore(store_folder, card(), D, read_only=True)
    assert reader.count() == 1
    with pytest.raises(InvalidStore, match="the store was opened read-only"):
        reader.remove("a")
    reader.close()
    store.close()


def test_a_reader_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(InvalidStore, match="no store there; make one with `lookalike index"):
        EmbeddedStore(tmp_path / "nowhere", card(), D, read_only=True)
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"picture")
    with pytest.raises(InvalidStore, match=r"is not a store and not empty \(it has holiday.jpg\)"):
        EmbeddedStore(tmp_path, card(), D)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(InvalidStore, match="damaged: file is not a database; the file is left as it is"):
        EmbeddedStore(tmp_path, card(), D)


@pytest.mark.parametrize("damaged", [lambda vector: b"\1" + vector[1:], lambda _: "text", lambda _: 7])
def test_a_damaged_vector_is_named(store_folder: Path, damaged: Callable[[bytes], object]) -> None:
    store = EmbeddedStore(store_folder, card(), D)
    store.add([item("a", unit(D))])
    store.close()
    database = apsw.Connection(str(store_folder / FILE))
    rows: list[Any] = database.execute("SELECT key, vector, checksum FROM vectors").fetchall()
    ((key, vector, checksum),) = rows
    assert zlib.crc32(vector) == checksum
    database.execute("UPDATE vectors SET vector = ?", (damaged(vector),)).fetchall()
    database.close()
    with pytest.raises(InvalidStore, match=f"the vector of key {key} is damaged"):
        EmbeddedStore(store_folder, card(), D)
    (store_folder / SNAPSHOT).unlink()
    with pytest.raises(InvalidStore, match=f"the vector of key {key} is damaged"):
        EmbeddedStore(store_folder, card(), D)


def test_every_commit_is_on_disk(store_folder: Path) -> None:
    store_folder.mkdir(parents=True)
    meta = {"fingerprint": "f", "dimension": "8", "vector_type": "float32", "model": "m", "model_folder": "/m"}
    catalog = CatalogWriter(store_folder, meta)
    names = ("synchronous", "journal_mode", "foreign_keys", "page_size")
    pragma = {name: next(catalog._database.execute(f"PRAGMA {name}"))[0] for name in names}
    assert pragma == {"synchronous": 2, "journal_mode": "wal", "foreign_keys": 1, "page_size": 16384}
    catalog.close()


class StoreMachine(RuleBasedStateMachine):
    """Random changes and searches, compared with a dict after every step; reopening changes nothing."""

    ids = st.sampled_from([f"id{n}" for n in range(6)])
    seeds = st.integers(0, 30)

    @initialize()
    def open(self) -> None:
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.store = EmbeddedStore(Path(self.folder.name), card(), D)
        self.model: dict[str, FloatArray] = {}
        self.keys: list[str] = []

    @rule(ids=st.lists(ids, max_size=4, min_size=1), seed=seeds)
    def add(self, ids: list[str], seed: int) -> None:
        vectors = unit(len(ids), D, seed=seed)
        new = self.store.add([item(id, vector) for id, vector in zip(ids, vectors, strict=True)])
        assert new == [id not in self.model and id not in ids[:place] for place, id in enumerate(ids)]
        for id, vector in zip(ids, vectors, strict=True):
            if id not in self.model:
                self.keys.append(id)
            self.model[id] = vector

    @rule(id=ids)
    def remove(self, id: str) -> None:
        assert self.store.remove(id) == (id in self.model)
        if self.model.pop(id, None) is not None:
            self.keys.remove(id)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = EmbeddedStore(Path(self.folder.name), card(), D)

    @rule(seed=seeds, k=st.integers(1, 8))
    def search(self, seed: int, k: int) -> None:
        query = unit(1, D, seed=seed)
        ranked = sorted(self.keys, key=lambda id: -float(query[0] @ self.model[id]))
        hits = self.store.search(query, k)[0]
        assert len(hits) == min(k, len(self.model))
        for hit, id in zip(hits, ranked, strict=False):
            assert hit.id == id or abs(hit.score - float(query[0] @ self.model[id])) < 1e-6

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "store"):
            assert self.store.count() == len(self.model)
            assert [found.id for found in self.store.scan(100)[0]] == self.keys

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


GOLDEN = Path(__file__).parents[1] / "golden_store" / FILE


@pytest.mark.parametrize("schema", ["1", "2"])
def test_a_store_of_an_earlier_schema_is_brought_up_to_date_and_keeps_all(tmp_path: Path, schema: str) -> None:
    shutil.copy(GOLDEN, tmp_path / FILE)
    database = apsw.Connection(str(tmp_path / FILE))
    before = list(database.execute("SELECT key, id, metadata, source, digest FROM items ORDER BY key"))
    vectors = list(database.execute("SELECT key, vector, checksum, sequence FROM vectors ORDER BY key"))
    pictures = list(database.execute("SELECT * FROM pictures ORDER BY key"))
    if schema == "1":
        for statement in ("ALTER TABLE items DROP COLUMN variant", "UPDATE meta SET value = '1' WHERE name = 'schema'"):
            database.execute(statement).fetchall()
    database.close()
    assert len(before) == len(vectors) == len(pictures) == 20
    # models/mnist had this fingerprint in those versions.
    fingerprint = "7630ccfe790b66f72d1d464751876f969aff0aca6500995e21612488e62f1e62"
    encoder = replace(read_card(MODEL), fingerprint=fingerprint)
    with pytest.raises(InvalidStore, match=f"schema {schema}, this version reads 6; `lookalike index` or `serve`"):
        EmbeddedStore(tmp_path, encoder, 256, read_only=True)
    assert recorded_model(tmp_path) == (Path("/models/mnist"), "mnist")
    store = EmbeddedStore(tmp_path, encoder, 256)
    found = store.get("digits/00007")
    assert found is not None
    assert (found.metadata, found.variant) == ({"label": "7"}, "fp32" if schema == "1" else "int8")
    for key, vector, *_ in vectors:
        hits = store.search(np.frombuffer(vector, np.float32)[None], 1)[0]
        assert (hits[0].id, round(hits[0].score, 5)) == (before[key - 1][1], 1)
    store.add([replace(item("b", unit(256, seed=1)), variant="int8")])
    store.remove("b")
    store.close()
    database = apsw.Connection(str(tmp_path / FILE))
    assert list(database.execute("SELECT value FROM meta WHERE name = 'schema'")) == [("6",)]
    assert list(database.execute("SELECT key, id, metadata, source, digest FROM items ORDER BY key")) == before
    columns = "key, vector, checksum, sequence"
    assert list(database.execute(f"SELECT {columns} FROM vectors ORDER BY key")) == vectors
    assert list(database.execute("SELECT * FROM pictures ORDER BY key")) == pictures
    assert list(database.execute("SELECT sequence, key, id FROM removed")) == [(22, 21, "b")]
    database.close()


@pytest.mark.parametrize("read_only", [False, True])
def test_a_store_of_a_later_schema_is_refused_and_left_as_it_is(tmp_path: Path, read_only: bool) -> None:
    store = EmbeddedStore(tmp_path, card(), D)
    store.add([item("a", unit(D))])
    store.close()
    database = apsw.Connection(str(tmp_path / FILE))
    database.execute("UPDATE meta SET value = '7' WHERE name = 'schema'").fetchall()
    database.close()
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(InvalidStore, match=r"schema 7, this version reads 6$"):
        EmbeddedStore(tmp_path, card(), D, read_only=read_only)
    assert (tmp_path / FILE).read_bytes() == before


@pytest.mark.parametrize("schema", ["3", "4", "5"])
def test_a_store_of_an_earlier_schema_is_read_beside_the_process_that_would_migrate_it(
    tmp_path: Path, schema: str
) -> None:
    store = EmbeddedStore(tmp_path, card(), D)
    store.add([item("a", unit(D))])
    store.close()
    database = apsw.Connection(str(tmp_path / FILE))
    database.execute("DROP INDEX items_by_size").fetchall()
    if schema != "5":
        database.execute("DROP INDEX items_by_date").fetchall()
        for column in (*FileFacts._fields, "mtime_ns"):
            database.execute(f"ALTER TABLE items DROP COLUMN {column}").fetchall()
    if schema == "3":
        database.execute("DROP TABLE dismissed").fetchall()
    database.execute("UPDATE meta SET value = ? WHERE name = 'schema'", (schema,)).fetchall()
    database.close()
    store = EmbeddedStore(tmp_path, card(), D, read_only=True)
    assert [hit.id for hit in store.search(unit(1, D), 1)[0]] == ["a"]
    found = store.get("a")
    assert found is not None
    assert (found.facts, found.mtime_ns, store.below("/none")) == (FileFacts(), None, [])
    assert [item.id for item in store.page(1, order="-size")[0]] == ["a"]
    store.close()
    with closing(CatalogReader(tmp_path)) as reader:
        assert reader.dismissed() == set()
    store = EmbeddedStore(tmp_path, card(), D)
    store.dismiss([("2", "1"), ("3", "3")])
    store.dismiss([("1", "2")])
    store.close()
    with closing(CatalogReader(tmp_path)) as reader:
        assert reader.dismissed() == {("1", "2"), ("2", "1"), ("3", "3")}
    store = EmbeddedStore(tmp_path, card(), D)
    store.dismiss([("1", "2")], dismissed=False)
    store.close()
    with closing(CatalogReader(tmp_path)) as reader:
        assert reader.dismissed() == {("3", "3")}
