"""Stores as Parquet: an export is imported unchanged, and so are embeddings made elsewhere."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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


@pytest.fixture
def copy(tmp_path: Path) -> Gallery:
    return open_gallery(Settings(store=tmp_path / "copy", model=MODEL, device="cpu", variant="fp32"))


def test_a_store_comes_back_as_it_went(gallery: Gallery, copy: Gallery, tmp_path: Path) -> None:
    index_source(open_source("digits[:20]", Path("data")), gallery)
    gallery.add("é/photo", encoded(scene()), {"n": 1, "nested": {"ü": None}})
    gallery.remove("digits/00003")
    assert export_store(gallery, tmp_path / "out") == 20
    assert import_items(tmp_path / "out", copy) == (20, 0, 0)
    assert import_items(tmp_path / "out", copy) == (0, 20, 0)
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


def test_what_embed_wrote_is_taken_in_with_its_labels(copy: Gallery, tmp_path: Path) -> None:
    embed_source(
        open_source("digits[:20]", Path("data")), MODEL, tmp_path / "out", Settings(device="cpu", variant="fp32")
    )
    assert import_items(tmp_path / "out", copy) == (20, 0, 0)
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
    assert import_items(tmp_path / "made.parquet", copy) == (2, 0, 3)
    assert copy.find([VectorQuery(rows[0].tolist())], 1)[0][0].id == "a"
    assert copy.find([VectorQuery(rows[0].tolist())], 1)[0][0].score == pytest.approx(1)
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
