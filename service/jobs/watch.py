"""`lookalike index --watch`: sync a store with a folder at once, and again whenever something changes in it."""

import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

from watchfiles import watch

from service.errors import LookalikeError
from service.jobs.changes import Decision
from service.jobs.sync import Synced, Target
from service.sources.folder import Stamp

# Changes that come together are one; so long after the last of them, and at most so long after the first, in ms.
_STEP_MS, _DEBOUNCE_MS = 300, 2000
# A file that was changed so short a time ago may still be written to.
_STEADY_S = 2.0
# Between two looks at files that wait, and at a folder that is not there.
_LOOK_S, _ABSENT_S = 1.0, 2.0
# Disks of other machines may report no changes, so the folder is compared once in this time anyway.
_ANYWAY_S = 600.0


class Settling:
    """Decides which files are taken now: changes.Decide, for looks about a second apart.

    A file that was changed a moment ago is taken once its stamp has stayed the same between two looks, and a file that
    is gone once it was gone in two of them: programs replace a file by removing it first. A file that could not be read
    is passed over until its stamp is another one.
    """

    def __init__(self) -> None:
        self._looks = 0
        self._last: dict[str, tuple[Stamp | None, float]] = {}
        self._now: dict[str, tuple[Stamp | None, float]] = {}
        self._failed: dict[str, Stamp | None] = {}

    def begin(self) -> None:
        """Begin another look than the first one, in which what is gone is gone."""
        self._last, self._now, self._looks = self._now, {}, self._looks + 1

    def fail(self, paths: Iterable[str]) -> None:
        """Pass over files that could not be read in this look."""
        self._failed |= {path: self._now[path][0] for path in paths if path in self._now}

    def __call__(self, path: str, stamp: Stamp | None) -> Decision:
        """Return what to do about a file; see changes.Decide."""
        known, now = self._last.get(path), time.monotonic()
        since = now if known is None or known[0] != stamp else known[1]
        self._now[path] = (stamp, since)
        if path in self._failed and self._failed[path] == stamp:
            return "pass"
        recent = self._looks > 0 if stamp is None else abs(time.time() - stamp[1] / 1e9) < _STEADY_S
        return "wait" if recent and now - since < _LOOK_S / 2 else "take"


class _Follower:
    """Syncs a store with a folder, and tells what it did and what went wrong, each once."""

    def __init__(self, source: str, target: Target, prefix: str | None, show: Callable[[Synced], None]) -> None:
        self._source, self._target, self._prefix, self._show = source, target, prefix, show
        self._told = ""

    def sync(self, settling: Settling, yes: bool = False, first: bool = False) -> bool:
        """Sync, and return whether to look again soon. Raises LookalikeError and OSError in the first sync alone."""
        try:
            done = self._target.sync(self._source, self._prefix, yes=yes, decide=settling, keep_vanished=not first)
        except (LookalikeError, OSError) as error:
            if first:
                raise
            self.tell(str(error))
            return True
        settling.fail(one.id for one in done.changes.account.failures)
        if first or done.any:
            self._show(done)
        elif done.changes.account.notes:
            self.tell(done.changes.account.notes[0])
        return done.changes.waiting > 0

    def tell(self, text: str) -> None:
        """Print a sentence on stderr, unless it was the last one."""
        if text != self._told:
            print(f"note: {text}", file=sys.stderr, flush=True)
            self._told = text


def follow(
    source: str,
    target: Target,
    prefix: str | None,
    yes: bool,
    show: Callable[[Synced], None],
    stop: threading.Event | None = None,
) -> None:
    """Sync at once and after each change, until Ctrl-C or until `stop` is set.

    What cannot be read, a folder or a service that is not there for a while, and a store that another process has are
    told on stderr, and the folder is looked at again. Items stay while their folder is not there.

    Args:
        source: the folder.
        target: the store.
        prefix: as of `Target.sync`.
        yes: as of `Target.sync`, for the first sync alone: later a disk may be unplugged while nobody looks.
        show: is called with what the first sync did, and each later one that did anything.
        stop: ends it.

    Raises:
        LookalikeError, OSError: the first sync failed; nothing is followed then.
    """
    stop = stop or threading.Event()
    follower = _Follower(source, target, prefix, show)
    follower.sync(Settling(), yes, first=True)
    while not stop.is_set():
        try:
            _follow_folder(source, follower, stop)
        # The folder is not there; or the system has no more watches.
        except OSError as error:
            follower.tell(f"{source}: cannot be followed: {error.strerror or error}; looking again now and then")
            stop.wait(_ABSENT_S)


def _follow_folder(source: str, follower: _Follower, stop: threading.Event) -> None:
    """Follow a folder until another one, or none, is at its place. Raises OSError if it cannot be followed."""
    identity = _identity(source)
    settling, compared, again = Settling(), 0.0, True
    changes = watch(
        source,
        watch_filter=None,
        debounce=_DEBOUNCE_MS,
        step=_STEP_MS,
        rust_timeout=int(_LOOK_S * 1000),
        yield_on_timeout=True,
        stop_event=stop,
        ignore_permission_denied=True,
    )
    with closing(changes):
        for changed in changes:
            if _identity(source) != identity:
                return
            if changed or again or time.monotonic() - compared > _ANYWAY_S:
                settling.begin()
                again = follower.sync(settling)
                compared = time.monotonic()


def _identity(source: str) -> tuple[int, int]:
    """Return what tells a folder from another of the same name, such as the place of a disk that is not mounted."""
    status = Path(source).stat()
    return status.st_dev, status.st_ino
