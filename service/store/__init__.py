"""The store: its types, and the protocol that every store implements."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from service import FloatArray
from service.file_facts import FileFacts, Move
from service.store.filters import Filter

Order = Literal["added", "-added", "id", "-id", "date", "-date", "size", "-size"]


@dataclass(frozen=True)
class Item:
    """A picture in the store, without its embedding and its bytes.

    Attributes:
        id: chosen by the user, unique in the store.
        metadata: a JSON object.
        source: where the picture came from, such as a path; None for a picture sent over HTTP.
        digest: sha256 (hex) of the image file, or of the embedding if the item came without a picture.
        variant: of the encoder that made the embedding.
        facts: of the image file: its size, format and date, as far as they are known.
        mtime_ns: when the file was changed last, in nanoseconds since 1970, as the disk says it; None if unknown.
    """

    id: str
    metadata: dict[str, Any]
    source: str | None
    digest: str
    variant: str
    facts: FileFacts = field(default=FileFacts(), kw_only=True)
    mtime_ns: int | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class NewItem(Item):
    """An item to add to a store.

    Attributes:
        embedding: (D,) float32 of L2 norm 1.
        thumbnail: a small WebP file; empty for an item without a picture.
        original: the bytes of the image file; None if the store is not to keep them.
        keep_metadata: an item that is replaced keeps its metadata, except the fields that `metadata` has.
    """

    embedding: FloatArray
    thumbnail: bytes
    original: bytes | None
    keep_metadata: bool = False


class Known(NamedTuple):
    """What a sync compares with a file: an item of one source.

    Attributes:
        path: within the source.
        id: of the item.
        digest: sha256 (hex) of the image file.
        size_bytes, mtime_ns: of the image file; None if unknown.
    """

    path: str
    id: str
    digest: str
    size_bytes: int | None
    mtime_ns: int | None


class Hit(NamedTuple):
    """A found item with its score: the cosine to the query in [−1, 1], larger is more alike.

    The metadata is JSON text, as stored. HTTP passes it on without parsing it.
    """

    id: str
    score: float
    metadata_json: str

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata, parsed."""
        content: dict[str, Any] = json.loads(self.metadata_json)
        return content


@dataclass(frozen=True)
class Folder:
    """A folder among ids: the prefix of its items' ids, which ends in a slash, and their number."""

    prefix: str
    count: int


@dataclass(frozen=True)
class Value:
    """A text, number, boolean or null in metadata, and the number of items that have it."""

    value: Any
    count: int


@dataclass(frozen=True)
class Field:
    """A field of metadata.

    Attributes:
        key: its name.
        count: number of items that have it.
        distinct: number of its different values, lists and objects aside.
        values: the most frequent ones, the most frequent one first; without long texts, and without values of one item
            alone where there are many.
    """

    key: str
    count: int
    distinct: int
    values: list[Value]


class DiskState(NamedTuple):
    """The disk of a store in a folder.

    Attributes:
        size_bytes, free_bytes: of its file system, without what is reserved for root.
        snapshot_at_s: when the last snapshot of the index was written, in seconds since 1970; 0 if there is none.
        snapshot_due: whether the index has so many changes since that the next snapshot is due. It is written within a
            minute, unless that fails.
    """

    size_bytes: int
    free_bytes: int
    snapshot_at_s: float
    snapshot_due: bool


class Store(Protocol):
    """A collection of items, found by id and by similarity. Calls may come from any thread.

    Every method raises InvalidStore if the store cannot be read or written.
    """

    def add(self, items: Sequence[NewItem]) -> list[bool]:
        """Add or replace all items or none, and return for each whether its id was new. Durable when it returns."""
        ...

    def get(self, id: str) -> Item | None:
        """Return an item, or None."""
        ...

    def embedding(self, id: str) -> FloatArray | None:
        """Return an item's embedding (D,), or None."""
        ...

    def thumbnail(self, id: str) -> bytes | None:
        """Return an item's thumbnail. None if there is no item, or it came without a picture."""
        ...

    def original(self, id: str) -> bytes | None:
        """Return the bytes of an item's image file. None if there is no item, or they were not kept."""
        ...

    def remove(self, id: str) -> bool:
        """Remove an item, and return whether there was one. Durable when it returns."""
        ...

    def set_metadata(self, id: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Item | None:
        """Replace an item's metadata by the result of `change`, and return the item, or None if there is no item.

        Durable when it returns. An error of `change` is raised, and the metadata stay as they are.
        """
        ...

    def move(self, moves: Sequence[Move]) -> int:
        """Record what became of items' files: give items other ids and sources, or remove them. Metadata stay.

        All moves are made or none, in one step, so items may exchange their ids, or take those of removed ones.
        Durable when it returns.

        Returns:
            The number of moves that were made; the others' items are not there or have another picture by now.

        Raises:
            InvalidRequest: an item that does not move has the id that another is to get.
        """
        ...

    def below(self, origin: str) -> list[Known]:
        """Return the items that came from a source, which lies at `origin`. Cost: reads all items, without parsing."""
        ...

    def facts(self) -> dict[str, str]:
        """Return the facts that the store holds about itself: fingerprint, model, and those that `note` wrote."""
        ...

    def note(self, facts: dict[str, str]) -> None:
        """Write facts into the store; facts of the same names are replaced. Durable when it returns."""
        ...

    def dismiss(self, pairs: Sequence[tuple[str, str]], dismissed: bool = True) -> None:
        """Remember pairs of digests that are no duplicates of each other to the user, or forget them.

        A pair of a digest with itself says that its exact copies are to stay. Durable when it returns.
        """
        ...

    def search(self, queries: FloatArray, k: int, where: Filter | None = None) -> list[list[Hit]]:
        """Return the k items most like each query, best first, equal scores in the order of adding.

        Args:
            queries: (N, D) float32, finite rows of L2 norm 1.
            k: 1 or more. Fewer hits come back if the store has fewer items that match.
            where: only items whose metadata matches; None for all.
        """
        ...

    def scan(self, limit: int, after: int = 0) -> tuple[list[Item], int | None]:
        """Return up to `limit` items in the order of adding, and the cursor of the next page, or None at the end."""
        ...

    def page(
        self, limit: int, after: str = "", where: Filter | None = None, order: Order = "added", offset: int = 0
    ) -> tuple[list[Item], str | None]:
        """Return up to `limit` items in an order, and the cursor of the next page, or None at the end.

        Args:
            limit: 1 or more.
            after: the cursor of this page; empty for the first one. It goes with the same `where` and `order`.
            where: only items that match; None for all.
            order: of adding, of ids by code point, or of the dates or sizes of files; with − the other way round. Items
                whose date or size is unknown come last in either case, and equal ones in the order of adding.
            offset: so many items are passed over first.

        Raises:
            PageNotFound: the cursor is none of this order.

        Cost: reads the items from the cursor on, until so many match.
        """
        ...

    def folders(self, prefix: str = "", where: Filter | None = None) -> list[Folder]:
        """Return the folders directly below a prefix of ids, in order, with the number of items at any depth in each.

        A folder is the part of an id up to a slash behind the prefix.

        Args:
            prefix: of ids, such as "2024/", in composed Unicode.
            where: only items that match; None for all.
        """
        ...

    def fields(self, where: Filter | None = None) -> list[Field]:
        """Return the fields at the top of the items' metadata, those of most items first.

        Args:
            where: only items that match; None for all.
        """
        ...

    def remove_matching(self, where: Filter, expect: int | None = None) -> int:
        """Remove all items that match or, if these are not as many as expected, none. Durable when it returns.

        Returns:
            The number of items that were removed.

        Raises:
            CountMismatch: more or fewer items match than expected.
        """
        ...

    def count(self, where: Filter | None = None) -> int:
        """Return the number of items that match; of all without a filter."""
        ...

    def sequence(self) -> int:
        """Return the number of the last change of an item; each change takes the next number."""
        ...

    @property
    def writable(self) -> bool:
        """Whether changes are taken now: not on a full or failed disk, nor in a store that was opened read-only."""
        ...

    def disk_state(self) -> DiskState | None:
        """Return the state of the store's disk; None for a store that is not in a folder."""
        ...

    def settle(self) -> None:
        """Do pending background work now, so that later searches run at full speed."""
        ...

    def close(self) -> None:
        """Release all files and locks. Every later call raises InvalidStore."""
        ...
