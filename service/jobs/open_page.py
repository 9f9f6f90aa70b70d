"""Open the page of a service that is starting in the user's browser: `python -m service.jobs.open_page URL`."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser
from contextlib import suppress

_TIMEOUT_S = 120


def open_page_later(url: str) -> None:
    """Start a process that opens the page at `url` once the service is ready.

    Without a desktop it does nothing: a browser in the terminal would take it from the service's log.
    """
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return
    # The shell ends at once, so that the process is no child of the service.
    command = [sys.executable, "-m", "service.jobs.open_page", url]
    subprocess.run(["/bin/sh", "-c", '"$@" >/dev/null 2>&1 &', "sh", *command], check=True)  # noqa: S603


def _wait_and_open(url: str) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(OSError), direct.open(f"{url}/readyz", timeout=5):
            webbrowser.open(f"{url}/")
            return
        time.sleep(0.3)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        _wait_and_open(sys.argv[1])
