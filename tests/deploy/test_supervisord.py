"""The service under the real supervisord with deploy/supervisord.conf, and what systemd says of its unit."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from shutil import which
from typing import Any

import psutil
import pytest

from service.lifetime import _LAST_S
from tests.conftest import MODEL, ROOT, encoded, scene
from tests.deploy.proxies import changed, until
from tests.ports import free_port
from tests.serving import LOOKALIKE, status_of

OLD, NEW = "an-old-key-of-ours", "a-new-key-of-ours!"
UNIT = ROOT / "deploy" / "systemd" / "lookalike.service"

# What Debian's supervisord.conf has around conf.d/, with every file in one folder.
_MAIN = """
[unix_http_server]
file=%(here)s/supervisor.sock
[supervisord]
nodaemon=true
logfile=%(here)s/supervisord.log
pidfile=%(here)s/supervisord.pid
childlogdir=%(here)s
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://%(here)s/supervisor.sock
[include]
files = lookalike.conf
"""


class Supervised:
    """A service under supervisord.

    Attributes:
        address: of the service.
        keys: the file of its API keys.
        log: supervisord's own.
    """

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.address, self.keys = f"http://127.0.0.1:{port}", folder / "keys"
        self.log, self._main = folder / "supervisord.log", folder / "supervisord.conf"
        self.keys.write_text(f"write:{OLD}\n")
        self._main.write_text(_MAIN)
        changes = {
            "/opt/lookalike/.venv-serve/bin/lookalike serve": f"{LOOKALIKE} serve --model {MODEL} --variant fp32",
            "--port 3000": f"--port {port}",
            # The test's own user runs it.
            "user=lookalike\n": "",
            "directory=/var/lib/lookalike\n": f"directory={folder}\n",
            'HOME="/var/lib/lookalike"': f'HOME="{folder}"',
            "/var/lib/lookalike/store": f"{folder}/store",
            "/etc/lookalike/keys": str(self.keys),
            "/var/log/supervisor/lookalike.log": f"{folder}/lookalike.log",
        }
        (folder / "lookalike.conf").write_text(changed("supervisord.conf", changes))
        program = Path(sys.executable).with_name("supervisord")
        self._server = subprocess.Popen([program, "-c", self._main], stdout=subprocess.DEVNULL)

    def control(self, *words: str) -> str:
        """Return what supervisorctl says."""
        command = [str(Path(sys.executable).with_name("supervisorctl")), "-c", str(self._main), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout

    def pid(self) -> int:
        return int(self.control("pid", "lookalike"))

    def wait(self, *other_than: int) -> list[psutil.Process]:
        """Wait until the service is ready, and return its processes, the main one first.

        Args:
            other_than: a main process that it was before, whose worker may still answer.
        """
        tree: list[psutil.Process] = []

        def ready() -> bool:
            with suppress(OSError, ValueError, psutil.NoSuchProcess):
                main = psutil.Process(self.pid())
                tree[:] = [main, *main.children(recursive=True)]
                # A main process with a worker has the port.
                return main.pid not in other_than and len(tree) > 1 and status_of(f"{self.address}/readyz") == 200
            return False

        until(ready)
        return tree

    def ask(self, key: str, path: str, body: bytes | None = None, method: str = "GET") -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "image/png"}
        request = urllib.request.Request(self.address + path, body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status), json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, None

    def close(self) -> None:
        tree = psutil.Process(self._server.pid).children(recursive=True)
        self._server.terminate()
        self._server.wait(60)
        for process in psutil.wait_procs(tree, timeout=5)[1]:
            process.kill()


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    service = Supervised(tmp_path)
    yield service
    service.close()


@pytest.mark.slow("starts a service")
def test_keys_are_read_again_and_a_stop_leaves_nothing(supervised: Supervised) -> None:
    tree = supervised.wait()
    assert [supervised.ask(key, "/info")[0] for key in (OLD, NEW)] == [200, 401]
    supervised.keys.write_text(f"write:{NEW}\n")
    assert supervised.control("signal", "HUP", "lookalike") == "lookalike: signalled\n"
    until(lambda: supervised.ask(NEW, "/info")[0] == 200, 30)
    assert supervised.ask(OLD, "/info")[0] == 401
    # No process was started again.
    assert {process.pid for process in supervised.wait()} == {process.pid for process in tree}

    assert supervised.control("stop", "lookalike") == "lookalike: stopped\n"
    assert "stopped: lookalike (exit status 0)" in supervised.log.read_text()
    assert psutil.wait_procs(tree, timeout=1)[1] == []
    with pytest.raises(urllib.error.URLError):
        supervised.ask(NEW, "/info")
    assert "STOPPED" in supervised.control("status", "lookalike")


@pytest.mark.slow("starts a service twice")
def test_a_killed_main_process_is_started_again(supervised: Supervised) -> None:
    tree = supervised.wait()
    assert supervised.ask(OLD, "/images/a", encoded(scene()), "PUT")[0] == 201
    os.kill(tree[0].pid, signal.SIGKILL)
    supervised.wait(tree[0].pid)
    assert supervised.ask(OLD, "/info")[1]["count"] == 1
    assert supervised.ask(OLD, "/images/b", encoded(scene()), "PUT")[0] == 201
    # The worker of the killed process has ended by itself.
    assert psutil.wait_procs(tree, timeout=1)[1] == []


@pytest.mark.parametrize("name", ["lookalike.service", "lookalike@3001.service"])
def test_systemd_accepts_the_unit(name: str, tmp_path: Path) -> None:
    if which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze: it comes with Debian's package systemd")
    # It looks for the program of the unit.
    written = UNIT.read_text().replace("/opt/lookalike/.venv-serve/bin/lookalike", str(LOOKALIKE))
    assert str(LOOKALIKE) in written
    if "@" in name:
        # The unit of replicas, as docs/operations.md makes it.
        command = "sed 's/--port 3000/--no-store --port %i/' deploy/systemd/lookalike.service"
        assert command in (ROOT / "docs" / "operations.md").read_text()
        written = written.replace("--port 3000", "--no-store --port %i")
        assert "--no-store --port %i\n" in written
    unit = tmp_path / name
    unit.write_text(written)
    verified = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    # From 0, isolated, to 100; the default of a unit is 96.
    secured = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(unit)]
    done = subprocess.run(secured, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_supervisors_wait_longer_than_the_service_takes_to_end() -> None:
    waits = ("TimeoutStopSec=30\n" in UNIT.read_text(), "stopwaitsecs=30\n" in changed("supervisord.conf", {}))
    assert waits == (True, True)
    assert _LAST_S < 30
