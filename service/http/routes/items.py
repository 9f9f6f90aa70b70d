"""/images: add, list, show, change and remove items."""

import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import unquote

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.routing import Match
from starlette.types import Scope

from service.encoding.images import media_type
from service.errors import InvalidRequest, UnsupportedFormat, each
from service.file_facts import FileFacts, Move
from service.gallery import Gallery
from service.http import schemas, uploads
from service.http.bodies import content_type, parse_json_object, read_body, read_form, read_one_picture
from service.http.compression import json_answer
from service.http.openapi import (
    BODY,
    PICTURE_TYPES,
    WORK,
    answers,
    body,
    json_body,
    ndjson,
    picture_body,
    stored_answers,
    zip_body,
)
from service.http.routes.parameters import (
    Expect,
    FilterText,
    Fingerprint,
    IncludeOfItem,
    ItemId,
    Limit,
    ListCursor,
    ListOrder,
    Metadata,
    Name,
    NeededFilter,
    Offset,
    Prefix,
    PreviewSide,
    Version,
)
from service.http.routes.state import (
    check_content_type,
    check_fingerprint,
    condition,
    gallery_of,
    slots_of,
    stored_gallery_of,
    work,
)
from service.http.routes.strict import StrictRoute
from service.http.schemas import EncodingFormat, IncludedOfItem, included, listed, read_json
from service.http.stored_files import file_answer, has_it, not_modified, steady
from service.store import Item
from service.store.filters import EVERY

_MERGE_PATCH = "application/merge-patch+json"
_FORM_FIELDS = {uploads.METADATA_FIELD, uploads.SOURCES_FIELD}
_SHA256 = re.compile(r"[0-9a-f]{64}")


class _PictureRoute(StrictRoute):
    """The route of an item's picture, whose last slash is a slash in the address: a %2F belongs to the id."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return whether the address is that of a picture, and not of an item whose id ends in the same word."""
        return super().matches(scope) if _last_part(scope) == self.path.rpartition("/")[2] else (Match.NONE, {})


class _ItemRoute(StrictRoute):
    """The route of an item, for every address that is not that of an item's picture."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return whether the address is that of an item."""
        is_picture = _last_part(scope) in ("thumbnail", "preview", "content") and any(
            route.matches(scope)[0] is not Match.NONE for route in pictures.routes
        )
        return (Match.NONE, {}) if is_picture else super().matches(scope)


def _last_part(scope: Scope) -> str:
    """Return what stands behind the last slash of an address as it was sent."""
    return unquote(scope.get("raw_path", scope["path"].encode()).rpartition(b"/")[2])


router = APIRouter(route_class=_ItemRoute, tags=["images"])
pictures = APIRouter(route_class=_PictureRoute, tags=["images"])


@router.get("/images", responses=answers(schemas.Page, 400, 404, *WORK))
async def list_images(
    request: Request,
    limit: Limit = 100,
    cursor: ListCursor = None,
    filter: FilterText = None,
    prefix: Prefix = "",
    name: Name = "",
    order: ListOrder = "added",
    offset: Offset = 0,
    include: IncludeOfItem = (),
    encoding_format: EncodingFormat = "float",
) -> Response:
    """List the items that match a filter and whose ids begin with `prefix` and have `name` in them, and their `total`.

    `next` is the cursor of the next page, or null; it goes with the same filter, prefix, name and order.
    """
    where = condition(None if filter is None else parse_json_object(filter, "filter"), prefix, name)

    def list_page() -> Response:
        gallery = gallery_of(request)
        items, following = gallery.store.page(limit, cursor or "", where, order, offset)
        shown = [_shown(item) | _included(gallery, item, include, encoding_format) for item in items]
        page = JSONResponse({"items": shown, "total": gallery.store.count(where), "next": following})
        return page if "embedding" in include else json_answer(request, bytes(page.body))

    return await work(request, list_page)


@router.post(
    "/images/count",
    openapi_extra=body(json_body(schemas.CountBody)),
    responses=answers(schemas.Count, *WORK, *BODY, 404),
)
async def count_images(request: Request) -> Response:
    """Count the items that match a filter and whose ids begin with `prefix` and have `name` in them."""
    gallery = stored_gallery_of(request)
    check_content_type(request, "application/json")
    asked = await read_json(request, gallery.settings, schemas.COUNT)
    where = condition(asked.filter, asked.prefix, asked.name)
    return JSONResponse({"count": await work(request, lambda: gallery.store.count(where))})


@router.post(
    "/images/moves",
    openapi_extra=body(json_body(schemas.MovesBody)),
    responses=answers(schemas.Moved, *WORK, *BODY, 403, 404),
)
async def move_images(request: Request) -> Response:
    """Give items other ids, record where their files are, or remove them, all in one step; what else they have stays.

    `lookalike index --sync` calls it. Items may exchange their ids. Items that are not there, or have another picture
    by now, are left alone; `moved` counts the others.
    """
    gallery = stored_gallery_of(request)
    check_content_type(request, "application/json")
    asked = await read_json(request, gallery.settings, schemas.MOVES)

    def check(one: schemas.MoveBody) -> Move:
        file = {} if one.file is None else one.file.model_dump()
        mtime_ns = file.pop("mtime_ns", None)
        to = None if one.to is None else gallery.check_id(one.to)
        return Move(gallery.check_id(one.id), one.digest, to, one.source, FileFacts(**file), mtime_ns)

    moves = each("move", asked.moves, check)
    return JSONResponse({"moved": await work(request, lambda: gallery.store.move(moves))})


@router.delete("/images", responses=answers(schemas.Removed, 400, 403, 404, 409, *WORK))
async def delete_images(
    request: Request, filter: NeededFilter, prefix: Prefix = "", name: Name = "", expect: Expect = None
) -> Response:
    """Remove all items that match a filter and whose ids begin with `prefix` and have `name` in them, in one step.

    With `expect` nothing is removed, and the answer is 409, if there are more or fewer. A filter that matches every
    item, {}, needs `expect`, a prefix or a name.
    """
    gallery = stored_gallery_of(request)
    where = condition(parse_json_object(filter, "filter"), prefix, name)
    if where == EVERY and expect is None:
        raise InvalidRequest(
            "a filter that matches every item needs expect, the number of all items, a prefix or a name"
        )
    return JSONResponse({"removed": await work(request, lambda: gallery.store.remove_matching(where, expect))})


@router.post(
    "/images",
    openapi_extra=body(
        picture_body(several=True, metadata="metadata-by-id", raw=False, sources=True)
        | zip_body()
        | json_body(schemas.AddItemsBody)
    ),
    response_class=Response,
    responses=answers(None, *BODY, *WORK, 403, 404, 409)
    | {200: {"description": "One line per picture.", "content": ndjson()}},
)
async def add_images(request: Request, fingerprint: Fingerprint = None) -> Response:
    """Add or replace many pictures. Their ids are the file names of the form's `file` fields, or the paths in a zip.

    The form's field `metadata`, or the zip's member `metadata.json`, is an object of metadata by id; an item that is
    replaced and has none there keeps its metadata. The form's field `sources` says by id where pictures came from; one
    that is the path of a file with the same bytes on this machine is not copied. JSON brings items with embeddings that
    this encoder has made. The answer is one line of JSON per picture, written once it is stored or refused: status 201
    for a new item, 200 for one that replaces another. Sending a picture again is safe.
    """
    gallery = stored_gallery_of(request)
    check_fingerprint(gallery, fingerprint)
    kind = content_type(request)
    pictures: uploads.Archive | uploads.Uploads | uploads.Rows
    if kind == "multipart/form-data":
        pictures = uploads.Uploads(
            await read_form(request, gallery.settings, gallery.settings.max_bulk_images, _FORM_FIELDS)
        )
    elif kind in ("application/zip", "application/x-zip-compressed"):
        content = await read_body(request, gallery.settings.max_request_bytes)
        pictures = await work(request, lambda: uploads.Archive(content, gallery.settings))
    elif kind == "application/json":
        asked = await read_json(request, gallery.settings, schemas.ADD_ITEMS)
        check_fingerprint(gallery, asked.fingerprint)
        pictures = uploads.Rows(asked.items, gallery.settings)
    else:
        raise UnsupportedFormat("expected multipart/form-data with fields file, application/zip or application/json")
    lines: AsyncIterator[str] = uploads.add_all(pictures, gallery, slots_of(request))
    return StreamingResponse(lines, media_type="application/x-ndjson")


@pictures.get(
    "/images/{id:path}/thumbnail",
    response_class=Response,
    responses=stored_answers(400, 404, *WORK, media=("image/webp",)),
)
async def get_thumbnail(request: Request, id: ItemId, v: Version = None) -> Response:
    """A small WebP of an item. If-None-Match and Range are read."""
    gallery = gallery_of(request)

    def digest() -> str:
        return "" if v is None else gallery.get(gallery.check_id(id)).digest

    def read() -> Response:
        data, own = steady(digest, lambda: gallery.thumbnail(gallery.check_id(id)))
        tag, forever = f'"{hashlib.sha256(data).hexdigest()}"', _is_version(v, own)
        if has_it(request, tag):
            return not_modified(tag, forever)
        return file_answer(request, data, tag, "image/webp", forever)

    return await work(request, read)


@pictures.get(
    "/images/{id:path}/preview",
    response_class=Response,
    responses=stored_answers(400, 404, *WORK, media=("image/webp",)),
)
async def get_preview(request: Request, id: ItemId, size: PreviewSide = 512, v: Version = None) -> Response:
    """A WebP of an item whose longest side is at most `size`, made from the picture's own bytes.

    If-None-Match and Range are read. No picture is enlarged.
    """
    gallery = gallery_of(request)

    def digest() -> str:
        return gallery.get(gallery.check_id(id)).digest

    def tag(own: str) -> str:
        return f'"{hashlib.sha256(f"{own} {size}".encode()).hexdigest()}"'

    def read() -> Response:
        own = digest()
        if has_it(request, tag(own)):
            return not_modified(tag(own), _is_version(v, own))
        data, own = steady(digest, lambda: gallery.preview(gallery.check_id(id), size))
        return file_answer(request, data, tag(own), "image/webp", _is_version(v, own))

    return await work(request, read)


@pictures.get(
    "/images/{id:path}/content",
    response_class=Response,
    responses=stored_answers(400, 404, *WORK, media=PICTURE_TYPES[:-1]),
)
async def get_content(request: Request, id: ItemId, v: Version = None) -> Response:
    """The picture's own bytes: as the store keeps them, or from the indexed file if that has not changed since.

    If-None-Match and Range are read.
    """
    gallery = gallery_of(request)

    def digest() -> str:
        return gallery.get(gallery.check_id(id)).digest

    def tag(own: str) -> str:
        # Nearly always a sha256; an import may have brought another text.
        return f'"{own if _SHA256.fullmatch(own) else hashlib.sha256(own.encode()).hexdigest()}"'

    def read() -> Response:
        own = digest()
        if has_it(request, tag(own)):
            return not_modified(tag(own), _is_version(v, own))
        data, own = steady(digest, lambda: gallery.original(gallery.check_id(id)))
        # A client sent these bytes. We decide their type, and the guard forbids a browser to guess another.
        return file_answer(request, data, tag(own), media_type(data), _is_version(v, own))

    return await work(request, read)


@router.put(
    "/images/{id:path}",
    openapi_extra=body(picture_body(metadata="metadata")),
    responses=answers(schemas.ItemAnswer, *WORK, *BODY, 403, 404, 409, 422, success=(200, 201)),
)
async def put_image(
    request: Request, id: ItemId, metadata: Metadata = None, fingerprint: Fingerprint = None
) -> Response:
    """Add a picture under an id of yours, or replace it.

    `metadata` is a JSON object. Without it an item that is replaced keeps its metadata; `{}` clears them.
    """
    gallery = stored_gallery_of(request)
    id = gallery.check_id(id)
    check_fingerprint(gallery, fingerprint)
    image, form_fields = await read_one_picture(request, gallery.settings, {"metadata"}, or_json=False)
    text = form_fields.get("metadata", metadata)
    checked = None if text is None else gallery.check_metadata(parse_json_object(text, "metadata"))

    def put() -> Response:
        is_new = gallery.add(id, image, checked)
        # Another client may have removed the item by now.
        stored = gallery.store.get(id) if checked is None else None
        metadata = checked or {} if stored is None else stored.metadata
        return JSONResponse({"id": id, "metadata": metadata}, 201 if is_new else 200)

    return await work(request, put)


@router.get("/images/{id:path}", responses=answers(schemas.ItemDetails, 400, 404, *WORK))
async def get_image(
    request: Request, id: ItemId, include: IncludeOfItem = (), encoding_format: EncodingFormat = "float"
) -> Response:
    """An item's id and metadata, the variant of the encoder that embedded it, its file, and what `include` names."""
    gallery = gallery_of(request)

    def read() -> dict[str, Any]:
        item = gallery.get(gallery.check_id(id))
        return _shown(item) | included(item, ("variant", "file")) | _included(gallery, item, include, encoding_format)

    return JSONResponse(await work(request, read))


@router.patch(
    "/images/{id:path}",
    # A second media type with the same schema breaks generators of clients; it is taken all the same.
    openapi_extra=body(json_body(schemas.PatchBody)),
    responses=answers(schemas.ItemAnswer, *WORK, *BODY, 403, 404),
)
async def patch_image(request: Request, id: ItemId) -> Response:
    """Change an item's metadata by a merge patch: a field given as null is removed, others are set.

    `application/merge-patch+json` is taken, too.
    """
    gallery = gallery_of(request)
    id = gallery.check_id(id)
    check_content_type(request, "application/json", _MERGE_PATCH)
    asked = await read_json(request, gallery.settings, schemas.PATCH)
    item = await work(request, lambda: gallery.change_metadata(id, asked.metadata))
    return JSONResponse(_shown(item))


@router.delete("/images/{id:path}", status_code=204, responses=answers(None, 400, 403, 404, *WORK, success=(204,)))
async def delete_image(request: Request, id: ItemId) -> Response:
    """Remove an item."""
    gallery = gallery_of(request)
    await work(request, lambda: gallery.remove(gallery.check_id(id)))
    return Response(status_code=204)


def _is_version(given: str | None, digest: str) -> bool:
    """Return whether an address names the picture that the item has."""
    return given is not None and _SHA256.fullmatch(digest) is not None and given == digest[:16]


def _shown(item: Item) -> dict[str, Any]:
    return {"id": item.id, "metadata": item.metadata}


def _included(gallery: Gallery, item: Item, include: Sequence[IncludedOfItem], form: EncodingFormat) -> dict[str, Any]:
    """Return what `include` names of an item. Its embedding is left out if it has been removed meanwhile."""
    told = included(item, include)
    embedding = gallery.store.embedding(item.id) if "embedding" in include else None
    if embedding is not None:
        (row,) = listed(embedding[None], form)
        told["embedding"] = row if isinstance(row, str) else row.tolist()
    return told
