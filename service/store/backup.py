"""Back up a store's catalog into one file while it is in use, and restore a store from such a file.

A catalog is the source of truth, and a copy of it is a whole store: the index is rebuilt from it.
"""

import os
from pathlib import Path

import apsw

from service.errors import InvalidOutput, InvalidRequest, InvalidStore
from service.files import replace_file
from service.store.catalog import (
    FILE,
    MIGRATIONS,
    checked_meta,
    connect,
    described,
    full_error,
    has_catalog,
    meta_of,
    one,
)
from service.store.layout import is_store, lock

# A copy stands alone, so it follows no earlier generation (see generations.Lineage).
_FACTS_OF_A_GENERATION = ("earlier", "follows", "served")


def backup(folder: Path, out: Path) -> int:
    """Write the catalog of a generation into one file, and return how many items the file has.

    The store may be changed meanwhile: the file holds it as of one moment after the call, and nothing that was removed
    before. The file takes the place of an earlier backup once it is complete, checked and on the disk.

    Args:
        folder: of the generation that is written to; see generations.written.
        out: the file.

    Raises:
        InvalidStore: the catalog is damaged. `out` stays as it was.
        InvalidOutput: `out` is another kind of file, lies in a store, or cannot be written. It stays as it was.

    Cost: writes all items once, and reads them twice.
    """
    if is_store(out.absolute().parent) or out.is_dir():
        raise InvalidOutput(f"{out}: expected a new file, or an earlier backup, outside of every store's folder")
    if out.exists():
        try:
            checked(out)
        except InvalidStore as error:
            raise InvalidOutput(f"{out}: is there and no backup that can be read; name another --out") from error
    return copy_catalog(folder / FILE, out)


def restore(file: Path, home: Path) -> int:
    """Make a new store from a backup, and return how many items it has. A restore that was interrupted starts again.

    Args:
        file: of `backup`, or a catalog.sqlite that no process has open.
        home: the store's folder; new, or empty.

    Raises:
        InvalidStore: the file is no catalog or damaged, or the folder is in use or holds something else.
        InvalidRequest: the folder holds a store already, or there is no such file.
        InvalidOutput: the store cannot be written.
    """
    if not file.is_file():
        raise InvalidRequest(f"{file}: no such file; expected a backup of `lookalike store backup`")
    if is_store(home):
        raise InvalidRequest(f"{home}: holds a store already; restore to another --store, or move that one away")
    checked(file)
    guard = lock(home)
    try:
        if has_catalog(home):
            raise InvalidRequest(f"{home}: holds a store already; restore to another --store, or move that one away")
        return copy_catalog(file, home / FILE)
    finally:
        os.close(guard)


def copy_catalog(source: Path, target: Path) -> int:
    """Copy a catalog as of one moment, without the pages of removed items, and return how many items the copy has.

    The copy is checked before it takes its name. Any process may change the source meanwhile.

    Raises:
        InvalidStore: the source cannot be read, or the copy is damaged.
        InvalidOutput: the copy cannot be written.
    """
    try:
        with replace_file(target) as temporary:
            # A copy that was killed has left its temporary file, and SQLite writes into new files alone.
            temporary.unlink(missing_ok=True)
            _write_copy(source, temporary)
            return checked(temporary)
    except apsw.FullError as error:
        raise InvalidOutput(f"{target}: cannot be written: {error}") from error
    except OSError as error:
        raise InvalidOutput(f"{target}: cannot be written: {error.strerror or error}") from error


def count_in_files(file: Path) -> int:
    """Return how many items of a backup have a picture whose bytes are not in it. Raises InvalidStore."""
    query = "SELECT count(*) FROM pictures WHERE original IS NULL AND length(thumbnail) > 0"
    try:
        database = connect(file)
        try:
            return int(one(database, query))
        finally:
            database.close()
    except apsw.Error as error:
        raise InvalidStore(f"{file}: {described(error)}") from error


def _write_copy(source: Path, temporary: Path) -> None:
    """Write a copy of a catalog. Raises InvalidStore, InvalidOutput, and apsw.FullError for a full disk."""
    # SQLite does not tell which of two files it cannot open.
    temporary.touch()
    try:
        database = connect(source)
        try:
            # One read transaction: unlike the steps of SQLite's backup interface it is not restarted by each change.
            with full_error(database):
                database.execute("VACUUM INTO ?", (str(temporary),)).fetchall()
        finally:
            database.close()
        copy = connect(temporary, writable=True)
        try:
            copy.execute(f"DELETE FROM meta WHERE name IN {_FACTS_OF_A_GENERATION}").fetchall()  # noqa: S608
        finally:
            copy.close()
    except apsw.FullError:
        raise
    except apsw.Error as error:
        raise InvalidStore(f"{source}: {described(error)}") from error


def checked(file: Path) -> int:
    """Open a catalog's file, check its pages, tables and indexes, and return how many items it has.

    Raises:
        InvalidStore: the file is damaged, or no catalog of a store.
    """
    meta = meta_of(file)
    if meta.get("schema") not in MIGRATIONS:
        checked_meta(file, meta)
    database = connect(file)
    try:
        found = str(one(database, "PRAGMA integrity_check(1)"))
        if found != "ok":
            raise InvalidStore(f"{file}: damaged: {found}")
        return int(one(database, "SELECT count(*) FROM items"))
    except apsw.Error as error:
        raise InvalidStore(f"{file}: {described(error)}") from error
    finally:
        database.close()
