"""The answer with a stored file: its entity tag, 304 for a client that has it, and a range of its bytes (RFC 9110)."""

import re
from collections.abc import Callable

from fastapi import Request, Response

from service.errors import RangeNotSatisfiable
from service.http.problems import answer

# A client may keep a file, and asks each time whether it has changed: an item may get another picture.
_CACHED = "private, no-cache"
# An address that names the picture's digest never gets another picture.
_FOREVER = "private, max-age=31536000, immutable"
_RANGE = re.compile(r"bytes\s*=\s*([0-9]*)\s*-\s*([0-9]*)\s*", re.IGNORECASE)
_TAG = re.compile(r'(?:W/)?("[^"]*")')
# Larger numbers are behind the end of every file; int() refuses texts of thousands of digits.
_MOST_DIGITS = 18


def has_it(request: Request, tag: str) -> bool:
    """Return whether the client has the file with this entity tag, by its If-None-Match."""
    given = request.headers.get("if-none-match")
    return given is not None and (given.strip() == "*" or tag in _TAG.findall(given))


def not_modified(tag: str, forever: bool = False) -> Response:
    """Return the answer to a client that has the file."""
    return Response(status_code=304, headers=_headers(tag, forever))


def file_answer(request: Request, data: bytes, tag: str, media_type: str, forever: bool = False) -> Response:
    """Return the answer with a file, or with the range of its bytes that the client asks for.

    Several ranges, and a range of another file than this (If-Range), are answered with the whole file. With `forever`
    the client need not ask again whether the file has changed.
    """
    try:
        part = _part(request, len(data), tag)
    except RangeNotSatisfiable as error:
        refusal = answer(request.scope, error)
        refusal.headers["Content-Range"] = f"bytes */{len(data)}"
        return refusal
    headers = _headers(tag, forever) | {"Accept-Ranges": "bytes"}
    if part is None:
        return Response(data, headers=headers, media_type=media_type)
    headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{len(data)}"
    return Response(data[part.start : part.stop], 206, headers, media_type)


def steady(tag: Callable[[], str], read: Callable[[], bytes]) -> tuple[bytes, str]:
    """Return a file and its tag, read again if the tag changed meanwhile."""
    before = tag()
    while True:
        data = read()
        after = tag()
        if after == before:
            return data, after
        before = after


def _headers(tag: str, forever: bool) -> dict[str, str]:
    return {"ETag": tag, "Cache-Control": _FOREVER if forever else _CACHED}


def _part(request: Request, size: int, tag: str) -> range | None:
    """Return the range that a request asks for; None for the whole file. Raises RangeNotSatisfiable."""
    asked = _RANGE.fullmatch(request.headers.get("range", ""))
    if asked is None or request.headers.get("if-range", tag) != tag:
        return None
    first, last = (int(number[:_MOST_DIGITS]) if number else None for number in asked.groups())
    if first is None:
        # The last bytes of the file.
        part = range(max(0, size - (last or 0)), size)
        if last is None:
            return None
    elif last is not None and last < first:
        return None
    else:
        part = range(first, size if last is None else min(size, last + 1))
    if not part:
        raise RangeNotSatisfiable(f"the range begins behind the end of the file, which has {size} bytes")
    return part
