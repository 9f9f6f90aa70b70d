"""Decoding in a process of its own.

The decoders of TIFF, AVIF and HEIF do an amount of work that a file's header does not tell: a frame may be larger than
the picture that it is cut to, tiles may repeat without end. So they run in child processes whose processor time and
memory the kernel limits, and a decoder that crashes takes only its child along. A child serves one picture after
another and ends with its parent.
"""

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pi_heif
from PIL import AvifImagePlugin, Image

import service.errors
from service.errors import LookalikeError, TooLarge, UndecodablePicture

# A child holds the file, the decoder's frame, the picture and its conversion. Of a picture of 25 megapixels these
# have up to 32 bytes a pixel.
_BYTES_A_PIXEL = 32
_LEAST_BYTES, _MOST_BYTES = 256_000_000, 2_000_000_000

# Pictures pass in a few large pieces; the usual 64 KB would cost a switch of processes each.
_PIPE_BYTES = 1 << 20

# The key, in the `info` of a decoded picture, of the width and height in its file; the picture may be smaller.
STORED_SIZE = "stored_size"

_ROOT = Path(service.errors.__file__).parents[1]
# The folder that the parent runs in may hold files that have the names of our packages.
_CHILD = [
    sys.executable,
    "-P",
    "-c",
    f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from service.encoding import apart, images; "
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
    child = _idle.pop() if _idle else _start()
    try:
        answer, pixels = _ask(child, data, {"budget": budget, "arguments": arguments, "bytes": len(data)})
    except (OSError, ValueError) as error:
        status = _end(child)
        if status == -signal.SIGPROF:
            raise TooLarge(f"the picture takes more than {budget.seconds:g} s of processor time to decode") from error
        raise UndecodablePicture("the picture is damaged: its decoder failed") from error
    except BaseException:
        # An answer that is not read to its end would be taken for the next one.
        child.kill()
        _end(child)
        raise
    _idle.append(child)
    if "error" in answer:
        raise getattr(service.errors, answer["error"])(answer["says"])
    picture = Image.frombytes("RGB", tuple(answer["size"]), pixels)
    picture.info[STORED_SIZE] = tuple(answer["stored_size"])
    return picture


def serve(decode: Callable[..., Image.Image]) -> None:
    """Answer requests on stdin until it closes: the main function of a child."""
    # Ctrl-C reaches the whole group of processes; the parent ends the child.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Another thread would have memory of its own, and pictures already run beside each other.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    pi_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    for line in source:
        request = json.loads(line)
        answer, pixels = _decode(decode, source.read(request["bytes"]), Budget(*request["budget"]), request)
        sink.write(json.dumps(answer).encode() + b"\n" + pixels)
        sink.flush()


def _decode(
    decode: Callable[..., Image.Image], data: bytes, budget: Budget, request: dict[str, Any]
) -> tuple[dict[str, Any], bytes]:
    """Return the answer to a request, and the pixels that follow it."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + budget.memory_bytes, resource.RLIM_INFINITY))
    # The kernel ends the process when the time is up, whatever the decoder is at.
    signal.setitimer(signal.ITIMER_PROF, budget.seconds)
    try:
        picture = decode(data, **request["arguments"])
        pixels = picture.tobytes()
        stored_size = picture.info[STORED_SIZE]
        return {"size": picture.size, "stored_size": stored_size, "bytes": len(pixels)}, pixels
    except LookalikeError as error:
        if isinstance(error.__cause__, MemoryError):
            return _too_much_memory(budget), b""
        return {"error": type(error).__name__, "says": str(error), "bytes": 0}, b""
    except MemoryError:
        return _too_much_memory(budget), b""
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _too_much_memory(budget: Budget) -> dict[str, Any]:
    says = f"the picture takes more than {budget.memory_bytes // 1_000_000} MB of memory to decode"
    return {"error": TooLarge.__name__, "says": says, "bytes": 0}


def _ask(child: "subprocess.Popen[bytes]", data: bytes, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Send a request to a child and return its answer. Raises OSError or ValueError if the child has died."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps(request).encode() + b"\n" + data)
    child.stdin.flush()
    answer = json.loads(child.stdout.readline())
    pixels = child.stdout.read(answer["bytes"])
    if len(pixels) < answer["bytes"]:
        raise ValueError("the answer is cut short")
    return answer, pixels


def _start() -> "subprocess.Popen[bytes]":
    # libtiff warns on stderr. Idle threads of a matrix library would count as memory.
    quiet = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(_CHILD, stdin=pipe, stdout=pipe, stderr=nowhere, pipesize=_PIPE_BYTES, env=quiet)  # noqa: S603


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


# Lists are popped and appended to by several threads at once. A process that was forked must not share its parent's.
_idle: list["subprocess.Popen[bytes]"] = []
os.register_at_fork(after_in_child=_idle.clear)
atexit.register(_end_all)
