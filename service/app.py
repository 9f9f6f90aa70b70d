"""The BentoML service: life cycle and health. Our HTTP app is mounted at /; see docs/decisions/0001."""

import ctypes
import gc
import logging
import signal
import threading
import time

import bentoml
from starlette.types import Receive, Scope, Send

from service import logs
from service.api import create_app
from service.errors import LookalikeError
from service.gallery import open_gallery, succeed
from service.guard import Guard
from service.settings import Settings
from service.slots import Slots

logs.write_json_lines()
log = logging.getLogger("bentoml.lookalike")
app = create_app()
_MMAP_THRESHOLD = -3  # of malloc.h
_times = Settings()


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
    """Let glibc return every block above 1 MB as it is freed.

    Left alone it learns from the first large ones to keep such blocks, for each thread apart. A JSON body of 64 MB cost
    2.2 times its size so, and costs 2.0 times with this.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1_000_000)


# One worker: the gallery's index lives in its memory, and its store has one writer. BentoML's access log writes what
# clients send as it is, and its metrics have a label for every path that was ever asked for: both are ours instead.
# Its time for a request covers ours for the body and for the work, and hardly more: until it is over, a timer keeps
# some 5 KB of every request (docs/decisions/0009).
@bentoml.service(
    name="lookalike",
    workers=1,
    traffic={"timeout": _times.body_timeout_s + _times.work_timeout_s + 2},
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)
@bentoml.asgi_app(own_every_path, path="/")
class Lookalike:
    """One gallery, opened when the worker starts and closed when it stops."""

    def __init__(self) -> None:
        _give_large_blocks_back()
        settings = Settings()
        self.gallery = open_gallery(settings)
        app.state.gallery = self.gallery
        if threading.current_thread() is threading.main_thread():  # where alone signals can be caught
            signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=self.take_up, daemon=True).start())
        app.state.slots = Slots(settings.max_waiting, settings.work_timeout_s)
        log.info(
            "serving %d pictures from %s with the encoder %s (%s) on %s",
            self.gallery.store.count(),
            settings.store,
            self.gallery.card.name,
            self.gallery.encoder.variant,
            self.gallery.encoder.provider,
        )
        if notice := self.gallery.notice():
            log.warning(notice)
        # Full collections of all that was loaded so far would stop everybody for 100 ms each.
        gc.collect()
        gc.freeze()

    def take_up(self) -> None:
        """Go over to the store's generation that counts by now; where that cannot be, go on and say why."""
        earlier = self.gallery
        try:
            self.gallery = app.state.gallery = succeed(earlier)
        except LookalikeError as error:
            log.warning("no other generation of the store is taken up: %s", error)
            return
        log.info("serving %d pictures with the encoder %s", self.gallery.store.count(), self.gallery.card.name)
        time.sleep(_times.work_timeout_s)  # who has begun with the earlier one ends with it
        earlier.close()

    def __is_ready__(self) -> bool:
        """Ready is: a picture goes all the way to the index and back."""
        self.gallery.probe()
        return True

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """Let go of the store."""
        app.state.slots.close()
        self.gallery.close()


Lookalike.add_asgi_middleware(Guard)  # type: ignore[attr-defined]  # bentoml.service made it a Service
