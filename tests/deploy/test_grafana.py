"""Dashboard and alerts query only metrics and labels that the service has, and the dashboard has all metrics."""

import json
import re
import urllib.request
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, encoded, scene
from tests.serving import running

METRIC = re.compile(r"\b((?:lookalike|process)_[a-z_]+)(?:\{([^}]*)\})?")
# Prometheus adds these to every series.
ADDED = {"job", "instance"}


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Return the metrics of a service that has answered a picture and an error, each with its labels."""
    folder = tmp_path_factory.mktemp("metrics")
    with running(folder, "--store", str(folder / "store")) as (_, address, _):
        urllib.request.urlopen(urllib.request.Request(address + "/embed", encoded(scene()))).close()
        with suppress(OSError):
            urllib.request.urlopen(address + "/images/nobody").close()
        return metrics_of(address)


def metrics_of(address: str) -> dict[str, set[str]]:
    """Return the metrics of a service, each with its labels."""
    text = urllib.request.urlopen(address + "/metrics").read().decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {re.split(r"[{ ]", line)[0]: set(re.findall(r'(\w+)="', line)) for line in lines}


def check(expressions: Iterable[str], labels: dict[str, set[str]]) -> None:
    """Fail if an expression asks for a metric or a label that is not there."""
    for expression in expressions:
        found = METRIC.findall(expression)
        assert found, expression
        by = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", expression)))) - ADDED
        for metric, chosen in found:
            assert metric in labels, expression
            named = set(re.findall(r"(\w+)\s*(?:=|!=|!~)", chosen)) - ADDED
            assert named | by <= labels[metric], expression


def name_of(metric: str) -> str:
    return re.sub(r"_(bucket|sum|count|created|total)$", "", metric)


@pytest.mark.slow("starts a service to read its metrics once")
def test_every_metric_is_on_the_dashboard(labels: dict[str, set[str]]) -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    check(asked, labels)
    ours = {name_of(metric) for metric in labels if metric.startswith("lookalike_")}
    shown = {name_of(metric) for text in asked for metric, _ in METRIC.findall(text)}
    assert ours <= shown, f"on no panel: {ours - shown}"


@pytest.mark.slow("starts a service to read its metrics once")
def test_every_metric_of_the_alerts_is_there(labels: dict[str, set[str]]) -> None:
    groups = yaml.safe_load((ROOT / "deploy" / "alerts.yaml").read_text())["groups"]
    check([rule["expr"] for group in groups for rule in group["rules"]], labels)


@pytest.mark.slow("starts two services")
def test_what_has_no_store_of_its_own_reports_none(tmp_path: Path) -> None:
    store = {"lookalike_items", "lookalike_store_disk_bytes", "lookalike_snapshot_due"}
    with running(tmp_path, "--no-store") as (_, address, _):
        found = metrics_of(address)
    assert not {name for name in found if "store" in name or "snapshot" in name or "items" in name}
    with running(tmp_path, "--store", str(tmp_path / "store")) as (_, address, _):
        with running(tmp_path, "--store", str(tmp_path / "store"), "--read-only") as (_, reader, _):
            assert store <= metrics_of(reader).keys()
            # It would be 0, which means that something is wrong.
            assert "lookalike_store_writable" not in metrics_of(reader)
        assert store | {"lookalike_store_writable"} <= metrics_of(address).keys()
