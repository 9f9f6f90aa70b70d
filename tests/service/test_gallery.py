"""Encoder + store: ids, the choice of encoder, the sentence about pictures that do not fit."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from service.encoding.card import read_card
from service.encoding.encoder import Encoder
from service.errors import InvalidQuery, InvalidRequest, ItemNotFound
from service.gallery import Gallery, check_id, find_model, open_gallery
from service.queries import ItemQuery, PictureQuery, VectorQuery
from service.settings import Settings
from service.store.embedded import EmbeddedStore
from tests.conftest import MODEL, encoded, scene


def test_ids() -> None:
    assert check_id("folder/a b%#?.png", 256) == "folder/a b%#?.png"
    assert check_id("cafe\u0301", 256) == "café"
    assert check_id("👩‍👧", 256) == "👩‍👧"
    for bad in ("", "a\nb", "a\0", "\ud800", "x" * 257, "a/content", "a/thumbnail"):
        with pytest.raises(InvalidRequest, match="id:"):
            check_id(bad, 256)


def test_the_encoder_is_the_named_one_else_the_stores_else_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the default is made below the current folder
    model = Path(shutil.copytree(MODEL, tmp_path / "mine"))
    settings = Settings(store=tmp_path / "store")
    assert find_model(settings, "digits[:100]") == find_model(settings, "mnist/test") == Path("models/mnist")
    photos = Path(".lookalike/models/photos")
    assert find_model(settings) == find_model(settings, str(tmp_path / "digits")) == photos
    assert read_card(photos).name == "photos"
    open_gallery(Settings(store=tmp_path / "store", model=model)).close()
    assert find_model(settings) == model
    assert find_model(Settings(store=tmp_path / "store", model=MODEL)) == MODEL
    shutil.rmtree(model)  # as when the store comes from another machine; the fingerprint is the same
    assert find_model(settings) == Path("models/mnist")


def test_a_notice_comes_with_the_pictures_it_is_about(gallery: Gallery) -> None:
    assert gallery.notice() is None
    gallery.add("photo", encoded(scene()), {})
    assert "trained on mnist/train" in str(gallery.notice())


def test_what_finds_and_what_cannot(gallery: Gallery) -> None:
    for n in range(3):
        assert gallery.add(f"p{n}", encoded(scene(seed=n)), {"n": n})
    assert not gallery.add("p2", encoded(scene(seed=2)), {"n": "again"})
    assert gallery.find([PictureQuery(encoded(scene(seed=1)))], 1)[0][0].id == "p1"
    vector = gallery.embed([encoded(scene(seed=1))])[0]
    assert gallery.find([VectorQuery((vector * 1e30).tolist())], 1)[0][0].id == "p1"
    assert {hit.id for hit in gallery.find([ItemQuery("p1")], 10)[0]} == {"p0", "p2"}
    assert len(gallery.find([ItemQuery("p1")], 1)[0]) == 1
    with pytest.raises(ItemNotFound):
        gallery.find([ItemQuery("p9")], 1)
    with pytest.raises(InvalidQuery, match="only zeros"):
        gallery.find([VectorQuery(np.zeros_like(vector).tolist())], 1)
    gallery.remove("p1")
    with pytest.raises(ItemNotFound):
        gallery.remove("p1")


def test_settings_come_from_the_environment(tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOKALIKE_KEEP_ORIGINALS", "false")
    monkeypatch.setenv("LOOKALIKE_MAX_K", "2")
    store = EmbeddedStore(tmp_path / "store", encoder.card, encoder.dimension)
    gallery = Gallery(encoder, store, Settings())
    gallery.add("p", encoded(scene()), {})
    assert store.original("p") is None
    with pytest.raises(InvalidQuery, match="from 1 to 2, got 3"):
        gallery.find([ItemQuery("p")], 3)
    gallery.close()
