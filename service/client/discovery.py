"""Find the service that serves a store: by its URL, or through the lock of a store on this machine."""

import os
from pathlib import Path

from service.client import Client
from service.errors import InvalidRequest
from service.store.layout import served_at

URL, KEY = "LOOKALIKE_URL", "LOOKALIKE_KEY"


def served_store(folder: Path, key: str | None = None) -> Client | None:
    """Return a client of the service that serves the store in a folder of this machine; None if there is none.

    Args:
        folder: of the store.
        key: an API key; that of LOOKALIKE_KEY if left out.

    Raises:
        InvalidRequest: the key cannot be one.
    """
    url = served_at(folder)
    return None if url is None else Client(url, _key(key))


def find_service(store: Path | None, url: str | None, key: str | None) -> Client | None:
    """Return a client of the service that a command is to talk to; None if it is to open the store itself.

    Args:
        store: a folder, for the service that serves it, if there is one.
        url: of a service; LOOKALIKE_URL if neither is given.
        key: an API key; that of LOOKALIKE_KEY if left out.

    Raises:
        InvalidRequest: both a store and a URL, or neither, or what cannot be a URL or a key.
    """
    if store is not None and url is not None:
        raise InvalidRequest("expected --store or --url, and not both")
    if store is not None:
        return served_store(store, key)
    url = url or os.environ.get(URL, "").strip() or None
    if url is None:
        raise InvalidRequest(f"expected --store DIR, or --url (or {URL}) of a running service")
    return Client(url, _key(key))


def _key(key: str | None) -> str | None:
    return key or os.environ.get(KEY, "").strip() or None
