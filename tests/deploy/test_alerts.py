"""Prometheus's own checks of the alerts and of its configuration; each alert is documented."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, missing

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
    quiet, loud = yaml.safe_load(Path(__file__).with_name("alerts_test.yaml").read_text())["tests"]
    assert {one["alertname"] for one in quiet["alert_rule_test"] if "exp_alerts" not in one} == set(ALERTS)
    assert {one["alertname"] for one in loud["alert_rule_test"] if one.get("exp_alerts")} == set(ALERTS)


def test_each_alert_is_documented() -> None:
    text = (ROOT / "docs" / "operations.md").read_text().partition("\n## Alerts\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(Lookalike\w+)` \|", text, re.M) == ALERTS


def test_prometheus_loads_its_configuration() -> None:
    assert f"{len(ALERTS)} rules found" in promtool("check", "config", DEPLOY / "prometheus.yml")
