"""The example that each verb's --help shows: it runs, one after the other in a folder of the user's own."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import lookalike
from service.sources import open_source
from tests.conftest import ROOT
from tests.ports import free_port
from tests.serving import LOOKALIKE, wait_until_ready
from tests.test_lookalike import run


def verbs(command: Any = None, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the name and the example of each verb, in the order of --help."""
    command = command or typer.main.get_command(lookalike.cli)
    subcommands = getattr(command, "commands", {})
    for key, verb in subcommands.items():
        yield from verbs(verb, f"{name} {key}".strip())
    if not subcommands:
        yield name, command.epilog or ""


def test_every_verb_has_an_example_of_itself() -> None:
    found = dict(verbs())
    assert len(found) >= 20
    for name, example in found.items():
        assert f"Example: lookalike {name} " in example, name


@pytest.mark.slow("trains, whitens, indexes and serves in one go")
@pytest.mark.timeout(900)
def test_the_examples_run_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(shutil.copytree(ROOT / "models", tmp_path / "shipped"))
    (tmp_path / "seven.png").write_bytes(open_source("digits").entry(7).data)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LOOKALIKE_")}
    for name, example in verbs():
        arguments = shlex.split(example.removeprefix("Example: "))[1:]
        if name in ("serve", "try"):
            serves([str(LOOKALIKE), *arguments], tmp_path, environment)
            continue
        done = run(*arguments, cwd=tmp_path)
        if name == "store copy":
            # It needs a Milvus server; tests/scale copies to one.
            assert done.returncode == 2 and re.search(r"install the extra milvus|cannot be reached", done.stderr), done
            continue
        assert done.returncode == 0, (example, done.stdout, done.stderr)
    assert (tmp_path / "duplicates.html").exists()


def serves(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Check that a command serves until it is interrupted, and opens its page in the user's browser."""
    port, opened, browser = free_port(), folder / "opened", folder / "browser"
    opened.unlink(missing_ok=True)
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {shlex.quote(str(opened))}\n')
    browser.chmod(0o755)
    environment |= {"LOOKALIKE_PORT": str(port), "DISPLAY": ":0", "BROWSER": f"{browser} %s"}
    log = folder / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", server, log)
        deadline = time.monotonic() + 30
        while command[1] == "try" and not (opened.exists() and opened.read_text()):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0, log.read_text()
    if command[1] == "try":
        assert opened.read_text() == f"http://127.0.0.1:{port}/"
    else:
        assert not opened.exists()
