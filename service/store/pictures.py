"""Thumbnails and originals of a store on Milvus: files at a path of fsspec, such as a folder or s3://bucket/pictures."""

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from service.errors import InvalidStore, StoreAway
from service.store import NewItem

_THUMBNAIL, _ORIGINAL = ".webp", ".original"


class Pictures:
    """The files, each named by its item's row and never written twice. Calls may come from any thread."""

    def __init__(self, place: str) -> None:
        """Look whether the place can be reached.

        Args:
            place: a path as fsspec writes it.

        Raises:
            InvalidStore: fsspec knows no such kind of path, lacks the package for it, or cannot use it.
        """
        self._place = place
        try:
            self._files, self._root = fsspec.core.url_to_fs(place)
            if isinstance(self._files, LocalFileSystem):
                self._files.auto_mkdir = True
                self._files.makedirs(self._root, exist_ok=True)
            else:
                # An object store has no folders; the call shows that it answers.
                self._files.exists(self._root)
        # Each kind of path has errors of its own.
        except Exception as error:
            raise InvalidStore(f"LOOKALIKE_PICTURES: {place} cannot be used: {error}") from error

    def put(self, item: NewItem) -> str:
        """Keep the files of an item, and return their name; "" if it has none. They are written when it returns."""
        given = {_THUMBNAIL: item.thumbnail, _ORIGINAL: item.original}
        files = {ending: data for ending, data in given.items() if data}
        if not files:
            return ""
        name = uuid4().hex
        for ending, data in files.items():
            self._call("pipe_file", self._path(name, ending), data)
        return name

    def thumbnail(self, name: str) -> bytes | None:
        """Return a thumbnail; None if there is none."""
        return self._read(name, _THUMBNAIL)

    def original(self, name: str) -> bytes | None:
        """Return the bytes of an image file; None if they were not kept."""
        return self._read(name, _ORIGINAL)

    def remove(self, names: Sequence[str]) -> None:
        """Remove the files of these names, as far as they are there."""
        for path in [self._path(name, ending) for name in names if name for ending in (_THUMBNAIL, _ORIGINAL)]:
            try:
                self._call("rm_file", path)
            except FileNotFoundError:
                continue

    def _read(self, name: str, ending: str) -> bytes | None:
        if not name:
            return None
        try:
            data: bytes = self._call("cat_file", self._path(name, ending))
        except FileNotFoundError:
            return None
        return data

    def _path(self, name: str, ending: str) -> str:
        return f"{self._root}/{name[:2]}/{name}{ending}"

    def _call(self, method: str, path: str, *data: bytes) -> Any:
        try:
            return getattr(self._files, method)(path, *data)
        except FileNotFoundError:
            raise
        # Each kind of path has errors of its own.
        except Exception as error:
            raise StoreAway(f"{self._place}: cannot be used now: {type(error).__name__}: {error}") from error
