"""One HTTP app for each module of tests."""

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from service.encoding.encoder import Encoder
from service.gallery import Gallery
from service.http.guard import Guard
from service.http.routes import create_app
from service.http.slots import Slots
from service.settings import Settings
from service.store.embedded import EmbeddedStore
from tests.service.http.rows import PICTURE


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, encoder: Encoder) -> Iterator[TestClient]:
    """The service by its default settings, with one item in it, `kept`."""
    app, settings = create_app(), Settings()
    store = EmbeddedStore(tmp_path_factory.mktemp("refusals") / "store", encoder.card, encoder.dimension)
    app.state.gallery = Gallery(encoder, store, settings)
    app.state.slots = Slots(settings.max_waiting, settings.work_timeout_s)
    with TestClient(Guard(app, settings), raise_server_exceptions=False) as opened:
        assert opened.put("/images/kept", content=PICTURE).status_code == 201
        yield opened
    app.state.slots.close()
    app.state.gallery.close()
