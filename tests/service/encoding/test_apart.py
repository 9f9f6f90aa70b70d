"""Decoders in processes of their own: same errors, limits on time and memory, no harm from a crash."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from service.encoding import apart
from service.encoding.images import decode
from service.encoding.limits import Limits
from service.errors import TooLarge, UndecodablePicture
from tests.conftest import encoded, scene
from tests.heif import heic

TIFF = encoded(scene(), "TIFF")


def test_time_and_memory_are_limited() -> None:
    large = encoded(scene(3000, 2000), "AVIF", quality=90, speed=10)
    with pytest.raises(TooLarge, match=r"more than 0.01 s of processor time"):
        decode(large, 28, replace(Limits(), max_decode_s=0.01))
    arguments = {"side": 28, "limits": {}}
    with pytest.raises(TooLarge, match="more than 20 MB of memory"):
        apart.decode_apart(encoded(scene(3000, 2000), "TIFF"), apart.Budget(5, 20_000_000), **arguments)
    assert decode(large, 28, Limits()).size == (3000, 2000)
    with pytest.raises(TooLarge, match="3000x2000; the limit is 1000000 pixels"):
        decode(large, 28, replace(Limits(), max_pixels=1_000_000))


def test_a_child_that_dies_costs_one_picture() -> None:
    decode(TIFF, 28, Limits())
    for child in list(apart._idle):
        os.kill(child.pid, signal.SIGSEGV)
        child.wait()
        with pytest.raises(UndecodablePicture, match="its decoder failed"):
            decode(TIFF, 28, Limits())
    assert decode(TIFF, 28, Limits()).tobytes() == scene().tobytes()


def test_many_threads_decode_at_once() -> None:
    files = [TIFF, encoded(scene(), "AVIF"), heic(), b"II*\0 nonsense"] * 6

    def read(data: bytes) -> object:
        try:
            return np.asarray(decode(data, 28, Limits())).tobytes()
        except UndecodablePicture as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(read, files))
    assert outcomes == outcomes[:4] * 6
    assert outcomes[0] == scene().tobytes()


@pytest.mark.slow("starts two interpreters")
def test_children_end_with_their_parent_and_do_not_import_from_its_folder(tmp_path: object) -> None:
    program = (
        "import os; from service.encoding import apart, images; import sys; sys.stdin.buffer.peek\n"
        "data = sys.stdin.buffer.read(); images.decode(data, 28, images.Limits())\n"
        "print(apart._idle[0].pid, flush=True); os.kill(os.getpid(), 9)"
    )
    (tmp_path / "service.py").write_text("raise SystemExit(7)")  # type: ignore[operator]
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, input=TIFF, cwd=str(tmp_path), capture_output=True, check=False)
    child = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        subprocess.run(["sleep", "0.1"], check=True)
    raise AssertionError("expected the child to end with its parent")
