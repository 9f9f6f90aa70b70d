"""`lookalike index`: a source → a store."""

import hashlib
import sys

from service.errors import LookalikeError
from service.gallery import Gallery, ReadPicture
from service.items import NewPicture
from service.jobs.reading import Tally, progress, read_ahead, use_good
from service.sources.source import Source


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

    with progress("indexing", len(source), 0) as bar:
        for chunk in read_ahead(range(len(source)), read):
            fresh = [(position, outcome) for position, outcome in chunk if outcome is not None]
            known += len(chunk) - len(fresh)
            for position, outcome in use_good(fresh, gallery.add_read):
                if isinstance(outcome, LookalikeError):
                    bad += 1
                    bar.write(f"skipped {source.ids[position]}: {outcome}", file=sys.stderr)
            bar.update(len(chunk))
    return Tally(len(source) - known - bad, known, bad)
