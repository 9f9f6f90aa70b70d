"""POST /search: a picture, a text, a vector, an item or a sum of them → the items most like it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from service.errors import TooLarge
from service.gallery import Gallery, Search
from service.http import schemas
from service.http.bodies import (
    check_count,
    check_text_count,
    content_type,
    parse_json_object,
    read_one_picture,
    read_vectors,
)
from service.http.openapi import BODY, NPY, WORK, answers, body, json_body, picture_body, vectors_body
from service.http.query_bodies import (
    DEFAULT_K,
    Included,
    SearchBody,
    SearchByAll,
    SearchById,
    SearchByImage,
    SearchByText,
    SearchByVector,
    SearchMany,
)
from service.http.routes.direct import DirectRoute
from service.http.routes.parameters import FilterText, Fingerprint, Include, K, Prefix, Threshold
from service.http.routes.state import NumPyJsonResponse, check_fingerprint, slots_of, stored_gallery_of
from service.http.schemas import included, read_json
from service.queries import ItemQuery, PictureQuery, Query, TextQuery, VectorQuery, simple_queries
from service.store import Hit
from service.store.filters import EVERY, Filter, begins, both, parse_filter

# Of `include`, what the index does not know of a hit.
_OF_ITEM = {"file", "digest", "source"}
# A search for more hits takes longer than a change of threads.
_MOST_QUICK = 100

direct = APIRouter(route_class=DirectRoute, tags=["search"])


@dataclass(frozen=True)
class SearchOptions:
    """The options of a search, common to all its queries.

    Attributes:
        k: hits per query, at most.
        threshold: smallest score of a hit.
        filter: only items whose metadata matches it.
        prefix: only items whose ids begin with it.
        include: fields of a hit besides its id and score.
        fingerprint: the encoder that the client expects.
    """

    k: int
    threshold: float
    filter: Filter | None
    prefix: str
    include: Sequence[Included]
    fingerprint: str | None

    @classmethod
    def merged(cls, url: "SearchOptions", body: SearchBody) -> "SearchOptions":
        """Return the options of a request: a field that its body gives, and that is not null, wins over the URL's.

        A list of queries takes its `k` from the body alone, since it has a limit of its own.

        Raises:
            InvalidQuery: the body's filter is malformed.
        """
        given: dict[str, Any] = {
            name: getattr(body, name) for name in _OPTIONS & body.model_fields_set if getattr(body, name) is not None
        }
        if isinstance(body, SearchMany):
            given["k"] = body.k
        if "filter" in given:
            given["filter"] = parse_filter(given["filter"])
        return replace(url, **given)

    @property
    def where(self) -> Filter | None:
        """The condition on hits that filter and prefix make; None for none."""
        return both(self.filter or EVERY, begins(self.prefix)) if self.prefix else self.filter


_OPTIONS = {field.name for field in fields(SearchOptions)}


@direct.post(
    "/search",
    openapi_extra=body(
        picture_body()
        | vectors_body()
        | json_body(SearchById, SearchByImage, SearchByText, SearchByVector, SearchByAll, SearchMany)
    ),
    responses=answers((schemas.Hits, schemas.Results, schemas.Arrays), *WORK, *BODY, 404, 409, 422),
)
async def search(
    request: Request,
    k: K = DEFAULT_K,
    threshold: Threshold = -1,
    filter: FilterText = None,
    prefix: Prefix = "",
    include: Include = ("metadata",),
    fingerprint: Fingerprint = None,
) -> Response:
    """Find the k items most like a picture, a text, a vector, an item or a weighted sum; items asked with are left out.

    JSON may hold several `queries`; their answer is `results`. A NumPy file (`application/x-npy`) holds several vectors
    and is answered with `ids` and `scores` alone. The URL may give `threshold`, `filter`, `prefix`, `include`,
    `fingerprint` and, for a single query or a NumPy file, `k`; a JSON body that gives one of them, too, wins.
    """
    gallery = stored_gallery_of(request)
    settings = gallery.settings
    where = None if filter is None else parse_filter(parse_json_object(filter, "filter"))
    options = SearchOptions(k, threshold, where, prefix, include, fingerprint)
    several, kind = False, content_type(request)
    if kind == "application/json":
        asked = await read_json(request, settings, schemas.SEARCH)
        options = SearchOptions.merged(options, asked)
        several = isinstance(asked, SearchMany)
        members = asked.queries if isinstance(asked, SearchMany) else [asked]
        queries: list[Query] = [member.query(settings) for member in members]
    elif kind == NPY:
        queries = [VectorQuery(numbers) for numbers in await read_vectors(request, settings)]
    else:
        queries = [PictureQuery((await read_one_picture(request, settings))[0])]
    check_fingerprint(gallery, options.fingerprint)
    if len(queries) > settings.max_queries:
        raise TooLarge(f"expected at most {settings.max_queries} queries, got {len(queries)}")
    simple = simple_queries(queries)
    check_count(sum(isinstance(query, PictureQuery) for query in simple), settings)
    check_text_count(sum(isinstance(query, TextQuery) for query in simple), settings)

    def find() -> Response:
        found = searching.find(options.k, options.threshold, options.where)
        if kind == NPY:
            ids, scores = [[hit.id for hit in hits] for hits in found], [[hit.score for hit in hits] for hits in found]
            return NumPyJsonResponse({"ids": ids, "scores": scores})
        results: list[dict[str, Any]] = [
            {"hits": [_shown(gallery, hit, options.include) for hit in hits]} for hits in found
        ]
        if "digest" in options.include:
            for result, query in zip(results, queries, strict=True):
                result |= _digest(gallery, query)
        return NumPyJsonResponse({"results": results} if several else results[0])

    async with slots_of(request).place(request.receive) as place:
        searching = Search(gallery, queries)
        await place.wait(searching.pending)
        # Two handovers between threads take as long as such a search. While it runs here, no other request waits.
        plain = options.where is None and options.k <= _MOST_QUICK and set(options.include) <= {"metadata"}
        if plain and place.alone and searching.quick:
            return find()
        return await place.run(find)


def _shown(gallery: Gallery, hit: Hit, include: Sequence[Included]) -> dict[str, Any]:
    shown: dict[str, Any] = {"id": hit.id, "score": hit.score}
    if "metadata" in include:
        # As the store keeps it: orjson would refuse integers beyond 64 bits.
        shown["metadata"] = orjson.Fragment(hit.metadata_json)
    if "embedding" in include:
        embedding = gallery.store.embedding(hit.id)
        # The item may have been removed since it was found.
        if embedding is not None:
            shown["embedding"] = embedding
    if not _OF_ITEM.isdisjoint(include):
        item = gallery.store.get(hit.id)
        if item is not None:
            shown |= included(item, include)
    return shown


def _digest(gallery: Gallery, query: Query) -> dict[str, str]:
    """Return the digest of a query that is one picture or one item, as an answer has it; else nothing."""
    match query:
        case PictureQuery():
            data = query.data if isinstance(query.data, bytes) else query.data()
            return {"digest": hashlib.sha256(data).hexdigest()}
        case ItemQuery():
            item = gallery.store.get(gallery.check_id(query.id))
            return {} if item is None else {"digest": item.digest}
    return {}
