"""Remove all but the best copies that a list names: items, and with care their files."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from service.account import printable
from service.client import Client
from service.errors import InvalidRequest, LookalikeError
from service.gallery import open_gallery
from service.originals import folders, own_file, read_source, remove_file
from service.settings import Settings
from service.store import Item
from service.store.catalog import has_catalog, no_store, read_meta
from service.store.catalog_reader import CatalogReader
from service.store.layout import current

_PLAN_KEYS = ("remove", "digest", "keep", "keep_digest")


@dataclass
class Deleted:
    """What `delete_rest` did: ids of items, paths of files, and for what it left alone its id and why."""

    items: list[str]
    files: list[str]
    left: list[tuple[str, str]]

    def facts(self) -> dict[str, Any]:
        """Return it as --json shows it."""
        return {"items": self.items, "files": self.files, "left": [{"id": id, "reason": why} for id, why in self.left]}

    def lines(self) -> Iterator[str]:
        """Yield lines for people."""
        yield from (f"removed  {printable(id)}" for id in self.items)
        yield from (f"left     {printable(id)}: {printable(why)}" for id, why in self.left)
        yield f"{len(self.items)} items and {len(self.files)} files removed, {len(self.left)} left"
        if self.items and not self.files:
            yield "`index` adds items again as long as their files are there"


class Removing(Protocol):
    """What a removal needs of a store; a Store is one."""

    def get(self, id: str) -> Item | None:
        """Return an item, or None."""
        ...

    def facts(self) -> dict[str, str]:
        """Return the facts that the store holds about itself."""
        ...

    def remove(self, id: str) -> bool:
        """Remove an item, and return whether there was one."""
        ...


class _Served:
    """A store beside its service: its files are read here, and its service removes."""

    def __init__(self, folder: Path, reader: CatalogReader, client: Client) -> None:
        self._folder, self._reader, self._client = folder, reader, client

    def get(self, id: str) -> Item | None:
        return self._reader.get(id)

    def facts(self) -> dict[str, str]:
        return read_meta(self._folder)

    def remove(self, id: str) -> bool:
        return self._client.delete(id)


def delete_listed(plan: Path, settings: Settings, files: bool, client: Client | None = None) -> Deleted:
    """Open the store that the settings name, and remove the items of a list, as `delete_rest`.

    Args:
        plan, files: as of `delete_rest`.
        settings: name the store.
        client: of the service that serves it, if there is one. That service removes the items then.

    Raises:
        InvalidModel, InvalidRequest, InvalidStore, ServiceError.
    """
    folder = current(settings.store)
    if not has_catalog(folder):
        raise no_store(settings.store)
    if client is not None:
        with closing(CatalogReader(folder)) as reader:
            return delete_rest(plan, _Served(folder, reader, client), folder, files)
    gallery = open_gallery(settings)
    try:
        return delete_rest(plan, gallery.store, folder, files)
    finally:
        gallery.close()


def delete_rest(plan: Path, store: Removing, folder: Path, files: bool) -> Deleted:
    """Remove the items of a list that `write_plan` made, and with `files` their files.

    An item is removed only if it and the best copy of its group are as they were when the list was made, and the two
    have not been told apart since. With `files` it is removed only if its file may be, too: if `index` recorded it, its
    bytes are the same, no item that stays has it, and the best copy can be read.

    Args:
        plan: the list.
        store: is changed.
        folder: of the store's generation.
        files: whether to remove files.

    Raises:
        InvalidRequest: the list is missing, or no such list; nothing is removed.
        InvalidStore: the store cannot be changed.
    """
    rows = _read_plan(plan)
    removing = {row["remove"] for row in rows}
    done = Deleted([], [], [])
    known = folders(store.facts())
    with closing(CatalogReader(folder)) as reader:
        told_apart = reader.dismissed()
        staying = Staying(reader, removing, {row["digest"] for row in rows}) if files else None
        for row in rows:
            try:
                item = _check_row(row, store, removing, told_apart)
                if staying is not None:
                    best = store.get(row["keep"])
                    assert best is not None
                    check_best(best, reader)
                    staying.check(own_file(item, known))
            except LookalikeError as error:
                done.left.append((row["remove"], str(error)))
                continue
            # The item first: a file without an item is found again by `index`, an item without a file is not.
            store.remove(item.id)
            done.items.append(item.id)
            if staying is not None:
                try:
                    remove_file(item, known)
                    done.files.append(str(item.source))
                except LookalikeError as error:
                    done.left.append((item.id, f"the item is removed, but {error}"))
    return done


def _read_plan(plan: Path) -> list[dict[str, str]]:
    try:
        rows = [json.loads(line) for line in plan.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise InvalidRequest(
            f"{plan}: the list cannot be read: {error.strerror}; --delete-rest without --yes writes it"
        ) from error
    except ValueError as error:
        raise InvalidRequest(f"{plan}: not a list of --delete-rest: {error}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in _PLAN_KEYS):
            raise InvalidRequest(f"{plan}: line {number}: expected the texts {', '.join(_PLAN_KEYS)}")
    return rows


def _check_row(row: dict[str, str], store: Removing, removing: set[str], told_apart: set[tuple[str, str]]) -> Item:
    """Return the item that a row of a list names. Raises InvalidRequest if it is not to be removed any more."""
    item, best = store.get(row["remove"]), store.get(row["keep"])
    if item is None or item.digest != row["digest"]:
        raise InvalidRequest("it is not in the store any more, or has another picture")
    if best is None or best.digest != row["keep_digest"] or best.id == item.id:
        raise InvalidRequest("its best copy is not in the store any more, or has another picture")
    if best.id in removing:
        raise InvalidRequest("its best copy is in the list, too")
    if (item.digest, best.digest) in told_apart:
        raise InvalidRequest("you have told it apart from its best copy")
    return item


def check_best(best: Item, reader: CatalogReader) -> None:
    """Raise ItemNotFound unless the bytes of the best copy are kept, or still in their file."""
    if reader.original_head(best.id, 1) is None:
        try:
            read_source(best)
        except LookalikeError as error:
            raise type(error)(f"the best copy, {best.id}: {error}") from error


class Staying:
    """The files of items that stay, among those with the same bytes as an item that is removed."""

    def __init__(self, reader: CatalogReader, removing: set[str], digests: set[str]) -> None:
        self._paths: dict[str, str] = {}
        last = 0
        while rows := reader.scan(1000, last):
            last = rows[-1][0]
            for _, item in rows:
                if item.digest in digests and item.id not in removing and item.source is not None:
                    self._paths[str(Path(item.source).resolve())] = item.id

    def check(self, file: Path) -> None:
        """Raise InvalidRequest if an item that stays has this file."""
        if (id := self._paths.get(str(file))) is not None:
            raise InvalidRequest(f"its file is also that of {id}, which stays")
