"""`lookalike index`: a source → a store."""

import hashlib
import sys
from collections.abc import Sequence
from typing import TypeVar

from service.errors import LookalikeError, Outcome
from service.gallery import Gallery, ReadPicture
from service.items import NewPicture
from service.jobs.reading import Tally, in_two_stages, progress, read_ahead, use_good
from service.sources.source import Source
from service.store import NewItem

# The size of a chunk, and the outcomes of its pictures that were not in the store already.
T = TypeVar("T")
_Chunk = tuple[int, list[tuple[int, Outcome[T]]]]


def index_source(source: Source, gallery: Gallery) -> Tally:
    """Add a source's pictures to a store, except those that the store has with the same bytes.

    A label of the source becomes the item's metadata. Every chunk of 64 pictures is one commit, so a job that was
    interrupted resumes where it stopped when it is run again.

    Raises:
        InvalidModel, OutOfMemory, InvalidStore: the encoder or the store failed. Bad pictures are counted instead.
    """
    known = bad = 0

    def read(position: int) -> NewPicture[ReadPicture] | None:
        entry = source.entry(position)
        id = gallery.check_id(entry.id)
        item = gallery.store.get(id)
        if item is not None and item.digest == hashlib.sha256(entry.data).hexdigest():
            return None
        metadata = {} if entry.label is None else {"label": entry.label}
        return NewPicture(id, gallery.read(entry.data), metadata, f"{source.name}/{entry.id}")

    def embed(chunk: Sequence[tuple[int, Outcome[NewPicture[ReadPicture] | None]]]) -> _Chunk[NewItem]:
        fresh = [(position, outcome) for position, outcome in chunk if outcome is not None]
        return len(chunk), use_good(fresh, gallery.embed_read)

    def commit(embedded: _Chunk[NewItem]) -> _Chunk[bool]:
        size, outcomes = embedded
        return size, use_good(outcomes, gallery.store.add)

    with progress("indexing", len(source), 0) as bar:
        # A commit waits for the disk; the next chunk is embedded meanwhile.
        for size, outcomes in in_two_stages(read_ahead(range(len(source)), read), embed, commit):
            known += size - len(outcomes)
            for position, outcome in outcomes:
                if isinstance(outcome, LookalikeError):
                    bad += 1
                    bar.write(f"skipped {source.ids[position]}: {outcome}", file=sys.stderr)
            bar.update(size)
    return Tally(len(source) - known - bad, known, bad)
