"""Many callers → one batch → each caller's own embedding or own error."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Generic, TypeVar

from service import FloatArray, metrics
from service.errors import Outcome, OutOfMemory, attempt

if TYPE_CHECKING:
    from prometheus_client import Gauge, Histogram

T = TypeVar("T")


class Batcher(Generic[T]):
    """Greedy batching: a free lane runs all inputs that wait, up to the largest batch.

    An input T is the pixels (S, S, 3) of a picture, or a text. None waits for a batch to fill. Under light load a batch
    is one input; under heavy load it holds the inputs that arrived while the last batch ran. A lane is a thread with an
    encoder on it, one for each device.
    """

    def __init__(
        self,
        lanes: Sequence[Callable[[Sequence[T]], FloatArray]],
        max_batch: int,
        waiting: "Gauge | None" = None,
        sizes: "Histogram | None" = None,
    ) -> None:
        """Start a thread for each lane.

        Args:
            lanes: each takes 1 to max_batch inputs and returns (N, D); one thread at a time calls it.
            max_batch: inputs in a batch, at most.
            waiting, sizes: count the inputs that wait, and those of each batch; None for the metrics of pictures.
        """
        self._max_batch = max_batch
        self._metrics = (waiting or metrics.pictures_waiting, sizes or metrics.batch_size)
        self._waiting: queue.SimpleQueue[tuple[T, Future[FloatArray]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, args=(encode,), name=f"lane-{number}", daemon=True)
            for number, encode in enumerate(lanes)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, input: T, future: "Future[FloatArray]") -> None:
        """Queue an input for the next batch; call from any thread, it does not block.

        Args:
            input: the pixels (S, S, 3) of a picture, or a text.
            future: receives the embedding (D,), or the error that the lane raised for this input, never one for another
                caller's. If it is cancelled before its batch starts, the input is skipped.
        """
        self._metrics[0].inc()
        self._waiting.put((input, future))

    def embed(self, inputs: Sequence[T]) -> list[Outcome[FloatArray]]:
        """Embed inputs and wait for all of them.

        Args:
            inputs: N of them.

        Returns:
            For each input its embedding (D,), or the error that concerns this input alone, such as NoEmbedding.
        """
        futures: list[Future[FloatArray]] = [Future() for _ in inputs]
        for one, future in zip(inputs, futures, strict=True):
            self.submit(one, future)
        return [attempt(future.result) for future in futures]

    def close(self) -> None:
        """Embed all inputs that wait, then end the threads."""
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self, encode: Callable[[Sequence[T]], FloatArray]) -> None:
        most, closing = self._max_batch, False
        waiting, sizes = self._metrics
        while not closing:
            batch: list[tuple[T, Future[FloatArray]]] = []
            job = self._waiting.get()
            while job is not None:
                waiting.dec()
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
                sizes.observe(len(batch))
                if not _resolve(encode, batch):
                    most = max(1, len(batch) // 2)


def _resolve(
    encode: Callable[[Sequence[T]], FloatArray], batch: "list[tuple[T, Future[FloatArray]]]", halved: bool = False
) -> bool:
    """Resolve the futures of a batch; return whether the device had enough memory for it.

    A batch that fails is split in halves until each error reaches only the caller whose input caused it. A batch that
    ran out of memory is halved once: if a half fails again, its size is not the cause.
    """
    try:
        embeddings = encode([input for input, _ in batch])
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
