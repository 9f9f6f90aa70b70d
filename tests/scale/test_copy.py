"""`lookalike store copy`: there and back, killed in the middle, and what it says."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.encoding.card import read_card
from service.errors import InvalidRequest, InvalidStore, StoreMismatch
from service.file_facts import FileFacts
from service.jobs.copy import copy
from service.settings import Settings
from service.store import NewItem
from service.store.embedded import EmbeddedStore
from service.store.milvus import MilvusStore
from service.store.milvus_address import MilvusAddress
from tests.conftest import MODEL, another_encoder
from tests.service.store.test_embedded import unit
from tests.serving import LOOKALIKE

D = 64


def embedded(folder: Path, model: Path = MODEL) -> EmbeddedStore:
    folder.mkdir(exist_ok=True)
    return EmbeddedStore(folder, read_card(model), D)


def filled(folder: Path, count: int) -> None:
    store = embedded(folder)
    rows = unit(count, D)
    facts = FileFacts(6, 4, 99, "PNG", "2026-01-01T00:00:00")
    # The order of adding is not that of ids.
    ids = [f"{'ba'[n % 2]}/{n}" for n in range(count)]
    items = [
        NewItem(id, {"n": n, "t": ["x", None]}, f"/p/{id}", f"d{n}", "fp32", row, b"small", b"large", facts=facts)
        for n, (id, row) in enumerate(zip(ids, rows, strict=True))
    ]
    for start in range(0, count, 1000):
        store.add(items[start : start + 1000])
    store.note({"prefixes": '["a/"]'})
    store.dismiss([("d0", "d1")])
    store.close()


def contents(store: EmbeddedStore | MilvusStore) -> list[Any]:
    return [
        (one, store.thumbnail(one.id), store.original(one.id), np.asarray(store.embedding(one.id)).tobytes())
        for one in store.scan(10_000)[0]
    ]


def test_there_and_back(tmp_path: Path) -> None:
    filled(tmp_path / "from", 60)
    there = Settings(store=Path(f"milvus:{tmp_path}/x.db/pictures"), pictures=str(tmp_path / "files"))
    back = Settings(store=tmp_path / "back")
    done = copy(Settings(store=tmp_path / "from"), there)
    assert (done.written, done.known, done.more, done.dismissed, done.bare) == (60, 0, 0, 1, 0)
    done = copy(Settings(store=tmp_path / "from"), there)
    assert (done.written, done.known) == (0, 60)
    # An item that differs is written again.
    store = embedded(tmp_path / "from")
    store.set_metadata("b/0", lambda metadata: metadata | {"new": 1})
    store.remove("a/1")
    store.close()
    done = copy(Settings(store=tmp_path / "from"), there)
    assert (done.written, done.known, done.more) == (1, 58, 1)
    assert copy(there, back).written == 60
    target = embedded(tmp_path / "back")
    found = {one[0].id: one for one in contents(target)}
    assert [*found][:4] == ["b/0", "a/1", "b/2", "a/3"]
    assert target.facts()["prefixes"] == '["a/"]'
    store = embedded(tmp_path / "from")
    for one in contents(store):
        assert found[one[0].id] == one
    store.close()
    target.close()


def test_what_cannot_be_copied(tmp_path: Path) -> None:
    filled(tmp_path / "from", 3)
    folder = Settings(store=tmp_path / "from")
    there = Settings(store=Path(f"milvus:{tmp_path}/x.db/pictures"))
    with pytest.raises(InvalidRequest, match="expected a folder and an address of Milvus"):
        copy(folder, Settings(store=tmp_path / "to"))
    with pytest.raises(InvalidStore, match="no store there"):
        copy(Settings(store=tmp_path / "none"), there)
    with pytest.raises(InvalidStore, match="no such collection"):
        copy(there, folder)
    # Without a place for them, pictures stay behind, and are counted.
    assert copy(folder, there).bare == 3
    other = another_encoder(tmp_path / "other")
    embedded(tmp_path / "second", other).close()
    with pytest.raises(StoreMismatch, match="not by other"):
        copy(Settings(store=tmp_path / "second", model=other), there)


def test_a_copy_that_is_killed_goes_on(tmp_path: Path) -> None:
    filled(tmp_path / "from", 8000)
    where = MilvusAddress(str(tmp_path / "x.db"), "pictures", True)
    command = [str(LOOKALIKE), "store", "copy", str(tmp_path / "from"), str(where)]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert first.stderr is not None
    # The bar says how far it is.
    said = ""
    while not any(f"{thousand}000/8000" in said for thousand in range(1, 8)) and first.poll() is None:
        said += first.stderr.read(1)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    second = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert second.returncode == 0, second.stderr
    written, known = (
        int(second.stderr.split(before)[1].split(maxsplit=1)[0]) for before in ("pictures: ", "written, ")
    )
    assert written + known == 8000
    assert known >= 1000
    store = MilvusStore(where, read_card(MODEL), D)
    assert store.count() == 8000
    assert {one.id for one in store.page(8000, order="id")[0]} == {f"{'ba'[n % 2]}/{n}" for n in range(8000)}
    store.close()
