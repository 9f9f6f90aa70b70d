"""A client of a running service: pictures, texts and vectors in, typed hits and NumPy arrays out.

    with Client("http://127.0.0.1:3000") as client:
        hits = client.search(PictureQuery(Path("seven.png").read_bytes()), k=3)

Written by hand, and with the standard library's HTTP alone: see docs/decisions/0032.
"""

import io
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from service import FloatArray
from service.client.connection import Connections, ServiceError
from service.client.uploader import TOGETHER, Uploader, ahead
from service.client.wire import (
    Added,
    EmbeddedUpload,
    Included,
    Order,
    ServedGroups,
    ServedHit,
    ServedItem,
    Upload,
    form,
    hit_of,
    item_of,
    item_path,
    move_json,
    none_if_missing,
    query_json,
    read,
    size,
    wanted,
)
from service.file_facts import Move
from service.queries import ItemQuery, PictureQuery, Query, SumQuery, TextQuery, VectorQuery

__all__ = [
    "Client",
    "EmbeddedUpload",
    "ItemQuery",
    "PictureQuery",
    "ServiceError",
    "SumQuery",
    "TextQuery",
    "Upload",
    "VectorQuery",
]

T = TypeVar("T")
R = TypeVar("R")

# Seconds between two questions for groups that are being found.
_LOOK_S = 0.5
# np.load parses a literal of Python, and of two threads that do so at once in Python 3.11 one may get a SystemError,
# "AST constructor recursion depth mismatch" (python/cpython#106905).
_PARSING = threading.Lock()


class Client:
    """A client of one service. Calls may come from any thread; each blocks until its answer is there.

    Requests are sent again while the service is busy, its disk is full or it is not reachable, for `patience_s`. That
    is safe, because pictures are added by id. Every method raises ServiceError if the service refuses a request.
    """

    def __init__(self, url: str, key: str | None = None, timeout_s: float = 90, patience_s: float = 60) -> None:
        """Connect to nothing yet. Arguments and errors as `connection.Connections`."""
        self._connections = Connections(url, key, timeout_s, patience_s)
        self._patience_s = patience_s

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The address of the service, without a slash at its end."""
        return self._connections.url

    def close(self) -> None:
        """Close the idle connections."""
        self._connections.close()

    # Facts -------------------------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """Return what GET /info tells: encoder, fingerprint, dimension, count, limits, versions."""
        content: dict[str, Any] = self._connections.request("GET", "/info").json()
        return content

    @cached_property
    def limits(self) -> dict[str, int]:
        """The limits of the service, as its settings name them."""
        limits: dict[str, int] = self.info()["limits"]
        return limits

    @cached_property
    def _uploader(self) -> Uploader:
        return Uploader(self._connections, self.limits["max_request_bytes"], self._patience_s)

    @cached_property
    def dimension(self) -> int:
        """The numbers of an embedding, D."""
        return int(self.info()["dimension"])

    def count(self, filter: Mapping[str, Any] | None = None, prefix: str = "") -> int:
        """Return the number of items whose metadata matches a filter and whose ids begin with a prefix."""
        asked = {"filter": dict(filter or {}), "prefix": prefix}
        return int(self._post("/images/count", asked)["count"])

    # Embeddings --------------------------------------------------------------------------------------

    def embed(self, pictures: Sequence[bytes | Path]) -> FloatArray:
        """Embed pictures, as many as you like, without storing them.

        Args:
            pictures: N image files, as bytes or as paths.

        Returns:
            (N, D) float32 of L2 norm 1.

        Raises:
            ServiceError: a picture cannot be embedded; the message names its place within its request.
            OSError: a file cannot be read.
        """
        groups = self._uploader.groups(pictures, size, min(TOGETHER, self.limits["max_images"]))
        return self._embedded([self._embed_group(group) for group in groups])

    def embed_texts(self, texts: Sequence[str]) -> FloatArray:
        """Embed texts, as many as you like, if the encoder reads them; returns as `embed`."""
        groups = self._uploader.groups(texts, lambda text: 6 * len(text), self.limits["max_texts"])
        return self._embedded(
            [self._embed(json.dumps({"texts": group}).encode(), "application/json") for group in groups]
        )

    def _embed_group(self, pictures: Sequence[bytes | Path]) -> FloatArray:
        body, kind = form([("file", str(number), read(one)) for number, one in enumerate(pictures)])
        return self._embed(body, kind)

    def _embed(self, body: bytes, kind: str) -> FloatArray:
        headers = {"Content-Type": kind, "Accept": "application/x-npy"}
        answer = self._connections.request("POST", "/embed", body=body, headers=headers)
        with _PARSING:
            embeddings: FloatArray = np.load(io.BytesIO(answer.data), allow_pickle=False)
        return embeddings

    def _embedded(self, parts: list[FloatArray]) -> FloatArray:
        return np.concatenate([np.empty((0, self.dimension), np.float32), *parts])

    # Search ------------------------------------------------------------------------------------------

    def search(self, query: Query, k: int = 10, **options: Any) -> list[ServedHit]:
        """Return the k items most like a query, best first; options as `search_many`."""
        (hits,) = self._search(query_json(query) | {"k": k}, options)
        return hits

    def search_many(self, queries: Sequence[Query], k: int = 10, **options: Any) -> list[list[ServedHit]]:
        """Return for each query the k items most like it, best first; as many queries as you like.

        Args:
            queries: of any kind: PictureQuery, TextQuery, VectorQuery, ItemQuery, SumQuery of service.queries.
            k: hits per query, at most.
            options: threshold, the smallest score of a hit; filter, a condition on metadata as docs/api.md defines it;
                prefix, the beginning of ids; include, a list of "metadata", "embedding", "digest", "source" and "file",
                metadata alone if left out; fingerprint, of the encoder that is expected.
        """
        most = min(self.limits["max_queries"], self.limits["max_images"])
        groups = self._uploader.groups(
            [query_json(query) for query in queries], lambda query: len(json.dumps(query)), most
        )
        return [hits for group in groups for hits in self._search({"queries": group, "k": k}, options)]

    def _search(self, body: dict[str, Any], options: dict[str, Any]) -> list[list[ServedHit]]:
        answer = self._post("/search", body | options)
        results = answer["results"] if "queries" in body else [answer]
        return [[hit_of(hit) for hit in result["hits"]] for result in results]

    # Items -------------------------------------------------------------------------------------------

    def put(self, id: str, picture: bytes | Path, metadata: Mapping[str, Any] | None = None) -> bool:
        """Add or replace one picture, and return whether its id is new. Arguments as `Upload`."""
        (added,) = self.add([Upload(id, picture, metadata)])
        if added.error is not None:
            raise added.error
        return added.is_new

    def add(self, uploads: Iterable[Upload], parallel: int = 4) -> Iterator[Added]:
        """Add or replace many pictures, and yield what became of each, in their order, once it is stored or refused.

        Args:
            uploads: the pictures. They are taken as they are sent, so a generator of any length does.
            parallel: requests at a time.

        Raises:
            ServiceError: the service cannot be reached, or refuses every request. A bad picture is an error of its own.
        """
        yield from self._uploader.add(uploads, parallel)

    def add_embedded(self, uploads: Iterable[EmbeddedUpload], fingerprint: str, parallel: int = 4) -> Iterator[Added]:
        """Add or replace many items by their embeddings, and yield what became of each, in their order.

        Args:
            uploads: the items.
            fingerprint: of the encoder that made the embeddings; the service refuses those of another one.
            parallel: requests at a time.

        Raises:
            ServiceError: as `add`; of code "fingerprint_mismatch" if another encoder runs there.
        """
        yield from self._uploader.add_embedded(uploads, fingerprint, parallel)

    def items(
        self,
        filter: Mapping[str, Any] | None = None,
        prefix: str = "",
        include: Sequence[Included] = (),
        order: Order = "added",
        page: int = 1000,
        name: str = "",
    ) -> Iterator[ServedItem]:
        """Yield the items, page by page; those that are added meanwhile may be among them.

        Args:
            filter: only items whose metadata matches it.
            prefix: only items whose ids begin with it.
            include: what an item has besides id and metadata.
            order: of the time of adding, of ids by code point, or of the dates or sizes of files; with − the other way
                round.
            page: items of a request, 1 to 1000.
            name: only items whose ids have this text in them, in upper or lower case.
        """
        query: dict[str, Any] = {"limit": page, "order": None if order == "added" else order, "prefix": prefix or None}
        query |= {"name": name or None, "filter": None if not filter else json.dumps(filter)} | wanted(include)
        while True:
            content = self._connections.request("GET", "/images", query).json()
            yield from map(item_of, content["items"])
            if content["next"] is None:
                return
            query["cursor"] = content["next"]

    def get(self, id: str, include: Sequence[Included] = ()) -> ServedItem | None:
        """Return an item, or None."""
        return none_if_missing(lambda: item_of(self._connections.request("GET", item_path(id), wanted(include)).json()))

    def thumbnail(self, id: str) -> bytes | None:
        """Return an item's thumbnail, a WebP file; None if there is no item, or it came without a picture."""
        return none_if_missing(lambda: self._connections.request("GET", item_path(id) + "/thumbnail").data)

    def content(self, id: str) -> bytes | None:
        """Return the bytes of an item's image file; None if there is no item, or they were not kept."""
        return none_if_missing(lambda: self._connections.request("GET", item_path(id) + "/content").data)

    def patch(self, id: str, metadata: Mapping[str, Any]) -> ServedItem:
        """Merge into an item's metadata (RFC 7396): a field that is None is removed. Returns the item."""
        body = json.dumps({"metadata": dict(metadata)}).encode()
        headers = {"Content-Type": "application/json"}
        return item_of(self._connections.request("PATCH", item_path(id), body=body, headers=headers).json())

    def move(self, moves: Sequence[Move]) -> int:
        """Record what became of the files of items, all in one step, and return how many were there; see Store.move."""
        return int(self._post("/images/moves", {"moves": [move_json(move) for move in moves]})["moved"])

    def delete(self, id: str) -> bool:
        """Remove an item, and return whether there was one."""
        return none_if_missing(lambda: self._connections.request("DELETE", item_path(id))) is not None

    def delete_many(self, ids: Iterable[str], parallel: int = 4) -> int:
        """Remove items by their ids, and return how many there were."""
        return sum(ahead(ids, self.delete, parallel))

    def delete_matching(self, filter: Mapping[str, Any], expect: int, prefix: str = "") -> int:
        """Remove all items whose metadata matches a filter and whose ids begin with a prefix; return their number.

        Args:
            filter: {} matches every item.
            expect: how many there have to be; otherwise nothing is removed.
            prefix: of ids.

        Raises:
            ServiceError: of code "count_mismatch" if there are more or fewer. It is not sent again after a connection
                was lost, because then a second time could only say that nothing is left.
        """
        query = {"filter": json.dumps(dict(filter)), "expect": expect, "prefix": prefix or None}
        return int(self._connections.request("DELETE", "/images", query, again=False).json()["removed"])

    # Duplicates --------------------------------------------------------------------------------------

    def duplicates(
        self,
        preset: str = "near",
        threshold: float | None = None,
        progress: Callable[[float], object] | None = None,
    ) -> ServedGroups:
        """Return the groups of items that show the same, once the service has found them.

        Args:
            preset: "exact", "near" or "alike".
            threshold: least score of two pictures of a group, in place of the preset's.
            progress: is called with the share of the work that is done, now and then.
        """
        query: dict[str, Any] = {"preset": preset, "threshold": threshold, "limit": 1000}
        groups: list[dict[str, Any]] = []
        while True:
            try:
                answer = self._connections.request("GET", "/duplicates", query)
            except ServiceError as error:
                # The groups were rebuilt between two pages, so the first page comes again.
                if error.code != "page_not_found":
                    raise
                query["cursor"] = None
                groups.clear()
                continue
            content = answer.json()
            if answer.status == 202:
                if progress is not None:
                    progress(content["progress"])
                time.sleep(_LOOK_S)
                continue
            groups += content["groups"]
            if content["next"] is None:
                return ServedGroups(content["sequence"], content["threshold"], groups)
            query["cursor"] = content["next"]

    def dismiss(self, ids: Sequence[str], dismissed: bool = True) -> int:
        """Say that no two of these items are duplicates, or take it back; return the number of their pairs."""
        return int(self._post("/duplicates/dismissals", {"ids": [*ids], "dismissed": dismissed})["pairs"])

    # Below -------------------------------------------------------------------------------------------

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        content: dict[str, Any] = self._connections.request(
            "POST", path, body=json.dumps(body).encode(), headers=headers
        ).json()
        return content
