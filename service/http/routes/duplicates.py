"""GET /duplicates: groups of items that show the same. POST /duplicates/dismissals: pictures that are told apart."""

from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic.json_schema import SkipJsonSchema

from service.duplicates import Preset, threshold_of
from service.gallery import Gallery
from service.grouping import Groupings, Page, Wanted
from service.http import schemas
from service.http.compression import json_answer
from service.http.openapi import BODY, WORK, answers, body, json_body
from service.http.routes.parameters import Cursor, Limit
from service.http.routes.state import embedded_of, stored_gallery_of, work
from service.http.routes.strict import StrictRoute
from service.http.schemas import read_json

# Seconds after which the progress is worth another look.
_RETRY_S = "1"

router = APIRouter(route_class=StrictRoute, tags=["duplicates"])

Threshold = Annotated[
    Annotated[float, Query(gt=0, le=1, allow_inf_nan=False)] | SkipJsonSchema[None],
    Query(description="Least score of two pictures of a group, in place of the preset's."),
]
Begin = Annotated[bool, Query(description="With false, nothing is begun: 202 unless the groups are known.")]
Presets = Annotated[Preset, Query(description="Same bytes; resized or compressed; also cropped, turned, written on.")]


@router.get(
    "/duplicates",
    responses=answers((schemas.Groups, schemas.Progress), 400, 404, *WORK, success=(200, 202)),
)
async def list_duplicates(
    request: Request,
    preset: Presets = "near",
    threshold: Threshold = None,
    limit: Limit = 100,
    cursor: Cursor = None,
    begin: Begin = True,
) -> Response:
    """List groups of items that show the same, with the best copy of each and why; 202 until they are found.

    They are found once, in the background, and again after changes. `next` is the cursor of the next page, or null.
    """
    gallery, groupings = stored_gallery_of(request), groupings_of(request)

    def find() -> Response:
        wanted = _wanted(gallery, preset, threshold)
        if cursor is not None:
            found: Page | float = groupings.next_page(wanted, cursor, limit)
        else:
            found = groupings.first_page(wanted, gallery.store.sequence(), limit, begin)
        if isinstance(found, float):
            return JSONResponse({"progress": found}, 202, {"Retry-After": _RETRY_S})
        facts = {"sequence": found.sequence, "threshold": wanted.threshold, "total": found.total}
        facts |= {"rest": found.rest, "rest_bytes": found.rest_bytes}
        groups = [orjson.Fragment(group) for group in found.groups]
        return json_answer(request, orjson.dumps(facts | {"groups": groups, "next": found.next}))

    return await work(request, find)


@router.post(
    "/duplicates/dismissals",
    openapi_extra=body(json_body(schemas.DismissBody)),
    responses=answers(schemas.Dismissed, *WORK, *BODY, 403, 404),
)
async def dismiss_duplicates(request: Request) -> Response:
    """Tell pictures apart: no two of these items are duplicates, and never share a group again.

    It holds for their pictures, also under other ids. `"dismissed": false` takes it back.
    """
    gallery, groupings = stored_gallery_of(request), groupings_of(request)
    asked = await read_json(request, gallery.settings, schemas.DISMISS)

    def dismiss() -> dict[str, Any]:
        pairs = gallery.tell_apart(asked.ids, asked.dismissed)
        groupings.forget()
        return {"pairs": pairs}

    return JSONResponse(await work(request, dismiss))


def groupings_of(request: Request) -> Groupings:
    """Return the groups that this service has found."""
    groupings: Groupings = request.app.state.groupings
    return groupings


def _wanted(gallery: Gallery, preset: Preset, threshold: float | None) -> Wanted:
    store = embedded_of(gallery)
    if threshold is None:
        threshold = threshold_of(preset, gallery.card.facts, store.folder)
    return Wanted(store.folder, threshold)
