"""Milvus Lite as a server in a process of its own, which tests stop and start again; it may ask for a token."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from milvus_lite.adapter.grpc.servicer import MilvusServicer
from milvus_lite.db import MilvusLite
from pymilvus.grpc_gen import milvus_pb2_grpc

from tests.ports import free_port


class Server:
    """A server of Milvus Lite on a port that stays the same.

    Attributes:
        url: of the collection `pictures`, as --store takes it.
    """

    def __init__(self, folder: Path) -> None:
        self._command = [sys.executable, "-m", __spec__.name, str(folder / "lite.db"), str(port := free_port())]
        self.url = f"milvus://127.0.0.1:{port}/pictures"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the server, and wait until it listens."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert "listening" in self._process.stdout.readline()

    def kill(self) -> None:
        """End the server as SIGKILL does."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@contextmanager
def milvus_server(folder: Path) -> Iterator[Server]:
    """Run a server until the block ends."""
    server = Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


class _AsksForToken(grpc.ServerInterceptor):  # type: ignore[misc]
    """Answers calls without the token as a Milvus cluster does."""

    def intercept_service(self, go_on: Any, call: Any) -> Any:
        given = dict(call.invocation_metadata).get("authorization", "")
        # pymilvus sends the token in base64.
        if given == "cm9vdDpzZWNyZXQ=":
            return go_on(call)

        def refuse(_: Any, context: Any) -> None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "auth check failure, please check user and password")

        return grpc.unary_unary_rpc_method_handler(refuse)


@contextmanager
def guarded_server(folder: Path) -> Iterator[str]:
    """Run a server in this process that asks for the token root:secret; yield its URL."""
    database = MilvusLite(str(folder / "guarded.db"))
    server = grpc.server(ThreadPoolExecutor(4), interceptors=[_AsksForToken()])
    milvus_pb2_grpc.add_MilvusServiceServicer_to_server(MilvusServicer(database), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"milvus://127.0.0.1:{port}/pictures"
    finally:
        server.stop(0).wait()
        database.close()


if __name__ == "__main__":
    from milvus_lite.adapter.grpc.server import run_server

    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    run_server(sys.argv[1], "127.0.0.1", int(sys.argv[2]))
