"""The dashboard queries only metrics and labels that the service has."""

import json
import re
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import ROOT, encoded, scene
from tests.serving import running

METRIC = re.compile(r"\b((?:lookalike|process)_[a-z_]+)(?:\{([^}]*)\})?")


@pytest.mark.slow("starts a service to read its metrics once")
def test_every_metric_of_the_dashboard_is_there(tmp_path: Path) -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    with running(tmp_path, "--store", str(tmp_path / "store")) as (_, address, _):
        urllib.request.urlopen(urllib.request.Request(address + "/embed", encoded(scene()))).close()
        with suppress(OSError):
            urllib.request.urlopen(address + "/images/nobody").close()
        text = urllib.request.urlopen(address + "/metrics").read().decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    labels = {re.split(r"[{ ]", line)[0]: set(re.findall(r'(\w+)="', line)) for line in lines}
    for expression in asked:
        by = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", expression))))
        for metric, chosen in METRIC.findall(expression):
            assert metric in labels, expression
            named = set(re.findall(r"(\w+)\s*=~?", chosen)) - {"job", "instance"}
            assert named | by <= labels[metric], expression
    ours = {re.sub(r"_(bucket|sum|count|created|total)$", "", name) for name in labels if name.startswith("lookalike_")}
    shown = {re.sub(r"_(bucket|sum|count|total)$", "", name) for text in asked for name, _ in METRIC.findall(text)}
    assert ours <= shown, f"on no panel: {ours - shown}"
