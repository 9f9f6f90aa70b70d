"""What every store promises (service/store/__init__.py), by the same tests on the embedded one and on Milvus Lite."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service import FloatArray
from service.errors import CountMismatch, InvalidQuery, InvalidRequest, InvalidStore, PageNotFound, StoreMismatch
from service.file_facts import FileFacts, Move
from service.store import Folder, NewItem, Order, Store
from service.store.embedded import EmbeddedStore
from service.store.filters import EVERY, begins, both, has_name, parse_filter
from service.store.milvus_address import MilvusAddress
from tests.service.store.test_embedded import D, card, item, unit

Open = Callable[..., Store]
# The environment of `make test-scale` has it.
HAS_MILVUS = find_spec("pymilvus") is not None


def address(folder: Path) -> MilvusAddress:
    return MilvusAddress(str(folder / "store.db"), "pictures", True)


@pytest.fixture(params=["embedded", "milvus"] if HAS_MILVUS else ["embedded"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Yield a function that opens the store of this test; what it opened is closed at the end."""
    opened: list[Store] = []

    def open(encoder: str = "encoder", read_only: bool = False) -> Store:
        store: Store
        if request.param == "embedded":
            store = EmbeddedStore(tmp_path / "store", card(encoder), D, read_only)
        else:
            from service.store.milvus import MilvusStore

            pictures = str(tmp_path / "pictures")
            store = MilvusStore(address(tmp_path), card(encoder), D, pictures=pictures, read_only=read_only)
        opened.append(store)
        return store

    (tmp_path / "store").mkdir()
    yield open
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Open) -> Store:
    return open_store()


@pytest.mark.parametrize(
    ("queries", "k", "says"),
    [
        (unit(1, D + 1), 1, "expected vectors of 8 numbers"),
        (unit(D), 1, "shape"),
        (unit(1, D) * 2, 1, "not of length 1"),
        (np.full((1, D), np.nan, np.float32), 1, "not finite"),
        (np.full((1, D), np.inf, np.float32), 1, "not finite"),
        (unit(1, D), 0, "k must be 1 or more"),
        (unit(1, D), -1, "k must be 1 or more"),
    ],
)
def test_queries_that_cannot_be(store: Store, queries: FloatArray, k: int, says: str) -> None:
    store.add([item("a", unit(D))])
    with pytest.raises(InvalidQuery, match=says):
        store.search(queries, k)


def test_embeddings_that_cannot_be_are_not_added(store: Store) -> None:
    for bad in (unit(D) * 2, np.full(D, np.nan, np.float32)):
        with pytest.raises(InvalidQuery):
            store.add([item("good", unit(D)), item("bad", bad)])
    assert store.count() == 0
    assert store.get("good") is None


def test_a_search_equals_plain_numpy(store: Store) -> None:
    vectors, queries = unit(300, D), unit(20, D, seed=1)
    store.add([item(str(n), vector) for n, vector in enumerate(vectors)])
    scores = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    for row, hits in zip(scores, store.search(queries, 7), strict=True):
        assert [int(hit.id) for hit in hits] == np.argsort(-row, kind="stable")[:7].tolist()
        assert np.allclose([hit.score for hit in hits], np.sort(row)[::-1][:7], atol=1e-6)
    for n, hits in enumerate(store.search(vectors[:50], 2)):
        assert (hits[0].id, hits[0].score) == (str(n), 1.0)


def test_equal_scores_come_in_the_order_of_adding(store: Store) -> None:
    same, other = unit(2, D)
    store.add([item(f"{n}", same if n % 5 else other) for n in range(500)])
    # An item that is replaced twice keeps its place.
    store.add([item("1", other)])
    store.add([item("1", same)])
    expected = [str(n) for n in range(500) if n % 5]
    for k in (1, 3, 100, 400):
        hits = store.search(same[None], k)[0]
        assert [hit.id for hit in hits] == expected[:k]
        assert len({hit.score for hit in hits}) == 1
        assert hits[0].score <= 1


def test_fewer_hits_when_fewer_are_stored(store: Store) -> None:
    assert store.search(unit(2, D), 3) == [[], []]
    store.add([item("a", unit(D))])
    assert [[hit.id for hit in hits] for hits in store.search(unit(2, D), 3)] == [["a"], ["a"]]
    assert store.search(np.empty((0, D), np.float32), 3) == []


def test_hits_have_ids_and_metadata_of_any_characters(store: Store) -> None:
    ids = ['a"b', "a\\b", "a'b", "<&>", "é", "\u2028", "\U0001f600", "{}", "null"]
    metadata = {"text": 'q"\\\u2028\n', "large": 2**70, "none": None}
    store.add([item(id, vector, **metadata, same=id) for id, vector in zip(ids, unit(len(ids), D), strict=True)])
    found = {hit.id: hit.metadata for hit in store.search(unit(1, D, seed=1), len(ids))[0]}
    assert found == {id: metadata | {"same": id} for id in ids}


def test_what_was_added_is_there_after_reopening_and_what_was_removed_is_not(open_store: Open) -> None:
    vectors = unit(4, D)
    store = open_store()
    assert store.add([item(f"p{n}", vector, n=n) for n, vector in enumerate(vectors)]) == [True] * 4
    assert store.remove("p1")
    assert not store.remove("p1")
    assert store.add([item("p2", vectors[1], n="new")]) == [False]
    for _ in range(2):
        assert store.count() == 3
        assert store.get("p1") is None
        hit = store.search(vectors[1:2], 10)[0][0]
        assert (hit.id, hit.metadata) == ("p2", {"n": "new"})
        assert store.thumbnail("p3") == b"thumbnail of p3"
        assert store.original("p3") is None
        embedding = store.embedding("p0")
        assert embedding is not None
        assert np.array_equal(embedding, vectors[0])
        store.close()
        store = open_store()


def test_every_fact_of_an_item_comes_back(store: Store) -> None:
    facts = FileFacts(640, 480, 12345, "JPEG", "2026-11-27T10:00:00")
    metadata = {"a": [1, 2.5, None, {"b": "é"}], "n": 1, "empty": {}, "big": 2**53, "true": True}
    new = NewItem(
        'a/ü "x"\\', metadata, "/pictures/a", "d1", "int8", unit(D), b"small", b"large", facts=facts, mtime_ns=7
    )
    store.add([new, item("bare", unit(D, seed=2))])
    have = store.get(new.id)
    assert have is not None
    assert (have.metadata, have.source, have.digest, have.variant) == (metadata, "/pictures/a", "d1", "int8")
    assert (have.facts, have.mtime_ns) == (facts, 7)
    assert store.thumbnail(new.id) == b"small"
    assert store.original(new.id) == b"large"
    assert store.original("bare") is None
    assert store.thumbnail("nobody") is None
    embedding = store.embedding(new.id)
    assert embedding is not None
    assert embedding.tobytes() == new.embedding.tobytes()
    bare = store.get("bare")
    assert bare is not None
    assert (bare.source, bare.facts, bare.mtime_ns) == (None, FileFacts(), None)
    assert store.remove(new.id)
    assert store.original(new.id) is None
    assert store.embedding(new.id) is None
    assert store.get(new.id) is None


def test_an_item_that_is_replaced_keeps_its_metadata_where_asked(store: Store) -> None:
    first, second = unit(2, D)
    store.add([item("a", first, mine=1, label="x"), item("b", first, mine=1)])
    kept = replace(item("a", second, label="y"), keep_metadata=True)
    assert store.add([kept, item("b", second), replace(item("c", second, n=1), keep_metadata=True)])[0] is False
    assert [found.metadata for found in store.scan(9)[0]] == [{"mine": 1, "label": "y"}, {}, {"n": 1}]


def test_an_id_given_twice_in_one_call_keeps_its_last(store: Store) -> None:
    first, second = unit(2, D)
    assert store.add([item("a", first, n=1), item("a", second, n=2)]) == [True, False]
    assert store.count() == 1
    found = store.get("a")
    assert found is not None
    assert found.metadata == {"n": 2}
    assert store.search(second[None], 5)[0][0].score == 1


def test_scan_pages_through_everything_once(store: Store) -> None:
    ids = [f"{n:02}" for n in reversed(range(25))]
    store.add([item(id, vector) for id, vector in zip(ids, unit(25, D), strict=True)])
    found, cursor = list[str](), 0
    while True:
        items, following = store.scan(10, cursor)
        found += [one.id for one in items]
        if following is None:
            break
        cursor = following
    assert found == ids


ORDERS: list[Order] = ["added", "-added", "id", "-id", "date", "-date", "size", "-size"]


@pytest.mark.parametrize("order", ORDERS)
def test_pages_in_every_order(store: Store, order: Order) -> None:
    rng = np.random.default_rng(3)
    ids = [f"{'ab'[n % 2]}{n:02}" for n in rng.permutation(30)]
    dates = [None if n % 7 == 0 else f"2026-01-{n % 5 + 1:02}T00:00:00" for n in range(30)]
    sizes = [None if n % 11 == 0 else 100 * (n % 4) for n in range(30)]
    store.add(
        [
            replace(item(id, vector), facts=FileFacts(date=date, size_bytes=size))
            for id, vector, date, size in zip(ids, unit(30, D), dates, sizes, strict=True)
        ]
    )
    column, down = order.removeprefix("-"), order.startswith("-")
    values: list[Any] = {"added": [*range(30)], "id": ids, "date": dates, "size": sizes}[column]
    known = sorted((n for n in range(30) if values[n] is not None), key=lambda n: (values[n], n), reverse=down)
    unknown = sorted((n for n in range(30) if values[n] is None), reverse=down)
    expected = [ids[n] for n in known + unknown]
    for where, kept in ((None, expected), (begins("a"), [id for id in expected if id.startswith("a")])):
        found, cursor = list[str](), ""
        while True:
            items, following = store.page(4, cursor, where, order)
            found += [one.id for one in items]
            if following is None:
                break
            cursor = following
        assert found == kept
        assert [one.id for one in store.page(5, "", where, order, 7)[0]] == kept[7:12]
    assert store.page(30, "", None, order)[1] is None


def test_a_cursor_that_is_none(store: Store) -> None:
    store.add([item("a", unit(D))])
    orders: list[Order] = ["added", "date"]
    for order in orders:
        with pytest.raises(PageNotFound, match="none of this order"):
            store.page(1, "nonsense", order=order)


def test_a_filtered_search_is_the_search_of_what_is_left(store: Store) -> None:
    rows = unit(60, D)
    store.add([item(f"{n}", row, n=n, odd=n % 2 == 1, tags=["x", n]) for n, row in enumerate(rows)])
    for content, keeps in (
        ({"odd": True}, lambda n: n % 2 == 1),
        ({"n": {"$lt": 5}}, lambda n: n < 5),
        ({"n": {"$gte": 1000}}, lambda _: False),
        ({"$not": {"odd": True}}, lambda n: n % 2 == 0),
        ({"tags": {"$gt": 50}}, lambda n: n > 50),
        ({}, lambda _: True),
    ):
        where = parse_filter(content)
        kept = [n for n in range(60) if keeps(n)]
        best = sorted(kept, key=lambda n: -float(rows[n] @ rows[0]))[:10]
        assert [hit.id for hit in store.search(rows[:1], 10, where)[0]] == [str(n) for n in best]
        assert store.count(where) == len(kept)
    where = both(begins("1"), has_name("9"))
    assert store.count(where) == len([n for n in range(60) if str(n).startswith("1") and "9" in str(n)])


def test_metadata_change_and_an_error_leaves_them(store: Store) -> None:
    store.add([item("a", unit(D), n=1, keep="x")])
    changed = store.set_metadata("a", lambda metadata: metadata | {"n": 2})
    assert changed is not None
    assert changed.metadata == {"n": 2, "keep": "x"}
    assert store.set_metadata("nobody", lambda metadata: metadata) is None

    def refuse(metadata: dict[str, Any]) -> dict[str, Any]:
        raise InvalidRequest("no")

    with pytest.raises(InvalidRequest, match="no"):
        store.set_metadata("a", refuse)
    have = store.get("a")
    assert have is not None
    assert have.metadata == {"n": 2, "keep": "x"}
    assert have.digest == "digest of a"
    assert store.count(parse_filter({"n": 2})) == 1
    assert store.count(parse_filter({"n": 1})) == 0
    assert store.search(unit(1, D), 1)[0][0].metadata == {"n": 2, "keep": "x"}
    assert store.thumbnail("a") == b"thumbnail of a"


def test_items_exchange_their_ids_move_and_go(store: Store) -> None:
    vectors = unit(4, D)
    store.add([item(id, vector, was=id) for id, vector in zip("abcd", vectors, strict=True)])
    moves = [
        Move("a", "digest of a", "b", "/x/b"),
        Move("b", "digest of b", "a", "/x/a"),
        Move("c", "digest of c", None),
        Move("d", "another digest", "e"),
        Move("nobody", "digest", "f"),
    ]
    assert store.move(moves) == 3
    assert {one.id: (one.metadata["was"], one.source) for one in store.scan(9)[0]} == {
        "b": ("a", "/x/b"),
        "a": ("b", "/x/a"),
        "d": ("d", None),
    }
    assert [hit.id for hit in store.search(vectors[:1], 1)[0]] == ["b"]
    assert store.thumbnail("b") == b"thumbnail of a"
    assert store.thumbnail("a") == b"thumbnail of b"
    with pytest.raises(InvalidRequest, match="an item has the id"):
        store.move([Move("a", "digest of b", "d")])
    assert store.move([Move("a", "digest of b", "z", "/x/z", FileFacts(size_bytes=5), 9)]) == 1
    assert [(one.path, one.id, one.size_bytes, one.mtime_ns) for one in store.below("/x")][-1] == ("z", "z", 5, 9)
    # The id of a removed item may be taken in the same step.
    assert store.move([Move("b", "digest of a", None), Move("d", "digest of d", "b")]) == 2
    assert {one.id for one in store.scan(9)[0]} == {"z", "b"}
    assert store.thumbnail("b") == b"thumbnail of d"


def test_items_of_a_source(store: Store) -> None:
    sources = ["/p/a", "/p/sub/b", "/pq/c", None, "/p0"]
    store.add(
        [
            replace(item(f"{n}", vector), source=source, facts=FileFacts(size_bytes=n), mtime_ns=10 * n)
            for n, (source, vector) in enumerate(zip(sources, unit(5, D), strict=True))
        ]
    )
    found = sorted(store.below("/p"))
    assert found == [("a", "0", "digest of 0", 0, 0), ("sub/b", "1", "digest of 1", 1, 10)]


def test_facts_that_are_noted_stay(open_store: Open) -> None:
    store = open_store()
    assert store.facts()["fingerprint"] == card().fingerprint
    assert store.facts()["model"] == "encoder"
    store.note({"prefixes": '["ü"]', "folders": "[]"})
    store.note({"folders": '["/x"]'})
    store.note({})
    store.close()
    facts = open_store().facts()
    assert (facts["prefixes"], facts["folders"], facts["fingerprint"]) == ('["ü"]', '["/x"]', card().fingerprint)


def test_folders_and_fields(store: Store) -> None:
    ids = ["a/x/1", "a/x/2", "a/y/1", "b/1", "top", "é/1"]
    tags: list[Any] = ["red", "red", "blue", 7, 7.0, None]
    store.add(
        [item(id, vector, tag=tag, n=n) for n, (id, vector, tag) in enumerate(zip(ids, unit(6, D), tags, strict=True))]
    )
    store.set_metadata("top", lambda metadata: metadata | {"list": [1], "flag": True})
    assert store.folders() == [Folder("a/", 3), Folder("b/", 1), Folder("é/", 1)]
    assert store.folders("a/") == [Folder("a/x/", 2), Folder("a/y/", 1)]
    assert store.folders("", parse_filter({"tag": "red"})) == [Folder("a/", 2)]
    fields = {field.key: field for field in store.fields()}
    assert [(field.key, field.count) for field in store.fields()][:2] == [("n", 6), ("tag", 6)]
    assert [(value.value, value.count) for value in fields["tag"].values] == [
        (7, 2),
        ("red", 2),
        (None, 1),
        ("blue", 1),
    ]
    assert (fields["tag"].distinct, fields["list"].distinct, fields["list"].values) == (4, 0, [])
    assert fields["flag"].values[0].value is True
    assert [field.key for field in store.fields(parse_filter({"tag": "blue"}))] == ["n", "tag"]


def test_items_that_match_are_removed_all_or_none(store: Store) -> None:
    store.add([item(f"{n}", vector, n=n) for n, vector in enumerate(unit(20, D))])
    with pytest.raises(CountMismatch, match="expected 3 items that match, found 5"):
        store.remove_matching(parse_filter({"n": {"$lt": 5}}), expect=3)
    assert store.count() == 20
    assert store.remove_matching(parse_filter({"n": {"$lt": 5}}), expect=5) == 5
    assert store.remove_matching(begins("1")) == 10
    assert store.count() == 5
    assert store.count(EVERY) == 5


def test_a_store_of_another_encoder_is_refused_with_both_names(open_store: Open) -> None:
    store = open_store()
    store.add([item("a", unit(D))])
    store.close()
    with pytest.raises(StoreMismatch, match=r"built by the encoder encoder \(encoderencod…\), not by other"):
        open_store("other")
    assert open_store().count() == 1


def test_a_reader_refuses_changes(open_store: Open) -> None:
    store = open_store()
    store.add([item("a", unit(D))])
    assert store.writable
    store.close()
    reader = open_store(read_only=True)
    assert not reader.writable
    for change in (
        lambda: reader.add([item("b", unit(D))]),
        lambda: reader.remove("a"),
        lambda: reader.note({"a": "b"}),
        lambda: reader.set_metadata("a", lambda metadata: metadata),
    ):
        with pytest.raises(InvalidStore, match="read-only"):
            change()
    assert reader.count() == 1


def test_a_closed_store_says_so(store: Store) -> None:
    store.close()
    with pytest.raises(InvalidStore, match="closed"):
        store.get("a")
