"""kill -9 of the whole service under adds, deletes and searches; and a clock that jumps while it serves.

The worker has a session of its own and outlives its parent, so the test kills every process and checks the port.
"""

import os
import random
import re
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import pytest

from service.sources import open_source
from tests.conftest import MODEL
from tests.serving import killed, serving

pytestmark = pytest.mark.proof

# 200 in the long form.
CYCLES = int(os.environ.get("LOOKALIKE_KILLS", "4"))
SEED = int(os.environ.get("LOOKALIKE_KILLS_SEED", "0"))
THREADS, IDS = 3, 8
PICTURES = [open_source("digits").read(n) for n in range(40)]
KEEPING = {"BENTOML_DO_NOT_TRACK": "True"}
# Python runs this at start. It moves the worker's clock by a day every second, forward and back. The parent keeps its
# clock: circus sleeps by it after starting a worker, and would sleep for a day and ignore SIGTERM.
JUMPS = """
import sys, time
real, real_ns, start = time.time, time.time_ns, time.monotonic()
def off():
    return (0, 86_400, 0, -86_400)[int(time.monotonic() - start) % 4]
if "_bentoml_impl.worker.service" in sys.orig_argv:
    time.time = lambda: real() + off()
    time.time_ns = lambda: real_ns() + off() * 10**9
"""

Held = dict[str, tuple[int, int]]
"""The picture's number and the number in its metadata, by id."""


class Client(threading.Thread):
    """Changes and searches its own items until the service is gone."""

    def __init__(self, url: str, number: int, held: Held, chance: random.Random) -> None:
        super().__init__()
        self.url, self.prefix, self.chance = url, f"t{number}-", chance
        self.held = {id: kept for id, kept in held.items() if id.startswith(self.prefix)}
        self.doubtful: tuple[str, tuple[int, int] | None] | None = None
        self.done = Counter[str]()
        self.wrong: list[str] = []

    def run(self) -> None:
        with httpx2.Client(base_url=self.url, timeout=20) as http:
            try:
                while not self.wrong:
                    self.one(http)
            except httpx2.TransportError:
                return

    def one(self, http: httpx2.Client) -> None:
        id = f"{self.prefix}{self.chance.randrange(IDS)}"
        picture, n = self.chance.randrange(len(PICTURES)), self.chance.randrange(10)
        kind = self.chance.random()
        if kind < 0.5:
            self.doubtful = (id, (picture, n))
            data: dict[str, Any] = {"metadata": f'{{"picture": {picture}, "n": {n}}}'}
            answer = http.put(f"/images/{id}", files={"file": ("x.png", PICTURES[picture])}, data=data)
            self.expect(answer, 200 if id in self.held else 201)
            self.held[id] = (picture, n)
        elif kind < 0.75:
            self.doubtful = (id, None)
            self.expect(http.delete(f"/images/{id}"), 204 if id in self.held else 404)
            self.held.pop(id, None)
        elif self.held:
            id = self.chance.choice(sorted(self.held))
            answer = http.post("/search", json={"id": id, "k": 100})
            self.expect(answer, 200)
        self.doubtful = None

    def expect(self, answer: httpx2.Response, status: int) -> None:
        self.done[f"{answer.request.method} {answer.status_code}"] += 1
        if answer.status_code != status:
            self.wrong.append(f"{answer.request.method} {answer.request.url}: {answer.status_code}, not {status}")


@pytest.mark.timeout(60 + 60 * CYCLES)
def test_kills_over_http(tmp_path: Path) -> None:
    held: Held = {}
    clients: list[Client] = []
    done, unacknowledged = Counter[str](), 0
    for cycle in range(CYCLES + 1):
        chance = random.Random(f"{SEED} {cycle}")
        with killed(tmp_path, **KEEPING) as (url, kill):
            if cycle:
                held, came = _compared(url, clients)
                unacknowledged += came
            if cycle == CYCLES:
                break
            clients = [
                Client(url, number, held, random.Random(f"{SEED} {cycle} {number}")) for number in range(THREADS)
            ]
            for client in clients:
                client.start()
            time.sleep(chance.uniform(0.3, 2.0))
            kill()
            for client in clients:
                client.join()
        for client in clients:
            assert not client.wrong, client.wrong
            done.update(client.done)
    print(f"\n{CYCLES} kills -9 of the service: {dict(sorted(done.items()))}; none lost, none back;")
    print(f"{unacknowledged} changes stored unacknowledged")
    assert done["PUT 201"] > 3 * CYCLES and done["DELETE 204"] > CYCLES and done["POST 200"] > CYCLES


def _compared(url: str, clients: list[Client]) -> tuple[Held, int]:
    """Compare the service with its clients; return its items and the number of unacknowledged changes it stored."""
    found, came = _read(url), 0
    for client in clients:
        own = {id: kept for id, kept in found.items() if id.startswith(client.prefix)}
        expected = client.held
        if own != expected and client.doubtful is not None:
            id, kept = client.doubtful
            expected = {other: it for other, it in expected.items() if other != id}
            expected |= {} if kept is None else {id: kept}
            came += 1
        assert own == expected, f"expected {expected} (or without {client.doubtful}), found {own}"
    return found, came


def _read(url: str) -> Held:
    """Return all items of the service; check that its lists, bytes and searches agree."""
    with httpx2.Client(base_url=url, timeout=20) as http:
        listed = http.get("/images", params={"limit": 100}).json()["items"]
        found = {one["id"]: (one["metadata"]["picture"], one["metadata"]["n"]) for one in listed}
        for id, (picture, _) in found.items():
            assert http.get(f"/images/{id}/content").content == PICTURES[picture]
            assert http.get(f"/images/{id}/thumbnail").status_code == 200
            hits = http.post("/search", json={"id": id, "k": 100}).json()["hits"]
            others = {one["id"]: one for one in hits}
            assert others.keys() | {id} == found.keys()
            alike = {other for other, kept in found.items() if kept[0] == picture} - {id}
            assert all(others[other]["score"] > 0.9999 for other in alike)
    return found


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(JUMPS)
    client = Client("", 0, {}, random.Random(0))
    for _ in range(2):
        with serving(tmp_path, "", MODEL, **KEEPING, PYTHONPATH=str(tmp_path)) as url:
            assert _read(url) == client.held
            with httpx2.Client(base_url=url, timeout=20) as http:
                begun = time.monotonic()
                # The four jumps take four seconds.
                while time.monotonic() < begun + 4:
                    client.one(http)
                    time.sleep(0.02)
            assert not client.wrong, client.wrong
            assert _read(url) == client.held
        days = set(re.findall(r'"time": ?"([0-9-]{10})T', (tmp_path / "serve.log").read_text()))
        assert len(days) >= 3, f"the clock did not jump: {days}"
    print(f"\nwhile the clock jumped by a day: {dict(sorted(client.done.items()))}, as ever")
