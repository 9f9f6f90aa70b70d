"""The BentoML service: life cycle and health. Our HTTP app is mounted at /; see docs/decisions/0001."""

import ctypes
import gc
import logging
import signal
import sys
import threading
import time

import bentoml
from bentoml._internal.configuration.containers import BentoMLContainer
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from service import metrics
from service.errors import LookalikeError
from service.gallery import Gallery, follow_reindex, open_gallery, succeed, superseded
from service.http import logs
from service.http.guard import Guard
from service.http.prefix import route_path
from service.http.routes import create_app
from service.http.slots import Slots
from service.lifetime import Lifetime, forward_hangups
from service.settings import Settings
from service.store.layout import announce
from service.store.milvus_address import parse_address

log = logging.getLogger("bentoml.lookalike")
# M_MMAP_THRESHOLD and M_TOP_PAD in glibc's malloc.h.
_MMAP_THRESHOLD, _TOP_PAD = -3, -2
_LARGE_BYTES = 4_000_000
# Python's own 5e-3 lets a decoder that returns to Python wait for a whole burst of the event loop.
_SWITCH_S = 1e-4
_BENTOML_OWN = ("/livez", "/readyz", "/healthz", "/schema.json")


class Worker:
    """One gallery behind the HTTP app, from the start of a worker process to its end.

    Attributes:
        app: the HTTP app; `app.state.gallery` is the gallery that serves.
        settings: the settings of the service.
        guard: stands before the app, and knows the API keys.
    """

    app: FastAPI
    settings: Settings
    guard: Guard

    def __init__(self) -> None:
        _return_large_blocks()
        open_service(self.app, self.settings)
        # The encoder was checked when it was opened. Where nobody asks /readyz, the metric stays as it is here.
        metrics.ready.set(True)
        # Signals can be caught in the main thread alone.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=self.renew, daemon=True).start())
        self._renewing = threading.Lock()
        self._lifetime = Lifetime(self.settings.workers == 1, self._announce)
        self._failed = ""

    @property
    def gallery(self) -> Gallery:
        """The gallery that serves."""
        gallery: Gallery = self.app.state.gallery
        return gallery

    def renew(self) -> None:
        """Read the API keys again, and serve the current generation of the store."""
        self.guard.reread_keys()
        if not self.settings.no_store:
            self.switch()

    def switch(self) -> None:
        """Serve the current generation of the store; if it cannot be opened, log why and change nothing."""
        with self._renewing:
            earlier = self.gallery
            try:
                if not superseded(earlier):
                    return
                _use(self.app, succeed(earlier))
            except LookalikeError as error:
                log.error("no other generation of the store is taken up: %s", error)
                return
        log.info("serving %d pictures with the encoder %s", self.gallery.store.count(), self.gallery.card.name)
        # Requests that began with the earlier gallery end with it.
        time.sleep(self.settings.work_timeout_s)
        earlier.close()

    def _announce(self, url: str) -> None:
        """Tell the commands of this machine where the store is served."""
        served_from_folder = not self.settings.no_store and parse_address(self.settings.store) is None
        if served_from_folder and not self.settings.read_only:
            announce(self.settings.store, url)

    def __is_ready__(self) -> bool:
        """Return whether the canary picture is found as it was at the start, and the process is not ending."""
        try:
            self.gallery.probe()
            failed = "stopping" if self._lifetime.ending else ""
        except LookalikeError as error:
            failed = str(error)
        metrics.ready.set(not failed)
        # Each change is logged once, however often a load balancer asks.
        if failed != self._failed:
            log.error("not ready: %s", failed) if failed else log.info("ready again")
        self._failed = failed
        return not failed

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """Close the gallery and its store."""
        self.app.state.slots.close()
        self.app.state.groupings.close()
        self.app.state.bands.close()
        self.app.state.maps.close()
        self.gallery.close()


# BentoML has no types, so mypy sees its Service as Any.
class Fronted(bentoml.Service):  # type: ignore[misc]
    """A service whose requests bypass BentoML's own middleware.

    BentoML's tracing opens three spans a request even if nobody collects them, and its timeout keeps 5 KB of every
    request until a timer fires (docs/decisions/0010). If BentoML's configuration names an exporter of traces, requests
    pass through both.
    """

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        """Return the app that BentoML's worker hands to uvicorn."""
        theirs = super().to_asgi(is_main)
        ours = own_every_path(self.inner.app)
        traced = BentoMLContainer.tracing.exporter_type.get() is not None

        async def front(scope: Scope, receive: Receive, send: Send) -> None:
            if traced or scope["type"] != "http" or route_path(scope) in _BENTOML_OWN:
                await theirs(scope, receive, send)
            else:
                await ours(scope, receive, send)

        guard = Guard(front, self.inner.settings)
        self.inner.guard = guard
        return guard


def make_service(settings: Settings) -> bentoml.Service:
    """Return the BentoML service of one gallery; the gallery is opened when a worker starts.

    A worker holds the gallery's index in its memory, and a store has one writer: with a store there is one worker.
    BentoML's access log writes paths as clients send them, and its metrics have a label for every path that was ever
    asked for: ours replace both (docs/decisions/0009). BentoML's timeout applies to traced requests only; it covers
    our own two, for the body and for the work.
    """
    metrics.configure(settings.workers)
    http, chosen = create_app(), settings

    class Lookalike(Worker):
        """One gallery, opened when the worker starts and closed when it stops."""

        app, settings = http, chosen

    return bentoml.asgi_app(own_every_path(http), path="/")(
        bentoml.service(
            name="lookalike",
            service_class=Fronted,
            workers=settings.workers,
            traffic={"timeout": settings.body_timeout_s + settings.work_timeout_s + 2},
            logging={"access": {"enabled": False}},
            metrics={"enabled": False},
        )(Lookalike)
    )


def own_every_path(app: ASGIApp) -> ASGIApp:
    """Return an ASGI app that hands every path to `app` and notes which of its routes answered.

    BentoML offers a Starlette app only the paths that the app knows and answers the others with pages of its own; it
    offers a plain callable all of them. The scope loses BentoML's router, so that `app` sets its own route there.
    """

    async def owner(scope: Scope, receive: Receive, send: Send) -> None:
        inner = {key: value for key, value in scope.items() if key != "router"}
        try:
            await app(inner, receive, send)
        finally:
            scope["state"]["route"] = getattr(inner.get("route"), "path_format", "other")

    return owner


def open_service(app: FastAPI, settings: Settings) -> None:
    """Open the gallery that the settings name, and have the app serve it.

    Raises:
        InvalidModel, InvalidStore, StoreMismatch: as open_gallery.
    """
    settings, warning = follow_reindex(settings)
    if warning:
        log.warning(warning)
    gallery = open_gallery(settings)
    app.state.slots = Slots(settings.max_waiting, settings.work_timeout_s)
    _use(app, gallery)
    log.info(
        "serving %s with the encoder %s (%s) on %s",
        "without a store" if settings.no_store else f"{gallery.store.count()} pictures from {_shown(settings)}",
        gallery.card.name,
        gallery.encoder.variant,
        gallery.encoder.provider,
    )
    if gallery.encoder.max_batch == 1:
        log.warning("the graph of the encoder takes one picture at a time: pictures are embedded one by one")
    if not settings.no_store and (notice := gallery.notice()):
        log.warning(notice)
    # A full collection of all that was loaded so far would stop every request for 100 ms.
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(_SWITCH_S)


def _shown(settings: Settings) -> str:
    """Return the store of the settings as a user writes it."""
    return str(parse_address(settings.store) or settings.store)


def _use(app: FastAPI, gallery: Gallery) -> None:
    """Serve a gallery from now on, and report its encoder at /metrics."""
    app.state.gallery = gallery
    encoder = gallery.encoder
    metrics.tell_encoder(encoder.card.name, encoder.variant, encoder.provider, len(encoder.lanes))


def _return_large_blocks() -> None:
    """Have glibc return every block above 4 MB to the system when it is freed, and keep as much for smaller ones.

    By default glibc learns from the first large blocks to keep such blocks, separately for each thread. A JSON body of
    64 MB then costs 2.2 times its size; with this it costs 2.0 times. Returned memory has to be cleared when it is
    allocated again: 64 queries in a call, which need some blocks of 1.3 MB, took a tenth longer.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_TOP_PAD, _LARGE_BYTES)


logs.write_json_lines()
forward_hangups()
Lookalike = make_service(Settings())
