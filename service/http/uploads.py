"""Many pictures in one request → a line of JSON for each, once it is stored or refused."""

import hashlib
import io
import json
import zipfile
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from service.errors import InvalidRequest, LookalikeError, Outcome, TooLarge, UnsupportedFormat, attempt, map_values
from service.gallery import Gallery
from service.http import logs
from service.http.bodies import Form, from_base64, parse_json_object
from service.http.schemas import NewItemBody
from service.http.slots import Slots
from service.items import NewPicture
from service.originals import mtime_of_same
from service.rows import item_of_row
from service.settings import Settings
from service.sources.kinds import holds_none
from service.sources.paths import compose
from service.sources.source import LeftOut
from service.sources.zip import judged, member_paths
from service.store import NewItem

METADATA = "metadata.json"
# Fields of a form.
METADATA_FIELD, SOURCES_FIELD = "metadata", "sources"
_LONGEST_SOURCE = 4096
# Pictures per commit, which are embedded together, and embeddings per commit.
_TOGETHER, _ROWS_TOGETHER = 32, 1024
_MOST_BYTES_TOGETHER = 32_000_000
# A zip may unpack to so many times the limit of a request. Pictures hardly shrink in a zip.
_MOST_UNPACKED = 10


class Candidate(NamedTuple):
    """A picture that may go into the store.

    Attributes:
        id: as the client gave it.
        data: the bytes of the image file, or the error that replaced them.
        metadata: (its metadata,); () if the client gave none.
        source: where it came from, if the client says.
    """

    id: str
    data: Outcome[bytes]
    metadata: tuple[Any, ...]
    source: str | None = None


class Archive:
    """The pictures of a zip file in memory, unpacked one at a time."""

    def __init__(self, content: bytes, settings: Settings) -> None:
        """Read the zip's directory.

        Raises:
            InvalidRequest: not a zip, no picture in it, or a metadata.json that is not an object by id.
            TooLarge: too many members, or too large a sum of their declared sizes.
        """
        self._most = settings.max_image_bytes
        # Each member has a header with this mark. Counting marks is cheap; zipfile would create an object per member.
        if content.count(b"PK\x01\x02") > 2 * settings.max_bulk_images:
            raise TooLarge(f"expected a zip of at most {settings.max_bulk_images} pictures")
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(content))
        # A damaged directory makes zipfile raise nearly any exception.
        except Exception as error:
            raise InvalidRequest("the body: not a zip file that can be read") from error
        self._members: list[tuple[str, zipfile.ZipInfo]] = []
        self._left_out: list[LeftOut] = []
        for path, member, left_out in judged(self._zip, METADATA):
            if left_out is None:
                self._members.append((compose(path), member))
            else:
                self._left_out.append(left_out)
        if not self._members:
            raise InvalidRequest(str(holds_none("the body", self._left_out)))
        if len(self._members) > settings.max_bulk_images:
            raise TooLarge(f"expected at most {settings.max_bulk_images} pictures, got {len(self._members)}")
        if sum(member.file_size for _, member in self._members) > _MOST_UNPACKED * settings.max_request_bytes:
            raise TooLarge(f"the zip unpacks to more than {_MOST_UNPACKED * settings.max_request_bytes} bytes")
        self._metadata: dict[str, Any] = {}
        for path, member in member_paths(self._zip.infolist()):
            if path == METADATA:
                text = self._unpack(member, settings.max_request_bytes).decode(errors="replace")
                self._metadata = by_id(text, {id for id, _ in self._members}, METADATA_FIELD)

    @property
    def sizes(self) -> list[int]:
        """The declared size of each picture in bytes. zipfile never unpacks more than that."""
        return [member.file_size for _, member in self._members]

    @property
    def left_out(self) -> Sequence[LeftOut]:
        """What the zip holds beside the pictures."""
        return self._left_out

    def read(self, start: int, stop: int) -> list[Candidate]:
        """Unpack the pictures from `start` up to `stop`."""
        return [
            Candidate(id, attempt(self._unpack, member, self._most), _find(self._metadata, id))
            for id, member in self._members[start:stop]
        ]

    def _unpack(self, member: zipfile.ZipInfo, most: int) -> bytes:
        if member.flag_bits & 1:
            raise UnsupportedFormat("the zip's member is encrypted")
        # zipfile reads other methods without a bound on memory.
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UnsupportedFormat("the zip's member is packed in a way that is not taken; expected deflate or none")
        try:
            with self._zip.open(member) as file:
                data = file.read(most + 1)
        # zlib, struct and zipfile each raise their own exceptions.
        except Exception as error:
            raise InvalidRequest("the zip's member is damaged") from error
        if len(data) > most:
            raise TooLarge(f"the zip's member has more than {most} bytes, which is the limit")
        return data


class Uploads:
    """The pictures of a form; the name of a file is its id."""

    def __init__(self, form: Form) -> None:
        self._files = [(compose(name), data) for name, data in form.files]
        metadata = form.texts.get(METADATA_FIELD, "{}")
        ids = {name for name, _ in self._files}
        self._metadata = by_id(metadata, ids, METADATA_FIELD)
        self._sources = by_id(form.texts.get(SOURCES_FIELD, "{}"), ids, SOURCES_FIELD)
        if not all(isinstance(source, str) and len(source) <= _LONGEST_SOURCE for source in self._sources.values()):
            raise InvalidRequest(f"sources: expected texts of at most {_LONGEST_SOURCE} characters by id")

    @property
    def sizes(self) -> list[int]:
        """The size of each picture in bytes."""
        return [len(data) for _, data in self._files]

    @property
    def left_out(self) -> Sequence[LeftOut]:
        """Nothing: each file of a form is one that its sender chose."""
        return ()

    def read(self, start: int, stop: int) -> list[Candidate]:
        """Return the pictures from `start` up to `stop`."""
        return [
            Candidate(name, data, _find(self._metadata, name), self._sources.get(name))
            for name, data in self._files[start:stop]
        ]


class Rows:
    """Items with their embeddings, as JSON."""

    def __init__(self, rows: Sequence[NewItemBody], settings: Settings) -> None:
        """Take the items. Raises TooLarge for more than max_bulk_images."""
        if len(rows) > settings.max_bulk_images:
            raise TooLarge(f"expected at most {settings.max_bulk_images} items, got {len(rows)}")
        self._rows, self._most = rows, settings.max_image_bytes

    @property
    def sizes(self) -> list[int]:
        """The characters of each item's pictures."""
        return [len(row.thumbnail or "") + len(row.original or "") for row in self._rows]

    @property
    def left_out(self) -> Sequence[LeftOut]:
        """Nothing: each item is one that its sender chose."""
        return ()

    def add(self, gallery: Gallery, group: range) -> list[dict[str, Any]]:
        """Add the items of a group in one commit, and return the lines about them."""
        outcomes = [attempt(self._item, self._rows[number], gallery) for number in group]
        shown = [None if isinstance(one, LookalikeError) else one.id for one in outcomes]

        def store(items: list[NewItem]) -> list[Outcome[bool]]:
            stored = attempt(gallery.store.add, items)
            return [stored] * len(items) if isinstance(stored, LookalikeError) else [*stored]

        return [
            _failure(id, one) if isinstance(one, LookalikeError) else {"id": id, "status": 201 if one else 200}
            for id, one in zip(shown, map_values(outcomes, store), strict=True)
        ]

    def _item(self, body: NewItemBody, gallery: Gallery) -> NewItem:
        row = body.model_dump()
        for name in ("thumbnail", "original"):
            if row[name] is not None:
                row[name] = from_base64(row[name], self._most)
        row |= row.pop("file") or {}
        if row["original"] is not None:
            row["digest"] = hashlib.sha256(row["original"]).hexdigest()
            changed = None if row["source"] is None else mtime_of_same(row["source"], row["original"])
            if changed is not None and not gallery.keeps_all_originals:
                # As for the form's `sources`.
                row["original"], row["mtime_ns"] = None, changed
        if isinstance(row["embedding"], str):
            data = from_base64(row["embedding"], self._most)
            if len(data) != 4 * gallery.encoder.dimension:
                raise InvalidRequest(f"embedding: expected {gallery.encoder.dimension} numbers of 4 bytes")
            row["embedding"] = np.frombuffer(data, "<f4")
        return item_of_row(row, gallery)


def by_id(text: str, ids: set[str], what: str) -> dict[str, Any]:
    """Parse {id: …}; ids are composed. Raises InvalidRequest, also for an id without a picture."""
    found = {compose(id): value for id, value in parse_json_object(text, what).items()}
    if not found.keys() <= ids:
        raise InvalidRequest(f"{what}: expected an object of {what} by id, with no id that has no picture")
    return found


def _find(metadata: dict[str, Any], id: str) -> tuple[Any, ...]:
    """Return a picture's metadata as Candidate holds them."""
    return (metadata[id],) if id in metadata else ()


async def add_all(pictures: Archive | Uploads | Rows, gallery: Gallery, slots: Slots) -> AsyncIterator[str]:
    """Add pictures to the gallery. Yield a line of JSON for each, once it is stored durably or refused.

    Lines about what was left out follow: status 415 for what may be a picture, 204 for other files.
    """
    for group in _groups(pictures.sizes, _ROWS_TOGETHER if isinstance(pictures, Rows) else _TOGETHER):
        try:
            lines = await slots.run(partial(_add, gallery, pictures, group))
        # No free slot, no time left, or a store that cannot be written.
        except LookalikeError as error:
            lines = [_failure(None, error)] * len(group)
        # The status 200 is sent already, so only the lines can report the failure.
        except Exception as error:
            logs.access.exception("failed", exc_info=error)
            lines = [_failure(None, LookalikeError("the service failed"))] * len(group)
        for number, line in zip(group, lines, strict=True):
            yield json.dumps({"index": number} | line) + "\n"
    for number, (name, reason, lost) in enumerate(pictures.left_out, len(pictures.sizes)):
        line = {"id": compose(name), "status": 415 if lost else 204, "code": "left_out", "detail": reason}
        yield json.dumps({"index": number} | line) + "\n"


def _groups(sizes: Sequence[int], together: int = _TOGETHER) -> Iterator[range]:
    """Yield the ranges of pictures to add together, bounded in number and in bytes: a range is unpacked at once."""
    start, total = 0, 0
    for number, size in enumerate(sizes):
        if number > start and (number - start == together or total + size > _MOST_BYTES_TOGETHER):
            yield range(start, number)
            start, total = number, 0
        total += size
    yield range(start, len(sizes))


def _add(gallery: Gallery, pictures: Archive | Uploads | Rows, group: range) -> list[dict[str, Any]]:
    if isinstance(pictures, Rows):
        return pictures.add(gallery, group)
    candidates = pictures.read(group.start, group.stop)
    lines: dict[int, dict[str, Any]] = {}
    good = []
    for number, (id, data, metadata, source) in enumerate(candidates):
        checked = None
        try:
            checked = gallery.check_id(id)
            if isinstance(data, LookalikeError):
                raise data
            own = metadata[0] if metadata else {}
            if not isinstance(own, dict):
                raise InvalidRequest("metadata: expected a JSON object")
            mtime_ns = None if source is None else mtime_of_same(source, data)
            keep_original = mtime_ns is None or gallery.keeps_all_originals
            own = gallery.check_metadata(own)
            picture = NewPicture(checked, data, own, source, not metadata, keep_original, mtime_ns)
            good.append((number, picture))
        except LookalikeError as error:
            lines[number] = _failure(checked, error)
    outcomes = gallery.add_many([picture for _, picture in good])
    for (number, picture), outcome in zip(good, outcomes, strict=True):
        if isinstance(outcome, LookalikeError):
            lines[number] = _failure(picture.id, outcome)
        else:
            lines[number] = {"id": picture.id, "status": 201 if outcome else 200}
    return [lines[number] for number in range(len(candidates))]


def _failure(id: str | None, error: LookalikeError) -> dict[str, Any]:
    return {"id": id, "status": error.status, "code": error.code, "detail": str(error)}
