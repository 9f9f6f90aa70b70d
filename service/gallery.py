"""Encoder + store: add pictures, find lookalikes. HTTP, the command line and the page all call it."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from service import FloatArray, PixelArray, cores, items, metrics
from service.encoder_choice import find_model, recorded_model
from service.encoding.batcher import Batcher
from service.encoding.card import Card, read_card, suits
from service.encoding.encoder import Encoder
from service.encoding.images import decode, decode_pixels, preview, thumbnail, to_pixels, tones
from service.encoding.limits import OWN_FILES
from service.encoding.text import TextEncoder, check_text, open_text_tower
from service.errors import (
    InvalidQuery,
    InvalidStore,
    ItemNotFound,
    LookalikeError,
    NoStore,
    NoTextTower,
    Outcome,
    attempt,
    each,
    map_values,
)
from service.file_facts import FileFacts
from service.generations import catch_up, replaced, switch, take_up
from service.items import NewPicture
from service.kept_choice import keep_choice, open_encoder
from service.originals import read_source
from service.previews import PreviewCache
from service.queries import (
    BegunQuery,
    ItemQuery,
    PictureQuery,
    Query,
    SumQuery,
    TextQuery,
    VectorQuery,
    begin_sum,
    unit_vectors,
)
from service.settings import Settings
from service.store import Hit, Item, NewItem, Store
from service.store.embedded import EmbeddedStore
from service.store.filters import Filter
from service.store.layout import current
from service.store.milvus_address import parse_address

_SAMPLED_THUMBNAILS = 100
# In the store's folder.
_PREVIEWS = "previews"
# A message must not repeat a client's text, and a longer number could carry one.
_SHOWN_BELOW = 10**7


@dataclass(frozen=True)
class ReadPicture:
    """A decoded picture, ready to be embedded.

    Attributes:
        data: the bytes of the image file.
        pixels: (S, S, 3) uint8.
        thumbnail: a small WebP file.
        facts: about the file.
        mtime_ns: when it was changed last; None if that is unknown.
    """

    data: bytes
    pixels: PixelArray
    thumbnail: bytes
    facts: FileFacts
    mtime_ns: int | None


class Gallery:
    """The searchable collection: one encoder and the items that it embedded, in one store.

    Every method blocks unless it says otherwise, and may be called from any thread.

    Attributes:
        encoder: embeds pictures.
        card: facts about the encoder.
        settings: limits on pictures, items and queries.
    """

    def __init__(self, encoder: Encoder, store: Store | None, settings: Settings) -> None:
        """Start the threads that decode and embed.

        Args:
            encoder: embeds pictures.
            store: holds the items; None for a service that only embeds. The gallery closes it.
            settings: limits on pictures, items and queries.

        Raises:
            InvalidModel: the encoder's text tower cannot be opened, or is of another dimension.
        """
        self.encoder = encoder
        self.card = encoder.card
        try:
            tower = open_text_tower(encoder.card, encoder.dimension)
        except BaseException:
            if store is not None:
                store.close()
            raise
        self._texts = None if tower is None else TextEncoder(tower)
        self.settings = settings
        self._store = store
        self._batcher = Batcher(encoder.lanes, encoder.max_batch)
        # One more than cores: while one thread waits for the GIL, another decodes. More only cost memory.
        self._decoders = ThreadPoolExecutor(cores() + 1, "decode")
        self._notice: tuple[int, str | None] = (0, None)
        most = 0 if store is None or settings.read_only else settings.preview_cache_bytes
        self._previews = PreviewCache(settings.folder / _PREVIEWS, most) if most else None

    @property
    def store(self) -> Store:
        """The store. Raises NoStore in a service that runs without one."""
        if self._store is None:
            raise NoStore("this service runs without a store (--no-store): it embeds and keeps nothing")
        return self._store

    @property
    def dimension(self) -> int:
        """D of an embedding."""
        return self.encoder.dimension

    @property
    def reads_texts(self) -> bool:
        """Whether the encoder has a text tower."""
        return self._texts is not None

    @property
    def texts(self) -> TextEncoder:
        """What embeds texts. Raises NoTextTower if the encoder reads pictures alone."""
        if self._texts is None:
            raise NoTextTower(
                f"the encoder {self.card.name} reads no texts; `lookalike import hf:Xenova/clip-vit-base-patch32 "
                "--out models/clip` brings one that does, and `lookalike reindex` gives it to a store"
            )
        return self._texts

    @property
    def keeps_all_originals(self) -> bool:
        """Whether the store is to keep the bytes of pictures that are files of this machine, too."""
        return self.settings.keep_originals and "keep_originals" in self.settings.model_fields_set

    def read(self, data: bytes, mtime_ns: int | None = None) -> ReadPicture:
        """Decode the bytes of an image file, on the caller's thread.

        Args:
            data: the bytes.
            mtime_ns: when the file was changed last; None if that is unknown.

        Raises:
            EmptyPicture, UnsupportedFormat, TooLarge, UndecodablePicture.
        """
        picture = decode(data, self.card.preprocessing.decoded_side, self.settings.limits)
        small = thumbnail(data, picture, self.settings.limits)
        facts = FileFacts.of_data(data, mtime_ns)
        return ReadPicture(data, to_pixels(picture, self.card.preprocessing), small, facts, mtime_ns)

    def embed_soon(self, data: bytes | Callable[[], bytes]) -> Future[FloatArray]:
        """Begin to embed a picture, without blocking.

        Args:
            data: the bytes of an image file, or a function that returns them and is called on a decoding thread.

        Returns:
            A future of the embedding (D,). Its errors are those of `read` and NoEmbedding. A future that is cancelled
            before its batch begins costs no more work.
        """
        future: Future[FloatArray] = Future()

        def decode_and_submit() -> None:
            if future.cancelled():
                return
            try:
                with metrics.decode_seconds.time():
                    image = data if isinstance(data, bytes) else data()
                    pixels = decode_pixels(image, self.card.preprocessing, self.settings.limits)
            # Any error belongs to the caller, who waits on the future.
            except Exception as error:
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
                return
            self._batcher.submit(pixels, future)

        self._decoders.submit(decode_and_submit)
        return future

    def embed_text_soon(self, text: str) -> Future[FloatArray]:
        """Begin to embed a text, without blocking.

        Returns:
            A future as `TextEncoder.embed_soon` gives it.

        Raises:
            NoTextTower: the encoder reads pictures alone.
            InvalidRequest, TooLarge: as `check_text`.
        """
        return self.texts.embed_soon(check_text(text, self.settings.max_text_characters))

    def add(self, id: str, data: bytes, metadata: dict[str, Any] | None) -> bool:
        """Add or replace one picture, and return whether its id was new. Durable when it returns.

        Args:
            id: as `check_id` returns it.
            data: the bytes of an image file.
            metadata: as `check_metadata` returns it; None keeps the metadata of an item that is replaced.

        Raises:
            InvalidStore: the store cannot be written. Other errors as `embed_soon`.
        """
        outcome = self.add_many([NewPicture(id, data, metadata or {}, keep_metadata=metadata is None)])[0]
        if isinstance(outcome, LookalikeError):
            raise outcome
        return outcome

    def add_many(self, pictures: Sequence[NewPicture[bytes]]) -> list[Outcome[bool]]:
        """Decode and embed pictures, and add or replace the good ones in one commit. Durable when it returns.

        Returns:
            For each picture whether its id was new, or the error that kept it out of the store: as `embed_soon` for a
            picture of its own, InvalidStore for all of them.
        """
        reading = [self._decoders.submit(self.read, one.picture, one.mtime_ns) for one in pictures]

        def read(one: NewPicture[bytes], picture: Future[ReadPicture]) -> NewPicture[ReadPicture]:
            fields = (one.metadata, one.source, one.keep_metadata, one.keep_original)
            return NewPicture(one.id, picture.result(), *fields)

        def store(items: list[NewItem]) -> list[Outcome[bool]]:
            stored = attempt(self.store.add, items)
            return [stored] * len(items) if isinstance(stored, LookalikeError) else [*stored]

        outcomes = [attempt(read, one, picture) for one, picture in zip(pictures, reading, strict=True)]
        return map_values(map_values(outcomes, self.embed_read), store)

    def embed_read(self, pictures: Sequence[NewPicture[ReadPicture]]) -> list[Outcome[NewItem]]:
        """Embed pictures.

        Returns:
            For each picture the item to store, or NoEmbedding, OutOfMemory or InvalidModel.
        """
        embeddings = self._batcher.embed([one.picture.pixels for one in pictures])
        return [
            embedding
            if isinstance(embedding, LookalikeError)
            else NewItem(
                id=one.id,
                metadata=one.metadata,
                source=one.source,
                digest=hashlib.sha256(one.picture.data).hexdigest(),
                variant=self.encoder.variant,
                embedding=embedding,
                thumbnail=one.picture.thumbnail,
                original=one.picture.data if one.keep_original and self.settings.keep_originals else None,
                keep_metadata=one.keep_metadata,
                facts=one.picture.facts,
                mtime_ns=one.picture.mtime_ns,
            )
            for one, embedding in zip(pictures, embeddings, strict=True)
        ]

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
        """Return the bytes of an item's image file, as the store keeps them or from where the picture came.

        Raises:
            ItemNotFound: no item has this id, or its bytes were not kept and are not where it came from.
        """
        data = self.store.original(id)
        return read_source(self.get(id)) if data is None else data

    def preview(self, id: str, side: int) -> bytes:
        """Return an item's picture as a WebP file whose long side is at most `side`. A smaller one keeps its size.

        Raises:
            ItemNotFound: as `original`, or its picture cannot be decoded.

        Cost: decodes the picture, unless its preview was kept.
        """
        digest = self.get(id).digest
        kept = None if self._previews is None else self._previews.get(digest, side)
        if kept is not None:
            return kept
        data, limits = self.store.original(id), self.settings.limits
        if data is None:
            data = read_source(self.get(id))
            # A file of this machine was indexed by other limits than those for strangers.
            limits = replace(OWN_FILES, max_decode_s=self.settings.work_timeout_s)
        try:
            made = preview(data, side, limits)
        except LookalikeError as error:
            raise ItemNotFound(f"there is no preview of this item: {error}") from error
        # The item may have another picture by now, and an import may have brought another digest.
        if self._previews is not None and hashlib.sha256(data).hexdigest() == digest:
            self._previews.put(digest, side, made)
        return made

    def change_metadata(self, id: str, patch: dict[str, Any]) -> Item:
        """Apply a merge patch to an item's metadata (see items.merge_patch) and return the item.

        Raises:
            ItemNotFound: no item has this id.
            InvalidRequest: the result is not valid metadata.
        """
        item = self.store.set_metadata(id, lambda metadata: self.check_metadata(items.merge_patch(metadata, patch)))
        if item is None:
            raise _no_item()
        return item

    def remove(self, id: str) -> None:
        """Remove an item. Raises ItemNotFound."""
        if not self.store.remove(id):
            raise _no_item()

    def tell_apart(self, ids: Sequence[str], apart: bool = True) -> int:
        """Remember that no two of these items are duplicates, or forget it; return the number of their pairs.

        It holds for their pictures as they are now, by their digests. An id that is given twice counts once.

        Raises:
            ItemNotFound: no item has an id.
            InvalidRequest: an id that no item can have.
        """
        found = {item.id: item for item in each("id", ids, lambda id: self.get(self.check_id(id)))}
        pairs = [(one.digest, other.digest) for one, other in combinations(found.values(), 2)]
        self.store.dismiss(pairs, apart)
        return len(pairs)

    def find(
        self, queries: Sequence[Query], k: int, threshold: float = -1, where: Filter | None = None
    ) -> list[list[Hit]]:
        """Return for each query the k items most like it, best first. See `Search`, which does it in two steps."""
        return Search(self, queries).find(k, threshold, where)

    def check_id(self, id: str) -> str:
        """Return an id in Unicode's composed form (NFC). Raises InvalidRequest as `items.check_id`."""
        return items.check_id(id, self.settings.max_id_bytes)

    def check_metadata(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return the metadata unchanged. Raises InvalidRequest as `items.check_metadata`."""
        return items.check_metadata(metadata, self.settings.max_metadata_bytes)

    def notice(self) -> str | None:
        """Return a sentence if the encoder was trained on pictures unlike the gallery's, else None.

        Cost: decodes up to 100 thumbnails, once each time the gallery has doubled.
        """
        size = self.store.count().bit_length()
        if size != self._notice[0]:
            preprocessing, limits = self.card.preprocessing, self.settings.limits
            sampled = [self.store.thumbnail(item.id) for item in self.store.page(_SAMPLED_THUMBNAILS, order="id")[0]]
            pixels = [decode_pixels(data, preprocessing, limits) for data in sampled if data is not None]
            tone = tones(np.stack(pixels)) if pixels else None
            self._notice = (size, suits(self.card, tone, self.settings.store))
        return self._notice[1]

    def probe(self) -> None:
        """Embed the canary picture and search for it, to check encoder and store together; embed the canary text, too.

        It bypasses the batcher's queue, so a busy service is still ready.

        Raises:
            InvalidModel: an embedding differs from the known one.
            InvalidStore: the store cannot be searched.
        """
        embedding = self.encoder.probe()
        if self._texts is not None:
            self._texts.tower.probe()
        if self._store is not None:
            self._store.search(embedding[None], 1)

    def close(self) -> None:
        """Finish the pictures and texts that wait, end the threads and close the store."""
        self._decoders.shutdown()
        self._batcher.close()
        if self._texts is not None:
            self._texts.close()
        if self._store is not None:
            self._store.close()


class Search:
    """Queries on their way to their hits. A caller that must not block waits for `pending` before it calls `find`."""

    def __init__(self, gallery: Gallery, queries: Sequence[Query]) -> None:
        """Start to embed the pictures and texts among the queries. Call it from any thread; it does not block.

        Args:
            gallery: where to search.
            queries: one or more, of any kind. An item is left out of its own hits, and of those of a sum.

        Raises:
            InvalidRequest: an id that no item can have, or a text that cannot be embedded.
            NoTextTower, TooLarge: as `Gallery.embed_text_soon`.
        """
        self._gallery = gallery
        self._count = len(queries)
        self._vectors = unit_vectors(queries, gallery.encoder.dimension)
        self._begun = [] if self._vectors is not None else each("query", queries, self._begin)

    @property
    def pending(self) -> list[Future[FloatArray]]:
        """The embeddings that the encoder computes."""
        return [embedding for query in self._begun for embedding in query.embeddings]

    @property
    def quick(self) -> bool:
        """Whether `find` without a filter takes about a millisecond, and waits for nothing."""
        store = self._gallery.store
        return self._vectors is not None and self._count == 1 and isinstance(store, EmbeddedStore) and store.quick

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
        most = settings.max_k if self._count == 1 else settings.max_k_of_many
        if not 1 <= k <= most:
            got = f", got {k}" if abs(k) < _SHOWN_BELOW else ""
            raise InvalidQuery(f"k: expected a whole number from 1 to {most}{got}")
        vectors = self._vectors
        if vectors is None:
            vectors = np.stack(each("query", self._begun, lambda query: query.vector()))
        excluded = [query.excluded_ids for query in self._begun] or [frozenset[str]()] * self._count
        # An item is its own best hit: one more is asked for, so that k are left without it.
        found = self._gallery.store.search(vectors, k + max(map(len, excluded)), where)
        return [
            [hit for hit in hits if hit.score >= threshold and hit.id not in ids][:k]
            for ids, hits in zip(excluded, found, strict=True)
        ]

    def _begin(self, query: Query) -> BegunQuery:
        match query:
            case PictureQuery():
                embedding = self._gallery.embed_soon(query.data)
                return BegunQuery(embedding.result, (embedding,))
            case TextQuery():
                embedding = self._gallery.embed_text_soon(query.text)
                return BegunQuery(embedding.result, (embedding,))
            case VectorQuery():
                return BegunQuery(partial(query.unit, self._gallery.encoder.dimension))
            case ItemQuery():
                id = self._gallery.check_id(query.id)
                return BegunQuery(partial(self._stored_embedding, id), excluded_ids=frozenset([id]))
            case SumQuery():
                return begin_sum([self._begin(part) for part, _ in query.parts], [weight for _, weight in query.parts])

    def _stored_embedding(self, id: str) -> FloatArray:
        embedding = self._gallery.store.embedding(id)
        if embedding is None:
            raise _no_item()
        return embedding


def follow_reindex(settings: Settings) -> tuple[Settings, str]:
    """Return settings without their encoder if a reindex has replaced it in their store, and a warning, or "".

    A service that is started by a fixed command line so goes on after a reindex.

    Raises:
        InvalidModel, InvalidStore: the encoder or the store cannot be read.
    """
    # A store on Milvus has no generations.
    if settings.no_store or settings.model is None or parse_address(settings.store) is not None:
        return settings, ""
    recorded = recorded_model(settings)
    if recorded is None:
        return settings, ""
    if read_card(settings.model).fingerprint not in replaced(settings.store):
        return settings, ""
    return settings.model_copy(update={"model": None}), (
        f"{settings.store}: a reindex has replaced the encoder {settings.model} by {recorded[0]}, which is served; "
        f"name that one with --model or LOOKALIKE_MODEL, or none"
    )


def superseded(gallery: Gallery) -> bool:
    """Return whether another generation of a gallery's store is current than the one that is open."""
    store = gallery.store
    return isinstance(store, EmbeddedStore) and current(gallery.settings.store) != store.folder


def open_gallery(settings: Settings) -> Gallery:
    """Open the encoder and the store that the settings name.

    A store that was built from an earlier generation catches up with it first.

    Raises:
        InvalidModel, InvalidStore, StoreMismatch.
    """
    encoder = open_encoder(settings, read_card(find_model(settings)))
    store = None if settings.no_store else open_store(settings, encoder.card, encoder.dimension)
    keep_choice(settings, encoder)
    encoder.drop_files()
    gallery = Gallery(encoder, store, settings)
    if isinstance(store, EmbeddedStore) and not settings.read_only:
        try:
            catch_up(store, settings.store, gallery.add_many)
            take_up(store)
        except BaseException:
            gallery.close()
            raise
    return gallery


def succeed(gallery: Gallery) -> Gallery:
    """Open the current generation of a gallery's store, with the encoder that built it.

    The given gallery still answers requests and refuses changes; the caller closes it.

    Raises:
        InvalidModel, InvalidStore, StoreMismatch: the given gallery continues as before.
    """
    settings, earlier = gallery.settings, gallery.store
    if not isinstance(earlier, EmbeddedStore):
        raise InvalidStore("this store is not in a folder, and so has no generations")
    folder = current(settings.store)
    if folder == earlier.folder:
        raise InvalidStore(f"{settings.store}: no other generation counts than the one that is open")
    encoder = open_encoder(settings, read_card(find_model(settings.model_copy(update={"model": None}))))
    encoder.drop_files()
    later = _open_folder(settings, encoder.card, encoder.dimension, folder)
    following = Gallery(encoder, later, settings)
    try:
        switch(earlier, later, settings.store, following.add_many, settings.read_only)
    except BaseException:
        following.close()
        raise
    return following


def open_store(settings: Settings, card: Card, dimension: int) -> Store:
    """Open the store that the settings name, for embeddings of an encoder.

    Raises:
        InvalidStore, StoreMismatch.
    """
    address = parse_address(settings.store)
    if address is None:
        return _open_folder(settings, card, dimension, settings.store)
    # pymilvus is an extra.
    from service.store.milvus import MilvusStore

    token, place = settings.milvus_token.get_secret_value(), settings.pictures
    return MilvusStore(address, card, dimension, token, place, settings.read_only)


def _open_folder(settings: Settings, card: Card, dimension: int, folder: Path) -> EmbeddedStore:
    return EmbeddedStore(
        folder,
        card,
        dimension,
        settings.read_only,
        exact_limit=settings.exact_limit,
        vector_type=settings.vector_type,
    )


def _no_item() -> ItemNotFound:
    return ItemNotFound("no item has this id")
