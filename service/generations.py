"""A store re-embedded with another encoder: build the new generation, let it catch up, switch to it.

A generation is a whole store in a folder of its own (see store/layout.py). It takes over the items of the generation
before it by that one's sequence numbers: first all of them, later only the changes since. The caller gives `add`,
which embeds pictures with the new encoder and stores them, as `Gallery.add_many` does.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from service.errors import InvalidStore, ItemNotFound, LookalikeError, Outcome, attempt
from service.items import NewPicture
from service.store import Item, Store
from service.store.catalog import has_catalog, read_meta
from service.store.catalog_reader import CatalogReader
from service.store.embedded import EmbeddedStore

Add = Callable[[Sequence[NewPicture[bytes]]], list[Outcome[bool]]]

_ITEMS_AT_ONCE = 64
# Facts about the store that a later generation takes over: the prefixes of its sources (see jobs/naming.py).
_INHERITED = ("prefixes",)


@dataclass(frozen=True)
class Lineage:
    """Which generation a store was built from, and how far it has caught up.

    Attributes:
        earlier: name of the earlier generation's folder within the store's folder; "" for the first generation, which
            lies in the store's folder itself.
        caught_up_to: sequence number of the earlier generation's last change that was taken over; −1 for none.
    """

    earlier: str
    caught_up_to: int = -1

    @classmethod
    def of(cls, store: EmbeddedStore) -> "Lineage | None":
        """Return a store's lineage, or None for a store that was not built from another."""
        facts = store.facts()
        return cls(facts["earlier"], int(facts.get("follows", -1))) if "earlier" in facts else None

    def save(self, store: EmbeddedStore) -> None:
        """Write the lineage into a store. Durable when it returns."""
        store.note({"earlier": self.earlier, "follows": str(self.caught_up_to)})


def build(store: EmbeddedStore, earlier: CatalogReader, home: Path, add: Add, done: Callable[[int], object]) -> None:
    """Fill a new generation until it has every item of the earlier one, and index it.

    A build that was interrupted resumes where it stopped.

    Args:
        store: the new generation, empty or partly built.
        earlier: the catalog of the generation before it; a service may change it meanwhile.
        home: the store's folder.
        add: embeds and stores pictures.
        done: is called with numbers of items that were taken over.

    Raises:
        InvalidStore: as `follow`.
    """
    folder = earlier.path.parent
    lineage = Lineage.of(store) or Lineage("" if folder == home else folder.name)
    lineage.save(store)
    while lineage.caught_up_to < earlier.sequence():
        lineage = replace(lineage, caught_up_to=follow(store, earlier, lineage.caught_up_to, add, done))
        lineage.save(store)
    store.settle()


def catch_up(store: EmbeddedStore, home: Path, add: Add) -> None:
    """Take over the changes in the earlier generation since the store was built from it.

    A store without an earlier generation, or whose earlier generation was deleted, stays as it is.

    Raises:
        InvalidStore: as `follow`.
    """
    lineage = Lineage.of(store)
    if lineage is None or not has_catalog(home / lineage.earlier):
        return
    with closing(CatalogReader(home / lineage.earlier)) as earlier:
        if earlier.sequence() > lineage.caught_up_to:
            replace(lineage, caught_up_to=follow(store, earlier, lineage.caught_up_to, add)).save(store)


def switch(earlier: EmbeddedStore, later: EmbeddedStore, home: Path, add: Add, read_only: bool) -> None:
    """Let a later generation take the place of the one that is served.

    `earlier` refuses changes from then on and still answers searches. A later generation that is read-only does not
    catch up: the process that writes it does.

    Raises:
        InvalidStore: as `follow`; then `earlier` takes changes again.
    """
    if not read_only:
        # The first pass takes over nearly everything while changes go on, so that the second holds them up briefly.
        catch_up(later, home, add)
        with earlier.retiring("the store was replaced by one of another encoder; try again"):
            catch_up(later, home, add)
    later.inherit(earlier)


def follow(
    store: Store, earlier: CatalogReader, since: int, add: Add, done: Callable[[int], object] = lambda _: None
) -> int:
    """Take over the changes in an earlier generation and embed its pictures again. Items that are equal are skipped.

    Args:
        store: the later generation.
        earlier: the earlier generation's catalog.
        since: sequence number of the last change that was taken over; −1 for none.
        add: embeds and stores pictures.
        done: is called with numbers of items that were taken over.

    Returns:
        The sequence number up to which everything is taken over now.

    Raises:
        InvalidStore: the pictures of some items were neither kept nor are, with the same digest, where they came
            from. All other items are taken over.
    """
    latest = earlier.sequence()
    inherited = {name: fact for name, fact in read_meta(earlier.path.parent).items() if name in _INHERITED}
    if inherited:
        store.note(inherited)
    for id in earlier.removed(since):
        if earlier.get(id) is None:
            store.remove(id)
    failed: list[str] = []
    last = 0
    while rows := earlier.changed_items(since, _ITEMS_AT_ONCE, last):
        last = rows[-1][0]
        pictures: list[NewPicture[bytes]] = []
        for _, item in rows:
            have = store.get(item.id)
            if have is None or have.digest != item.digest:
                data = attempt(_picture, earlier, item)
                if isinstance(data, LookalikeError):
                    failed.append(f"{item.id}: {data}")
                else:
                    pictures.append(NewPicture(item.id, data, item.metadata, item.source))
            else:
                if have.metadata != item.metadata:
                    store.set_metadata(item.id, lambda _, new=item.metadata: new)  # type: ignore[misc]
                if item.source is not None and have.source != item.source:
                    store.set_sources({item.id: item.source})
        outcomes = zip(pictures, add(pictures), strict=True)
        failed += [f"{one.id}: {outcome}" for one, outcome in outcomes if isinstance(outcome, LookalikeError)]
        done(len(rows))
    if failed:
        raise InvalidStore(f"{len(failed)} items cannot be embedded anew; {failed[0]}")
    return latest


def _picture(catalog: CatalogReader, item: Item) -> bytes:
    """Return the bytes of an item's picture, as the store kept them or from its source. Raises ItemNotFound."""
    data = catalog.original(item.id)
    if data is not None:
        return data
    try:
        data = Path(item.source or "").read_bytes()
    except OSError:
        raise ItemNotFound(f"its picture was not kept and cannot be read from {item.source}") from None
    if hashlib.sha256(data).hexdigest() != item.digest:
        raise ItemNotFound(f"its picture was not kept, and {item.source} has another by now")
    return data
