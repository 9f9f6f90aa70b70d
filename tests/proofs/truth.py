"""A model of a store as a dict, and plain NumPy searches to compare the store with it.

An item is two numbers: a seed, which determines its vector, digest and thumbnail, and the number n in its metadata.
Seeds are few, so many items are exactly alike and only the insertion order ranks them.
"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from service import FloatArray
from service.encoding.card import Card, Preprocessing
from service.errors import InvalidRequest
from service.store import NewItem, Store, maintenance
from service.store.catalog import CatalogWriter
from service.store.embedded import EmbeddedStore
from service.store.filters import parse_filter

D = 8
SEEDS = 40
NUMBERS = 10
FILTER = {"n": {"$lt": 4}}


class Kept(NamedTuple):
    """An item of the model."""

    seed: int
    n: int


State = dict[str, Kept]
Change = list[Any]
"""["put", {id: [seed, n]}], ["remove", id], ["describe", id, n], or ["fail", id], which fails in its transaction."""


def encoder(name: str = "encoder") -> Card:
    """Return the card of an encoder without files."""
    config = {"size": {"width": 8, "height": 8}, "do_normalize": False}
    return Card(Path(f"/models/{name}"), name, name * 4, b"", Preprocessing.from_config(config, name), {})


def vector(seed: int) -> FloatArray:
    """Return a unit vector (D,)."""
    drawn = np.random.default_rng(seed).normal(size=D).astype(np.float32)
    return np.asarray(drawn / np.linalg.norm(drawn), np.float32)


ALL = np.stack([vector(seed) for seed in range(3000)])
# Changes and queries use these alone.
VECTORS = ALL[:SEEDS]


def new_item(id: str, seed: int, n: int) -> NewItem:
    """Return an item to add."""
    return NewItem(id, {"n": n}, None, f"{seed}", "fp32", ALL[seed], f"{id} {seed}".encode(), None)


def some_change(chance: random.Random, ids: list[str]) -> Change:
    """Draw a change of one or a few ids."""
    kind, id = chance.random(), chance.choice(ids)
    if kind < 0.55:
        few = chance.sample(ids, min(len(ids), chance.choice([1, 1, 1, 2, 6])))
        return ["put", {id: [chance.randrange(SEEDS), chance.randrange(NUMBERS)] for id in few}]
    if kind < 0.8:
        return ["remove", id]
    return ["describe", id, chance.randrange(NUMBERS)] if kind < 0.95 else ["fail", id]


def after(state: State, change: Change) -> State:
    """Return the state after a change."""
    match change:
        case ["put", items]:
            return state | {id: Kept(*numbers) for id, numbers in items.items()}
        case ["remove", id]:
            return {other: kept for other, kept in state.items() if other != id}
        case ["describe", id, n] if id in state:
            return state | {id: Kept(state[id].seed, n)}
    return state


def do(store: Store, change: Change) -> None:
    """Apply a change to a store."""
    match change:
        case ["put", items]:
            store.add([new_item(id, *numbers) for id, numbers in items.items()])
        case ["remove", id]:
            store.remove(id)
        case ["describe", id, n]:
            store.set_metadata(id, lambda _: {"n": n})
        case ["fail", id]:
            # The store writes the first item before the second id turns out to be invalid text.
            try:
                store.add([new_item(id, 0, 0), new_item(id + " \ud800", 0, 0)])
            except UnicodeEncodeError:
                return
            raise InvalidRequest("the store took a lone surrogate")


def held(store: Store) -> State:
    """Return the state of a store; check its consistency, and its searches against plain NumPy."""
    items, cursor = [], 0
    while True:
        found, following = store.scan(50, cursor)
        items += found
        if following is None:
            break
        cursor = following
    assert store.count() == len(items), f"count is {store.count()}, but {len(items)} items were listed"
    state: State = {}
    for item in items:
        assert item.id not in state, f"{item.id} was listed twice"
        state[item.id] = kept = Kept(int(item.digest), item.metadata["n"])
        assert store.get(item.id) == item
        embedding = store.embedding(item.id)
        assert embedding is not None
        assert np.array_equal(embedding, ALL[kept.seed]), f"{item.id} has the embedding of another"
        assert store.thumbnail(item.id) == f"{item.id} {kept.seed}".encode()
    assert_finds(store, state, 7)
    map = store._live.map if isinstance(store, EmbeddedStore) else None
    if isinstance(store, EmbeddedStore) and map is not None and map.usable:
        assert all(map.holds(*chunk).all() for chunk in store._reader.vectors()), "the map has other vectors"
    return state


def assert_finds(store: Store, state: Mapping[str, Kept], k: int) -> None:
    """Check the hits of all queries, with and without a filter, against a state in insertion order."""
    for where in (None, FILTER):
        found = store.search(VECTORS, k, None if where is None else parse_filter(where))
        matching = {id: kept for id, kept in state.items() if where is None or kept.n < FILTER["n"]["$lt"]}
        for query, hits in zip(VECTORS, found, strict=True):
            assert [(hit.id, hit.metadata["n"]) for hit in hits] == nearest(matching, query, k), "wrong hits"


def nearest(state: Mapping[str, Kept], query: FloatArray, k: int) -> list[tuple[str, int]]:
    """Return the id and n of the k nearest items, by score and then by insertion order."""
    if not state:
        return []
    by_seed = (ALL.astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
    scores = np.clip(by_seed[[kept.seed for kept in state.values()]], -1, 1)
    ids = list(state)
    return [(ids[n], state[ids[n]].n) for n in np.argsort(-scores, kind="stable")[:k].tolist()]


def opened(folder: Path, **options: Any) -> EmbeddedStore:
    """Open a store for items of this model. It gets a map of its vectors, as a large one does."""
    vars(maintenance)["_MANY_VECTORS"] = 1
    return EmbeddedStore(folder, encoder(), D, **options)


def writer_of(store: EmbeddedStore) -> CatalogWriter:
    """Return the store's catalog writer, for a test's own pragmas."""
    assert store._writer is not None
    return store._writer
