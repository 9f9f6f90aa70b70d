"""A row of a table as an item: what `store import` reads from Parquet, and POST /images from JSON."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from service.errors import InvalidRequest
from service.file_facts import FileFacts
from service.store import NewItem

# Characters of a format and of a date, at most.
_LONGEST = 32
# The length of a unit vector in float32 is so near to 1.
_ROUNDING = 1e-6


class Rules(Protocol):
    """What an item has to keep to; a Gallery is one."""

    @property
    def dimension(self) -> int:
        """D of an embedding."""
        ...

    def check_id(self, id: str) -> str:
        """Return an id in composed form. Raises InvalidRequest."""
        ...

    def check_metadata(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return metadata unchanged. Raises InvalidRequest."""
        ...


def item_of_row(row: Mapping[str, Any], rules: Rules) -> NewItem:
    """Return a row as an item for a store.

    Args:
        row: `id`, a text or a whole number, and `embedding`, D numbers of any length but 0. It may have `metadata`, an
            object or its text, or else `label`, which becomes the metadata; and `source`, `digest`, `variant`,
            `thumbnail` and `original` as NewItem has them; `width`, `height`, `size_bytes`, `format`, `date` and
            `mtime_ns` of the picture's file.
        rules: of the store that gets it.

    Raises:
        InvalidRequest: an id, an embedding or metadata that cannot be.
    """
    id, dimension = row["id"], rules.dimension
    # pandas turns whole numbers into floats where one is missing.
    if isinstance(id, float) and id.is_integer():
        id = int(id)
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise InvalidRequest(f"id: expected text or a whole number, got {'null' if id is None else type(id).__name__}")
    try:
        vector = np.asarray(row["embedding"], np.float64)
        length = np.linalg.norm(vector)
        given = row.get("metadata") or {}
        metadata = json.loads(given) if isinstance(given, str) else given
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the row cannot be read: {error}") from error
    if vector.shape != (dimension,) or not np.isfinite(length) or not length:
        raise InvalidRequest(f"embedding: expected {dimension} finite numbers, not all 0")
    if not isinstance(metadata, dict):
        raise InvalidRequest("metadata: expected the text of a JSON object")
    if row.get("metadata") in (None, "") and row.get("label") is not None:
        metadata = {"label": str(row["label"])}
    # A unit vector of float32 stays as it is to the last bit, so an item can be put back exactly.
    embedding = np.asarray(vector if abs(length - 1) < _ROUNDING else vector / length, np.float32)
    return NewItem(
        id=rules.check_id(str(id)),
        metadata=rules.check_metadata(metadata),
        source=row.get("source"),
        # The digest of `embed` is of a picture that the store does not get, and `index` may add that picture later.
        digest=(row.get("digest") if "thumbnail" in row else None) or hashlib.sha256(embedding.tobytes()).hexdigest(),
        variant=row.get("variant") or "fp32",
        embedding=embedding,
        thumbnail=row.get("thumbnail") or b"",
        original=row.get("original"),
        keep_metadata=row.get("metadata") in (None, ""),
        facts=_facts(row),
        mtime_ns=_whole(row.get("mtime_ns"), -(2**63)),
    )


def _facts(row: Mapping[str, Any]) -> FileFacts:
    """Return what a row tells of the picture's file. A column of another type is a table's own, and no fact."""
    width, height, size_bytes = (_whole(row.get(name)) for name in ("width", "height", "size_bytes"))
    return FileFacts(width, height, size_bytes, _short(row.get("format")), _short(row.get("date")))


def _short(value: object) -> str | None:
    return value if isinstance(value, str) and len(value) <= _LONGEST else None


def _whole(value: object, least: int = 0) -> int | None:
    # pandas turns whole numbers into floats where one is missing.
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 2**63:
        return None
    return int(value) if float(value).is_integer() else None
