"""Run the real nginx and the real Caddy with a file of deploy/, on free ports and with files of a test."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import ROOT, missing

# What Debian's nginx.conf has around conf.d/, with every file in one folder.
_NGINX = """
user root;
daemon off;
pid nginx.pid;
error_log error.log;
events {}
http {
    log_format replicas '$request_method $uri $status $upstream_status';
    access_log access.log replicas;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    include lookalike.conf;
}
"""


@contextmanager
def nginx(folder: Path, shipped: str, port: int, changes: Mapping[str, str]) -> Iterator[None]:
    """Run nginx with a file of deploy/ until the block ends.

    Args:
        folder: gets nginx's files; access.log is among them.
        shipped: the file's name.
        port: one at which it listens.
        changes: what stands in the shipped file once, and what stands there instead.
    """
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        missing("no nginx: install Debian's package nginx")
    (folder / "lookalike.conf").write_text(changed(shipped, changes))
    (folder / "nginx.conf").write_text(_NGINX)
    with _running([program, "-p", str(folder), "-c", str(folder / "nginx.conf")], folder / "nginx.log", port):
        yield


@contextmanager
def caddy(folder: Path, shipped: str, port: int, changes: Mapping[str, str]) -> Iterator[None]:
    """Run Caddy as `nginx` runs nginx. Its port for administration is closed."""
    program = shutil.which("caddy")
    if program is None:
        missing("no Caddy: install Debian's package caddy")
    (folder / "Caddyfile").write_text(changed(shipped, changes))
    command = [program, "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]
    # It keeps its own files below these.
    home = {name: str(folder / "caddy") for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME")}
    with _running(command, folder / "caddy.log", port, **home):
        yield


def changed(shipped: str, changes: Mapping[str, str]) -> str:
    """Return a file of deploy/ with other text in place of what stands in it once."""
    written = (ROOT / "deploy" / shipped).read_text()
    for ours, theirs in changes.items():
        assert written.count(ours) == 1, ours
        written = written.replace(ours, theirs)
    return written


@contextmanager
def _running(command: Sequence[str], log: Path, port: int, **environment: str) -> Iterator[None]:
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
    try:
        until(lambda: _listens(port) or server.poll() is not None)
        assert server.poll() is None, log.read_text()
        yield
    finally:
        server.terminate()
        server.wait(30)


def until(holds: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until a condition holds. Fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
