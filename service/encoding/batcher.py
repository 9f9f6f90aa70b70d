"""Many callers → one batch → each caller's own embedding or own error."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from service import FloatArray, PixelArray, metrics
from service.errors import Outcome, OutOfMemory, attempt

Encode = Callable[[Sequence[PixelArray]], FloatArray]
_Job = tuple[PixelArray, "Future[FloatArray]"]


class Batcher:
    """Greedy: each lane runs whatever waits, up to the largest batch, as soon as it is free.

    Nobody waits for a batch to fill: under light load a batch is one picture, under heavy load the
    pictures that came while the last batch ran. A lane is a thread and what encodes on it, one for each device.
    """

    def __init__(self, lanes: Sequence[Encode], max_batch: int) -> None:
        """Start the threads. Each lane takes 1 to max_batch pixels (S, S, 3) and returns (N, D)."""
        self._max_batch = max_batch
        self._waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, args=(encode,), name=f"lane-{number}", daemon=True)
            for number, encode in enumerate(lanes)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, pixels: PixelArray, future: "Future[FloatArray]") -> None:
        """Have pixels (S, S, 3) embedded together with whoever else is waiting; call from any thread.

        Args:
            pixels: of one picture.
            future: gets the embedding (D,), or what the lane raised for these pixels; other callers' pixels have no
                part in it. Cancelled before its batch begins, it is passed over.
        """
        metrics.pictures_waiting.inc()
        self._waiting.put((pixels, future))

    def embed(self, pixels: Sequence[PixelArray]) -> list[Outcome[FloatArray]]:
        """Embed pictures and wait for all of them.

        Args:
            pixels: N arrays (S, S, 3).

        Returns:
            For each picture its embedding (D,), or the error that concerns this picture alone, such as NoEmbedding.
        """
        futures: list[Future[FloatArray]] = [Future() for _ in pixels]
        for one, future in zip(pixels, futures, strict=True):
            self.submit(one, future)
        return [attempt(future.result) for future in futures]

    def close(self) -> None:
        """Finish what waits, then end the threads."""
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self, encode: Encode) -> None:
        most, closing = self._max_batch, False
        while not closing:
            batch: list[_Job] = []
            job = self._waiting.get()
            while job is not None:
                metrics.pictures_waiting.dec()
                if job[1].set_running_or_notify_cancel():  # else its caller has gone
                    batch.append(job)
                if len(batch) == most:
                    break
                try:
                    job = self._waiting.get_nowait()
                except queue.Empty:
                    break
            closing = job is None
            if batch:
                metrics.batch_size.observe(len(batch))
                if not _resolve(encode, batch):
                    most = max(1, len(batch) // 2)


def _resolve(encode: Encode, batch: list[_Job], halved: bool = False) -> bool:
    """Give every caller of a batch its embedding or its error; False where memory was too short for the batch.

    What failed is tried in halves, until an error has reached only the caller it belongs to. A batch that memory was
    too short for is halved once: what fails again then is not a matter of its size.
    """
    try:
        embeddings = encode([pixels for pixels, _ in batch])
    except Exception as error:  # it belongs to the callers, whatever it is
        no_memory = isinstance(error, OutOfMemory)
        if len(batch) == 1 or (no_memory and halved):
            for _, future in batch:
                future.set_exception(error)
        else:
            middle = len(batch) // 2
            for half in (batch[:middle], batch[middle:]):
                _resolve(encode, half, halved=no_memory)
        return not no_memory
    for (_, future), embedding in zip(batch, embeddings, strict=True):
        future.set_result(embedding)
    return True
