"""Decoding in a process of its own.

The decoders of TIFF, AVIF and HEIF do an amount of work that a file's header does not tell: a frame may be larger than
the picture that it is cut to, tiles may repeat without end. So they run in child processes whose processor time and
memory the kernel limits, and a decoder that crashes takes only its child along. A child serves one picture after
another and ends with its parent. Before the first it gives up all system calls but a few (sandbox.py), and its parent
believes no answer that it has not checked.
"""

import atexit
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pi_heif
from PIL import AvifImagePlugin, Image

import service.errors
from service.encoding import sandbox
from service.errors import LookalikeError, TooLarge, UndecodablePicture

# A child holds the file, the decoder's frame, the picture and its conversion. Of a picture of 25 megapixels these
# have up to 32 bytes a pixel.
_BYTES_A_PIXEL = 32
_LEAST_BYTES, _MOST_BYTES = 256_000_000, 2_000_000_000

# Pictures pass in a few large pieces; the usual 64 KB would cost a switch of processes each.
_PIPE_BYTES = 1 << 20

# A child that was taken over may stop its own timer, so its parent ends it after so many times the processor time that
# it may take, and some seconds for a machine that is busy.
_PATIENCE, _LEAST_PATIENCE_S = 20, 10.0

# An answer without its pixels has a few hundred bytes.
_MOST_ANSWER_BYTES = 100_000

# What a child gets of the environment begins with one of these: how Python and the C library start, and no secret.
_ENVIRONMENT = ("PYTHON", "PATH", "HOME", "LANG", "LC_", "LD_", "MALLOC_", "GLIBC_")

# The key, in the `info` of a decoded picture, of the width and height in its file; the picture may be smaller.
STORED_SIZE = "stored_size"

log = logging.getLogger("bentoml.lookalike")

_ROOT = Path(service.errors.__file__).parents[1]
# What Pillow imports only when a picture needs it; in the sandbox it could not.
_LAZY = "ImageColor, ImageOps, ImagePalette, JpegImagePlugin, TiffImagePlugin"
# The folder that the parent runs in may hold files that have the names of our packages.
_CHILD = [
    sys.executable,
    "-P",
    "-c",
    f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from PIL import {_LAZY}; "
    "from service.encoding import apart, images; "
    "apart.serve(images.decode_here)",
]


class Budget(NamedTuple):
    """What decoding one picture may take: seconds of processor time, and bytes of memory."""

    seconds: float
    memory_bytes: int

    @classmethod
    def of(cls, seconds: float, pixels: int) -> "Budget":
        """Return the budget for pictures of so many pixels."""
        return cls(seconds, min(max(_LEAST_BYTES, _BYTES_A_PIXEL * pixels), _MOST_BYTES))


def decode_apart(data: bytes, budget: Budget, **arguments: Any) -> Image.Image:
    """Return decode(data, **arguments) of a child process as an RGB picture.

    Raises:
        TooLarge: the budget was not enough.
        UndecodablePicture: the decoder crashed.
        LookalikeError: what `decode` raised.

    Cost: a copy of the file and of the pixels through pipes; the start of a child takes a quarter of a second.
    """
    child = _idle.pop() if _idle else _start_and_tell()
    watch = threading.Timer(_LEAST_PATIENCE_S + _PATIENCE * budget.seconds, child.kill)
    watch.daemon = True
    watch.start()
    try:
        answer, pixels = _ask(child, data, {"budget": budget, "arguments": arguments, "bytes": len(data)})
    except (OSError, ValueError) as error:
        # A child whose answer makes no sense may not end by itself.
        child.kill()
        status = _end(child)
        if status == -signal.SIGPROF:
            raise TooLarge(f"the picture takes more than {budget.seconds:g} s of processor time to decode") from error
        raise UndecodablePicture("the picture is damaged: its decoder failed") from error
    except BaseException:
        # An answer that is not read to its end would be taken for the next one.
        child.kill()
        _end(child)
        raise
    finally:
        watch.cancel()
    _idle.append(child)
    if "error" in answer:
        raise answer["error"](answer["says"])
    picture = Image.frombytes("RGB", answer["size"], pixels)
    picture.info[STORED_SIZE] = answer["stored_size"]
    return picture


def why_no_sandbox() -> str | None:
    """Start a child and return why the kernel gives it no sandbox; None if it is in one."""
    child, why = _start()
    _end(child)
    return why


def serve(decode: Callable[..., Image.Image]) -> None:
    """Answer requests on stdin until it closes: the main function of a child."""
    # Ctrl-C reaches the whole group of processes; the parent ends the child.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Another thread would have memory of its own, and pictures already run beside each other.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    pi_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
    # Imports the formats that Pillow would import before it opens its first picture.
    Image.preinit()
    # In the sandbox it could not be opened for each picture.
    memory = os.open("/proc/self/statm", os.O_RDONLY)
    # From here on no limit can be raised above this one.
    most = _most_memory(memory, 2 * _MOST_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sink.write(json.dumps({"no_sandbox": sandbox.enter()}).encode() + b"\n")
    sink.flush()
    for line in source:
        request = json.loads(line)
        answer, pixels = _decode(decode, source.read(request["bytes"]), Budget(*request["budget"]), request, memory)
        sink.write(json.dumps(answer).encode() + b"\n" + pixels)
        sink.flush()


def _decode(
    decode: Callable[..., Image.Image], data: bytes, budget: Budget, request: dict[str, Any], memory: int
) -> tuple[dict[str, Any], bytes]:
    """Return the answer to a request, and the pixels that follow it."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (_most_memory(memory, budget.memory_bytes), hard))
    # The kernel ends the process when the time is up, whatever the decoder is at.
    signal.setitimer(signal.ITIMER_PROF, budget.seconds)
    try:
        picture = decode(data, **request["arguments"])
        return {"size": picture.size, "stored_size": picture.info[STORED_SIZE]}, picture.tobytes()
    except LookalikeError as error:
        if isinstance(error.__cause__, MemoryError):
            return _too_much_memory(budget), b""
        return {"error": type(error).__name__, "says": str(error)}, b""
    except MemoryError:
        return _too_much_memory(budget), b""
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _too_much_memory(budget: Budget) -> dict[str, Any]:
    says = f"the picture takes more than {budget.memory_bytes // 1_000_000} MB of memory to decode"
    return {"error": TooLarge.__name__, "says": says}


def _most_memory(memory: int, more: int) -> int:
    """Return the bytes of address space in use and so many more, up to the hard limit; memory is the open statm."""
    most = int(os.pread(memory, 100, 0).split()[0]) * resource.getpagesize() + more
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    return most if hard == resource.RLIM_INFINITY else min(most, hard)


def _ask(child: "subprocess.Popen[bytes]", data: bytes, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Send a request to a child and return its answer and the pixels, none with an error.

    Raises:
        OSError, ValueError: the child has died, or what it says is no answer.
    """
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps(request).encode() + b"\n" + data)
    child.stdin.flush()
    try:
        answer, size = _checked(json.loads(child.stdout.readline(_MOST_ANSWER_BYTES)), request["budget"])
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("the answer has another form") from error
    pixels = child.stdout.read(size)
    if len(pixels) < size:
        raise ValueError("the answer is cut short")
    return answer, pixels


def _checked(answer: Any, budget: Budget) -> tuple[dict[str, Any], int]:
    """Return an answer and the bytes of its pixels, if it is one that `_decode` gives."""
    if "error" in answer:
        error = getattr(service.errors, answer["error"])
        if isinstance(error, type) and issubclass(error, LookalikeError) and isinstance(answer["says"], str):
            return {"error": error, "says": answer["says"]}, 0
        raise ValueError("an error that is none of ours")
    (width, height), stored = answer["size"], answer["stored_size"]
    sides = (width, height, *stored)
    if len(stored) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError("a size that no picture has")
    if 3 * width * height > budget.memory_bytes:
        raise ValueError("a picture larger than the child's memory")
    return {"size": (width, height), "stored_size": tuple(stored)}, 3 * width * height


def _start() -> tuple["subprocess.Popen[bytes]", str | None]:
    """Start a child and wait until it is ready for pictures; return it, and why it has no sandbox, if so."""
    # libtiff warns on stderr. Idle threads of a matrix library would count as memory.
    few = {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}
    few["OPENBLAS_NUM_THREADS"] = "1"
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    child = subprocess.Popen(_CHILD, stdin=pipe, stdout=pipe, stderr=nowhere, pipesize=_PIPE_BYTES, env=few)  # noqa: S603
    assert child.stdout is not None
    try:
        why: str | None = json.loads(child.stdout.readline())["no_sandbox"]
    except ValueError as error:
        status = _end(child)
        raise UndecodablePicture(f"the process that decodes pictures ended at its start, status {status}") from error
    return child, why


def _start_and_tell() -> "subprocess.Popen[bytes]":
    """Start a child; say in the log, once, if it has no sandbox."""
    child, why = _start()
    if why is not None and why not in _told:
        _told.add(why)
        log.warning("TIFF, AVIF and HEIF are decoded without a sandbox: %s", why)
    return child


def _end(child: "subprocess.Popen[bytes]") -> int:
    """Close a child's pipes, which ends it, and return its exit status."""
    for pipe in (child.stdin, child.stdout):
        # Closing writes what is buffered, to a child that may be gone.
        with suppress(OSError):
            pipe.close()  # type: ignore[union-attr]
    return child.wait()


def _end_all() -> None:
    while _idle:
        _end(_idle.pop())


# The warnings that are in the log.
_told: set[str] = set()
# Lists are popped and appended to by several threads at once. A process that was forked must not share its parent's.
_idle: list["subprocess.Popen[bytes]"] = []
os.register_at_fork(after_in_child=_idle.clear)
atexit.register(_end_all)
