"""GET /map: a place in the plane for each item."""

from base64 import b64encode
from contextlib import closing
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from service.http import schemas
from service.http.compression import json_answer
from service.http.openapi import WORK, answers
from service.http.routes.state import embedded_of, stored_gallery_of, work
from service.http.routes.strict import StrictRoute
from service.maps import Maps, Wanted
from service.projection import Method, check_method, colours, default_method
from service.store.catalog_reader import CatalogReader

# Seconds after which the progress is worth another look.
_RETRY_S = "1"
# More colours cannot be told apart.
_MOST_VALUES = 60

router = APIRouter(route_class=StrictRoute, tags=["map"])

Methods = Annotated[
    Method | SkipJsonSchema[None], Query(description="t-sne where scikit-learn is installed, if this is left out.")
]
Colour = Annotated[
    Annotated[str, Field(max_length=2000)] | SkipJsonSchema[None],
    Query(description="A metadata key: the answer also has its values."),
]
Known = Annotated[
    Annotated[str, Field(max_length=100)] | SkipJsonSchema[None],
    Query(description="The `version` of the map that the client has: 202 until there is a better or newer one."),
]


@router.get("/map", responses=answers((schemas.Map, schemas.Progress), 400, 404, *WORK, success=(200, 202)))
async def get_map(request: Request, method: Methods = None, colour: Colour = None, known: Known = None) -> Response:
    """Lay all items out in a plane, those that are alike together; 202 until the first map is made.

    It is made in the background, by PCA first, and again after changes. Until the next map is made the answer has an
    earlier one, and `progress` says how much of the next is done; it is null for the map that was asked for.
    """
    gallery, maps = stored_gallery_of(request), maps_of(request)

    def find() -> Response:
        store = embedded_of(gallery)
        wanted = Wanted(store.folder, default_method() if method is None else check_method(method))
        shown = maps.get(wanted, store.sequence())
        if isinstance(shown, float):
            return JSONResponse({"progress": shown}, 202, {"Retry-After": _RETRY_S})
        made = shown.map
        version = f"{made.method}.{made.sequence}"
        if shown.progress is not None and version == known:
            return JSONResponse({"progress": shown.progress}, 202, {"Retry-After": _RETRY_S})
        answer: dict[str, Any] = {
            "version": version,
            "sequence": made.sequence,
            "method": made.method,
            "progress": shown.progress,
            "count": made.count,
            "ids": orjson.Fragment(made.ids),
            "positions": b64encode(made.positions).decode(),
        }
        if colour is not None:
            with closing(CatalogReader(store.folder)) as reader:
                values, codes = colours(reader, made.keys, colour, _MOST_VALUES)
            answer |= {"values": values, "codes": b64encode(codes.astype("<u2").tobytes()).decode()}
        return json_answer(request, orjson.dumps(answer))

    return await work(request, find)


def maps_of(request: Request) -> Maps:
    """Return the maps that this service has made."""
    maps: Maps = request.app.state.maps
    return maps
