"""What Prometheus reads at /metrics. Labels are routes, never paths: a path is the client's and has no end."""

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Counter, Gauge, Histogram, generate_latest

_requests = Counter("lookalike_requests", "Requests answered.", ["method", "route", "status"])
_seconds = Histogram(
    "lookalike_request_seconds", "Time from a request's headers to the end of its answer.", ["method", "route"]
)
items = Gauge("lookalike_items", "Items in the store.")

CONTENT_TYPE = CONTENT_TYPE_LATEST
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def count(method: str, route: str, status: int, seconds: float) -> None:
    """Count a request that was answered."""
    method = method if method in _METHODS else "other"  # a method is the client's, too
    _requests.labels(method, route, status).inc()
    _seconds.labels(method, route).observe(seconds)


def report() -> bytes:
    """Return all of it in the text form."""
    return generate_latest(REGISTRY)
