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
from starlette.types import ASGIApp, Receive, Scope, Send

from service import metrics
from service.errors import LookalikeError
from service.gallery import Gallery, open_gallery, succeed
from service.http import logs
from service.http.guard import Guard
from service.http.routes import create_app
from service.http.slots import Slots
from service.lifetime import Lifetime
from service.settings import Settings

logs.write_json_lines()
log = logging.getLogger("bentoml.lookalike")
app = create_app()
_MMAP_THRESHOLD, _TOP_PAD = -3, -2  # of malloc.h
_LARGE = 4_000_000
_SWITCH_S = 1e-4  # in place of 5e-3: a decoder that comes back to Python must not wait for a burst of the event loop
_BENTOML_OWN = ("/livez", "/readyz", "/healthz", "/schema.json")
_settings = Settings()


async def own_every_path(scope: Scope, receive: Receive, send: Send) -> None:
    """Hand every path to our app, and say which of its routes took it.

    BentoML offers a Starlette app only the paths it knows and answers the others with pages of its
    own; a plain callable is offered them all. Without BentoML's router in the scope, ours names the routes.
    """
    inner = {key: value for key, value in scope.items() if key != "router"}
    try:
        await app(inner, receive, send)
    finally:
        scope["state"]["route"] = getattr(inner.get("route"), "path_format", "other")


def _give_large_blocks_back() -> None:
    """Let glibc return every block above 4 MB as it is freed, and keep as much for the next smaller ones.

    Left alone it learns from the first large ones to keep such blocks, for each thread apart. A JSON body of 64 MB cost
    2.2 times its size so, and costs 2.0 times with this. What it returns has to be cleared when it is asked for again:
    64 queries in a call, which need some blocks of 1.3 MB, took a tenth longer.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE)
        mallopt(_TOP_PAD, _LARGE)


class Fronted(bentoml.Service):  # type: ignore[misc]  # BentoML has no types
    """A service whose requests do not go through what BentoML puts before every route.

    Its tracing opens three spans a request though nobody collects them, and its timeout keeps 5 KB of every request
    until a timer fires (docs/decisions/0010). With an exporter of traces in BentoML's configuration, requests go
    through both.
    """

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        """Return what BentoML's worker hands to uvicorn."""
        theirs = super().to_asgi(is_main)
        traced = BentoMLContainer.tracing.exporter_type.get() is not None

        async def front(scope: Scope, receive: Receive, send: Send) -> None:
            if traced or scope["type"] != "http" or scope["path"] in _BENTOML_OWN:
                await theirs(scope, receive, send)
            else:
                await own_every_path(scope, receive, send)

        return Guard(front)


# The gallery's index lives in a worker's memory, and its store has one writer: one worker, unless there is no store.
# BentoML's access log writes what clients send as it is, and its metrics have a label for every path that was ever
# asked for: both are ours instead (docs/decisions/0009). Its time for a request counts only where requests are traced;
# it covers ours for the body and for the work.
@bentoml.service(
    name="lookalike",
    service_class=Fronted,
    workers=_settings.workers,
    traffic={"timeout": _settings.body_timeout_s + _settings.work_timeout_s + 2},
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)
@bentoml.asgi_app(own_every_path, path="/")
class Lookalike:
    """One gallery, opened when the worker starts and closed when it stops."""

    def __init__(self) -> None:
        _give_large_blocks_back()
        settings = Settings()
        self.gallery = open_service(settings)
        if threading.current_thread() is threading.main_thread():  # where alone signals can be caught
            signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=self.take_up, daemon=True).start())
        self._lifetime = Lifetime(alone=settings.workers == 1)
        self._failed = ""

    def take_up(self) -> None:
        """Go over to the store's generation that counts by now; where that cannot be, go on and say why."""
        earlier = self.gallery
        try:
            self.gallery = app.state.gallery = succeed(earlier)
        except LookalikeError as error:
            log.warning("no other generation of the store is taken up: %s", error)
            return
        log.info("serving %d pictures with the encoder %s", self.gallery.store.count(), self.gallery.card.name)
        time.sleep(earlier.settings.work_timeout_s)  # who has begun with the earlier one ends with it
        earlier.close()

    def __is_ready__(self) -> bool:
        """Ready is: the canary goes all the way to the index and comes to what it was, and nobody said stop."""
        try:
            self.gallery.probe()
            failed = "stopping" if self._lifetime.ending else ""
        except LookalikeError as error:
            failed = str(error)
        metrics.ready.set(not failed)
        if failed != self._failed:  # once for each change, however often somebody asks
            log.error("not ready: %s", failed) if failed else log.info("ready again")
        self._failed = failed
        return not failed

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """Let go of the store."""
        app.state.slots.close()
        self.gallery.close()


def open_service(settings: Settings) -> Gallery:
    """Open the gallery that the settings name, and have the app serve it."""
    gallery = open_gallery(settings)
    app.state.gallery = gallery
    app.state.slots = Slots(settings.max_waiting, settings.work_timeout_s)
    log.info(
        "serving %s with the encoder %s (%s) on %s",
        "without a store" if settings.no_store else f"{gallery.store.count()} pictures from {settings.store}",
        gallery.card.name,
        gallery.encoder.variant,
        gallery.encoder.provider,
    )
    if not settings.no_store and (notice := gallery.notice()):
        log.warning(notice)
    # Full collections of all that was loaded so far would stop everybody for 100 ms each.
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(_SWITCH_S)
    return gallery
