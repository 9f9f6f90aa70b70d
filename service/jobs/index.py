"""`lookalike index`: a source → a store."""

import hashlib
import sys
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from service.account import LEFT_OUT, Account, Failure, printable
from service.errors import LookalikeError, Outcome
from service.file_facts import FileFacts, Move
from service.gallery import Gallery, ReadPicture
from service.items import NewPicture
from service.jobs.naming import Naming, choose_names, owner_of
from service.jobs.reading import in_two_stages, progress, read_ahead, use_good
from service.originals import note_folder
from service.sources.source import Entry, Source
from service.store import Item, NewItem


class _Known(NamedTuple):
    """The item that the store has already for a picture, with its bytes, and what it does not know of its file yet."""

    item: Item
    move: Move | None


# The pictures of a chunk that were there already, and the outcomes of the others.
T = TypeVar("T")
_Chunk = tuple[list[_Known], list[tuple[int, Outcome[T]]]]


def index_source(source: Source, gallery: Gallery, prefix: str | None = None, keep_originals: bool = False) -> Account:
    """Add a source's pictures to a store, except those that the store has with the same bytes.

    A label of the source becomes the item's metadata; other metadata of an item whose picture has changed stay. Every
    chunk of 64 pictures is one commit, so a job that was interrupted resumes where it stopped when it is run again.

    Args:
        source: the pictures.
        gallery: its store gets them.
        prefix: begins their ids, and keeps them apart from other sources; see `naming.choose_names`.
        keep_originals: the store keeps the bytes of all pictures, also of those that it has already. Otherwise it
            keeps path and digest, not the bytes, of pictures that are files of their own.

    Raises:
        InvalidModel, OutOfMemory, InvalidStore: the encoder or the store failed. Bad pictures are counted instead.
        InvalidRequest: the prefix cannot begin an id.
    """
    return index_named(source, gallery, choose_names(source, gallery, prefix), keep_originals)


def index_named(source: Source, gallery: Gallery, naming: Naming, keep_originals: bool) -> Account:
    """Do what `index_source` does, with names that are chosen already."""
    account = Account.of(source)
    account.notes += naming.notes
    if source.in_files:
        note_folder(gallery.store, naming.origin)
    indexing = _Indexing(source, gallery, naming, keep_originals)
    replaced: list[int] = []
    with progress("indexing", len(source), 0) as bar:
        stages = in_two_stages(read_ahead(range(len(source)), indexing.read), indexing.embed, indexing.commit)
        # A commit waits for the disk; the next chunk is embedded meanwhile.
        for known, outcomes in stages:
            account.known += len(known)
            for position, outcome in outcomes:
                if isinstance(outcome, LookalikeError):
                    account.failures.append(Failure.of(source.ids[position], outcome))
                    bar.write(f"skipped {printable(source.ids[position])}: {outcome}", file=sys.stderr)
                elif outcome:
                    account.added += 1
                elif position in indexing.completed:
                    account.known += 1
                else:
                    replaced.append(position)
            bar.update(len(known) + len(outcomes))
    account.replaced = len(replaced)
    earlier = {at: indexing.earlier[at] for at in replaced if at in indexing.earlier}
    account.notes += _replaced_from_elsewhere(source, naming, earlier)
    account.save(gallery.settings.folder / LEFT_OUT)
    return account


class _Indexing:
    """The three steps of indexing a chunk: read, embed, commit. Several threads read.

    Attributes:
        earlier: items whose pictures are replaced, by the position of the new picture in the source.
        completed: positions of pictures that the store has, and whose bytes it gets now.
    """

    def __init__(self, source: Source, gallery: Gallery, naming: Naming, keep_originals: bool) -> None:
        self._source, self._gallery, self._naming, self._keep_originals = source, gallery, naming, keep_originals
        self.earlier: dict[int, Item] = {}
        self.completed: set[int] = set()

    def read(self, position: int) -> NewPicture[ReadPicture] | _Known:
        """Return the picture at a position, or the item that the store has for it."""
        mtime_ns = self._mtime_ns(position)
        entry = self._source.entry(position)
        digest = hashlib.sha256(entry.data).hexdigest()
        id = self._naming.id_of(entry.id, digest, self._gallery)
        item = self._gallery.store.get(id)
        if item is not None and item.digest == digest:
            if not self._keep_originals or self._gallery.store.original(id) is not None:
                return _Known(item, self._learnt(item, entry, mtime_ns))
            self.completed.add(position)
        elif item is not None:
            self.earlier[position] = item
        return NewPicture(
            id,
            self._gallery.read(entry.data, mtime_ns),
            {} if entry.label is None else {"label": entry.label},
            self._naming.source_of(entry.id),
            keep_metadata=True,
            keep_original=self._keep_originals or not self._source.in_files,
            mtime_ns=mtime_ns,
        )

    def _mtime_ns(self, position: int) -> int | None:
        """Return when a file was changed last, before it is read: a later change shows the next time."""
        if not self._source.in_files or self._source.place is None:
            return None
        try:
            return self._source.place(position).stat().st_mtime_ns
        # To read the file says why.
        except OSError:
            return None

    def _learnt(self, item: Item, entry: Entry, mtime_ns: int | None) -> Move | None:
        """Return what the store does not know yet of the file of an item: where it is by now, its size, its date."""
        source = self._naming.source_of(entry.id)
        own = self._naming.moved or item.source == source
        mtime_ns = mtime_ns if own else item.mtime_ns
        facts = item.facts
        if facts.size_bytes is None or mtime_ns != item.mtime_ns:
            facts = FileFacts.of_data(entry.data, mtime_ns)
        learnt = Move(item.id, item.digest, item.id, source if own else item.source, facts, mtime_ns)
        return None if learnt[3:] == (item.source, item.facts, item.mtime_ns) else learnt

    def embed(self, chunk: Sequence[tuple[int, Outcome[NewPicture[ReadPicture] | _Known]]]) -> _Chunk[NewItem]:
        """Embed the pictures that the store does not have."""
        known = [outcome for _, outcome in chunk if isinstance(outcome, _Known)]
        fresh = [(at, outcome) for at, outcome in chunk if isinstance(outcome, NewPicture | LookalikeError)]
        return known, use_good(fresh, self._gallery.embed_read)

    def commit(self, embedded: _Chunk[NewItem]) -> _Chunk[bool]:
        """Store the embedded pictures, and what was learnt of the files of the others."""
        known, outcomes = embedded
        if learnt := [one.move for one in known if one.move is not None]:
            self._gallery.store.move(learnt)
        return known, use_good(outcomes, self._gallery.store.add)


def _replaced_from_elsewhere(source: Source, naming: Naming, replaced: dict[int, Item]) -> list[str]:
    """Return a sentence for each other source whose pictures were replaced."""
    owners: dict[str, list[str]] = {}
    for position, item in replaced.items():
        if item.source != naming.source_of(source.ids[position]):
            owners.setdefault(owner_of(item), []).append(item.id)
    return [f"{len(ids)} of the replaced pictures came from {owner}, such as {ids[0]}" for owner, ids in owners.items()]
