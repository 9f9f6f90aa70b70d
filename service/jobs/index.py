"""`lookalike index`: a source → a store."""

import hashlib
import sys
from typing import Any

from service.gallery import Gallery
from service.jobs.reading import Tally, progress, read_ahead, use_good
from service.sources.source import Source


def index_source(source: Source, gallery: Gallery) -> Tally:
    """Add a source's pictures to a store; those that are there with the same bytes are passed over.

    The label, where the source has one, becomes the item's metadata. Every chunk is one commit, so an
    interrupted job goes on where it stopped when it is run again.
    """
    known, bad = 0, 0

    def read(position: int) -> Any:
        entry = source.entry(position)
        id = gallery.check_id(entry.id)
        item = gallery.store.get(id)
        if item is not None and item.digest == hashlib.sha256(entry.data).hexdigest():
            return None
        metadata = {} if entry.label is None else {"label": entry.label}
        return id, gallery.read(entry.data), metadata, f"{source.name}/{entry.id}"

    def add(good: list[tuple[int, Any]]) -> None:
        gallery.add_read([picture for _, picture in good])

    with progress("indexing", len(source), 0) as bar:
        for chunk in read_ahead(range(len(source)), read):
            fresh = [(position, result) for position, result in chunk if result is not None]
            known += len(chunk) - len(fresh)
            for position, error in use_good(fresh, add):
                bad += 1
                bar.write(f"skipped {source.ids[position]}: {error}", file=sys.stderr)
            bar.update(len(chunk))
    return Tally(len(source) - known - bad, known, bad)
