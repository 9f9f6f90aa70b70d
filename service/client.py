"""A client of a running service: pictures, texts and vectors in, typed hits and NumPy arrays out.

    with Client("http://127.0.0.1:3000") as client:
        hits = client.search(PictureQuery(Path("seven.png").read_bytes()), k=3)

Written by hand, and with the standard library's HTTP alone: see docs/decisions/0032.
"""

import io
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from service import FloatArray
from service.connection import RETRYABLE, Connections, ServiceError
from service.errors import InvalidRequest
from service.queries import Query
from service.wire import (
    Added,
    Included,
    ServedHit,
    ServedItem,
    Upload,
    composed,
    form,
    item_of,
    item_path,
    none_if_missing,
    query_json,
    read,
    size,
    vector_of,
    wanted,
)

T = TypeVar("T")
R = TypeVar("R")

# Pictures and bytes of one request of `add`: enough for the encoder's batches, and little to send again.
_TOGETHER, _BYTES_TOGETHER = 32, 8_000_000
# The limit of a request is for the whole body: pictures, their names and what stands between them.
_SHARE_OF_BODY = 0.8
# Statuses of a request that may be due to one of its pictures.
_OF_ONE = (400, 413, 415, 422)
# Seconds between two questions for groups that are being found.
_LOOK_S = 0.5


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
        groups = self._groups(pictures, size, min(_TOGETHER, self.limits["max_images"]))
        return self._embedded([self._embed_group(group) for group in groups])

    def embed_texts(self, texts: Sequence[str]) -> FloatArray:
        """Embed texts, as many as you like, if the encoder reads them; returns as `embed`."""
        groups = self._groups(texts, lambda text: 6 * len(text), self.limits["max_texts"])
        return self._embedded(
            [self._embed(json.dumps({"texts": group}).encode(), "application/json") for group in groups]
        )

    def _embed_group(self, pictures: Sequence[bytes | Path]) -> FloatArray:
        body, kind = form([("file", str(number), read(one)) for number, one in enumerate(pictures)])
        return self._embed(body, kind)

    def _embed(self, body: bytes, kind: str) -> FloatArray:
        headers = {"Content-Type": kind, "Accept": "application/x-npy"}
        answer = self._connections.request("POST", "/embed", body=body, headers=headers)
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
                include, a list of "metadata" and "embedding", metadata alone if left out; fingerprint, of the encoder
                that is expected.
        """
        most = min(self.limits["max_queries"], self.limits["max_images"])
        groups = self._groups([query_json(query) for query in queries], lambda query: len(json.dumps(query)), most)
        return [hits for group in groups for hits in self._search({"queries": group, "k": k}, options)]

    def _search(self, body: dict[str, Any], options: dict[str, Any]) -> list[list[ServedHit]]:
        answer = self._post("/search", body | options)
        results = answer["results"] if "queries" in body else [answer]
        return [
            [ServedHit(hit["id"], hit["score"], hit.get("metadata", {}), vector_of(hit)) for hit in result["hits"]]
            for result in results
        ]

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
        groups = self._groups(uploads, lambda one: size(one.picture), _TOGETHER, lambda one: composed(one.id))
        yield from (added for group in _ahead(groups, self._add_group, parallel) for added in group)

    def _add_group(self, uploads: Sequence[Upload]) -> list[Added]:
        """Send pictures until each is stored or refused for good."""
        done: dict[int, Added] = {}
        pictures: dict[int, bytes] = {}
        for number, upload in enumerate(uploads):
            try:
                pictures[number] = read(upload.picture)
            except OSError as error:
                failure = InvalidRequest(f"{upload.picture!s}: cannot be read: {error.strerror or error}")
                done[number] = Added(composed(upload.id), False, failure)
        deadline, wait_s, together = time.monotonic() + self._patience_s, 1.0, len(uploads)
        while waiting := [number for number in pictures if number not in done]:
            sent = waiting[:together]
            again = False
            for number, added in zip(sent, self._add_once([(uploads[at], pictures[at]) for at in sent]), strict=True):
                retryable = added.error is not None and added.error.code in (*RETRYABLE, "timed_out", "unreachable")
                if retryable and time.monotonic() + wait_s < deadline:
                    again = True
                else:
                    done[number] = added
            if again:
                # Fewer pictures take less time, of which a service that timed out had too little.
                together = max(1, together // 2)
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, 10)
        return [done[number] for number in range(len(uploads))]

    def _add_once(self, pictures: Sequence[tuple[Upload, bytes]]) -> list[Added]:
        texts: dict[str, dict[str, Any]] = {"metadata": {}, "sources": {}}
        for upload, _ in pictures:
            if upload.metadata is not None:
                texts["metadata"][upload.id] = dict(upload.metadata)
            if upload.source is not None:
                texts["sources"][upload.id] = upload.source
        fields: list[tuple[str, str | None, bytes]] = [
            (name, None, json.dumps(values).encode()) for name, values in texts.items() if values
        ]
        fields += [("file", upload.id, data) for upload, data in pictures]
        body, kind = form(fields)
        try:
            answer = self._connections.request("POST", "/images", body=body, headers={"Content-Type": kind})
        except ServiceError as error:
            if error.status not in _OF_ONE:
                raise
            # One picture that is too large, or metadata that cannot be, refuse the whole request.
            if len(pictures) > 1:
                return [added for one in pictures for added in self._add_once([one])]
            return [Added(composed(pictures[0][0].id), False, error)]
        lost = ServiceError(0, "unreachable", f"{self.url}: the answer ended before it told of this picture")
        outcomes = [Added(composed(upload.id), False, lost) for upload, _ in pictures]
        for line in answer.data.splitlines():
            told = json.loads(line)
            good = told["status"] in (200, 201)
            refusal = None if good else ServiceError(told["status"], told["code"], told["detail"])
            if told["index"] < len(outcomes):
                outcomes[told["index"]] = Added(outcomes[told["index"]].id, told["status"] == 201, refusal)
        return outcomes

    def items(
        self,
        filter: Mapping[str, Any] | None = None,
        prefix: str = "",
        include: Sequence[Included] = (),
        order: Literal["added", "-added", "id", "-id"] = "added",
        page: int = 1000,
    ) -> Iterator[ServedItem]:
        """Yield the items, page by page; those that are added meanwhile may be among them.

        Args:
            filter: only items whose metadata matches it.
            prefix: only items whose ids begin with it.
            include: what an item has besides id and metadata.
            order: of the time of adding, or of ids by code point; with − the other way round.
            page: items of a request, 1 to 1000.
        """
        query: dict[str, Any] = {"limit": page, "order": None if order == "added" else order, "prefix": prefix or None}
        query |= {"filter": None if not filter else json.dumps(filter)} | wanted(include)
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

    def delete(self, id: str) -> bool:
        """Remove an item, and return whether there was one."""
        return none_if_missing(lambda: self._connections.request("DELETE", item_path(id))) is not None

    def delete_many(self, ids: Iterable[str], parallel: int = 4) -> int:
        """Remove items by their ids, and return how many there were."""
        return sum(_ahead(ids, self.delete, parallel))

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
    ) -> Iterator[dict[str, Any]]:
        """Yield groups of items that show the same, as GET /duplicates lists them; waits until they are found.

        Args:
            preset: "exact", "near" or "alike".
            threshold: least score of two pictures of a group, in place of the preset's.
            progress: is called with the share of the work that is done, now and then.
        """
        query: dict[str, Any] = {"preset": preset, "threshold": threshold, "limit": 1000}
        while True:
            answer = self._connections.request("GET", "/duplicates", query)
            content = answer.json()
            if answer.status == 202:
                if progress is not None:
                    progress(content["progress"])
                time.sleep(_LOOK_S)
                continue
            yield from content["groups"]
            if content["next"] is None:
                return
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

    def _groups(
        self,
        members: Iterable[T],
        bytes_of: Callable[[T], int],
        most: int,
        name: Callable[[T], str] | None = None,
    ) -> Iterator[list[T]]:
        """Yield members in groups that one request may hold; no group has two members of one name."""
        most_bytes = min(_BYTES_TOGETHER, int(_SHARE_OF_BODY * self.limits["max_request_bytes"]))
        group: list[T] = []
        names: set[str] = set()
        total = 0
        for member in members:
            more, named = bytes_of(member), {name(member)} if name is not None else set[str]()
            if group and (len(group) == most or total + more > most_bytes or names & named):
                yield group
                group, names, total = [], set(), 0
            group.append(member)
            names |= named
            total += more
        if group:
            yield group


def _ahead(members: Iterable[T], work: Callable[[T], R], parallel: int) -> Iterator[R]:
    """Yield the results of the work in order, while some threads are at work on the next members."""
    with ThreadPoolExecutor(parallel, "client") as pool:
        running: deque[Future[R]] = deque()
        try:
            for member in members:
                running.append(pool.submit(work, member))
                if len(running) > parallel:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
