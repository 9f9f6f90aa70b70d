"""The HTTP app behind BentoML's own routes, with the settings of each test."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from service.encoding.encoder import Encoder
from service.gallery import Gallery
from service.http.guard import Guard
from service.http.routes import create_app
from service.http.slots import Slots
from service.settings import Settings
from service.store.embedded import EmbeddedStore

Served = Callable[..., TestClient]


@pytest.fixture
def served(tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """Return a function that serves an empty store by settings, given as text like environment variables."""
    with ExitStack() as stack:

        def serve(**settings: str) -> TestClient:
            for name, value in settings.items():
                monkeypatch.setenv(f"LOOKALIKE_{name.upper()}", value)
            app, read = create_app(), Settings()
            store = EmbeddedStore(tmp_path / "store", encoder.card, encoder.dimension)
            app.state.gallery = Gallery(encoder, store, read)
            app.state.slots = Slots(read.max_waiting, read.work_timeout_s)
            stack.callback(app.state.gallery.close)
            stack.callback(app.state.slots.close)
            stack.callback(app.state.groupings.close)
            stack.callback(app.state.maps.close)
            return TestClient(Guard(app, read), raise_server_exceptions=False)

        yield serve
