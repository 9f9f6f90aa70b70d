"""What a store must hold, as a dict; and a store held against it, by plain NumPy.

An item is two numbers: a seed, which its vector, its digest and its thumbnail follow from, and what its metadata says.
Seeds are few, so that many items are exactly alike and only the order of adding tells them apart.
"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from service import FloatArray
from service.encoding.card import Card, Preprocessing
from service.errors import InvalidRequest
from service.store import NewItem, Store
from service.store.catalog import CatalogWriter
from service.store.embedded import EmbeddedStore
from service.store.filters import parse_filter

D = 8
SEEDS = 40
NUMBERS = 10
FILTER = {"n": {"$lt": 4}}


class Kept(NamedTuple):
    """What is remembered of an item."""

    seed: int
    n: int


State = dict[str, Kept]
Change = list[Any]
"""["put", {id: [seed, n]}], ["remove", id], ["describe", id, n], or ["fail", id]: what is refused half way."""


def encoder(name: str = "encoder") -> Card:
    """Return the card of an encoder that there is not."""
    config = {"size": {"width": 8, "height": 8}, "do_normalize": False}
    return Card(Path(f"/models/{name}"), name, name * 4, b"", Preprocessing.from_config(config, name), {})


def vector(seed: int) -> FloatArray:
    """Return (D,) of length 1."""
    drawn = np.random.default_rng(seed).normal(size=D).astype(np.float32)
    return np.asarray(drawn / np.linalg.norm(drawn), np.float32)


ALL = np.stack([vector(seed) for seed in range(3000)])
VECTORS = ALL[:SEEDS]  # those that are changed and asked for


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
    """Return what a change makes of a state."""
    match change:
        case ["put", items]:
            return state | {id: Kept(*numbers) for id, numbers in items.items()}
        case ["remove", id]:
            return {other: kept for other, kept in state.items() if other != id}
        case ["describe", id, n] if id in state:
            return state | {id: Kept(state[id].seed, n)}
    return state


def do(store: Store, change: Change) -> None:
    """Change a store so."""
    match change:
        case ["put", items]:
            store.add([new_item(id, *numbers) for id, numbers in items.items()])
        case ["remove", id]:
            store.remove(id)
        case ["describe", id, n]:
            store.set_metadata(id, lambda _: {"n": n})
        case ["fail", id]:
            try:  # the first is written when the second turns out to be no text
                store.add([new_item(id, 0, 0), new_item(id + " \ud800", 0, 0)])
            except UnicodeEncodeError:
                return
            raise InvalidRequest("half a character was taken")


def held(store: Store) -> State:
    """Return what a store holds, having seen that it agrees with itself and that it finds what plain NumPy finds."""
    items, cursor = [], 0
    while True:
        found, following = store.scan(50, cursor)
        items += found
        if following is None:
            break
        cursor = following
    assert store.count() == len(items), f"{store.count()} are counted, {len(items)} are there"
    state: State = {}
    for item in items:
        assert item.id not in state, f"{item.id} is there twice"
        state[item.id] = kept = Kept(int(item.digest), item.metadata["n"])
        assert store.get(item.id) == item
        embedding = store.embedding(item.id)
        assert embedding is not None
        assert np.array_equal(embedding, ALL[kept.seed]), f"{item.id} has the embedding of another"
        assert store.thumbnail(item.id) == f"{item.id} {kept.seed}".encode()
    assert_finds(store, state, 7)
    return state


def assert_finds(store: Store, state: Mapping[str, Kept], k: int) -> None:
    """See that all queries find what they must in a state, which is in the order of adding; with a filter, too."""
    for where in (None, FILTER):
        found = store.search(VECTORS, k, None if where is None else parse_filter(where))
        met = {id: kept for id, kept in state.items() if where is None or kept.n < FILTER["n"]["$lt"]}
        for query, hits in zip(VECTORS, found, strict=True):
            assert [(hit.id, hit.metadata["n"]) for hit in hits] == nearest(met, query, k), "a search went wrong"


def nearest(state: Mapping[str, Kept], query: FloatArray, k: int) -> list[tuple[str, int]]:
    """Return ids and n of the k nearest, by score and then in the state's order."""
    if not state:
        return []
    by_seed = (ALL.astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
    scores = np.clip(by_seed[[kept.seed for kept in state.values()]], -1, 1)
    ids = list(state)
    return [(ids[n], state[ids[n]].n) for n in np.argsort(-scores, kind="stable")[:k].tolist()]


def opened(folder: Path, **options: Any) -> EmbeddedStore:
    """Open a store of these items."""
    return EmbeddedStore(folder, encoder(), D, **options)


def writer_of(store: EmbeddedStore) -> CatalogWriter:
    """Return what changes a store's catalog, for pragmas of a test's own."""
    assert store._writer is not None
    return store._writer
