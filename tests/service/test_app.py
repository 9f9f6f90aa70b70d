"""The real process: ready once it can search; on a signal it ends and releases its store."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from service.encoding.card import read_card
from service.store.embedded import EmbeddedStore
from service.store.layout import served_at
from tests.conftest import MODEL, another_encoder
from tests.ports import free_port
from tests.serving import LOOKALIKE, running, serving, wait_until_ready


def get(address: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow("starts a service; SIGTERM ends one in the same way")),
        signal.SIGTERM,
    ],
)
def test_a_service_starts_empty_answers_and_stops_cleanly(stop: signal.Signals, tmp_path: Path) -> None:
    port, store = free_port(), tmp_path / "new" / "store"
    log = tmp_path / "log"
    # A folder of somebody who has modules of such names, and whose HOME cannot be written.
    for name in ("service", "training", "numpy", "logging"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the user was imported')")
    bare = {name: value for name, value in os.environ.items() if name != "BENTOML_HOME"}
    bare |= {"HOME": "/proc/nowhere", "LOOKALIKE_VARIANT": "", "LOOKALIKE_MAX_PIXELS": ""}
    with log.open("w") as output:
        command: list[str | Path] = [LOOKALIKE, "serve", "--model", MODEL, "--store", "new/store", "--port", str(port)]
        server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, cwd=tmp_path, env=bare)
    wait_until_ready(f"http://127.0.0.1:{port}", server, log)
    assert b'"count":0' in get(f"http://127.0.0.1:{port}/info")[1]
    status, metrics = get(f"http://127.0.0.1:{port}/metrics")
    assert status == 200
    assert b'lookalike_requests_total{method="GET",route="/info",status="200"} 1.0' in metrics
    assert get(f"http://127.0.0.1:{port}/images/nobody/content")[0] == 404
    metrics = get(f"http://127.0.0.1:{port}/metrics")[1]
    assert b'lookalike_requests_total{method="GET",route="/images/{id}/content",status="404"} 1.0' in metrics
    # A terminal's Ctrl-C and a supervisor signal the whole process group.
    os.killpg(server.pid, stop)
    assert server.wait(20) == 0, log.read_text()
    text = log.read_text()
    assert f"Lookalike on http://127.0.0.1:{port}" in text
    assert "Traceback" not in text
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the port is still open"
    # It is not locked any more.
    card = read_card(MODEL)
    EmbeddedStore(store, card, card.facts["dimension"]).close()


@pytest.mark.slow("starts a service and runs four commands beside it")
def test_a_running_service_takes_up_another_encoder_on_sighup(tmp_path: Path) -> None:
    other = another_encoder(tmp_path / "other")
    with serving(tmp_path, "digits[:20]") as url:
        while served_at(tmp_path / "store") != url:
            time.sleep(0.05)
        worker = int((tmp_path / "store" / "LOCK").read_text().splitlines()[0])
        assert b'"model":"mnist"' in get(f"{url}/info")[1]

        def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
            command = [LOOKALIKE, *arguments, "--store", tmp_path / "store"]
            return subprocess.run(command, capture_output=True, text=True, check=False)

        refused = run("index", "digits[:30]", "--model", other)
        assert refused.returncode == 2
        assert "serves the encoder mnist, not that of" in refused.stderr
        assert run("store", "check").returncode == 0
        done = run("reindex", "--model", other)
        assert done.returncode == 0, done.stderr
        assert b'"model":"mnist"' in get(f"{url}/info")[1]
        # The parent passes it on.
        os.kill(psutil.Process(worker).ppid(), signal.SIGHUP)
        deadline = time.monotonic() + 30
        while b'"model":"other"' not in get(f"{url}/info")[1]:
            assert time.monotonic() < deadline, (tmp_path / "serve.log").read_text()
            time.sleep(0.1)
        assert b'"count":20' in get(f"{url}/info")[1]
        picture = get(f"{url}/images/digits/00007/content")[1]
        request = urllib.request.Request(f"{url}/images/added", picture, {"Content-Type": "image/png"}, method="PUT")
        assert urllib.request.urlopen(request, timeout=10).status == 201
        assert b'"count":21' in get(f"{url}/info")[1]


@pytest.mark.slow("starts two services")
def test_a_reader_serves_beside_the_writer_and_sees_its_changes(tmp_path: Path) -> None:
    with serving(tmp_path, "digits[:20]") as url:
        (tmp_path / "reader").mkdir()
        (tmp_path / "reader" / "store").symlink_to(tmp_path / "store")
        with serving(tmp_path / "reader", read_only="true") as reader:
            picture = get(f"{url}/images/digits/00007/content")[1]
            for address, status in ((reader, 403), (url, 201)):
                request = urllib.request.Request(f"{address}/images/new", picture, method="PUT")
                request.add_header("Content-Type", "image/png")
                try:
                    got = urllib.request.urlopen(request, timeout=10).status
                except urllib.error.HTTPError as error:
                    got = error.code
                assert got == status
            search = urllib.request.Request(f"{reader}/search?k=2", picture, {"Content-Type": "image/png"})
            hits = json.loads(urllib.request.urlopen(search, timeout=10).read())["hits"]
            assert [hit["id"] for hit in hits] == ["digits/00007", "new"]


@pytest.mark.slow("starts a service")
def test_keys_change_on_sighup_to_the_main_process(tmp_path: Path) -> None:
    keys, old, new = tmp_path / "keys", "an-old-key-of-ours", "a-new-key-of-ours!"
    keys.write_text(f"read:{old}\n")

    def status(address: str, key: str) -> int:
        request = urllib.request.Request(f"{address}/info", headers={"Authorization": f"Bearer {key}"})
        try:
            return int(urllib.request.urlopen(request, timeout=5).status)
        except urllib.error.HTTPError as error:
            return error.code

    flags = ["--model", str(MODEL), "--no-store", "--workers", "2"]
    with running(tmp_path, *flags, api_keys_file=str(keys)) as (server, address, log):
        # Ready means that one of the workers is.
        deadline = time.monotonic() + 60
        while log.read_text().count("serving without a store") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert (status(address, old), status(address, new)) == (200, 401)
        keys.write_text(f"read:{new}\n")
        server.send_signal(signal.SIGHUP)
        time.sleep(1)
        # Each request may come to either worker.
        assert {(status(address, old), status(address, new)) for _ in range(20)} == {(401, 200)}
        keys.write_text("nonsense\n")
        server.send_signal(signal.SIGHUP)
        time.sleep(1)
        assert (status(address, old), status(address, new)) == (401, 200)
        assert "the API keys stay as they were: API key 1: expected read:KEY or write:KEY" in log.read_text()
        assert server.poll() is None
