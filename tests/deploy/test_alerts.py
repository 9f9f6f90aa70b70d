"""Prometheus's own checks of the alerts and of its configuration; each alert is documented."""

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, missing
from tests.ports import free_port
from tests.serving import running

DEPLOY = ROOT / "deploy"
ALERTS = [
    rule["alert"] for group in yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]


def promtool(*arguments: str | Path) -> str:
    """Run promtool, and return what it printed. Fails with that if it is not content."""
    program = shutil.which("promtool")
    if program is None:
        missing("no promtool: install Debian's package prometheus")
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_rules_are_well_formed() -> None:
    assert f"{len(ALERTS)} rules found" in promtool("check", "rules", DEPLOY / "alerts.yaml")


@pytest.mark.slow("evaluates a day of series")
def test_each_alert_fires_when_it_should() -> None:
    promtool("test", "rules", Path(__file__).with_name("alerts_test.yaml"))


def test_each_alert_is_tested_both_ways() -> None:
    quiet, _, loud = yaml.safe_load(Path(__file__).with_name("alerts_test.yaml").read_text())["tests"]
    assert {one["alertname"] for one in quiet["alert_rule_test"] if "exp_alerts" not in one} == set(ALERTS)
    assert {one["alertname"] for one in loud["alert_rule_test"] if one.get("exp_alerts")} == set(ALERTS)


def test_each_alert_is_documented() -> None:
    text = (ROOT / "docs" / "operations.md").read_text().partition("\n## Alerts\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(Lookalike\w+)` \|", text, re.M) == ALERTS


@pytest.mark.slow("starts a service and Prometheus")
def test_prometheus_watches_the_service(tmp_path: Path) -> None:
    """A real Prometheus with our configuration sees no alert while the service is well, and one when it is gone."""
    program = shutil.which("prometheus")
    if program is None:
        missing("no prometheus: install Debian's package prometheus")
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (job,) = config["scrape_configs"]
    # The name is one of compose's network.
    assert job.pop("dns_sd_configs")[0]["names"] == ["lookalike"]
    shutil.copy(DEPLOY / "alerts.yaml", tmp_path)
    with running(tmp_path, "--store", str(tmp_path / "store")) as (service, address, _):
        job["static_configs"] = [{"targets": [address.removeprefix("http://")]}]
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
        port, log = free_port(), tmp_path / "prometheus.log"
        flags = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
        with log.open("wb") as output:
            flags += [f"--web.listen-address=127.0.0.1:{port}"]
            prometheus = subprocess.Popen([program, *flags], stdout=output, stderr=output)

        def wait_until(holds: Callable[[], bool]) -> None:
            deadline = time.monotonic() + 60
            while not holds():
                assert time.monotonic() < deadline, log.read_text()
                assert prometheus.poll() is None, log.read_text()
                time.sleep(0.2)

        try:
            # Before the first scrape there is no service.
            wait_until(lambda: bool(values(port, "lookalike_ready")))
            assert values(port, 'lookalike_ready{job="lookalike"}') == ["1"]
            assert values(port, "lookalike_store_disk_free_bytes > 0")
            wait_until(lambda: states(port) == dict.fromkeys(ALERTS, "inactive"))
            service.terminate()
            wait_until(lambda: states(port) == {**dict.fromkeys(ALERTS, "inactive"), "LookalikeNotReady": "pending"})
        finally:
            prometheus.terminate()
            prometheus.wait(30)


def values(port: int, query: str) -> list[str]:
    """Return the values of a query of Prometheus."""
    return [one["value"][1] for one in asked(port, "query?" + urllib.parse.urlencode({"query": query}), "result")]


def states(port: int) -> dict[str, str]:
    """Return the states of the alerts in Prometheus that have been evaluated without an error."""
    rules = [rule for group in asked(port, "rules", "groups") for rule in group["rules"]]
    return {rule["name"]: rule["state"] for rule in rules if rule["health"] == "ok"}


def asked(port: int, what: str, part: str) -> list[Any]:
    """Return a part of what Prometheus' API answers; nothing while it does not answer."""
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{what}", timeout=5) as answer:
        found: list[Any] = json.load(answer)["data"][part]
        return found
    return []


def test_prometheus_loads_its_configuration() -> None:
    assert f"{len(ALERTS)} rules found" in promtool("check", "config", DEPLOY / "prometheus.yml")
