"""Schemathesis against the real service: it derives valid and invalid requests, single and chained, from our OpenAPI
document and checks every answer against the document."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.colours import RGB, picture, write_colours
from tests.conftest import MODEL, ROOT
from tests.serving import serving

KEY = "0123456789abcdef"
EXAMPLES = os.environ.get("LOOKALIKE_EXAMPLES", "30")
SEEDS = range(1, 1 + int(os.environ.get("LOOKALIKE_SEEDS", "1")))


@pytest.mark.proof
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("reads", "routes"), [("pictures", 23), ("pictures and texts", 24)])
def test_the_service_answers_as_its_document_says(reads: str, routes: int, seed: int, tmp_path: Path) -> None:
    encoder, source = MODEL, "digits[:20]"
    if reads == "pictures and texts":
        encoder, source = write_colours(tmp_path / "colours"), str(tmp_path / "pictures")
        (tmp_path / "pictures").mkdir()
        for name in RGB:
            (tmp_path / "pictures" / f"{name}.png").write_bytes(picture(name))
    with serving(tmp_path, source, encoder, api_keys=f"write:{KEY}") as url:
        command = [
            str(Path(sys.executable).with_name("schemathesis")),
            *("--config-file", str(ROOT / "tests" / "proofs" / "schemathesis.toml")),
            *("run", f"{url}/openapi.json", "--header", f"Authorization: Bearer {KEY}"),
            # Ids are text without control characters, which few generated texts are.
            *("--suppress-health-check", "filter_too_much"),
            # An item may be called "count" or "moves", so these addresses take the methods of items, too.
            *("--exclude-checks", "allow_header_conformance"),
            *("--checks", "all", "--max-examples", EXAMPLES, "--seed", str(seed)),
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-20000:]
    assert f"Selected: {routes}/{routes}" in done.stdout, done.stdout[-3000:]
