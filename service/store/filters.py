"""Filters on metadata: JSON as users of vector databases write it → a condition that SQLite can answer.

    {"label": "7"}                        equal; also {"label": {"$eq": "7"}}
    {"place.city": "Rome"}                the field city of the object, or of an object in the list, in the field place
    {"label": {"$in": ["7", "8"]}}        one of them
    {"label": {"$ne": "7"}}, {"label": {"$nin": ["7", "8"]}}   not this value, none of them
    {"label": {"$exists": true}}          the field is there, even with null; false: it is not
    {"label": {"$contains": "7"}}         a text with this text in it, or a list with this value
    {"year": {"$gte": 2000, "$lt": 2010}} a range: of numbers, or of texts by code point
    {"$and": […]}, {"$or": […]}, {"$not": …}
    {}                                    every item

All fields of an object must match. As in MongoDB, a field that is a list matches a condition if the list has a member
that does, and a number in a name, as in "tags.0", is a place in a list. A field that an item lacks matches no value,
not even null, and no range. Types never mix: 7, "7" and true are three different values, 7 and 7.0 are the same. Texts
and names are equal however Unicode composes them.
"""

import json
import sys
import unicodedata
from typing import Any, NamedTuple

from service.errors import InvalidQuery
from service.names import unknown

_MAX_CONDITIONS = 100
_MAX_VALUES = 1000
_RANGES = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}
_FOR_FIELDS = ("$eq", "$ne", "$in", "$nin", *_RANGES, "$exists", "$contains")
_FOR_FILTERS = ("$and", "$or", "$not")
# Operators of MongoDB and of vector databases. A message may name them: they are words of ours, not a client's.
_OTHERS = (
    "$neq $notIn $not_in $nor $type $isNull $is_null $expr $jsonSchema $mod $regex $options $text "
    "$search $where $geoIntersects $geoWithin $near $nearSphere $all $any $elemMatch $size $bitsAllClear $bitsAllSet "
    "$bitsAnyClear $bitsAnySet $comment $rand $sampleRate $not_contains $containsAny $contains_any "
    "$containsAll $contains_all $like $ilike $between $startsWith $endsWith $overlap $range $xor"
)
_NEGATIONS = "$not $neq $notIn $not_in $nor $isNull $is_null $not_contains"
_MAX_INTEGER = 2**63 - 1
# The nodes along a name with dots: each has the rest of the name that is still to be found in it, null at its end.
# Keys may contain dots themselves, so a key matches if the rest is that key, or begins with it and a dot.
_WALK = """
    WITH RECURSIVE node(value, type, rest) AS (
        SELECT items.metadata, 'object', start.value FROM json_each(?) AS start
        UNION ALL
        SELECT inner.value, inner.type, substr(node.rest, length(inner.key) + 2)
        FROM node, json_each(iif(node.type IN ('object', 'array'), node.value, '[]')) AS inner
        WHERE substr(node.rest, 1, length(inner.key) + 1) = inner.key || '.'
        UNION ALL
        SELECT inner.value, inner.type, NULL
        FROM node, json_each(iif(node.type IN ('object', 'array'), node.value, '[]')) AS inner
        WHERE node.rest = CAST(inner.key AS TEXT)
        UNION ALL
        SELECT inner.value, 'object', node.rest
        FROM node, json_each(iif(node.type = 'array', node.value, '[]')) AS inner
        WHERE inner.type = 'object' AND node.rest IS NOT NULL
    )
    SELECT 1 FROM node WHERE rest IS NULL AND """


class Filter(NamedTuple):
    """A condition on a row of `items`: SQL with a ? for each value.

    Attributes:
        sql, values: the condition for SQLite.
        asked: the same as JSON text in the grammar above, for stores without SQL. There "$begins" and "$name" stand
            for `begins` and `has_name`; no user can ask for these two.
    """

    sql: str
    values: tuple[Any, ...]
    asked: str = "{}"


# The name that `folded` has in SQL.
FOLDED = "folded"
# Matches every item.
EVERY = Filter("TRUE", ())


def begins(prefix: str) -> Filter:
    """Return the condition that an id begins with a text, in any Unicode normal form."""
    prefix = unicodedata.normalize("NFC", prefix)
    asked = json.dumps({"$begins": prefix})
    # A range of an index. The order of UTF-8 is that of code points, of which the highest have no next one.
    head = prefix.rstrip(chr(sys.maxunicode))
    if not head:
        return Filter("items.id >= ?", (prefix,), asked) if prefix else EVERY
    # Surrogates are no characters.
    after = chr(0xE000 if head[-1] == "\ud7ff" else ord(head[-1]) + 1)
    return Filter("(items.id >= ? AND items.id < ?)", (prefix, head[:-1] + after), asked)


def folded(text: str) -> str:
    """Return a text without the difference of upper and lower case, in composed form.

    Source: the Unicode Standard, D145 (canonical caseless matching).
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())


def has_name(text: str) -> Filter:
    """Return the condition that an id has a text in it, whether in upper or lower case, in any Unicode normal form."""
    if not text:
        return EVERY
    # SQLite's own lower() knows the letters of ASCII alone. A text of ASCII has as many bytes as characters.
    own = f"iif(octet_length(items.id) = length(items.id), lower(items.id), {FOLDED}(items.id))"
    wanted = folded(_text(text, "name"))
    return Filter(f"instr({own}, ?) > 0", (wanted,), json.dumps({"$name": wanted}))


def both(one: Filter, other: Filter) -> Filter:
    """Return the condition that two conditions hold."""
    if EVERY in (one, other):
        return other if one == EVERY else one
    return _join("AND", [one, other])._replace(asked=f'{{"$and": [{one.asked}, {other.asked}]}}')


def parse_filter(content: Any) -> Filter:
    """Parse a filter.

    Args:
        content: the filter as parsed JSON, of at most 100 conditions.

    Raises:
        InvalidQuery: the content is no filter. The message states the expected form and does not repeat the content.
    """
    budget = [_MAX_CONDITIONS]
    return _parse(content, budget)._replace(asked=json.dumps(content))


def _parse(content: Any, budget: list[int]) -> Filter:
    if not isinstance(content, dict):
        raise InvalidQuery('filter: expected an object such as {"label": "7"} or {"$and": [...]}')
    if not content:
        return EVERY
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
        raise InvalidQuery(_refusal(name, _FOR_FILTERS, "$and, $or, $not or the name of a field"))
    if not isinstance(wanted, dict):
        wanted = {"$eq": wanted}
    if not wanted:
        raise InvalidQuery(f"filter: expected a value, or an object of {_listed('and')}, for a field")
    conditions = [_condition(operator, value, budget) for operator, value in wanted.items()]
    held = [condition for condition, negated in conditions if not negated]
    parts = [_field(name, held)] if held else []
    for condition, negated in conditions:
        if negated:
            field = _field(name, [condition])
            parts.append(Filter(f"NOT ({field.sql})", field.values))
    return _join("AND", parts)


def _condition(operator: str, wanted: Any, budget: list[int]) -> tuple[Filter, bool]:
    """Return a condition on the columns `type` and `value` of a field, and whether no value of the field may match."""
    budget[0] -= 1
    if budget[0] < 0:
        raise InvalidQuery(f"filter: expected at most {_MAX_CONDITIONS} conditions")
    if operator in ("$eq", "$ne"):
        return _of_list_or_value(_one_of([wanted])), operator == "$ne"
    if operator in ("$in", "$nin"):
        if not isinstance(wanted, list) or not 1 <= len(wanted) <= _MAX_VALUES:
            raise InvalidQuery(f"filter: {operator} expects a list of 1 to {_MAX_VALUES} values")
        return _of_list_or_value(_one_of(wanted)), operator == "$nin"
    if operator == "$exists":
        if not isinstance(wanted, bool):
            raise InvalidQuery("filter: $exists expects true or false")
        return EVERY, not wanted
    if operator == "$contains":
        return _of_list_or_value(_one_of([wanted]), _has_text(wanted)), False
    if operator not in _RANGES:
        raise InvalidQuery(_refusal(operator, _FOR_FIELDS, f"{_listed('or')} in the object of a field"))
    if isinstance(wanted, str):
        return _of_list_or_value(Filter(f"(type = 'text' AND value {_RANGES[operator]} ?)", (_text(wanted),))), False
    if isinstance(wanted, bool) or not isinstance(wanted, int | float):
        raise InvalidQuery(f"filter: {operator} expects a number or a text")
    numbers = Filter(f"(type IN ('integer', 'real') AND value {_RANGES[operator]} ?)", (number(wanted),))
    return _of_list_or_value(numbers), False


def _listed(word: str) -> str:
    return f"{', '.join(_FOR_FIELDS[:-1])} {word} {_FOR_FIELDS[-1]}"


def _refusal(name: str, known: tuple[str, ...], expected: str) -> str:
    """Return what to say about an operator that does not exist in its place."""
    lacking = name in _OTHERS.split()
    if lacking or name in (*_FOR_FIELDS, *_FOR_FILTERS):
        place = "is not an operator here" if lacking else "belongs in another place"
        negated = '; {"$not": {…}} around a filter negates it' if name in _NEGATIONS.split() else ""
        return f"filter: {name} {place}; expected {expected}{negated}"
    if name.startswith("$"):
        return f"filter: {unknown('an operator', name, known)}"
    return f'filter: expected {expected}; "a.b" is the name of the field b inside the field a'


def _has_text(wanted: Any) -> Filter:
    """Return the condition that a value is a text with this text in it."""
    if not isinstance(wanted, str):
        return Filter("FALSE", ())
    found_as = spellings(wanted)
    found = " OR ".join(["instr(value, ?) > 0"] * len(found_as))
    return Filter(f"(type = 'text' AND ({found}))", tuple(found_as))


def _one_of(values: list[Any]) -> Filter:
    """Return the condition that a value is one of these, on the columns `type` and `value`."""
    texts: list[str] = []
    numbers: list[int | float] = []
    conditions = []
    for value in values:
        match value:
            case None | True | False:
                conditions.append(Filter("type = ?", (json.dumps(value),)))
            case int() | float():
                numbers.append(number(value))
            case str():
                texts += spellings(value)
            case _:
                raise InvalidQuery(
                    "filter: expected a text, a number, true, false or null as value, or $in with a list of them"
                )
    # A list is one parameter, whatever its length: SQLite has a limit for them.
    if texts:
        conditions.append(Filter("(type = 'text' AND value IN (SELECT value FROM json_each(?)))", (json.dumps(texts),)))
    if numbers:
        sql = "(type IN ('integer', 'real') AND value IN (SELECT value FROM json_each(?)))"
        conditions.append(Filter(sql, (json.dumps(numbers),)))
    return _join("OR", list(dict.fromkeys(conditions)))


def _field(name: str, conditions: list[Filter]) -> Filter:
    # The name is compared as a value, because as a part of a JSON path it could name another field. So the SQL text is
    # ours alone.
    names = json.dumps(spellings(name))
    one_leaf = "SELECT 1 FROM json_each(items.metadata) WHERE key IN (SELECT value FROM json_each(?)) AND "
    # Through a list, a name with dots leads to several values, of which each condition may have its own.
    walk, groups = (_WALK, [[each] for each in conditions]) if "." in name else (one_leaf, [conditions])
    tests = [_join("AND", group) for group in groups]
    return _join("AND", [Filter(f"EXISTS ({walk} {test.sql})", (names, *test.values)) for test in tests])


def _of_list_or_value(member: Filter, alone: Filter | None = None) -> Filter:
    """Return the condition that a field is a list of which a member matches `member`, or else matches `alone`."""
    alone = alone or member
    # The innermost table is the one that `type` and `value` name. CASE evaluates no branch but the one it takes.
    members = f"EXISTS (SELECT 1 FROM (SELECT value AS list) JOIN json_each(list) WHERE {member.sql})"  # noqa: S608
    return Filter(f"CASE type WHEN 'array' THEN {members} ELSE {alone.sql} END", member.values + alone.values)


def _join(word: str, filters: list[Filter]) -> Filter:
    values = tuple(value for each in filters for value in each.values)
    return Filter("(" + f" {word} ".join(each.sql for each in filters) + ")", values)


def number(value: int | float) -> int | float:
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


def spellings(text: str) -> list[str]:
    """Return a text as it is, composed and decomposed: metadata may have come in either form."""
    composed, decomposed = (unicodedata.normalize(form, _text(text)) for form in ("NFC", "NFD"))
    return list(dict.fromkeys([text, composed, decomposed]))


def _text(value: str, what: str = "filter") -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidQuery(f"{what}: expected whole characters") from error
    return value


DESCRIPTION = (
    'Conditions on metadata: {"label": "7"}, {"label": {"$in": ["7", "8"]}}, {"year": {"$gte": 2000, "$lt": 2010}}, '
    '{"place.city": "Rome"}, {"a": {"$exists": true}}, {"a": {"$contains": "b"}}, joined by $and, $or, $not. '
    "A list matches by any of its members; {} matches every item."
)


def json_schemas(prefix: str) -> dict[str, Any]:
    """Return the filter's grammar as JSON Schemas by name: Filter, and Condition for the object of one field.

    Args:
        prefix: the text before a name in a reference, such as "#/components/schemas/".
    """
    scalar = {"type": ["string", "number", "boolean", "null"]}
    several = {"type": "array", "minItems": 1, "maxItems": _MAX_VALUES, "items": scalar}
    filter, condition = {"$ref": f"{prefix}Filter"}, {"$ref": f"{prefix}Condition"}
    filters = {"type": "array", "minItems": 1, "items": filter}
    return {
        "Filter": {
            "title": "Filter",
            "description": "Conditions on metadata; several in one object must all hold, and {} matches every item.",
            "type": "object",
            "properties": {"$and": filters, "$or": filters, "$not": filter},
            "propertyNames": {"pattern": r"^([^$]|$|\$(and|or|not)$)"},
            "additionalProperties": {"anyOf": [scalar, condition]},
            "examples": [{"year": {"$gte": 2000}, "$not": {"label": "7"}}],
        },
        "Condition": {
            "title": "Condition",
            "type": "object",
            "minProperties": 1,
            "properties": {"$eq": scalar, "$ne": scalar, "$in": several, "$nin": several}
            | {"$exists": {"type": "boolean"}, "$contains": scalar}
            | {operator: {"type": ["string", "number"]} for operator in _RANGES},
            "additionalProperties": False,
        },
    }
