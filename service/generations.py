"""A store re-embedded with another encoder: build the new generation, let it catch up, switch to it.

A generation is a whole store in a folder of its own (see store/layout.py). It takes over the items of the generation
before it by that one's sequence numbers: first all of them, later only the changes since. The caller gives `add`,
which embeds pictures with the new encoder and stores them, as `Gallery.add_many` does.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from service.errors import InvalidRequest, InvalidStore, LookalikeError, Outcome, attempt
from service.file_facts import FileFacts, Move
from service.items import NewPicture
from service.originals import read_source
from service.store import Store
from service.store.catalog import has_catalog, no_store, read_meta
from service.store.catalog_reader import CatalogReader
from service.store.embedded import EmbeddedStore
from service.store.layout import current, generation, generations, lock, remove

Add = Callable[[Sequence[NewPicture[bytes]]], list[Outcome[bool]]]

_ITEMS_AT_ONCE = 64
# A build that took over the last changes in so short a time is near enough to the store.
_NEAR_S = 1.0
# Facts about the store that a later generation takes over: the prefixes of its sources (see jobs/naming.py), and the
# folders whose files are its pictures (see originals.py).
_INHERITED = ("prefixes", "folders")
# The fact that holds the fingerprints of all encoders before, from the first on.
_REPLACED = "replaced"


@dataclass(frozen=True)
class Lineage:
    """Which generation a store was built from, and how far it has caught up.

    Attributes:
        earlier: name of the earlier generation's folder within the store's folder; "" for the first generation, which
            lies in the store's folder itself.
        caught_up_to: sequence number of the earlier generation's last change that was taken over; −1 for none.
        served: whether a process has opened the generation for changes. Until then changes go to the earlier one.
    """

    earlier: str
    caught_up_to: int = -1
    served: bool = True

    @classmethod
    def read(cls, folder: Path) -> "Lineage | None":
        """Return the lineage of the generation in a folder, or None if it was not built from another."""
        facts = read_meta(folder)
        if "earlier" not in facts:
            return None
        return cls(facts["earlier"], int(facts.get("follows", -1)), facts.get("served") != "no")

    @classmethod
    def of(cls, store: EmbeddedStore) -> "Lineage | None":
        """Return a store's lineage, or None for a store that was not built from another."""
        return cls.read(store.folder)

    def save(self, store: EmbeddedStore) -> None:
        """Write the lineage into a store. Durable when it returns."""
        served = "yes" if self.served else "no"
        store.note({"earlier": self.earlier, "follows": str(self.caught_up_to), "served": served})


class Removed(NamedTuple):
    """A generation that was removed: its number, and the bytes of its files."""

    number: int
    size: int


def build(store: EmbeddedStore, earlier: CatalogReader, home: Path, add: Add, done: Callable[[int], object]) -> None:
    """Fill a new generation with all items of the earlier one but the changes of the last second, and index it.

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
    lineage = Lineage.of(store)
    if lineage is None or lineage.earlier != _name(home, folder):
        lineage = Lineage(_name(home, folder), served=False)
        _remove_strangers(store, earlier)
        store.note({_REPLACED: f"{earlier.meta.get(_REPLACED, '')} {earlier.meta['fingerprint']}".strip()})
    lineage.save(store)
    took_s = _NEAR_S
    # A service that changes faster than this follows would keep it here for ever. The rest is taken over while changes
    # wait, when the service takes the new generation up.
    while lineage.caught_up_to < earlier.sequence() and took_s >= _NEAR_S:
        start = time.monotonic()
        lineage = replace(lineage, caught_up_to=follow(store, earlier, lineage.caught_up_to, add, done))
        lineage.save(store)
        took_s = time.monotonic() - start
    store.settle()


def catch_up(store: EmbeddedStore, home: Path, add: Add) -> None:
    """Take over the changes in the earlier generation since the store was built from it.

    A store without an earlier generation, or whose earlier generation was deleted, stays as it is.

    Raises:
        InvalidStore: as `follow`.
    """
    lineage = Lineage.of(store)
    if lineage is None or _earlier(home, store.folder, lineage) is None:
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
            take_up(later)
    later.inherit(earlier)


def take_up(store: EmbeddedStore) -> None:
    """Note that changes go to this generation from now on. It must have caught up. Durable when it returns."""
    lineage = Lineage.of(store)
    if lineage is not None and not lineage.served:
        replace(lineage, served=True).save(store)


def written(home: Path) -> Path:
    """Return the folder of the generation that has every change.

    This is the current generation, unless no process has opened it for changes since it was published: a service goes
    on with the generation before it until SIGHUP.

    Args:
        home: the store's folder.

    Raises:
        InvalidStore: there is no store, or it is damaged.
    """
    folder = current(home)
    if not has_catalog(folder):
        raise no_store(home)
    while (lineage := Lineage.read(folder)) is not None:
        earlier = _earlier(home, folder, lineage)
        if earlier is None or (lineage.served and not _behind(earlier, lineage)):
            break
        folder = earlier
    return folder


def replaced(home: Path) -> set[str]:
    """Return the fingerprints of the encoders that a store had before its current one. Raises InvalidStore."""
    meta = read_meta(current(home))
    # Earlier versions did not note them.
    older = [folder for number, folder in generations(home).items() if number < generation(home)]
    found = {*meta.get(_REPLACED, "").split(), *(read_meta(folder)["fingerprint"] for folder in older)}
    return found - {meta["fingerprint"]}


def prune(home: Path) -> list[Removed]:
    """Remove every generation but the current one, and with it the pictures that were deleted since.

    A generation that another process is building stays; one whose building was interrupted is removed.

    Args:
        home: the store's folder. A service may use it.

    Raises:
        InvalidRequest: a service still writes to an earlier generation.
        InvalidStore: there is no store, it is damaged, or a file cannot be removed.
    """
    kept, lineage = written(home), Lineage.read(current(home))
    with ExitStack() as locks:
        if kept != current(home):
            assert lineage is not None
            kept = current(home)
            try:
                locks.callback(os.close, lock(home))
            except InvalidStore as error:
                raise InvalidRequest(
                    f"{home}: its service has not taken up {kept.name} yet; send it SIGHUP, then prune"
                ) from error
            if _behind(home / lineage.earlier, lineage):
                raise InvalidRequest(
                    f"{home}: {kept.name} lacks the last changes; start the service, which takes them over, then prune"
                )
        return [
            Removed(number, remove(home, folder))
            for number, folder in generations(home).items()
            if number < generation(home) or (number > generation(home) and _locked(folder, locks))
        ]


def _locked(folder: Path, locks: ExitStack) -> bool:
    """Lock a generation, and return whether that worked."""
    try:
        locks.callback(os.close, lock(folder))
    except InvalidStore:
        return False
    return True


def _earlier(home: Path, folder: Path, lineage: Lineage) -> Path | None:
    """Return the folder of the generation that a generation follows; None if it is not there."""
    earlier = home / lineage.earlier
    return earlier if earlier != folder and has_catalog(earlier) else None


def _behind(earlier: Path, lineage: Lineage) -> bool:
    """Return whether an earlier generation has changes that the one of this lineage lacks."""
    with closing(CatalogReader(earlier)) as reader:
        return reader.sequence() > lineage.caught_up_to


def _name(home: Path, folder: Path) -> str:
    return "" if folder == home else folder.name


def _remove_strangers(store: EmbeddedStore, earlier: CatalogReader) -> None:
    """Remove the items that an earlier generation does not have, from a store that was begun with those of another."""
    cursor: int | None = 0
    while cursor is not None:
        items, cursor = store.scan(_ITEMS_AT_ONCE, cursor)
        for item in items:
            if earlier.get(item.id) is None:
                store.remove(item.id)


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
    if dismissed := earlier.dismissed():
        store.dismiss([*dismissed])
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
                kept = earlier.original(item.id)
                data = attempt(read_source, item) if kept is None else kept
                if isinstance(data, LookalikeError):
                    # An item that a service removes or replaces meanwhile is a change that the next pass takes over.
                    now = earlier.get(item.id)
                    if now is not None and now.digest == item.digest:
                        failed.append(f"{item.id}: {data}")
                else:
                    whether = kept is not None
                    pictures.append(
                        NewPicture(
                            item.id,
                            data,
                            item.metadata,
                            item.source,
                            keep_original=whether,
                            mtime_ns=item.mtime_ns,
                        )
                    )
            else:
                if have.metadata != item.metadata:
                    store.set_metadata(item.id, lambda _, new=item.metadata: new)  # type: ignore[misc]
                # An earlier generation of an earlier schema knows no facts.
                of = have if item.facts == FileFacts() else item
                moved = Move(item.id, item.digest, item.id, item.source or have.source, of.facts, of.mtime_ns)
                if moved[3:] != (have.source, have.facts, have.mtime_ns):
                    store.move([moved])
        outcomes = zip(pictures, add(pictures), strict=True)
        failed += [f"{one.id}: {outcome}" for one, outcome in outcomes if isinstance(outcome, LookalikeError)]
        done(len(rows))
    if failed:
        raise InvalidStore(f"{len(failed)} items cannot be embedded again; {failed[0]}")
    return latest
