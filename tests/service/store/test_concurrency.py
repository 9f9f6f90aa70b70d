"""Concurrent searches and changes, compared with plain NumPy on each state that a search may have seen."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from service.store.embedded import EmbeddedStore
from service.store.filters import parse_filter
from service.store.rwlock import ReadersWriterLock
from tests.service.store.test_embedded import card, item, unit

D = 16
VECTORS = unit(400, D, seed=3)


@pytest.mark.parametrize("exact_limit", [10**6, 1000])
def test_no_search_sees_what_is_gone_or_misses_what_is_there(tmp_path: Path, exact_limit: int) -> None:
    """Each writer has its own items, so it knows their state at once; all states agree when all writers have ended."""
    store = EmbeddedStore(tmp_path, card(), D, exact_limit=exact_limit)
    fill = unit(1500, D, seed=4)
    store.add([item(f"fill{n}", vector, own=0) for n, vector in enumerate(fill)])
    store.settle()
    wrong: list[str] = []
    stop = threading.Event()

    def write(own: int) -> None:
        rng = np.random.default_rng(own)
        while not stop.is_set():
            n = own * 100 + int(rng.integers(100))
            id, vector = f"p{n}", VECTORS[n]
            store.add([item(id, vector, own=own), item(f"{id}b", vector, own=own)])
            first = store.search(vector[None], 2)[0]
            if {hit.id for hit in first} != {id, f"{id}b"} or first[0].score != first[1].score:
                wrong.append(f"{id} was added and is not found: {first}")
            filtered = store.search(vector[None], 2, parse_filter({"own": own}))[0]
            if {hit.id for hit in filtered} != {id, f"{id}b"}:
                wrong.append(f"{id} was added and a filter does not find it: {filtered}")
            moved = VECTORS[own * 100 + (n + 50) % 100]
            store.add([item(id, -moved, own=own)])
            hits = store.search(-moved[None], 1)[0]
            if hits[0].id != id:
                wrong.append(f"{id} was replaced and is not found: {hits}")
            store.remove(id)
            store.remove(f"{id}b")
            if any(hit.id.startswith(id) and hit.id in (id, f"{id}b") for hit in store.search(vector[None], 5)[0]):
                wrong.append(f"{id} was removed and is found")

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not stop.is_set():
            n = int(rng.integers(400))
            hits = store.search(VECTORS[n : n + 1], 10)[0]
            if len(hits) < 10:
                wrong.append("fewer hits than asked for")
            for hit in hits:
                number = int(hit.id.strip("filpb"))
                vectors = [fill[number]] if hit.id[0] == "f" else [VECTORS[number]]
                if hit.id[0] == "p":
                    vectors.append(-VECTORS[number // 100 * 100 + (number + 50) % 100])
                if min(abs(float(VECTORS[n] @ vector) - hit.score) for vector in vectors) > 1e-5:
                    wrong.append(f"{hit.id} has a score that it never had: {hit.score}")

    threads = [threading.Thread(target=write, args=(own,)) for own in range(4)]
    threads += [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert store.count() == 1500
    store.close()


def test_a_writer_who_waits_goes_before_readers_who_come_later() -> None:
    lock, order = ReadersWriterLock(), []
    reading, go = threading.Event(), threading.Event()

    def first() -> None:
        with lock.reading():
            reading.set()
            go.wait(5)

    def writer() -> None:
        with lock.writing():
            order.append("writer")

    def later() -> None:
        with lock.reading():
            order.append("reader")

    threads = [threading.Thread(target=work) for work in (first, writer, later)]
    threads[0].start()
    reading.wait(5)
    threads[1].start()
    while not lock._writers_waiting:
        time.sleep(0.001)
    threads[2].start()
    time.sleep(0.05)
    assert order == []
    go.set()
    for thread in threads:
        thread.join(5)
    assert order == ["writer", "reader"]
