"""Filters on Milvus: its own evaluation gives the same answer as a plain implementation of the rules."""

import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from milvus_lite.schema.types import CollectionSchema, DataType, FieldSchema
from milvus_lite.search.filter import compile_filter, evaluate

from service.errors import InvalidQuery, InvalidRequest
from service.store.filters import Filter, begins, both, folded, has_name, parse_filter
from service.store.milvus_filters import MOST_TERMS, condition_of, encoded, index_of
from tests.service.store.test_filters import TAGGED, _filters, _metadata, meets

_SCHEMA = CollectionSchema(
    [
        FieldSchema("id", DataType.VARCHAR, is_primary=True, max_length=1024),
        FieldSchema("terms", DataType.ARRAY, element_type=DataType.VARCHAR, max_capacity=MOST_TERMS, max_length=20),
        FieldSchema("index", DataType.JSON),
    ]
)


def matching(rows: dict[str, dict[str, Any]], where: Filter) -> set[str]:
    """Return the ids of the rows of metadata that Milvus Lite finds."""
    condition = condition_of(where.asked)
    if not condition:
        return set(rows)
    indexes = [index_of(id, metadata) for id, metadata in rows.items()]
    table = pa.table(
        {
            "id": list(rows),
            "terms": pa.array([terms for terms, _ in indexes], pa.list_(pa.string())),
            "index": [json.dumps(index) for _, index in indexes],
        }
    )
    mask = evaluate(compile_filter(condition, _SCHEMA), table).to_pylist()
    return {id for id, match in zip(rows, mask, strict=True) if match}


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(_metadata, min_size=1, max_size=6), content=_filters)
def test_milvus_answers_as_the_rules_say(rows: list[dict[str, Any]], content: dict[str, Any]) -> None:
    try:
        where = parse_filter(content)
    except InvalidQuery:
        reject()
    found = matching({str(number): row for number, row in enumerate(rows)}, where)
    assert found == {str(number) for number, row in enumerate(rows) if meets(row, content)}


@pytest.mark.parametrize(
    "content",
    [
        {"years": {"$gt": 2000, "$lt": 2000}},
        {"years": {"$gt": 2020}},
        {"tags.1": "blue"},
        {"shots.lens": "35mm"},
        {"shots.0.lens": "35mm"},
        {"shots.iso": {"$gte": 200}},
        {"label": "Müller"},
        {"label": {"$contains": "üll"}},
        {"label": {"$contains": "%"}},
        {"label": {"$contains": "_"}},
        {"tags": {"$contains": "red"}},
        {"tags": {"$contains": "re"}},
        {"$not": {"nobody": {"$gt": 1}}},
        {"$not": {}},
        {"$and": [{}, {"tags": "red"}]},
        {"nobody": {"$ne": "red"}},
    ],
)
def test_lists_names_with_dots_and_wildcards(content: dict[str, Any]) -> None:
    assert (matching({"a": TAGGED}, parse_filter(content)) == {"a"}) is meets(TAGGED, content)


@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(
        st.text(st.sampled_from('aB/"\\%_é\ud7ff\ue000\U0010ffff'), min_size=1, max_size=4), min_size=1, unique=True
    ),
    prefix=st.text(st.sampled_from('a/"\\%é\ud7ff\U0010ffff'), max_size=2),
    name=st.text(st.sampled_from("abB%_éÉ"), max_size=2),
)
def test_prefixes_and_names_of_ids(ids: list[str], prefix: str, name: str) -> None:
    where = both(both(parse_filter({}), begins(prefix)), has_name(name))
    expected = {id for id in ids if id.startswith(prefix) and folded(name) in folded(id)}
    assert matching({id: {} for id in ids}, where) == expected


@settings(max_examples=200, deadline=None)
@given(one=st.text(st.characters(codec="utf-8")), other=st.text(st.characters(codec="utf-8")))
def test_the_encoding_of_texts_keeps_order_and_parts(one: str, other: str) -> None:
    assert (encoded(one) < encoded(other)) is (one.encode() < other.encode())
    assert (encoded(one) in encoded(other)) is (one in other)


@pytest.mark.parametrize("metadata", [{"a": list(range(5000))}, {"a": "x" * 40_000}])
def test_metadata_beyond_what_milvus_indexes_is_refused(metadata: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="expected at most 4096 values"):
        index_of("a", metadata)
