"""`lookalike reindex`: a store → its next generation, embedded with another encoder."""

from contextlib import closing
from pathlib import Path

from service.encoding.card import read_card
from service.encoding.encoder import Encoder
from service.errors import InvalidRequest
from service.gallery import Gallery
from service.generations import build
from service.jobs.reading import progress
from service.settings import Settings
from service.store.catalog_reader import CatalogReader
from service.store.embedded import EmbeddedStore
from service.store.layout import current, following, publish


def reindex(model: Path, settings: Settings) -> int:
    """Embed a store's pictures with another encoder into its next generation, and return how many items that has.

    The store is only read, and a service may change it meanwhile. The job takes over such changes before it ends;
    later ones are taken over when a service opens the generation. A job that was interrupted resumes where it stopped
    when it is run again.

    Raises:
        InvalidModel: there is no such encoder.
        InvalidRequest: that encoder built the store.
        StoreMismatch: an interrupted job of a third encoder has left its generation there.
        InvalidStore: there is no store, another process holds its lock, or pictures of some items are missing.
            Nothing is published then.
    """
    home = settings.store
    source, folder = current(home), following(home)
    encoder = Encoder(read_card(model), settings.device, settings.variant)
    with closing(CatalogReader(source)) as earlier:
        if earlier.meta["fingerprint"] == encoder.card.fingerprint:
            raise InvalidRequest(f"{home}: is of the encoder {encoder.card.name} already")
        store = EmbeddedStore(folder, encoder.card, encoder.dimension)
        with closing(Gallery(encoder, store, settings)) as gallery, progress("embedding anew", 0, 0) as bar:
            build(store, earlier, home, gallery.add_many, bar.update)
            count = store.count()
    publish(home, folder)
    return count
