"""The tables of deploy/scale.md are what deploy/scale.py computes from deploy/scale.json."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"


def printed() -> str:
    done = subprocess.run([sys.executable, str(DEPLOY / "scale.py")], capture_output=True, text=True, check=True)
    return done.stdout


def test_the_page_has_the_tables_that_the_script_prints() -> None:
    page = (DEPLOY / "scale.md").read_text()
    tables = printed().strip().split("\n\n")
    assert len(tables) == 6
    for table in tables:
        assert table in page


def test_every_number_has_a_source_or_a_reason() -> None:
    facts: dict[str, Any] = json.loads((DEPLOY / "scale.json").read_text())
    measured = facts["measured"]
    assert all(one["source"] for one in (*measured.pop("encoders").values(), *measured.values()))
    assert all(one["why"] for one in facts["assumed"].values())


def test_a_worked_figure_agrees_with_one_by_hand() -> None:
    # A billion in 30 days at 33 pictures/s and core, 0.8 of it in a cluster: 14.6 cores.
    assert pytest.approx(14.6, abs=0.05) == 1e9 / 30 / 86_400 / 33 / 0.8
    # 1,280 numbers of 4 bytes, 231 bytes of graph and 300 besides, twice, on 70 % of 64 GB: 252.3 nodes.
    assert pytest.approx(252.3, abs=0.05) == 2e9 * (5_120 + 231 + 300) / (0.7 * 64e9)
    lines = printed().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| 1B pictures"))
    assert lines[start + 2].startswith("| cores | 15 |")
    assert next(line for line in lines[start:] if "HNSW" in line).split("|")[2].strip().startswith("253,")
