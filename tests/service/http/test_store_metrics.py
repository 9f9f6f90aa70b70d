"""What /metrics tells about the disk of a store, and about the snapshot of its index."""

import shutil
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from service.encoding.encoder import Encoder
from service.errors import InvalidStore
from service.store import NewItem, maintenance
from service.store.embedded import EmbeddedStore
from service.store.snapshot import SNAPSHOT
from tests.service.conftest import Served
from tests.service.http.rows import PICTURE
from tests.service.http.test_unwritable import put, store_of


def metric(client: TestClient, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"lookalike_{name} ")).split()[1])


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_room_on_the_disk_is_told(served: Served) -> None:
    client = served()
    disk = shutil.disk_usage(store_of(client).folder)
    assert metric(client, "store_disk_free_bytes") == pytest.approx(disk.free, rel=0.05)
    # `df` computes its percentage from the same sum.
    assert metric(client, "store_disk_bytes") == pytest.approx(disk.used + disk.free, rel=0.05)


def test_the_last_snapshot_is_told(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(maintenance, "_CHANGES_PER_SNAPSHOT", 2)
    client = served()
    path = store_of(client).folder / SNAPSHOT
    # A folder in its place makes every attempt to write it fail.
    path.mkdir()
    assert put(client, "a")[0] == put(client, "b")[0] == 201
    wait_until(lambda: "no snapshot of the index could be written" in caplog.text)
    assert metric(client, "snapshot_due") == 1
    path.rmdir()
    assert metric(client, "snapshot_timestamp_seconds") == 0
    # The next change tries again.
    assert put(client, "c")[0] == 201
    wait_until(path.exists)
    assert metric(client, "snapshot_due") == 0
    assert metric(client, "snapshot_timestamp_seconds") == path.stat().st_mtime


def test_a_snapshot_that_is_due_at_the_start_is_written(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restore, or after a process was killed, no further change need come."""
    new = NewItem("a", {}, None, "0" * 64, "fp32", encoder.probe(), b"", None)
    first = EmbeddedStore(tmp_path / "store", encoder.card, encoder.dimension)
    first.add([new])
    first.close()
    (path := tmp_path / "store" / SNAPSHOT).unlink()
    monkeypatch.setattr(maintenance, "_CHANGES_PER_SNAPSHOT", 1)
    with closing(EmbeddedStore(tmp_path / "store", encoder.card, encoder.dimension)) as store:
        wait_until(path.exists)
        assert not store.disk_state().snapshot_due


def test_a_disk_that_is_gone_costs_no_other_metric(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    client = served()

    def gone(_: EmbeddedStore) -> None:
        raise InvalidStore("the disk is gone")

    monkeypatch.setattr(EmbeddedStore, "disk_state", gone)
    monkeypatch.setattr(EmbeddedStore, "count", gone)
    assert metric(client, "ready") >= 0
    assert client.put("/images/a", content=PICTURE, headers={"Content-Type": "image/png"}).status_code == 201
    assert metric(client, "store_writable") == 1
