"""What goes to a running service and what comes back: typed, and as the bytes and JSON of its API."""

import base64
import unicodedata
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import numpy as np

from service import FloatArray
from service.client.connection import ServiceError
from service.errors import LookalikeError
from service.file_facts import FileFacts, Move
from service.queries import ItemQuery, PictureQuery, Query, SumQuery, TextQuery, VectorQuery

T = TypeVar("T")

Included = Literal["embedding", "digest", "source", "variant", "file"]
Order = Literal["added", "-added", "id", "-id", "date", "-date", "size", "-size"]


@dataclass(frozen=True)
class Upload:
    """A picture to add.

    Attributes:
        id: of the item; an item of this id is replaced.
        picture: the bytes of an image file, or its path, which is read when its turn comes.
        metadata: a JSON object; None keeps the metadata of an item that is replaced.
        source: where the picture came from, for the service to record.
    """

    id: str
    picture: bytes | Path
    metadata: Mapping[str, Any] | None = None
    source: str | None = None


@dataclass(frozen=True, eq=False)
class EmbeddedUpload:
    """An item to add by its embedding, which the encoder of the service has made.

    Attributes:
        id, metadata, source: as of `Upload`.
        embedding: (D,) of any length but 0.
        digest: sha256 (hex) of its picture; that of `original` if left out.
        variant: of the encoder.
        thumbnail: a small WebP file.
        original: the bytes of the image file.
        facts, mtime_ns: of that file.
    """

    id: str
    embedding: FloatArray
    metadata: Mapping[str, Any] | None = None
    source: str | None = None
    digest: str | None = None
    variant: str | None = None
    thumbnail: bytes | None = None
    original: bytes | None = None
    facts: FileFacts | None = None
    mtime_ns: int | None = None

    def json(self) -> dict[str, Any]:
        """Return it as JSON of POST /images."""
        told: dict[str, Any] = {name: getattr(self, name) for name in ("id", "source", "digest", "variant")}
        told["metadata"] = None if self.metadata is None else dict(self.metadata)
        told["embedding"] = base64.b64encode(np.asarray(self.embedding, "<f4").tobytes()).decode()
        for name in ("thumbnail", "original"):
            data = getattr(self, name)
            told[name] = None if data is None else base64.b64encode(data).decode()
        if self.facts is not None:
            told["file"] = self.facts._asdict() | {"mtime_ns": self.mtime_ns}
        return {name: value for name, value in told.items() if value is not None}


@dataclass(frozen=True)
class Added:
    """What became of an uploaded picture.

    Attributes:
        id: of the item, in composed Unicode.
        is_new: whether no item had this id. A request whose answer got lost is sent again and finds its own item.
        error: why the picture is not in the store; None if it is.
    """

    id: str
    is_new: bool
    error: LookalikeError | None = None


@dataclass(frozen=True, eq=False)
class ServedItem:
    """An item of the service; what was not asked for is None.

    Attributes:
        id, metadata: of the item.
        embedding: (D,) float32 of L2 norm 1.
        digest, source, variant, facts, mtime_ns: as service.store.Item has them; the last two are the `file`.
    """

    id: str
    metadata: dict[str, Any]
    embedding: FloatArray | None = None
    digest: str | None = None
    source: str | None = None
    variant: str | None = None
    facts: FileFacts | None = None
    mtime_ns: int | None = None


@dataclass(frozen=True, eq=False)
class ServedHit:
    """A found item with its score, the cosine to the query; what else it has was asked for, as of ServedItem."""

    id: str
    score: float
    metadata: dict[str, Any]
    embedding: FloatArray | None = None
    digest: str | None = None
    source: str | None = None
    facts: FileFacts | None = None
    mtime_ns: int | None = None


@dataclass(frozen=True)
class ServedGroups:
    """Groups of items that show the same.

    Attributes:
        sequence: number of the last change of the store that they take into account.
        threshold: least score of two pictures of a group.
        groups: each as GET /duplicates shows it: `best`, `reason`, and `items` with the best copy first.
    """

    sequence: int
    threshold: float
    groups: list[dict[str, Any]]


def query_json(query: Query) -> dict[str, Any]:
    """Return a query as JSON of POST /search."""
    match query:
        case PictureQuery():
            data = query.data if isinstance(query.data, bytes) else query.data()
            return {"image": base64.b64encode(data).decode()}
        case TextQuery():
            return {"text": query.text}
        case VectorQuery():
            return {"vector": [float(number) for number in query.numbers]}
        case ItemQuery():
            return {"id": query.id}
        case SumQuery():
            return {"all": [query_json(part) | {"weight": weight} for part, weight in query.parts]}


def form(fields: Sequence[tuple[str, str | None, bytes]]) -> tuple[bytes, str]:
    """Return a multipart form and its media type; fields are name, file name and content."""
    boundary = uuid.uuid4().hex
    parts: list[bytes] = []
    for name, file, data in fields:
        # RFC 8187: in its percent signs any name is ASCII without quotes.
        named = "" if file is None else f"; filename*=UTF-8''{quote(file, safe='')}"
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'
        parts += [head.encode(), data, b"\r\n"]
    parts.append(f"--{boundary}--\r\n".encode())
    return b"".join(parts), f"multipart/form-data; boundary={boundary}"


def item_path(id: str) -> str:
    """Return the path of an item's route."""
    return f"/images/{quote(id, safe='')}"


def wanted(include: Sequence[Included]) -> dict[str, Any]:
    """Return the parameters that ask for more than id and metadata of an item."""
    embedding = {"encoding_format": "base64"} if "embedding" in include else {}
    return {"include": [*include]} | embedding if include else {}


def item_of(content: Mapping[str, Any]) -> ServedItem:
    """Return an item from its JSON."""
    digest, source, variant = (content.get(name) for name in ("digest", "source", "variant"))
    return ServedItem(
        content["id"], content["metadata"], vector_of(content), digest, source, variant, *_file_of(content)
    )


def hit_of(content: Mapping[str, Any]) -> ServedHit:
    """Return a hit from its JSON."""
    id, score, metadata = content["id"], content["score"], content.get("metadata", {})
    own = (content.get("digest"), content.get("source"))
    return ServedHit(id, score, metadata, vector_of(content), *own, *_file_of(content))


def _file_of(content: Mapping[str, Any]) -> tuple[FileFacts | None, int | None]:
    file = content.get("file")
    return (None, None) if file is None else (FileFacts(*(file[name] for name in FileFacts._fields)), file["mtime_ns"])


def move_json(move: Move) -> dict[str, Any]:
    """Return a move as JSON of POST /images/moves."""
    file = move.facts._asdict() | {"mtime_ns": move.mtime_ns}
    return {"id": move.id, "digest": move.digest, "to": move.to, "source": move.source, "file": file}


def vector_of(content: Mapping[str, Any]) -> FloatArray | None:
    """Return the embedding of an item or hit from its JSON, as numbers or base64; None if it has none."""
    told = content.get("embedding")
    if isinstance(told, str):
        return np.frombuffer(base64.b64decode(told), "<f4").astype(np.float32)
    return None if told is None else np.asarray(told, np.float32)


def none_if_missing(ask: Callable[[], T]) -> T | None:
    """Return what the service answers, or None if it has no such item."""
    try:
        return ask()
    except ServiceError as error:
        if error.code == "not_found":
            return None
        raise


def read(picture: bytes | Path) -> bytes:
    """Return the bytes of a picture. Raises OSError."""
    return picture if isinstance(picture, bytes) else picture.read_bytes()


def size(picture: bytes | Path) -> int:
    """Return the size of a picture in bytes; 0 if it cannot be read, which fails when it is read."""
    if isinstance(picture, bytes):
        return len(picture)
    try:
        return picture.stat().st_size
    except OSError:
        return 0


def composed(id: str) -> str:
    """Return an id in Unicode's composed form (NFC), as the service stores it."""
    return unicodedata.normalize("NFC", id)
