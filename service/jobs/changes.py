"""What has changed in a folder since a store got its pictures: a plan, which service/jobs/sync.py carries out.

A file is the same while its size and time of change are the same; otherwise its bytes decide, by their digest. Bytes
that were at another path before, which is gone or has other bytes by now, are a renamed picture.
"""

import hashlib
import os
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from service.account import Account, Failure, printable
from service.errors import InvalidRequest, InvalidSource, LookalikeError, UndecodablePicture, attempt
from service.file_facts import HEAD_BYTES, FileFacts, Move, read_at
from service.jobs.naming import Collection, Naming, choose_names, name_more
from service.jobs.reading import progress, read_ahead
from service.sources import origin_of
from service.sources.folder import NOWHERE, Stamp, Stamped, gather_stamped, open_folder
from service.sources.kinds import holds_none
from service.sources.paths import Gathered, compose
from service.sources.source import LeftOut, Source
from service.store import Known

# Pictures inside of such files are items of their folder, too, but no files that could be compared.
_SHARDS = (".tar", ".parquet")

Decision = Literal["take", "wait", "pass"]
Decide = Callable[[str, Stamp | None], Decision]
"""Whether to take a file now, to leave it alone for now, or to pass it over, by path and stamp; None: it is gone."""


class Catalogued(Collection, Protocol):
    """A collection that tells what it has of a source; see Store.below."""

    def below(self, origin: str) -> list[Known]:
        """Return the items that came from a source, which lies at `origin`."""
        ...

    def stamps(self, origin: str) -> dict[str, tuple[int | None, int | None]]:
        """Return bytes and times of change of the pictures of a source, by their paths in it; quicker than `below`."""
        ...


@dataclass
class Changes:
    """What has changed in a folder.

    Attributes:
        naming: of its pictures.
        account: what cannot be read or was left out, and notes.
        items: number of items that the store has of the folder.
        pictures: number of pictures in the folder.
        unchanged: number of items whose files have the same bytes.
        added, replaced: ids of items by their paths in the folder.
        removed: ids of items.
        renamed: earlier and later ids of items.
        source: the pictures; None if none is new or changed.
        fresh: positions in the source of those that are new or changed.
        moves: of the renamed and removed items, and of those whose files were only touched.
        waiting: number of files that are left alone for now.
    """

    naming: Naming
    account: Account
    items: int
    pictures: int
    unchanged: int = 0
    added: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    source: Source | None = None
    fresh: list[int] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    waiting: int = 0

    def keep_vanished(self) -> None:
        """Let the items whose files are gone stay."""
        self.moves = [move for move in self.moves if move.to is not None]
        self.removed = []


class _Looked(NamedTuple):
    """What the bytes of a file say, and when it was changed last before they were read."""

    digest: str
    facts: FileFacts
    mtime_ns: int


class _Compared(NamedTuple):
    """A folder beside its items.

    Attributes:
        items: the items by their paths in the folder.
        new: paths without an item.
        doubtful: paths whose files have another stamp than their items.
        vanished: items without a file.
        kept: items whose files may be there, in what cannot be read.
        unchanged, waiting: numbers of files.
    """

    items: dict[str, Known]
    new: list[str]
    doubtful: list[str]
    vanished: list[Known]
    kept: list[Known]
    unchanged: int
    waiting: int


def find_changes(
    name: str, stored: Catalogued, prefix: str | None = None, decide: Decide = lambda *_: "take"
) -> Changes:
    """Compare a folder with what a store has of it. Nothing is changed.

    Args:
        name: of the folder.
        stored: the items.
        prefix: begins the ids of new pictures; see `naming.choose_names`.
        decide: is asked about each file that is new, changed or gone. While one that is gone waits, all wait: its
            picture may turn up elsewhere.

    Raises:
        InvalidSource: there is no picture in it, and the store has none of it either; or it cannot be read.
        InvalidRequest: it is no folder of picture files.

    Cost: a stat of each file. Files of other stamps are read, and so are new ones as large as an item that is gone.
    """
    root, origin = Path(name), origin_of(name)
    stamps = stored.stamps(origin)
    gathered = _gather(name, root, stamps)
    source, naming = None, Naming(origin)
    # Nearly always nothing has changed.
    if stamps and len(stamps) == len(gathered.found) == gathered.unchanged:
        account = Account(left_out=[gathered.left_out])
        return Changes(naming, account, len(stamps), len(stamps), unchanged=len(stamps))
    known = stored.below(origin)
    if not known:
        if not gathered.found:
            raise _nothing(name, root, gathered.left_out)
        source = open_folder(name, root, gathered)
        naming = choose_names(source, stored, prefix)
        known = _from_elsewhere(gathered, stored) if naming.moved else []
    compared = _compare(known, gathered, decide)
    changes = Changes(naming, Account(left_out=[gathered.left_out]), len(known), len(gathered.found))
    changes.unchanged, changes.waiting = compared.unchanged, compared.waiting
    if compared.kept:
        shown = printable(compared.kept[0].path)
        changes.account.notes.append(
            f"{len(compared.kept)} items stay whose files may be in what cannot be read, such as {shown}"
        )
    if compared.new or compared.doubtful or compared.vanished:
        if source is None and gathered.found:
            source = open_folder(name, root, gathered)
        _Match(root, gathered, compared, stored, changes).find(source, prefix)
    changes.account.notes += changes.naming.notes
    return changes


def _gather(name: str, root: Path, known: dict[str, tuple[int | None, int | None]]) -> Stamped:
    if not root.is_dir():
        if root.exists():
            raise InvalidRequest(f"{name}: expected a folder of picture files to follow; index this without --sync")
        return Stamped(root)
    try:
        gathered = gather_stamped(root, known)
    except OSError as error:
        raise InvalidSource(f"{name}: cannot be read: {error.strerror or error}") from error
    if not gathered.found and any(one.name.lower().endswith(_SHARDS) for one in gathered.left_out):
        raise InvalidRequest(f"{name}: expected a folder of picture files to follow, found archives or tables of them")
    return gathered


def _nothing(name: str, root: Path, left_out: Sequence[LeftOut]) -> InvalidSource:
    if not root.exists():
        return InvalidSource(f"{name}: no such folder, and the store has no picture of it")
    return holds_none(name, left_out)


def _from_elsewhere(gathered: Gathered[Stamp], stored: Catalogued) -> list[Known]:
    """Return the items that the store has under the ids of a folder which was at another place before."""
    found = {path: attempt(stored.check_id, path) for path in gathered.found}
    items = {path: stored.store.get(id) for path, id in found.items() if isinstance(id, str)}
    return [Known(path, item.id, item.digest, None, None) for path, item in items.items() if item is not None]


def _compare(known: list[Known], gathered: Gathered[Stamp], decide: Decide) -> _Compared:
    items = {one.path: one for one in known}
    lost = {compose(one.name).rstrip("/") for one in gathered.left_out if one.lost or one.reason.startswith(NOWHERE)}
    gone = [one for one in known if one.path not in gathered.found]
    kept = [one for one in gone if lost and _within(one.path, lost)]
    vanished = [one for one in gone if not (lost and _within(one.path, lost))]
    waiting = [decide(one.path, None) for one in vanished].count("wait")
    if waiting:
        return _Compared(items, [], [], [], kept, 0, waiting)
    new, doubtful, unchanged = list[str](), list[str](), 0
    for path, (_, stamp) in gathered.found.items():
        item = items.get(path)
        if item is not None and item[3:] == stamp:
            unchanged += 1
        elif (decision := decide(path, stamp)) == "wait":
            waiting += 1
        elif decision == "take":
            (new if item is None else doubtful).append(path)
    return _Compared(items, new, doubtful, vanished, kept, unchanged, waiting)


def _within(path: str, lost: set[str]) -> bool:
    """Return whether a path, or a folder above it, is among those that cannot be read: it may be there still."""
    parts = path.split("/")
    return any("/".join(parts[:end]) in lost for end in range(1, len(parts) + 1))


class _Match:
    """Finds out what became of each item of a folder, and of each file."""

    def __init__(
        self, root: Path, gathered: Gathered[Stamp], compared: _Compared, stored: Catalogued, changes: Changes
    ) -> None:
        self._root, self._gathered, self._compared = root, gathered, compared
        self._stored, self._changes = stored, changes

    def find(self, source: Source | None, prefix: str | None) -> None:
        """Complete the changes. `source` has all pictures of the folder; None if it has none."""
        compared, changes = self._compared, self._changes
        new = sorted(path for path in compared.new if self._may_be_item(path))
        asked = sorted([*compared.doubtful, *self._possibly_renamed(new)])
        looked = self._look(asked)
        if new and compared.items and not changes.naming.moved:
            assert source is not None
            changes.naming = name_more(source, new, list(compared.items.values()), self._stored, prefix)
        changed = [path for path in compared.doubtful if path in looked and not self._is_same(path, looked[path])]
        free = [*compared.vanished, *(compared.items[path] for path in changed)]
        taken, fresh = self._rename(sorted([*changed, *(path for path in new if path in looked)]), looked, free)
        fresh += sorted({*new} - {*asked})
        for path in fresh:
            item = compared.items.get(path)
            if item is not None and item.id not in taken:
                changes.replaced[path] = item.id
                taken.add(item.id)
            elif (id := self._id_of(path, "")) is not None:
                changes.added[path] = id
        self._remove([one for one in free if one.id not in taken])
        fresh = [*changes.added, *changes.replaced]
        places = {id: at for at, id in enumerate(source.ids)} if source is not None and fresh else {}
        changes.source, changes.fresh = source, sorted(places[path] for path in fresh)

    def _may_be_item(self, path: str) -> bool:
        checked = attempt(self._stored.check_id, path)
        if isinstance(checked, LookalikeError):
            self._changes.account.failures.append(Failure.of(path, checked))
        return not isinstance(checked, LookalikeError)

    def _possibly_renamed(self, new: list[str]) -> list[str]:
        """Return the new paths whose files are as large as a picture that is not at its path any more."""
        compared = self._compared
        gone = [*compared.vanished, *(compared.items[path] for path in compared.doubtful)]
        sizes = {one.size_bytes for one in gone}
        return [path for path in new if None in sizes or self._gathered.found[path][1][0] in sizes]

    def _look(self, paths: list[str]) -> dict[str, _Looked]:
        """Read files, and return what they say; those that cannot be read are failures."""
        looked: dict[str, _Looked] = {}
        if not paths:
            return looked

        def read(position: int) -> _Looked:
            return _read(self._root / self._gathered.found[paths[position]][0])

        with progress("comparing", len(paths), 0) as bar:
            for chunk in read_ahead(range(len(paths)), read):
                for position, outcome in chunk:
                    if isinstance(outcome, LookalikeError):
                        self._changes.account.failures.append(Failure.of(paths[position], outcome))
                    else:
                        looked[paths[position]] = outcome
                bar.update(len(chunk))
        return looked

    def _is_same(self, path: str, looked: _Looked) -> bool:
        """Return whether a file has the bytes of its item. If so, its new stamp is to be recorded."""
        item = self._compared.items[path]
        if looked.digest != item.digest:
            return False
        self._move(item, item.id, path, looked)
        self._changes.unchanged += 1
        return True

    def _rename(self, wanted: list[str], looked: dict[str, _Looked], free: list[Known]) -> tuple[set[str], list[str]]:
        """Give the paths items of the same bytes.

        Returns:
            The ids of the items that were given, and the paths that have none.
        """
        donors: defaultdict[str, deque[Known]] = defaultdict(deque)
        for one in sorted(free):
            donors[one.digest].append(one)
        leaving = {one.id for one in free}
        taken, fresh = set[str](), list[str]()
        for path in wanted:
            to = self._id_of(path, looked[path].digest) if donors[looked[path].digest] else None
            # Another source may have this id, with the same bytes.
            if to is None or (to not in leaving and self._stored.store.get(to) is not None):
                fresh.append(path)
                continue
            item = donors[looked[path].digest].popleft()
            taken.add(item.id)
            self._changes.renamed.append((item.id, to))
            self._move(item, to, path, looked[path])
        return taken, fresh

    def _id_of(self, path: str, digest: str) -> str | None:
        """Return the id of a path; None, and a failure, if its prefix makes it too long."""
        item = self._compared.items.get(path)
        if item is not None:
            return item.id
        id = attempt(self._changes.naming.id_of, path, digest, self._stored)
        if isinstance(id, LookalikeError):
            self._changes.account.failures.append(Failure.of(path, id))
            return None
        return id

    def _move(self, item: Known, to: str, path: str, looked: _Looked) -> None:
        source = self._changes.naming.source_of(path)
        self._changes.moves.append(Move(item.id, item.digest, to, source, looked.facts, looked.mtime_ns))

    def _remove(self, items: list[Known]) -> None:
        self._changes.removed += [one.id for one in items]
        self._changes.moves += [Move(one.id, one.digest, None) for one in items]


def _read(path: Path) -> _Looked:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            head = file.read(HEAD_BYTES)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            facts = FileFacts.of(head, status.st_size, status.st_mtime_ns, partial(read_at, file.fileno()))
    except OSError as error:
        raise UndecodablePicture(f"cannot be read: {error.strerror or error}") from error
    return _Looked(digest, facts, status.st_mtime_ns)
