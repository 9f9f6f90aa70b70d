"""`lookalike reindex` and `store rollback`: a store → its next generation, embedded with another encoder."""

import os
from contextlib import closing
from pathlib import Path

from service.encoding.card import read_card
from service.encoding.encoder import Encoder
from service.errors import InvalidModel, InvalidRequest, StoreMismatch
from service.gallery import Gallery
from service.generations import Lineage, build, written
from service.jobs.reading import progress
from service.settings import Settings
from service.store.backup import copy_catalog
from service.store.catalog import FILE, has_catalog, read_meta
from service.store.catalog_reader import CatalogReader
from service.store.embedded import EmbeddedStore
from service.store.layout import current, following, generations, lock, publish


def reindex(model: Path, settings: Settings) -> int:
    """Embed a store's pictures with another encoder into its next generation, and return how many items that has.

    The store is only read, and a service may change it meanwhile. The job takes over such changes before it ends;
    later ones are taken over when a service opens the generation. A job that was interrupted resumes where it stopped
    when it is run again. If an earlier generation of the encoder is still there, its embeddings are used again.

    Raises:
        InvalidModel: there is no such encoder.
        InvalidRequest: that encoder built the store.
        StoreMismatch: an interrupted job of a third encoder has left its generation there.
        InvalidStore: there is no store, another process holds its lock, or pictures of some items are missing.
            Nothing is published then.
    """
    home = settings.store
    source, folder = written(home), following(home)
    encoder = Encoder(read_card(model), settings.device, settings.variant, runtime=settings.runtime)
    with closing(CatalogReader(source)) as earlier:
        if earlier.meta["fingerprint"] == encoder.card.fingerprint:
            hint = "" if source == current(home) else "; `lookalike store rollback` takes back the last reindex"
            raise InvalidRequest(f"{home}: is of the encoder {encoder.card.name} already{hint}")
        if has_catalog(folder) and (left := read_meta(folder))["fingerprint"] != encoder.card.fingerprint:
            raise StoreMismatch(
                f"{folder}: an unfinished reindex with the encoder {left['model']} is there; finish it with "
                f"--model {left['model_folder']}, or remove it with `lookalike store prune`"
            )
        _begin(home, folder, encoder.card.fingerprint)
        store = EmbeddedStore(folder, encoder.card, encoder.dimension)
        with closing(Gallery(encoder, store, settings)) as gallery, progress("embedding again", 0, 0) as bar:
            build(store, earlier, home, gallery.add_many, bar.update)
            count = store.count()
    publish(home, folder)
    return count


def rollback(settings: Settings) -> tuple[str, int]:
    """Bring a store back to the encoder before the current one, and return that encoder's name and the items' number.

    Nothing that was changed since is lost: the generation of that encoder is copied, and takes over the changes. A
    service may keep running, as for `reindex`.

    Raises:
        InvalidRequest: there is no earlier generation.
        InvalidModel: the encoder of the earlier generation is not where it was.
        InvalidStore: as `reindex`.
    """
    home = settings.store
    folder, source = current(home), written(home)
    lineage = Lineage.read(folder)
    if lineage is None or not has_catalog(home / lineage.earlier):
        raise InvalidRequest(f"{home}: has no earlier generation; name an encoder with `lookalike reindex --model`")
    meta = read_meta(home / lineage.earlier)
    # The service has not taken up the current generation, so the earlier one has every change.
    if source == home / lineage.earlier:
        publish(home, source)
        with closing(CatalogReader(source)) as reader:
            return meta["model"], len(reader.keys())
    model = Path(meta["model_folder"])
    if read_card(model).fingerprint != meta["fingerprint"]:
        raise InvalidModel(f"{model}: is another encoder by now than the one that the earlier generation is of")
    return meta["model"], reindex(model, settings)


def _begin(home: Path, folder: Path, fingerprint: str) -> None:
    """Let a new generation begin with the embeddings of the latest one of its encoder, if one is there."""
    alike = [
        earlier
        for earlier in generations(home).values()
        if earlier != folder and read_meta(earlier)["fingerprint"] == fingerprint
    ]
    if not alike or has_catalog(folder):
        return
    guard = lock(folder)
    try:
        if not has_catalog(folder):
            copy_catalog(alike[-1] / FILE, folder / FILE)
    finally:
        os.close(guard)
