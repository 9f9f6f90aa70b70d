"""Rows of a collection as items, hits and fields, and the places of items in listings."""

import json
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from service import FloatArray
from service.errors import InvalidRequest, PageNotFound
from service.file_facts import FileFacts
from service.store import Field, Hit, Item, Value
from service.store.ranking import best_of

LONGEST_ID = 1024
# Milvus takes 65,536 bytes of JSON in a field; what else is in this one is short.
_LONGEST_SOURCE, _LONGEST_DIGEST = 32_768, 1024
# Milvus's own scores are of float32.
_ROUNDING = 1e-5
_MOST_VALUES, _LONGEST_VALUE = 12, 200

Row = dict[str, Any]


class Place(NamedTuple):
    """Where an item stands in an order: its value there, when it was added, and its id."""

    value: str | int | None
    added: int
    id: str


def check_lengths(row: Row) -> None:
    lengths = {
        "id": (row["id"], LONGEST_ID),
        "digest": (row["facts"]["digest"], _LONGEST_DIGEST),
        "source": (row["facts"]["source"] or "", _LONGEST_SOURCE),
    }
    for name, (text, most) in lengths.items():
        if len(text.encode()) > most:
            raise InvalidRequest(f"{name}: Milvus takes at most {most} bytes of it")


def facts_of(item: Item) -> dict[str, Any]:
    """Return what a row knows of an item beside its id and metadata; its pictures are not kept yet."""
    own = {"source": item.source, "digest": item.digest, "variant": item.variant, "pictures": ""}
    return own | file_facts(item.facts, item.mtime_ns)


def file_facts(facts: FileFacts, mtime_ns: int | None) -> dict[str, Any]:
    return facts._asdict() | {"mtime_ns": mtime_ns}


def item_of(row: Row) -> Item:
    facts = row["facts"]
    fields = (row["id"], row["metadata"], facts["source"], facts["digest"], facts["variant"])
    return Item(*fields, facts=FileFacts(*(facts[name] for name in FileFacts._fields)), mtime_ns=facts["mtime_ns"])


def cut_short(found: list[Any], k: int, most: int) -> bool:
    """Return whether items that were not found may have the score of the last hit."""
    if len(found) < most:
        return False
    scores = sorted((hit["distance"] for hit in found), reverse=True)
    return bool(scores[-1] > scores[k - 1] - _ROUNDING)


def ranked(queries: FloatArray, found: list[list[Any]], k: int) -> list[list[Hit]]:
    """Return the best k candidates of each query by exact cosine, equal scores in the order of adding."""
    entities = {hit["entity"]["id"]: hit["entity"] for own in found for hit in own}
    if not entities:
        return [[] for _ in found]
    order = sorted(entities.values(), key=lambda one: (one["added"], one["id"]))
    rows = {one["id"]: row for row, one in enumerate(order)}
    vectors = np.asarray([one["vector"] for one in order], np.float32)
    # Milvus may find an item twice while it is being replaced.
    candidates = [sorted({rows[hit["entity"]["id"]] for hit in own}) for own in found]
    lengths = np.asarray([len(own) for own in candidates])
    places = np.asarray([row for own in candidates for row in own], np.int64)
    best, scores = best_of(queries, lengths, vectors[places], places, k)
    best = places[best]
    shown = {row: json.dumps(order[row]["metadata"], ensure_ascii=False) for row in np.unique(best).tolist()}
    hits = [Hit(order[row]["id"], score, shown[row]) for row, score in zip(best.tolist(), scores.tolist(), strict=True)]
    ends = np.cumsum(np.minimum(lengths, k)).tolist()
    return [hits[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def kind_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "false" if not value else "true"
        case int() | float():
            return "number"
    return "text"


def field_of(name: str, total: int, values: Counter[tuple[str, Any]]) -> Field:
    """Return a field as Store.fields describes it."""
    shown = [
        (kind, value, count)
        for (kind, value), count in values.items()
        if (kind != "text" or len(value) <= _LONGEST_VALUE) and (count > 1 or len(values) <= _MOST_VALUES)
    ]
    shown.sort(key=lambda one: (-one[2], one[0], one[1] if one[0] in ("number", "text") else 0))
    return Field(name, total, len(values), [Value(value, count) for _, value, count in shown[:_MOST_VALUES]])


def cursor_of(place: Place) -> str:
    return json.dumps(place).encode().hex()


def place_of(cursor: str) -> Place | None:
    """Return the place that a cursor stands for, None for the first page. Raises PageNotFound."""
    if not cursor:
        return None
    try:
        value, added, id = json.loads(bytes.fromhex(cursor))
    except (ValueError, TypeError) as error:
        raise no_cursor() from error
    if not isinstance(added, int) or not isinstance(id, str) or not isinstance(value, str | int | None):
        raise no_cursor()
    return Place(value, added, id)


def no_cursor() -> PageNotFound:
    return PageNotFound("cursor: it is none of this order; begin again without a cursor")
