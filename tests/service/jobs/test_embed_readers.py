"""What `lookalike embed` writes is read by pandas, Polars, DuckDB, Hugging Face's datasets, NumPy and our own store."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest

from service import FloatArray
from service.encoding.encoder import Encoder
from service.gallery import open_gallery
from service.jobs.embed import embed_source
from service.jobs.parquet_parts import META, open_embeddings, part_path
from service.jobs.transfer import import_items
from service.settings import Settings
from service.sources import open_source
from tests.conftest import MODEL, encoded, scene
from tests.service.jobs.test_embed import counts

N = 100


@pytest.fixture(scope="module", params=["float32", "float16"])
def out(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits[:100] in parts of 40, beside a list of a failure, as float32 and as float16."""
    out = tmp_path_factory.mktemp("read") / f"digits-{request.param}.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.jobs.embed._PART_ROWS", 40)
        embed_source(open_source(f"digits[:{N}]"), MODEL, out, Settings(variant="fp32"), request.param)
    (out / "_failures.jsonl").write_text('{"id": "one", "reason": "empty"}\n')
    return out


@pytest.fixture(scope="module")
def expected(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> FloatArray:
    out = tmp_path_factory.mktemp("expected") / "out"
    embed_source(open_source(f"digits[:{N}]"), MODEL, out, Settings(variant="fp32"))
    embeddings = open_embeddings(str(out))
    assert embeddings is not None
    return embeddings.rows


def check(ids: list[str], labels: list[str], rows: Any, widths: list[int], expected: FloatArray, out: Path) -> None:
    source = open_source(f"digits[:{N}]")
    assert ids == list(source.ids)
    assert labels == list(source.labels or [])
    assert widths == [8] * N
    matrix = np.stack([np.asarray(row, np.float32) for row in rows])
    np.testing.assert_allclose(matrix, expected, atol=1e-7 if "float32" in out.name else 5e-4)


def test_pandas(out: Path, expected: FloatArray) -> None:
    table = pandas.read_parquet(out)
    assert table["embedding"][0].dtype == ("float32" if "float32" in out.name else "float16")
    check(table["id"].tolist(), table["label"].tolist(), table["embedding"], table["width"].tolist(), expected, out)


def test_polars(out: Path, expected: FloatArray) -> None:
    polars = pytest.importorskip("polars")
    table = polars.read_parquet(out / "*.parquet")
    assert isinstance(table["embedding"].dtype, polars.Array)
    ids, labels, rows, widths = (table[name].to_list() for name in ("id", "label", "embedding", "width"))
    check(ids, labels, rows, widths, expected, out)
    lazy = polars.scan_parquet(out / "*.parquet").filter(polars.col("label") == "7").select(polars.len()).collect()
    assert lazy.item() == table["label"].to_list().count("7")


def test_duckdb(out: Path, expected: FloatArray) -> None:
    duckdb = pytest.importorskip("duckdb")
    query = f"select id, label, embedding, width from '{out}/*.parquet' order by id"
    ids, labels, rows, widths = (list(column) for column in zip(*duckdb.sql(query).fetchall(), strict=True))
    check(ids, labels, rows, widths, expected, out)
    found = duckdb.sql(
        f"with one as (select embedding::FLOAT[128] as vector from '{out}/*.parquet' where id = 'digits/00007') "
        f"select id from '{out}/*.parquet', one "
        "order by array_inner_product(embedding::FLOAT[128], vector) desc limit 1"
    ).fetchall()
    assert found == [("digits/00007",)]


def test_datasets(out: Path, expected: FloatArray, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset("parquet", data_files=f"{out}/*.parquet", split="train", cache_dir=str(tmp_path))
    check(found["id"][:], found["label"][:], found["embedding"][:], found["width"][:], expected, out)


def test_the_store(out: Path, expected: FloatArray, tmp_path: Path) -> None:
    gallery = open_gallery(Settings(store=tmp_path / "store", model=MODEL, device="cpu", variant="fp32"))
    assert counts(import_items(out, gallery)) == (N, 0, 0, 0)
    ids = [f"digits/{number:05}" for number in range(N)]
    rows = [gallery.store.embedding(id) for id in ids]
    labels = [gallery.get(id).metadata["label"] for id in ids]
    check(ids, labels, rows, [8] * N, expected, out)
    gallery.close()


def test_evaluate(out: Path, expected: FloatArray) -> None:
    embeddings = open_embeddings(str(out))
    assert embeddings is not None
    labels = [str(label) for label in embeddings.labels or ()]
    check(list(embeddings.ids), labels, embeddings.rows, [8] * N, expected, out)
    assert np.abs(np.linalg.norm(embeddings.rows, axis=1) - 1).max() < 1e-6


def test_the_fingerprint_is_in_the_schema(out: Path, encoder: Encoder) -> None:
    for number in range(3):
        facts = json.loads(pq.read_schema(part_path(out, number)).metadata[META])
        assert facts["fingerprint"] == encoder.card.fingerprint
        assert facts["last"] == (number == 2)


@pytest.fixture
def npy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve pictures with captions in the layout of clip-retrieval, in parts of five."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for number in range(12):
        (folder / f"{number:02}.png").write_bytes(encoded(scene(seed=number)))
        lines.append(json.dumps({"file_name": f"{number:02}.png", "caption": f"number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr("service.jobs.embed._PART_ROWS", 5)
    embed_source(open_source(str(folder)), MODEL, tmp_path / "npy", Settings(variant="fp32"), npy=True)
    return tmp_path / "npy"


def test_the_layout_of_clip_retrieval(npy: Path, encoder: Encoder) -> None:
    files = sorted(path.relative_to(npy).as_posix() for path in npy.rglob("*") if path.is_file())
    assert files == [
        "_failures.jsonl",
        *(f"img_emb/img_emb_{number}.npy" for number in range(3)),
        *(f"metadata/metadata_{number}.parquet" for number in range(3)),
    ]
    for number, count in enumerate((5, 5, 2)):
        rows = np.load(npy / "img_emb" / f"img_emb_{number}.npy")
        table = pandas.read_parquet(npy / "metadata" / f"metadata_{number}.parquet")
        assert (rows.shape, rows.dtype, len(table)) == ((count, encoder.dimension), np.float32, count)
        for place, row in enumerate(table.itertuples()):
            assert Path(row.image_path).read_bytes() == encoded(scene(seed=5 * number + place))
            assert row.caption == f"number {5 * number + place}"
    assert pandas.read_parquet(npy / "metadata")["id"].tolist() == [f"{number:02}.png" for number in range(12)]


# Runs in an environment that has clip-retrieval, which needs older versions of our packages.
_INDEX = """
import sys, faiss, numpy as np
from clip_retrieval.clip_index import clip_index
folder = sys.argv[1]
clip_index(folder, index_folder=folder + ".index", max_index_memory_usage="100MB", current_memory_available="1GB")
index = faiss.read_index(folder + ".index/image.index")
rows = np.concatenate([np.load(f"{folder}/img_emb/img_emb_{n}.npy") for n in range(3)]).astype("float32")
assert index.search(rows, 1)[1][:, 0].tolist() == list(range(12))
print("indexed", index.ntotal)
"""


def test_clip_retrieval_and_autofaiss_read_it(npy: Path) -> None:
    python = os.environ.get("LOOKALIKE_CLIP_RETRIEVAL")
    if python is None:
        pytest.skip("LOOKALIKE_CLIP_RETRIEVAL names no Python that has clip-retrieval")
    done = subprocess.run([python, "-c", _INDEX, str(npy)], capture_output=True, text=True, check=False)
    assert "indexed 12" in done.stdout, done.stderr
