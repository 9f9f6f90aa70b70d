"""The image that `bentoml containerize` makes of the bento."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT, encoded
from tests.deploy.containers import Container, ask, find_tool, volume
from tests.ports import free_port

pytestmark = [pytest.mark.proof, pytest.mark.timeout(900)]

_BENTOML = Path(sys.executable).with_name("bentoml")
_IMAGE = "localhost/lookalike-test-bento"
_PICTURE = encoded(Image.linear_gradient("L").convert("RGB"))


@pytest.fixture
def tool(tmp_path: Path) -> Iterator[str]:
    """Build a bento and its image, and return the tool that runs it; the image is removed at the end."""
    found = find_tool()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LOOKALIKE_", "BENTOML_"))}
    environment |= {"BENTOML_HOME": str(tmp_path), "BENTOML_DO_NOT_TRACK": "True"}
    containerize = ["containerize", "lookalike-search:test", "--backend", found, "-t", _IMAGE]
    try:
        for arguments in (["build", "--version", "test"], containerize):
            done = subprocess.run([_BENTOML, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        yield found
    finally:
        subprocess.run([found, "rmi", "-f", _IMAGE], capture_output=True, check=False)


@contextmanager
def serving(tool: str, store: str) -> Iterator[Container]:
    """Run the image with a volume for its store until the block ends."""
    port = free_port()
    one = Container(tool, f"lookalike-test-{port}", port)
    address = ("-p", f"127.0.0.1:{port}:{port}", "-e", f"BENTOML_PORT={port}")
    one.call("run", "-d", "--name", one.name, *address, "-v", f"{store}:/home/bentoml/store", _IMAGE)
    try:
        one.wait_until_ready()
        yield one
    finally:
        subprocess.run([tool, "rm", "-f", "-v", one.name], capture_output=True, check=False)


def test_the_image_of_a_bento_embeds_and_keeps_its_store(tool: str) -> None:
    card = json.loads((ROOT / ".lookalike" / "models" / "photos" / "card.json").read_text())
    with volume(tool) as store:
        with serving(tool, store) as one:
            status, answer = ask(f"{one.url}/embed", _PICTURE)
            told = json.loads(answer)
            assert (status, told["fingerprint"], len(told["embeddings"][0])) == (200, card["fingerprint"], 1280)
            assert ask(f"{one.url}/images/kept", _PICTURE, "PUT")[0] == 201
            assert one.execute("id", "-un").strip() == "bentoml"
            # Docker gives an empty volume the owner of the image's own folder.
            assert (
                one.call("run", "--rm", "--entrypoint", "stat", _IMAGE, "-c", "%U", "/home/bentoml/store").strip()
                == "bentoml"
            )
            assert one.stop() == 0
        with serving(tool, store) as one:
            assert json.loads(ask(f"{one.url}/info")[1])["count"] == 1
