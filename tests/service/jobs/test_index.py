"""`lookalike index`: a source into a store."""

from pathlib import Path

import numpy as np

from service.gallery import Gallery
from service.jobs.index import index_source
from service.jobs.reading import Tally
from service.queries import PictureQuery
from service.sources import open_source
from tests.conftest import encoded, missing, scene


def test_indexing_is_idempotent_and_sees_changes(tmp_path: Path, gallery: Gallery) -> None:
    folder = tmp_path / "pictures" / "scenes"
    folder.mkdir(parents=True)
    for n in range(3):
        (folder / f"{n}.png").write_bytes(encoded(scene(seed=n)))
    (folder / "bad.png").write_bytes(b"no picture")
    source = open_source(str(tmp_path / "pictures"))
    assert index_source(source, gallery) == Tally(3, 0, 1)
    assert index_source(source, gallery) == Tally(0, 3, 1)
    (folder / "1.png").write_bytes(encoded(scene(seed=9)))
    assert index_source(source, gallery) == Tally(1, 2, 1)
    assert gallery.store.count() == 3
    item = gallery.get("scenes/1.png")
    assert item.metadata == {"label": "scenes"}
    assert item.source == f"{tmp_path}/pictures/scenes/1.png"
    assert gallery.find([PictureQuery(encoded(scene(seed=9)))], 1)[0][0].id == "scenes/1.png"


def test_every_digit_finds_itself(gallery: Gallery) -> None:
    source = open_source("digits")
    index_source(source, gallery)
    assert gallery.store.count() == 1797
    begun = [gallery.embed_soon(source.entry(position).data) for position in range(len(source))]
    hits = gallery.store.search(np.stack([embedding.result() for embedding in begun]), 1)
    assert sum(found[0].id == id for found, id in zip(hits, source.ids, strict=True)) == 1797
    assert gallery.notice() is None


def test_photographs_in_a_digits_encoder_are_remarked_upon(gallery: Gallery, data_root: Path) -> None:
    photos = data_root / "photos"
    if not photos.is_dir():
        missing("no photographs: LOOKALIKE_TEST_DATA has no folder photos")
    index_source(open_source(str(photos)), gallery)
    notice = gallery.notice()
    assert notice is not None
    assert "trained on mnist/train" in notice
    assert f"`lookalike reindex --store {gallery.settings.store}`" in notice
