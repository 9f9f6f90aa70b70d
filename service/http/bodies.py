"""A request's body → the bytes of its pictures and its form fields, within limits."""

import base64
import binascii
import io
import json
import math
import re
from collections.abc import AsyncGenerator, Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from fastapi import Request
from numpy.lib import format as npy
from numpy.typing import NDArray
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from service.errors import InvalidRequest, TooLarge, UnsupportedFormat
from service.names import unknown
from service.settings import Settings

# curl --data-binary declares a form by default. The declared type does not count, the bytes do.
_RAW = ("", "application/octet-stream", "application/x-www-form-urlencoded")
_FROM_URL_SAFE = str.maketrans("-_", "+/")
_EXTENDED_NAME = re.compile(rb"""(?i);\s*filename\*\s*=\s*"?(utf-8|iso-8859-1)'[^';]*'([^;"\s]*)""")
# A text in quotes, which could hold anything, but not one that some clients put around an extended name.
_QUOTED = re.compile(rb'(?<!\*=)"(?:[^"\\]|\\.)*"')
# The metadata of many pictures is one text field.
_MOST_TEXT_BYTES = 4_000_000


@dataclass
class Form:
    """A multipart form: its files, each with the name that the client gave it, and its text fields by name."""

    files: list[tuple[str, bytes]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)


def content_type(request: Request) -> str:
    """Return the media type of the body in lower case, without parameters; "" if the request declares none.

    Raises:
        UnsupportedFormat: the body is compressed. Nothing limits the size of a decompressed body yet.
    """
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise UnsupportedFormat("expected a body without Content-Encoding")
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_pictures(
    request: Request, settings: Settings, texts: Collection[str] = (), or_json: bool = True
) -> tuple[list[bytes], dict[str, str]]:
    """Read a body that is a picture, or a form with pictures in the field `file`.

    Args:
        request: its body is read.
        settings: the limits.
        texts: names of the form's other fields.
        or_json: whether the route takes JSON, too, which its refusal then tells.

    Returns:
        The bytes of one or more image files, not decoded, and the form's text fields by name.

    Raises:
        UnsupportedFormat: a body of another type.
        TooLarge: the body, a picture or their number exceeds a limit; raised while the body streams in.
        InvalidRequest: the form cannot be parsed, has no picture or an unknown field. A text in a file field is not a
            picture.
    """
    kind = content_type(request)
    if kind == "multipart/form-data":
        form = await read_form(request, settings, settings.max_images, texts)
        return [data for _, data in form.files], form.texts
    if kind not in _RAW and not kind.startswith("image/"):
        last = "application/json" if or_json else "application/octet-stream"
        raise UnsupportedFormat(
            f"expected a picture: a body of image/*, multipart/form-data with the field file, or {last}"
        )
    return [await read_body(request, settings.max_image_bytes)], {}


async def read_one_picture(
    request: Request, settings: Settings, texts: Collection[str] = (), or_json: bool = True
) -> tuple[bytes, dict[str, str]]:
    """Read a body with exactly one picture. Takes, returns and raises as read_pictures."""
    images, fields = await read_pictures(request, settings, texts, or_json)
    if len(images) != 1:
        raise InvalidRequest(f"expected one picture, got {len(images)}")
    return images[0], fields


async def read_vectors(request: Request, settings: Settings) -> NDArray[Any]:
    """Read a body that is a NumPy file of vectors, (Q, D) float32 or float64.

    Raises:
        InvalidRequest: it is none, its shape is another one, or its data are cut short.
        TooLarge: more vectors than a request may have queries.
    """
    data = await read_body(request, settings.max_request_bytes)
    wanted = "expected a NumPy file (.npy, version 1 or 2) of float32 or float64 (Q, D)"
    file = io.BytesIO(data)
    # np.load would allocate what a header promises.
    try:
        version = npy.read_magic(file)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, by_columns, dtype = read_header(file)
    # The header is a Python literal, whose parser raises more than ValueError.
    except Exception as error:
        raise InvalidRequest(f"{wanted}, got other bytes") from error
    if dtype.kind != "f" or dtype.itemsize not in (4, 8) or len(shape) != 2 or not all(shape):
        raise InvalidRequest(f"{wanted}, got {dtype} {shape}")
    if shape[0] > settings.max_queries:
        raise TooLarge(f"expected at most {settings.max_queries} vectors, got {shape[0]}")
    content = data[file.tell() :]
    if len(content) != dtype.itemsize * math.prod(shape):
        raise InvalidRequest(f"{wanted}; its header announces {shape}, and {len(content)} bytes follow")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if by_columns else "C")


def check_count(images: int, settings: Settings) -> None:
    """Raise TooLarge for more pictures than a request may have."""
    if images > settings.max_images:
        raise TooLarge(f"expected at most {settings.max_images} pictures, got {images}")


def check_text_count(texts: int, settings: Settings) -> None:
    """Raise TooLarge for more texts than a request may have."""
    if texts > settings.max_texts:
        raise TooLarge(f"expected at most {settings.max_texts} texts, got {texts}")


def parse_json_object(text: str, what: str) -> dict[str, Any]:
    """Parse a JSON object. Raises InvalidRequest, whose message begins with `what`, the name of the field."""
    try:
        # Windows programs write a BOM.
        content = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what}: not JSON") from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"{what}: expected a JSON object, got {type(content).__name__}")
    return content


def picture_of(picture: bytes | str, settings: Settings) -> bytes | Callable[[], bytes]:
    """Return a picture's bytes as they came, or for one in base64 a function that decodes it. See `from_base64`."""
    return partial(from_base64, picture, settings.max_image_bytes) if isinstance(picture, str) else picture


def is_data_uri(text: str) -> bool:
    """Return whether a text begins as a data URI does."""
    return text[:20].lstrip()[:5].lower() == "data:"


def from_base64(text: str, most_bytes: int) -> bytes:
    """Decode base64, or a data URI of it. A URL is refused, and never fetched.

    All spellings of RFC 4648 and of MIME are taken: wrapped in lines, with the alphabet for URLs, without padding; in a
    data URI also with percent signs.

    Raises:
        InvalidRequest: not base64.
        TooLarge: more than `most_bytes`; raised before decoding.
    """
    # Lines of 76 characters make it longer by a 38th; 200 characters are enough for "data:image/…;base64,".
    if len(text) > most_bytes * 3 // 2 + 200:
        raise TooLarge(f"the picture has more than {most_bytes} bytes, which is the limit")
    if is_data_uri(text):
        head, _, text = text.partition(",")
        if not head.rstrip().lower().endswith(";base64"):
            raise InvalidRequest("expected a data URI of the form data:image/…;base64,…")
        text = unquote(text) if "%" in text else text
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return _from_other_base64(text)


def _from_other_base64(text: str) -> bytes:
    # Lines lose the spaces at their ends alone: one inside may be a plus sign that was decoded as a part of an address,
    # and is refused.
    plain = "".join(line.strip() for line in text.splitlines())
    if not ("+" in plain or "/" in plain):
        plain = plain.translate(_FROM_URL_SAFE)
    digits = plain.rstrip("=")
    try:
        if len(plain) > len(digits) and len(plain) % 4:
            raise ValueError("padding that does not fill the last four characters")
        return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest("expected base64 or a data URI") from error


async def read_body(request: Request, limit: int) -> bytes:
    """Return the whole body. Raises TooLarge at the first chunk that exceeds the limit (bytes)."""
    # BytesIO hands its buffer over without a copy; bytes(bytearray) would copy it.
    body = io.BytesIO()
    async for chunk in _stream(request, limit):
        body.write(chunk)
    return body.getvalue()


async def _stream(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    declared = request.headers.get("content-length", "")
    received = 0
    if declared.isdecimal() and int(declared) > limit:
        raise TooLarge(f"the body has {declared} bytes; the limit is {limit}")
    async for chunk in request.stream():
        received += len(chunk)
        if received > limit:
            raise TooLarge(f"the body is larger than the limit of {limit} bytes")
        yield chunk


async def read_form(request: Request, settings: Settings, most_files: int, texts: Collection[str]) -> Form:
    """Read a multipart form with one or more files in the field `file`, and texts in the others.

    Args:
        request: its body is read.
        settings: the limits.
        most_files: how many files there may be.
        texts: names of the other fields.

    Raises:
        InvalidRequest: the form cannot be parsed, or has another shape or an unknown field.
        TooLarge: too many files, or too large a file, text or form; raised while the form streams in.
    """
    _, options = parse_options_header(request.headers.get("content-type", ""))
    reader = _FormReader(options.get(b"boundary", b""), texts, most_files, settings.max_image_bytes)
    async for chunk in _stream(request, settings.max_request_bytes):
        reader.write(chunk)
    return reader.finish()


class _FormReader:
    """Collects the files and texts of a multipart form while it streams in. The form stays in memory, never on disk."""

    def __init__(self, boundary: bytes, texts: Collection[str], most_files: int, most_file_bytes: int) -> None:
        self._known = {"file", *texts}
        self._most_files, self._most_file_bytes = most_files, most_file_bytes
        self._form = Form()
        self._ended = False
        if not boundary:
            raise InvalidRequest("not a multipart form: its Content-Type names no boundary")
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._name_header,
                    "on_header_value": self._fill_header,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._open,
                    "on_part_data": self._take,
                    "on_part_end": self._close,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise InvalidRequest("not a multipart form that can be read: its boundary is too long") from error

    def write(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise InvalidRequest("not a multipart form that can be read") from error

    def finish(self) -> Form:
        if not self._ended:
            raise InvalidRequest("not a multipart form that can be read: it is cut short")
        if not self._form.files:
            raise InvalidRequest("expected a picture in the form field file")
        return self._form

    # The parser calls these for every part, in this order.

    def _begin(self) -> None:
        self._headers: dict[bytes, bytes] = {}
        self._header = (bytearray(), bytearray())
        self._content = bytearray()

    def _name_header(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _fill_header(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _end_header(self) -> None:
        self._headers[bytes(self._header[0]).lower()] = bytes(self._header[1])
        self._header = (bytearray(), bytearray())

    def _open(self) -> None:
        header = self._headers.get(b"content-disposition", b"")
        disposition, options = parse_options_header(header)
        if disposition != b"form-data" or b"name" not in options:
            raise InvalidRequest("not a multipart form that can be read: a part has no name")
        self._name, self._file_name = _text(options[b"name"]), None
        is_picture = self._headers.get(b"content-type", b"").lower().startswith(b"image/")
        name = _extended_name(header)
        if name is None and b"filename" in options:
            name = _text(options[b"filename"])
        if self._name == "file" and (name is not None or is_picture):
            self._file_name = name or ""
            if len(self._form.files) == self._most_files:
                raise TooLarge(f"expected at most {self._most_files} pictures")
        elif self._name == "file" or name is not None:
            raise InvalidRequest("expected pictures in the form field file, each with a filename, and texts elsewhere")
        elif self._name not in self._known:
            told = unknown("a field", self._name, self._known)
            raise InvalidRequest(f"the form: {told}; parameters belong in the address")
        elif self._name in self._form.texts:
            raise InvalidRequest("expected each text field once")

    def _take(self, data: bytes, start: int, end: int) -> None:
        self._content += memoryview(data)[start:end]
        if self._file_name is None:
            if len(self._content) > _MOST_TEXT_BYTES:
                raise TooLarge(f"a text field has more than {_MOST_TEXT_BYTES} bytes, which is the limit")
        elif len(self._content) > self._most_file_bytes:
            raise TooLarge(f"a picture has more than {self._most_file_bytes} bytes, which is the limit")

    def _close(self) -> None:
        if self._file_name is not None:
            self._form.files.append((self._file_name, bytes(self._content)))
        else:
            self._form.texts[self._name] = _text(bytes(self._content))
        self._content = bytearray()

    def _end(self) -> None:
        self._ended = True


def _extended_name(disposition: bytes) -> str | None:
    """Return the name in `filename*=charset'language'percent-encoded` (RFC 8187), which parsers of forms pass over.

    Some clients send it for a name that is not ASCII, alone or beside a replacement in `filename`.
    """
    found = _EXTENDED_NAME.search(_QUOTED.sub(b'""', disposition))
    if found is None:
        return None
    charset, name = found.groups()
    try:
        return unquote_to_bytes(name).decode("utf-8" if charset.lower() == b"utf-8" else "latin-1")
    except UnicodeDecodeError as error:
        raise InvalidRequest("not a multipart form that can be read: a filename* is not UTF-8") from error


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest("not a multipart form that can be read: a text is not UTF-8") from error
