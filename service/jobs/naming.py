"""Which ids a source's pictures get in a store, so that two sources with the same file names keep their pictures apart.

A picture's source in the store is ORIGIN/ID: where its SOURCE lies (a real path or a set's name), and its id there.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol
from unicodedata import normalize

from service.account import printable
from service.errors import LookalikeError, attempt
from service.jobs.reading import read_ahead
from service.sources import origin_of
from service.sources.source import Source
from service.store import Item, Known

# The fact in which a store remembers the prefixes of its sources: {origin: [prefix, whether all ids have it]}.
PREFIXES = "prefixes"
_SHOWN = 3


class Items(Protocol):
    """The items of a store, as far as names need them."""

    def get(self, id: str) -> Item | None:
        """Return an item, or None."""
        ...

    def count(self) -> int:
        """Return the number of items."""
        ...

    def facts(self) -> dict[str, str]:
        """Return the facts that the store holds about itself."""
        ...

    def note(self, facts: dict[str, str]) -> None:
        """Write facts into the store."""
        ...


class Collection(Protocol):
    """Where a source's pictures go; a Gallery is one."""

    @property
    def store(self) -> Items:
        """Its items."""
        ...

    def check_id(self, id: str) -> str:
        """Return an id in composed form. Raises InvalidRequest."""
        ...


@dataclass(frozen=True)
class Naming:
    """How the pictures of one source are named in a store.

    Attributes:
        origin: where the source lies.
        prefix: begins ids, followed by a slash; "" for none.
        everywhere: whether all ids begin with the prefix, or only those that another source has with other bytes.
        moved: whether the store has most of these pictures from another place, where the source was before.
        notes: sentences that tell the user of a choice.
        known: ids that pictures have in the store already, by their ids in the source.
    """

    origin: str
    prefix: str = ""
    everywhere: bool = False
    moved: bool = False
    notes: tuple[str, ...] = ()
    known: Mapping[str, str] = field(default_factory=dict)

    def source_of(self, id: str) -> str:
        """Return what the store records as the source of a picture."""
        return f"{self.origin}/{id}"

    def id_of(self, id: str, digest: str, gallery: Collection) -> str:
        """Return the id in the store of the picture with this id in the source.

        Raises:
            InvalidRequest: as Gallery.check_id.
        """
        if id in self.known:
            return self.known[id]
        plain = gallery.check_id(id)
        if not self.prefix:
            return plain
        if not self.everywhere:
            item = gallery.store.get(plain)
            if item is None or item.digest == digest or item.source == self.source_of(id):
                return plain
        return gallery.check_id(f"{self.prefix}/{id}")


class _Survey(NamedTuple):
    """What a store has of a source's plain ids.

    Attributes:
        own: number of those that came from this source.
        agree: number of those with the same bytes that came from elsewhere.
        differ: ids that came from elsewhere and have other bytes.
        owners: origins of the latter, with their numbers.
    """

    own: int
    agree: int
    differ: list[str]
    owners: Counter[str]


def choose_names(source: Source, gallery: Collection, prefix: str | None) -> Naming:
    """Decide how a source's pictures are named, and let the store remember a prefix.

    A source whose ids the store has from another source, with other bytes, gets a prefix: the name of its folder or
    file, made unique. It gets none if most of its pictures are there already with the same bytes: then it is a source
    that has moved.

    Args:
        source: the pictures.
        gallery: where they go.
        prefix: what the user chose; "" to let its pictures replace those of other sources; None to decide here.

    Cost: looks up every id; reads the pictures whose ids came from elsewhere.
    """
    origin, store = origin_of(source.name), gallery.store
    remembered: dict[str, tuple[str, bool]] = json.loads(store.facts().get(PREFIXES, "{}"))
    if prefix is not None:
        prefix = normalize("NFC", prefix).strip("/")
        naming = Naming(origin, prefix, everywhere=bool(prefix))
    elif origin in remembered:
        naming = Naming(origin, *remembered[origin])
    else:
        naming = _decide(source, origin, gallery, {one for one, _ in remembered.values()})
        if not naming.prefix:
            return naming
    if naming.prefix:
        gallery.check_id(naming.prefix)
    chosen = (naming.prefix, naming.everywhere)
    if tuple(remembered.get(origin, ())) != chosen:
        store.note({PREFIXES: json.dumps(remembered | {origin: chosen})})
    return naming


def name_more(
    source: Source, new: Sequence[str], known: Sequence[Known], gallery: Collection, prefix: str | None
) -> Naming:
    """Decide how new pictures of a source are named of which the store has others, as `choose_names` does.

    Args:
        source: all pictures of the source.
        new: the paths of the new ones.
        known: the items that the store has of it.
        gallery: where the new ones go.
        prefix: as of `choose_names`.

    Cost: looks up the new ids.
    """
    origin = origin_of(source.name)
    remembered: dict[str, tuple[str, bool]] = json.loads(gallery.store.facts().get(PREFIXES, "{}"))
    if prefix is not None or origin in remembered:
        return choose_names(source, gallery, prefix)
    naming = Naming(origin, *prefix_of((one.path, one.id) for one in known))
    if not naming.prefix:
        found = (_get(id, gallery) for id in new)
        foreign = [item for item in found if item is not None and item.source != naming.source_of(item.id)]
        if not foreign:
            return naming
        taken = _free_prefix(source, origin, gallery, {one for one, _ in remembered.values()})
        note = (
            f"{printable(foreign[0].id)}: the store has another picture under this id, from "
            f"{printable(owner_of(foreign[0]))}; ids of such pictures begin with {taken}/"
        )
        naming = Naming(origin, taken, notes=(note,))
    gallery.store.note({PREFIXES: json.dumps(remembered | {origin: (naming.prefix, naming.everywhere)})})
    return naming


def prefix_of(pairs: Iterable[tuple[str, str]]) -> tuple[str, bool]:
    """Return the prefix of a source, "" for none, and whether all its ids have it.

    Args:
        pairs: the id in the source and the id in the store of each picture that the store has.
    """
    found = {id.removesuffix(own).rstrip("/") if id.endswith(f"/{own}") else "" for own, id in pairs}
    prefix = max(found, default="", key=len)
    return prefix, bool(prefix) and "" not in found


def _decide(source: Source, origin: str, gallery: Collection, taken: set[str]) -> Naming:
    survey = _look(source, origin, gallery)
    if 2 * survey.agree > len(source):
        note = f"most of these pictures are there already from another place: {source.name} is taken as moved"
        return Naming(origin, moved=True, notes=(note,))
    if not survey.differ:
        return Naming(origin)
    prefix = _free_prefix(source, origin, gallery, taken)
    shown = ", ".join(printable(id) for id in survey.differ[:_SHOWN])
    more = f" and {len(survey.differ) - _SHOWN} more" if len(survey.differ) > _SHOWN else ""
    owners = ", ".join(printable(owner) for owner, _ in survey.owners.most_common(_SHOWN))
    whose = "ids of such pictures" if survey.own else "its ids"
    note = (
        f"{shown}{more}: the store has other pictures under these ids, from {owners}; {whose} begin with {prefix}/ "
        "(--prefix chooses another, --prefix '' replaces those pictures)"
    )
    return Naming(origin, prefix, everywhere=not survey.own, notes=(note,))


def _look(source: Source, origin: str, gallery: Collection) -> _Survey:
    """Compare a source's ids with the store, until it is certain that the source has moved."""
    own, foreign = 0, dict[int, Item]()
    for position, id in enumerate(source.ids) if gallery.store.count() else ():
        item = _get(id, gallery)
        if item is not None and item.source == f"{origin}/{id}":
            own += 1
        elif item is not None:
            foreign[position] = item
    positions = list(foreign)
    agree, differ, owners = 0, list[str](), Counter[str]()

    def same(number: int) -> bool:
        position = positions[number]
        return hashlib.sha256(source.entry(position).data).hexdigest() == foreign[position].digest

    for chunk in read_ahead(range(len(positions)), same):
        for number, outcome in chunk:
            if outcome is True:
                agree += 1
            elif not isinstance(outcome, LookalikeError):
                item = foreign[positions[number]]
                differ.append(item.id)
                owners[owner_of(item)] += 1
        if 2 * agree > len(source):
            break
    return _Survey(own, agree, differ, owners)


def owner_of(item: Item) -> str:
    """Return where an item came from, for people: the origin of its source."""
    if item.source is None:
        return "HTTP"
    # Its id may have a prefix that its path in the source does not have.
    parts = item.id.split("/")
    for start in range(len(parts)):
        if item.source.endswith(path := "/" + "/".join(parts[start:])):
            return item.source.removesuffix(path)
    return item.source


def _get(id: str, gallery: Collection) -> Item | None:
    """Return the item of an id of a source; None also for an id that no item can have."""
    checked = attempt(gallery.check_id, id)
    return None if isinstance(checked, LookalikeError) else gallery.store.get(checked)


def _free_prefix(source: Source, origin: str, gallery: Collection, taken: set[str]) -> str:
    """Return the name of the source's folder or file, with a number if the store has such ids from other sources."""
    path = Path(origin)
    name = path.name if path.is_dir() else path.stem
    name = normalize("NFC", printable(name)) or "source"
    number = 1
    while True:
        prefix = name if number == 1 else f"{name}-{number}"
        found = (_get(f"{prefix}/{id}", gallery) for id in source.ids)
        if prefix not in taken and not any(item is not None for item in found):
            return prefix
        number += 1
