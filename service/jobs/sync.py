"""`lookalike index --sync`: a store follows a folder. New, changed, renamed and vanished pictures, metadata kept."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from service import items
from service.account import printable
from service.client import Client
from service.client.discovery import served_store
from service.encoder_choice import choose_model
from service.errors import InvalidRequest
from service.file_facts import Move
from service.gallery import open_gallery
from service.generations import written
from service.jobs.changes import Changes, Decide, find_changes
from service.jobs.index import index_named
from service.jobs.served import ServedItems, left_out_of, send_pictures
from service.settings import Settings
from service.sources import origin_of
from service.sources.source import select
from service.store import Item, Known
from service.store.catalog import has_catalog, read_meta
from service.store.catalog_reader import CatalogReader
from service.store.layout import current

# Moves of one commit, unless items exchange their ids.
_MOVES_TOGETHER = 1000


class StoredItems:
    """The items of a store on this machine, beside the process that may be changing it: changes.Catalogued.

    Attributes:
        noted: the facts that `note` was told, for the process that changes the store.
    """

    def __init__(self, home: Path, max_id_bytes: int) -> None:
        """Open the catalog in a store's folder for reading; without one there are no items."""
        self._max_id_bytes = max_id_bytes
        self._folder = written(home) if has_catalog(current(home)) else None
        self._reader = None if self._folder is None else CatalogReader(self._folder)
        self.noted: dict[str, str] = {}

    @property
    def store(self) -> "StoredItems":
        """The items."""
        return self

    def check_id(self, id: str) -> str:
        """Return an id in composed form. Raises InvalidRequest as `items.check_id`."""
        return items.check_id(id, self._max_id_bytes)

    def get(self, id: str) -> Item | None:
        """Return an item, or None."""
        return None if self._reader is None else self._reader.get(id)

    def count(self) -> int:
        """Return the number of items."""
        return 0 if self._reader is None else len(self._reader.keys())

    def below(self, origin: str) -> list[Known]:
        """Return the items that came from a source; see Store.below."""
        return [] if self._reader is None else self._reader.below(origin)

    def stamps(self, origin: str) -> dict[str, tuple[int | None, int | None]]:
        """Return bytes and times of change of the pictures of a source, by their paths in it."""
        return {} if self._reader is None else self._reader.stamps(origin)

    def facts(self) -> dict[str, str]:
        """Return the facts that the store holds about itself."""
        return ({} if self._folder is None else read_meta(self._folder)) | self.noted

    def note(self, facts: dict[str, str]) -> None:
        """Keep facts until the store is changed."""
        self.noted |= facts

    def close(self) -> None:
        """Close the catalog."""
        if self._reader is not None:
            self._reader.close()


@dataclass
class Synced:
    """What a sync did, or would do.

    Attributes:
        changes: what it found; of new and changed pictures those that could be read.
        dry_run: whether nothing was changed.
    """

    changes: Changes
    dry_run: bool = False

    @property
    def any(self) -> bool:
        """Whether anything was changed, or could not be."""
        found = self.changes
        return bool(found.added or found.replaced or found.renamed or found.removed or found.account.failures)

    def facts(self) -> dict[str, Any]:
        """Return it as `--json` shows it."""
        found = self.changes
        account = found.account.facts()
        return {
            **self._counts(),
            "known": found.unchanged,
            **{name: account[name] for name in ("left_out", "lost", "listed_in")},
            "dry_run": self.dry_run,
            "changes": {
                "added": [*found.added.values()],
                "replaced": [*found.replaced.values()],
                "renamed": [{"id": id, "to": to} for id, to in found.renamed],
                "removed": found.removed,
            },
            "failures": [{"id": printable(one.id), "error": printable(one.error)} for one in found.account.failures],
        }

    def lines(self) -> Iterator[str]:
        """Yield a line for each change."""
        found = self.changes
        yield from (f"add      {printable(id)}" for id in found.added.values())
        yield from (f"replace  {printable(id)}" for id in found.replaced.values())
        yield from (f"rename   {printable(id)} to {printable(to)}" for id, to in found.renamed)
        yield from (f"remove   {printable(id)}" for id in found.removed)

    def summary(self) -> str:
        """Return the numbers in a sentence."""
        return ", ".join(f"{count} {what}" for what, count in self._counts().items())

    def _counts(self) -> dict[str, int]:
        found = self.changes
        return {
            "added": len(found.added),
            "replaced": len(found.replaced),
            "renamed": len(found.renamed),
            "removed": len(found.removed),
            "unchanged": found.unchanged,
            "failed": found.account.bad,
        }


@dataclass(frozen=True)
class Target:
    """The store that follows a folder.

    Attributes:
        settings: name the store, and limits of pictures.
        client: of the service that has the store; None for a store on this machine, which a service may serve or not.
        key: for the service of a store on this machine.
    """

    settings: Settings
    client: Client | None = None
    key: str | None = None

    @property
    def name(self) -> str:
        """The store or service, for people."""
        return str(self.settings.store) if self.client is None else self.client.url

    def sync(
        self,
        source: str,
        prefix: str | None = None,
        dry_run: bool = False,
        yes: bool = False,
        decide: Decide = lambda *_: "take",
        keep_vanished: bool = False,
    ) -> Synced:
        """Bring the store up to date with a folder. It may be interrupted and run again: no metadata is lost.

        Args:
            source: the folder.
            prefix, decide: as of `changes.find_changes`.
            dry_run: find out what is to be done, and do nothing.
            yes: remove items even if that is most of them, or if the folder is not there.
            keep_vanished: without `yes`, let such items stay, with a note, where otherwise nothing is done.

        Raises:
            InvalidRequest: `yes` is needed, or this is no folder to follow. Nothing was changed.
            InvalidSource: as `find_changes`.
            InvalidModel, InvalidStore, ServiceError: the encoder, the store or its service fails.

        Cost: as `find_changes`; encoder and index are opened only if there is something to change.
        """
        with closing(self._stored(source)) as stored:
            found = find_changes(source, stored, prefix, decide)
            if (reason := _needs_yes(found, source)) and not yes:
                if not (dry_run or keep_vanished):
                    raise InvalidRequest(f"{reason} --dry-run lists them, --yes removes them.")
                found.account.notes.append(f"{reason} --yes removes them.")
                if keep_vanished:
                    found.keep_vanished()
            if not dry_run and (found.moves or found.fresh):
                known = {one.path: one.id for one in stored.below(found.naming.origin)}
                found.naming = replace(found.naming, known=known, notes=())
                self._carry_out(source, found, stored)
            if not dry_run and (self.client is not None or has_catalog(current(self.settings.store))):
                found.account.save(left_out_of(None if self.client else self.settings.store, "index"))
        failed = {one.id for one in found.account.failures}
        found.added = {path: id for path, id in found.added.items() if path not in failed}
        found.replaced = {path: id for path, id in found.replaced.items() if path not in failed}
        return Synced(found, dry_run)

    def _stored(self, source: str) -> StoredItems | ServedItems:
        if self.client is not None:
            return ServedItems(self.client, origin_of(source))
        return StoredItems(self.settings.store, self.settings.max_id_bytes)

    def _carry_out(self, source: str, found: Changes, stored: StoredItems | ServedItems) -> None:
        client = self.client or served_store(self.settings.store, self.key)
        if client is None:
            assert isinstance(stored, StoredItems)
            self._change(source, found, stored.noted)
            return
        made = sum(client.move(moves) for moves in in_steps(found.moves))
        if found.source is not None and found.fresh:
            pictures = select(found.source, np.asarray(found.fresh, np.int64))
            found.account.failures += send_pictures(pictures, client, found.naming, stored).failures
        _note_missed(found, made)

    def _change(self, source: str, found: Changes, noted: dict[str, str]) -> None:
        """Change a store that no service has."""
        chosen, choice = choose_model(self.settings, source)
        if choice:
            print(choice, file=sys.stderr)
        gallery = open_gallery(self.settings.model_copy(update={"model": chosen}))
        try:
            if noted:
                gallery.store.note(noted)
            made = sum(gallery.store.move(moves) for moves in in_steps(found.moves))
            if found.source is not None and found.fresh:
                pictures = select(found.source, np.asarray(found.fresh, np.int64))
                done = index_named(pictures, gallery, found.naming, gallery.keeps_all_originals)
                found.account.failures += done.failures
            gallery.store.settle()
            notice = gallery.notice()
        finally:
            gallery.close()
        found.account.notes += [notice] if notice else []
        _note_missed(found, made)


def in_steps(moves: Sequence[Move]) -> Iterator[list[Move]]:
    """Yield moves in commits: first all that give an id to one item which another has, then the others in parts."""
    wanted = {move.to for move in moves if move.to != move.id}
    leaving = {move.id for move in moves if move.to != move.id}
    tied = [move.id in wanted or (move.to != move.id and move.to in leaving) for move in moves]
    if any(tied):
        yield [move for move, with_others in zip(moves, tied, strict=True) if with_others]
    others = [move for move, with_others in zip(moves, tied, strict=True) if not with_others]
    for start in range(0, len(others), _MOVES_TOGETHER):
        yield others[start : start + _MOVES_TOGETHER]


def _needs_yes(found: Changes, source: str) -> str:
    """Return why the user must agree to the removals; "" if that is not needed."""
    gone = len(found.removed)
    if gone and not found.pictures:
        return f"{source}: is not there, or holds no picture, and the store has {gone} items of it; is it mounted?"
    if 2 * gone > found.items:
        return f"{source}: the files of {gone} of {found.items} items are gone."
    return ""


def _note_missed(found: Changes, made: int) -> None:
    if made < len(found.moves):
        found.account.notes.append(
            f"{len(found.moves) - made} items were changed by someone else meanwhile and left alone; sync again"
        )
