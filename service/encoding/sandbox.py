"""A process gives up what decoding does not need: a seccomp filter that lets through a short list of system calls.

A picture that takes over its decoder then finds a process that can read and write its two pipes, compute, and end. It
opens no file and no socket, starts no program, and makes no memory executable.
"""

import ctypes
import errno
import mmap
import os
import platform
import resource
import struct
import sys
from typing import NamedTuple

_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER, _ALL_THREADS = 1, 1
_KILL_PROCESS, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LOAD, _RETURN = 0x20, 0x06
_JUMP_IF_EQUAL, _JUMP_IF_AT_LEAST, _JUMP_IF_ANY_BIT = 0x15, 0x35, 0x45
# Places in struct seccomp_data.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
# x32 has the architecture of x86-64, and numbers from here on.
_X32 = 0x40000000
# What glibc and musl start a thread with: the older bit CLONE_DETACHED is musl's.
_THREAD, _THREAD_OF_MUSL = 0x3D0F00, 0x7D0F00

# System calls by their numbers on x86-64 and aarch64.
_HARMLESS = {
    # The pipes, and the file that says how much memory is in use.
    "read": (0, 63),
    "write": (1, 64),
    "pread64": (17, 67),
    "close": (3, 57),
    # Memory; mmap and mprotect are below.
    "munmap": (11, 215),
    "brk": (12, 214),
    "mremap": (25, 216),
    "madvise": (28, 233),
    # Signals to this process, and the timer that ends it.
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "setitimer": (38, 103),
    "restart_syscall": (219, 128),
    # libde265 has a thread, whatever number it is told.
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "gettid": (186, 178),
    "getpid": (39, 172),
    # Time, where the C library does not read it by itself, and random numbers.
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "gettimeofday": (96, 169),
    "getrandom": (318, 278),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
_MAPS = {"mmap": (9, 222), "mprotect": (10, 226)}
_CLONE, _CLONE3, _PRLIMIT64, _SECCOMP = (56, 220), (435, 435), (302, 261), (317, 277)
# AUDIT_ARCH_X86_64 and AUDIT_ARCH_AARCH64, and the column above.
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}


class _Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


class _Step(NamedTuple):
    """An instruction of BPF; a jump skips so many instructions where it is true and where it is false."""

    code: int
    value: int
    true: int = 0
    false: int = 0


def enter() -> str | None:
    """Put this process, with all its threads, into the sandbox for good; None, or why that cannot be done.

    A system call outside the list fails with EPERM, one by the numbers of another architecture ends the process.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _MACHINES or sys.maxsize < 2**32:
        return f"no list of system calls for {machine} on {sys.platform}"
    architecture, column = _MACHINES[machine]
    return _install(_program(architecture, column), column)


def _install(steps: list[_Step], column: int) -> str | None:
    """Give a filter to all threads of this process; None, or why the kernel refuses it."""
    code = b"".join(struct.pack("=HBBI", step.code, step.true, step.false, step.value) for step in steps)
    libc = ctypes.CDLL(None, use_errno=True)
    one, zero = ctypes.c_ulong(1), ctypes.c_ulong(0)
    if libc.prctl(_SET_NO_NEW_PRIVS, one, zero, zero, zero):
        return f"prctl: {os.strerror(ctypes.get_errno())}"
    number, mode, flags = (ctypes.c_long(value) for value in (_SECCOMP[column], _SECCOMP_SET_MODE_FILTER, _ALL_THREADS))
    if failed := libc.syscall(number, mode, flags, ctypes.byref(_Filter(len(steps), code))):
        # A positive number is that of a thread with another filter.
        return f"seccomp: {os.strerror(ctypes.get_errno()) if failed < 0 else 'a thread has a filter of its own'}"
    return None


def _program(architecture: int, column: int) -> list[_Step]:
    """Return the filter. Each rule begins with the number of the system call in the register."""
    refuse = _Step(_RETURN, _ERRNO | errno.EPERM)
    allow = _Step(_RETURN, _ALLOW)
    steps = [
        _Step(_LOAD, _ARCHITECTURE),
        _Step(_JUMP_IF_EQUAL, architecture, true=1),
        _Step(_RETURN, _KILL_PROCESS),
        _Step(_LOAD, _NUMBER),
        _Step(_JUMP_IF_AT_LEAST, _X32, false=1),
        _Step(_RETURN, _KILL_PROCESS),
    ]

    def rule(number: int, *then: _Step) -> None:
        steps.extend((_Step(_JUMP_IF_EQUAL, number, false=len(then)), *then))

    for numbers in _HARMLESS.values():
        rule(numbers[column], allow)
    for numbers in _MAPS.values():
        executable = _Step(_JUMP_IF_ANY_BIT, mmap.PROT_EXEC, false=1)
        rule(numbers[column], _argument(2), executable, refuse, allow)
    starts_thread = (_Step(_JUMP_IF_EQUAL, _THREAD, true=1), _Step(_JUMP_IF_EQUAL, _THREAD_OF_MUSL, false=1))
    rule(_CLONE[column], _argument(0), *starts_thread, allow, refuse)
    # A filter cannot see its flags. The C library takes clone where there is no clone3.
    rule(_CLONE3[column], _Step(_RETURN, _ERRNO | errno.ENOSYS))
    # The limit of memory of this process; 0 is the caller.
    own = (_argument(0), _Step(_JUMP_IF_EQUAL, 0, true=1), refuse)
    rule(_PRLIMIT64[column], *own, _argument(1), _Step(_JUMP_IF_EQUAL, resource.RLIMIT_AS, true=1), refuse, allow)
    return [*steps, refuse]


def _argument(index: int) -> _Step:
    """Load the lower half of an argument. The kernel reads no more of these: they are 32 bits, or flags in these."""
    return _Step(_LOAD, _ARGUMENTS + 8 * index)
