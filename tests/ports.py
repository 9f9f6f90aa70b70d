"""TCP ports for services that a test or a benchmark starts."""

import secrets
import socket
from contextlib import suppress


def free_port() -> int:
    """Return a free TCP port of 127.0.0.1 that no process gets unless it asks for it by number.

    A port that the kernel chose may be chosen again before the service listens on it: BentoML's process manager asks
    the kernel for two more while it starts.
    """
    while True:
        # Linux chooses from 32768 to 60999.
        port = secrets.choice(range(10_000, 32_768))
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
