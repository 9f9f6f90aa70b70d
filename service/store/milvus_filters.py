"""Filters on Milvus: metadata → terms and bounds that Milvus indexes, and a filter → a condition on these.

Milvus has no operator for "a member of the list is in the range", nor for names that lead through lists. So each item
carries what its metadata answer, and every operator of filters.py means the same on both stores:

    terms   hashes of (kind, name, value): what the field of a name equals, has among its members, or that it is there
    index   JSON by the hash of a name: the least and the largest number and text of the field, and its texts;
            by "name" the item's id, its letters folded

A name with dots has entries for every way on which it leads to a value. Texts are stored in an encoding of their own,
in which LIKE finds no wildcard and the order is that of code points.
"""

import json
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import orjson

from service.errors import InvalidRequest
from service.store.filters import begins, folded, number, spellings

# Of an array in Milvus.
MOST_TERMS = 4096
TERM_LENGTH = 20
# Milvus takes 65,536 bytes of JSON in a field, and the id, folded and encoded, has at most 8,192.
_MOST_INDEX_BYTES, _MOST_NAME_BYTES = 57_000, 8192
# Kinds of terms: a value of the field or of its members, a member alone, the field itself, a bound of one type.
_VALUE, _MEMBER, _FIELD, _NUMBERS, _TEXTS = "=", "[", "?", "n", "t"
_HIGH, _LOW = "ghijklmnopqrstuv", "0123456789abcdef"
_LETTERS = [high + low for high in _HIGH for low in _LOW]
_BETWEEN = "."
_RANGES = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}
_TRUE, _FALSE = 'id != ""', 'id == ""'


def encoded(text: str) -> str:
    """Return a text with each byte of its UTF-8 as two letters, the first one of g to v and the second of 0 to f.

    The order stays. No match of a part begins in the middle of a byte, and no letter is a wildcard or needs a quote.
    """
    return "".join([_LETTERS[byte] for byte in text.encode()])


def quoted(text: str) -> str:
    """Return a text without control characters as a literal of Milvus."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def index_of(id: str, metadata: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the terms and the index of an item's id and metadata.

    Raises:
        InvalidRequest: the id is longer, or the metadata has more values, than Milvus indexes.
    """
    terms: set[str] = set()
    numbers: dict[str, list[float]] = {}
    texts: dict[str, list[str]] = {}
    alone: dict[str, list[str]] = {}
    for name, value in _named("", metadata):
        terms.add(_term(_FIELD, name))
        members = value if isinstance(value, list) else [value]
        for member in members:
            if isinstance(member, dict | list):
                continue
            terms.add(_term(_VALUE, name, member))
            if isinstance(value, list):
                terms.add(_term(_MEMBER, name, member))
            if isinstance(member, str):
                texts.setdefault(name, []).append(encoded(member))
                if not isinstance(value, list):
                    alone.setdefault(name, []).append(encoded(member))
            elif isinstance(member, int | float) and not isinstance(member, bool):
                numbers.setdefault(name, []).append(number(member))
        if len(terms) > MOST_TERMS:
            break
    index: dict[str, Any] = {}
    for name, many in numbers.items():
        terms.add(_term(_NUMBERS, name))
        index |= {_key(name, "a"): min(many), _key(name, "b"): max(many)}
    for name, written in texts.items():
        terms.add(_term(_TEXTS, name))
        index |= {_key(name, "c"): min(written), _key(name, "d"): max(written)}
    for name, written in alone.items():
        index[_key(name, "e")] = _BETWEEN.join(written)
    if len(terms) > MOST_TERMS or len(orjson.dumps(index)) > _MOST_INDEX_BYTES:
        raise InvalidRequest(
            f"metadata: expected at most {MOST_TERMS} values and {_MOST_INDEX_BYTES // 3} bytes of texts, which is "
            "what Milvus indexes"
        )
    index["name"] = encoded(folded(id))
    if len(index["name"]) > _MOST_NAME_BYTES:
        raise InvalidRequest(f"id: expected at most {_MOST_NAME_BYTES // 2} bytes once its letters are folded")
    return sorted(terms), index


def _named(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values inside an object or a list, each by the names that lead to it, as `_WALK` in filters.py."""
    inside = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in inside:
        name = f"{prefix}{key}"
        yield unicodedata.normalize("NFC", name), value
        if isinstance(value, dict | list):
            yield from _named(f"{name}.", value)
        if isinstance(node, list) and isinstance(value, dict):
            yield from _named(prefix, value)


def condition_of(asked: str) -> str:
    """Return the condition for Milvus that a filter asks for, "" for every item.

    Args:
        asked: as Filter has it.
    """
    content = json.loads(asked)
    return _all_of(content) if content else ""


def _all_of(content: dict[str, Any]) -> str:
    return _joined("and", [_member(name, wanted) for name, wanted in content.items()]) if content else _TRUE


def _member(name: str, wanted: Any) -> str:
    match name:
        case "$and" | "$or":
            return _joined(name[1:], [_all_of(each) for each in wanted])
        case "$not":
            return f"not ({_all_of(wanted)})"
        case "$begins":
            # The bounds are those of SQLite's index.
            bounds = [quoted(bound) for bound in begins(wanted).values]
            return _joined("and", [f"id {sign} {bound}" for sign, bound in zip((">=", "<"), bounds, strict=False)])
        case "$name":
            return f'index["name"] like "%{encoded(wanted)}%"'
    name = unicodedata.normalize("NFC", name)
    conditions = wanted if isinstance(wanted, dict) else {"$eq": wanted}
    return _joined("and", [_condition(name, operator, value) for operator, value in conditions.items()])


def _condition(name: str, operator: str, wanted: Any) -> str:
    match operator:
        case "$eq" | "$in":
            return _has(_VALUE, name, wanted if operator == "$in" else [wanted])
        case "$ne" | "$nin":
            return f"not ({_has(_VALUE, name, wanted if operator == '$nin' else [wanted])})"
        case "$exists":
            there = f'array_contains(terms, "{_term(_FIELD, name)}")'
            return there if wanted else f"not ({there})"
        case "$contains":
            return _contains(name, wanted)
    return _range(name, operator, wanted)


def _has(kind: str, name: str, values: list[Any]) -> str:
    terms = sorted({f'"{_term(kind, name, value)}"' for value in values})
    return f"array_contains_any(terms, [{', '.join(terms)}])"


def _contains(name: str, wanted: Any) -> str:
    member = _has(_MEMBER, name, [wanted])
    if not isinstance(wanted, str):
        return member
    field = f'index["{_key(name, "e")}"]'
    parts = [f'{field} like "%{encoded(spelling)}%"' for spelling in spellings(wanted)]
    return _joined("or", [member, f"{_there(_TEXTS, name)} and exists {field} and {_joined('or', parts)}"])


def _range(name: str, operator: str, wanted: Any) -> str:
    """Return the condition that some value is above, or below, a bound: the largest one is, or the least one."""
    above = operator in ("$gt", "$gte")
    if isinstance(wanted, str):
        kind, letter, bound = _TEXTS, "d" if above else "c", f'"{encoded(wanted)}"'
    else:
        kind, letter, bound = _NUMBERS, "b" if above else "a", repr(number(wanted))
    # A comparison with a key that is not there is neither true nor false, and so would be its negation.
    return f'({_there(kind, name)} and index["{_key(name, letter)}"] {_RANGES[operator]} {bound})'


def _there(kind: str, name: str) -> str:
    return f'array_contains(terms, "{_term(kind, name)}")'


def _joined(word: str, conditions: list[str]) -> str:
    return "(" + f" {word} ".join(f"({each})" for each in conditions) + ")"


def _term(kind: str, name: str, value: Any = None) -> str:
    """Return the hash of a kind, a name and a value, in TERM_LENGTH hexadecimal digits."""
    match value:
        case None:
            shown = "null"
        case bool():
            shown = "true" if value else "false"
        case int() | float():
            # 7 and 7.0 are the same.
            exact = number(value)
            shown = f"n{int(exact) if exact == int(exact) and abs(exact) < 2**63 else exact!r}"
        case _:
            shown = f"t{unicodedata.normalize('NFC', value)}"
    return _hashed(f"{kind}{len(name)} {name} {shown}")


def _key(name: str, letter: str) -> str:
    return _hashed(name) + letter


# The names of fields, and their most frequent values, come again with every item.
@lru_cache(65_536)
def _hashed(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=TERM_LENGTH // 2).hexdigest()
