"""A store on a file system that is really full: a tmpfs of 64 MB."""

import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import encoded, missing, scene
from tests.deploy.proxies import until
from tests.serving import killed, serving, status_of

PICTURE = encoded(scene())
# What stands behind the end of a picture is part of its file.
LARGE = PICTURE + bytes(1_000_000)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB, which holds the store of `serving` and `killed`; their logs lie elsewhere."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        missing(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    (folder / "store").mkdir()
    (tmp_path / "store").symlink_to(folder / "store")
    yield folder
    subprocess.run(["umount", folder], check=True)


class Answer:
    """Status, error code, Retry-After and JSON of an answer."""

    def __init__(self, method: str, url: str, body: bytes | None = None) -> None:
        type = "application/json" if method == "PATCH" else "image/png"
        request = urllib.request.Request(url, body, {"Content-Type": type}, method=method)
        try:
            answer = urllib.request.urlopen(request, timeout=30)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            data = answer.read()
        self.status, self.retry_after = int(answer.status), answer.headers["Retry-After"]
        self.json: Any = json.loads(data) if data else None
        self.code = self.json.get("code", "") if isinstance(self.json, dict) else ""


def ids(address: str) -> set[str]:
    return {item["id"] for item in Answer("GET", f"{address}/images?limit=1000").json["items"]}


def writable(address: str) -> bool:
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        return b"lookalike_store_writable 1.0" in answer.read()


def fill(address: str, name: str) -> set[str]:
    """Add pictures, NAME0 and so on, until the disk is full; return the ids that were acknowledged."""
    added = set[str]()
    while (answer := Answer("PUT", f"{address}/images/{name}{len(added)}", LARGE)).status == 201:
        added.add(f"{name}{len(added)}")
    assert (answer.status, answer.code, answer.retry_after) == (503, "store_paused", "5")
    return added


@pytest.mark.slow("starts a service three times")
def test_a_full_disk_refuses_changes_loses_nothing_and_passes(small: Path, tmp_path: Path) -> None:
    filler = small / "filler"
    filler.write_bytes(bytes(30_000_000))
    with serving(tmp_path) as address:
        added = fill(address, "large")
        assert len(added) > 5
        assert not writable(address)
        for method, body in (("PUT", PICTURE), ("DELETE", None), ("PATCH", b'{"metadata": {"n": 1}}')):
            assert Answer(method, f"{address}/images/large0", body).code == "store_paused", method
        # Reads go on, also those of a load balancer.
        assert status_of(f"{address}/readyz") == 200
        assert Answer("POST", f"{address}/search?k=1", PICTURE).json["hits"][0]["score"] == pytest.approx(1)
        with urllib.request.urlopen(f"{address}/images/large0/content") as content:
            assert content.read() == LARGE
        assert ids(address) == added
        filler.unlink()
        until(lambda: writable(address), 30)
        assert Answer("PUT", f"{address}/images/after", PICTURE).status == 201
        assert ids(address) == added | {"after"}
        assert Answer("DELETE", f"{address}/images/large0").status == 204
    log = (tmp_path / "serve.log").read_text()
    assert log.count("it is read-only until there is room") == 1
    assert "the store can be written again" in log
    kept = added - {"large0"} | {"after"}

    # A service that is killed while the disk is full starts with the full disk.
    with killed(tmp_path) as (address, kill):
        assert ids(address) == kept
        kept |= fill(address, "more")
        kill()
    with serving(tmp_path) as address:
        assert ids(address) == kept
        assert Answer("POST", f"{address}/search?k=1", PICTURE).status == 200
        assert Answer("PUT", f"{address}/images/last", LARGE).code == "store_paused"
        # Nothing else lies on this disk, so it is enlarged.
        subprocess.run(["mount", "-o", "remount,size=96m", small], check=True)
        until(lambda: writable(address), 30)
        assert Answer("PUT", f"{address}/images/last", LARGE).status == 201
