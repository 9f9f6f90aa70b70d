"""What Prometheus reads at /metrics. Labels are routes, never paths: a path is the client's and has no end."""

import os
import re
import shutil
from functools import cache
from pathlib import Path

_FILES = "PROMETHEUS_MULTIPROC_DIR"


def _process(pid: int) -> str:
    """Name a process so that no later one has the name; "" when there is none."""
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
    return f"{pid}-{started}"


def _choose_files() -> None:
    """Choose where to count: it must be said before prometheus_client is imported.

    Several workers count in files that all of them read; BentoML asks for those always. A single one counts in its own
    memory, which costs less and knows its process. BentoML's folder is one for all services of a user, and whichever
    starts empties it: ours is beside it, named for the process that started the workers.
    """
    bentoml = os.environ.pop(_FILES, None)
    if bentoml is None or os.environ.get("LOOKALIKE_WORKERS", "1") == "1":
        return
    own = Path(bentoml).with_name(f"lookalike-metrics-{_process(os.getppid())}")
    own.mkdir(exist_ok=True)
    os.environ[_FILES] = str(own)
    for other in own.parent.glob("lookalike-metrics-*-*"):
        name = other.name.removeprefix("lookalike-metrics-")
        if name != _process(int(name.partition("-")[0])):
            shutil.rmtree(other, ignore_errors=True)  # its service has ended


_choose_files()

from prometheus_client import (  # noqa: E402
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

_TIMES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_requests = Counter("lookalike_requests", "Requests answered.", ["method", "route", "status"])
_seconds = Histogram(
    "lookalike_request_seconds",
    "Time from a request's headers to the end of its answer.",
    ["method", "route"],
    buckets=_TIMES,
)
errors = Counter("lookalike_errors", "Errors answered, by the code that problem+json gives.", ["code"])
batch_size = Histogram("lookalike_batch_size", "Pictures in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64))
decode_seconds = Histogram("lookalike_decode_seconds", "Time to decode a picture.", buckets=_TIMES)
inference_seconds = Histogram("lookalike_inference_seconds", "Time to embed a batch.", buckets=_TIMES)
items = Gauge("lookalike_items", "Items in the store.", multiprocess_mode="mostrecent")
ready = Gauge("lookalike_ready", "1 when the last look at readiness was well.", multiprocess_mode="livemin")
pictures_waiting = Gauge("lookalike_pictures_waiting", "Pictures that wait for a lane.", multiprocess_mode="livesum")
requests_at_work = Gauge("lookalike_requests_at_work", "Requests at work or waiting.", multiprocess_mode="livesum")
_encoder = Gauge(
    "lookalike_encoder_lanes",
    "Devices that run the encoder, and which encoder on what.",
    ["model", "variant", "provider"],
    multiprocess_mode="livesum",
)

CONTENT_TYPE = CONTENT_TYPE_LATEST
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def count(method: str, route: str, status: int, seconds: float) -> None:
    """Count a request that was answered."""
    method = method if method in _METHODS else "other"  # a method is the client's, too
    total, times = _children(method, route, status)
    total.inc()
    times.observe(seconds)


@cache
def _children(method: str, route: str, status: int) -> tuple[Counter, Histogram]:
    return _requests.labels(method, route, status), _seconds.labels(method, route)


def tell_encoder(model: str, variant: str, provider: str, lanes: int) -> None:
    """Tell which encoder runs on what, in place of what was told before."""
    _encoder.clear()
    _encoder.labels(model, variant, provider).set(lanes)


def report() -> bytes:
    """Return all of it in the text form; of several workers their sum, whichever of them is asked."""
    if _FILES not in os.environ:
        return generate_latest(REGISTRY)
    for file in Path(os.environ[_FILES]).glob("gauge_live*.db"):
        pid = int(re.sub(r"\D", "", file.stem))
        if not _process(pid):  # what a worker that was killed had at work is nobody's now
            multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]
    together = CollectorRegistry()
    multiprocess.MultiProcessCollector(together)  # type: ignore[no-untyped-call]
    return generate_latest(together)
