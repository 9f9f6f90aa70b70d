"""The OpenAPI document: what each route takes and answers, with examples. The routes themselves are in api.py."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.gallery import Gallery
from service.http import schemas
from service.http.keys import read_keys
from service.http.schemas import OpenAIError, Problem

PICTURE_TYPES = ("image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "application/octet-stream")

_DOT = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
_FINGERPRINT = "7630ccfe" + "0" * 56
_HIT = {"id": "digits/00634", "score": 0.9897, "metadata": {"label": "7"}}

# What is said of each status: code and detail of an example.
STATUSES = {
    400: ("invalid_request", "k: expected a whole number from 1 to 1000, got 0"),
    401: ("unauthorized", "expected an API key in the header Authorization: Bearer KEY"),
    403: ("read_only_key", "this API key may read only; expected one that may write"),
    404: ("not_found", "no item has this id"),
    408: ("slow_body", "the body did not come in full within 30 s"),
    409: ("fingerprint_mismatch", "the request names another encoder than the one that runs here"),
    413: ("too_large", "the picture is 9000x9000; the limit is 25000000 pixels"),
    415: ("unsupported_format", "not a picture that we take: expected the bytes of one of JPEG, PNG, WEBP, GIF, BMP"),
    422: ("undecodable_picture", "the picture is damaged or cut short: image file is truncated"),
    429: ("busy", "256 requests are waiting already; try again in a second"),
    503: ("invalid_store", "the store cannot be written: database or disk is full"),
    504: ("timed_out", "the work took longer than 30 s"),
}
WORK = (401, 429, 503, 504)
BODY = (400, 408, 413, 415)

_BODIES: dict[type[BaseModel], dict[str, Any]] = {
    schemas.EmbedBody: {"images": [_DOT], "encoding_format": "base64"},
    schemas.SearchById: {"id": "digits/00007", "k": 2, "threshold": 0.5},
    schemas.SearchByImage: {"image": _DOT, "filter": {"label": {"$in": ["1", "7"]}}},
    schemas.SearchByVector: {"vector": [0.6, -0.8], "include": ["metadata", "embedding"]},
    schemas.SearchMany: {"queries": [{"id": "digits/00007"}, {"image": _DOT}], "k": 5},
    schemas.PatchBody: {"metadata": {"label": "8", "year": None}},
    schemas.OpenAIBody: {"model": "mnist", "input": [_DOT], "modality": "image"},
}
_ANSWERS: dict[type[BaseModel], Any] = {
    schemas.Hits: {"hits": [_HIT]},
    schemas.Results: {"results": [{"hits": [_HIT]}]},
    schemas.Embeddings: {"model": "mnist", "fingerprint": _FINGERPRINT, "dimension": 2, "embeddings": [[0.6, -0.8]]},
    schemas.OpenAIEmbeddings: {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.6, -0.8]}],
        "model": "mnist",
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
    },
    schemas.ItemAnswer: {"id": "digits/00007", "metadata": {"label": "7"}},
    schemas.ItemDetails: {"id": "digits/00007", "metadata": {"label": "7"}, "variant": "int8"},
    schemas.Page: {"items": [{"id": "digits/00007", "metadata": {"label": "7"}}], "next": "8"},
    schemas.BulkLine: {"index": 0, "id": "a.png", "status": 201},
}


def json_body(*models: type[BaseModel], types: tuple[str, ...] = ("application/json",)) -> dict[str, Any]:
    """Return the content of a JSON body that is one of these."""
    choices = [_reference(model) for model in models]
    examples = {model.__name__: {"value": _BODIES[model]} for model in models}
    schema = choices[0] if len(choices) == 1 else {"oneOf": choices}
    return {kind: {"schema": schema, "examples": examples} for kind in types}


def picture_body(several: bool = False, metadata: str = "", raw: bool = True) -> dict[str, Any]:
    """Return the content of a body of pictures: the bytes of one, or a form with the field file.

    Args:
        several: whether the form may have several.
        metadata: format of the form's field of that name; none if empty.
        raw: whether the body may be a picture itself.
    """
    picture = {"type": "string", "format": "binary"}
    properties: dict[str, Any] = {"file": {"type": "array", "items": picture, "minItems": 1} if several else picture}
    if metadata:
        properties["metadata"] = {"type": "string", "format": metadata, "description": "A JSON object."}
    form = {"type": "object", "properties": properties, "required": ["file"], "additionalProperties": False}
    encoding = {"file": {"contentType": ", ".join(PICTURE_TYPES[:-1])}}
    content: dict[str, Any] = {"multipart/form-data": {"schema": form, "encoding": encoding}}
    if raw:
        example = {"examples": {"digit": {"externalValue": "/page/example.png"}}}
        content |= {kind: {"schema": picture} | (example if kind == "image/png" else {}) for kind in PICTURE_TYPES}
    return content


def zip_body() -> dict[str, Any]:
    """Return the content of a body that is a zip of pictures."""
    schema = {"type": "string", "format": "binary"}
    return {"application/zip": {"schema": schema, "examples": {"digits": {"externalValue": "/page/example.zip"}}}}


def body(content: dict[str, Any]) -> dict[str, Any]:
    """Return a route's openapi_extra."""
    return {"requestBody": {"required": True, "content": content}}


def answers(
    ok: type[BaseModel] | tuple[type[BaseModel], ...] | str | None,
    *statuses: int,
    success: tuple[int, ...] = (200,),
    more: dict[str, Any] | None = None,
    openai: bool = False,
) -> dict[int | str, dict[str, Any]]:
    """Return a route's responses: what it answers when all is well, and the errors it can end in."""
    content: dict[str, Any] = {}
    if isinstance(ok, str):
        content = {ok: {"schema": {"type": "string", "format": "binary"}}}
    elif ok is not None:
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


_DONE = {200: "Done.", 201: "The id is new.", 204: "Gone."}


def ndjson() -> dict[str, Any]:
    """Return the content of an answer of one JSON object a line."""
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
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def describe(app: FastAPI) -> None:
    """Let the app's document be FastAPI's, with our bodies and answers in it and nothing of its own errors."""
    made_by_fastapi = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = made_by_fastapi()
            both = [*((model, "validation") for model in _BODIES), *((model, "serialization") for model in _ALL)]
            _, ours = models_json_schema(both, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
            document["components"] = {"schemas": ours["$defs"] | _FILTER}
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    told = operation["responses"]
                    for status in [status for status in told if "HTTPValidationError" in str(told[status])]:
                        del told[status]
                    for parameter in operation.get("parameters", ()):
                        # Left out is not null: an address has no null.
                        kinds = parameter["schema"].pop("anyOf", ({},))
                        parameter["schema"] |= kinds[0]
                        if parameter["name"] == "id" and "{id}" in path:
                            parameter["schema"] |= {"minLength": 1, "maxLength": 256, "pattern": _ID}
            if hasattr(app.state, "gallery"):
                _bound(document, app.state.gallery)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _bound(document: dict[str, Any], gallery: Gallery) -> None:
    """Put this service's own limits into the document: what it would refuse is not valid by it."""
    settings = gallery.settings
    if len(read_keys(settings)):
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    schemas_ = document["components"]["schemas"]
    for name in ("ByVector", "SearchByVector"):
        size = gallery.encoder.dimension
        schemas_[name]["properties"]["vector"] |= {"minItems": size, "maxItems": size}
    for name in ("ById", "SearchById"):
        schemas_[name]["properties"]["id"] |= {"minLength": 1, "maxLength": settings.max_id_bytes, "pattern": _ID}
    for name in ("SearchById", "SearchByImage", "SearchByVector", "SearchMany"):
        most = settings.max_k_of_many if name == "SearchMany" else settings.max_k
        schemas_[name]["properties"]["k"]["maximum"] = most
    schemas_["EmbedBody"]["properties"]["images"]["maxItems"] = settings.max_images
    several = schemas_["SearchMany"]["properties"].pop("queries")
    items = {"anyOf": [_reference(schemas.ByVector), _reference(schemas.ById)]}
    schemas_["SearchMany"]["properties"]["queries"] = {
        "description": f"At most {settings.max_images} of them pictures.",
        "anyOf": [
            several | {"maxItems": min(settings.max_queries, settings.max_images)},
            several | {"maxItems": settings.max_queries, "items": items},
        ],
    }
    openai = schemas_["OpenAIBody"]["properties"]
    openai["model"]["const"] = gallery.card.name
    openai["dimensions"] = {"enum": [gallery.encoder.dimension, None]}
    openai["input"]["anyOf"][1]["maxItems"] = settings.max_images
    for path in document["paths"].values():
        for parameter in path.get("post", {}).get("parameters", ()):
            if parameter["name"] == "k":
                parameter["schema"]["maximum"] = settings.max_k


_SCALAR = {"type": ["string", "number", "boolean", "null"]}
_BOUND = {"type": ["string", "number"]}
_FILTER = {
    "Filter": {
        "title": "Filter",
        "description": "Conditions on metadata; several in one object must all hold.",
        "type": "object",
        "minProperties": 1,
        "properties": {
            "$and": {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/Filter"}},
            "$or": {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/Filter"}},
            "$not": {"$ref": "#/components/schemas/Filter"},
        },
        "patternProperties": {"^[^$]": {"anyOf": [_SCALAR, {"$ref": "#/components/schemas/Condition"}]}},
        "additionalProperties": False,
        "examples": [{"year": {"$gte": 2000}, "$not": {"label": "7"}}],
    },
    "Condition": {
        "title": "Condition",
        "type": "object",
        "minProperties": 1,
        "properties": {
            "$eq": _SCALAR,
            "$in": {"type": "array", "minItems": 1, "maxItems": 1000, "items": _SCALAR},
            "$gt": _BOUND,
            "$gte": _BOUND,
            "$lt": _BOUND,
            "$lte": _BOUND,
        },
        "additionalProperties": False,
    },
}
_ID = r"^[^\x00-\x1f\x7f-\x9f]+$"
_ALL = (*_ANSWERS, schemas.Info, Problem, OpenAIError)
