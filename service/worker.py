"""A worker process: it opens the gallery, serves it, tells its health, and closes it."""

import ctypes
import gc
import logging
import signal
import sys
import threading
import time

from fastapi import FastAPI

from service import metrics
from service.errors import LookalikeError
from service.gallery import Gallery, follow_reindex, open_gallery, succeed, superseded
from service.http.guard import Guard
from service.http.slots import Slots
from service.lifetime import Lifetime
from service.settings import Settings
from service.store.layout import announce
from service.store.milvus_address import parse_address

log = logging.getLogger("bentoml.lookalike")
# M_MMAP_THRESHOLD and M_TOP_PAD in glibc's malloc.h.
_MMAP_THRESHOLD, _TOP_PAD = -3, -2
_LARGE_BYTES = 4_000_000
# Python's own 5e-3 lets a decoder that returns to Python wait for a whole burst of the event loop.
_SWITCH_S = 1e-4


class Worker:
    """One gallery behind the HTTP app, from the start of a worker process to its end.

    Attributes:
        app: the HTTP app; `app.state.gallery` is the gallery that serves.
        settings: the settings of the service.
        guard: stands before the app, and knows the API keys.
    """

    def __init__(self, app: FastAPI, settings: Settings, guard: Guard) -> None:
        """Open the gallery. Raises as `open_service`."""
        self.app, self.settings, self.guard = app, settings, guard
        _return_large_blocks()
        open_service(self.app, self.settings)
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

    def is_ready(self) -> bool:
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

    def close(self) -> None:
        """Close the gallery and its store."""
        self.app.state.slots.close()
        self.app.state.groupings.close()
        self.app.state.bands.close()
        self.app.state.maps.close()
        self.gallery.close()


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
