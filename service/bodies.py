"""A request's body → the bytes of its pictures and its fields: forms, limits, refusals."""

import base64
import binascii
import json
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from service.errors import InvalidRequest, TooLarge, UnsupportedFormat
from service.settings import Settings

# curl --data-binary declares a form unless it is told otherwise; the bytes decide.
_RAW = ("", "application/octet-stream", "application/x-www-form-urlencoded")


def content_type(request: Request) -> str:
    """Return the declared type of the body without its parameters, in small letters; "" for none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_pictures(request: Request, settings: Settings) -> tuple[list[bytes], dict[str, str]]:
    """Read a body that is a picture, or a form with pictures in the field `file`.

    Returns:
        The pictures' bytes, one or more, not decoded; and the form's text fields.

    Raises:
        UnsupportedFormat: a body of another type.
        TooLarge: over the limits, found while it streams in.
        InvalidRequest: a form that cannot be read or holds no picture. A text in a file field is no picture.
    """
    kind = content_type(request)
    if kind == "multipart/form-data":
        return await _read_multipart(request, settings)
    if kind not in _RAW and not kind.startswith("image/"):
        raise UnsupportedFormat(
            "expected a picture: a body of image/*, multipart/form-data with the field file, or application/json"
        )
    return [await _read(request, settings.max_image_bytes)], {}


async def read_one_picture(request: Request, settings: Settings) -> tuple[bytes, dict[str, str]]:
    """Read a body with exactly one picture. Returns and raises as read_pictures."""
    images, fields = await read_pictures(request, settings)
    if len(images) != 1:
        raise InvalidRequest(f"expected one picture, got {len(images)}")
    return images[0], fields


async def read_json(request: Request, settings: Settings) -> dict[str, Any]:
    """Read a body that is a JSON object. Raises InvalidRequest, TooLarge."""
    content = _parse_json(await _read(request, settings.max_request_bytes), "the body")
    if not isinstance(content, dict):
        raise InvalidRequest(f"the body: expected a JSON object, got {type(content).__name__}")
    return content


def _parse_json(text: bytes | str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what}: not JSON") from error


def parse_metadata(text: str | None) -> dict[str, Any]:
    """Read metadata, a JSON object that can be written back out; None is {}. Raises InvalidRequest."""
    metadata = _parse_json(text or "{}", "metadata")
    if not isinstance(metadata, dict):
        raise InvalidRequest(f"metadata: expected a JSON object, got {type(metadata).__name__}")
    try:  # what could not be written back out is not taken in: NaN, infinity, half of a character, too deep
        json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("metadata: expected finite numbers and whole characters") from error
    return metadata


def base64_pictures(content: dict[str, Any], most: int) -> list[bytes]:
    """Return the pictures of {"images": [base64 or data URI, …]}. Raises InvalidRequest, TooLarge."""
    images = content.get("images")
    if not isinstance(images, list) or not images or not all(isinstance(text, str) for text in images):
        raise InvalidRequest('expected {"images": [base64 or data URI, …]} with at least one')
    if len(images) > most:
        raise TooLarge(f"expected at most {most} pictures, got {len(images)}")
    return [from_base64(text, f"images[{number}]") for number, text in enumerate(images)]


def from_base64(text: str, what: str) -> bytes:
    """Decode base64, with or without data:…;base64, before it. Raises InvalidRequest naming `what`."""
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise InvalidRequest(f"{what}: expected a data URI of the form data:image/…;base64,…")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"{what}: expected base64 or a data URI") from error


async def _read(request: Request, limit: int) -> bytes:
    return b"".join([chunk async for chunk in _stream(request, limit)])


async def _stream(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """Yield the body, refused as soon as it is over the limit, before it is kept."""
    declared = request.headers.get("content-length", "")
    received = 0
    if declared.isdecimal() and int(declared) > limit:
        raise TooLarge(f"the body has {declared} bytes; the limit is {limit}")
    async for chunk in request.stream():
        received += len(chunk)
        if received > limit:
            raise TooLarge(f"the body is larger than the limit of {limit} bytes")
        yield chunk


async def _read_multipart(request: Request, settings: Settings) -> tuple[list[bytes], dict[str, str]]:
    stream = _stream(request, settings.max_request_bytes)
    parser = MultiPartParser(request.headers, stream, max_files=settings.max_images, max_fields=8)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if "Too many files" in error.message:
            raise TooLarge(f"expected at most {settings.max_images} pictures") from error
        raise InvalidRequest(f"not a multipart form that can be read: {error.message}") from error
    except (KeyError, UnicodeError, ValueError) as error:
        raise InvalidRequest("not a multipart form that can be read") from error
    try:
        parts = form.multi_items()
        images = [await value.read() for name, value in parts if name == "file" and isinstance(value, UploadFile)]
        fields = {name: value for name, value in parts if isinstance(value, str)}
    finally:
        await form.close()
    if not images:
        raise InvalidRequest("expected a picture in the form field file")
    return images, fields
