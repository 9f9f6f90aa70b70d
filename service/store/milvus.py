"""A store on Milvus: a collection of a cluster, or a file of Milvus Lite. Nothing but the connection is in memory.

Milvus proposes candidates; scores and order are ours, as in the embedded store. What Milvus cannot do is refused, with
NotOfThisStore: docs/operations.md lists it.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from itertools import islice
from typing import Any

import grpc
import numpy as np
from pymilvus import DataType, MilvusException

from service import FloatArray
from service.encoding.card import Card
from service.errors import (
    CountMismatch,
    InvalidQuery,
    InvalidRequest,
    InvalidStore,
    LookalikeError,
    NotOfThisStore,
    ReadOnlyStore,
    StoreAway,
    StoreMismatch,
)
from service.file_facts import Move
from service.store import Field, Folder, Hit, Item, Known, NewItem, Order
from service.store.faiss_index import checked
from service.store.filters import Filter, begins, both
from service.store.milvus_address import MilvusAddress
from service.store.milvus_connection import PREFIX, TIMEOUT_S, connect, no_collection_of_ours, own_facts, translated
from service.store.milvus_filters import MOST_TERMS, TERM_LENGTH, condition_of, index_of, quoted
from service.store.milvus_rows import (
    LONGEST_ID,
    Place,
    Row,
    check_lengths,
    cursor_of,
    cut_short,
    facts_of,
    field_of,
    file_facts,
    item_of,
    kind_of,
    no_cursor,
    place_of,
    ranked,
)
from service.store.pictures import Pictures

# Milvus Lite now and then merges its segments while a write waits.
_WRITE_S = 60
# Milvus takes 64 MB in a message.
_MOST_ROWS, _MOST_BYTES = 1000, 16_000_000
# Of one answer, by Milvus's own limit of 16,384 rows.
_ROWS_AT_ONCE = 8192
_MOST_CANDIDATES = 16_384
# More candidates than hits: Milvus's own scores are of float32, and in another order where they nearly agree.
_MORE_CANDIDATES = 16
# What Milvus does not sort or count is sorted and counted here, up to so many items.
MOST_SORTED = 1_000_000
_INDEXES: dict[str, dict[str, Any]] = {
    "FLAT": {},
    "HNSW": {"M": 16, "efConstruction": 200},
}
_OF_ITEM = ["id", "metadata", "facts"]
# Of the fields of a collection; a collection of another one is refused.
_LAYOUT = "2"
_JSON = ("metadata", "facts", "index")
_SORTED_BY = {"date": "date", "size": "size_bytes"}


class MilvusStore:
    """A collection of Milvus. Calls may come from any thread, and other processes may use the same collection.

    Attributes:
        address: of the collection.
    """

    # An empty token means none: bandit takes it for a password.
    def __init__(  # nosec B107
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
                if not self._client.has_collection(address.collection, timeout=TIMEOUT_S):
                    if read_only:
                        raise InvalidStore(f"{address}: no such collection; without --read-only it is made")
                    self._make(card)
                if not read_only:
                    self._index()
                self._client.load_collection(address.collection, timeout=TIMEOUT_S)
            _check_encoder(address, self.facts(), card, dimension)
        except BaseException:
            self.close()
            raise

    def _make(self, card: Card) -> None:
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=LONGEST_ID)
        schema.add_field("added", DataType.INT64)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self._dimension)
        schema.add_field("metadata", DataType.JSON)
        # One field for what no index is needed for: pymilvus takes as long for each field as for a vector.
        schema.add_field("facts", DataType.JSON)
        terms = {"element_type": DataType.VARCHAR, "max_capacity": MOST_TERMS, "max_length": TERM_LENGTH}
        schema.add_field("terms", DataType.ARRAY, **terms)
        schema.add_field("index", DataType.JSON)
        facts = {
            "layout": _LAYOUT,
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
            properties={PREFIX + name: value for name, value in facts.items()},
            timeout=TIMEOUT_S,
        )

    def _index(self) -> None:
        """Have Milvus build the indexes that are not there; one of another kind, which somebody made, stays."""
        there = set(self._client.list_indexes(self.address.collection, timeout=TIMEOUT_S))
        is_lite = self._client.get_server_version(timeout=TIMEOUT_S).startswith("milvus_lite")
        wanted = {"vector": "FLAT"} if is_lite else {"vector": "HNSW", "terms": "INVERTED"}
        indexes = self._client.prepare_index_params()
        for name, kind in wanted.items():
            if name not in there:
                options = {"metric_type": "IP", "params": _INDEXES[kind]} if name == "vector" else {}
                indexes.add_index(name, index_type=kind, index_name=name, **options)
        if len(indexes):
            self._client.create_index(self.address.collection, indexes, timeout=TIMEOUT_S)

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
            known = {row["id"]: row for row in self._rows(ids, ["id", "added", "metadata", "facts"])}
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
                    rows[item.id]["facts"]["pictures"] = self._pictures.put(item)
            self._upsert(list(rows.values()))
            self._forget(known.values())
        return new

    def _row(self, item: NewItem, metadata: dict[str, Any], vector: FloatArray, added: int) -> Row:
        terms, index = index_of(item.id, metadata)
        row = {
            "id": item.id,
            "added": added,
            "vector": vector,
            "metadata": metadata,
            "facts": facts_of(item),
            "terms": terms,
            "index": index,
        }
        check_lengths(row)
        return row

    def remove(self, id: str) -> bool:
        """See Store.remove."""
        with self._changing():
            rows = self._rows([id], ["id", "facts"])
            self._remove(rows)
        return bool(rows)

    def remove_matching(self, where: Filter, expect: int | None = None) -> int:
        """See Store.remove_matching. Items that another process changes meanwhile may be removed or not."""
        with self._changing():
            rows = list(self._stream(where, ["id", "facts"]))
            if expect is not None and len(rows) != expect:
                raise CountMismatch(f"expected {expect} items that match, found {len(rows)}; nothing is removed")
            self._remove(rows)
        return len(rows)

    def set_metadata(self, id: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Item | None:
        """See Store.set_metadata. Of two processes that change an item at the same time, the later one wins."""
        with self._changing():
            item = self.get(id)
            if item is None:
                return None
            metadata = change(item.metadata)
            terms, index = index_of(id, metadata)
            row = {"id": id, "metadata": metadata, "terms": terms, "index": index}
            self._upsert([row], partial_update=True)
        return replace(item, metadata=metadata)

    def move(self, moves: Sequence[Move]) -> int:
        """See Store.move. First all new ids are written, then the old ones are removed: two calls to Milvus."""
        with self._changing():
            known = {row["id"]: row for row in self._rows([move.id for move in moves], ["*"])}
            made = [move for move in moves if move.id in known and known[move.id]["facts"]["digest"] == move.digest]
            leaving = {move.id for move in made if move.to != move.id}
            coming = {move.to for move in made if move.to is not None and move.to != move.id}
            if any(row["id"] not in leaving for row in self._rows(list(coming), ["id"])):
                raise InvalidRequest("an item has the id that another item is to get")
            rows = []
            for move in made:
                if move.to is None:
                    continue
                row = dict(known[move.id])
                row |= {"id": move.to, "vector": np.asarray(row["vector"], np.float32)}
                row["index"] = index_of(move.to, row["metadata"])[1]
                row["facts"] = row["facts"] | file_facts(move.facts, move.mtime_ns) | {"source": move.source}
                check_lengths(row)
                rows.append(row)
            self._upsert(rows)
            self._delete(list(leaving - coming))
            self._forget([known[move.id] for move in made if move.to is None])
        return len(made)

    def note(self, facts: dict[str, str]) -> None:
        """See Store.note. They are properties of the collection."""
        if not facts:
            return
        with self._changing():
            properties = {PREFIX + name: value for name, value in facts.items()}
            self._client.alter_collection_properties(self.address.collection, properties, timeout=TIMEOUT_S)

    def dismiss(self, pairs: Sequence[tuple[str, str]], dismissed: bool = True) -> None:  # noqa: ARG002
        """Raise NotOfThisStore: duplicates are of the embedded store."""
        raise NotOfThisStore("duplicates are not told apart in a store on Milvus, which does not group them either")

    def _upsert(self, rows: list[Row], **options: Any) -> None:
        """Write rows, in as many calls as their bytes need."""
        batch: list[Row] = []
        size = 0
        for row in rows:
            # pymilvus takes several times as long to write JSON as to check what is written.
            written = {name: json.dumps(row[name], ensure_ascii=False) for name in _JSON if name in row}
            own = 4 * self._dimension + sum(map(len, written.values())) + (TERM_LENGTH + 2) * len(row["terms"])
            if batch and (len(batch) == _MOST_ROWS or size + own > _MOST_BYTES):
                self._client.upsert(self.address.collection, batch, timeout=_WRITE_S, **options)
                batch, size = [], 0
            batch.append(row | written)
            size += own
        if batch:
            self._client.upsert(self.address.collection, batch, timeout=_WRITE_S, **options)

    def _remove(self, rows: Sequence[Row]) -> None:
        self._delete([row["id"] for row in rows])
        self._forget(rows)

    def _delete(self, ids: Sequence[str]) -> None:
        for start in range(0, len(ids), _MOST_ROWS):
            condition = _among(ids[start : start + _MOST_ROWS])
            self._client.delete(self.address.collection, filter=condition, timeout=TIMEOUT_S)

    def _forget(self, rows: Iterable[Row]) -> None:
        """Remove the pictures of rows that are gone or have others now: files that stay cost space alone."""
        if self._pictures is not None:
            with suppress(StoreAway):
                self._pictures.remove([row["facts"]["pictures"] for row in rows])

    def _next(self) -> int:
        """Return when an item is added, in nanoseconds since 1970, later than the one before."""
        self._added = max(self._added + 1, time.time_ns())
        return self._added

    # Searching and reading ---------------------------------------------------------------------------

    def get(self, id: str) -> Item | None:
        """See Store.get."""
        rows = self._rows([id], _OF_ITEM)
        return item_of(rows[0]) if rows else None

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
        rows = self._rows([id], ["facts"])
        return str(rows[0]["facts"]["pictures"]) if rows else ""

    def below(self, origin: str) -> list[Known]:
        """See Store.below. Cost: reads the items of the source."""
        condition = f'facts["source"] > {quoted(f"{origin}/")} and facts["source"] < {quoted(f"{origin}0")}'
        start = len(origin) + 1
        rows = [(row["id"], row["facts"]) for row in self._pages(condition, ["id", "facts"])]
        return [
            Known(facts["source"][start:], id, facts["digest"], facts["size_bytes"], facts["mtime_ns"])
            for id, facts in rows
        ]

    def facts(self) -> dict[str, str]:
        """See Store.facts. They are properties of the collection."""
        with self._calling():
            found = self._client.describe_collection(self.address.collection, timeout=TIMEOUT_S)["properties"]
        return own_facts(found)

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
        while any(cut_short(own, k, most) for own in found) and most < _MOST_CANDIDATES:
            most = min(most * 4, _MOST_CANDIDATES)
            found = self._candidates(queries, most, condition)
        return ranked(queries, found, k)

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
                timeout=TIMEOUT_S,
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
        last = place_of(after)
        if order == "id" and not offset:
            condition = _conjunction(_condition(where), f"id > {quoted(last.id)}" if last else "")
            rows = list(self._pages(condition, _OF_ITEM, limit + 1))
            items = [item_of(row) for row in rows[:limit]]
            return items, cursor_of(Place(None, 0, items[-1].id)) if len(rows) > limit else None
        places = self._places(where, order, last)[offset:]
        more = len(places) > limit
        return self._items(places[:limit]), cursor_of(places[limit - 1]) if more else None

    def _places(self, where: Filter | None, order: Order, last: Place | None) -> list[Place]:
        """Return the places of all items that match behind a place, sorted."""
        column, down = order.removeprefix("-"), order.startswith("-")
        value = _SORTED_BY.get(column)
        rows = self._stream(where, ["id", "added", *(["facts"] if value else [])], f"the order {order}")
        places = [Place(row["facts"][value] if value else None, row["added"], row["id"]) for row in rows]

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
            raise no_cursor() from error
        return behind + unknown

    def _items(self, places: Sequence[Place]) -> list[Item]:
        """Return the items at these places; those that were removed meanwhile are passed over."""
        found: dict[str, Item] = {}
        for start in range(0, len(places), _MOST_ROWS):
            ids = [place.id for place in places[start : start + _MOST_ROWS]]
            found |= {row["id"]: item_of(row) for row in self._rows(ids, _OF_ITEM)}
        return [found[place.id] for place in places if place.id in found]

    def known(self, ids: Sequence[str]) -> dict[str, Item]:
        """Return the items with these ids, by id."""
        return {row["id"]: item_of(row) for row in self._rows(ids, _OF_ITEM)}

    def batches(self, limit: int) -> Iterator[list[NewItem]]:
        """Yield all items with their embeddings and pictures, so many at once, in the order of adding.

        A collection of more than MOST_SORTED items gives them in the order of their ids.
        """
        fields = [*_OF_ITEM, "vector"]
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
        item, name = item_of(row), row["facts"]["pictures"]
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
                    own[kind_of(value), value] += 1
        return [field_of(name, totals[name], values[name]) for name in sorted(totals, key=lambda it: (-totals[it], it))]

    def count(self, where: Filter | None = None) -> int:
        """See Store.count."""
        with self._calling():
            found = self._client.query(
                self.address.collection, filter=_condition(where), output_fields=["count(*)"], timeout=TIMEOUT_S
            )
        return int(found[0]["count(*)"])

    def sequence(self) -> int:
        """Raise NotOfThisStore: several processes change a collection, and Milvus does not number their changes."""
        raise NotOfThisStore("a store on Milvus does not number its changes")

    @property
    def writable(self) -> bool:
        """See Store.writable. False, too, after a call that Milvus did not answer, until it answers one."""
        return not (self._read_only or self._failed or self._closed)

    def disk_state(self) -> None:
        """Return None: the data are on Milvus's own disks."""

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
                    timeout=TIMEOUT_S,
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
                timeout=TIMEOUT_S,
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
            said = translated(self.address, error)
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
                client.load_collection(self.address.collection, timeout=TIMEOUT_S)
            except (MilvusException, grpc.RpcError) as error:
                raise translated(self.address, error) from error
            self._client, earlier = client, self._client
            self._failed = False
            # It may be closed already.
            with suppress(Exception):
                earlier.close()


def _check_encoder(address: MilvusAddress, have: dict[str, str], card: Card, dimension: int) -> None:
    """Raise StoreMismatch or InvalidStore if a collection is not of an encoder's embeddings."""
    if "fingerprint" not in have:
        raise no_collection_of_ours(address)
    if have.get("layout") != _LAYOUT:
        raise InvalidStore(
            f"{address}: its fields are those of another version of Lookalike (layout {have.get('layout', '1')}, "
            f"expected {_LAYOUT}); index into another collection"
        )
    if have["fingerprint"] != card.fingerprint:
        raise StoreMismatch(
            f"{address}: built by the encoder {have.get('model')} ({have['fingerprint'][:12]}…), not by {card.name} "
            f"({card.fingerprint[:12]}…); name that encoder with --model, or another collection"
        )
    if have.get("dimension") != str(dimension):
        raise InvalidStore(
            f"{address}: its vectors have {have.get('dimension')} numbers, the encoder {card.name} gives {dimension}"
        )


# Conditions and cursors --------------------------------------------------------------------------


def _condition(where: Filter | None) -> str:
    return "" if where is None else condition_of(where.asked)


def _conjunction(one: str, other: str) -> str:
    return f"({one}) and ({other})" if one and other else one or other


def _among(ids: Sequence[str]) -> str:
    return f"id in [{', '.join(map(quoted, ids))}]"
