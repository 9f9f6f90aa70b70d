"""Only the app sets up metrics: importing a module or opening an encoder counts and changes nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from service import metrics
from service.encoding.card import read_card
from service.encoding.encoder import Encoder
from service.http.guard import Guard
from service.http.routes import create_app
from service.jobs.reindex import reindex
from service.settings import Settings
from service.worker import Worker
from tests.conftest import MODEL, ROOT, another_encoder, encoded, scene

_IMPORT = """
import os, sys
before = dict(os.environ)
from service import metrics
import service.encoding.encoder
assert dict(os.environ) == before, "importing it changed the environment"
assert "prometheus_client" not in sys.modules
metrics.configure(workers=int(sys.argv[1]))
metrics.batch_size.observe(3)
assert b"lookalike_batch_size_sum 3.0" in metrics.report()
print(os.environ.get("PROMETHEUS_MULTIPROC_DIR", "memory"))
"""


def counted_where(folder: str, workers: int) -> str:
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": folder, "ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT, str(workers)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_changes_nothing_and_the_app_says_where_to_count(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    assert counted_where(str(shared), 1) == "memory"
    assert counted_where(str(shared), 2).startswith(f"{tmp_path}/lookalike-metrics-{os.getpid()}-")
    assert not list(shared.iterdir())


def test_opening_an_encoder_leaves_the_metrics_as_they_were() -> None:
    metrics.tell_encoder("another", "fp32", "CPUExecutionProvider", 1)
    before = ours(metrics.report())
    Encoder(read_card(MODEL), "cpu", "auto")
    assert ours(metrics.report()) == before
    assert 'lookalike_encoder_lanes{model="another",provider="CPUExecutionProvider",variant="fp32"} 1.0' in before


def test_a_switch_that_fails_changes_nothing_and_one_that_succeeds_names_the_new_encoder(tmp_path: Path) -> None:
    other, aside = another_encoder(tmp_path / "other"), tmp_path / "aside"
    http = create_app()
    chosen = Settings(store=tmp_path / "store", model=MODEL, device="cpu", variant="fp32", work_timeout_s=0.1)

    handler = signal.getsignal(signal.SIGHUP)
    worker = Worker(http, chosen, Guard(http, chosen))
    try:
        worker.gallery.add("a", encoded(scene()), {})
        reindex(other, chosen)
        before = lanes()
        assert before == ['lookalike_encoder_lanes{model="mnist",provider="CPUExecutionProvider",variant="fp32"} 1.0']
        other.rename(aside)
        card = json.loads((shutil.copytree(MODEL, other) / "card.json").read_text())
        (other / "card.json").write_text(json.dumps(card | {"name": "third"}))
        # The encoder opens, but the store's new generation belongs to another one.
        worker.switch()
        assert lanes() == before
        assert worker.gallery.card.name == http.state.gallery.card.name == "mnist"
        shutil.rmtree(other)
        aside.rename(other)
        worker.switch()
        assert worker.gallery.card.name == http.state.gallery.card.name == "other"
        assert lanes() == [before[0].replace("mnist", "other")]
    finally:
        worker.close()
        signal.signal(signal.SIGHUP, handler)


def lanes() -> list[str]:
    """The metrics of the serving encoder."""
    return [line for line in ours(metrics.report()) if line.startswith("lookalike_encoder_lanes{")]


def ours(report: bytes) -> list[str]:
    """The lines of our own metrics; those of the process vary."""
    return [line for line in report.decode().splitlines() if line.startswith("lookalike_")]
