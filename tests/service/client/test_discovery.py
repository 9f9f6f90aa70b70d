"""Verbs on a store that is being served: through its service, with the same outcome as on a free store."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from service.client.discovery import find_service, served_store
from service.errors import InvalidRequest, InvalidStore
from service.sources import open_source
from service.store.layout import announce, lock, served_at
from tests.conftest import MODEL, encoded, scene
from tests.serving import killed, serving
from tests.test_lookalike import run

KEY = "0123456789abcdef"


def done(*arguments: str | Path, code: int = 0, **environment: str) -> Any:
    """Run a verb with --json, and return what it prints."""
    ran = run(*arguments, "--json", environment=environment)
    assert ran.returncode == code, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures with labels, two of which are the same, and one that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for n in range(12):
        path = folder / ("even" if n % 2 == 0 else "odd") / f"{n}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(scene(seed=n)))
    (folder / "odd" / "copy.png").write_bytes(encoded(scene(seed=3)))
    (folder / "odd" / "bad.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Iterator[Path]:
    """An empty store that a service with a key serves, and into which `index` has put the pictures through it."""
    folder = tmp_path_factory.mktemp("served")
    with serving(folder, api_keys=f"write:{KEY}"):
        store = folder / "store"
        while served_at(store) is None:
            time.sleep(0.05)
        content = done("index", pictures, "--store", store, "--key", KEY, code=1)
        assert (content["added"], content["known"], content["lost"]) == (13, 0, 1)
        assert content["listed_in"] == str(store / "left_out.jsonl")
        yield store


def test_a_served_store_gets_what_a_free_one_gets(store: Path, pictures: Path, tmp_path: Path) -> None:
    assert run("index", pictures, "--store", tmp_path / "store", "--model", MODEL).returncode == 1
    for name, chosen in (("free", tmp_path / "store"), ("served", store)):
        assert run("store", "export", "--store", chosen, "--out", tmp_path / name).returncode == 0
    client = served_store(store, KEY)
    assert client is not None
    assert run("store", "export", "--url", client.url, "--key", KEY, "--out", tmp_path / "url").returncode == 0

    def rows(name: str) -> dict[str, Any]:
        return {row["id"]: row for row in pq.read_table(tmp_path / name / "part-00000.parquet").to_pylist()}

    free = rows("free")
    assert len(free) == 13
    for name in ("served", "url"):
        assert rows(name).keys() == free.keys()
        for id, row in rows(name).items():
            for field in ("metadata", "source", "digest", "label", "original", "thumbnail"):
                assert row[field] == free[id][field], (name, id, field)
            assert max(abs(a - b) for a, b in zip(row["embedding"], free[id]["embedding"], strict=True)) < 1e-5


def test_a_second_time_nothing_is_sent(store: Path, pictures: Path) -> None:
    content = done("index", pictures, "--store", store, "--model", MODEL, code=1, LOOKALIKE_KEY=KEY)
    assert (content["added"], content["replaced"], content["known"]) == (0, 0, 13)


def test_a_changed_picture_is_replaced_and_keeps_its_metadata(store: Path, pictures: Path) -> None:
    client = served_store(store, KEY)
    assert client is not None
    client.patch("even/4.png", {"mine": 1, "label": None})
    before = (pictures / "even" / "4.png").read_bytes()
    try:
        (pictures / "even" / "4.png").write_bytes(encoded(scene(seed=99)))
        content = done("index", pictures, "--store", store, "--key", KEY, code=1)
        assert (content["added"], content["replaced"], content["known"]) == (0, 1, 12)
        item = client.get("even/4.png")
        assert item is not None and item.metadata == {"mine": 1, "label": "even"}
    finally:
        (pictures / "even" / "4.png").write_bytes(before)
        run("index", pictures, "--store", store, "--key", KEY)


def test_two_sources_of_the_same_names_stay_apart(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "holiday"
    (other / "even").mkdir(parents=True)
    (other / "even" / "0.png").write_bytes(encoded(scene(seed=50)))
    (other / "even" / "2.png").write_bytes(encoded(scene(seed=52)))
    client = served_store(store, KEY)
    assert client is not None
    for content in (
        done("index", other, "--store", store, "--key", KEY),
        done("index", other, "--store", store, "--key", KEY),
    ):
        assert content["added"] + content["known"] == 2
        ids = [item.id for item in client.items(prefix="holiday")]
        assert len(ids) == 2 and all(id.startswith("holiday/") for id in ids)
    assert client.delete_matching({}, 2, "holiday/") == 2


def test_search_goes_through_the_service(store: Path, pictures: Path) -> None:
    url = served_at(store)
    assert url is not None
    for where in (("--store", store, "--key", KEY), ("--url", url, "--key", KEY)):
        hits = done("search", pictures / "odd" / "3.png", "-k", "3", *where)["hits"]
        assert {hit["id"] for hit in hits[:2]} == {"odd/3.png", "odd/copy.png"}
        assert hits[0]["metadata"] == {"label": "odd"}
    told = {"LOOKALIKE_URL": url, "LOOKALIKE_KEY": KEY}
    assert "1.0000  odd/3.png" in run("search", pictures / "odd" / "3.png", environment=told).stdout
    refused = run("search", pictures / "odd" / "3.png", "--store", store)
    assert refused.returncode == 2 and "--key or LOOKALIKE_KEY" in refused.stderr


def test_duplicates_go_through_the_service(store: Path, tmp_path: Path) -> None:
    url = served_at(store)
    assert url is not None
    ours = done("duplicates", "--store", store, "--preset", "exact", "--key", KEY)
    theirs = done("duplicates", "--url", url, "--preset", "exact", "--key", KEY)
    assert [group["best"] for group in ours["groups"]] == [group["best"] for group in theirs["groups"]]
    assert [len(group["items"]) for group in theirs["groups"]] == [2]
    lines = run("duplicates", "--url", url, "--preset", "exact", "--key", KEY).stdout
    assert "same bytes" in lines
    refused = run("duplicates", "--url", url, "--html", tmp_path / "x.html", "--key", KEY)
    assert refused.returncode == 2 and "need --store" in refused.stderr
    plan = tmp_path / "rest"
    assert run("duplicates", "--store", store, "--preset", "exact", "--delete-rest", plan, "--key", KEY).returncode == 0
    removed = done("duplicates", "--store", store, "--delete-rest", plan, "--yes", "--key", KEY)
    assert len(removed["items"]) == 1 and removed["left"] == []
    client = served_store(store, KEY)
    assert client is not None and client.get(removed["items"][0]) is None


def test_an_import_goes_through_the_service(store: Path, tmp_path: Path) -> None:
    assert run("embed", "digits[:30]", "--model", MODEL, "--out", tmp_path / "parts").returncode == 0
    content = done("store", "import", tmp_path / "parts", "--store", store, "--key", KEY)
    assert (content["added"], content["replaced"], content["known"], content["lost"]) == (30, 0, 0, 0)
    content = done("store", "import", tmp_path / "parts", "--store", store, "--key", KEY)
    assert (content["added"], content["replaced"], content["known"], content["lost"]) == (0, 0, 30, 0)
    client = served_store(store, KEY)
    assert client is not None
    item = client.get("digits/00007", include=["embedding"])
    assert item is not None and item.metadata == {"label": "7"} and item.embedding is not None
    data = open_source("digits").entry(7).data
    assert client.embed([data])[0] @ item.embedding > 0.999
    assert client.delete_matching({}, 30, "digits/") == 30


def test_options_that_a_service_decides_are_refused(store: Path, pictures: Path) -> None:
    for options, says in (
        (("--store", store, "--model", MODEL.parent / "digits"), "serves the encoder mnist, not that of"),
        (("--store", store, "--keep-originals"), "--keep-originals: a running service decides"),
        (("--store", store, "--url", "http://127.0.0.1:1"), "expected --store or --url, and not both"),
        (("--url", "http://127.0.0.1:1"), "the service cannot be reached"),
        (("--url", "nonsense://x"), "the URL of the service"),
        ((), "expected --store DIR, or --url (or LOOKALIKE_URL)"),
    ):
        refused = run("index", pictures, *options, "--key", KEY)
        assert refused.returncode == 2, options
        assert says in refused.stderr and "Traceback" not in refused.stderr


# The lock ----------------------------------------------------------------------------------------


@pytest.mark.slow("starts a service to kill it")
def test_a_service_that_was_killed_is_not_found_and_its_lock_is_free(tmp_path: Path) -> None:
    with killed(tmp_path) as (address, kill):
        store = tmp_path / "store"
        while served_at(store) is None:
            time.sleep(0.05)
        assert served_at(store) == address
        with pytest.raises(InvalidStore, match=r"in use by process \d+;"):
            lock(store)
        kill()
        assert address in (store / "LOCK").read_text()
        # The system needs a moment to end a process of some threads.
        deadline = time.monotonic() + 30
        while served_at(store) is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert served_at(store) is None
        assert find_service(store, None, None) is None
        # Another service on that port is not that of this store.
        with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
            assert served_at(store) is None
    os.close(lock(store))


def test_the_lock_of_another_process_names_no_service(tmp_path: Path) -> None:
    assert served_at(tmp_path / "nowhere") is None
    script = "import os, sys; from pathlib import Path; from service.store.layout import lock; lock(Path(sys.argv[1]))"
    script += "; print('locked', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "store")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    assert served_at(tmp_path / "store") is None
    # A reader that tells a stale file apart does not keep a process from the lock.
    (tmp_path / "store" / "LOCK").write_text("999999999\nhttp://127.0.0.1:3000\n")
    assert served_at(tmp_path / "store") is None
    holder.communicate("")
    announce_free = lock(tmp_path / "store")
    announce(tmp_path / "store", "http://127.0.0.1:3000")
    os.close(announce_free)
    assert served_at(tmp_path / "store") is None


def test_urls_and_keys_come_from_options_and_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOOKALIKE_URL", "http://127.0.0.1:1/a/")
    client = find_service(None, None, None)
    assert client is not None and client.url == "http://127.0.0.1:1/a"
    other = find_service(None, "localhost:2", "k")
    assert other is not None and other.url == "http://localhost:2"
    assert find_service(tmp_path, None, None) is None
    monkeypatch.setenv("LOOKALIKE_URL", " ")
    with pytest.raises(InvalidRequest, match="expected --store DIR"):
        find_service(None, None, None)


@pytest.mark.slow("follows a folder twice, once with a service")
def test_a_served_store_follows_a_folder_as_a_free_one_does(tmp_path: Path) -> None:
    pictures, away = tmp_path / "pictures", tmp_path / "store"
    pictures.mkdir()
    for n in range(8):
        (pictures / f"{n}.png").write_bytes(encoded(scene(seed=n)))
    with serving(tmp_path, api_keys=f"write:{KEY}"):
        until_served(away)
        sync = ("index", pictures, "--store", away, "--key", KEY, "--sync")
        assert done(*sync)["added"] == 8
        client = served_store(away, KEY)
        assert client is not None
        for n in range(8):
            client.patch(f"{n}.png", {"told": n})
        # The service has read the files itself, so it knows their stamps.
        assert done(*sync)["unchanged"] == 8
        first = client.get("1.png", include=("source", "file"))
        assert first is not None
        assert first.facts is not None
        status = (pictures / "1.png").stat()
        assert (first.facts.width, first.facts.size_bytes, first.mtime_ns) == (64, status.st_size, status.st_mtime_ns)
        assert first.source == str(pictures / "1.png")
        (pictures / "0.png").write_bytes(encoded(scene(seed=20)))
        (pictures / "1.png").rename(pictures / "x.png")
        (pictures / "2.png").rename(pictures / "1.png")
        (pictures / "3.png").unlink()
        (pictures / "new.png").write_bytes(encoded(scene(seed=21)))
        os.utime(pictures / "4.png", (10**9, 10**9))
        client.put("http.png", encoded(scene(seed=22)))
        would = done(*sync, "--dry-run")
        found = done(*sync)
        assert found["changes"] == would["changes"]
        assert found["changes"] == {
            "added": ["new.png"],
            "replaced": ["0.png"],
            "renamed": [{"id": "2.png", "to": "1.png"}, {"id": "1.png", "to": "x.png"}],
            "removed": ["3.png"],
        }
        assert (found["unchanged"], found["failed"]) == (4, 0)
        told = {item.id: item.metadata.get("told") for item in client.items()}
        names = {"0.png": 0, "1.png": 2, "x.png": 1, "4.png": 4, "5.png": 5, "6.png": 6, "7.png": 7}
        assert told == names | {"new.png": None, "http.png": None}
        assert done(*sync)["unchanged"] == 8
        # By its URL, without the store's folder.
        (pictures / "7.png").unlink()
        by_url = ("index", pictures, "--url", client.url, "--key", KEY, "--sync")
        assert (done(*by_url)["removed"], done(*by_url)["unchanged"]) == (1, 7)
        for path in pictures.iterdir():
            path.unlink()
        assert "is it mounted?" in run(*sync).stderr
        assert client.count() == 8
        client.close()


def until_served(store: Path) -> None:
    """Wait until the lock of a store names its service."""
    while served_at(store) is None:
        time.sleep(0.05)
