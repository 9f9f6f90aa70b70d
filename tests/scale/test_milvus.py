"""The store on Milvus over a connection: addresses, faults, pictures elsewhere, and the service on it."""

import json
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from pymilvus import MilvusClient

from service.errors import InvalidRequest, InvalidStore, NotOfThisStore, StoreAway, StoreMismatch
from service.settings import Settings
from service.store import milvus
from service.store.milvus import MilvusStore
from service.store.milvus_address import MilvusAddress, parse_address
from service.store.milvus_connection import recorded_model
from tests.conftest import MODEL
from tests.scale.milvus_server import Server, guarded_server, milvus_server
from tests.service.store.test_contract import address
from tests.service.store.test_embedded import D, card, item, unit
from tests.serving import LOOKALIKE, running


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("milvus://db:19530/pictures", MilvusAddress("http://db:19530", "pictures", False)),
        ("milvus://db/pictures", MilvusAddress("http://db:19530", "pictures", False)),
        ("milvuss://db.example:443/p_1", MilvusAddress("https://db.example:443", "p_1", False)),
        ("milvus://[::1]:19530/p", MilvusAddress("http://[::1]:19530", "p", False)),
        ("milvus:///data/x.db/p", MilvusAddress("/data/x.db", "p", True)),
        ("milvus:/data/x.db/p", MilvusAddress("/data/x.db", "p", True)),
        ("gallery", None),
        ("/data/milvus", None),
    ],
)
def test_addresses(text: str, expected: MilvusAddress | None) -> None:
    assert parse_address(text) == expected
    # As the command line and the environment hand it on.
    assert parse_address(Path(text)) == expected
    if expected is not None:
        assert parse_address(str(expected)) == expected


@pytest.mark.parametrize(
    "text", ["milvus://db", "milvus://u:p@db/x", "milvus://db/a/b", "milvus://db/9", "milvuss:x.db/c", "milvus:"]
)
def test_addresses_that_are_none_do_not_repeat_a_password(text: str) -> None:
    with pytest.raises(InvalidRequest, match="expected milvus://HOST:PORT/COLLECTION") as refused:
        parse_address(text)
    assert "u:p" not in str(refused.value)


def at(server: Server) -> MilvusAddress:
    found = parse_address(server.url)
    assert found is not None
    return found


def test_a_server_that_goes_away_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus, "TIMEOUT_S", 1)
    with milvus_server(tmp_path) as server:
        store = MilvusStore(at(server), card(), D)
        store.add([item("a", unit(D), n=1)])
        server.kill()
        for call in (lambda: store.get("a"), lambda: store.search(unit(1, D), 1), lambda: store.remove("a")):
            with pytest.raises(StoreAway, match="does not answer now") as away:
                call()
            assert (away.value.status, away.value.retry_after_s) == (503, 5)
        assert not store.writable
        with pytest.raises(StoreAway):
            MilvusStore(at(server), card(), D)
        server.start()
        # What Milvus acknowledged before it was killed is there.
        found = store.get("a")
        assert found is not None
        assert store.search(unit(1, D), 1)[0][0].id == "a"
        assert store.add([item("b", unit(D))]) == [True]
        assert store.writable
        store.close()


def test_a_token_that_is_wrong_or_right(tmp_path: Path) -> None:
    with guarded_server(tmp_path) as url:
        where = parse_address(url)
        assert where is not None
        for token in ("", "root:wrong"):
            with pytest.raises(InvalidStore, match="refuses the token; LOOKALIKE_MILVUS_TOKEN has it") as refused:
                MilvusStore(where, card(), D, token)
            assert "wrong" not in str(refused.value)
        store = MilvusStore(where, card(), D, "root:secret")
        assert store.add([item("a", unit(D))]) == [True]
        store.close()


def test_collections_that_are_not_for_this_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MilvusStore(address(tmp_path), card(), D)
    assert recorded_model(address(tmp_path), "") == (Path("/models/encoder"), "encoder")
    with pytest.raises(StoreMismatch, match="built by the encoder encoder"):
        MilvusStore(address(tmp_path), card("other"), D)
    store.close()
    with (
        monkeypatch.context() as later,
        pytest.raises(InvalidStore, match=r"version of Lookalike \(layout 2, expected 3\)"),
    ):
        later.setattr(milvus, "_LAYOUT", "3")
        MilvusStore(address(tmp_path), card(), D)
    with pytest.raises(InvalidStore, match=r"its vectors have 8 numbers, the encoder encoder gives 9"):
        MilvusStore(address(tmp_path), card(), D + 1)
    client = MilvusClient(address(tmp_path).uri)
    client.create_collection("strange", dimension=D)
    client.close()
    strange = address(tmp_path)._replace(collection="strange")
    with pytest.raises(InvalidStore, match="has no fingerprint of an encoder, so it is not one of ours"):
        MilvusStore(strange, card(), D)
    with pytest.raises(InvalidStore, match="not one of ours"):
        recorded_model(strange, "")
    assert recorded_model(address(tmp_path)._replace(collection="nobody"), "") is None


def test_what_milvus_cannot_do_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MilvusStore(address(tmp_path), card(), D)
    store.add([item(f"a/{n}", vector) for n, vector in enumerate(unit(5, D))])
    with pytest.raises(NotOfThisStore, match="does not number its changes"):
        store.sequence()
    with pytest.raises(NotOfThisStore, match="duplicates are not told apart"):
        store.dismiss([("a", "b")])
    with pytest.raises(NotOfThisStore, match="at most 16384 neighbours, not 20000"):
        store.search(unit(1, D), 20_000)
    with pytest.raises(InvalidRequest, match="Milvus takes at most 1024 bytes"):
        store.add([item("é" * 600, unit(D))])
    monkeypatch.setattr(milvus, "MOST_SORTED", 4)
    for call, named in (
        (lambda: store.page(2), "the order added"),
        (lambda: store.page(2, order="-size"), "the order -size"),
        (store.folders, "the list of folders"),
        (store.fields, "the summary of metadata"),
    ):
        with pytest.raises(NotOfThisStore, match=f"{named} is for up to 4 items .* and 5 do; listings in the order id"):
            call()
    assert [one.id for one in store.page(2, order="id")[0]] == ["a/0", "a/1"]
    store.close()


def test_a_large_call_is_sent_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus, "_MOST_ROWS", 7)
    monkeypatch.setattr(milvus, "_MOST_BYTES", 3000)
    monkeypatch.setattr(milvus, "_ROWS_AT_ONCE", 9)
    store = MilvusStore(address(tmp_path), card(), D)
    vectors = unit(100, D)
    assert store.add([item(f"{n:03}", one, text="x" * (n * 7)) for n, one in enumerate(vectors)]) == [True] * 100
    assert store.count() == 100
    assert [one.id for one in store.page(100, order="-id")[0]] == [f"{n:03}" for n in reversed(range(100))]
    assert store.page(13, order="id")[0][-1].id == "012"
    store.close()


def test_without_a_place_for_pictures_they_are_left_out(tmp_path: Path) -> None:
    store = MilvusStore(address(tmp_path), card(), D)
    store.add([item("a", unit(D))])
    assert store.thumbnail("a") is store.original("a") is None
    store.close()


def test_files_of_pictures_go_with_their_items(tmp_path: Path) -> None:
    store = MilvusStore(address(tmp_path), card(), D, pictures=str(tmp_path / "files"))

    def files() -> int:
        return sum(path.is_file() for path in (tmp_path / "files").rglob("*"))

    store.add([item("a", unit(D)), item("b", unit(D))])
    store.add([item("a", unit(D, seed=1))])
    assert files() == 2
    store.set_metadata("a", lambda _: {"n": 1})
    assert store.thumbnail("a") == b"thumbnail of a"
    store.remove("a")
    assert files() == 1
    (path,) = [path for path in (tmp_path / "files").rglob("*") if path.is_file()]
    path.unlink()
    assert store.thumbnail("b") is None
    store.close()
    with pytest.raises(InvalidStore, match="LOOKALIKE_PICTURES: nosuch://x cannot be used"):
        MilvusStore(address(tmp_path), card(), D, pictures="nosuch://x")


def ask(method: str, url: str, body: bytes | None = None, kind: str = "application/json") -> tuple[int, Any, Any]:
    request = urllib.request.Request(url, body, {"Content-Type": kind}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read() or b"null"), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


def test_the_service_on_milvus_and_its_absence(tmp_path: Path) -> None:
    with milvus_server(tmp_path) as server:
        chosen = ["--model", str(MODEL), "--store", server.url]
        folder = str(tmp_path / "files")
        index = [str(LOOKALIKE), "index", "digits[:30]", *chosen]
        environment = {"LOOKALIKE_PICTURES": folder}
        done = subprocess.run(index, capture_output=True, text=True, env=_with(environment))
        assert done.returncode == 0, done.stderr
        assert "30 pictures added" in done.stderr
        with running(tmp_path, *chosen, "--workers", "2", **environment) as (_, url, _log):
            status, listed, _ = ask("GET", f"{url}/images?limit=5")
            assert (status, len(listed["items"])) == (200, 5)
            id = listed["items"][0]["id"]
            status, found, _ = ask("POST", f"{url}/search", json.dumps({"id": id, "k": 3}).encode())
            assert (status, len(found["hits"])) == (200, 3)
            for route in ("/map", "/duplicates", "/scores"):
                status, problem, _ = ask("GET", url + route)
                assert (status, problem["code"]) == (400, "not_of_this_store"), route
            server.kill()
            status, problem, headers = ask("GET", f"{url}/images?limit=5")
            assert (status, problem["code"], headers["Retry-After"]) == (503, "store_away", "5")
            server.start()
            # Each worker finds out with its own first call that Milvus was away, and answers once more with 503.
            answers = [ask("GET", f"{url}/images?limit=5") for _ in range(20)]
            assert {status for status, _, _ in answers} <= {200, 503}
            assert answers[-1][:2] == (200, listed)


def _with(environment: dict[str, str]) -> dict[str, str]:
    import os

    return {**os.environ, **environment}


def test_faults_at_the_start_are_one_sentence(tmp_path: Path) -> None:
    for name, says in (
        ("milvus://127.0.0.1:1/pictures", "Milvus does not answer now"),
        (f"milvus:{tmp_path}/none/x.db/pictures", "is not there"),
    ):
        command = [str(LOOKALIKE), "serve", "--model", str(MODEL), "--store", name]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert says in done.stderr
        assert done.stderr.startswith("lookalike: ")
        assert done.stderr.count("\n") == 1
    lite = [str(LOOKALIKE), "serve", "--store", f"milvus:{tmp_path}/x.db/pictures", "--workers", "2"]
    done = subprocess.run(lite, capture_output=True, text=True)
    assert (done.returncode, "Milvus Lite opens its file in one process" in done.stderr) == (2, True)
    # A second process finds the file in use.
    store = MilvusStore(address(tmp_path), card(), D)
    lite = [str(LOOKALIKE), "serve", "--model", str(MODEL), "--store", str(address(tmp_path))]
    done = subprocess.run(lite, capture_output=True, text=True)
    assert (done.returncode, "is in use by another process" in done.stderr) == (2, True)
    store.close()


def test_commands_for_a_folder_refuse_milvus(tmp_path: Path) -> None:
    for command in (["store", "check"], ["duplicates"], ["doctor"], ["index", str(tmp_path), "--sync"]):
        lines = [str(LOOKALIKE), *command, "--store", "milvus://db/pictures"]
        done = subprocess.run(lines, capture_output=True, text=True)
        assert (done.returncode, "expected a folder" in done.stderr) == (2, True), command
    assert Settings(store=Path("milvus://db/pictures")).folder == Path(".lookalike/milvus")
