"""Encoder + store: add pictures, find lookalikes. What HTTP, command line and page all call."""

import hashlib
import os
import threading
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from service import FloatArray, PixelArray
from service.batcher import Batcher
from service.card import Card, read_card, suits
from service.encoder import Encoder
from service.errors import InvalidQuery, InvalidRequest, ItemNotFound, LookalikeError
from service.images import decode, decode_pixels, thumbnail, to_pixels, tones
from service.settings import Settings
from service.store import Hit, Item, NewItem, Store
from service.store.embedded import EmbeddedStore, recorded_model

_MAX_ID_BYTES = 256
_SAMPLED_THUMBNAILS = 100


@dataclass(frozen=True)
class ReadPicture:
    """A picture that was read and is not embedded yet: its bytes, pixels (S, S, 3) and thumbnail."""

    data: bytes
    pixels: PixelArray
    thumbnail: bytes


class Gallery:
    """The searchable collection. Every method blocks and may be called from any thread."""

    def __init__(self, encoder: Encoder, store: Store, settings: Settings) -> None:
        self.encoder = encoder
        self.store = store
        self.settings = settings
        self._batcher = Batcher(encoder.encode)
        # As many pictures are decoded at a time as there are cores: more would only cost memory.
        self._decoding = threading.BoundedSemaphore(os.cpu_count() or 1)
        self._notice: tuple[int, str | None] = (0, None)

    @property
    def card(self) -> Card:
        """The encoder's card."""
        return self.encoder.card

    def read(self, data: bytes) -> ReadPicture:
        """Decode image bytes.

        Raises:
            EmptyPicture, UnsupportedFormat, TooLarge, UndecodablePicture.
        """
        with self._decoding:
            picture = decode(data, self.card.preprocessing.side, self.settings.limits)
            return ReadPicture(data, to_pixels(picture, self.card.preprocessing), thumbnail(picture))

    def embed(self, images: Sequence[bytes]) -> FloatArray:
        """Return the embeddings (N, D) of image bytes. Raises as `read`, the first bad picture named by its number."""
        pixels = []
        for number, data in enumerate(images):
            try:
                pixels.append(self.read_pixels(data))
            except LookalikeError as error:
                if len(images) > 1:
                    raise type(error)(f"picture {number}: {error}") from error
                raise
        return self._batcher.encode(pixels)

    def read_pixels(self, data: bytes) -> PixelArray:
        """Decode image bytes to pixels (S, S, 3) alone. Raises as `read`."""
        with self._decoding:
            return decode_pixels(data, self.card.preprocessing, self.settings.limits)

    def add(self, id: str, data: bytes, metadata: dict[str, Any]) -> bool:
        """Add or replace one picture under an id as check_id gives it; True where it was new. Raises as `read`."""
        return self.add_read([(id, self.read(data), metadata, None)])[0]

    def add_read(self, pictures: Sequence[tuple[str, ReadPicture, dict[str, Any], str | None]]) -> list[bool]:
        """Embed and store pictures that were read, all in one commit: (id, picture, metadata, source) each.

        Raises:
            NoEmbedding: for one of them; none is stored.
        """
        embeddings = self._batcher.encode([picture.pixels for _, picture, _, _ in pictures])
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
            raise _no_item()
        return data

    def original(self, id: str) -> bytes:
        """Return the picture's own bytes. Raises ItemNotFound, also where they are not kept."""
        data = self.store.original(id)
        if data is None:
            self.get(id)
            raise ItemNotFound("the store does not keep this item's own bytes (keep_originals is off)")
        return data

    def remove(self, id: str) -> None:
        """Remove an item. Raises ItemNotFound."""
        if not self.store.remove(id):
            raise _no_item()

    def find_by_picture(self, data: bytes, k: int) -> list[Hit]:
        """Return the k items most like a picture, best first. Raises as `read`, InvalidQuery for k."""
        self._check_k(k)
        return self.store.search(self.embed([data]), k)[0]

    def find_by_vector(self, vector: Sequence[float], k: int) -> list[Hit]:
        """Return the k items most like a vector of D finite numbers, not all 0; it is made unit length.

        Raises:
            InvalidQuery: anything else.
        """
        self._check_k(k)
        query = np.asarray(vector, np.float64)
        if query.shape != (self.encoder.dimension,):
            raise InvalidQuery(f"vector: expected {self.encoder.dimension} numbers, got {query.size}")
        if not np.isfinite(query).all():
            raise InvalidQuery("vector: expected finite numbers, got NaN or infinity")
        largest = np.abs(query).max()
        if not largest:
            raise InvalidQuery("vector: expected a direction, got only zeros")
        query /= largest  # so that neither the largest nor the smallest of doubles is lost in the squares
        return self.store.search((query / np.linalg.norm(query))[None].astype(np.float32), k)[0]

    def find_by_id(self, id: str, k: int) -> list[Hit]:
        """Return the k items most like an item, that item left out. Raises ItemNotFound, InvalidQuery."""
        self._check_k(k)
        embedding = self.store.embedding(id)
        if embedding is None:
            raise _no_item()
        hits = self.store.search(embedding[None], k + 1)[0]
        return [hit for hit in hits if hit.id != id][:k]

    def notice(self) -> str | None:
        """Say so in one sentence where the encoder was trained on pictures unlike the gallery's, else None.

        Cost: up to 100 thumbnails, once for every doubling of the gallery.
        """
        size = self.store.count().bit_length()
        if size != self._notice[0]:
            self._notice = (size, suits(self.card, self._tones()))
        return self._notice[1]

    def probe(self) -> None:
        """Take the canary all the way to the index and back; raises where that cannot be done."""
        self.store.search(self._batcher.encode([self.encoder.canary]), 1)

    def close(self) -> None:
        """Finish what waits and let go of the store."""
        self._batcher.close()
        self.store.close()

    def _tones(self) -> list[float] | None:
        pixels = []
        for item in self.store.scan(_SAMPLED_THUMBNAILS)[0]:
            data = self.store.thumbnail(item.id)
            if data is not None:
                pixels.append(self.read_pixels(data))
        return tones(np.stack(pixels)) if pixels else None

    def _check_k(self, k: int) -> None:
        if not 1 <= k <= self.settings.max_k:
            raise InvalidQuery(f"k: expected a whole number from 1 to {self.settings.max_k}, got {k}")


def open_gallery(settings: Settings, read_only: bool = False) -> Gallery:
    """Open the encoder and the store that the settings name.

    Raises:
        InvalidModel, InvalidStore, StoreMismatch.
    """
    encoder = Encoder(read_card(find_model(settings)), settings.device, settings.variant)
    return Gallery(encoder, EmbeddedStore(settings.store, encoder.card, encoder.dimension, read_only), settings)


def find_model(settings: Settings) -> Path:
    """Return the encoder's folder: the one that is named, else the store's own, else models/mnist.

    A store that came from another machine names a folder that is not here; whether the encoder we take
    instead is the right one, its fingerprint decides.
    """
    recorded = recorded_model(settings.store)
    return settings.model or (recorded if recorded and recorded.is_dir() else Path("models/mnist"))


def check_id(id: str) -> str:
    """Return an id in Unicode's composed form (NFC).

    Raises:
        InvalidRequest: empty, over 256 bytes, with control characters, or ending like a route of its own.
    """
    id = unicodedata.normalize("NFC", id)
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in id):
        raise InvalidRequest("id: expected text without control characters")
    if not 1 <= len(id.encode()) <= _MAX_ID_BYTES:
        raise InvalidRequest(f"id: expected 1 to {_MAX_ID_BYTES} bytes, got {len(id.encode())}")
    if id.endswith(("/thumbnail", "/content")):
        raise InvalidRequest("id: must not end in /thumbnail or /content, which name an item's pictures")
    return id


def _no_item() -> ItemNotFound:
    return ItemNotFound("no item has this id")
