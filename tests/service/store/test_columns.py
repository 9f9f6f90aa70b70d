"""Columns of metadata give the same items as SQLite's scan, whatever the metadata and the filter."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from service.errors import InvalidQuery
from service.store import NewItem
from service.store.columns import Columns
from service.store.embedded import EmbeddedStore
from service.store.filters import begins, both, has_name, parse_filter
from tests.service.store.test_embedded import D, card, unit
from tests.service.store.test_filters import _filters, _metadata


def items(rows: list[dict[str, Any]]) -> list[NewItem]:
    return [
        NewItem(str(number), row, None, "d", "fp32", unit(len(rows), D)[number], b"t", None)
        for number, row in enumerate(rows)
    ]


@pytest.fixture
def opened(tmp_path: Path) -> EmbeddedStore:
    return EmbeddedStore(tmp_path / "store", card(), D)


def read(store: EmbeddedStore) -> Columns:
    columns = Columns.read(store._reader, lambda: False)
    assert columns is not None
    return columns


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(_metadata, min_size=1, max_size=6), content=_filters)
def test_columns_answer_as_a_scan_does(opened: EmbeddedStore, rows: list[dict[str, Any]], content: Any) -> None:
    opened.remove_matching(parse_filter({}))
    opened.add(items(rows))
    try:
        where = parse_filter(content)
    except InvalidQuery:
        reject()
    scanned = opened._reader.matching(where, -1)[2]
    of_columns = read(opened).matching(where, opened._reader)
    # Names with dots, and names that are spelt in two ways, are left to the scan.
    if of_columns is not None:
        assert of_columns.tolist() == sorted(scanned.tolist())


@pytest.mark.parametrize(
    ("content", "numbers"),
    [
        ({"year": {"$lt": 2010}}, [0, 1]),
        ({"year": 2010.0, "label": {"$ne": "cat"}}, [2]),
        ({"tags": "red"}, [0, 2]),
        ({"$or": [{"label": "cat"}, {"$not": {"year": {"$exists": True}}}]}, [0, 3]),
        ({"nowhere": {"$exists": False}}, [0, 1, 2, 3]),
        ({"nowhere": 1}, []),
    ],
)
def test_they_know_fields_lists_and_what_is_missing(opened: EmbeddedStore, content: Any, numbers: list[int]) -> None:
    opened.add(
        items(
            [
                {"year": 2000, "label": "cat", "tags": ["red", "blue"]},
                {"year": 2009.5, "label": "dog"},
                {"year": 2010, "label": None, "tags": "red"},
                {"label": "dog"},
            ]
        )
    )
    keys = read(opened).matching(parse_filter(content), opened._reader)
    assert keys is not None
    assert [key - 1 for key in keys.tolist()] == numbers


def test_what_they_cannot_tell_is_left_to_a_scan(opened: EmbeddedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.store.columns._MOST_VALUES", 3)
    opened.add(items([{"many": number, "few": number % 3, "place": {"city": "Rome"}} for number in range(9)]))
    columns = read(opened)

    def told(content: dict[str, Any]) -> bool:
        return columns.matching(parse_filter(content), opened._reader) is not None

    assert told({"few": 1})
    assert told({"place": {"$exists": True}})
    assert not told({"many": 1})
    assert not told({"few": 1, "many": {"$ne": 1}})
    assert not told({"place.city": "Rome"})
    for where in (begins("1"), has_name("1"), both(parse_filter({"few": 1}), begins("1"))):
        assert columns.matching(where, opened._reader) is None
    monkeypatch.setattr("service.store.columns._MOST_BYTES", 10)
    assert read(opened).matching(parse_filter({"few": 1}), opened._reader) is None
    assert Columns.read(opened._reader, lambda: True) is None


def test_a_large_store_reads_them_and_knows_what_changed_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.store.maintenance._MANY_ITEMS", 100)
    store = EmbeddedStore(tmp_path / "store", card(), D)
    store.add(items([{"odd": bool(number % 2)} for number in range(200)]))
    store.settle()
    columns = store._filters.columns
    assert columns is not None
    odd, even = parse_filter({"odd": True}), parse_filter({"odd": False})
    store.set_metadata("0", lambda _: {"odd": True})
    store.remove("1")
    store.add([NewItem("new", {"odd": True}, None, "d", "fp32", -unit(1, D)[0], b"t", None)])
    assert store.count(odd) == 101
    assert store.count(even) == 99
    assert [hit.id for hit in store.search(-unit(1, D), 1, odd)[0]] == ["new"]
    for number in range(2, 60):
        store.remove(str(number))
    store.settle()
    later = store._filters.columns
    assert later is not None
    assert later.sequence > columns.sequence
    assert store.count(parse_filter({"odd": {"$in": [True]}})) == 101 - 29
    store.close()
    assert np.all(np.diff(later._keys) > 0)
