"""HTTP routes and problem+json. What comes in is read by bodies, the work itself is the gallery's."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import fastapi_swagger
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from service.bodies import (
    base64_pictures,
    content_type,
    from_base64,
    parse_metadata,
    read_json,
    read_one_picture,
    read_pictures,
)
from service.errors import InvalidRequest, LookalikeError
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
            "variant": gallery.encoder.variant,
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
        if content_type(request) == "application/json":
            images = base64_pictures(await read_json(request, gallery.settings), gallery.settings.max_images)
        else:
            images, _ = await read_pictures(request, gallery.settings)
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
        if content_type(request) != "application/json":
            image, _ = await read_one_picture(request, gallery.settings)
            return {"hits": [asdict(hit) for hit in await run_in_threadpool(gallery.find_by_picture, image, k)]}
        content = await read_json(request, gallery.settings)
        k = content.pop("k", k)
        if isinstance(k, bool) or not isinstance(k, int):
            raise InvalidRequest(f"k: expected a whole number, got {type(k).__name__}")
        match content:
            case {"image": str(text), **rest} if not rest:
                hits = await run_in_threadpool(gallery.find_by_picture, from_base64(text, "image"), k)
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
        return Response(await run_in_threadpool(_gallery(request).thumbnail, check_id(id)), media_type="image/webp")

    @app.get("/images/{id:path}/content", response_class=Response)
    async def image_content(request: Request, id: str) -> Response:
        """The picture's own bytes, where the store keeps them."""
        data = await run_in_threadpool(_gallery(request).original, check_id(id))
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
        image, fields = await read_one_picture(request, gallery.settings)
        facts = parse_metadata(fields.get("metadata", metadata))
        response.status_code = 201 if await run_in_threadpool(gallery.add, id, image, facts) else 200
        return {"id": id, "metadata": facts}

    @app.get("/images/{id:path}")
    async def get_image(request: Request, id: str) -> dict[str, Any]:
        """An item's id and metadata, and the variant of the encoder that embedded it."""
        item = await run_in_threadpool(_gallery(request).get, check_id(id))
        return _show(item) | {"variant": item.variant}

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
