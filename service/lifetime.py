"""How a worker ends: not ready at once, then no more connections, then what was accepted is answered, then gone."""

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

log = logging.getLogger("bentoml.lookalike")

_SEEN_S = 1.0  # whoever asks /readyz, a load balancer, sees that it is not before connections are refused
_LAST_S = 24.0  # requests that have not ended by then never will
_LOOK_S = 0.25  # how often a worker looks for its parent
_ORPHAN_S = 1.0  # what an orphan's requests have to end


class Lifetime:
    """Watches over one worker process from when its service is open.

    BentoML's parent tells workers to stop by SIGTERM and waits a day for it; a parent that is killed tells nothing, and
    its worker would hold the port and the store's lock.

    Attributes:
        ending: whether the worker is about to end; it is not ready then.
    """

    def __init__(self, alone: bool) -> None:
        """Begin, where this is a server's process: elsewhere signals belong to somebody else.

        Args:
            alone: whether no other worker listens on the same socket.
        """
        self.ending = False
        self._alone = alone
        self._parent = os.getppid()
        told = signal.getsignal(signal.SIGTERM)
        self._server: Any = getattr(told, "__self__", None)  # uvicorn's, whose handle_exit this is
        if threading.current_thread() is threading.main_thread() and hasattr(self._server, "handle_exit"):
            self._loop = asyncio.get_running_loop()
            signal.signal(signal.SIGTERM, self._on_signal)
            threading.Thread(target=self._watch_parent, name="lifetime", daemon=True).start()

    def _on_signal(self, _: int, __: FrameType | None) -> None:
        if not self.ending:
            self._loop.call_soon_threadsafe(self._end, _SEEN_S, _LAST_S)

    def _watch_parent(self) -> None:
        while os.getppid() == self._parent:
            time.sleep(_LOOK_S)
        log.error("the process that started this one is gone; so this one ends, too")
        self._loop.call_soon_threadsafe(self._end, 0, _ORPHAN_S)
        time.sleep(_ORPHAN_S)
        os._exit(1)  # also where the loop stands still

    def _end(self, seen_s: float, last_s: float) -> None:
        self.ending = True
        log.info("ending: not ready any more; what was accepted is answered first")
        self._loop.call_later(seen_s, self._refuse)
        last = threading.Timer(last_s, self._leave)
        last.daemon = True
        last.start()

    def _refuse(self) -> None:
        if self._alone:
            # The parent has this socket, too: without this, connections would wait in its line until it is closed.
            for listening in (one for server in self._server.servers for one in server.sockets):
                with suppress(OSError):
                    socket.socket(fileno=os.dup(listening.fileno())).shutdown(socket.SHUT_RDWR)
        self._server.handle_exit(signal.SIGTERM, None)

    def _leave(self) -> None:
        log.error("requests have not ended in %g s; leaving without them", _LAST_S)
        os._exit(1)
