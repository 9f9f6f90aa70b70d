"""Stores as Parquet: an export is imported unchanged, and so are embeddings made elsewhere."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.account import LEFT_OUT
from service.encoding.encoder import Encoder
from service.errors import InvalidOutput, InvalidSource, ItemNotFound, StoreMismatch
from service.gallery import Gallery, open_gallery
from service.jobs.embed import embed_source
from service.jobs.index import index_source
from service.jobs.parquet_parts import open_embeddings
from service.jobs.transfer import export_store, import_items
from service.queries import ItemQuery, VectorQuery
from service.settings import Settings
from service.sources import open_source
from tests.conftest import MODEL, encoded, scene
from tests.service.jobs.test_embed import counts


@pytest.fixture
def copy(tmp_path: Path) -> Gallery:
    return open_gallery(Settings(store=tmp_path / "copy", model=MODEL, device="cpu", variant="fp32"))


def test_a_store_comes_back_as_it_went(gallery: Gallery, copy: Gallery, tmp_path: Path) -> None:
    index_source(open_source("digits[:20]", Path("data")), gallery)
    gallery.add("é/photo", encoded(scene()), {"n": 1, "nested": {"ü": None}})
    gallery.remove("digits/00003")
    assert export_store(gallery, tmp_path / "out") == (20, [])
    assert counts(import_items(tmp_path / "out", copy)) == (20, 0, 0, 0)
    assert counts(import_items(tmp_path / "out", copy)) == (0, 0, 20, 0)
    assert copy.store.scan(99) == gallery.store.scan(99)
    for item in gallery.store.scan(99)[0]:
        assert copy.thumbnail(item.id) == gallery.thumbnail(item.id)
        assert copy.original(item.id) == gallery.original(item.id)
        ours, theirs = gallery.store.embedding(item.id), copy.store.embedding(item.id)
        assert ours is not None and theirs is not None
        assert np.allclose(ours, theirs, atol=1e-7)
    copy.close()
    # `evaluate` reads an export like the output of `embed`.
    embeddings = open_embeddings(str(tmp_path / "out"))
    assert embeddings is not None
    assert (len(embeddings), embeddings.fingerprint) == (20, gallery.card.fingerprint)
    with pytest.raises(InvalidOutput, match="is there and not empty"):
        export_store(gallery, tmp_path / "out")


def test_an_export_has_the_pictures_that_lie_in_files(gallery: Gallery, copy: Gallery, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.png").write_bytes(encoded(scene(seed=ord(name))))
    index_source(open_source(str(folder)), gallery)
    (folder / "a.png").unlink()
    count, bare = export_store(gallery, tmp_path / "out")
    assert (count, [one.id for one in bare]) == (2, ["a.png"])
    assert "cannot be read from" in bare[0].error
    import_items(tmp_path / "out", copy)
    assert copy.store.original("b.png") == (folder / "b.png").read_bytes()
    assert copy.store.original("a.png") is None
    copy.close()


def test_what_embed_wrote_is_taken_in_with_its_labels(copy: Gallery, tmp_path: Path) -> None:
    embed_source(
        open_source("digits[:20]", Path("data")), MODEL, tmp_path / "out", Settings(device="cpu", variant="fp32")
    )
    assert counts(import_items(tmp_path / "out", copy)) == (20, 0, 0, 0)
    assert copy.get("digits/00007").metadata == {"label": "7"}
    assert len(copy.find([ItemQuery("digits/00007")], 5)[0]) == 5
    with pytest.raises(ItemNotFound, match="came as an embedding, without a picture"):
        copy.thumbnail("digits/00007")
    # notice() compares pictures, and this store has none.
    assert copy.notice() is None
    copy.close()


def test_embeddings_of_elsewhere_are_made_unit_length_and_bad_rows_left_out(copy: Gallery, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(5, copy.encoder.dimension)).astype(np.float32)
    rows[2] = 0
    rows[3, 0] = np.nan
    table = pa.table({"id": ["a", "b", "zero", "nan", "bad\nid"], "embedding": [row.tolist() for row in rows]})
    pq.write_table(table, tmp_path / "made.parquet")
    assert counts(import_items(tmp_path / "made.parquet", copy)) == (2, 0, 0, 3)
    assert copy.find([VectorQuery(rows[0].tolist())], 1)[0][0].id == "a"
    assert copy.find([VectorQuery(rows[0].tolist())], 1)[0][0].score == pytest.approx(1)
    copy.close()


def test_rows_are_taken_one_by_one_and_counted_as_they_are(copy: Gallery, tmp_path: Path) -> None:
    rows = [row.tolist() for row in np.random.default_rng(0).normal(size=(4, copy.encoder.dimension))]
    embeddings = [*rows, None, rows[0], rows[0][:5], rows[3]]
    # pandas writes whole numbers beside a null as floats.
    for ids in ([1, 2, 3, 4, 5, None, 7, 2], [1.0, 2.0, 3.0, 4.0, 5.0, None, 7.0, 2.0]):
        pq.write_table(pa.table({"id": ids, "embedding": embeddings}), tmp_path / "made.parquet")
        account = import_items(tmp_path / "made.parquet", copy)
        assert [failure.id.removesuffix(".0") for failure in account.failures] == ["5", "made.parquet, row 5", "7"]
        assert account.failures[1].error == "id: expected text or a whole number, got null"
        listed = (tmp_path / "copy" / LEFT_OUT).read_text().splitlines()
        assert [json.loads(line)["id"].removesuffix(".0") for line in listed] == ["5", "made.parquet, row 5", "7"]
    # The second time three are there, and the id that comes twice replaces itself twice.
    assert counts(account) == (0, 2, 3, 3)
    assert sorted(item.id for item in copy.store.scan(9)[0]) == ["1", "2", "3", "4"]
    assert [hit.id for hit in copy.find([VectorQuery(rows[3])], 2)[0]] == ["2", "4"]
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(rows[:2])), copy.encoder.dimension)
    pq.write_table(pa.table({"id": ["same", "same"], "embedding": fixed}), tmp_path / "made.parquet")
    assert counts(import_items(tmp_path / "made.parquet", copy)) == (1, 1, 0, 0)
    bad = pa.table({"id": [True, False], "embedding": fixed})
    pq.write_table(bad, tmp_path / "made.parquet")
    assert counts(import_items(tmp_path / "made.parquet", copy)) == (0, 0, 0, 2)
    with pytest.raises(InvalidSource, match="expected a list of numbers in the column embedding"):
        pq.write_table(pa.table({"id": ["a"], "embedding": [1.0]}), tmp_path / "made.parquet")
        import_items(tmp_path / "made.parquet", copy)
    copy.close()


def test_an_item_that_is_imported_without_metadata_keeps_its_own(copy: Gallery, tmp_path: Path) -> None:
    vector = np.random.default_rng(0).normal(size=(2, copy.encoder.dimension))
    for row, label in enumerate(("first", "second")):
        table = pa.table({"id": ["a"], "embedding": [vector[row].tolist()], "label": [label]})
        pq.write_table(table, tmp_path / "made.parquet")
        import_items(tmp_path / "made.parquet", copy)
        copy.change_metadata("a", {"mine": 1})
    assert copy.get("a").metadata == {"label": "second", "mine": 1}
    copy.close()


def test_what_cannot_be_taken_in_is_said(copy: Gallery, tmp_path: Path, encoder: Encoder) -> None:
    def written(**columns: object) -> Path:
        pq.write_table(pa.table(columns), tmp_path / "file.parquet")
        return tmp_path / "file.parquet"

    with pytest.raises(InvalidSource, match=r"expected a \.parquet file or a folder of them"):
        import_items(tmp_path / "nowhere", copy)
    with pytest.raises(InvalidSource, match="expected the columns id and embedding, found id, vector"):
        import_items(written(id=["a"], vector=[[1.0]]), copy)
    with pytest.raises(InvalidSource, match="expected embeddings of 128 numbers"):
        import_items(written(id=["a"], embedding=[[1.0, 0.0]]), copy)
    (tmp_path / "file.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InvalidSource, match=r"file.parquet: "):
        import_items(tmp_path / "file.parquet", copy)
    meta = {b"lookalike": b'{"fingerprint": "0123456789abcdef"}'}
    table = pa.table({"id": ["a"], "embedding": [[1.0] * 128]}).replace_schema_metadata(meta)
    pq.write_table(table, tmp_path / "file.parquet")
    with pytest.raises(StoreMismatch, match="embeddings of the encoder 0123456789ab…, not of mnist"):
        import_items(tmp_path / "file.parquet", copy)
    assert copy.store.count() == 0
    copy.close()
