"""Containers of an image, in the podman or docker that works here."""

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from service import __version__
from tests.conftest import ROOT
from tests.ports import free_port

IMAGE = "localhost/lookalike-test"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
_BASE = "docker.io/library/python:3.11-slim"
_READY_S = 60


def find_tool() -> str:
    """Return podman or docker. Skips the test, loudly, where neither can run a container of our base image."""
    tried = []
    for tool in ("podman", "docker"):
        if shutil.which(tool) is None:
            tried.append(f"{tool} is not installed")
        elif subprocess.run([tool, "info"], capture_output=True, check=False).returncode:
            tried.append(f"{tool} has no engine")
        elif (
            subprocess.run([tool, "image", "inspect", _BASE], capture_output=True, check=False).returncode
            and subprocess.run([tool, "pull", "-q", _BASE], capture_output=True, check=False).returncode
        ):
            tried.append(f"{tool} cannot get {_BASE}")
        else:
            return tool
    pytest.skip(f"THE IMAGE WAS NOT TESTED: {'; '.join(tried)}")


def build(tool: str, image: str = IMAGE, *options: str) -> None:
    """Build the image of the checkout, as `make image` does."""
    # Podman's own format holds no HEALTHCHECK, and its cache takes layers of other arguments, such as the commit.
    form = ["--format", "docker", "--layers=false"] if tool == "podman" else []
    told = ["--build-arg", f"VERSION={__version__}", "--build-arg", f"COMMIT={COMMIT}"]
    done = subprocess.run(
        [tool, "build", *form, *told, *options, "-t", image, "."], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


class Container:
    """A container that serves, or that has ended.

    Attributes:
        tool: podman or docker.
        name: of the container.
        url: where it serves.
        ready_s: time from `run` to the first 200 of /readyz.
    """

    def __init__(self, tool: str, name: str, port: int) -> None:
        self.tool, self.name, self.url = tool, name, f"http://127.0.0.1:{port}"
        self.ready_s = 0.0

    def call(self, *command: str, check: bool = True) -> str:
        """Run a command of the tool and return what it printed. Raises AssertionError if it fails."""
        done = subprocess.run([self.tool, *command], capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def execute(self, *command: str, check: bool = True) -> str:
        """Run a command in the container and return what it printed."""
        return self.call("exec", self.name, *command, check=check)

    def state(self) -> dict[str, Any]:
        """Return what the tool knows of the container's state."""
        state: dict[str, Any] = json.loads(self.call("inspect", self.name))[0]["State"]
        return state

    def log(self) -> str:
        """Return what the container printed."""
        done = subprocess.run([self.tool, "logs", self.name], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def processes(self) -> dict[int, str]:
        """Return the processes of the container: their ids on this machine, and their commands."""
        top = ["top", self.name, *(("hpid", "args") if self.tool == "podman" else ("-o", "pid,args"))]
        lines = self.call(*top).splitlines()[1:]
        return {int(line.split(None, 1)[0]): line.split(None, 1)[1] for line in lines}

    def worker(self) -> int:
        """Return the id on this machine of the process that serves."""
        (found,) = [pid for pid, command in self.processes().items() if "worker" in command]
        return found

    def wait_until_ready(self) -> None:
        """Wait until /readyz is 200."""
        begin = time.monotonic()
        while time.monotonic() - begin < _READY_S:
            if ask(f"{self.url}/readyz")[0] == 200:
                return
            time.sleep(0.05)
        pytest.fail(f"not ready after {_READY_S} s:\n{self.log()}")

    def stop(self, grace_s: int = 30) -> int:
        """Ask it to end, and return its exit code."""
        self.call("stop", "-t", str(grace_s), self.name)
        code: int = self.state()["ExitCode"]
        return code

    def is_healthy(self) -> bool:
        """Run the image's health check once and return its verdict; docker runs it by itself, so this waits for it."""
        if self.tool == "podman":
            return subprocess.run(["podman", "healthcheck", "run", self.name], capture_output=True).returncode == 0
        time.sleep(45)
        return bool(self.state()["Health"]["Status"] == "healthy")


@contextmanager
def container(tool: str, *options: str, command: tuple[str, ...] = (), ready: bool = True) -> Iterator[Container]:
    """Run the image as the README says, with nothing that it can do without; remove it when the block ends.

    Args:
        tool: podman or docker.
        options: further options of `run`.
        command: in place of `serve`.
        ready: wait until it serves.
    """
    port = free_port()
    one = Container(tool, f"lookalike-test-{port}", port)
    hardened = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
    address = ("-p", f"127.0.0.1:{port}:{port}", "-e", f"LOOKALIKE_PORT={port}")
    begin = time.monotonic()
    one.call("run", "-d", "--name", one.name, *hardened, *address, *options, IMAGE, *command)
    try:
        if ready:
            one.wait_until_ready()
            one.ready_s = time.monotonic() - begin
        yield one
    finally:
        subprocess.run([tool, "rm", "-f", "-v", one.name], capture_output=True, check=False)


def run_once(tool: str, *arguments: str) -> tuple[int, str]:
    """Run the image until it ends, and return exit code and output. Arguments before "--" are options of `run`."""
    at = arguments.index("--")
    command = [tool, "run", "--rm", "--read-only", "--tmpfs", "/tmp", *arguments[:at], IMAGE, *arguments[at + 1 :]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "systemd" not in line]
    return done.returncode, "\n".join(ours)


@contextmanager
def volume(tool: str) -> Iterator[str]:
    """Make a volume, and remove it when the block ends."""
    name = f"lookalike-test-{os.urandom(4).hex()}"
    subprocess.run([tool, "volume", "create", name], capture_output=True, check=True)
    try:
        yield name
    finally:
        subprocess.run([tool, "volume", "rm", "-f", name], capture_output=True, check=False)


def ask(url: str, body: bytes | None = None, method: str | None = None, **headers: str) -> tuple[int, bytes]:
    """Send a request and return status and body of the answer; (0, b"") if there is none."""
    request = urllib.request.Request(url, body, {"Content-Type": "image/png", **headers}, method=method)
    with suppress(OSError):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return int(answer.status), bytes(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, error.read()
    return 0, b""


def readable(path: Path) -> Path:
    """Let the user of the image read a file or folder."""
    for each in (path, *path.rglob("*")):
        each.chmod(0o755 if each.is_dir() else 0o644)
    return path
