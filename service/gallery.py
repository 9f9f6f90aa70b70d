"""Encoder + store: add pictures, find lookalikes. What HTTP, command line and page all call."""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from service import FloatArray, PixelArray, cores, metrics
from service.encoding.batcher import Batcher
from service.encoding.card import Card, read_card, suits
from service.encoding.encoder import Encoder
from service.encoding.images import decode, decode_pixels, thumbnail, to_pixels, tones
from service.errors import (
    InvalidQuery,
    InvalidRequest,
    InvalidStore,
    ItemNotFound,
    LookalikeError,
    NoEmbedding,
    NoStore,
    each,
    kept,
)
from service.queries import BegunQuery, ItemQuery, PictureQuery, Query, VectorQuery
from service.settings import Settings
from service.store import Hit, Item, NewItem
from service.store.catalog import Catalog, has_catalog, no_store
from service.store.embedded import EmbeddedStore, recorded_model
from service.store.filters import Filter

_SAMPLED_THUMBNAILS = 100
_FOLLOWED_AT_ONCE = 64
_SHOWN_BELOW = 10**7  # a longer number would repeat what a client sent
_MOST_DEPTH = 32  # of metadata; SQLite's own JSON functions end at 1000


@dataclass(frozen=True)
class ReadPicture:
    """A picture that was read and is not embedded yet: its bytes, pixels (S, S, 3) and thumbnail."""

    data: bytes
    pixels: PixelArray
    thumbnail: bytes


_Numbered = tuple[int, tuple[str, ReadPicture, dict[str, Any], str | None]]


class Gallery:
    """The searchable collection. Every method blocks and may be called from any thread."""

    def __init__(self, encoder: Encoder, store: EmbeddedStore | None, settings: Settings) -> None:
        self.encoder = encoder
        self.settings = settings
        self._store = store
        self._batcher = Batcher(encoder.lanes, encoder.max_batch)
        # One more than cores: while one waits for the interpreter, another decodes. Yet more would only cost memory.
        self._decoders = ThreadPoolExecutor(cores() + 1, "decode")
        self._notice: tuple[int, str | None] = (0, None)

    @property
    def card(self) -> Card:
        """The encoder's card."""
        return self.encoder.card

    @property
    def store(self) -> EmbeddedStore:
        """Where items live. Raises NoStore where the service runs without one."""
        if self._store is None:
            raise NoStore("this service runs without a store (--no-store): it embeds and keeps nothing")
        return self._store

    def read(self, data: bytes) -> ReadPicture:
        """Decode image bytes, on the caller's thread.

        Raises:
            EmptyPicture, UnsupportedFormat, TooLarge, UndecodablePicture.
        """
        picture = decode(data, self.card.preprocessing.side, self.settings.limits)
        small = thumbnail(data, picture, self.settings.limits)
        return ReadPicture(data, to_pixels(picture, self.card.preprocessing), small)

    def embed_soon(self, data: bytes | Callable[[], bytes]) -> Future[FloatArray]:
        """Begin to embed a picture; call from any thread, it does not block.

        Args:
            data: its bytes, or what gives them where that is work, too.

        Returns:
            Its embedding (D,) to come, or an error as of `read`, or NoEmbedding. Cancelled before its batch begins,
            nothing more is done for it.
        """
        future: Future[FloatArray] = Future()
        self._decoders.submit(self._decode, data, future)
        return future

    def _decode(self, data: bytes | Callable[[], bytes], future: Future[FloatArray]) -> None:
        if future.cancelled():
            return
        try:
            with metrics.decode_seconds.time():
                pixels = self.read_pixels(data if isinstance(data, bytes) else data())
        except Exception as error:  # it is the caller's, whatever it is
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
            return
        self._batcher.submit(pixels, future)

    def embed(self, images: Sequence[bytes]) -> FloatArray:
        """Return the embeddings (N, D) of image bytes. Raises as `read`; of several pictures it names every bad one."""
        return np.stack(each("picture", [self.embed_soon(image) for image in images], Future.result))

    def read_pixels(self, data: bytes) -> PixelArray:
        """Decode image bytes to pixels (S, S, 3) alone, on the caller's thread. Raises as `read`."""
        return decode_pixels(data, self.card.preprocessing, self.settings.limits)

    def add(self, id: str, data: bytes, metadata: dict[str, Any]) -> bool:
        """Add or replace one picture; True where it was new. Raises as `read`.

        The id is as check_id gives it, the metadata as check_metadata does.
        """
        return self.add_read([(id, self._decoders.submit(self.read, data).result(), metadata, None)])[0]

    def add_many(self, pictures: Sequence[tuple[str, bytes, dict[str, Any]]]) -> list[bool | LookalikeError]:
        """Add or replace pictures, (id, bytes, metadata) each; the good ones in one commit.

        Returns:
            For each whether its id was new, or why it is not in the store.
        """
        outcomes: dict[int, bool | LookalikeError] = {}
        read = []
        reading = [self._decoders.submit(self.read, data) for _, data, _ in pictures]
        for number, (id, _, metadata) in enumerate(pictures):
            try:
                read.append((number, (id, reading[number].result(), metadata, None)))
            except LookalikeError as error:
                outcomes[number] = kept(error)
        self._add_group(read, outcomes)
        return [outcomes[number] for number in range(len(pictures))]

    def _add_group(self, group: Sequence[_Numbered], outcomes: dict[int, bool | LookalikeError]) -> None:
        if not group:
            return
        try:
            added = self.add_read([picture for _, picture in group])
            outcomes |= zip((number for number, _ in group), added, strict=True)
        except LookalikeError as error:
            if isinstance(error, NoEmbedding) and len(group) > 1:  # one by one, so that it meets its own picture alone
                for one in group:
                    self._add_group([one], outcomes)
            else:
                outcomes |= dict.fromkeys((number for number, _ in group), kept(error))

    def add_read(self, pictures: Sequence[tuple[str, ReadPicture, dict[str, Any], str | None]]) -> list[bool]:
        """Embed and store pictures that were read, all in one commit: (id, picture, metadata, source) each.

        Raises:
            NoEmbedding: for one of them; none is stored.
        """
        embeddings = self._encode([picture.pixels for _, picture, _, _ in pictures])
        keep = self.settings.keep_originals
        return self.store.add(
            [
                NewItem(
                    id=id,
                    metadata=metadata,
                    source=source,
                    digest=hashlib.sha256(picture.data).hexdigest(),
                    variant=self.encoder.variant,
                    embedding=embedding,
                    thumbnail=picture.thumbnail,
                    original=picture.data if keep else None,
                )
                for (id, picture, metadata, source), embedding in zip(pictures, embeddings, strict=True)
            ]
        )

    def get(self, id: str) -> Item:
        """Return an item. Raises ItemNotFound."""
        item = self.store.get(id)
        if item is None:
            raise _no_item()
        return item

    def thumbnail(self, id: str) -> bytes:
        """Return an item's thumbnail, a WebP file. Raises ItemNotFound."""
        data = self.store.thumbnail(id)
        if data is None:
            self.get(id)
            raise ItemNotFound("this item came as an embedding, without a picture")
        return data

    def original(self, id: str) -> bytes:
        """Return the picture's own bytes. Raises ItemNotFound, also where they are not kept."""
        data = self.store.original(id)
        if data is None:
            self.get(id)
            raise ItemNotFound("the store does not keep this item's own bytes (keep_originals is off)")
        return data

    def change_metadata(self, id: str, patch: dict[str, Any]) -> Item:
        """Merge a patch into an item's metadata: a field that it gives as None goes, others are set (RFC 7396).

        Raises:
            ItemNotFound; InvalidRequest: what comes out is larger than metadata may be.
        """
        item = self.store.set_metadata(id, lambda metadata: self.check_metadata(_merged(metadata, patch)))
        if item is None:
            raise _no_item()
        return item

    def remove(self, id: str) -> None:
        """Remove an item. Raises ItemNotFound."""
        if not self.store.remove(id):
            raise _no_item()

    def find(
        self, queries: Sequence[Query], k: int, threshold: float = -1, where: Filter | None = None
    ) -> list[list[Hit]]:
        """Return for each query the k items most like it, best first. See `Search`, which does it in two steps."""
        return Search(self, queries).find(k, threshold, where)

    def check_id(self, id: str) -> str:
        """Return an id in Unicode's composed form (NFC). Raises InvalidRequest as the function check_id."""
        return check_id(id, self.settings.max_id_bytes)

    def check_metadata(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return metadata that can be kept.

        Raises:
            InvalidRequest: with NaN, infinity or half a character, nested too deep, or larger than max_metadata_bytes.
        """
        if _depth(metadata) > _MOST_DEPTH:
            raise InvalidRequest(f"metadata: expected at most {_MOST_DEPTH} levels of nesting")
        try:  # what could not be written back out is not taken in
            size = len(json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode())
        except ValueError as error:
            raise InvalidRequest("metadata: expected finite numbers and whole characters") from error
        if size > self.settings.max_metadata_bytes:
            raise InvalidRequest(f"metadata: expected at most {self.settings.max_metadata_bytes} bytes, got {size}")
        return metadata

    def notice(self) -> str | None:
        """Say so in one sentence where the encoder was trained on pictures unlike the gallery's, else None.

        Cost: up to 100 thumbnails, once for every doubling of the gallery.
        """
        size = self.store.count().bit_length()
        if size != self._notice[0]:
            self._notice = (size, suits(self.card, self._tones(), self.settings.store))
        return self._notice[1]

    def probe(self) -> None:
        """Take the canary through the encoder and to the index; raises where it does not come to what it was.

        It waits in no line: a service that has much to do is ready all the same.
        """
        embedding = self.encoder.probe()
        if self._store is not None:
            self._store.search(embedding[None], 1)

    def follow(self, earlier: Catalog, since: int, told: Callable[[int], object] = lambda _: None) -> int:
        """Take over what changed in an earlier generation of the store, its pictures embedded anew.

        Args:
            earlier: its catalog.
            since: the sequence number up to which all is here; −1 for nothing.
            told: gets the numbers of items looked at.

        Returns:
            The sequence number up to which all is here now. What is here already is passed over.

        Raises:
            InvalidStore: for some items there is neither a kept picture nor one with their digest where they came
                from; the others are taken over.
        """
        latest = earlier.sequence()
        for id in earlier.removed(since):
            if earlier.get(id) is None:
                self.store.remove(id)
        failed: list[str] = []
        last = 0
        while rows := earlier.changed_items(since, _FOLLOWED_AT_ONCE, last):
            last = rows[-1][0]
            fresh = []
            for _, item in rows:
                have = self.store.get(item.id)
                if have is None or have.digest != item.digest:
                    try:
                        fresh.append((item.id, self.read(_picture(earlier, item)), item.metadata, item.source))
                    except LookalikeError as error:
                        failed.append(f"{item.id}: {error}")
                elif have.metadata != item.metadata:
                    self.store.set_metadata(item.id, lambda _, new=item.metadata: new)  # type: ignore[misc]
            outcomes: dict[int, bool | LookalikeError] = {}
            self._add_group(list(enumerate(fresh)), outcomes)
            failed += [f"{fresh[n][0]}: {error}" for n, error in outcomes.items() if isinstance(error, LookalikeError)]
            told(len(rows))
        if failed:
            raise InvalidStore(f"{len(failed)} items cannot be embedded anew; {failed[0]}")
        return latest

    def catch_up(self) -> None:
        """Take over what changed in the earlier generation, if there is one, after this one was made of it.

        Raises:
            InvalidStore: as `follow`.
        """
        facts = self.store.facts()
        folder = self.settings.store / facts.get("earlier", "")
        if "earlier" not in facts or not has_catalog(folder):
            return
        earlier = Catalog(folder, None)
        try:
            since = int(facts["follows"])
            if earlier.sequence() > since:
                self.store.note("follows", str(self.follow(earlier, since)))
        finally:
            earlier.close()

    def close(self) -> None:
        """Finish what waits and let go of the store."""
        self._decoders.shutdown()
        self._batcher.close()
        if self._store is not None:
            self._store.close()

    def _encode(self, pixels: Sequence[PixelArray]) -> list[FloatArray]:
        futures: list[Future[FloatArray]] = [Future() for _ in pixels]
        for one, future in zip(pixels, futures, strict=True):
            self._batcher.submit(one, future)
        return [future.result() for future in futures]

    def _tones(self) -> list[float] | None:
        pixels = []
        for item in self.store.scan(_SAMPLED_THUMBNAILS)[0]:
            data = self.store.thumbnail(item.id)
            if data is not None:
                pixels.append(self.read_pixels(data))
        return tones(np.stack(pixels)) if pixels else None


class Search:
    """Queries on their way to their hits. A caller that must not block waits for `pending` before it calls `find`."""

    def __init__(self, gallery: Gallery, queries: Sequence[Query]) -> None:
        """Start to embed the pictures among the queries. Call it from any thread; it does not block.

        Args:
            gallery: where to search.
            queries: one or more, of any kind. An item is left out of its own hits.

        Raises:
            InvalidRequest: an id that no item can have.
        """
        self._gallery = gallery
        self._begun = each("query", queries, self._begin)

    @property
    def pending(self) -> list[Future[FloatArray]]:
        """The embeddings that the encoder computes."""
        return [query.embedding for query in self._begun if query.embedding is not None]

    def find(self, k: int, threshold: float = -1, where: Filter | None = None) -> list[list[Hit]]:
        """Return for each query the k items most like it, best first. Blocks until all embeddings are computed.

        Args:
            k: hits per query, 1 to max_k; for several queries 1 to max_k_of_many.
            threshold: smallest score of a hit, in [−1, 1].
            where: only items whose metadata matches this filter.

        Raises:
            InvalidQuery, ItemNotFound, and as `Gallery.read`. With several queries, the error names every bad one.
        """
        settings = self._gallery.settings
        most = settings.max_k if len(self._begun) == 1 else settings.max_k_of_many
        if not 1 <= k <= most:
            got = f", got {k}" if abs(k) < _SHOWN_BELOW else ""
            raise InvalidQuery(f"k: expected a whole number from 1 to {most}{got}")
        vectors = each("query", self._begun, lambda query: query.vector())
        # An item is its own best hit: one more is asked for, so that k are left without it.
        excludes = any(query.excluded_id is not None for query in self._begun)
        found = self._gallery.store.search(np.stack(vectors), k + excludes, where)
        return [
            [hit for hit in hits if hit.score >= threshold and hit.id != query.excluded_id][:k]
            for query, hits in zip(self._begun, found, strict=True)
        ]

    def _begin(self, query: Query) -> BegunQuery:
        match query:
            case PictureQuery():
                embedding = self._gallery.embed_soon(query.data)
                return BegunQuery(embedding.result, embedding)
            case VectorQuery():
                return BegunQuery(partial(query.unit, self._gallery.encoder.dimension))
            case ItemQuery():
                id = self._gallery.check_id(query.id)
                return BegunQuery(partial(self._stored_embedding, id), excluded_id=id)

    def _stored_embedding(self, id: str) -> FloatArray:
        embedding = self._gallery.store.embedding(id)
        if embedding is None:
            raise _no_item()
        return embedding


def open_gallery(settings: Settings) -> Gallery:
    """Open the encoder and the store that the settings name.

    Raises:
        InvalidModel, InvalidStore, StoreMismatch.
    """
    encoder = Encoder(read_card(find_model(settings)), settings.device, settings.variant)
    gallery = Gallery(encoder, None if settings.no_store else open_store(settings, encoder), settings)
    if not (settings.no_store or settings.read_only):
        try:
            gallery.catch_up()
        except BaseException:
            gallery.close()
            raise
    return gallery


def succeed(gallery: Gallery) -> Gallery:
    """Open the generation of a gallery's store that counts by now, with the encoder that made it.

    The given gallery still answers what was asked of it, and refuses changes; it is for the caller to close.

    Raises:
        InvalidModel, InvalidStore, StoreMismatch: then the given gallery goes on as it was.
    """
    settings = gallery.settings
    encoder = Encoder(
        read_card(find_model(settings.model_copy(update={"model": None}))), settings.device, settings.variant
    )
    following = Gallery(encoder, gallery.store.successor(encoder.card, encoder.dimension), settings)
    try:
        if not settings.read_only:
            following.catch_up()  # nearly all, while changes go on
            with gallery.store.retiring("the store was replaced by one of another encoder; try again"):
                following.catch_up()
    except BaseException:
        following.close()
        raise
    following.store.inherit(gallery.store)
    return following


def open_store(settings: Settings, encoder: Encoder) -> EmbeddedStore:
    """Open the store that the settings name. Raises InvalidStore, StoreMismatch."""
    return EmbeddedStore(
        settings.store,
        encoder.card,
        encoder.dimension,
        settings.read_only,
        exact_limit=settings.exact_limit,
        vector_type=settings.vector_type,
    )


def find_model(settings: Settings, source: str = "") -> Path:
    """Return the encoder's folder: the one that is named, else the store's own, else the default for a source.

    A store that came from another machine names a folder that is not here; whether the encoder we take
    instead is the right one, its fingerprint decides.

    Raises:
        InvalidModel, InvalidOutput: the default cannot be made.
        InvalidStore: damaged, or not there where it is only to be read.
    """
    if settings.model:
        return settings.model
    recorded = None if settings.no_store else recorded_model(settings.store)
    if recorded is None and settings.read_only and not settings.no_store:
        raise no_store(settings.store)
    if recorded is not None and recorded[0].is_dir():
        return recorded[0]
    # Here, not above: it takes onnx, whose import would cost every start most of a second.
    from service.encoding.pretrained import default_encoder, of_digits

    return default_encoder(of_digits(source) if recorded is None else recorded[1] == "mnist")


def check_id(id: str, most_bytes: int) -> str:
    """Return an id in Unicode's composed form (NFC).

    Raises:
        InvalidRequest: empty, too long in UTF-8, with control characters, or ending like a route of its own.
    """
    id = unicodedata.normalize("NFC", id)
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in id):
        raise InvalidRequest("id: expected text without control characters")
    if not 1 <= len(id.encode()) <= most_bytes:
        raise InvalidRequest(f"id: expected 1 to {most_bytes} bytes, got {len(id.encode())}")
    if id.endswith(("/thumbnail", "/content")):
        raise InvalidRequest("id: must not end in /thumbnail or /content, which name an item's pictures")
    return id


def _picture(catalog: Catalog, item: Item) -> bytes:
    """The bytes of an item's picture, as they were kept or from where they came. Raises ItemNotFound."""
    data = catalog.original(item.id)
    if data is not None:
        return data
    try:
        data = Path(item.source or "").read_bytes()
    except OSError:
        raise ItemNotFound(f"its picture was not kept and cannot be read from {item.source}") from None
    if hashlib.sha256(data).hexdigest() != item.digest:
        raise ItemNotFound(f"its picture was not kept, and {item.source} has another by now")
    return data


def _merged(target: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    merged = dict(target)
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict):
            old = merged.get(name)
            merged[name] = _merged(old if isinstance(old, dict) else {}, value)
        else:
            merged[name] = value
    return merged


def _depth(content: Any) -> int:
    """Levels of nesting, counted level by level: recursion would end where the client wants."""
    depth, level = 0, [content]
    while level := [inside for inside in level if isinstance(inside, dict | list)]:
        depth += 1
        level = [one for inside in level for one in (inside.values() if isinstance(inside, dict) else inside)]
    return depth


def _no_item() -> ItemNotFound:
    return ItemNotFound("no item has this id")
