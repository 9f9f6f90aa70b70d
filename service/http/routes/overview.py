"""GET /folders, /metadata and /scores: what the items have in common, for a page that leads to them."""

import asyncio
import unicodedata
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from service.bands import Scores
from service.http import schemas
from service.http.bodies import parse_json_object
from service.http.compression import json_answer
from service.http.openapi import WORK, answers
from service.http.routes.parameters import FilterText, Name, Prefix
from service.http.routes.state import condition, embedded_of, gallery_of, slots_of, stored_gallery_of, work
from service.http.routes.strict import StrictRoute

_MOST_FOLDERS = 1000
_MOST_KEYS = 50

router = APIRouter(route_class=StrictRoute, tags=["overview"])


@router.get("/folders", responses=answers(schemas.Folders, 400, 404, *WORK))
async def list_folders(request: Request, prefix: Prefix = "", name: Name = "", filter: FilterText = None) -> Response:
    """List the folders directly below a prefix of ids, with the number of items at any depth in each.

    A folder is the part of an id up to a slash behind the prefix. Items are counted as `GET /images` lists them. There
    are at most 1,000 folders, and `left_out` counts the others.
    """
    where = condition(None if filter is None else parse_json_object(filter, "filter"), prefix, name)

    def count() -> Response:
        found = gallery_of(request).store.folders(unicodedata.normalize("NFC", prefix), where)
        folders = [asdict(folder) for folder in found[:_MOST_FOLDERS]]
        return _answer(request, {"folders": folders, "left_out": len(found) - len(folders)})

    return await work(request, count)


@router.get("/metadata", responses=answers(schemas.Fields, 400, 404, *WORK))
async def list_metadata(request: Request, prefix: Prefix = "", name: Name = "", filter: FilterText = None) -> Response:
    """List the fields of metadata, those of most items first, with how many items have them and their values.

    `distinct` counts the different texts, numbers, booleans and nulls, and `values` has the 12 most frequent of them,
    without texts of more than 200 characters and, where there are more than 12, those of one item alone. There are at
    most 50 fields, and `left_out` counts the others.
    """
    where = condition(None if filter is None else parse_json_object(filter, "filter"), prefix, name)

    def count() -> Response:
        found = gallery_of(request).store.fields(where)
        keys = [asdict(field) for field in found[:_MOST_KEYS]]
        return _answer(request, {"keys": keys, "left_out": len(found) - len(keys)})

    return await work(request, count)


@router.get("/scores", responses=answers(schemas.ScoresAnswer, 404, *WORK))
async def get_scores(request: Request) -> Response:
    """Tell what scores mean in this store, for a page that sorts hits into bands: `near`, `alike`, and what is below.

    They are measured on a sample, and again when the number of changes has doubled.
    """
    gallery, bands = stored_gallery_of(request), request.app.state.bands

    def begin() -> Future[Scores]:
        future: Future[Scores] = bands.soon(embedded_of(gallery), gallery.card.facts)
        return future

    async with slots_of(request).place(request.receive) as place:
        measured = asyncio.wrap_future(await place.run(begin))
        # Others may wait for the same scores.
        return JSONResponse((await asyncio.shield(measured))._asdict())


def _answer(request: Request, content: dict[str, Any]) -> Response:
    return json_answer(request, bytes(JSONResponse(content).body))
