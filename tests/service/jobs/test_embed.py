"""`lookalike embed`: a source into Parquet."""

import hashlib
import json
import os
import re
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
from service.errors import InvalidOutput, InvalidSource, Outcome, OutOfMemory
from service.gallery import open_gallery
from service.jobs import embed
from service.jobs.embed import embed_source
from service.jobs.index import index_source
from service.jobs.parquet_parts import open_embeddings
from service.jobs.part_folder import PartFolder
from service.settings import Settings
from service.sources import open_source
from tests.conftest import MODEL, ROOT, encoded, scene
from tests.service.encoding.test_encoder import SIDE, flat_graph


def counts(account: Account) -> tuple[int, int, int, int]:
    """Return the pictures added, replaced, there already, and bad."""
    return account.added, account.replaced, account.known, account.bad


def test_embeddings_read_as_one_table(tmp_path: Path, encoder: Encoder) -> None:
    source = open_source("digits[:100]")
    out = tmp_path / "digits.parquet"
    assert counts(embed_source(source, MODEL, out, Settings())) == (100, 0, 0, 0)
    table = pandas.read_parquet(out)
    assert list(table.columns) == ["id", "label", "embedding", "width", "height", "digest", "size_bytes", "modified"]
    assert (table["width"] == 8).all()
    assert (table["height"] == 8).all()
    assert table["size_bytes"][99] == len(source.entry(99).data)
    # Pictures that are made in memory have no file.
    assert table["modified"].isna().all()
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
    with pytest.raises(InvalidOutput, match=r"another source: 4 of its 10 pictures are in digits\[6:\]; choose"):
        embed_source(open_source("digits[6:]"), MODEL, tmp_path / "a.parquet", Settings())
    with pytest.raises(InvalidOutput, match="embeddings of another encoder; choose"):
        embed_source(source, ROOT / "models" / "digits", tmp_path / "a.parquet", Settings())
    with pytest.raises(InvalidOutput, match=r"expected embeddings of .*halffloat.*, found .*float.*; choose"):
        embed_source(source, MODEL, tmp_path / "a.parquet", Settings(), "float16")
    with pytest.raises(InvalidOutput, match=r"not ours \(it has part-00000.parquet\)"):
        embed_source(source, MODEL, tmp_path / "a.parquet", Settings(), npy=True)
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


def read_rows(out: Path) -> pandas.DataFrame:
    table = pandas.read_parquet(out)
    table["embedding"] = [row.tobytes() for row in table["embedding"]]
    return table


def test_a_part_is_closed_when_it_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of 64 pictures is the least that a part holds."""
    monkeypatch.setattr(embed, "_PART_S", 0)
    embed_source(open_source("digits[:200]"), MODEL, tmp_path / "out", Settings())
    parts = sorted((tmp_path / "out").glob("part-*"))
    assert [len(pandas.read_parquet(part)) for part in parts] == [64, 64, 64, 8]
    assert pandas.read_parquet(tmp_path / "out")["id"].tolist() == [f"digits/{n:05d}" for n in range(200)]


def test_rows_do_not_depend_on_the_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(150):
        data = encoded(scene(seed=number), ("PNG", "JPEG", "WEBP")[number % 3])
        (folder / f"{number}.png").write_bytes(b"no picture" if number % 50 == 7 else data)
    tables = []
    for threads in (1, 2, 7):
        monkeypatch.setattr("service.jobs.reading.cores", lambda threads=threads: threads)
        out = tmp_path / str(threads)
        assert counts(embed_source(open_source(str(folder)), MODEL, out, Settings(variant="fp32"))) == (147, 0, 0, 3)
        tables.append(read_rows(out))
    for table in tables[1:]:
        pandas.testing.assert_frame_equal(table, tables[0])


def test_one_job_writes_a_folder(tmp_path: Path) -> None:
    source = open_source("digits[:10]")
    with PartFolder(tmp_path / "out"), pytest.raises(InvalidOutput, match="another `lookalike embed` writes it"):
        embed_source(source, MODEL, tmp_path / "out", Settings())
    assert counts(embed_source(source, MODEL, tmp_path / "out", Settings())) == (10, 0, 0, 0)


def test_a_part_that_is_missing_or_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "_PART_ROWS", 4)
    source, out = open_source("digits[:10]"), tmp_path / "out"
    embed_source(source, MODEL, out, Settings())
    kept = (out / "part-00001.parquet").read_bytes()
    (out / "part-00001.parquet").unlink()
    with pytest.raises(InvalidOutput, match=r"part-00001.parquet is missing among 2 parts"):
        embed_source(source, MODEL, out, Settings())
    (out / "part-00001.parquet").write_bytes(kept[:-9])
    with pytest.raises(InvalidOutput, match=r"part-00001.parquet: not a part that we wrote"):
        embed_source(source, MODEL, out, Settings())


def test_what_was_embedded_before_an_error_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder fails at the third chunk; the two before it are kept, and the job goes on from there."""
    encode = Batcher.embed
    calls: list[int] = []

    def fail(batcher: Batcher[PixelArray], pixels: list[PixelArray]) -> list[Outcome[FloatArray]]:
        calls.append(len(pixels))
        return encode(batcher, pixels) if len(calls) < 3 else [OutOfMemory("the GPU is full")] * len(pixels)

    source, out = open_source("digits[:200]"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Batcher, "embed", fail)
        with pytest.raises(OutOfMemory, match="full"):
            embed_source(source, MODEL, out, Settings(variant="fp32"))
    assert len(pandas.read_parquet(out)) == 128
    with pytest.raises(InvalidSource, match="is not finished"):
        open_embeddings(str(out))
    assert counts(embed_source(source, MODEL, out, Settings(variant="fp32"))) == (72, 0, 128, 0)
    embed_source(source, MODEL, tmp_path / "fresh", Settings(variant="fp32"))
    pandas.testing.assert_frame_equal(read_rows(out), read_rows(tmp_path / "fresh"))


def test_ctrl_c_keeps_what_is_embedded(tmp_path: Path, data_root: Path) -> None:
    out = tmp_path / "out.parquet"
    command: list[str | Path] = [Path(sys.executable).with_name("lookalike"), "embed", "mnist/train[:6000]"]
    command += ["--model", MODEL, "--out", out, "--data-root", data_root]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    assert job.stderr is not None
    shown = b""
    # The bar tells how far the job is.
    while not re.search(rb" [1-9]\d{2,}/6000", shown):
        shown += os.read(job.stderr.fileno(), 1000)
        assert job.poll() is None
    job.send_signal(signal.SIGINT)
    _, said = job.communicate()
    assert job.returncode == 130
    assert b"stopped; what is embedded is written, and the same command goes on from there" in said
    assert b"Traceback" not in said
    kept = len(pandas.read_parquet(out))
    assert 64 <= kept < 6000
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=True)
    assert f"{6000 - kept} pictures embedded now, {kept} earlier" in again.stderr
    assert pandas.read_parquet(out)["id"].tolist() == [f"mnist/train/{n:05d}" for n in range(6000)]


@pytest.mark.slow("starts the command again and again")
def test_a_list_of_paths_on_stdin(tmp_path: Path) -> None:
    folder, lookalike = tmp_path / "photos", Path(sys.executable).with_name("lookalike")
    folder.mkdir()
    for number, name in enumerate(("a b.png", "c\nd.png", "-e.png")):
        (folder / name).write_bytes(encoded(scene(seed=number)))
    command: list[str | Path] = [lookalike, "embed", "-", "--model", MODEL, "--out", tmp_path / "out"]
    found = subprocess.run(["find", "photos", "-print0"], cwd=tmp_path, capture_output=True, check=True).stdout
    done = subprocess.run([*command, "-0"], cwd=tmp_path, input=found, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    ids = ["photos/-e.png", "photos/a b.png", "photos/c\nd.png"]
    assert pandas.read_parquet(tmp_path / "out")["id"].tolist() == ids
    # The same list by lines has two paths that lead nowhere.
    lines = found.replace(b"\0", b"\n")
    done = subprocess.run(command, cwd=tmp_path, input=lines, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"2 could not be read" in done.stderr
    done = subprocess.run(command, cwd=tmp_path, input=found, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        b"lookalike: -: the list has NUL characters; expected a path a line, or the option -0\n",
    )
    done = subprocess.run([lookalike, "embed", "-0", "photos", "--out", "x"], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        b"lookalike: -0: is for a list of paths on stdin; expected the source -, got photos\n",
    )


def test_width_and_height_are_those_of_the_file(tmp_path: Path) -> None:
    """A JPEG is decoded at a fraction of its size, and a TIFF in another process."""
    for format in ("JPEG", "TIFF", "WEBP"):
        (tmp_path / f"{format}.png").write_bytes(encoded(scene(640, 480), format))
    embed_source(open_source(str(tmp_path)), MODEL, tmp_path / "out", Settings(variant="fp32"))
    table = pandas.read_parquet(tmp_path / "out")
    assert table[["width", "height"]].to_numpy().tolist() == [[640, 480]] * 3
