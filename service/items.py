"""The rules for items: id, metadata, a patch of that metadata, and the picture that becomes an item."""

import json
import unicodedata
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from service.errors import InvalidRequest

P = TypeVar("P")

# SQLite's own JSON functions fail at 1000 levels.
_MAX_DEPTH = 32


@dataclass(frozen=True)
class NewPicture(Generic[P]):
    """A picture to add to the gallery.

    Attributes:
        id: as `check_id` returns it.
        picture: the bytes of the image file, or the picture that `Gallery.read` decoded from them.
        metadata: a JSON object that `check_metadata` accepts.
        source: where the picture came from, such as a path; None for a picture sent over HTTP.
        keep_metadata: an item that is replaced keeps its metadata, except the fields that `metadata` has.
        keep_original: the store keeps the bytes of the image file, unless its settings forbid it.
        mtime_ns: when the file was changed last, in nanoseconds since 1970; None if that is unknown.
    """

    id: str
    picture: P
    metadata: dict[str, Any]
    source: str | None = None
    keep_metadata: bool = False
    keep_original: bool = True
    mtime_ns: int | None = None


def check_id(id: str, max_bytes: int) -> str:
    """Return an id in Unicode's composed form (NFC).

    Args:
        id: 1 to `max_bytes` bytes of UTF-8 without control characters, other than "." and "..".
        max_bytes: the limit.

    Raises:
        InvalidRequest: the id breaks one of these rules.
    """
    id = unicodedata.normalize("NFC", id)
    categories = {unicodedata.category(character) for character in id}
    if "Cs" in categories:
        raise InvalidRequest("id: expected UTF-8; a file whose name has other bytes needs another name")
    if "Cc" in categories:
        raise InvalidRequest("id: expected text without control characters")
    if not 1 <= len(id.encode()) <= max_bytes:
        raise InvalidRequest(f"id: expected 1 to {max_bytes} bytes, got {len(id.encode())}")
    # Browsers and most HTTP clients take them out of an address, however they are spelt.
    if id in (".", ".."):
        raise InvalidRequest("id: must not be . or .., which no address can name")
    return id


def check_metadata(metadata: dict[str, Any], max_bytes: int) -> dict[str, Any]:
    """Return the metadata unchanged.

    Args:
        metadata: a JSON object of finite numbers and valid text, nested at most 32 levels deep.
        max_bytes: limit on its JSON in UTF-8.

    Raises:
        InvalidRequest: the metadata breaks one of these rules.
    """
    if _depth(metadata) > _MAX_DEPTH:
        raise InvalidRequest(f"metadata: expected at most {_MAX_DEPTH} levels of nesting")
    # The store accepts only metadata that it can write back out.
    try:
        size = len(json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode())
    except ValueError as error:
        raise InvalidRequest("metadata: expected finite numbers and whole characters") from error
    if size > max_bytes:
        raise InvalidRequest(f"metadata: expected at most {max_bytes} bytes, got {size}")
    return metadata


def merge_patch(metadata: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata after a JSON merge patch: null removes a field, objects merge, other values replace.

    Neither argument is changed.

    Source: RFC 7396.
    """
    merged = dict(metadata)
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict):
            old = merged.get(name)
            merged[name] = merge_patch(old if isinstance(old, dict) else {}, value)
        else:
            merged[name] = value
    return merged


def _depth(content: Any) -> int:
    """Return the levels of nesting, counted level by level because a client could exhaust a recursion."""
    depth, level = 0, [content]
    while level := [inside for inside in level if isinstance(inside, dict | list)]:
        depth += 1
        level = [one for inside in level for one in (inside.values() if isinstance(inside, dict) else inside)]
    return depth
