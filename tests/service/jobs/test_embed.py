"""`lookalike embed`: a source into Parquet."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pandas
import pytest
from onnx import TensorProto
from PIL import Image

from service import FloatArray, PixelArray
from service.account import Account
from service.encoding.batcher import Batcher
from service.encoding.encoder import Encoder
from service.errors import InvalidOutput
from service.gallery import open_gallery
from service.jobs.embed import embed_source
from service.jobs.index import index_source
from service.settings import Settings
from service.sources import open_source
from tests.conftest import MODEL, encoded, scene
from tests.service.encoding.test_encoder import SIDE, flat_graph


def counts(account: Account) -> tuple[int, int, int, int]:
    """Return the pictures added, replaced, there already, and bad."""
    return account.added, account.replaced, account.known, account.bad


def test_embeddings_read_as_one_table(tmp_path: Path, encoder: Encoder) -> None:
    source = open_source("digits[:100]")
    out = tmp_path / "digits.parquet"
    assert counts(embed_source(source, MODEL, out, Settings())) == (100, 0, 0, 0)
    table = pandas.read_parquet(out)
    assert list(table.columns) == ["id", "label", "embedding", "digest"]
    assert table["digest"][99] == hashlib.sha256(source.entry(99).data).hexdigest()
    assert table["id"].tolist() == list(source.ids)
    assert table["label"].tolist() == list(source.labels or [])
    matrix = np.stack(table["embedding"].tolist())
    assert matrix.shape == (100, encoder.dimension)
    assert matrix.dtype == np.float32
    assert np.allclose(np.linalg.norm(matrix, axis=1), 1, atol=1e-5)
    assert [path.name for path in out.iterdir()] == ["part-00000.parquet"]


def test_bad_pictures_are_listed_and_the_others_are_embedded(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(5):
        (folder / f"{n}.png").write_bytes(encoded(scene(seed=n)))
    (folder / "2.png").write_bytes(b"no picture")
    (folder / "3.png").write_bytes(encoded(scene(), "JPEG")[:-200])
    out = tmp_path / "out.parquet"
    assert counts(embed_source(open_source(str(folder)), MODEL, out, Settings())) == (3, 0, 0, 2)
    table = pandas.read_parquet(out)
    assert table["id"].tolist() == ["0.png", "1.png", "4.png"]
    assert table["label"].isna().all()
    failures = [json.loads(line) for line in (out / "_failures.jsonl").read_text().splitlines()]
    assert [failure["id"] for failure in failures] == ["2.png", "3.png"]
    assert "not a picture" in failures[0]["error"]
    assert [failure["reason"] for failure in failures] == ["not a picture that we take", "damaged or unreadable"]
    # Run again, it has the same account.
    again = embed_source(open_source(str(folder)), MODEL, out, Settings())
    assert counts(again) == (0, 0, 3, 2)
    assert again.facts()["left_out"] == {"not a picture that we take": 1, "damaged or unreadable": 1}


def test_what_the_source_left_out_is_listed_too(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "1.png").write_bytes(encoded(scene()))
    (folder / "2.jxl").write_bytes(b"\xff\x0a")
    account = embed_source(open_source(str(folder)), MODEL, tmp_path / "out", Settings())
    assert (counts(account), account.lost) == ((1, 0, 0, 0), 1)
    (row,) = (tmp_path / "out" / "_failures.jsonl").read_text().splitlines()
    assert json.loads(row)["id"] == "2.jxl"


def test_a_name_that_is_not_utf8_is_one_failure(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "good.png").write_bytes(encoded(scene()))
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(encoded(scene(seed=1)))
    account = embed_source(open_source(str(folder)), MODEL, tmp_path / "out", Settings())
    assert (account.added, account.lost) == (1, 1)
    assert pandas.read_parquet(tmp_path / "out")["id"].tolist() == ["good.png"]
    failure = json.loads((tmp_path / "out" / "_failures.jsonl").read_text())
    assert failure["id"] == "caf\\xe9.png"
    assert "UTF-8" in failure["error"] + failure["reason"]


def blind_model(folder: Path) -> Path:
    """Write an encoder that gives a black picture no embedding: its output is its input."""
    folder.mkdir()
    (folder / "model.onnx").write_bytes(flat_graph(TensorProto.UINT8, "pixels", ("embedding",)))
    config = {"size": {"width": SIDE, "height": SIDE}, "do_rescale": False, "do_normalize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def test_a_picture_without_an_embedding_is_a_bad_one_and_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.png").write_bytes(encoded(scene(seed=n)))
    (folder / "1.png").write_bytes(encoded(Image.new("RGB", (8, 8))))
    model = blind_model(tmp_path / "blind")
    submitted: list[PixelArray] = []
    submit = Batcher.submit

    def count(batcher: Batcher[PixelArray], pixels: PixelArray, future: "Future[FloatArray]") -> None:
        submitted.append(pixels)
        submit(batcher, pixels, future)

    monkeypatch.setattr(Batcher, "submit", count)
    source = open_source(str(folder))
    out = tmp_path / "out.parquet"
    assert counts(embed_source(source, model, out, Settings())) == (2, 0, 0, 1)
    # The batcher alone assigns the error to its picture, so no picture is submitted twice.
    assert len(submitted) == 3
    assert pandas.read_parquet(out)["id"].tolist() == ["0.png", "2.png"]
    assert json.loads((out / "_failures.jsonl").read_text())["id"] == "1.png"
    gallery = open_gallery(Settings(model=model, store=tmp_path / "store"))
    assert counts(index_source(source, gallery)) == (2, 0, 0, 1)
    assert [item.id for item in gallery.store.scan(10)[0]] == ["0.png", "2.png"]
    gallery.close()


def test_a_finished_job_is_not_done_again(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    source = open_source("digits[:50]")
    embed_source(source, MODEL, out, Settings())
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert counts(embed_source(source, MODEL, out, Settings())) == (0, 0, 50, 0)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")} == before


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    source = open_source("digits[:10]")
    embed_source(source, MODEL, tmp_path / "a.parquet", Settings())
    with pytest.raises(InvalidOutput, match="another source or encoder"):
        embed_source(open_source("digits[:11]"), MODEL, tmp_path / "a.parquet", Settings())
    (tmp_path / "file.parquet").write_bytes(b"mine")
    with pytest.raises(InvalidOutput, match="is a file"):
        embed_source(source, MODEL, tmp_path / "file.parquet", Settings())
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "a.jpg").write_bytes(b"mine")
    with pytest.raises(InvalidOutput, match="not empty and not ours"):
        embed_source(source, MODEL, tmp_path / "holiday", Settings())
    assert (tmp_path / "holiday" / "a.jpg").read_bytes() == b"mine"


def test_a_killed_job_goes_on_where_it_was(tmp_path: Path, data_root: Path) -> None:
    out = tmp_path / "out.parquet"
    lookalike = Path(sys.executable).with_name("lookalike")
    command: list[str | Path] = [
        lookalike,
        "embed",
        "mnist/train[:20000]",
        "--model",
        MODEL,
        "--out",
        out,
        "--data-root",
        data_root,
    ]
    job = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while not (out / "part-00000.parquet").exists():
        assert job.poll() is None
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert len(list(out.glob("part-*.parquet"))) < 3
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "8192 earlier" in again.stderr or "16384 earlier" in again.stderr
    table = pandas.read_parquet(out)
    assert table["id"].tolist() == [f"mnist/train/{n:05d}" for n in range(20_000)]
