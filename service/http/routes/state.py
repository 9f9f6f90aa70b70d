"""The gallery and the slots behind a request, and the checks and the work that several routes share."""

from collections.abc import Callable
from typing import Any, TypeVar

import orjson
from fastapi import Request, Response

from service.errors import FingerprintMismatch, NotOfThisStore, UnsupportedFormat
from service.gallery import Gallery
from service.http.bodies import content_type
from service.http.slots import Slots
from service.store.embedded import EmbeddedStore
from service.store.filters import EVERY, Filter, begins, both, has_name, parse_filter

R = TypeVar("R")


class NumPyJsonResponse(Response):
    """JSON whose content may hold NumPy arrays and orjson fragments.

    orjson writes it in a tenth of the time that `json` takes. It refuses integers beyond 64 bits: metadata, which may
    hold them, is either a fragment or goes into Starlette's JSONResponse.
    """

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the content as JSON."""
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def gallery_of(request: Request) -> Gallery:
    """Return the gallery that serves this request."""
    gallery: Gallery = request.app.state.gallery
    return gallery


def stored_gallery_of(request: Request) -> Gallery:
    """Return the gallery, before a body is read for it. Raises NoStore if the service runs without a store."""
    gallery = gallery_of(request)
    _ = gallery.store
    return gallery


def embedded_of(gallery: Gallery) -> EmbeddedStore:
    """Return the store, if it is in a folder. Raises NotOfThisStore."""
    store = gallery.store
    if not isinstance(store, EmbeddedStore):
        raise NotOfThisStore("duplicates, the map and the bands of scores are of a store in a folder, not of Milvus")
    return store


def slots_of(request: Request) -> Slots:
    """Return the slots in which this service works."""
    slots: Slots = request.app.state.slots
    return slots


async def work(request: Request, blocking: Callable[[], R]) -> R:
    """Run a blocking function in a slot, on a worker thread, and return its result.

    Raises:
        Busy, TimedOut, ClientDisconnect, and all errors of the function.
    """
    return await slots_of(request).run(blocking, request.receive)


def check_fingerprint(gallery: Gallery, fingerprint: str | None) -> None:
    """Raise FingerprintMismatch if a request names another encoder than the gallery's."""
    if fingerprint is not None and fingerprint != gallery.card.fingerprint:
        raise FingerprintMismatch(
            f"the request names another encoder than the one that runs here, whose fingerprint is "
            f"{gallery.card.fingerprint}"
        )


def condition(filter: dict[str, Any] | None, prefix: str, name: str) -> Filter:
    """Return the condition on items that match a filter and whose ids begin with a prefix and have a name in them.

    Raises:
        InvalidQuery: the filter is malformed.
    """
    return both(both(EVERY if filter is None else parse_filter(filter), begins(prefix)), has_name(name))


def check_content_type(request: Request, *types: str) -> None:
    """Raise UnsupportedFormat for a body of any other type."""
    if content_type(request) not in types:
        raise UnsupportedFormat(f"expected a body of {' or '.join(types)}")
