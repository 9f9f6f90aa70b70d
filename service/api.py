"""HTTP routes: parsing, limits, problem+json. The work itself is the gallery's."""

import base64
import binascii
import json
from collections.abc import AsyncGenerator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import fastapi_swagger
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from service.errors import InvalidRequest, ItemNotFound, LookalikeError, TooLarge, UnsupportedFormat
from service.gallery import Gallery, check_id
from service.store import Item

_PAGE = Path(__file__).parent / "page"
_DEFAULT_K = 10

_PICTURE_BODY = {
    "image/*": {"schema": {"type": "string", "format": "binary"}},
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "properties": {"file": {"type": "string", "format": "binary"}},
            "required": ["file"],
        }
    },
}


def _json_body(properties: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": {"type": "object", "properties": properties}}}


def _body(content: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": content}}


def create_app() -> FastAPI:
    """Make the HTTP app. Whoever runs it sets `app.state.gallery` before the first request."""
    app = FastAPI(
        title="Lookalike",
        description="Image similarity search. Errors are application/problem+json.",
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    fastapi_swagger.patch_fastapi(app, redirect_from_root_to_docs=False)  # /docs, its scripts from the package
    app.add_exception_handler(LookalikeError, _on_lookalike_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.mount("/page", StaticFiles(directory=_PAGE), name="page")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html")

    @app.get("/info")
    async def info(request: Request) -> dict[str, Any]:
        """What runs here: encoder, embedding space, gallery, limits."""
        gallery = _gallery(request)
        settings = gallery.settings
        return {
            "model": gallery.card.name,
            "fingerprint": gallery.card.fingerprint,
            "dimension": gallery.encoder.dimension,
            "count": await run_in_threadpool(gallery.store.count),
            "provider": gallery.encoder.provider,
            "notice": await run_in_threadpool(gallery.notice),
            "limits": {
                **asdict(settings.limits),
                "max_images": settings.max_images,
                "max_request_bytes": settings.max_request_bytes,
                "max_k": settings.max_k,
            },
        }

    @app.post(
        "/embed",
        openapi_extra=_body(_PICTURE_BODY | _json_body({"images": {"type": "array", "items": {"type": "string"}}})),
    )
    async def embed(request: Request) -> dict[str, Any]:
        """Embed pictures: one as the body, or `file` fields, or JSON with base64 strings or data URIs."""
        gallery = _gallery(request)
        kind = _content_type(request)
        if kind == "application/json":
            images = _pictures_of(await _read_json(request), gallery.settings.max_images)
        elif kind == "multipart/form-data":
            images, _ = await _read_multipart(request)
        else:
            images = [await _read_raw(request)]
        embeddings = await run_in_threadpool(gallery.embed, images)
        return {
            "model": gallery.card.name,
            "fingerprint": gallery.card.fingerprint,
            "dimension": gallery.encoder.dimension,
            "embeddings": embeddings.tolist(),
        }

    @app.post(
        "/search",
        openapi_extra=_body(
            _PICTURE_BODY
            | _json_body(
                {
                    "image": {"type": "string"},
                    "vector": {"type": "array", "items": {"type": "number"}},
                    "id": {"type": "string"},
                    "k": {"type": "integer"},
                }
            )
        ),
    )
    async def search(request: Request, k: Annotated[int, Query()] = _DEFAULT_K) -> dict[str, Any]:
        """Find the k items most like a picture, a vector or an item; the item itself is left out."""
        gallery = _gallery(request)
        if _content_type(request) != "application/json":
            image = await _read_one_picture(request)
            return {"hits": [asdict(hit) for hit in await run_in_threadpool(gallery.find_by_picture, image, k)]}
        content = await _read_json(request)
        k = content.pop("k", k)
        if isinstance(k, bool) or not isinstance(k, int):
            raise InvalidRequest(f"k: expected a whole number, got {type(k).__name__}")
        match content:
            case {"image": str(text), **rest} if not rest:
                hits = await run_in_threadpool(gallery.find_by_picture, _from_base64(text, "image"), k)
            case {"id": str(id), **rest} if not rest:
                hits = await run_in_threadpool(gallery.find_by_id, check_id(id), k)
            case {"vector": list(vector), **rest} if not rest and all(
                isinstance(number, int | float) and not isinstance(number, bool) for number in vector
            ):
                try:
                    numbers = [float(number) for number in vector]
                except OverflowError as error:
                    raise InvalidRequest("vector: a number is too large") from error
                hits = await run_in_threadpool(gallery.find_by_vector, numbers, k)
            case _:
                raise InvalidRequest(
                    'expected {"image": base64 or data URI}, {"vector": [numbers]} or {"id": text}, and optionally "k"'
                )
        return {"hits": [asdict(hit) for hit in hits]}

    @app.get("/images")
    async def list_images(
        request: Request, limit: Annotated[int, Query()] = 100, cursor: Annotated[str | None, Query()] = None
    ) -> dict[str, Any]:
        """List items in the order of adding; `next` is the cursor of the next page, or null."""
        if not 1 <= limit <= 1000:
            raise InvalidRequest(f"limit: expected a whole number from 1 to 1000, got {limit}")
        if cursor is not None and not (cursor.isascii() and cursor.isdecimal() and len(cursor) <= 18):
            raise InvalidRequest("cursor: expected the `next` of an earlier answer")
        items, following = await run_in_threadpool(_gallery(request).store.scan, limit, int(cursor or 0))
        return {"items": [_show(item) for item in items], "next": None if following is None else str(following)}

    @app.get("/images/{id:path}/thumbnail", response_class=Response)
    async def image_thumbnail(request: Request, id: str) -> Response:
        """A small WebP of an item."""
        data = await run_in_threadpool(_gallery(request).store.thumbnail, check_id(id))
        if data is None:
            raise ItemNotFound("no item has this id")
        return Response(data, media_type="image/webp")

    @app.get("/images/{id:path}/content", response_class=Response)
    async def image_content(request: Request, id: str) -> Response:
        """The picture's own bytes, where the store keeps them."""
        gallery = _gallery(request)
        data = await run_in_threadpool(gallery.store.original, check_id(id))
        if data is None:
            await run_in_threadpool(gallery.get, check_id(id))
            raise ItemNotFound("the store does not keep this item's own bytes (keep_originals is off)")
        # The bytes came from a client: the type is ours, and a browser must not guess another.
        return Response(data, media_type=_media_type(data), headers={"X-Content-Type-Options": "nosniff"})

    @app.put(
        "/images/{id:path}", openapi_extra=_body(_PICTURE_BODY), responses={201: {"description": "The id is new."}}
    )
    async def put_image(
        request: Request, response: Response, id: str, metadata: Annotated[str | None, Query()] = None
    ) -> dict[str, Any]:
        """Add a picture under an id of yours, or replace it; `metadata` is a JSON object."""
        gallery = _gallery(request)
        id = check_id(id)
        fields: dict[str, str] = {}
        if _content_type(request) == "multipart/form-data":
            images, fields = await _read_multipart(request)
            image = _only(images)
        else:
            image = await _read_raw(request)
        facts = _parse_metadata(fields.get("metadata", metadata))
        response.status_code = 201 if await run_in_threadpool(gallery.add, id, image, facts) else 200
        return {"id": id, "metadata": facts}

    @app.get("/images/{id:path}")
    async def get_image(request: Request, id: str) -> dict[str, Any]:
        """An item's id and metadata."""
        return _show(await run_in_threadpool(_gallery(request).get, check_id(id)))

    @app.delete("/images/{id:path}", status_code=204)
    async def delete_image(request: Request, id: str) -> None:
        """Remove an item."""
        await run_in_threadpool(_gallery(request).remove, check_id(id))

    return app


def _gallery(request: Request) -> Gallery:
    gallery: Gallery = request.app.state.gallery
    return gallery


def _show(item: Item) -> dict[str, Any]:
    return {"id": item.id, "metadata": item.metadata}


# Bodies ------------------------------------------------------------------------------------------


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


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


async def _read_raw(request: Request) -> bytes:
    kind = _content_type(request)
    # curl --data-binary declares a form unless it is told otherwise; the bytes decide.
    if (
        kind
        and not kind.startswith("image/")
        and kind
        not in (
            "application/octet-stream",
            "application/x-www-form-urlencoded",
        )
    ):
        raise UnsupportedFormat(
            "expected a picture: a body of image/*, multipart/form-data with the field file, or application/json"
        )
    limit = _gallery(request).settings.max_image_bytes
    return b"".join([chunk async for chunk in _stream(request, limit)])


async def _read_one_picture(request: Request) -> bytes:
    if _content_type(request) == "multipart/form-data":
        images, _ = await _read_multipart(request)
        return _only(images)
    return await _read_raw(request)


def _only(images: list[bytes]) -> bytes:
    if len(images) != 1:
        raise InvalidRequest(f"expected one picture, got {len(images)}")
    return images[0]


async def _read_multipart(request: Request) -> tuple[list[bytes], dict[str, str]]:
    """Return the pictures of the `file` fields and the text fields. A text in a file field is no picture."""
    settings = _gallery(request).settings
    parser = MultiPartParser(
        request.headers, _stream(request, settings.max_request_bytes), max_files=settings.max_images, max_fields=8
    )
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


async def _read_json(request: Request) -> dict[str, Any]:
    limit = _gallery(request).settings.max_request_bytes
    content = _parse_json(b"".join([chunk async for chunk in _stream(request, limit)]), "the body")
    if not isinstance(content, dict):
        raise InvalidRequest(f"the body: expected a JSON object, got {type(content).__name__}")
    return content


def _parse_json(text: bytes | str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what}: not JSON") from error


def _parse_metadata(text: str | None) -> dict[str, Any]:
    metadata = _parse_json(text or "{}", "metadata")
    if not isinstance(metadata, dict):
        raise InvalidRequest(f"metadata: expected a JSON object, got {type(metadata).__name__}")
    try:  # what could not be written back out is not taken in: NaN, infinity, half of a character, too deep
        json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("metadata: expected finite numbers and whole characters") from error
    return metadata


def _pictures_of(content: dict[str, Any], most: int) -> list[bytes]:
    images = content.get("images")
    if not isinstance(images, list) or not images or not all(isinstance(text, str) for text in images):
        raise InvalidRequest('expected {"images": [base64 or data URI, …]} with at least one')
    if len(images) > most:
        raise TooLarge(f"expected at most {most} pictures, got {len(images)}")
    return [_from_base64(text, f"images[{number}]") for number, text in enumerate(images)]


def _from_base64(text: str, what: str) -> bytes:
    """Decode base64, with or without data:…;base64, before it."""
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise InvalidRequest(f"{what}: expected a data URI of the form data:image/…;base64,…")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"{what}: expected base64 or a data URI") from error


def _media_type(data: bytes) -> str:
    for start, kind in ((b"\xff\xd8", "jpeg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp")):
        if data.startswith(start):
            return f"image/{kind}"
    return "image/webp"


# Errors ------------------------------------------------------------------------------------------


def problem(status: int, code: str, title: str, detail: str) -> JSONResponse:
    """Return an RFC 9457 answer."""
    return JSONResponse(
        {"type": "about:blank", "title": title, "status": status, "detail": detail, "code": code},
        status,
        media_type="application/problem+json",
    )


async def _on_lookalike_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, LookalikeError)
    return problem(error.status, error.code, error.code.replace("_", " ").capitalize(), str(error))


async def _on_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or "request"
    return problem(400, "invalid_request", "Invalid request", f"{where}: {first['msg']}")


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "unknown_route", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    return problem(error.status_code, code, str(error.detail), f"{error.detail}; /docs lists the routes")
