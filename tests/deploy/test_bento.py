"""A bento is built from the checkout, and serves its own code with its own encoder."""

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.ports import free_port
from tests.serving import wait_until_ready

ROOT = Path(__file__).parents[2]
BENTOML = Path(sys.executable).with_name("bentoml")


@pytest.mark.slow("builds a bento and serves it")
def test_a_built_bento_serves(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LOOKALIKE_", "BENTOML_"))}
    environment |= {"BENTOML_HOME": str(tmp_path / "home"), "BENTOML_DO_NOT_TRACK": "True"}
    subprocess.run([BENTOML, "build"], cwd=ROOT, env=environment, check=True, capture_output=True)
    (bento,) = (path for path in (tmp_path / "home" / "bentos" / "lookalike-search").iterdir() if path.is_dir())
    code = bento / "src"
    # The folder exists if the checkout has made its encoder.
    packed = {path.name for path in code.iterdir()} - {".lookalike"}
    assert packed == {"bentofile.yaml", "lookalike.py", "pyproject.toml", "requirements", "service"}
    assert not list(code.rglob("*.pyc"))

    # A file that only the bento has shows that its code is served, and not the installed code of the checkout.
    (code / "service" / "page" / "whose.txt").write_text("the bento's")
    environment["LOOKALIKE_STORE"] = str(tmp_path / "store")
    with serving(f"lookalike-search:{bento.name}", tmp_path, environment) as url:
        info = json.loads(fetch(f"{url}/info"))
        assert fetch(f"{url}/page/whose.txt") == b"the bento's"
    card = json.loads((code / ".lookalike" / "models" / "photos" / "card.json").read_text())
    assert (info["model"], info["fingerprint"], info["count"]) == ("photos", card["fingerprint"], 0)
    assert (tmp_path / "store" / "catalog.sqlite").exists()
    assert [path.name for path in (code / ".lookalike").iterdir()] == ["models"]


@contextmanager
def serving(bento: str, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """Serve a bento on a free port until it is ready, and end every process of it afterwards."""
    port = free_port()
    command = [str(BENTOML), "serve", bento, "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "serve.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", server, folder / "serve.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        # Workers have sessions of their own and survive their parent's death: each is ended by its id.
        workers = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
        server.terminate()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
        for worker in psutil.wait_procs(workers, timeout=5)[1]:
            worker.kill()
    assert server.wait() == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, f"port {port} is still open"


def fetch(url: str) -> bytes:
    """Return the body of a GET that answers 200; raises OSError otherwise. No proxy is asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=5) as response:
        assert response.status == 200
        return bytes(response.read())
