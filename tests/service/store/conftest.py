"""Small stores get what large ones have: a map of their vectors, and columns of their metadata."""

import pytest


@pytest.fixture(autouse=True)
def as_if_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let maintenance, and so `settle`, make both for a store of one item."""
    monkeypatch.setattr("service.store.maintenance._MANY_VECTORS", 1)
    monkeypatch.setattr("service.store.maintenance._MANY_ITEMS", 0)
