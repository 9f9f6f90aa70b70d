"""Filters on metadata: JSON as users of vector databases write it → a condition that SQLite can answer.

    {"label": "7"}                        equal; also {"label": {"$eq": "7"}}
    {"label": {"$in": ["7", "8"]}}        one of them
    {"year": {"$gte": 2000, "$lt": 2010}} a range: of numbers, or of texts by code point
    {"$and": […]}, {"$or": […]}, {"$not": …}

All fields of an object must match. A field that an item lacks matches no value, not even null, and no range. Types
never mix: 7, "7" and true are three different values, 7 and 7.0 are the same.
"""

from typing import Any, NamedTuple

from service.errors import InvalidQuery

_MAX_CONDITIONS = 100
_MAX_VALUES = 1000
_RANGES = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}
_MAX_INTEGER = 2**63 - 1


class Filter(NamedTuple):
    """A condition on a row of `items`: SQL with a ? for each value."""

    sql: str
    values: tuple[Any, ...]


def parse_filter(content: Any) -> Filter:
    """Parse a filter.

    Args:
        content: the filter as parsed JSON, of at most 100 conditions.

    Raises:
        InvalidQuery: the content is no filter. The message states the expected form and does not repeat the content.
    """
    budget = [_MAX_CONDITIONS]
    return _parse(content, budget)


def _parse(content: Any, budget: list[int]) -> Filter:
    if not isinstance(content, dict) or not content:
        raise InvalidQuery('filter: expected an object such as {"label": "7"} or {"$and": [...]}')
    return _join("AND", [_member(name, wanted, budget) for name, wanted in content.items()])


def _member(name: str, wanted: Any, budget: list[int]) -> Filter:
    # Each level of nesting costs one, so this bounds the depth, too.
    budget[0] -= 1
    if budget[0] < 0:
        raise InvalidQuery(f"filter: expected at most {_MAX_CONDITIONS} conditions")
    if name in ("$and", "$or"):
        if not isinstance(wanted, list) or not wanted:
            raise InvalidQuery(f"filter: {name} expects a list of one or more filters")
        return _join(name[1:].upper(), [_parse(each, budget) for each in wanted])
    if name == "$not":
        inner = _parse(wanted, budget)
        return Filter(f"NOT ({inner.sql})", inner.values)
    if name.startswith("$"):
        raise InvalidQuery("filter: expected $and, $or, $not or the name of a field")
    if not isinstance(wanted, dict):
        wanted = {"$eq": wanted}
    if not wanted:
        raise InvalidQuery("filter: expected a value, or an object of $eq, $in, $gt, $gte, $lt, $lte, for a field")
    return _field(name, [_condition(operator, value, budget) for operator, value in wanted.items()])


def _condition(operator: str, wanted: Any, budget: list[int]) -> Filter:
    budget[0] -= 1
    if budget[0] < 0:
        raise InvalidQuery(f"filter: expected at most {_MAX_CONDITIONS} conditions")
    if operator == "$eq":
        return _equal(wanted)
    if operator == "$in":
        if not isinstance(wanted, list) or not 1 <= len(wanted) <= _MAX_VALUES:
            raise InvalidQuery(f"filter: $in expects a list of 1 to {_MAX_VALUES} values")
        return _join("OR", [_equal(value) for value in wanted])
    if operator not in _RANGES:
        raise InvalidQuery("filter: expected $eq, $in, $gt, $gte, $lt or $lte in the object of a field")
    if isinstance(wanted, str):
        return Filter(f"(type = 'text' AND value {_RANGES[operator]} ?)", (_text(wanted),))
    if isinstance(wanted, bool) or not isinstance(wanted, int | float):
        raise InvalidQuery(f"filter: {operator} expects a number or a text")
    return Filter(f"(type IN ('integer', 'real') AND value {_RANGES[operator]} ?)", (_number(wanted),))


def _equal(value: Any) -> Filter:
    match value:
        case None:
            return Filter("type = 'null'", ())
        case bool():
            return Filter("type = ?", ("true" if value else "false",))
        case int() | float():
            return Filter("(type IN ('integer', 'real') AND value = ?)", (_number(value),))
        case str():
            return Filter("(type = 'text' AND value = ?)", (_text(value),))
    raise InvalidQuery("filter: expected a text, a number, true, false or null as value")


def _field(name: str, conditions: list[Filter]) -> Filter:
    # The name is compared as a value, because as a part of a JSON path it could name another field. So the SQL text is
    # ours alone.
    inner = _join("AND", conditions)
    sql = f"EXISTS (SELECT 1 FROM json_each(items.metadata) WHERE key = ? AND {inner.sql})"  # noqa: S608
    return Filter(sql, (_text(name), *inner.values))


def _join(word: str, filters: list[Filter]) -> Filter:
    values = tuple(value for each in filters for value in each.values)
    return Filter("(" + f" {word} ".join(each.sql for each in filters) + ")", values)


def _number(value: int | float) -> int | float:
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise InvalidQuery("filter: expected finite numbers")
        return value
    if -_MAX_INTEGER <= value <= _MAX_INTEGER:
        return value
    try:
        # SQLite, too, reads so large an integer in JSON as a double.
        return float(value)
    except OverflowError as error:
        raise InvalidQuery("filter: a number is too large") from error


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidQuery("filter: expected whole characters") from error
    return value


DESCRIPTION = (
    'Conditions on metadata: {"label": "7"}, {"label": {"$in": ["7", "8"]}}, {"year": {"$gte": 2000, "$lt": 2010}}, '
    "joined by $and, $or, $not."
)


def json_schemas(prefix: str) -> dict[str, Any]:
    """Return the filter's grammar as JSON Schemas by name: Filter, and Condition for the object of one field.

    Args:
        prefix: the text before a name in a reference, such as "#/components/schemas/".
    """
    scalar = {"type": ["string", "number", "boolean", "null"]}
    filter, condition = {"$ref": f"{prefix}Filter"}, {"$ref": f"{prefix}Condition"}
    filters = {"type": "array", "minItems": 1, "items": filter}
    return {
        "Filter": {
            "title": "Filter",
            "description": "Conditions on metadata; several in one object must all hold.",
            "type": "object",
            "minProperties": 1,
            "properties": {"$and": filters, "$or": filters, "$not": filter},
            "patternProperties": {"^[^$]": {"anyOf": [scalar, condition]}},
            "additionalProperties": False,
            "examples": [{"year": {"$gte": 2000}, "$not": {"label": "7"}}],
        },
        "Condition": {
            "title": "Condition",
            "type": "object",
            "minProperties": 1,
            "properties": {
                "$eq": scalar,
                "$in": {"type": "array", "minItems": 1, "maxItems": _MAX_VALUES, "items": scalar},
            }
            | {operator: {"type": ["string", "number"]} for operator in _RANGES},
            "additionalProperties": False,
        },
    }
