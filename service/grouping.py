"""Groups of duplicates for a service: found in one process of low priority, and kept until the store changes.

The process writes the groups into a file, of which a page is read as bytes. After changes it is given the pairs that
it found before, and searches only for what has changed.
"""

import json
import tempfile
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from service import IntArray
from service.duplicates import find_groups
from service.errors import InvalidStore, PageNotFound
from service.side_process import SideProcess, Tell
from service.store.near_pairs import Pairs

# Results that are kept, one for each store and threshold.
_MOST_RESULTS = 4
# A search for groups that nobody has asked about for so many seconds makes way for another.
_PATIENCE_S = 5.0
# _ENDS holds plain numbers: in Python 3.11 np.load may fail where several threads call it (see service/client).
_GROUPS, _PAIRS, _ENDS = "groups.jsonl", "pairs.npz", "ends.bin"
# A cursor is the number of a result, times this, and a place in it.
_MOST_GROUPS = 10**9


class Wanted(NamedTuple):
    """Whose groups are asked for: the folder of a store's generation, and the threshold."""

    folder: Path
    threshold: float


class Page(NamedTuple):
    """Some groups of a result.

    Attributes:
        groups: JSON texts.
        total: number of all groups.
        rest: number of items of all groups, the best copies left out.
        rest_bytes: size of their files, as far as it is known.
        sequence: as in _Result.
        next: cursor of the next page; None at the end.
    """

    groups: list[bytes]
    total: int
    rest: int
    rest_bytes: int
    sequence: int
    next: str | None


@dataclass
class _Result:
    """The groups of one state of a store, in a file.

    Attributes:
        number: tells it from all earlier ones.
        folder: holds the files.
        ends: (G,) where each group's line ends.
        rest, rest_bytes: as in Page.
        sequence: number of the last change of the store that it takes into account.
        epoch: number of dismissals before it.
        unread: nobody has been given it.
    """

    number: int
    folder: "tempfile.TemporaryDirectory[str]"
    ends: IntArray
    rest: int
    rest_bytes: int
    sequence: int
    epoch: int
    unread: bool = True

    def page(self, start: int, limit: int) -> Page:
        """Return up to `limit` groups from a place on."""
        ends = self.ends[start : start + limit]
        begin = int(self.ends[start - 1]) if start else 0
        text = b""
        if len(ends):
            with (Path(self.folder.name) / _GROUPS).open("rb") as file:
                file.seek(begin)
                text = file.read(int(ends[-1]) - begin)
        after = None if start + limit >= len(self.ends) else str(self.number * _MOST_GROUPS + start + limit)
        return Page(text.splitlines(), len(self.ends), self.rest, self.rest_bytes, self.sequence, after)


class _Job:
    """A process that finds groups."""

    def __init__(self, wanted: Wanted, epoch: int, earlier: _Result | None) -> None:
        self.wanted, self.epoch = wanted, epoch
        # When it was asked about last.
        self.asked = time.monotonic()
        # Held until the end, so that the folder stays.
        self.earlier = earlier
        self.folder = tempfile.TemporaryDirectory(prefix="lookalike-duplicates-")
        pairs = Path(earlier.folder.name) / _PAIRS if earlier is not None else None
        arguments = [str(wanted.folder), repr(wanted.threshold), self.folder.name, str(pairs or "")]
        self.process = SideProcess(__name__, arguments, "finds duplicates")

    def result(self, number: int) -> _Result:
        """Return the result. Raises as `SideProcess.result`."""
        told = self.process.result()
        ends = np.fromfile(Path(self.folder.name) / _ENDS, np.int64)
        rest, rest_bytes, sequence = (told[name] for name in ("rest", "rest_bytes", "sequence"))
        return _Result(number, self.folder, ends, rest, rest_bytes, sequence, self.epoch)


class Groupings:
    """Results by store and threshold, and the one process that makes the next. Calls may come from any thread."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._lock = threading.Lock()
        self._results: OrderedDict[Wanted, _Result] = OrderedDict()
        self._job: _Job | None = None
        self._number = self._epoch = 0
        self._closed = False

    def first_page(self, wanted: Wanted, sequence: int, limit: int, begin: bool = True) -> Page | float:
        """Return the first groups of a store, or the share of the work that is done.

        A result that is older than the store's last change answers one request, and is then rebuilt. Without that
        answer a store that changes all the time would never have a result. Work that nobody asks about any more is
        given up once other work is wanted.

        Args:
            wanted: the store and the threshold.
            sequence: number of the store's last change.
            limit: groups, at most.
            begin: begin the work if there is no result. Without it only a result that is current is an answer.

        Raises:
            LookalikeError: the work failed; the next call begins it again.
        """
        with self._lock:
            self._finish()
            result = self._results.get(wanted)
            current = result is not None and (result.sequence, result.epoch) == (sequence, self._epoch)
            if result is not None and (current or (begin and result.unread and result.epoch == self._epoch)):
                self._results.move_to_end(wanted)
                result.unread = result.unread and not begin
                return result.page(0, limit)
            if self._closed:
                raise InvalidStore("the service is stopping")
            if not begin:
                return 0.0
            job = self._job
            if job is not None and job.wanted != wanted and time.monotonic() - job.asked > _PATIENCE_S:
                job.process.stop()
                job.folder.cleanup()
                job = None
            if job is None:
                job = _Job(wanted, self._epoch, result if wanted.threshold < 1 else None)
            self._job = job
            if job.wanted != wanted:
                return 0.0
            job.asked = time.monotonic()
            return job.process.progress

    def next_page(self, wanted: Wanted, cursor: str, limit: int) -> Page:
        """Return the groups that follow a page.

        Raises:
            PageNotFound: the cursor is not of the groups that are kept for this store and threshold.
        """
        with self._lock:
            result = self._results.get(wanted)
            number, start = divmod(int(cursor), _MOST_GROUPS)
            if result is None or number != result.number or not 0 < start < len(result.ends):
                raise PageNotFound("cursor: its groups are not kept any more; begin again without a cursor")
            return result.page(start, limit)

    def forget(self) -> None:
        """Make no use of groups that were made before this moment: pictures have been told apart."""
        with self._lock:
            self._epoch += 1

    def close(self) -> None:
        """End the process, and remove the files of all results."""
        with self._lock:
            self._closed = True
            if self._job is not None:
                self._job.process.stop()
                self._job.folder.cleanup()
                self._job = None
            for result in self._results.values():
                result.folder.cleanup()
            self._results.clear()

    def _finish(self) -> None:
        """Take the result of a process that has ended. Raises as `_Job.result`."""
        job = self._job
        if job is None or not job.process.done:
            return
        self._job = None
        job.process.stop()
        self._number += 1
        self._results[job.wanted] = job.result(self._number)
        self._results.move_to_end(job.wanted)
        while len(self._results) > _MOST_RESULTS:
            self._results.popitem(last=False)


def work(tell: Tell, folder: str, threshold: str, out: str, earlier: str) -> dict[str, int]:
    """Find groups and write them into a folder: the work of the process."""
    pairs = Pairs.load(Path(earlier)) if earlier else None
    found = find_groups(Path(folder), float(threshold), pairs, tell)
    if found.pairs is not None:
        found.pairs.save(Path(out) / _PAIRS)
    ends, place, rest, rest_bytes = [], 0, 0, 0
    with (Path(out) / _GROUPS).open("wb") as file:
        for group in found.groups:
            place += file.write(json.dumps(group.shown()).encode() + b"\n")
            ends.append(place)
            rest += len(group.rest)
            rest_bytes += sum(copy.facts.size_bytes or 0 for copy in group.rest)
    np.asarray(ends, np.int64).tofile(Path(out) / _ENDS)
    return {"sequence": found.sequence, "rest": rest, "rest_bytes": rest_bytes}
