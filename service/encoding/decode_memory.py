"""Memory for decoding: pictures that do not fit beside those that are being decoded wait for them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from service import memory_bytes

# The service itself, with the default encoder, bodies of requests, and an index of some 100,000 items.
_OTHERS_BYTES = 600_000_000
# Of a decoder at its worst: the picture has 4, WebP's decoder and a progressive JPEG's as many again, and one step
# more makes a copy of it.
_PIXEL_BYTES = 16
# One picture of the default limit always fits.
_LEAST_PIXELS = 25_000_000


class DecodeMemory:
    """Counts the pixels that are being decoded, in any number of threads."""

    def __init__(self, pixels: int) -> None:
        self._pixels = self._free = pixels
        self._changed, self._turn = threading.Condition(), threading.Lock()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Wait until so many pixels fit, and hold them during the block; more than ever fit wait to be alone."""
        wanted = min(pixels, self._pixels)
        # In turn, or small pictures would overtake a large one for ever.
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._free >= wanted)
            self._free -= wanted
        try:
            yield
        finally:
            with self._changed:
                self._free += wanted
                self._changed.notify_all()


decode_memory = DecodeMemory(max(_LEAST_PIXELS, (memory_bytes() - _OTHERS_BYTES) // _PIXEL_BYTES))
