"""Filters: SQLite gives the same answer as a plain implementation of the rules, for any metadata."""

import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import apsw
import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from service.errors import InvalidQuery
from service.store import NewItem
from service.store.embedded import EmbeddedStore
from service.store.filters import begins, both, parse_filter

_names = st.sampled_from(["a", "b", "label", 'x"y', "$.a", "", "é", "a.b"])
_asked_names = _names | st.sampled_from(
    ["a.a", "a.b.a", "b.a.b", "a.0", "a.1.b", "a.0.a", "b.a.b.a", ".", "a.", "e\u0301"]
)
_numbers = st.integers(-3, 3) | st.sampled_from([0.5, 2.0, -1e300, 2**53, 2**63, -(2**63)])
_scalars: Any = (
    st.none() | st.booleans() | _numbers | st.sampled_from(["", "a", "b", "7", "1", "true", "é", "e\u0301", "a\0b"])
)
_inside = st.dictionaries(
    st.sampled_from(["a", "b", "a.b", "0", ""]), _scalars | st.lists(_scalars, max_size=2), max_size=3
)
_values = st.recursive(
    _scalars | _inside,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
    max_leaves=4,
)
_metadata = st.dictionaries(_names, _values, max_size=4)
_bounds = _numbers | st.sampled_from(["", "a", "b", "é"])
_conditions: Any = st.dictionaries(
    st.sampled_from(["$gt", "$gte", "$lt", "$lte"]), _bounds, min_size=1, max_size=2
) | st.dictionaries(st.sampled_from(["$in", "$nin"]), st.lists(_scalars, min_size=1, max_size=3), min_size=1)
_conditions |= st.dictionaries(st.sampled_from(["$ne", "$eq", "$contains"]), _scalars, min_size=1, max_size=2)
_conditions |= st.fixed_dictionaries({"$exists": st.booleans()}, optional={"$ne": _scalars, "$lt": _bounds})
_fields = st.dictionaries(
    _asked_names.filter(lambda name: not name.startswith("$")), _scalars | _conditions, max_size=3
)
_filters = st.recursive(
    _fields,
    lambda inner: (
        st.fixed_dictionaries({"$and": st.lists(inner, min_size=1, max_size=3)})
        | st.fixed_dictionaries({"$or": st.lists(inner, min_size=1, max_size=3)})
        | st.fixed_dictionaries({"$not": inner})
    ),
    max_leaves=6,
)


def kind(value: Any) -> str:
    for kinds, name in (((bool,), "bool"), ((int, float), "number"), ((str,), "text"), ((type(None),), "null")):
        if isinstance(value, kinds):
            return name
    return "other"


def equal(have: Any, wanted: Any) -> bool:
    if kind(have) != kind(wanted) or kind(have) == "other":
        return False
    if kind(have) == "text":
        return unicodedata.normalize("NFC", have) == unicodedata.normalize("NFC", wanted)
    return bool(float(have) == float(wanted)) if kind(have) == "number" and abs(have) >= 2**53 else bool(have == wanted)


def found(node: Any, name: str) -> Iterator[Any]:
    """All values to which a name with dots leads."""
    if isinstance(node, list):
        for part in node:
            if isinstance(part, dict):
                yield from found(part, name)
        node = {str(place): part for place, part in enumerate(node)}
    for key, value in node.items() if isinstance(node, dict) else ():
        if unicodedata.normalize("NFC", key) == unicodedata.normalize("NFC", name):
            yield value
        if name.startswith(key + "."):
            yield from found(value, name[len(key) + 1 :])


def meets(metadata: dict[str, Any], content: dict[str, Any]) -> bool:
    """A plain implementation of the rules."""
    for name, wanted in content.items():
        if name == "$and":
            good = all(meets(metadata, each) for each in wanted)
        elif name == "$or":
            good = any(meets(metadata, each) for each in wanted)
        elif name == "$not":
            good = not meets(metadata, wanted)
        else:
            conditions = wanted if isinstance(wanted, dict) else {"$eq": wanted}
            good = all(field_holds([*found(metadata, name)], *condition) for condition in conditions.items())
        if not good:
            return False
    return True


def field_holds(values: list[Any], operator: str, wanted: Any) -> bool:
    """Whether a field that leads to these values matches one condition."""
    if operator == "$exists":
        return bool(values) is wanted
    if operator in ("$ne", "$nin"):
        return not field_holds(values, {"$ne": "$eq", "$nin": "$in"}[operator], wanted)
    if operator == "$contains":
        return any(
            any(equal(member, wanted) for member in have)
            if isinstance(have, list)
            else isinstance(have, str) and isinstance(wanted, str) and has_text(have, wanted)
            for have in values
        )
    return any(holds_for(have, operator, wanted) for have in values)


def has_text(have: str, wanted: str) -> bool:
    return any(unicodedata.normalize(form, wanted) in have for form in ("NFC", "NFD")) or wanted in have


def holds_for(have: Any, operator: str, wanted: Any) -> bool:
    return any(holds(each, operator, wanted) for each in (have if isinstance(have, list) else [have]))


def holds(have: Any, operator: str, wanted: Any) -> bool:
    if operator == "$eq":
        return equal(have, wanted)
    if operator == "$in":
        return any(equal(have, each) for each in wanted)
    if kind(have) != kind(wanted) or kind(have) not in ("number", "text"):
        return False
    left, right = (have, wanted) if kind(have) == "number" else (have.encode(), wanted.encode())
    return bool({"$gt": left > right, "$gte": left >= right, "$lt": left < right, "$lte": left <= right}[operator])


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(_metadata, min_size=1, max_size=6), content=_filters)
def test_sqlite_answers_as_the_rules_say(rows: list[dict[str, Any]], content: dict[str, Any]) -> None:
    database = apsw.Connection(":memory:")
    database.execute("CREATE TABLE items (key INTEGER PRIMARY KEY, metadata TEXT NOT NULL)")
    database.executemany(
        "INSERT INTO items VALUES (?, ?)",
        [(number, json.dumps(row, ensure_ascii=False)) for number, row in enumerate(rows)],
    )
    try:
        where = parse_filter(content)
    except InvalidQuery as error:
        assert "at most 100 conditions" in str(error)
        reject()
    matching = {key for (key,) in database.execute("SELECT key FROM items WHERE " + where.sql, where.values)}
    assert matching == {number for number, row in enumerate(rows) if meets(row, content)}


TAGGED = {"tags": ["red", "blue"], "place": {"city": "Rome"}, "years": [1990, 2020], "a.b": 1, "label": "Mu\u0308ller"}
TAGGED |= {"shots": [{"lens": "50mm", "iso": [100, 200]}, {"lens": "35mm"}]}


@pytest.mark.parametrize(
    ("content", "matches"),
    [
        ({"tags": "red"}, True),
        ({"tags": "green"}, False),
        ({"tags": {"$in": ["green", "blue"]}}, True),
        ({"years": {"$gt": 2000}}, True),
        ({"years": {"$gt": 2000, "$lt": 2000}}, True),
        ({"years": {"$gt": 2020}}, False),
        ({"tags.1": "blue"}, True),
        ({"tags.1": "red"}, False),
        ({"place.city": "Rome"}, True),
        ({"place.city": "Oslo"}, False),
        ({"place.city.name": "Rome"}, False),
        ({"$not": {"place.city": "Oslo"}}, True),
        ({"a.b": 1}, True),
        ({"shots.lens": "35mm"}, True),
        ({"shots.lens": {"$in": ["85mm", "50mm"]}}, True),
        ({"shots.0.lens": "35mm"}, False),
        ({"shots.iso": 200}, True),
        ({"label": "Müller"}, True),
        ({"label": {"$in": ["M\u00fcller"]}}, True),
        ({}, True),
        ({"$not": {}}, False),
        ({"$and": [{}, {"tags": "red"}]}, True),
        ({"tags": {"$ne": "red"}}, False),
        ({"tags": {"$ne": "green"}}, True),
        ({"nobody": {"$ne": "red"}}, True),
        ({"tags": {"$nin": ["green", "blue"]}}, False),
        ({"place.city": {"$exists": True}}, True),
        ({"place.street": {"$exists": True}}, False),
        ({"place.street": {"$exists": False}}, True),
        ({"shots.iso": {"$exists": True, "$ne": 300}}, True),
        ({"label": {"$contains": "üll"}}, True),
        ({"label": {"$contains": "lul"}}, False),
        ({"label": {"$contains": ""}}, True),
        ({"tags": {"$contains": "red"}}, True),
        ({"tags": {"$contains": "re"}}, False),
        ({"years": {"$contains": 2020}}, True),
        ({"a.b": {"$contains": 1}}, False),
    ],
)
def test_lists_and_names_with_dots_match_as_in_mongodb(content: Any, matches: bool) -> None:
    assert meets(TAGGED, content) is matches
    where = parse_filter(content)
    database = apsw.Connection(":memory:")
    database.execute("CREATE TABLE items AS SELECT ? AS metadata", (json.dumps(TAGGED),))
    assert database.execute("SELECT " + where.sql + " FROM items", where.values).fetchall() == [(int(matches),)]


def test_the_largest_filter_is_answered(store: EmbeddedStore) -> None:
    content = {"$or": [{f"a.{n}": {"$in": [f"é{value}" for value in range(1000)]}} for n in range(33)]}
    (hits,) = store.search(np.eye(1, store_dimension(store), dtype=np.float32), 3, parse_filter(content))
    assert hits == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "expected an object such as"),
        ({"$nor": []}, '$nor is not an operator here; expected $and, $or, $not or the name of a field; {"$not"'),
        ({"$nott": {"a": 1}}, "an operator that is not known here; the nearest is $not"),
        ({"$gt": 3}, "$gt belongs in another place"),
        ({"a": {"$not": {"$eq": 1}}}, "$not belongs in another place; expected $eq, $ne, $in"),
        ({"$ne": 1}, "$ne belongs in another place; expected $and"),
        ({"a": {"$regex": "^x"}}, "$regex is not an operator here; expected $eq, $ne, $in, $nin, $gt, $gte, $lt, $lte"),
        ({"a": {"$not_in": [1]}}, "$not_in is not an operator here; expected $eq, $ne, $in, $nin"),
        ({"a": {"$exists": 1}}, "$exists expects true or false"),
        ({"a": {"$contains": ["x"]}}, "expected a text, a number"),
        ({"a": {"$nin": []}}, "$nin expects a list of 1 to 1000"),
        ({"a": {"$gt": 1, "$elemMatch": {}}}, "$elemMatch is not an operator here"),
        ({"a": {"$gtee": 1}}, "the nearest is $gte"),
        ({"a": {"city": "Rome"}}, '"a.b" is the name of the field b inside the field a'),
        ({"$and": []}, "$and expects a list"),
        ({"$or": {}}, "$or expects a list"),
        ({"$not": 3}, "expected an object such as"),
        ({"a": {}}, "expected a value"),
        ({"a": {"$like": "x"}}, "$like is not an operator here; expected $eq, $ne"),
        ({"a": {"$in": []}}, "$in expects a list of 1 to 1000"),
        ({"a": {"$in": [1] * 1001}}, "$in expects a list of 1 to 1000"),
        ({"a": {"$gt": True}}, "$gt expects a number or a text"),
        ({"a": {"$lte": None}}, "$lte expects a number or a text"),
        ({"a": [1]}, "expected a text, a number"),
        ({"a": float("nan")}, "finite numbers"),
        ({"a": 10**400}, "a number is too large"),
        ({"a": "\ud800"}, "whole characters"),
        ({str(n): n for n in range(51)}, "at most 100 conditions"),
    ],
)
def test_filters_that_are_refused(content: Any, says: str) -> None:
    with pytest.raises(InvalidQuery) as refused:
        parse_filter(content)
    assert says in str(refused.value)


def test_depth_is_bounded() -> None:
    content: dict[str, Any] = {"a": 1}
    for _ in range(101):
        content = {"$not": content}
    with pytest.raises(InvalidQuery, match="at most 100 conditions"):
        parse_filter(content)


def test_a_filtered_search_is_the_search_of_what_is_left(store: EmbeddedStore) -> None:
    rows = np.random.default_rng(0).standard_normal((60, store_dimension(store))).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    store.add(
        [NewItem(f"{n}", {"n": n, "odd": n % 2 == 1}, None, "d", "fp32", row, b"t", None) for n, row in enumerate(rows)]
    )
    for content in ({"odd": True}, {"n": {"$lt": 5}}, {"n": {"$gte": 1000}}, {"$not": {"odd": True}}):
        where = parse_filter(content)
        (hits,) = store.search(rows[:1], 10, where)
        kept = [n for n in range(60) if meets({"n": n, "odd": n % 2 == 1}, content)]
        best = sorted(kept, key=lambda n: -float(rows[n] @ rows[0]))[:10]
        assert [hit.id for hit in hits] == [str(n) for n in best]


def store_dimension(store: EmbeddedStore) -> int:
    return int(store._reader.meta["dimension"])


def test_a_filter_that_was_asked_before_knows_what_changed_since(store: EmbeddedStore) -> None:
    rows = np.random.default_rng(1).standard_normal((600, store_dimension(store))).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    model: dict[str, dict[str, Any]] = {}

    def put(numbers: Iterable[int], odd: Callable[[int], bool]) -> None:
        new = {n: {"odd": odd(n)} for n in numbers}
        store.add([NewItem(f"{n}", metadata, None, "d", "fp32", rows[n], b"t", None) for n, metadata in new.items()])
        model.update({f"{n}": metadata for n, metadata in new.items()})

    # There are too many items for all of them to be candidates.
    put(range(600), lambda n: n % 2 == 1)
    for step in range(40):
        store.set_metadata(f"{step}", lambda metadata: {"odd": not metadata["odd"]})
        model[f"{step}"] = {"odd": not model[f"{step}"]["odd"]}
        assert store.remove(f"{step + 100}")
        del model[f"{step + 100}"]
        put([step + 200], lambda _: True)
        for content in ({"odd": True}, {"odd": False}, {"$not": {"odd": True}}, {"odd": {"$in": [True, step]}}):
            (hits,) = store.search(rows[step : step + 1], 10, parse_filter(content))
            kept = [id for id, metadata in model.items() if meets(metadata, content)]
            best = sorted(kept, key=lambda id: -float(rows[int(id)] @ rows[step]))[:10]
            assert [hit.id for hit in hits] == best


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=4), unique=True),
    prefix=st.text(st.sampled_from(["a", "b", "/", "\ud7ff", "\ue000", "\U0010ffff", "é"]), max_size=3),
)
def test_a_prefix_is_the_beginning_of_an_id(ids: list[str], prefix: str) -> None:
    composed = {unicodedata.normalize("NFC", id) for one in ids for id in (one, prefix + one)}
    database = apsw.Connection(":memory:")
    database.execute("CREATE TABLE items (id TEXT NOT NULL UNIQUE, metadata TEXT)")
    database.executemany("INSERT INTO items VALUES (?, '{}')", [(id,) for id in composed])
    where = both(parse_filter({}), begins(prefix))
    found = {id for (id,) in database.execute("SELECT id FROM items WHERE " + where.sql, where.values)}
    assert found == {id for id in composed if id.startswith(unicodedata.normalize("NFC", prefix))}
