"""The OpenAPI document: the bodies and answers that routes declare, their examples, and the limits of this service."""

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.encoding.images import FORMATS
from service.gallery import Gallery
from service.http import query_bodies, schemas
from service.http.keys import read_keys
from service.http.schemas import OpenAIError, Problem
from service.settings import Settings
from service.store.filters import json_schemas

_PREFIX = "#/components/schemas/"

PICTURE_TYPES = (*(f"image/{format.lower()}" for format in FORMATS), "application/octet-stream")
NPY = "application/x-npy"

_DOT = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
_FINGERPRINT = "7630ccfe" + "0" * 56
_COPY = {"id": "b.jpg", "score": 0.9123, "exact": False, "width": 320, "height": 240}
_COPY |= {"size_bytes": 51200, "format": "JPEG", "date": "2026-11-27T10:00:00"}
_COPY |= {"digest": "0" * 64, "source": "/pictures/b.jpg"}
_HIT = {"id": "digits/00634", "score": 0.9897, "metadata": {"label": "7"}}


def _default(limit: str) -> Any:
    return Settings.model_fields[limit].default


# The schema of an id in a path, by the default limit; `_bound` puts this service's own in its place.
ITEM_ID = {
    "minLength": 1,
    "maxLength": _default("max_id_bytes"),
    "pattern": r"^[^\x00-\x1f\x7f-\x9f]+$",
    "not": {"enum": [".", ".."]},
}

# An example of each status: its code and its detail.
STATUSES = {
    400: ("invalid_request", f"k: expected a whole number from 1 to {_default('max_k')}, got 0"),
    401: ("unauthorized", "expected an API key in the header Authorization: Bearer KEY"),
    403: ("read_only_key", "this API key may read only; expected one that may write"),
    404: ("not_found", "no item has this id"),
    408: ("slow_body", f"the body did not come in full within {_default('body_timeout_s'):g} s"),
    409: ("fingerprint_mismatch", "the request names another encoder than the one that runs here"),
    416: ("range_not_satisfiable", "the range begins behind the end of the file, which has 51200 bytes"),
    413: ("too_large", f"the picture is 9000x9000; the limit is {_default('max_pixels')} pixels"),
    415: ("unsupported_format", f"not a picture that we take: expected the bytes of one of {', '.join(FORMATS)}"),
    422: ("undecodable_picture", "the picture is damaged or cut short: image file is truncated"),
    429: ("busy", f"{_default('max_waiting')} requests are waiting already; try again in a second"),
    503: ("store_paused", "the store cannot be written: database or disk is full; it is read-only until there is room"),
    504: ("timed_out", f"the work took longer than {_default('work_timeout_s'):g} s"),
}
WORK = (401, 429, 503, 504)
BODY = (400, 408, 413, 415)

_BODIES: dict[type[BaseModel], dict[str, Any]] = {
    schemas.EmbedBody: {"images": [_DOT], "encoding_format": "base64"},
    schemas.EmbedTextsBody: {"texts": ["a red bicycle", "un vélo rouge"]},
    query_bodies.SearchById: {"id": "digits/00007", "k": 2, "threshold": 0.5},
    query_bodies.SearchByImage: {"image": _DOT, "filter": {"label": {"$in": ["1", "7"]}}},
    query_bodies.SearchByText: {"text": "a red bicycle", "k": 5},
    query_bodies.SearchByVector: {"vector": [0.6, -0.8], "include": ["metadata", "embedding"]},
    query_bodies.SearchByAll: {"all": [{"id": "digits/00007"}, {"image": _DOT, "weight": -0.5}]},
    query_bodies.SearchMany: {"queries": [{"id": "digits/00007"}, {"image": _DOT}], "k": 5},
    schemas.ClassifyBody: {"images": [_DOT], "labels": ["cat", "dog"], "templates": ["a photo of a {label}"]},
    schemas.PatchBody: {"metadata": {"label": "8", "year": None}},
    schemas.AddItemsBody: {"items": [{"id": "a.png", "embedding": [0.6, -0.8], "metadata": {"label": "7"}}]},
    schemas.CountBody: {"filter": {"label": {"$ne": "7"}}, "prefix": "digits/"},
    schemas.MovesBody: {"moves": [{"id": "a.png", "digest": "0" * 64, "to": "b.png", "source": "/pictures/b.png"}]},
    schemas.DismissBody: {"ids": ["digits/00007", "digits/00634"]},
    schemas.OpenAIBody: {"model": "digits", "input": [_DOT], "modality": "image"},
    schemas.OpenAITextBody: {"model": "clip", "input": ["a red bicycle"], "modality": "text"},
}
# The models that only an encoder with a text tower takes.
_OF_TEXTS: tuple[type[BaseModel], ...] = (
    schemas.EmbedTextsBody,
    query_bodies.ByText,
    query_bodies.PartByText,
    query_bodies.SearchByText,
    schemas.ClassifyBody,
    schemas.OpenAITextBody,
)
_ANSWERS: dict[type[BaseModel], Any] = {
    schemas.Hits: {"hits": [_HIT]},
    schemas.Results: {"results": [{"hits": [_HIT]}]},
    schemas.Arrays: {"ids": [["digits/00634", "digits/00011"]], "scores": [[0.9897, 0.95]]},
    schemas.Embeddings: {"model": "digits", "fingerprint": _FINGERPRINT, "dimension": 2, "embeddings": [[0.6, -0.8]]},
    schemas.Classified: {
        "model": "clip",
        "fingerprint": _FINGERPRINT,
        "logit_scale": 100.0,
        "results": [
            {
                "labels": [
                    {"label": "cat", "probability": 0.98, "score": 0.27},
                    {"label": "dog", "probability": 0.02, "score": 0.23},
                ]
            }
        ],
    },
    schemas.OpenAIEmbeddings: {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.6, -0.8]}],
        "model": "digits",
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
    },
    schemas.ItemAnswer: {"id": "digits/00007", "metadata": {"label": "7"}},
    schemas.Moved: {"moved": 1},
    schemas.ItemDetails: {
        "id": "digits/00007",
        "metadata": {"label": "7"},
        "variant": "int8",
        "file": {"width": 8, "height": 8, "size_bytes": 120, "format": "PNG", "date": None, "mtime_ns": None},
    },
    schemas.Page: {"items": [{"id": "digits/00007", "metadata": {"label": "7"}}], "total": 1797, "next": "8"},
    schemas.Folders: {"folders": [{"prefix": "a/2024/", "count": 12}], "left_out": 0},
    schemas.Fields: {
        "keys": [{"key": "label", "count": 1797, "distinct": 10, "values": [{"value": "7", "count": 179}]}],
        "left_out": 0,
    },
    schemas.ScoresAnswer: {
        "near": 0.85,
        "alike": 0.71,
        "strangers": [0.12, 0.38, 0.61],
        "neighbours": [0.62, 0.81, 0.93],
        "sampled": 256,
    },
    schemas.Count: {"count": 1618},
    schemas.Removed: {"removed": 3},
    schemas.OpenAIModels: {
        "object": "list",
        "data": [{"id": "mnist", "object": "model", "created": 0, "owned_by": "lookalike"}],
    },
    schemas.Groups: {
        "sequence": 1797,
        "threshold": 0.85,
        "total": 1,
        "rest": 1,
        "rest_bytes": 51200,
        "groups": [
            {
                "best": "a.png",
                "reason": "most pixels, 640×480",
                "items": [_COPY | {"id": "a.png", "score": 1.0, "width": 640, "height": 480}, _COPY],
            }
        ],
        "next": None,
    },
    schemas.Map: {
        "version": "pca.2",
        "sequence": 2,
        "method": "pca",
        "progress": None,
        "count": 2,
        "ids": ["a.png", "b.png"],
        "positions": "AAAAgP//AIA=",
        "values": ["7"],
        "codes": "AQAAAA==",
    },
    schemas.Progress: {"progress": 0.42},
    schemas.Dismissed: {"pairs": 1},
    schemas.BulkLine: {"index": 0, "id": "a.png", "status": 201},
}


def json_body(*models: type[BaseModel]) -> dict[str, Any]:
    """Return the content of a JSON body that is one of these models."""
    choices = [_reference(model) for model in models]
    examples = {model.__name__: {"value": _BODIES[model]} for model in models}
    schema = choices[0] if len(choices) == 1 else {"oneOf": choices}
    return {"application/json": {"schema": schema, "examples": examples}}


def vectors_body() -> dict[str, Any]:
    """Return the content of a body that is a NumPy file of vectors."""
    return {NPY: {"schema": {"type": "string", "format": "binary", "description": "(Q, D) float32 or float64."}}}


def picture_body(several: bool = False, metadata: str = "", raw: bool = True, sources: bool = False) -> dict[str, Any]:
    """Return the content of a body of pictures: the bytes of one image file, or a form with the field `file`.

    Args:
        several: whether the form may hold several files.
        metadata: format of the form's field `metadata`; without that field if empty.
        raw: whether the body may be an image file itself.
        sources: whether the form may have the field `sources`.
    """
    picture = {"type": "string", "format": "binary"}
    properties: dict[str, Any] = {"file": {"type": "array", "items": picture, "minItems": 1} if several else picture}
    if metadata:
        properties["metadata"] = {"type": "string", "format": metadata, "description": "A JSON object."}
    if sources:
        told = "A JSON object of texts by id: where the pictures came from."
        properties["sources"] = {"type": "string", "format": "metadata-by-id", "description": told}
    form = {"type": "object", "properties": properties, "required": ["file"], "additionalProperties": False}
    encoding = {"file": {"contentType": ", ".join(PICTURE_TYPES[:-1])}}
    content: dict[str, Any] = {"multipart/form-data": {"schema": form, "encoding": encoding}}
    if raw:
        example = {"examples": {"digit": {"externalValue": "page/example.png"}}}
        content |= {kind: {"schema": picture} | (example if kind == "image/png" else {}) for kind in PICTURE_TYPES}
    return content


def zip_body() -> dict[str, Any]:
    """Return the content of a body that is a zip file of pictures."""
    schema = {"type": "string", "format": "binary"}
    return {"application/zip": {"schema": schema, "examples": {"digits": {"externalValue": "page/example.zip"}}}}


def body(content: dict[str, Any]) -> dict[str, Any]:
    """Return the openapi_extra of a route with this body."""
    return {"requestBody": {"required": True, "content": content}}


def answers(
    ok: type[BaseModel] | tuple[type[BaseModel], ...] | None,
    *statuses: int,
    media: tuple[str, ...] = (),
    success: tuple[int, ...] = (200,),
    more: dict[str, Any] | None = None,
    openai: bool = False,
) -> dict[int | str, dict[str, Any]]:
    """Return the responses of a route.

    Args:
        ok: the model of a good answer, several of which it is one, or None for none.
        statuses: the errors that the route can answer, each a key of STATUSES.
        media: the media types of a good answer that is bytes.
        success: the statuses of a good answer.
        more: further media types of a good answer.
        openai: whether errors have OpenAI's shape.
    """
    content: dict[str, Any] = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in media}
    if ok is not None:
        models = ok if isinstance(ok, tuple) else (ok,)
        choices = [_reference(model) for model in models]
        examples = {model.__name__: {"value": _ANSWERS[model]} for model in models if model in _ANSWERS}
        schema = choices[0] if len(choices) == 1 else {"anyOf": choices}
        content = {"application/json": {"schema": schema} | ({"examples": examples} if examples else {})}
    told: dict[int | str, dict[str, Any]] = {
        status: {"description": _DONE.get(status, "Done."), **({"content": content | (more or {})} if content else {})}
        for status in success
    }
    return told | {status: _problem(status, openai) for status in sorted(statuses)}


def stored_answers(*statuses: int, media: tuple[str, ...]) -> dict[int | str, dict[str, Any]]:
    """Return the responses of a route that answers with a stored file of one of these media types, or a part of it."""
    return answers(None, *statuses, 416, media=media, success=(200, 206)) | {
        304: {"description": "As the client has it."}
    }


_DONE = {
    206: "A part of the file.",
    200: "Done.",
    202: "Not done yet.",
    201: "The id is new.",
    204: "The item is removed.",
}


def ndjson() -> dict[str, Any]:
    """Return the content of an answer with one JSON object per line."""
    example = (
        '{"index":0,"id":"a.png","status":201}\n'
        '{"index":1,"id":"b.png","status":422,"code":"undecodable_picture","detail":"the picture is damaged"}\n'
    )
    return {"application/x-ndjson": {"schema": {"type": "string"}, "examples": {"lines": {"value": example}}}}


def _problem(status: int, openai: bool) -> dict[str, Any]:
    code, detail = STATUSES[status]
    description = code.replace("_", " ").capitalize() + "."
    headers = {"Retry-After": {"schema": {"type": "string"}}} if status in (429, 503) else {}
    if openai:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        error = {"message": detail, "type": kind, "param": None, "code": code}
        content = {"application/json": _shown(OpenAIError, {"error": error})}
    else:
        title = code.replace("_", " ").capitalize()
        value = {"type": "about:blank", "title": title, "status": status, "detail": detail, "code": code}
        content = {"application/problem+json": _shown(Problem, value | {"request_id": "3f0c"})}
    return {"description": description, "content": content} | ({"headers": headers} if headers else {})


def _shown(model: type[BaseModel], value: Any) -> dict[str, Any]:
    return {"schema": _reference(model), "examples": {"example": {"value": value}}}


def _reference(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": _PREFIX + model.__name__}


def describe(app: FastAPI) -> None:
    """Replace `app.openapi` by one whose schemas and limits are ours.

    The document is computed once. Until a gallery is set it has the default limits.
    """
    by_fastapi = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = by_fastapi()
            models = [*((model, "validation") for model in _BODIES), *((model, "serialization") for model in _ALL)]
            _, ours = models_json_schema(models, ref_template=_PREFIX + "{model}")  # type: ignore[arg-type]
            document["components"] = {"schemas": ours["$defs"] | json_schemas(_PREFIX)}
            _remove_undeclared_errors(document, app)
            if hasattr(app.state, "gallery"):
                _bound(document, app.state.gallery)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _remove_undeclared_errors(document: dict[str, Any], app: FastAPI) -> None:
    """Remove the 422 that FastAPI adds to routes with parameters: our validation errors are 400."""
    for route in app.routes:
        if isinstance(route, APIRoute) and route.include_in_schema and 422 not in route.responses:
            for method in route.methods or ():
                document["paths"][route.path_format][method.lower()]["responses"].pop("422", None)


def _bound(document: dict[str, Any], gallery: Gallery) -> None:
    """Put the limits of this service into the document, so that a request beyond them does not match its schema."""
    settings = gallery.settings
    if len(read_keys(settings)):
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    properties = {name: model.get("properties", {}) for name, model in document["components"]["schemas"].items()}
    dimension = gallery.encoder.dimension
    for name in ("ByVector", "PartByVector", "SearchByVector"):
        properties[name]["vector"] |= {"minItems": dimension, "maxItems": dimension}
    for name in ("ById", "PartById", "SearchById"):
        properties[name]["id"] |= ITEM_ID | {"maxLength": settings.max_id_bytes}
    for id in (properties["NewItemBody"]["id"], properties["MoveBody"]["id"], properties["MoveBody"]["to"]["anyOf"][0]):
        id |= ITEM_ID | {"maxLength": settings.max_id_bytes}
    properties["NewItemBody"]["embedding"]["anyOf"][0] |= {"minItems": dimension, "maxItems": dimension}
    properties["AddItemsBody"]["items"]["maxItems"] = settings.max_bulk_images
    properties["DismissBody"]["ids"]["items"] |= ITEM_ID | {"maxLength": settings.max_id_bytes}
    for name in ("SearchById", "SearchByImage", "SearchByText", "SearchByVector", "SearchByAll"):
        properties[name]["k"]["maximum"] = settings.max_k
    properties["SearchMany"]["k"]["maximum"] = settings.max_k_of_many
    properties["EmbedBody"]["images"]["maxItems"] = settings.max_images
    several = properties["SearchMany"].pop("queries")
    items = {"anyOf": [_reference(model) for model in (query_bodies.ByVector, query_bodies.ById, query_bodies.ByText)]}
    properties["SearchMany"]["queries"] = {
        "description": f"At most {settings.max_images} of them pictures.",
        "anyOf": [
            several | {"maxItems": min(settings.max_queries, settings.max_images)},
            several | {"maxItems": settings.max_queries, "items": items},
        ],
    }
    for name in ("OpenAIBody", "OpenAITextBody"):
        openai = properties[name]
        openai["model"]["const"] = gallery.card.name
        openai["dimensions"] = {"enum": [dimension, None]}
    _bound_texts(document, gallery)
    for operations in document["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "k":
                    parameter["schema"]["maximum"] = settings.max_k
                elif parameter["in"] == "path":
                    parameter["schema"]["maxLength"] = settings.max_id_bytes


def _bound_texts(document: dict[str, Any], gallery: Gallery) -> None:
    """Put the limits of texts into the document, or take texts out of it where the encoder reads none."""
    models, settings = document["components"]["schemas"], gallery.settings
    properties = {name: model.get("properties", {}) for name, model in models.items()}
    if not gallery.reads_texts:
        properties["OpenAIBody"]["modality"] = {"enum": ["image", None]}
        document["paths"].pop("/classify", None)
        _drop(document, {model.__name__ for model in _OF_TEXTS})
        return
    longest = {"maxLength": settings.max_text_characters}
    for name in ("ByText", "PartByText", "SearchByText"):
        properties[name]["text"] |= longest
    properties["EmbedTextsBody"]["texts"]["maxItems"] = settings.max_texts
    properties["EmbedTextsBody"]["texts"]["items"] |= longest
    one, several = properties["OpenAITextBody"]["input"]["anyOf"]
    one |= longest
    several["items"] |= longest
    # What is no data URI is a text, unless the request says otherwise.
    properties["OpenAIBody"]["modality"] = {"const": "image"}
    models["OpenAIBody"]["required"].append("modality")
    properties["OpenAITextBody"]["modality"] = {"enum": ["text", None]}
    properties["ClassifyBody"]["images"]["maxItems"] = settings.max_images
    properties["ClassifyBody"]["labels"]["maxItems"] = settings.max_texts


def _drop(node: Any, names: set[str]) -> None:
    """Remove schemas, their examples and all references to them."""
    if isinstance(node, list):
        node[:] = [one for one in node if not (isinstance(one, dict) and one.get("$ref", "")[len(_PREFIX) :] in names)]
        for one in node:
            _drop(one, names)
    elif isinstance(node, dict):
        for name in names & node.keys():
            del node[name]
        for one in node.values():
            _drop(one, names)


_ALL = (*_ANSWERS, schemas.Info, Problem, OpenAIError)
