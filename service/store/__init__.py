"""Where items live and are found: the words, and what every store can do."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from service import FloatArray
from service.store.filters import Filter


@dataclass(frozen=True)
class Item:
    """A picture in the store.

    Attributes:
        id: the user's own, unique in the store.
        metadata: a JSON object.
        source: where the picture came from, such as a path; None for one sent over HTTP.
        digest: sha256 (hex) of the picture's bytes.
        variant: of the encoder, that made the embedding.
    """

    id: str
    metadata: dict[str, Any]
    source: str | None
    digest: str
    variant: str


@dataclass(frozen=True)
class NewItem(Item):
    """An item on its way into the store.

    Attributes:
        embedding: (D,) float32 of L2 norm 1.
        thumbnail: a small WebP file.
        original: the picture's own bytes, or None where they are not kept.
    """

    embedding: FloatArray
    thumbnail: bytes
    original: bytes | None


class Hit(NamedTuple):
    """An item and its score, the cosine to the query in [−1, 1]: larger is more alike.

    Its metadata is JSON, as the store has it: whoever only hands it on need not read it.
    """

    id: str
    score: float
    metadata_json: str

    @property
    def metadata(self) -> dict[str, Any]:
        """Its metadata."""
        content: dict[str, Any] = json.loads(self.metadata_json)
        return content


class Store(Protocol):
    """Items by id and by likeness. Calls may come from any thread."""

    def add(self, items: Sequence[NewItem]) -> list[bool]:
        """Add or replace items, all or none; True where the id was new. Durable when it returns."""
        ...

    def get(self, id: str) -> Item | None:
        """Return an item, or None."""
        ...

    def embedding(self, id: str) -> FloatArray | None:
        """Return an item's embedding, or None."""
        ...

    def thumbnail(self, id: str) -> bytes | None:
        """Return an item's thumbnail, or None."""
        ...

    def original(self, id: str) -> bytes | None:
        """Return an item's own bytes, or None where there is no such item or they were not kept."""
        ...

    def remove(self, id: str) -> bool:
        """Remove an item; False when there was none. Durable when it returns."""
        ...

    def set_metadata(self, id: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Item | None:
        """Replace an item's metadata by what `change` makes of it; None without item. Durable when it returns."""
        ...

    def search(self, queries: FloatArray, k: int, where: Filter | None = None) -> list[list[Hit]]:
        """Return the k items most like each query, best first, equal scores in the order of adding.

        Args:
            queries: (N, D) float32, finite rows of L2 norm 1.
            k: 1 or more; fewer hits come back when fewer items are there.
            where: only items whose metadata meets it.
        """
        ...

    def scan(self, limit: int, after: int = 0) -> tuple[list[Item], int | None]:
        """Return up to `limit` items in the order of adding, and the cursor to go on from, or None at the end."""
        ...

    def count(self) -> int:
        """Return the number of items."""
        ...

    def settle(self) -> None:
        """Do now what would be done in the background, so that searches are as fast as they will be."""
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...
