"""A store on Milvus: a collection of a cluster, or a file of Milvus Lite. Nothing but the connection is in memory.

Milvus proposes candidates; scores and order are ours, as in the embedded store. What Milvus cannot do is refused, with
NotOfThisStore: docs/operations.md lists it.
"""

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import orjson
from pymilvus import DataType, MilvusClient, MilvusException

from service import FloatArray
from service.encoding.card import Card
from service.errors import (
    CountMismatch,
    InvalidQuery,
    InvalidRequest,
    InvalidStore,
    LookalikeError,
    NotOfThisStore,
    PageNotFound,
    ReadOnlyStore,
    StoreAway,
    StoreMismatch,
)
from service.file_facts import FileFacts, Move
from service.store import Field, Folder, Hit, Item, Known, NewItem, Order, Value
from service.store.faiss_index import checked
from service.store.filters import Filter, begins, both, folded
from service.store.milvus_address import MilvusAddress
from service.store.milvus_filters import MOST_TERMS, TERM_LENGTH, condition_of, encoded, index_of, quoted
from service.store.pictures import Pictures
from service.store.ranking import best_of

# It logs every error before it raises it.
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
# The names of our own properties of a collection begin so.
_PREFIX = "lookalike."
# A call that takes longer counts as one to a server that is away.
_TIMEOUT_S = 10
_CONNECT_S = 5
# A server that comes back is noticed within a second. By default gRPC waits for up to two minutes, and new connections
# to the same address wait with it.
_CHANNEL = {
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 1000,
    "grpc.use_local_subchannel_pool": 1,
}
# Milvus takes 64 MB in a message.
_MOST_ROWS, _MOST_BYTES = 1000, 16_000_000
# Of one answer, by Milvus's own limit of 16,384 rows.
_ROWS_AT_ONCE = 8192
_MOST_CANDIDATES = 16_384
# More candidates than hits: Milvus's own scores are of float32, and in another order where they nearly agree.
_MORE_CANDIDATES = 16
_ROUNDING = 1e-5
# What Milvus does not sort or count is sorted and counted here, up to so many items.
MOST_SORTED = 1_000_000
_MOST_VALUES, _LONGEST_VALUE = 12, 200
_INDEXES: dict[str, dict[str, Any]] = {
    "FLAT": {},
    "HNSW": {"M": 16, "efConstruction": 200},
}
_LONGEST_ID, _LONGEST_NAME, _LONGEST_TEXT = 1024, 8192, 65_535
_OF_ITEM = ["id", "metadata", "source", "digest", "variant", "file"]
_SORTED_BY = {"date": "date", "size": "size_bytes"}
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
_REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)

Row = dict[str, Any]


class Place(NamedTuple):
    """Where an item stands in an order: its value there, when it was added, and its id."""

    value: str | int | None
    added: int
    id: str


class MilvusStore:
    """A collection of Milvus. Calls may come from any thread, and other processes may use the same collection.

    Attributes:
        address: of the collection.
    """

    def __init__(
        self,
        address: MilvusAddress,
        card: Card,
        dimension: int,
        token: str = "",
        pictures: str = "",
        read_only: bool = False,
    ) -> None:
        """Connect, and make the collection if it is not there.

        Args:
            address: of the collection.
            card: the encoder that made the embeddings.
            dimension: D.
            token: for Milvus, such as user:password; empty if it asks for none.
            pictures: where thumbnails and originals lie, a path of fsspec; empty leaves them out.
            read_only: every change is refused.

        Raises:
            StoreMismatch: the collection holds embeddings of another encoder.
            StoreAway: Milvus does not answer.
            InvalidStore: it refuses the token, or the collection is not one of ours.
        """
        self.address, self._dimension, self._read_only = address, dimension, read_only
        self._lock, self._connecting = threading.Lock(), threading.Lock()
        self._added = 0
        self._failed = False
        self._closed = False
        self._pictures = Pictures(pictures) if pictures else None
        self._token = token
        self._client = connect(address, token)
        try:
            with self._calling():
                if not self._client.has_collection(address.collection, timeout=_TIMEOUT_S):
                    if read_only:
                        raise InvalidStore(f"{address}: no such collection; without --read-only it is made")
                    self._make(card)
                if not read_only:
                    self._index()
                self._client.load_collection(address.collection, timeout=_TIMEOUT_S)
            _check_encoder(address, self.facts(), card, dimension)
        except BaseException:
            self.close()
            raise

    def _make(self, card: Card) -> None:
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=_LONGEST_ID)
        schema.add_field("added", DataType.INT64)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self._dimension)
        schema.add_field("metadata", DataType.JSON)
        schema.add_field("source", DataType.VARCHAR, max_length=_LONGEST_TEXT, nullable=True)
        schema.add_field("digest", DataType.VARCHAR, max_length=_LONGEST_ID)
        schema.add_field("variant", DataType.VARCHAR, max_length=_LONGEST_ID)
        # One field for all facts about the file: pymilvus takes as long for each field as for a vector.
        schema.add_field("file", DataType.JSON)
        schema.add_field("pictures", DataType.VARCHAR, max_length=_LONGEST_ID)
        schema.add_field("name", DataType.VARCHAR, max_length=_LONGEST_NAME)
        terms = {"element_type": DataType.VARCHAR, "max_capacity": MOST_TERMS, "max_length": TERM_LENGTH}
        schema.add_field("terms", DataType.ARRAY, **terms)
        schema.add_field("index", DataType.JSON)
        facts = {
            "fingerprint": card.fingerprint,
            "dimension": str(self._dimension),
            "model": card.name,
            "model_folder": str(card.folder),
        }
        self._client.create_collection(
            self.address.collection,
            schema=schema,
            # A write that was acknowledged is found by every replica.
            consistency_level="Strong",
            properties={_PREFIX + name: value for name, value in facts.items()},
            timeout=_TIMEOUT_S,
        )

    def _index(self) -> None:
        """Have Milvus build the indexes that are not there; one of another kind, which somebody made, stays."""
        there = set(self._client.list_indexes(self.address.collection, timeout=_TIMEOUT_S))
        is_lite = self._client.get_server_version(timeout=_TIMEOUT_S).startswith("milvus_lite")
        wanted = {"vector": "FLAT"} if is_lite else {"vector": "HNSW", "terms": "INVERTED", "source": "INVERTED"}
        indexes = self._client.prepare_index_params()
        for name, kind in wanted.items():
            if name not in there:
                options = {"metric_type": "IP", "params": _INDEXES[kind]} if name == "vector" else {}
                indexes.add_index(name, index_type=kind, index_name=name, **options)
        if len(indexes):
            self._client.create_index(self.address.collection, indexes, timeout=_TIMEOUT_S)

    # Changing ----------------------------------------------------------------------------------------

    def add(self, items: Sequence[NewItem]) -> list[bool]:
        """See Store.add. All or none holds up to 1,000 items or 16 MB, which are one call to Milvus.

        Raises:
            InvalidQuery: an embedding of wrong shape or norm; nothing is added.
            InvalidRequest: metadata, an id or a source beyond Milvus's limits; nothing is added.
        """
        if not items:
            return []
        vectors = checked(np.stack([item.embedding for item in items]), self._dimension)
        with self._changing():
            ids = list(dict.fromkeys(item.id for item in items))
            known = {row["id"]: row for row in self._rows(ids, ["id", "added", "metadata", "pictures"])}
            new: list[bool] = []
            rows: dict[str, Row] = {}
            for item, vector in zip(items, vectors, strict=True):
                old = rows.get(item.id) or known.get(item.id)
                new.append(old is None)
                metadata = old["metadata"] | item.metadata if old and item.keep_metadata else item.metadata
                rows[item.id] = self._row(item, metadata, vector, old["added"] if old else self._next())
            if self._pictures is not None:
                # Of an id that is given twice, the last one counts.
                for item in {item.id: item for item in items}.values():
                    rows[item.id]["pictures"] = self._pictures.put(item)
            self._upsert(list(rows.values()))
            self._forget([row["pictures"] for row in known.values()])
        return new

    def _row(self, item: NewItem, metadata: dict[str, Any], vector: FloatArray, added: int) -> Row:
        terms, index = index_of(metadata)
        row = {
            "id": item.id,
            "added": added,
            "vector": vector,
            "metadata": metadata,
            "source": item.source,
            "digest": item.digest,
            "variant": item.variant,
            "file": item.facts._asdict() | {"mtime_ns": item.mtime_ns},
            "pictures": "",
            "name": encoded(folded(item.id)),
            "terms": terms,
            "index": index,
        }
        _check_lengths(row)
        return row

    def remove(self, id: str) -> bool:
        """See Store.remove."""
        with self._changing():
            rows = self._rows([id], ["id", "pictures"])
            self._delete(rows)
        return bool(rows)

    def remove_matching(self, where: Filter, expect: int | None = None) -> int:
        """See Store.remove_matching. Items that another process changes meanwhile may be removed or not."""
        with self._changing():
            rows = list(self._stream(where, ["id", "pictures"]))
            if expect is not None and len(rows) != expect:
                raise CountMismatch(f"expected {expect} items that match, found {len(rows)}; nothing is removed")
            self._delete(rows)
        return len(rows)

    def set_metadata(self, id: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Item | None:
        """See Store.set_metadata. Of two processes that change an item at the same time, the later one wins."""
        with self._changing():
            item = self.get(id)
            if item is None:
                return None
            metadata = change(item.metadata)
            terms, index = index_of(metadata)
            row = {"id": id, "metadata": metadata, "terms": terms, "index": index}
            self._upsert([row], partial_update=True)
        return replace(item, metadata=metadata)

    def move(self, moves: Sequence[Move]) -> int:
        """See Store.move. First all new ids are written, then the old ones are removed: two calls to Milvus."""
        with self._changing():
            known = {row["id"]: row for row in self._rows([move.id for move in moves], ["*"])}
            made = [move for move in moves if move.id in known and known[move.id]["digest"] == move.digest]
            leaving = {move.id for move in made if move.to != move.id}
            coming = {move.to for move in made if move.to is not None and move.to != move.id}
            if any(row["id"] not in leaving for row in self._rows(list(coming), ["id"])):
                raise InvalidRequest("an item has the id that another item is to get")
            rows = []
            for move in made:
                if move.to is None:
                    continue
                changed = {"id": move.to, "name": encoded(folded(move.to)), "source": move.source}
                row = dict(known[move.id]) | changed
                row["file"] = move.facts._asdict() | {"mtime_ns": move.mtime_ns}
                rows.append(row | {"vector": np.asarray(row["vector"], np.float32)})
                _check_lengths(row)
            self._upsert(rows)
            gone = [known[id] for id in leaving - coming]
            removed = {move.id for move in made if move.to is None}
            self._delete([row if row["id"] in removed else row | {"pictures": ""} for row in gone])
            self._forget([known[id]["pictures"] for id in removed & coming])
        return len(made)

    def note(self, facts: dict[str, str]) -> None:
        """See Store.note. They are properties of the collection."""
        with self._changing():
            properties = {_PREFIX + name: value for name, value in facts.items()}
            self._client.alter_collection_properties(self.address.collection, properties, timeout=_TIMEOUT_S)

    def dismiss(self, pairs: Sequence[tuple[str, str]], dismissed: bool = True) -> None:  # noqa: ARG002
        """Raise NotOfThisStore: duplicates are of the embedded store."""
        raise NotOfThisStore("duplicates are not told apart in a store on Milvus, which does not group them either")

    def _upsert(self, rows: list[Row], **options: Any) -> None:
        """Write rows, in as many calls as their bytes need."""
        batch: list[Row] = []
        size = 0
        for row in rows:
            content = orjson.dumps([row["metadata"], row["index"]])
            own = 4 * self._dimension + len(content) + (TERM_LENGTH + 2) * len(row["terms"])
            if batch and (len(batch) == _MOST_ROWS or size + own > _MOST_BYTES):
                self._client.upsert(self.address.collection, batch, timeout=_TIMEOUT_S, **options)
                batch, size = [], 0
            batch.append(row)
            size += own
        if batch:
            self._client.upsert(self.address.collection, batch, timeout=_TIMEOUT_S, **options)

    def _delete(self, rows: Sequence[Row]) -> None:
        for start in range(0, len(rows), _MOST_ROWS):
            ids = [row["id"] for row in rows[start : start + _MOST_ROWS]]
            self._client.delete(self.address.collection, filter=_among(ids), timeout=_TIMEOUT_S)
        self._forget([row["pictures"] for row in rows])

    def _forget(self, names: Sequence[str]) -> None:
        # The item is gone or has other pictures already: files that stay cost space alone.
        if self._pictures is not None:
            with suppress(StoreAway):
                self._pictures.remove(names)

    def _next(self) -> int:
        """Return when an item is added, in nanoseconds since 1970, later than the one before."""
        self._added = max(self._added + 1, time.time_ns())
        return self._added

    # Searching and reading ---------------------------------------------------------------------------

    def get(self, id: str) -> Item | None:
        """See Store.get."""
        rows = self._rows([id], _OF_ITEM)
        return _item(rows[0]) if rows else None

    def embedding(self, id: str) -> FloatArray | None:
        """See Store.embedding."""
        rows = self._rows([id], ["vector"])
        return np.asarray(rows[0]["vector"], np.float32) if rows else None

    def thumbnail(self, id: str) -> bytes | None:
        """See Store.thumbnail. None, too, in a store without a place for pictures."""
        return None if self._pictures is None else self._pictures.thumbnail(self._picture_of(id))

    def original(self, id: str) -> bytes | None:
        """See Store.original. None, too, in a store without a place for pictures."""
        return None if self._pictures is None else self._pictures.original(self._picture_of(id))

    def _picture_of(self, id: str) -> str:
        rows = self._rows([id], ["pictures"])
        return str(rows[0]["pictures"]) if rows else ""

    def below(self, origin: str) -> list[Known]:
        """See Store.below. Cost: reads the items of the source."""
        condition = f"source > {quoted(f'{origin}/')} and source < {quoted(f'{origin}0')}"
        rows = self._pages(condition, ["id", "source", "digest", "file"])
        start = len(origin) + 1
        return [
            Known(row["source"][start:], row["id"], row["digest"], row["file"]["size_bytes"], row["file"]["mtime_ns"])
            for row in rows
        ]

    def facts(self) -> dict[str, str]:
        """See Store.facts. They are properties of the collection."""
        with self._calling():
            found = self._client.describe_collection(self.address.collection, timeout=_TIMEOUT_S)["properties"]
        return _own_facts(found)

    def search(self, queries: FloatArray, k: int, where: Filter | None = None) -> list[list[Hit]]:
        """See Store.search. The index of a cluster is approximate: it may miss an item, as ours above exact_limit.

        Raises:
            InvalidQuery: wrong D, non-finite or non-unit rows, or k < 1.
        """
        queries = checked(queries, self._dimension)
        if k < 1:
            raise InvalidQuery(f"k must be 1 or more, not {k}")
        if not len(queries):
            return []
        if k > _MOST_CANDIDATES:
            raise NotOfThisStore(f"k: Milvus finds at most {_MOST_CANDIDATES} neighbours, not {k}")
        condition = "" if where is None else condition_of(where.asked)
        most = min(k + max(_MORE_CANDIDATES, k // 4), _MOST_CANDIDATES)
        found = self._candidates(queries, most, condition)
        # Where items with the score of the last hit are left out, the order of adding decides, which Milvus ignores.
        while any(_cut_short(own, k, most) for own in found) and most < _MOST_CANDIDATES:
            most = min(most * 4, _MOST_CANDIDATES)
            found = self._candidates(queries, most, condition)
        return _ranked(queries, found, k)

    def _candidates(self, queries: FloatArray, most: int, condition: str) -> list[list[Any]]:
        with self._calling():
            found: list[list[Any]] = self._client.search(
                self.address.collection,
                data=list(queries),
                anns_field="vector",
                filter=condition,
                limit=most,
                output_fields=["id", "added", "vector", "metadata"],
                search_params={
                    "metric_type": "IP",
                    "params": {"ef": max(64, 2 * most), "nprobe": 64, "search_list": 2 * most},
                },
                timeout=_TIMEOUT_S,
            )
        return found

    def scan(self, limit: int, after: int = 0) -> tuple[list[Item], int | None]:
        """See Store.scan. Raises NotOfThisStore, as `page` in the order of adding."""
        places = self._places(None, "added", None)
        rest = [place for place in places if place.added > after]
        items = self._items(rest[:limit])
        return items, rest[limit - 1].added if len(rest) > limit else None

    def page(
        self, limit: int, after: str = "", where: Filter | None = None, order: Order = "added", offset: int = 0
    ) -> tuple[list[Item], str | None]:
        """See Store.page.

        Raises:
            NotOfThisStore: more items match than are sorted here, in any order but that of ids.

        Cost: in the order of ids, the page. In other orders it reads the ids of all items that match.
        """
        last = _place(after)
        if order == "id" and not offset:
            condition = _conjunction(_condition(where), f"id > {quoted(last.id)}" if last else "")
            rows = list(self._pages(condition, _OF_ITEM, limit + 1))
            items = [_item(row) for row in rows[:limit]]
            return items, _cursor(Place(None, 0, items[-1].id)) if len(rows) > limit else None
        places = self._places(where, order, last)[offset:]
        more = len(places) > limit
        return self._items(places[:limit]), _cursor(places[limit - 1]) if more else None

    def _places(self, where: Filter | None, order: Order, last: Place | None) -> list[Place]:
        """Return the places of all items that match behind a place, sorted."""
        column, down = order.removeprefix("-"), order.startswith("-")
        value = _SORTED_BY.get(column)
        rows = self._stream(where, ["id", "added", *(["file"] if value else [])], f"the order {order}")
        places = [Place(row["file"][value] if value else None, row["added"], row["id"]) for row in rows]

        def key(place: Place) -> tuple[Any, ...]:
            if column == "id":
                return (place.id.encode(),)
            return place.value if place.value is not None else 0 if value != "date" else "", place.added, place.id

        try:
            # Items without a value come last in either direction.
            known = sorted((place for place in places if not value or place.value is not None), key=key, reverse=down)
            unknown = sorted((place for place in places if value and place.value is None), key=key, reverse=down)
            if last is None:
                return known + unknown
            if value and last.value is None:
                return [place for place in unknown if (key(place) < key(last)) == down and key(place) != key(last)]
            behind = [place for place in known if (key(place) < key(last)) == down and key(place) != key(last)]
        except TypeError as error:
            raise _no_cursor() from error
        return behind + unknown

    def _items(self, places: Sequence[Place]) -> list[Item]:
        """Return the items at these places; those that were removed meanwhile are passed over."""
        found: dict[str, Item] = {}
        for start in range(0, len(places), _MOST_ROWS):
            ids = [place.id for place in places[start : start + _MOST_ROWS]]
            found |= {row["id"]: _item(row) for row in self._rows(ids, _OF_ITEM)}
        return [found[place.id] for place in places if place.id in found]

    def known(self, ids: Sequence[str]) -> dict[str, Item]:
        """Return the items with these ids, by id."""
        return {row["id"]: _item(row) for row in self._rows(ids, _OF_ITEM)}

    def batches(self, limit: int) -> Iterator[list[NewItem]]:
        """Yield all items with their embeddings and pictures, so many at once, in the order of adding.

        A collection of more than MOST_SORTED items gives them in the order of their ids.
        """
        fields = [*_OF_ITEM, "vector", "pictures"]
        if self.count() > MOST_SORTED:
            rows = self._pages("", fields)
            while batch := list(islice(rows, limit)):
                yield [self._new_item(row) for row in batch]
            return
        places = self._places(None, "added", None)
        for start in range(0, len(places), limit):
            ids = [place.id for place in places[start : start + limit]]
            found = {row["id"]: row for row in self._rows(ids, fields)}
            yield [self._new_item(found[id]) for id in ids if id in found]

    def _new_item(self, row: Row) -> NewItem:
        item, name = _item(row), row["pictures"]
        return NewItem(
            **{field.name: getattr(item, field.name) for field in dataclass_fields(item)},
            embedding=np.asarray(row["vector"], np.float32),
            thumbnail=(self._pictures.thumbnail(name) if self._pictures else None) or b"",
            original=self._pictures.original(name) if self._pictures else None,
        )

    def folders(self, prefix: str = "", where: Filter | None = None) -> list[Folder]:
        """See Store.folders. Raises NotOfThisStore. Cost: reads the ids of all items that match."""
        rows = self._stream(both(begins(prefix), where or Filter("TRUE", ())), ["id"], "the list of folders")
        counts = Counter(
            row["id"][: row["id"].index("/", len(prefix)) + 1] for row in rows if "/" in row["id"][len(prefix) :]
        )
        return [Folder(name, counts[name]) for name in sorted(counts, key=str.encode)]

    def fields(self, where: Filter | None = None) -> list[Field]:
        """See Store.fields. Raises NotOfThisStore. Cost: reads the metadata of all items that match."""
        totals: Counter[str] = Counter()
        values: dict[str, Counter[tuple[str, Any]]] = {}
        for row in self._stream(where, ["metadata"], "the summary of metadata"):
            for name, value in row["metadata"].items():
                totals[name] += 1
                own = values.setdefault(name, Counter())
                if not isinstance(value, dict | list):
                    own[_kind(value), value] += 1
        return [_field(name, totals[name], values[name]) for name in sorted(totals, key=lambda it: (-totals[it], it))]

    def count(self, where: Filter | None = None) -> int:
        """See Store.count."""
        with self._calling():
            found = self._client.query(
                self.address.collection, filter=_condition(where), output_fields=["count(*)"], timeout=_TIMEOUT_S
            )
        return int(found[0]["count(*)"])

    def sequence(self) -> int:
        """Raise NotOfThisStore: several processes change a collection, and Milvus does not number their changes."""
        raise NotOfThisStore("a store on Milvus does not number its changes")

    @property
    def writable(self) -> bool:
        """See Store.writable. False, too, after a call that Milvus did not answer, until it answers one."""
        return not (self._read_only or self._failed or self._closed)

    def settle(self) -> None:
        """Write what Milvus holds in memory into segments, which it indexes by itself."""
        with self._calling():
            self._client.flush(self.address.collection, timeout=600)

    def close(self) -> None:
        """See Store.close."""
        self._closed = True
        self._client.close()
        if self.address.in_file:
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(self.address.uri)

    # Calls to Milvus ---------------------------------------------------------------------------------

    def _rows(self, ids: Sequence[str], fields: list[str]) -> list[Row]:
        """Return fields of the items with these ids, in no order."""
        found: list[Row] = []
        for start in range(0, len(ids), _MOST_ROWS):
            with self._calling():
                found += self._client.query(
                    self.address.collection,
                    filter=_among(ids[start : start + _MOST_ROWS]),
                    output_fields=fields,
                    timeout=_TIMEOUT_S,
                )
        return found

    def _stream(self, where: Filter | None, fields: list[str], what: str = "") -> Iterator[Row]:
        """Yield fields of all items that match, in the order of their ids.

        Raises:
            NotOfThisStore: there are more than MOST_SORTED, and `what` names what needs all of them at once.
        """
        if what and (count := self.count(where)) > MOST_SORTED:
            raise NotOfThisStore(
                f"{what} is for up to {MOST_SORTED} items that match in a store on Milvus, which sorts and counts "
                f"none itself, and {count} do; listings in the order id, and searches, have no such limit"
            )
        return self._pages(_condition(where), fields)

    def _pages(self, condition: str, fields: list[str], most: int = -1) -> Iterator[Row]:
        """Yield fields of the items for which a condition holds, in the order of their ids, as of one moment."""
        with self._calling():
            pages = self._client.query_iterator(
                self.address.collection,
                batch_size=_ROWS_AT_ONCE if most < 0 else min(most, _ROWS_AT_ONCE),
                limit=most,
                filter=condition,
                output_fields=fields,
                timeout=_TIMEOUT_S,
            )
        try:
            while True:
                with self._calling():
                    rows = pages.next()
                if not rows:
                    return
                yield from rows
        finally:
            pages.close()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        if self._read_only:
            raise ReadOnlyStore("the store was opened read-only; send changes to a service that may write")
        with self._lock, self._calling():
            yield

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """Raise our own errors for those of Milvus."""
        if self._closed:
            raise InvalidStore("the store is closed")
        if self._failed:
            self._connect_again()
        try:
            yield
        except LookalikeError:
            raise
        except (MilvusException, grpc.RpcError) as error:
            said = _translated(self.address, error)
            self._failed = isinstance(said, StoreAway)
            raise said from error
        # pymilvus raises it where its connection was closed by another thread.
        except ValueError as error:
            raise StoreAway(f"{self.address}: does not answer: {error}") from error
        self._failed = False

    def _connect_again(self) -> None:
        """Connect after a call that was not answered: pymilvus itself does not load the collection again."""
        with self._connecting:
            if not self._failed:
                return
            client = connect(self.address, self._token)
            try:
                # Milvus Lite forgets at its end what was loaded; a cluster does not.
                client.load_collection(self.address.collection, timeout=_TIMEOUT_S)
            except (MilvusException, grpc.RpcError) as error:
                raise _translated(self.address, error) from error
            self._client, earlier = client, self._client
            self._failed = False
            # It may be closed already.
            with suppress(Exception):
                earlier.close()


def connect(address: MilvusAddress, token: str) -> MilvusClient:
    """Connect to Milvus.

    Raises:
        StoreAway: it does not answer.
        InvalidStore: it refuses the token, or the file of Milvus Lite is in use by another process.
    """
    if address.in_file:
        _open_file(address)
    try:
        return MilvusClient(address.uri, token=token, timeout=_CONNECT_S, grpc_options=_CHANNEL)
    except (MilvusException, grpc.RpcError) as error:
        raise _translated(address, error) from error


def recorded_model(address: MilvusAddress, token: str) -> tuple[Path, str] | None:
    """Return folder and name of the encoder that built a store; None if there is no collection.

    Raises:
        As `recorded_facts`.
    """
    facts = recorded_facts(address, token)
    return None if facts is None else (Path(facts.get("model_folder", "")), facts.get("model", ""))


def recorded_facts(address: MilvusAddress, token: str) -> dict[str, str] | None:
    """Return the facts of a store, as Store.facts; None if there is no collection.

    Raises:
        As `connect`, and InvalidStore: the collection is not one of ours.
    """
    client = connect(address, token)
    try:
        if not client.has_collection(address.collection, timeout=_TIMEOUT_S):
            return None
        found = client.describe_collection(address.collection, timeout=_TIMEOUT_S)["properties"]
    except (MilvusException, grpc.RpcError) as error:
        raise _translated(address, error) from error
    finally:
        client.close()
    if _PREFIX + "fingerprint" not in found:
        raise _no_collection_of_ours(address)
    return _own_facts(found)


def _open_file(address: MilvusAddress) -> None:
    """Start Milvus Lite in this process, and say why where that fails: pymilvus does not."""
    try:
        from milvus_lite.adapter.grpc.server import start_server_in_thread  # noqa: F401
        from milvus_lite.exceptions import DataDirLockedError, MilvusLiteError
        from milvus_lite.server_manager import server_manager_instance
    except ImportError as error:
        raise InvalidStore(f"{address}: needs Milvus Lite: pip install milvus-lite") from error
    folder = Path(address.uri).parent
    if not folder.is_dir():
        raise InvalidStore(f"{address}: the folder {folder} is not there")
    try:
        started = server_manager_instance.start_and_get_uri(address.uri)
    except DataDirLockedError as error:
        raise _in_use(address) from error
    except (MilvusLiteError, OSError) as error:
        raise InvalidStore(f"{address}: cannot be opened: {error}") from error
    if started is None:
        raise _in_use(address)


def _in_use(address: MilvusAddress) -> InvalidStore:
    return InvalidStore(
        f"{address}: is in use by another process, or cannot be opened; Milvus Lite serves one process at a time, and "
        "a cluster any number"
    )


def _translated(address: MilvusAddress, error: Exception) -> InvalidStore:
    """Return an error of Milvus or of its connection as one of ours."""
    codes = [error.code] if isinstance(error, MilvusException) else [error.code()]  # type: ignore[attr-defined]
    cause = error.__cause__ or error.__context__
    codes += [cause.code()] if isinstance(cause, grpc.RpcError) and hasattr(cause, "code") else []
    text = " ".join(str(getattr(error, "message", error)).split())
    if any(code in _REFUSED for code in codes) or "auth check failure" in text.lower() or "UNAUTHENTICATED" in text:
        return InvalidStore(f"{address}: refuses the token; LOOKALIKE_MILVUS_TOKEN has it, such as user:password")
    named = type(error).__name__ in ("ConnectError", "MilvusUnavailableException")
    unanswered = named or "Fail connecting to server" in text or "Retry timeout" in text or "Retry run out" in text
    # The next call loads it.
    unanswered = unanswered or "state 'released'" in text or "not loaded" in text
    if unanswered or any(code in _AWAY for code in codes) or getattr(error, "retriable", False):
        return StoreAway(f"{address}: Milvus does not answer now")
    return InvalidStore(f"{address}: Milvus refuses the call: {text[:500]}")


def _check_encoder(address: MilvusAddress, have: dict[str, str], card: Card, dimension: int) -> None:
    """Raise StoreMismatch or InvalidStore if a collection is not of an encoder's embeddings."""
    if "fingerprint" not in have:
        raise _no_collection_of_ours(address)
    if have["fingerprint"] != card.fingerprint:
        raise StoreMismatch(
            f"{address}: built by the encoder {have.get('model')} ({have['fingerprint'][:12]}…), not by {card.name} "
            f"({card.fingerprint[:12]}…); name that encoder with --model, or another collection"
        )
    if have.get("dimension") != str(dimension):
        raise InvalidStore(
            f"{address}: its vectors have {have.get('dimension')} numbers, the encoder {card.name} gives {dimension}"
        )


def _no_collection_of_ours(address: MilvusAddress) -> InvalidStore:
    return InvalidStore(f"{address}: the collection has no fingerprint of an encoder, so it is not one of ours")


def _check_lengths(row: Row) -> None:
    limits = {"id": _LONGEST_ID, "digest": _LONGEST_ID, "source": _LONGEST_TEXT, "name": _LONGEST_NAME}
    for name, most in limits.items():
        if row[name] is not None and len(row[name].encode()) > most:
            shown = "id" if name == "name" else name
            raise InvalidRequest(f"{shown}: Milvus takes at most {most} bytes of it")


def _own_facts(properties: dict[str, str]) -> dict[str, str]:
    return {name.removeprefix(_PREFIX): value for name, value in properties.items() if name.startswith(_PREFIX)}


# From rows to what we return ---------------------------------------------------------------------


def _item(row: Row) -> Item:
    facts = FileFacts(*(row["file"][name] for name in FileFacts._fields))
    fields = (row["id"], row["metadata"], row["source"], row["digest"], row["variant"])
    return Item(*fields, facts=facts, mtime_ns=row["file"]["mtime_ns"])


def _cut_short(found: list[Any], k: int, most: int) -> bool:
    """Return whether items that were not found may have the score of the last hit."""
    if len(found) < most:
        return False
    scores = sorted((hit["distance"] for hit in found), reverse=True)
    return bool(scores[-1] > scores[k - 1] - _ROUNDING)


def _ranked(queries: FloatArray, found: list[list[Any]], k: int) -> list[list[Hit]]:
    """Return the best k candidates of each query by exact cosine, equal scores in the order of adding."""
    entities = {hit["entity"]["id"]: hit["entity"] for own in found for hit in own}
    if not entities:
        return [[] for _ in found]
    order = sorted(entities.values(), key=lambda one: (one["added"], one["id"]))
    rows = {one["id"]: row for row, one in enumerate(order)}
    vectors = np.asarray([one["vector"] for one in order], np.float32)
    # Milvus may find an item twice while it is being replaced.
    candidates = [sorted({rows[hit["entity"]["id"]] for hit in own}) for own in found]
    lengths = np.asarray([len(own) for own in candidates])
    places = np.asarray([row for own in candidates for row in own], np.int64)
    best, scores = best_of(queries, lengths, vectors, places, k)
    shown = {row: json.dumps(order[row]["metadata"], ensure_ascii=False) for row in np.unique(best).tolist()}
    hits = [Hit(order[row]["id"], score, shown[row]) for row, score in zip(best.tolist(), scores.tolist(), strict=True)]
    ends = np.cumsum(np.minimum(lengths, k)).tolist()
    return [hits[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "false" if not value else "true"
        case int() | float():
            return "number"
    return "text"


def _field(name: str, total: int, values: Counter[tuple[str, Any]]) -> Field:
    """Return a field as Store.fields describes it."""
    shown = [
        (kind, value, count)
        for (kind, value), count in values.items()
        if (kind != "text" or len(value) <= _LONGEST_VALUE) and (count > 1 or len(values) <= _MOST_VALUES)
    ]
    shown.sort(key=lambda one: (-one[2], one[0], one[1] if one[0] in ("number", "text") else 0))
    return Field(name, total, len(values), [Value(value, count) for _, value, count in shown[:_MOST_VALUES]])


# Conditions and cursors --------------------------------------------------------------------------


def _condition(where: Filter | None) -> str:
    return "" if where is None else condition_of(where.asked)


def _conjunction(one: str, other: str) -> str:
    return f"({one}) and ({other})" if one and other else one or other


def _among(ids: Sequence[str]) -> str:
    return f"id in [{', '.join(map(quoted, ids))}]"


def _cursor(place: Place) -> str:
    return json.dumps(place).encode().hex()


def _place(cursor: str) -> Place | None:
    """Return the place that a cursor stands for, None for the first page. Raises PageNotFound."""
    if not cursor:
        return None
    try:
        value, added, id = json.loads(bytes.fromhex(cursor))
    except (ValueError, TypeError) as error:
        raise _no_cursor() from error
    if not isinstance(added, int) or not isinstance(id, str) or not isinstance(value, str | int | None):
        raise _no_cursor()
    return Place(value, added, id)


def _no_cursor() -> PageNotFound:
    return PageNotFound("cursor: it is none of this order; begin again without a cursor")
