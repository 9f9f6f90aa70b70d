"""How a worker process ends: it becomes not ready, refuses connections, answers what it accepted, and exits."""

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address
from types import FrameType
from typing import Any

log = logging.getLogger("bentoml.lookalike")

# A load balancer that polls /readyz sees the change before connections are refused.
_SEEN_S = 1.0
# A request that takes longer is taken to hang.
_LAST_S = 24.0
# Interval of the checks that the parent is alive, and time for the requests to end if it is not.
_LOOK_S = 0.25
_ORPHAN_S = 1.0


def correct_the_parent() -> None:
    """Let BentoML's parent pass SIGHUP on to its workers, and send no packet.

    Its process manager would start the workers again, which a store's lock and a port forbid, and end with exit code 0.
    It also asks DNS for the name of its own machine, which takes ten seconds where no server answers.
    """
    from circus.sighandler import SysHandler

    def forward(handler: Any) -> None:
        for watcher in handler.controller.arbiter.iter_watchers():
            for pid in list(watcher.processes):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGHUP)

    SysHandler.handle_hup = forward
    socket.getfqdn = lambda name="": name or socket.gethostname()


class Lifetime:
    """Ends one worker process in order, when it gets SIGTERM or when its parent is gone.

    BentoML's parent sends SIGTERM to its workers and waits a day for their end. A parent that is killed sends nothing,
    and its worker would keep the port and the store's lock.

    Attributes:
        ending: whether the worker is ending; it is not ready then.
    """

    def __init__(self, alone: bool, announce: Callable[[str], None]) -> None:
        """Catch SIGTERM and watch the parent, if uvicorn runs this process; any other process stays untouched.

        Args:
            alone: whether no other worker listens on the same socket.
            announce: is called on another thread with the URL at which this machine reaches the process, once it
                listens.
        """
        self._announce = announce
        self.ending = False
        self._alone = alone
        self._parent = os.getppid()
        handler = signal.getsignal(signal.SIGTERM)
        # uvicorn has set its server's handle_exit as the handler.
        self._server: Any = getattr(handler, "__self__", None)
        if threading.current_thread() is threading.main_thread() and hasattr(self._server, "handle_exit"):
            self._loop = asyncio.get_running_loop()
            signal.signal(signal.SIGTERM, self._on_signal)
            threading.Thread(target=self._watch_parent, name="lifetime", daemon=True).start()

    def _on_signal(self, _: int, __: FrameType | None) -> None:
        if not self.ending:
            self._loop.call_soon_threadsafe(self._end, _SEEN_S, _LAST_S)

    def _watch_parent(self) -> None:
        announced = False
        while os.getppid() == self._parent:
            if not announced and (url := self._url()) is not None:
                announced = True
                self._announce(url)
            time.sleep(_LOOK_S)
        log.error("the process that started this one is gone; so this one ends, too")
        self._loop.call_soon_threadsafe(self._end, 0, _ORPHAN_S)
        time.sleep(_ORPHAN_S)
        # The event loop may be blocked, so the process does not wait for it.
        os._exit(1)

    def _url(self) -> str | None:
        """Return the URL of the socket on which uvicorn listens; None before it does."""
        listening = [one for server in self._server.servers for one in server.sockets] if self._server.started else []
        if not listening:
            return None
        host, port, *_ = listening[0].getsockname()
        # An address for all interfaces is reached through that of the machine itself.
        if (address := ip_address(host)).is_unspecified:
            host = "127.0.0.1" if address.version == 4 else "::1"
        scheme = "https" if self._server.config.is_ssl else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    def _end(self, seen_s: float, last_s: float) -> None:
        self.ending = True
        log.info("ending: not ready any more; what was accepted is answered first")
        self._loop.call_later(seen_s, self._refuse)
        last = threading.Timer(last_s, self._leave)
        last.daemon = True
        last.start()

    def _refuse(self) -> None:
        if self._alone:
            # The parent holds this socket, too: without a shutdown, connections would wait in its queue.
            for listening in (one for server in self._server.servers for one in server.sockets):
                with suppress(OSError):
                    socket.socket(fileno=os.dup(listening.fileno())).shutdown(socket.SHUT_RDWR)
        self._server.handle_exit(signal.SIGTERM, None)

    def _leave(self) -> None:
        log.error("requests have not ended in %g s; leaving without them", _LAST_S)
        os._exit(1)
