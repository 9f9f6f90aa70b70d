"""The sandbox of decoding children: what a decoder that was taken over tries fails, and pictures come as before."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from service.encoding import apart, sandbox
from service.encoding.images import decode
from service.encoding.limits import Limits
from service.errors import UndecodablePicture
from tests.conftest import encoded, scene
from tests.heif import heic

TIFF = encoded(scene(), "TIFF")
ROOT = Path(__file__).parents[3]

# What a process prepares, and what it then tries; FILE is a file of its own, and PARENT the process of this test.
_BEGIN = """
import ctypes, mmap, os, resource, signal, socket, sys, threading
from service.encoding import sandbox
FILE, PARENT, column = sys.argv[1], os.getppid(), sandbox._MACHINES[os.uname().machine][1]
libc = ctypes.CDLL(None, use_errno=True)
page = mmap.mmap(-1, 4096)
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
server, client = socket.socket(), socket.socket()
server.bind(("127.0.0.1", 0)); server.listen()
def call(*numbers):
    if (answer := libc.syscall(*(ctypes.c_long(number) for number in numbers))) < 0:
        raise OSError(ctypes.get_errno(), "")
    return answer
"""
_ATTEMPTS = {
    "open to read": "os.open(FILE, os.O_RDONLY)",
    "open to write": "os.open(FILE + '.new', os.O_WRONLY | os.O_CREAT)",
    "stat": "os.stat(FILE)",
    "list": "os.listdir('/')",
    "unlink": "os.unlink(FILE)",
    "rename": "os.rename(FILE, FILE + '.new')",
    "chmod": "os.chmod(FILE, 0o777)",
    "socket": "socket.socket()",
    "connect": "client.connect(server.getsockname())",
    "pair of sockets": "socket.socketpair()",
    "execve": "os.execv('/bin/true', ['true'])",
    "fork": "os.fork() or os._exit(0)",
    "clone": "call(sandbox._CLONE[column], signal.SIGCHLD, 0, 0, 0, 0) or os._exit(0)",
    "kill of the parent": "os.kill(PARENT, 0)",
    "ptrace": "call({0: 101, 1: 117}[column], 0, 0, 0, 0)",
    "limits of the parent": "resource.prlimit(PARENT, resource.RLIMIT_AS)",
    "limit of files": "resource.setrlimit(resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE))",
    "another name space": "call({0: 272, 1: 97}[column], 0)",
    "executable memory": "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
    "memory made executable": "call(sandbox._MAPS['mprotect'][column], address, 4096, 5)",
    "prctl": "call({0: 157, 1: 167}[column], 4, 1)",
}


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", program, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)


@pytest.mark.parametrize("attempt", _ATTEMPTS)
def test_what_a_decoder_does_not_need_is_refused(attempt: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    tries = f"try: {_ATTEMPTS[attempt]}\nexcept OSError as error: os.write(1, str(error.errno).encode())\nos._exit(0)"
    sandboxed = run(f"{_BEGIN}\nassert sandbox.enter() is None\n{tries}", str(file))
    assert (sandboxed.stdout, sandboxed.stderr) == ("1", ""), "expected EPERM"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    # Without the sandbox the same attempt succeeds.
    assert run(f"{_BEGIN}\n{tries}", str(file)).stdout == ""


def test_clone3_is_said_to_be_missing_and_threads_start(tmp_path: Path) -> None:
    tries = (
        "try: call(435, 0, 0)\nexcept OSError as error: os.write(1, str(error.errno).encode())\n"
        "thread = threading.Thread(target=os.write, args=(1, b' thread')); thread.start(); thread.join()"
    )
    assert run(f"{_BEGIN}\nassert sandbox.enter() is None\n{tries}", str(tmp_path)).stdout == "38 thread"


def test_every_thread_is_in_the_sandbox(tmp_path: Path) -> None:
    tries = (
        "go = threading.Event()\ndef late():\n  go.wait()\n  try: os.stat('/')\n"
        "  except OSError as error: os.write(1, str(error.errno).encode())\n"
        "thread = threading.Thread(target=late); thread.start()\n"
        "assert sandbox.enter() is None; go.set(); thread.join()"
    )
    assert run(f"{_BEGIN}\n{tries}", str(tmp_path)).stdout == "1"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x32 is a second set of numbers on x86-64")
def test_numbers_of_x32_end_the_process(tmp_path: Path) -> None:
    assert run(f"{_BEGIN}\nassert sandbox.enter() is None\ncall(0x40000000 + 39)", str(tmp_path)).returncode == -31


def test_numbers_are_those_of_the_kernel() -> None:
    table = {**sandbox._HARMLESS, **sandbox._MAPS, "clone": sandbox._CLONE, "prlimit64": sandbox._PRLIMIT64}
    for column, header in enumerate(("x86_64-linux-gnu/asm/unistd_64.h", "asm-generic/unistd.h")):
        path = Path("/usr/include") / header
        if not path.exists():
            pytest.skip(f"no {header} here")
        words = [line.split() for line in path.read_text().splitlines() if line.startswith("#define __NR")]
        known = {
            name.removeprefix("__NR_").removeprefix("__NR3264_"): number
            for _, name, number, *_ in words
            if number.isdecimal()
        }
        assert {name: known[name] for name in table} == {name: str(pair[column]) for name, pair in table.items()}


def test_a_decoding_child_is_in_the_sandbox_and_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_idle", [])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert apart.why_no_sandbox() is None
    decode(TIFF, 28, Limits())
    (child,) = apart._idle
    facts = dict(line.split(":\t") for line in Path(f"/proc/{child.pid}/status").read_text().splitlines())
    assert (facts["Seccomp"], facts["NoNewPrivs"]) == ("2", "1")
    assert b"PATH=" in (environment := Path(f"/proc/{child.pid}/environ").read_bytes())
    assert b"secret" not in environment
    # Its pipes, what libraries print, and how much memory it has.
    files = sorted(str(path.readlink()).split(":")[0] for path in Path(f"/proc/{child.pid}/fd").iterdir())
    assert files == ["/dev/null", f"/proc/{child.pid}/statm", "pipe", "pipe"]
    (limit,) = (line for line in Path(f"/proc/{child.pid}/limits").read_text().splitlines() if "address" in line)
    assert int(limit.split()[-2]) < 6_000_000_000
    apart._end_all()


# A process without seccomp(2), as containers may be, in which pictures are decoded as before.
_REFUSED = """
import os, sys
from service.encoding import sandbox
architecture, column = sandbox._MACHINES[os.uname().machine]
step, numbers = sandbox._Step, sandbox._SECCOMP
refuse = [step(0x20, 0), step(0x15, numbers[column], false=1), step(0x06, 0x50001), step(0x06, 0x7FFF0000)]
assert sandbox._install(refuse, column) is None
from pathlib import Path
from service.encoding import apart, images
from service.jobs import doctor
from service.settings import Settings
for _ in range(2):
    assert images.decode(Path(sys.argv[1]).read_bytes(), 28, images.Limits()).size == (64, 48)
    apart._end_all()
print([line for line in doctor._machine(Settings()) if line.about == "pictures"])
"""


@pytest.mark.slow("starts four interpreters")
def test_a_kernel_that_refuses_is_told_once_and_by_doctor(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(TIFF)
    done = run(_REFUSED, str(tmp_path / "a.tif"))
    says = "TIFF, AVIF and HEIF are decoded without a sandbox: seccomp: Operation not permitted"
    assert done.stderr == f"{says}\n"
    assert done.stdout == f"[Line(about='pictures', found='{says}', problem=True)]\n"


_GOOD = {"size": [2, 1], "stored_size": [2, 1]}


@pytest.mark.parametrize(
    "answer",
    [
        b"{",
        b"[" * 50_000,
        b"[]",
        b"7",
        {},
        {"error": "Sequence", "says": "x"},
        {"error": "T", "says": "x"},
        {"error": "nothing", "says": "x"},
        {"error": 7, "says": "x"},
        {"error": "TooLarge", "says": ["x"]},
        _GOOD | {"size": [2]},
        _GOOD | {"size": [-2, -1]},
        _GOOD | {"size": [2.0, 1]},
        _GOOD | {"size": [1_000_000, 1_000_000]},
        _GOOD | {"stored_size": ["2", "1"]},
        _GOOD | {"stored_size": [2, 1, 1]},
    ],
)
def test_the_parent_believes_no_answer(answer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    line = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    # It does not end when its pipes close, and it goes on without a line's end.
    program = (
        "import signal, sys, time; signal.signal(signal.SIGPIPE, signal.SIG_IGN)\n"
        "print('{\"no_sandbox\": null}', flush=True); sys.stdin.buffer.readline()\n"
        f"sys.stdout.buffer.write({line!r} + b'\\n' + bytes(200_000)); sys.stdout.flush(); time.sleep(600)"
    )
    monkeypatch.setattr(apart, "_CHILD", [sys.executable, "-c", program])
    monkeypatch.setattr(apart, "_idle", [])
    with pytest.raises(UndecodablePicture, match="its decoder failed"):
        decode(TIFF, 28, Limits())
    assert apart._idle == []


def test_a_child_that_never_answers_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import json, time; print(json.dumps({'no_sandbox': None}), flush=True); time.sleep(600)"
    monkeypatch.setattr(apart, "_CHILD", [sys.executable, "-c", program])
    monkeypatch.setattr(apart, "_idle", [])
    monkeypatch.setattr(apart, "_LEAST_PATIENCE_S", 0.1)
    with pytest.raises(UndecodablePicture, match="its decoder failed"):
        decode(TIFF, 28, replace(Limits(), max_decode_s=0.01))


@pytest.mark.parametrize("form", ["TIFF", "AVIF", "HEIF"])
def test_the_first_picture_of_a_child_may_be_any(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a format needs is loaded before the sandbox, not by a picture of another one."""
    monkeypatch.setattr(apart, "_idle", [])
    data = {"TIFF": TIFF, "HEIF": heic()}.get(form) or encoded(scene(), form)
    assert decode(data, 28, Limits()).size == (64, 48)
    apart._end_all()
