"""An embedded source that changes: what is new or changed is embedded, what is gone leaves, the rest is not touched."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.account import Account
from service.encoding.encoder import Encoder
from service.errors import InvalidOutput, InvalidSource
from service.jobs import embed
from service.jobs.embed import embed_source
from service.jobs.parquet_parts import META, open_embeddings, part_path, read_facts
from service.settings import Settings
from service.sources import open_source
from tests.conftest import MODEL, encoded, scene
from tests.service.jobs.test_embed import counts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures in two folders, whose names are their labels."""
    for number in range(10):
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(scene(seed=number)))
    return tmp_path / "pictures"


@pytest.fixture
def out(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The ten, embedded into parts of four, four and two."""
    monkeypatch.setattr(embed, "_PART_ROWS", 4)
    assert counts(run(folder, tmp_path / "out")) == (10, 0, 0, 0)
    return tmp_path / "out"


def run(source: Path | str, out: Path, npy: bool = False) -> Account:
    return embed_source(open_source(str(source)), MODEL, out, Settings(variant="fp32"), npy=npy)


def written(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}


def rows(out: Path) -> pandas.DataFrame:
    """All rows in the order of their ids, as a table that `equals` compares."""
    table = pandas.read_parquet(out).sort_values("id", ignore_index=True)
    assert table["id"].is_unique
    table["embedding"] = [row.tobytes() for row in table["embedding"]]
    return table


def assert_like_a_first_run(folder: Path, out: Path) -> None:
    fresh = out.with_name("fresh")
    run(folder, fresh)
    pandas.testing.assert_frame_equal(rows(out), rows(fresh))
    shutil.rmtree(fresh)


def test_nothing_has_changed(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written(out)

    def read(path: Path) -> bytes:
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr(Path, "read_bytes", read)
    embedded = open_source(str(folder))
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(type(embedded), "entry", lambda *_: pytest.fail("a picture is read again"))
        assert counts(run(folder, out)) == (0, 0, 10, 0)
    assert written(out) == before


def test_new_changed_and_removed_pictures(folder: Path, out: Path) -> None:
    (folder / "a" / "0.png").write_bytes(encoded(scene(seed=100)))
    (folder / "b" / "9.png").unlink()
    (folder / "a" / "new.png").write_bytes(encoded(scene(seed=101)))
    done = run(folder, out)
    assert counts(done) == (1, 1, 8, 0)
    assert done.notes == [f"1 pictures that {folder} has no longer have left {out}"]
    assert_like_a_first_run(folder, out)
    assert counts(run(folder, out)) == (0, 0, 10, 0)


def test_a_change_of_bytes_alone_is_seen_by_the_time(folder: Path, out: Path) -> None:
    """A file of the same size has another time; a file of the same bytes is not embedded again."""
    one, other = folder / "a" / "0.png", folder / "a" / "2.png"
    status = one.stat()
    padded = encoded(scene(seed=102))
    padded += b"\0" * (status.st_size - len(padded))
    one.write_bytes(padded[: status.st_size] if len(padded) > status.st_size else padded)
    os.utime(other, ns=(1, 1_000_000_000))
    done = run(folder, out)
    assert done.known == 9
    assert done.replaced + done.bad == 1
    # The new time is written down, so the next run does not read the file.
    table = pandas.read_parquet(out)
    assert table.set_index("id")["modified"]["a/2.png"].timestamp() == 1


@pytest.mark.parametrize("how", ["moved", "copied", "with a slash", "absolute", "by a link"])
def test_a_folder_by_another_path_is_the_same_source(
    how: str, folder: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = written(out)
    name = str(folder)
    if how == "moved":
        name = str(folder.rename(tmp_path / "elsewhere"))
    elif how == "copied":
        # The copies have times of their own, and the same bytes.
        name = str(tmp_path / "elsewhere")
        shutil.copytree(folder, name, copy_function=shutil.copyfile)
    elif how == "with a slash":
        name += "/"
    elif how == "by a link":
        (tmp_path / "link").symlink_to(folder)
        name = str(tmp_path / "link")
    else:
        monkeypatch.chdir(tmp_path)
        name = "./pictures"
    assert counts(run(name, out)) == (0, 0, 10, 0)
    assert (written(out) == before) == (how != "copied")


def test_labels_follow_the_folders(folder: Path, out: Path) -> None:
    """With a picture beside the folders of a split, all labels are others."""
    (folder / "a").rename(folder / "train")
    (folder / "b").rename(folder / "val")
    with pytest.raises(InvalidOutput, match="another source"):
        run(folder, out)
    (folder / "train").rename(folder / "a")
    (folder / "val").rename(folder / "b")
    deeper = folder.with_name("deeper")
    deeper.mkdir()
    folder.rename(deeper / "x")
    deeper.rename(folder)
    with pytest.raises(InvalidOutput, match="another source"):
        run(folder, out)


def test_a_label_that_changes_is_written_without_embedding_again(tmp_path: Path) -> None:
    folder, out = tmp_path / "train", tmp_path / "out"
    for number in range(4):
        path = folder / "x" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(scene(seed=number)))
    run(folder, out)
    assert set(pandas.read_parquet(out)["label"]) == {"x"}
    # A second folder, which is hidden from none: x is the label still; a deeper one alone makes it a shared folder.
    for path in sorted((folder / "x").iterdir()):
        (folder / "x" / "y").mkdir(exist_ok=True)
        shutil.copy2(path, folder / "x" / "y" / path.name)
    done = run(folder, out)
    assert (done.added, done.known) == (4, 4)
    labels = pandas.read_parquet(out).set_index("id")["label"]
    assert labels["x/y/0.png"] == "y"
    assert labels["x/0.png"] is None or pandas.isna(labels["x/0.png"])


def test_a_picture_that_fails_now_leaves_and_is_tried_again(folder: Path, out: Path) -> None:
    good = (folder / "a" / "0.png").read_bytes()
    (folder / "a" / "0.png").write_bytes(b"no picture")
    assert counts(run(folder, out)) == (0, 0, 9, 1)
    assert len(pandas.read_parquet(out)) == 9
    before = written(out)
    assert counts(run(folder, out)) == (0, 0, 9, 1)
    assert written(out) == before
    (folder / "a" / "0.png").write_bytes(good)
    assert counts(run(folder, out)) == (1, 0, 9, 0)
    assert not (out / "_failures.jsonl").exists()
    assert_like_a_first_run(folder, out)


def test_less_than_half_of_the_pictures_is_another_source(folder: Path, out: Path) -> None:
    before = rows(out)
    for path in sorted(folder.rglob("*.png"))[:6]:
        path.unlink()
    with pytest.raises(InvalidOutput, match=r"another source: 4 of its 10 pictures are in .*; choose another --out"):
        run(folder, out)
    pandas.testing.assert_frame_equal(rows(out), before)


def test_an_update_that_is_stopped_is_not_a_finished_folder(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the removal of an old row and its new embedding nobody takes the folder for whole."""
    assert (read_facts(part_path(out, 2)) or {})["last"] is True
    (folder / "a" / "0.png").write_bytes(encoded(scene(seed=100)))
    with monkeypatch.context() as patch:
        patch.setattr(embed._Embedding, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(folder, out)
    assert len(pandas.read_parquet(out)) == 9
    with pytest.raises(InvalidSource, match="is not finished"):
        open_embeddings(str(out))
    assert counts(run(folder, out)) == (1, 0, 9, 0)
    assert_like_a_first_run(folder, out)


def test_parts_of_an_earlier_version_are_embedded_again(folder: Path, out: Path, encoder: Encoder) -> None:
    facts = {"source": str(folder), "fingerprint": encoder.card.fingerprint, "read": 4, "failures": [], "last": False}
    for number in range(3):
        table = pq.read_table(part_path(out, number)).select(["id", "label", "embedding", "digest"])
        pq.write_table(table.replace_schema_metadata({META: json.dumps(facts)}), part_path(out, number))
    assert counts(run(folder, out)) == (10, 0, 0, 0)
    assert_like_a_first_run(folder, out)


def test_columns_of_a_table_follow_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is written again, with another column and the same pictures, is not embedded again."""
    monkeypatch.setattr(embed, "_PART_ROWS", 4)
    path, out = tmp_path / "set.parquet", tmp_path / "out"
    pictures = [encoded(scene(seed=number)) for number in range(6)]
    pq.write_table(pa.table({"image": pictures, "year": range(6)}), path)
    run(path, out)
    pq.write_table(pa.table({"image": pictures, "year": range(10, 16), "mood": ["good"] * 6}), path)
    os.utime(path, ns=(1, 1_000_000_000))
    assert counts(run(path, out)) == (0, 0, 6, 0)
    table = pandas.read_parquet(out)
    assert table["year"].tolist() == [*range(10, 16)]
    assert table["mood"].tolist() == ["good"] * 6
    assert_like_a_first_run(path, out)


def test_members_of_an_archive(tmp_path: Path) -> None:
    """An archive that is written again is read, and only what has changed in it is embedded."""
    path, out = tmp_path / "set.tar", tmp_path / "out"

    def write(seeds: list[int], time: int) -> None:
        with tarfile.open(path, "w") as tar:
            for number, seed in enumerate(seeds):
                data = encoded(scene(seed=seed))
                member = tarfile.TarInfo(f"{number}.png")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        os.utime(path, ns=(1, time * 1_000_000_000))

    write([0, 1, 2, 3], 1)
    run(path, out)
    write([0, 1, 9, 3, 4], 2)
    assert counts(run(path, out)) == (1, 1, 3, 0)
    assert_like_a_first_run(path, out)


def test_a_folder_in_npy_is_kept_in_step_too(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "_PART_ROWS", 4)
    out = tmp_path / "npy"
    assert counts(run(folder, out, npy=True)) == (10, 0, 0, 0)
    (folder / "a" / "0.png").write_bytes(encoded(scene(seed=100)))
    (folder / "b" / "9.png").unlink()
    assert counts(run(folder, out, npy=True)) == (0, 1, 8, 0)
    moved = folder.rename(tmp_path / "moved")
    assert counts(run(moved, out, npy=True)) == (0, 0, 9, 0)
    metadata = pandas.read_parquet(out / "metadata")
    assert all(Path(path).is_file() for path in metadata["image_path"])
    # A kill between the two files of a part costs its rows, and nothing else.
    shutil.copy(out / "img_emb" / "img_emb_2.npy", out / "img_emb" / "img_emb_1.npy")
    done = run(moved, out, npy=True)
    assert done.added + done.known == 9
    assert done.added == 4
    assert pandas.read_parquet(out / "metadata")["id"].is_unique
