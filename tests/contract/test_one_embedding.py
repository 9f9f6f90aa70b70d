"""The same bytes have the same embedding on every route and thread and in every batch, equal to the recorded one."""

import base64
import io
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from service import FloatArray
from service.jobs.embed import embed_source
from service.jobs.parquet_parts import open_embeddings
from service.settings import Settings
from service.sources import open_source
from tests.conftest import MODEL, encoded, scene
from tests.service.conftest import Served, served

__all__ = ["served"]

GOLDEN = Path(__file__).parent / "golden.json"
# The cosine to the recorded vectors allows for other versions of decoders and kernels, which round differently.
LEAST = 0.9999


def pictures() -> dict[str, bytes]:
    """Pictures of every kind that preprocessing treats differently."""
    turned = Image.Exif()
    turned[0x0112] = 6
    shades = np.linspace(0, 65535, 60 * 80).reshape(60, 80).astype(np.uint16)
    clear = scene(90, 70, seed=5).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((90, 70)))
    return {
        "large.jpg": encoded(scene(500, 375), "JPEG", quality=95),
        "small.jpg": encoded(scene(40, 30, seed=1), "JPEG", quality=90),
        "turned.jpg": encoded(scene(640, 200, seed=2), "JPEG", quality=90, exif=turned),
        "grey.jpg": encoded(scene(300, 300, seed=3).convert("L"), "JPEG"),
        "deep.png": encoded(Image.fromarray(shades)),
        "palette.gif": encoded(scene(80, 120, seed=4), "GIF"),
        "clear.webp": encoded(clear, "WEBP", lossless=True),
        "plain.bmp": encoded(scene(33, 57, seed=6), "BMP"),
        "glyph.png": encoded(scene(28, 28, seed=7)),
    }


def one(answer: Any) -> FloatArray:
    assert answer.status_code == 200, answer.text
    return np.asarray(answer.json()["embeddings"][0], np.float32)


@pytest.fixture
def client(served: Served) -> TestClient:
    return served(variant="fp32")


@pytest.fixture
def alone(client: TestClient) -> dict[str, FloatArray]:
    """Each picture's embedding, requested alone, without concurrent requests."""
    return {name: one(client.post("/embed", content=data)) for name, data in pictures().items()}


def test_they_are_what_they_were(alone: dict[str, FloatArray]) -> None:
    golden = {name: np.asarray(row, np.float32) for name, row in json.loads(GOLDEN.read_text()).items()}
    assert golden.keys() == alone.keys()
    assert {name: float(alone[name] @ row) > LEAST for name, row in golden.items()} == dict.fromkeys(golden, True)
    rows = np.stack(list(golden.values()))
    # The pictures' embeddings differ to begin with.
    assert (rows @ rows.T - np.eye(len(rows))).max() < 0.999


def test_every_route_gives_the_same(client: TestClient, alone: dict[str, FloatArray], tmp_path: Path) -> None:
    data = pictures()
    texts = [base64.b64encode(content).decode() for content in data.values()]
    files = [("file", (name, content, "image/png")) for name, content in data.items()]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        for name, content in data.items():
            packed.writestr(name, content)

    def stored(prefix: str = "") -> list[Any]:
        asked = {"k": 100, "include": ["embedding"], "image": texts[0]}
        hits = client.post("/search", json=asked).json()["hits"]
        found = {hit["id"]: hit["embedding"] for hit in hits}
        return [found[prefix + name] for name in data]

    ways = {
        "a form": client.post("/embed", files=files).json()["embeddings"],
        "JSON": client.post("/embed", json={"images": texts}).json()["embeddings"],
        "OpenAI's": [
            row["embedding"]
            for row in client.post("/v1/embeddings", json={"model": "mnist", "input": texts}).json()["data"]
        ],
        "NumPy": np.load(
            io.BytesIO(client.post("/embed", files=files, headers={"Accept": "application/x-npy"}).content)
        ),
    }
    for name, content in data.items():
        assert client.put(f"/images/put/{name}", content=content).status_code == 201
    ways["PUT"] = stored("put/")
    assert (
        client.post("/images", content=archive.getvalue(), headers={"Content-Type": "application/zip"}).status_code
        == 200
    )
    ways["a zip"] = stored()
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, content in data.items():
        (folder / name).write_bytes(content)
    embed_source(open_source(str(folder)), MODEL, tmp_path / "out", Settings(variant="fp32"))
    written = open_embeddings(str(tmp_path / "out"))
    assert written is not None
    by_id = dict(zip(written.ids, written.rows, strict=True))
    ways["lookalike embed"] = [by_id[name] for name in data]
    for way, rows in ways.items():
        for name, row in zip(data, rows, strict=True):
            assert np.abs(np.asarray(row, np.float32) - alone[name]).max() < 1e-5, (way, name)


def test_a_crowd_gives_the_same(client: TestClient, alone: dict[str, FloatArray]) -> None:
    asked = [(name, data) for name, data in pictures().items() for _ in range(20)]
    with client, ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda each: one(client.post("/embed", content=each[1])), asked))
    for (name, _), answer in zip(asked, answers, strict=True):
        assert np.abs(answer - alone[name]).max() < 1e-5, name
