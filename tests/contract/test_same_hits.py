"""Measurement and service agree: `evaluate` and /search return the same neighbours."""

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from service.encoding.variants import embed_pixels
from service.gallery import Gallery
from service.http.routes import create_app
from service.http.slots import Slots
from service.jobs.index import index_source
from service.sources import open_source

K = 5


@pytest.mark.parametrize(
    ("bank_name", "queries_name"),
    [("digits[:1000]", "digits[1000:1200]"), ("mnist/test[:8000]", "mnist/test[8000:8200]")],
)
def test_two_hundred_queries_have_identical_hits(
    bank_name: str, queries_name: str, gallery: Gallery, request: pytest.FixtureRequest
) -> None:
    from service.encoding.voting import nearest
    from training.evaluate import read_pixels

    data_root: Path = request.getfixturevalue("data_root") if bank_name.startswith("mnist") else Path("data")
    bank, queries = open_source(bank_name, data_root), open_source(queries_name, data_root)
    index_source(bank, gallery)
    app = create_app()
    app.state.gallery, app.state.slots = gallery, Slots(8, 30)
    client = TestClient(app)

    served = []
    for position in range(len(queries)):
        answer = client.post("/search", params={"k": K}, content=queries.entry(position).data)
        served.append([hit["id"] for hit in answer.json()["hits"]])

    preprocessing = gallery.card.preprocessing
    banked, asked = (
        embed_pixels(gallery.encoder, read_pixels(source, preprocessing), source.name) for source in (bank, queries)
    )
    measured = [[bank.ids[position] for position in row] for row in nearest(banked, asked, K)[1]]
    assert len(served) == 200
    assert served == measured
