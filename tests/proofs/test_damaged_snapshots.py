"""Load thousands of damaged snapshots and maps: the store makes them anew or answers correctly, and never crashes.

Half of the snapshots have a wrong checksum. The other half get a correct one, as an attacker would give them, so their
content is really parsed. `mutant(whole, other, number)` returns the same bytes on every run, so the number in a
message reproduces the file.
"""

import json
import logging
import os
import random
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from service.store import maintenance
from service.store.catalog import FILE
from service.store.embedded import EmbeddedStore
from service.store.faiss_index import FaissIndex, Partition
from service.store.snapshot import SNAPSHOT
from service.store.vector_map import VECTORS as VECTORS_FILE
from tests.proofs.child import in_child
from tests.proofs.truth import SEEDS, VECTORS, D, Kept, State, after, assert_finds, do, held, new_item, opened

pytestmark = pytest.mark.proof

# 10,000 in the long form; each kind of store gets a third.
MUTATIONS = int(os.environ.get("LOOKALIKE_MUTATIONS", "300"))
FILES_PER_CHILD = 25
# Loading a snapshot of COUNT items compares every code with the catalog; of LARGE items it compares a sample.
COUNT, LARGE = 100, 1500
LISTS = 8
# Bytes of a row of the map: checksum and vector.
ROW = 8 + 4 * D
KINDS = ["bits", "cut", "swap", "zeros", "foreign", "splice", "numbers", "header"]


@pytest.fixture(scope="module", params=["exact", "approximate", "large"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store folder with a snapshot, and the snapshot of another store, named `other`."""
    made = tmp_path_factory.mktemp(request.param)
    assert in_child(lambda: _make(made, request.param)) == 0
    return made


@pytest.mark.timeout(3600)
def test_damaged_snapshots(folder: Path) -> None:
    whole, other = (folder / SNAPSHOT).read_bytes(), (folder / "other").read_bytes()
    outcomes = Counter[str]()
    for first in range(0, MUTATIONS // 3, FILES_PER_CHILD):
        numbers = range(first, min(first + FILES_PER_CHILD, MUTATIONS // 3))
        told = folder / "told"
        told.write_text("")
        status = in_child(partial(_load, folder, whole, other, numbers))
        lines = told.read_text().splitlines()
        if status != 0:
            number = numbers[len(lines)]
            pytest.fail(f"mutant {number} ({mutant(whole, other, number)[1]}): ended with {status}")
        outcomes.update(lines)
    print(f"\n{folder.name}: " + "".join(f"\n{count:5} {name}" for name, count in sorted(outcomes.items())))
    assert sum(outcomes.values()) == MUTATIONS // 3
    index = sum(count for name, count in outcomes.items() if name.startswith("mended, used") or "other" in name)
    assert index > 0.1 * MUTATIONS // 3, "hardly any damage reached the index"


@pytest.mark.timeout(3600)
def test_damaged_maps(tmp_path: Path) -> None:
    assert in_child(lambda: _make(tmp_path, "map")) == 0
    whole, told = (tmp_path / VECTORS_FILE).read_bytes(), tmp_path / "told"
    outcomes = Counter[str]()
    for first in range(0, MUTATIONS // 3, FILES_PER_CHILD):
        numbers = range(first, min(first + FILES_PER_CHILD, MUTATIONS // 3))
        told.write_text("")
        status = in_child(partial(_load_maps, tmp_path, whole, numbers))
        lines = told.read_text().splitlines()
        if status != 0:
            number = numbers[len(lines)]
            pytest.fail(f"damaged map {number} ({damaged_map(whole, number)[1]}): ended with {status}")
        outcomes.update(lines)
    print("\nmaps: " + "".join(f"\n{count:5} {name}" for name, count in sorted(outcomes.items())))
    assert {"not opened", "noticed later"} <= set(outcomes)


def damaged_map(whole: bytes, number: int) -> tuple[bytes, str]:
    """Return a damaged map and a description of the damage."""
    chance = random.Random(number)
    kind = ["bits", "cut", "swap", "zeros", "splice", "longer"][number % 6]
    # What lies behind the last row is never read.
    data = bytearray(whole[: 128 + (COUNT + 1) * ROW])
    row = 128 + chance.randrange(COUNT + 1) * ROW
    match kind:
        case "bits":
            for _ in range(chance.choice([1, 2, 20, 500])):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case "cut":
            del data[chance.choice([row, row + chance.randrange(ROW), chance.randrange(128)]) :]
        case "swap":
            to = 128 + chance.randrange(COUNT + 1) * ROW
            data[row : row + ROW], data[to : to + ROW] = data[to : to + ROW], data[row : row + ROW]
        case "zeros":
            data[row : row + chance.choice([1, 8, ROW, 50 * ROW])] = b""
            data = data.ljust(128 + (COUNT + 1) * ROW, b"\0")
        case "splice":
            data[row:row] = chance.randbytes(chance.choice([1, ROW]))
        case "longer":
            data += chance.randbytes(chance.choice([1, ROW, 1 << 20]))
    return bytes(data), kind


def mutant(whole: bytes, other: bytes, number: int) -> tuple[bytes, str]:
    """Return a damaged snapshot and a description of the damage."""
    chance = random.Random(number)
    kind, mended = KINDS[number // 2 % len(KINDS)], number % 2 == 1
    data = bytearray(whole[:-4] if mended else whole)
    # Half of the mutants leave the header intact and damage the arrays alone.
    start = chance.choice([0, int.from_bytes(whole[8:12], "little") + 12])
    at = chance.randrange(start, len(data))
    length = min(chance.choice([1, 4, 8, 64, 512]), len(data) - at)
    match kind:
        case "bits":
            for _ in range(chance.choice([1, 1, 2, 20])):
                data[chance.randrange(start, len(data))] ^= 1 << chance.randrange(8)
        case "cut":
            del data[at : at + chance.choice([length, len(data)])]
        case "swap":
            to = chance.randrange(start, len(data) - length + 1)
            data[at : at + length], data[to : to + length] = data[to : to + length], data[at : at + length]
        case "zeros":
            data[at : at + length] = bytes([chance.choice([0, 255])]) * length
        case "foreign":
            at = chance.choice([at, 0])
            data[at:] = other[at:-4] if chance.random() < 0.7 else chance.randbytes(len(data) - at)
        case "splice":
            data[at:at] = chance.randbytes(length)
        # The arrays hold numbers of 8 and 4 bytes.
        case "numbers":
            at = start + (at - start) // 8 * 8
            value = chance.choice([-(2**63), -1, 0, 1, COUNT, 2**31, 2**40, 2**63 - 1])
            data[at : at + 8] = value.to_bytes(8, "little", signed=True)
        case "header":
            data = bytearray(_other_header(bytes(data), chance))
    if mended:
        data += zlib.crc32(data).to_bytes(4, "little")
    return bytes(data), f"{kind}{', mended' * mended}"


def _other_header(data: bytes, chance: random.Random) -> bytes:
    """Return the file with one value of its header replaced and a correct header length."""
    length = int.from_bytes(data[8:12], "little")
    header = json.loads(data[12 : 12 + length])
    value: object = chance.choice([None, -1, 0, 1, 2, 3, 17, 2**40, 2**62, 1.5, "7", [], {}, True])
    if chance.random() < 0.5:
        header["facts"][chance.choice(sorted(header["facts"]))] = value
    else:
        one = chance.choice(header["arrays"])
        if chance.random() < 0.5:
            one[chance.choice(["name", "dtype"])] = chance.choice(
                ["keys", "codes", "lengths", "<f4", "<i8", "|u1", value]
            )
        else:
            one["shape"] = chance.choice([one["shape"][::-1], [value], [*one["shape"], 1], [8, 2**20], value])
    text = json.dumps(header).encode()
    return data[:8] + len(text).to_bytes(4, "little") + text + data[12 + length :]


# Run in child processes --------------------------------------------------------------------------


def _contents(count: int, start: int) -> State:
    return {f"p{n}": Kept((n * 7 + start) % SEEDS, n % 10) for n in range(count)}


def _make(folder: Path, kind: str) -> None:
    for path, start in ((folder, 0), (folder / "another", 5)):
        store = opened(path)
        state = _contents(LARGE if kind == "large" else COUNT, start)
        store.add([new_item(id, *kept) for id, kept in state.items()])
        if kind == "approximate":
            store._live.index = _approximate(store)
        if kind == "map":
            store.settle()
        store.close()
    (folder / "another" / SNAPSHOT).rename(folder / "other")


def _approximate(store: EmbeddedStore) -> FaissIndex:
    """Return an index that probes all of its few lists: its results are exact when it is intact."""
    centroids = VECTORS[:LISTS]
    ranges = np.repeat(np.asarray([-2, 4], np.float32), D)
    index = FaissIndex(D, Partition(centroids, ranges, LISTS, 1000, 2.0, COUNT, COUNT, 1.0))
    for keys, vectors in store._reader.vectors():
        index.add(keys, vectors, index.assign(keys, vectors))
    return index


def _load(folder: Path, whole: bytes, other: bytes, numbers: Iterable[int]) -> None:
    """Load mutants and write a line about each."""
    for number in numbers:
        data, done = mutant(whole, other, number)
        count = LARGE if folder.name.startswith("large") else COUNT
        with TemporaryDirectory() as copy, (folder / "told").open("a") as told:
            shutil.copy(folder / FILE, copy)
            (Path(copy) / SNAPSHOT).write_bytes(data)
            try:
                outcome = _loaded(Path(copy), number, _contents(count, 0))
            except AssertionError as error:
                raise AssertionError(f"mutant {number} ({done})") from error
            assert outcome.startswith("rebuilt") or done.endswith("mended") or data == whole, f"{number} ({done})"
            told.write(f"{'mended' if done.endswith('mended') else 'as it came'}, {outcome}\n")


def _load_maps(folder: Path, whole: bytes, numbers: Iterable[int]) -> None:
    """Load damaged maps and write a line about each."""
    vars(maintenance)["_SAMPLED_CODES"] = 1
    for number in numbers:
        data, kind = damaged_map(whole, number)
        state = _contents(COUNT, 0)
        with TemporaryDirectory() as copy, (folder / "told").open("a") as told:
            for name in (FILE, SNAPSHOT):
                shutil.copy(folder / name, copy)
            (Path(copy) / VECTORS_FILE).write_bytes(data)
            store = opened(Path(copy))
            map = store._live.map
            assert_finds(store, state, 7)
            outcome = "not opened" if map is None else "harmless" if map.usable else "noticed later"
            for change in (["put", {"p3": [1, 1], "new": [2, 2]}], ["remove", "p5"]):
                do(store, change)
                state = after(state, change)
            assert_finds(store, state, 7)
            store.settle()
            assert store._live.map is not None, f"{number} ({kind})"
            assert_finds(store, state, 7)
            store.close()
            told.write(f"{outcome}\n")


def _loaded(folder: Path, number: int, state: State) -> str:
    warnings = Warnings()
    logging.getLogger("bentoml.lookalike").addHandler(warnings)
    store = opened(folder, read_only=number % 4 < 2)
    logging.getLogger("bentoml.lookalike").removeHandler(warnings)
    partition = store.partition
    outcome, whole = "used", not warnings.texts
    if warnings.texts:
        outcome, whole = "rebuilt: " + re.sub(r"\d+", "N", warnings.texts[0].partition("cannot be used: ")[2]), True
    elif partition is not None and (partition.nprobe < LISTS or partition.oversampling * 7 < COUNT):
        # An index that probes fewer lists may miss items; its hits must still be correct.
        outcome, whole = "used, probes fewer lists", False
    elif len(state) == LARGE:
        # A code outside the compared sample may be wrong: its item is not found, and every hit is still correct.
        whole = False
    assert not whole or held(store) == state
    _assert_right(store, state)
    if number % 4 >= 2:
        for change in (["put", {"p3": [1, 1], "new": [2, 2]}], ["remove", "p5"]):
            do(store, change)
            state = after(state, change)
        _assert_right(store, state)
        assert not whole or held(store) == state
    store.close()
    return outcome


class Warnings(logging.Handler):
    """Collects the warnings that a store logs about its snapshot."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _assert_right(store: EmbeddedStore, state: State) -> None:
    """Check that every hit exists and has the right score and rank."""
    order = {id: n for n, id in enumerate(state)}
    for query, hits in zip(VECTORS, store.search(VECTORS, 7), strict=True):
        for hit in hits:
            assert abs(hit.score - float(query @ VECTORS[state[hit.id].seed])) < 1e-6
            assert hit.metadata == {"n": state[hit.id].n}
        ranks = [(-hit.score, order[hit.id]) for hit in hits]
        assert ranks == sorted(set(ranks))
