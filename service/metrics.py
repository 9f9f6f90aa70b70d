"""Metrics for Prometheus at /metrics. Labels are routes, never paths: clients could make any number of paths.

prometheus_client decides when it is imported whether it counts in memory or in files. It is therefore imported, and the
metrics are made, at the first use of one; until then the service may call `configure`. Importing this module changes
nothing.
"""

import os
import re
import shutil
import threading
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge, Histogram

errors: "Counter"
batch_size: "Histogram"
decode_seconds: "Histogram"
inference_seconds: "Histogram"
ready: "Gauge"
pictures_waiting: "Gauge"
texts_waiting: "Gauge"
text_batch_size: "Histogram"
text_seconds: "Histogram"
requests_at_work: "Gauge"
_requests: "Counter"
_seconds: "Histogram"
_encoder: "Gauge"
CONTENT_TYPE: str

_FILES = "PROMETHEUS_MULTIPROC_DIR"
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# Without a store, on Milvus or of a read-only service some of these would be wrong at 0, so each exists from its first
# value on.
_OF_THE_STORE = {
    "lookalike_items": "Items in the store.",
    "lookalike_store_writable": "1 while the store takes changes; absent if it was opened read-only.",
    "lookalike_store_disk_bytes": "Size of the store's file system, without what is reserved for root.",
    "lookalike_store_disk_free_bytes": "Room that is left there.",
    "lookalike_snapshot_timestamp_seconds": "When the last snapshot of the index was written; 0 without one.",
    "lookalike_snapshot_due": "1 while the index has so many changes since that the next snapshot is due.",
}
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_making = threading.Lock()

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Make the metrics at the first use of one; from then on they are ordinary attributes of this module."""
        if name not in __annotations__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        _make()
        return globals()[name]


def configure(workers: int) -> None:
    """Choose where this process counts. It must run before the first use of a metric.

    Several workers count in files that all of them read. A single worker counts in its own memory, which costs less
    and names its process. BentoML asks for files always, in one folder for all services of a user, which every service
    empties when it starts. Our folder lies beside it and is named for the parent of the workers.

    Args:
        workers: how many processes serve together.
    """
    shared = os.environ.pop(_FILES, None)
    if shared is None or workers == 1:
        return
    own = Path(shared).with_name(f"lookalike-metrics-{_process(os.getppid())}")
    own.mkdir(exist_ok=True)
    os.environ[_FILES] = str(own)
    for other in own.parent.glob("lookalike-metrics-*-*"):
        name = other.name.removeprefix("lookalike-metrics-")
        # The service of a folder whose process is gone has ended.
        if name != _process(int(name.partition("-")[0])):
            shutil.rmtree(other, ignore_errors=True)


def count(method: str, route: str, status: int, seconds: float) -> None:
    """Count a request that was answered, and its time."""
    # Clients choose the method, too.
    method = method if method in _METHODS else "other"
    total, times = _children(method, route, status)
    total.inc()
    times.observe(seconds)


@cache
def _children(method: str, route: str, status: int) -> "tuple[Counter, Histogram]":
    _make()
    return _requests.labels(method, route, status), _seconds.labels(method, route)


def tell_encoder(model: str, variant: str, provider: str, lanes: int) -> None:
    """Report which encoder serves, in place of the one before.

    Args:
        model, variant: the encoder's name and variant.
        provider: what runs it, a provider of onnxruntime or "OpenVINO".
        lanes: how many batches run at a time.
    """
    _make()
    _encoder.clear()
    _encoder.labels(model, variant, provider).set(lanes)


def tell_store(name: str, value: float) -> None:
    """Report a metric of the store, one of _OF_THE_STORE."""
    _make()
    with _making:
        _store_gauge(name).set(value)


@cache
def _store_gauge(name: str) -> "Gauge":
    from prometheus_client import Gauge

    return Gauge(name, _OF_THE_STORE[name], multiprocess_mode="mostrecent")


def report() -> bytes:
    """Return all metrics in Prometheus' text form; those of several workers are summed."""
    from prometheus_client import REGISTRY, CollectorRegistry, generate_latest, multiprocess

    _make()
    if _FILES not in os.environ:
        return generate_latest(REGISTRY)
    for file in Path(os.environ[_FILES]).glob("gauge_live*.db"):
        pid = int(re.sub(r"\D", "", file.stem))
        # A killed worker leaves its gauges behind, which would count work that has ended.
        if not _process(pid):
            multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]
    together = CollectorRegistry()
    multiprocess.MultiProcessCollector(together)  # type: ignore[no-untyped-call]
    return generate_latest(together)


def _make() -> None:
    """Register the metrics, once."""
    global errors, batch_size, decode_seconds, inference_seconds, ready, pictures_waiting, requests_at_work
    global texts_waiting, text_batch_size, text_seconds, _requests, _seconds, _encoder, CONTENT_TYPE
    with _making:
        if "_encoder" in globals():
            return
        from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram

        CONTENT_TYPE = CONTENT_TYPE_LATEST
        _requests = Counter("lookalike_requests", "Requests answered.", ["method", "route", "status"])
        _seconds = Histogram(
            "lookalike_request_seconds",
            "Time from a request's headers to the end of its answer.",
            ["method", "route"],
            buckets=_BUCKETS_S,
        )
        errors = Counter("lookalike_errors", "Errors answered, by the code that problem+json gives.", ["code"])
        batch_size = Histogram("lookalike_batch_size", "Pictures in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64))
        decode_seconds = Histogram("lookalike_decode_seconds", "Time to decode a picture.", buckets=_BUCKETS_S)
        inference_seconds = Histogram("lookalike_inference_seconds", "Time to embed a batch.", buckets=_BUCKETS_S)
        ready = Gauge("lookalike_ready", "1 when the last look at readiness was well.", multiprocess_mode="livemin")
        pictures_waiting = Gauge(
            "lookalike_pictures_waiting", "Pictures that wait for a lane.", multiprocess_mode="livesum"
        )
        texts_waiting = Gauge("lookalike_texts_waiting", "Texts that wait to be embedded.", multiprocess_mode="livesum")
        text_batch_size = Histogram("lookalike_text_batch_size", "Texts in a batch.", buckets=(1, 2, 4, 8, 16))
        text_seconds = Histogram("lookalike_text_seconds", "Time to embed a batch of texts.", buckets=_BUCKETS_S)
        requests_at_work = Gauge(
            "lookalike_requests_at_work", "Requests at work or waiting.", multiprocess_mode="livesum"
        )
        _encoder = Gauge(
            "lookalike_encoder_lanes",
            "Batches that run at a time, and which encoder on what.",
            ["model", "variant", "provider"],
            multiprocess_mode="livesum",
        )


def _process(pid: int) -> str:
    """Return a name of a process that no later process gets, or "" if no such process runs."""
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
    return f"{pid}-{started}"
