"""The service embeds and searches in a process where importing torch raises."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import MODEL, ROOT

PROGRAM = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "training"):
            raise ImportError(f"{name} was imported by the service")

sys.meta_path.insert(0, NoTorch())
try:
    import torch
except ImportError:
    pass
else:
    raise SystemExit("torch could be imported: this test proves nothing")

from starlette.testclient import TestClient
from service.app import Lookalike
from service.sources import open_source

data = open_source("digits").entry(7).data
with TestClient(Lookalike.to_asgi()) as client:
    assert client.get("/readyz").status_code == 200
    assert len(client.post("/embed", content=data).json()["embeddings"]) == 1
    assert client.put("/images/seven", content=data).status_code == 201
    assert client.post("/search", content=data).json()["hits"][0]["id"] == "seven"
assert not [name for name in sys.modules if name.split(".")[0] in ("torch", "torchvision", "training")]
print("embedded and searched")
"""


def test_the_service_needs_no_torch(tmp_path: Path) -> None:
    environment = {"LOOKALIKE_MODEL": str(MODEL), "LOOKALIKE_STORE": str(tmp_path / "store"), "PATH": "/usr/bin:/bin"}
    environment |= {"HOME": str(tmp_path), "BENTOML_DO_NOT_TRACK": "True"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "embedded and searched" in done.stdout
