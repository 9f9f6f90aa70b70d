"""Many callers → one batch → each caller's own embedding or own error."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from service import FloatArray, PixelArray

_Job = tuple[PixelArray, "Future[FloatArray]"]


class Batcher:
    """Greedy: one thread runs whatever waits, up to the largest batch, as soon as it is free.

    Nobody waits for a batch to fill: under light load a batch is one picture, under heavy load the
    pictures that came while the last batch ran.
    """

    def __init__(self, encode: Callable[[Sequence[PixelArray]], FloatArray], max_batch: int = 64) -> None:
        """Start the thread. `encode` takes 1 to max_batch pixels (S, S, 3) and returns (N, D)."""
        self._encode = encode
        self._max_batch = max_batch
        self._waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def encode(self, pixels: Sequence[PixelArray]) -> FloatArray:
        """Embed the caller's pixels, together with whoever else is waiting. Blocks; call from any thread.

        Returns:
            (N, D) float32 in the caller's order.

        Raises:
            What `encode` raised for these pixels; other callers' pixels have no part in it.
        """
        jobs: list[_Job] = [(one, Future()) for one in pixels]
        for job in jobs:
            self._waiting.put(job)
        return np.stack([future.result() for _, future in jobs])

    def close(self) -> None:
        """Finish what waits, then end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        closing = False
        while not closing:
            batch: list[_Job] = []
            job = self._waiting.get()
            while job is not None:
                batch.append(job)
                if len(batch) == self._max_batch or self._waiting.empty():
                    break
                job = self._waiting.get()
            closing = job is None
            if batch:
                self._resolve(batch)

    def _resolve(self, batch: list[_Job]) -> None:
        try:
            embeddings = self._encode([pixels for pixels, _ in batch])
        except Exception as error:  # it belongs to the callers, whatever it is
            if len(batch) == 1:
                batch[0][1].set_exception(error)
            else:  # one by one, so that it reaches only the caller it belongs to
                for job in batch:
                    self._resolve([job])
            return
        for (_, future), embedding in zip(batch, embeddings, strict=True):
            future.set_result(embedding)
