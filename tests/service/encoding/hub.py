"""A small server that speaks the protocol of Hugging Face's hub, as huggingface_hub asks it."""

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.conftest import ROOT

Repositories = dict[str, dict[str, bytes]]
"""The files of repositories, by their names; both are paths with /."""

BRANCHES = ("main", "v2")
# Names of repositories that the hub does not show to strangers: its status and the code that tells why.
CLOSED = {"org/gated": (403, "GatedRepo"), "org/private": (401, "RepoNotFound"), "org/forbidden": (403, "")}


def commit_of(name: str) -> str:
    """Return the sha of a repository's one commit."""
    return hashlib.sha1(name.encode()).hexdigest()


class _Answers(BaseHTTPRequestHandler):
    server: "_Server"
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = urlsplit(self.path).path
        self.server.asked.append(f"{self.command} {path}")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        status, content, headers = self._look_up(name, rest)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _look_up(self, name: str, rest: list[str]) -> tuple[int, bytes, dict[str, str]]:
        files, commit = self.server.repositories.get(name), commit_of(name)
        if name in CLOSED:
            status, code = CLOSED[name]
            return status, b"", {"X-Error-Code": code} if code else {}
        if files is None:
            return HTTPStatus.NOT_FOUND, b"", {"X-Error-Code": "RepoNotFound"}
        kind, revision, *inner = rest or ["revision", "main"]
        if revision not in (*BRANCHES, commit):
            return HTTPStatus.NOT_FOUND, b"", {"X-Error-Code": "RevisionNotFound"}
        if kind == "resolve":
            file = "/".join(inner)
            if file not in files:
                return HTTPStatus.NOT_FOUND, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            tag = hashlib.sha256(files[file]).hexdigest()
            return HTTPStatus.OK, files[file], {"ETag": f'"{tag}"', "X-Repo-Commit": commit}
        found: Any = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
        if kind == "tree":
            found = [{"type": "file", "path": file, "size": len(data), "oid": "0"} for file, data in files.items()]
        return HTTPStatus.OK, json.dumps(found).encode(), {"Content-Type": "application/json"}

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


class _Server(ThreadingHTTPServer):
    def __init__(self, repositories: Repositories) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repositories, self.asked = repositories, list[str]()


@contextmanager
def local_hub(repositories: Repositories) -> Iterator[tuple[str, list[str]]]:
    """Serve repositories; yield the address and the list of requests so far."""
    server = _Server(repositories)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run_imports(folder: Path, endpoint: str, *commands: list[str], **more: str) -> list[tuple[int, str]]:
    """Run `lookalike import` with these arguments, one after the other, in one process without torch.

    Args:
        folder: the working directory, and the place of huggingface_hub's cache.
        endpoint: the hub's address.
        commands: the arguments of each.
        more: environment variables.

    Returns:
        The exit code and stderr of each command.
    """
    program = (
        "import contextlib, io, json, sys\n"
        "sys.modules.update(torch=None, transformers=None, training=None)\n"
        "import lookalike\n"
        "done = []\n"
        "for arguments in json.loads(sys.argv.pop()):\n"
        "    sys.argv[1:] = ['import', *arguments]\n"
        "    said, code = io.StringIO(), 0\n"
        "    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):\n"
        "        try:\n"
        "            lookalike.main()\n"
        "        except SystemExit as end:\n"
        "            code = end.code or 0\n"
        "    done.append((code, said.getvalue()))\n"
        "print(json.dumps(done))\n"
    )
    environment = {
        "PATH": "",
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
        "HF_HOME": str(folder / "cache"),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **more,
    }
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(commands)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [(code, said) for code, said in json.loads(done.stdout)]
