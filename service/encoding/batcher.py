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
    """Greedy batching: a free lane runs all pictures that wait, up to the largest batch.

    No picture waits for a batch to fill. Under light load a batch is one picture; under heavy load it holds the
    pictures that arrived while the last batch ran. A lane is a thread with an encoder on it, one for each device.
    """

    def __init__(self, lanes: Sequence[Encode], max_batch: int) -> None:
        """Start a thread for each lane.

        Args:
            lanes: each takes 1 to max_batch pixels (S, S, 3) and returns (N, D); one thread at a time calls it.
            max_batch: pictures in a batch, at most.
        """
        self._max_batch = max_batch
        self._waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, args=(encode,), name=f"lane-{number}", daemon=True)
            for number, encode in enumerate(lanes)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, pixels: PixelArray, future: "Future[FloatArray]") -> None:
        """Queue a picture for the next batch; call from any thread, it does not block.

        Args:
            pixels: (S, S, 3) of one picture.
            future: receives the embedding (D,), or the error that the lane raised for these pixels, never one for
                another caller's. If it is cancelled before its batch starts, the picture is skipped.
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
        """Embed all pictures that wait, then end the threads."""
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
                # A cancelled future's caller has left.
                if job[1].set_running_or_notify_cancel():
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
    """Resolve the futures of a batch; return whether the device had enough memory for it.

    A batch that fails is split in halves until each error reaches only the caller whose pixels caused it. A batch that
    ran out of memory is halved once: if a half fails again, its size is not the cause.
    """
    try:
        embeddings = encode([pixels for pixels, _ in batch])
    # Any error belongs to the callers; the lane itself goes on.
    except Exception as error:
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
