"""HTTP routes. What comes in is read by bodies and schemas, the work itself is the gallery's."""

import asyncio
import importlib.metadata
import io
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import faiss
import fastapi_swagger
import numpy as np
import onnxruntime
import orjson
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from service import FloatArray, metrics
from service.encoding.images import media_type
from service.errors import FingerprintMismatch, InvalidRequest, LookalikeError, TooLarge, UnsupportedFormat, each
from service.gallery import Gallery
from service.http import openai, schemas
from service.http import uploads as bulk
from service.http.bodies import (
    check_count,
    content_type,
    from_base64,
    parse_json_object,
    read_body,
    read_form,
    read_one_picture,
    read_pictures,
)
from service.http.openapi import BODY, WORK, answers, body, describe, json_body, ndjson, picture_body, zip_body
from service.http.problems import answer, failure, problem
from service.http.schemas import ById, ByImage, ByVector, EncodingFormat, Included, SearchMany, read_json
from service.http.slots import Slots
from service.store import Hit, Item
from service.store.filters import parse_filter

_PAGE = Path(__file__).parents[1] / "page"
_DEFAULT_K = 10
_MERGE_PATCH = "application/merge-patch+json"
_NPY = "application/x-npy"
_LONGEST = 2000  # characters of a parameter: written with percent signs they must fit into a line of the parser
_VERSIONS = {
    name: importlib.metadata.version(name) for name in ("lookalike", "bentoml", "pillow", "fastapi", "apsw")
} | {"onnxruntime": onnxruntime.__version__, "faiss": faiss.__version__}

R = TypeVar("R")


class JsonResponse(Response):
    """JSON with NumPy's arrays in it, written in a tenth of the time."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


class _IdConvertor(Convertor[str]):
    """An id in a path: anything but the names of an item's own pictures."""

    regex = r"(?s:.*)(?<!/thumbnail)(?<!/content)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("item", _IdConvertor())


class _DirectRoute(APIRoute):
    """A route that is called as it stands where a request has no parameters.

    FastAPI has nothing to read for it then, and would take a tenth of a small encoder's time to find that out: the
    endpoints take a Request, return a Response and have defaults for all else.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["query_string"] or self.dependant.path_params or scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)
        else:
            response: Response = await self.endpoint(Request(scope, receive, send))
            await response(scope, receive, send)


K = Annotated[int, Query(ge=1, description="Hits a query, at most.")]
Fingerprint = Annotated[
    str | None, Query(description="Refused with 409 where another encoder runs here.", max_length=128)
]
Threshold = Annotated[float, Query(ge=-1, le=1, allow_inf_nan=False)]
FilterText = Annotated[
    str | None,
    Query(description='JSON, as {"label": "7"}.', json_schema_extra={"format": "filter"}, max_length=_LONGEST),
]
Include = Annotated[list[Included], Query()]
Metadata = Annotated[
    str | None,
    Query(description="A JSON object.", json_schema_extra={"format": "metadata"}, max_length=_LONGEST),
]


def create_app() -> FastAPI:
    """Make the HTTP app. Whoever runs it sets `app.state.gallery` and `.slots` before the first request."""
    app = FastAPI(
        title="Lookalike",
        version=_VERSIONS["lookalike"],
        description="Image similarity search. Errors are application/problem+json.",
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
    )
    fastapi_swagger.patch_fastapi(app, redirect_from_root_to_docs=False)  # /docs, its scripts from the package
    app.router.route_class = _DirectRoute
    describe(app)
    app.add_exception_handler(LookalikeError, _on_lookalike_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_failure)  # raised again after the answer: the guard logs it
    app.mount("/page", StaticFiles(directory=_PAGE), name="page")
    _add_embedding(app)
    _add_search(app)
    _add_items(app)

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> FileResponse:
        _gallery_with_store(request)
        return FileResponse(_PAGE / "index.html")

    @app.get("/metrics", include_in_schema=False)
    async def prometheus(request: Request) -> Response:
        gallery = _gallery(request)
        if not gallery.settings.no_store:  # in no place: told when all are busy
            metrics.items.set(await asyncio.to_thread(gallery.store.count))
        return Response(await asyncio.to_thread(metrics.report), headers={"Content-Type": metrics.CONTENT_TYPE})

    @app.get("/info", responses=answers(schemas.Info, *WORK))
    async def info(request: Request) -> Response:
        """What runs here: encoder, embedding space, gallery, limits, versions."""
        return await _work(request, lambda: JSONResponse(_info(_gallery(request))))

    return app


def _add_embedding(app: FastAPI) -> None:
    @app.post(
        "/embed",
        openapi_extra=body(picture_body(several=True) | json_body(schemas.EmbedBody)),
        responses=answers(
            schemas.Embeddings, *WORK, *BODY, 409, 422, more={_NPY: {"schema": {"type": "string", "format": "binary"}}}
        ),
    )
    async def embed(
        request: Request, encoding_format: EncodingFormat = "float", fingerprint: Fingerprint = None
    ) -> Response:
        """Embed pictures: one as the body, or `file` fields, or JSON with base64 strings or data URIs.

        `Accept: application/x-npy` gives them as a NumPy file, (N, D) float32.
        """
        gallery = _gallery(request)
        as_npy = _NPY in request.headers.get("accept", "")
        images: list[bytes | str]
        if content_type(request) == "application/json":
            asked = await read_json(request, gallery.settings, schemas.EMBED)
            images = [*asked.images]
            encoding_format = asked.encoding_format if "encoding_format" in asked.model_fields_set else encoding_format
            fingerprint = fingerprint if asked.fingerprint is None else asked.fingerprint
        else:
            images = [*(await read_pictures(request, gallery.settings))[0]]
        _check_fingerprint(gallery, fingerprint)
        check_count(len(images), gallery.settings)

        embeddings = await _embed(request, images)
        if as_npy:
            buffer = io.BytesIO()
            np.save(buffer, embeddings)
            return Response(buffer.getvalue(), media_type=_NPY)
        return JsonResponse(
            {
                "model": gallery.card.name,
                "fingerprint": gallery.card.fingerprint,
                "dimension": gallery.encoder.dimension,
                "embeddings": schemas.listed(embeddings, encoding_format),
            }
        )

    @app.post(
        "/v1/embeddings",
        openapi_extra=body(json_body(schemas.OpenAIBody)),
        responses=answers(schemas.OpenAIEmbeddings, *WORK, *BODY, 404, 422, openai=True),
    )
    async def openai_embeddings(request: Request) -> Response:
        """Embed pictures for clients that were written for OpenAI's API; errors come in its shape, too."""
        gallery = _gallery(request)
        _expect_json(request, "application/json")
        asked = await read_json(request, gallery.settings, schemas.OPENAI)
        return JsonResponse(openai.answer(asked, gallery, await _embed(request, openai.pictures(asked, gallery))))


def _add_search(app: FastAPI) -> None:
    @app.post(
        "/search",
        openapi_extra=body(
            picture_body()
            | json_body(schemas.SearchById, schemas.SearchByImage, schemas.SearchByVector, schemas.SearchMany)
        ),
        responses=answers((schemas.Hits, schemas.Results), *WORK, *BODY, 404, 409, 422),
    )
    async def search(
        request: Request,
        k: K = _DEFAULT_K,
        threshold: Threshold = -1,
        filter: FilterText = None,
        include: Include = ["metadata"],  # noqa: B006  # FastAPI copies it
        fingerprint: Fingerprint = None,
    ) -> Response:
        """Find the k items most like a picture, a vector or an item; the item itself is left out.

        In JSON also several at once: the answer to `queries` is `results`. What the body leaves out of `threshold`,
        `filter`, `include`, `fingerprint` and, for a single query, `k`, the address may say.
        """
        gallery = _gallery_with_store(request)
        queries: list[ByImage | ByVector | ById | bytes]
        where = None if filter is None else parse_filter(parse_json_object(filter, "filter"))
        several = False
        if content_type(request) == "application/json":
            asked = await read_json(request, gallery.settings, schemas.SEARCH)
            several = isinstance(asked, SearchMany)
            queries = list(asked.queries) if isinstance(asked, SearchMany) else [asked]
            said = asked.model_fields_set
            k = asked.k if "k" in said or several else k
            threshold = asked.threshold if "threshold" in said else threshold
            include = asked.include if "include" in said else include
            where = where if asked.filter is None else parse_filter(asked.filter)
            fingerprint = fingerprint if asked.fingerprint is None else asked.fingerprint
        else:
            queries = [(await read_one_picture(request, gallery.settings))[0]]
        _check_fingerprint(gallery, fingerprint)
        if len(queries) > gallery.settings.max_queries:
            raise TooLarge(f"expected at most {gallery.settings.max_queries} queries, got {len(queries)}")
        check_count(sum(isinstance(query, ByImage) for query in queries), gallery.settings)

        def find() -> Response:
            found = gallery.find(plain, k, threshold, where)
            results = [{"hits": [_show_hit(gallery, hit, include) for hit in hits]} for hits in found]
            return JsonResponse({"results": results} if several else results[0])

        async with _slots(request).place(request.receive) as place:
            plain = each("query", queries, lambda query: _plain(gallery, query))
            await place.wait([query for query in plain if isinstance(query, Future)])
            return await place.run(find)


def _add_items(app: FastAPI) -> None:
    @app.get("/images", responses=answers(schemas.Page, 400, 404, *WORK))
    async def list_images(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        cursor: Annotated[str | None, Query(pattern="^[0-9]{1,18}$", description="An earlier answer's `next`.")] = None,
    ) -> Response:
        """List items in the order of adding; `next` is the cursor of the next page, or null."""

        def work() -> Response:
            items, following = _gallery(request).store.scan(limit, int(cursor or 0))
            after = None if following is None else str(following)
            return JSONResponse({"items": [_show(item) for item in items], "next": after})

        return await _work(request, work)

    @app.post(
        "/images",
        openapi_extra=body(picture_body(several=True, metadata="metadata-by-id", raw=False) | zip_body()),
        responses=answers(None, *BODY, *WORK, 403, 404, 409)
        | {200: {"description": "A line a picture.", "content": ndjson()}},
    )
    async def add_images(request: Request, fingerprint: Fingerprint = None) -> Response:
        """Add or replace many pictures: `file` fields whose names are the ids, or a zip whose paths are.

        The form's field `metadata`, in a zip `metadata.json`, holds an object of metadata by id. The answer has a
        line of JSON for each picture, as it reaches the store or will not: one that failed may be sent again, and so
        may one that did not.
        """
        gallery = _gallery_with_store(request)
        _check_fingerprint(gallery, fingerprint)
        kind = content_type(request)
        pictures: bulk.Archive | bulk.Uploads
        if kind == "multipart/form-data":
            pictures = bulk.Uploads(await read_form(request, gallery.settings, gallery.settings.max_bulk_images))
        elif kind in ("application/zip", "application/x-zip-compressed"):
            content = await read_body(request, gallery.settings.max_request_bytes)
            pictures = await _work(request, lambda: bulk.Archive(content, gallery.settings))
        else:
            raise UnsupportedFormat("expected multipart/form-data with fields file, or application/zip")
        lines: AsyncIterator[str] = bulk.add_all(pictures, gallery, _slots(request))
        return StreamingResponse(lines, media_type="application/x-ndjson")

    @app.get("/images/{id:item}/thumbnail", response_class=Response, responses=answers("image/webp", 400, 404, *WORK))
    async def image_thumbnail(request: Request, id: str) -> Response:
        """A small WebP of an item."""
        gallery = _gallery(request)
        data = await _work(request, lambda: gallery.thumbnail(gallery.check_id(id)))
        return Response(data, media_type="image/webp")

    @app.get("/images/{id:item}/content", response_class=Response, responses=answers("image/*", 400, 404, *WORK))
    async def image_content(request: Request, id: str) -> Response:
        """The picture's own bytes, where the store keeps them."""
        gallery = _gallery(request)
        data = await _work(request, lambda: gallery.original(gallery.check_id(id)))
        # The bytes came from a client: the type is ours, and the guard says that a browser must not guess another.
        return Response(data, media_type=media_type(data))

    @app.put(
        "/images/{id:item}",
        openapi_extra=body(picture_body(metadata="metadata")),
        responses=answers(schemas.ItemAnswer, *WORK, *BODY, 403, 404, 409, 422, success=(200, 201)),
    )
    async def put_image(
        request: Request, id: str, metadata: Metadata = None, fingerprint: Fingerprint = None
    ) -> Response:
        """Add a picture under an id of yours, or replace it; `metadata` is a JSON object."""
        gallery = _gallery_with_store(request)
        id = gallery.check_id(id)
        _check_fingerprint(gallery, fingerprint)
        image, fields = await read_one_picture(request, gallery.settings)
        if fields.keys() - {"metadata"}:
            raise InvalidRequest("expected the form fields file and metadata, no others")
        text = fields.get("metadata", metadata)
        facts = {} if text is None else parse_json_object(text, "metadata")
        facts = gallery.check_metadata(facts)
        new = await _work(request, lambda: gallery.add(id, image, facts))
        return JSONResponse({"id": id, "metadata": facts}, 201 if new else 200)

    @app.get("/images/{id:item}", responses=answers(schemas.ItemDetails, 400, 404, *WORK))
    async def get_image(request: Request, id: str) -> Response:
        """An item's id and metadata, and the variant of the encoder that embedded it."""
        gallery = _gallery(request)
        item = await _work(request, lambda: gallery.get(gallery.check_id(id)))
        return JSONResponse(_show(item) | {"variant": item.variant})

    @app.patch(
        "/images/{id:item}",
        openapi_extra=body(json_body(schemas.PatchBody, types=("application/json", _MERGE_PATCH))),
        responses=answers(schemas.ItemAnswer, *WORK, *BODY, 403, 404),
    )
    async def patch_image(request: Request, id: str) -> Response:
        """Change an item's metadata by a merge patch: a field given as null goes, others are set."""
        gallery = _gallery(request)
        id = gallery.check_id(id)
        _expect_json(request, "application/json", _MERGE_PATCH)
        asked = await read_json(request, gallery.settings, schemas.PATCH)
        item = await _work(request, lambda: gallery.change_metadata(id, asked.metadata))
        return JSONResponse(_show(item))

    @app.delete("/images/{id:item}", status_code=204, responses=answers(None, 400, 403, 404, *WORK, success=(204,)))
    async def delete_image(request: Request, id: str) -> Response:
        """Remove an item."""
        gallery = _gallery(request)
        await _work(request, lambda: gallery.remove(gallery.check_id(id)))
        return Response(status_code=204)


# What the routes share ---------------------------------------------------------------------------


def _gallery(request: Request) -> Gallery:
    gallery: Gallery = request.app.state.gallery
    return gallery


def _gallery_with_store(request: Request) -> Gallery:
    """The gallery, before a body is read for it. Raises NoStore."""
    gallery = _gallery(request)
    _ = gallery.store
    return gallery


def _slots(request: Request) -> Slots:
    slots: Slots = request.app.state.slots
    return slots


async def _work(request: Request, work: Callable[[], R]) -> R:
    """Do what blocks in a place of its own. Raises Busy, TimedOut."""
    return await _slots(request).run(work, request.receive)


async def _embed(request: Request, images: Sequence[bytes | str]) -> FloatArray:
    """Embed pictures in a place of the request's own; of several it names every bad one."""
    gallery = _gallery(request)
    async with _slots(request).place(request.receive) as place:
        begun = [_begin(gallery, image) for image in images]
        await place.wait(begun)
    return np.array(each("picture", begun, Future.result))


def _check_fingerprint(gallery: Gallery, fingerprint: str | None) -> None:
    if fingerprint is not None and fingerprint != gallery.card.fingerprint:
        raise FingerprintMismatch(
            f"the request names another encoder than the one that runs here, whose fingerprint is "
            f"{gallery.card.fingerprint}"
        )


def _expect_json(request: Request, *types: str) -> None:
    if content_type(request) not in types:
        raise UnsupportedFormat(f"expected a body of {' or '.join(types)}")


def _begin(gallery: Gallery, image: bytes | str) -> Future[FloatArray]:
    """Begin to embed a picture that came as it is, or in base64."""
    if isinstance(image, str):
        return gallery.embed_soon(partial(from_base64, image, gallery.settings.max_image_bytes))
    return gallery.embed_soon(image)


def _plain(gallery: Gallery, query: ByImage | ByVector | ById | bytes) -> Future[FloatArray] | str | list[float]:
    match query:
        case ByImage():
            return _begin(gallery, query.image)
        case ByVector():
            return query.vector
        case ById():
            return gallery.check_id(query.id)
    return _begin(gallery, query)


def _show(item: Item) -> dict[str, Any]:
    return {"id": item.id, "metadata": item.metadata}


def _show_hit(gallery: Gallery, hit: Hit, included: list[Included]) -> dict[str, Any]:
    shown: dict[str, Any] = {"id": hit.id, "score": hit.score}
    if "metadata" in included:
        shown["metadata"] = orjson.Fragment(hit.metadata_json)  # as it was kept: orjson refuses integers beyond 64 bits
    if "embedding" in included:
        embedding = gallery.store.embedding(hit.id)
        if embedding is not None:  # it may have been removed meanwhile
            shown["embedding"] = embedding
    return shown


def _info(gallery: Gallery) -> dict[str, Any]:
    settings = gallery.settings
    return {
        "model": gallery.card.name,
        "fingerprint": gallery.card.fingerprint,
        "dimension": gallery.encoder.dimension,
        "count": None if settings.no_store else gallery.store.count(),
        "variant": gallery.encoder.variant,
        "provider": gallery.encoder.provider,
        "preprocessing": {k: v for k, v in asdict(gallery.card.preprocessing).items() if k != "canonical"},
        "notice": None if settings.no_store else gallery.notice(),
        "limits": {
            name: getattr(settings, name)
            for name in type(settings).model_fields
            if name.startswith("max_") or name.endswith("_timeout_s")
        },
        "versions": _VERSIONS,
    }


# Errors ------------------------------------------------------------------------------------------


async def _on_lookalike_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LookalikeError)
    return answer(request.scope, error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = first["loc"][1] if len(first["loc"]) > 1 else "request"  # a parameter's name, which is ours
    return problem(request.scope, 400, "invalid_request", f"{where}: {first['msg']}")


async def _on_disconnect(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody hears it; the log shows it


async def _on_failure(request: Request, _: Exception) -> Response:
    return failure(request.scope)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code != 405:
        code = "unknown_route" if error.status_code == 404 else "http_error"
        return problem(request.scope, error.status_code, code, f"{error.detail}; /docs lists the routes")
    methods = {
        method
        for route in request.app.routes
        if route.matches(request.scope)[0] is not Match.NONE
        for method in getattr(route, "methods", None) or ()
    }
    allowed = ", ".join(sorted(methods))
    detail = f"expected one of the methods {allowed}; /docs lists the routes"
    return problem(request.scope, 405, "method_not_allowed", detail, headers={"Allow": allowed})
