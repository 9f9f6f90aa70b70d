"""Maps for a service: made one after the other in a process of low priority, and kept until the store changes."""

import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from service import IntArray
from service.errors import InvalidStore
from service.projection import Method, project
from service.side_process import SideProcess, Tell
from service.store.catalog_reader import CatalogReader

# Maps that are kept, one for each store and method.
_MOST_RESULTS = 4
_IDS, _KEYS, _POSITIONS = "ids.json", "keys.bin", "positions.bin"


class Wanted(NamedTuple):
    """Which map is asked for: the folder of a store's generation, and the method."""

    folder: Path
    method: Method


@dataclass
class Map:
    """A map of one state of a store, in files.

    Attributes:
        folder: holds the files.
        sequence: number of the last change of the store that it takes into account.
        method: by which it was made.
        count: N, its items.
    """

    folder: "tempfile.TemporaryDirectory[str]"
    sequence: int
    method: Method
    count: int

    @property
    def ids(self) -> bytes:
        """The ids of its items, in the order of adding, as a JSON list."""
        return (Path(self.folder.name) / _IDS).read_bytes()

    @property
    def keys(self) -> IntArray:
        """(N,) int64 catalog keys of its items."""
        return np.fromfile(Path(self.folder.name) / _KEYS, np.int64)

    @property
    def positions(self) -> bytes:
        """(N, 2) little-endian uint16."""
        return (Path(self.folder.name) / _POSITIONS).read_bytes()


class Shown(NamedTuple):
    """A map, and the share of a better or newer one that is done: None if it is the one that was asked for."""

    map: Map
    progress: float | None


class _Job:
    """A process that makes a map."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.folder = tempfile.TemporaryDirectory(prefix="lookalike-map-")
        arguments = [str(wanted.folder), wanted.method, self.folder.name]
        self.process = SideProcess(__name__, arguments, "makes the map")

    def result(self) -> Map:
        """Return the map. Raises as `SideProcess.result`."""
        return Map(self.folder, **self.process.result())


class Maps:
    """Maps by store and method, and the one process that makes the next. Calls may come from any thread."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._lock = threading.Lock()
        self._maps: OrderedDict[Wanted, Map] = OrderedDict()
        self._job: _Job | None = None
        self._closed = False

    def get(self, wanted: Wanted, sequence: int) -> Shown | float:
        """Return the best map that there is of a store, or the share of the first one that is done.

        Before the first map by t-SNE there is one by PCA. A map that is older than the store's last change is returned
        until the next one is made.

        Args:
            wanted: the store and the method.
            sequence: number of the store's last change.

        Raises:
            LookalikeError: a map could not be made; the next call begins it again.
        """
        with self._lock:
            self._finish()
            made = self._maps.get(wanted)
            if made is not None and made.sequence == sequence:
                self._maps.move_to_end(wanted)
                return Shown(made, None)
            simple = Wanted(wanted.folder, "pca")
            made = made or self._maps.get(simple)
            if self._closed:
                raise InvalidStore("the service is stopping")
            following = simple if made is None else wanted
            if self._job is None:
                self._job = _Job(following)
            progress = self._job.process.progress if self._job.wanted == following else 0.0
            return progress if made is None else Shown(made, progress)

    def close(self) -> None:
        """End the process, and remove the files of all maps."""
        with self._lock:
            self._closed = True
            if self._job is not None:
                self._job.process.stop()
                self._job.folder.cleanup()
                self._job = None
            for made in self._maps.values():
                made.folder.cleanup()
            self._maps.clear()

    def _finish(self) -> None:
        """Take the map of a process that has ended. Raises as `_Job.result`."""
        job = self._job
        if job is None or not job.process.done:
            return
        self._job = None
        job.process.stop()
        self._maps[job.wanted] = job.result()
        self._maps.move_to_end(job.wanted)
        while len(self._maps) > _MOST_RESULTS:
            self._maps.popitem(last=False)


def work(tell: Tell, folder: str, method: Method, out: str) -> dict[str, Any]:
    """Make a map and write it into a folder: the work of the process."""
    reader = CatalogReader(Path(folder))
    made = project(reader, method, tell)
    keys, ids = reader.ids()
    # Items may have been added or removed meanwhile.
    keys, of_map, of_ids = np.intersect1d(made.keys, keys, assume_unique=True, return_indices=True)
    (Path(out) / _IDS).write_bytes(orjson.dumps([ids[place] for place in of_ids.tolist()]))
    keys.astype(np.int64).tofile(Path(out) / _KEYS)
    (Path(out) / _POSITIONS).write_bytes(made.positions[of_map].astype("<u2").tobytes())
    return {"sequence": made.sequence, "method": made.method, "count": len(keys)}
