"""Encoder + store: outcomes of adding, the choice of encoder, the notice about pictures that do not fit."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service import FloatArray
from service.encoder_choice import find_model
from service.encoding.batcher import Batcher
from service.encoding.card import read_card
from service.encoding.encoder import Encoder
from service.errors import (
    CountMismatch,
    EmptyPicture,
    InvalidQuery,
    InvalidStore,
    ItemNotFound,
    NoEmbedding,
    UnsupportedFormat,
)
from service.file_facts import Move
from service.gallery import Gallery, open_gallery, succeed
from service.items import NewPicture
from service.queries import ItemQuery, PictureQuery, VectorQuery
from service.settings import Settings
from service.store import Field, Folder, Hit, Item, Known, NewItem, Order
from service.store.catalog import CatalogWriter
from service.store.embedded import EmbeddedStore
from service.store.filters import EVERY, Filter
from tests.conftest import MODEL, encoded, scene
from tests.service.jobs.test_embed import blind_model


def test_the_encoder_is_the_named_one_else_the_stores_else_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The default encoder is made below the current folder.
    monkeypatch.chdir(tmp_path)
    model = Path(shutil.copytree(MODEL, tmp_path / "mine"))
    settings = Settings(store=tmp_path / "store")
    assert find_model(settings, "digits[:100]") == find_model(settings, "mnist/test") == Path("models/digits")
    photos = Path(".lookalike/models/photos")
    assert find_model(settings) == find_model(settings, str(tmp_path / "digits")) == photos
    assert read_card(photos).name == "photos"
    open_gallery(Settings(store=tmp_path / "store", model=model)).close()
    assert find_model(settings) == model
    assert find_model(Settings(store=tmp_path / "store", model=MODEL)) == MODEL
    # A store from another machine lacks its encoder's folder; the fingerprint is the same.
    shutil.rmtree(model)
    assert find_model(settings) == photos
    shutil.copytree(MODEL, "models/mnist")
    assert find_model(settings) == Path("models/mnist")


@pytest.fixture
def blind(tmp_path: Path) -> Gallery:
    """A gallery whose encoder gives a black picture no embedding."""
    return open_gallery(Settings(model=blind_model(tmp_path / "blind"), store=tmp_path / "store", device="cpu"))


def test_each_picture_has_an_outcome_and_the_good_ones_one_commit(
    blind: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    black, photos = encoded(Image.new("RGB", (8, 8))), [encoded(scene(seed=n)) for n in range(31)]
    blind.add("7", photos[7], {})
    counted: list[str] = []
    count_calls(monkeypatch, CatalogWriter, "transaction", counted)
    count_calls(monkeypatch, Batcher, "submit", counted)
    data = [*photos[:20], black, *photos[20:]]
    outcomes = blind.add_many([NewPicture(f"{n}", one, {}) for n, one in enumerate(data)])
    assert Counter(counted) == {"transaction": 1, "submit": 32}
    assert isinstance(outcomes[20], NoEmbedding)
    assert outcomes[:20] + outcomes[21:] == [n != 7 for n in range(32) if n != 20]
    assert [item.id for item in blind.store.scan(99)[0]] == ["7", *(f"{n}" for n in range(32) if n not in (7, 20))]
    with pytest.raises(NoEmbedding, match="gives this picture no embedding"):
        blind.add("20", black, {})
    blind.close()


def test_bytes_that_are_no_picture_and_a_store_that_cannot_be_written_are_outcomes(gallery: Gallery) -> None:
    outcomes = gallery.add_many([NewPicture("a", encoded(scene()), {}), NewPicture("b", b"no picture", {})])
    assert outcomes[0] is True and isinstance(outcomes[1], UnsupportedFormat)
    gallery.store.close()
    outcomes = gallery.add_many([NewPicture("c", encoded(scene()), {}), NewPicture("d", b"", {})])
    assert isinstance(outcomes[0], InvalidStore) and isinstance(outcomes[1], EmptyPicture)


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, counted: list[str]) -> None:
    """Record each call of a method and run the method as before."""
    inner = getattr(owner, name)

    @wraps(inner)
    def outer(*arguments: object, **named: object) -> object:
        counted.append(name)
        return inner(*arguments, **named)

    monkeypatch.setattr(owner, name, outer)


def test_a_notice_comes_with_the_pictures_it_is_about(gallery: Gallery) -> None:
    assert gallery.notice() is None
    gallery.add("photo", encoded(scene()), {})
    assert "trained on mnist/train" in str(gallery.notice())


def test_what_finds_and_what_cannot(gallery: Gallery) -> None:
    for n in range(3):
        assert gallery.add(f"p{n}", encoded(scene(seed=n)), {"n": n})
    assert not gallery.add("p2", encoded(scene(seed=2)), {"n": "again"})
    assert gallery.find([PictureQuery(encoded(scene(seed=1)))], 1)[0][0].id == "p1"
    vector = gallery.embed_soon(encoded(scene(seed=1))).result()
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


class ArrayStore:
    """A second implementation of the Store protocol: a dict, searched by plain NumPy."""

    def __init__(self) -> None:
        self.items: dict[str, NewItem] = {}
        self.noted: dict[str, str] = {}
        self.told_apart: set[tuple[str, str]] = set()
        self.closed = False

    def add(self, items: Sequence[NewItem]) -> list[bool]:
        new = [item.id not in self.items for item in items]
        self.items |= {item.id: item for item in items}
        return new

    def get(self, id: str) -> Item | None:
        return self.items.get(id)

    def embedding(self, id: str) -> FloatArray | None:
        return self.items[id].embedding if id in self.items else None

    def thumbnail(self, id: str) -> bytes | None:
        return self.items[id].thumbnail if id in self.items else None

    def original(self, id: str) -> bytes | None:
        return self.items[id].original if id in self.items else None

    def remove(self, id: str) -> bool:
        return self.items.pop(id, None) is not None

    def set_metadata(self, id: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Item | None:
        if id in self.items:
            self.items[id] = replace(self.items[id], metadata=change(self.items[id].metadata))
        return self.items.get(id)

    def search(self, queries: FloatArray, k: int, where: Filter | None = None) -> list[list[Hit]]:
        assert where is None
        scored = [
            sorted(((float(query @ item.embedding), item) for item in self.items.values()), key=lambda pair: -pair[0])
            for query in queries
        ]
        return [[Hit(item.id, score, json.dumps(item.metadata)) for score, item in row[:k]] for row in scored]

    def scan(self, limit: int, after: int = 0) -> tuple[list[Item], int | None]:
        page = list(self.items.values())[after : after + limit]
        return [*page], after + limit if after + limit < len(self.items) else None

    def move(self, moves: Sequence[Move]) -> int:
        taken = [(self.items.pop(move.id), move) for move in moves if move.id in self.items]
        self.items |= {
            move.to: replace(item, id=move.to, source=move.source, facts=move.facts, mtime_ns=move.mtime_ns)
            for item, move in taken
            if move.to is not None
        }
        return len(taken)

    def below(self, origin: str) -> list[Known]:
        return [
            Known(item.source.removeprefix(f"{origin}/"), item.id, item.digest, item.facts.size_bytes, item.mtime_ns)
            for item in self.items.values()
            if item.source is not None and item.source.startswith(f"{origin}/")
        ]

    def page(
        self, limit: int, after: str = "", where: Filter | None = None, order: Order = "added", offset: int = 0
    ) -> tuple[list[Item], str | None]:
        # Every store lists by id.
        assert where is None and order == "id"
        items, following = self.scan(limit, int(after or 0) + offset)
        return items, None if following is None else str(following)

    def folders(self, prefix: str = "", where: Filter | None = None) -> list[Folder]:
        assert where is None
        inside = [id.removeprefix(prefix) for id in self.items if id.startswith(prefix)]
        counted = Counter(prefix + rest.split("/")[0] + "/" for rest in inside if "/" in rest)
        return [Folder(*one) for one in sorted(counted.items())]

    def fields(self, where: Filter | None = None) -> list[Field]:
        assert where is None
        keys = Counter(key for item in self.items.values() for key in item.metadata)
        return [Field(key, count, 0, []) for key, count in keys.most_common()]

    def remove_matching(self, where: Filter, expect: int | None = None) -> int:
        assert where == EVERY
        count = len(self.items)
        if expect not in (None, count):
            raise CountMismatch(f"expected {expect}, found {count}")
        self.items.clear()
        return count

    def facts(self) -> dict[str, str]:
        return self.noted

    def note(self, facts: dict[str, str]) -> None:
        self.noted |= facts

    def dismiss(self, pairs: Sequence[tuple[str, str]], dismissed: bool = True) -> None:
        self.told_apart = self.told_apart | {*pairs} if dismissed else self.told_apart - {*pairs}

    def sequence(self) -> int:
        return len(self.items)

    def count(self, where: Filter | None = None) -> int:
        assert where is None
        return len(self.items)

    @property
    def writable(self) -> bool:
        return True

    def disk_state(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def test_a_gallery_works_on_any_store(encoder: Encoder, gallery: Gallery) -> None:
    store = ArrayStore()
    other = Gallery(encoder, store, gallery.settings)
    for one in (gallery, other):
        for n in range(4):
            assert one.add(f"p{n}", encoded(scene(seed=n)), {"n": n})
        assert one.change_metadata("p1", {"n": None, "m": 1}).metadata == {"m": 1}
        one.remove("p3")
        one.probe()
    query = encoded(scene(seed=1))
    (ours,), (theirs,) = gallery.find([PictureQuery(query)], 3), other.find([PictureQuery(query)], 3)
    assert [(hit.id, hit.metadata) for hit in ours] == [(hit.id, hit.metadata) for hit in theirs]
    assert np.allclose([hit.score for hit in ours], [hit.score for hit in theirs], atol=1e-6)
    assert (other.notice(), other.thumbnail("p0")) == (gallery.notice(), gallery.thumbnail("p0"))
    with pytest.raises(InvalidStore, match="not in a folder"):
        succeed(other)
    other.close()
    assert store.closed
