"""`lookalike reindex`: a store → its next generation, embedded with another encoder."""

from pathlib import Path

from service.encoding.card import read_card
from service.encoding.encoder import Encoder
from service.errors import InvalidRequest
from service.gallery import Gallery
from service.jobs.reading import progress
from service.settings import Settings
from service.store.catalog import Catalog
from service.store.embedded import EmbeddedStore
from service.store.layout import current, following, publish


def reindex(model: Path, settings: Settings) -> int:
    """Embed a store's pictures anew with another encoder, into its next generation; return how many it has then.

    The store is read as it lies there, and a service may go on changing it: what changed meanwhile is taken over at
    the end, and what changes after that when the generation is taken into use. An interrupted job goes on where it
    stopped when it is run again.

    Raises:
        InvalidModel: no such encoder.
        InvalidRequest: the store is that encoder's already.
        StoreMismatch: an interrupted job of still another encoder lies there.
        InvalidStore: no store; another process is at it; or some pictures are neither kept nor where they came from.
            Nothing is published then.
    """
    home = settings.store
    source, folder = current(home), following(home)
    encoder = Encoder(read_card(model), settings.device, settings.variant)
    earlier = Catalog(source, None)
    try:
        if earlier.meta["fingerprint"] == encoder.card.fingerprint:
            raise InvalidRequest(f"{home}: is of the encoder {encoder.card.name} already")
        gallery = Gallery(encoder, EmbeddedStore(folder, encoder.card, encoder.dimension), settings)
        try:
            since = int(gallery.store.facts().get("follows", -1))
            gallery.store.note("earlier", "" if source == home else source.name)
            with progress("embedding anew", 0, 0) as bar:
                while since < earlier.sequence():
                    since = gallery.follow(earlier, since, bar.update)
                    gallery.store.note("follows", str(since))
            gallery.store.note("follows", str(max(since, 0)))
            gallery.store.settle()
            count = gallery.store.count()
        finally:
            gallery.close()
    finally:
        earlier.close()
    publish(home, folder)
    return count
