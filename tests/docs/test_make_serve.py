"""`make serve` in a copy of the files that git tracks: environment, demo gallery, service; then a user's folder."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, encoded, missing, scene
from tests.ports import free_port

pytestmark = pytest.mark.slow("installs an environment from the package index and starts the service four times")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the checkout that holds only the files that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    if not listed:
        missing("not a git checkout: clone the project to test what git tracks")
    copy = tmp_path_factory.mktemp("fresh") / "a checkout"
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@contextmanager
def served(checkout: Path, *variables: str) -> Iterator[tuple[dict[str, Any], Path]]:
    """Run `make serve`; yield the answer of /info and the log; stop the service with SIGINT."""
    port = free_port()
    log = checkout / "log"
    # A new user has no active virtual environment and none of our settings.
    clean = {key: value for key, value in os.environ.items() if not re.match("LOOKALIKE_|VIRTUAL_ENV|MAKE|MFLAGS", key)}
    with log.open("w") as output:
        command = ["make", "serve", f"PORT={port}", *variables]
        server = subprocess.Popen(
            command, cwd=checkout, env=clean, stdout=output, stderr=output, start_new_session=True
        )
    deadline = time.monotonic() + 240
    try:
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/info", timeout=5) as answer:
                    yield json.load(answer), log
                    return
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
    finally:
        os.killpg(server.pid, signal.SIGINT)
        server.wait(25)
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, "the port is still open"


def test_a_fresh_checkout_serves_the_demo_gallery_without_torch(checkout: Path) -> None:
    with served(checkout) as (info, log):
        assert (info["model"], info["count"], info["notice"]) == ("digits", 1797, None)
        assert "Lookalike on http://127.0.0.1:" in log.read_text()
    assert not list((checkout / ".venv-serve").glob("lib/*/site-packages/torch"))
    assert "Traceback" not in log.read_text()


def test_a_folder_of_ones_own_has_its_own_store(checkout: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my pictures"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.png").write_bytes(encoded(scene(seed=n)))
    (folder / "bad.jpg").write_bytes(b"no picture")
    with served(checkout, f"IMAGES={folder}") as (info, log):
        assert (info["model"], info["count"], info["notice"]) == ("photos", 3, None)
        text = log.read_text()
        assert "lookalike import efficientnet-lite0 --out .lookalike/models/photos" in text
        assert "skipped bad.jpg" in text
    with served(checkout, f"IMAGES={folder}", "MODEL=models/mnist") as (info, log):
        assert info["model"] == "mnist"
        assert "note: The encoder mnist was trained on mnist/train" in log.read_text()
        recommended = re.findall("`(.*?)`", info["notice"])
    assert len(recommended) == 1
    # The recommended command works with the environment that `make serve` has installed.
    done = subprocess.run(
        ["bash", "-c", f".venv-serve/bin/{recommended[0]}"],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "3 pictures are of the encoder .lookalike/models/photos now" in done.stderr
    assert not list((checkout / ".venv-serve").glob("lib/*/site-packages/torch"))


def test_what_cannot_be_served_ends_with_a_sentence(checkout: Path) -> None:
    done = subprocess.run(
        ["make", "serve", "IMAGES=nowhere"], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "lookalike: nowhere: no such source" in done.stderr
    assert "Traceback" not in done.stderr
