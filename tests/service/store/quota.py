"""Writes of SQLite that find no room, by the error that the system gives for it: the disk is full, or a quota is."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import apsw

_PWRITE = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, use_errno=True
)


_reason = 0


def _refuse(*_: object) -> int:
    ctypes.set_errno(_reason)
    return -1


# A thread may still be on its way into the function when the block ends, so it lives as long as the process.
_refusing = _PWRITE(_refuse)


@contextmanager
def no_room(reason: int) -> Iterator[None]:
    """Let every write of SQLite in this process fail during the block, with this errno."""
    global _reason
    _reason = reason
    vfs = apsw.VFS("no room", "unix")
    write, refusing = vfs.xGetSystemCall("pwrite64"), ctypes.cast(_refusing, ctypes.c_void_p).value
    assert write is not None
    assert refusing is not None
    assert vfs.xSetSystemCall("pwrite64", refusing)
    try:
        yield
    finally:
        vfs.xSetSystemCall("pwrite64", write)
        vfs.unregister()
