"""What a source tells of its pictures stands beside their embeddings."""

import json
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet as pq

from service.jobs.description import Description
from service.jobs.embed import embed_source
from service.settings import Settings
from service.sources import open_source
from tests.conftest import MODEL, encoded, scene
from tests.service.sources.test_captions import tar_of


def images(*numbers: int) -> list[bytes]:
    return [encoded(scene(seed=number)) for number in numbers]


def described(source: Path | str, **options: Any) -> tuple[dict[str, list[Any]], list[str]]:
    opened = open_source(str(source))
    description = Description(opened, ["embedding", "width"], **options)
    table = description.all(range(len(opened)))
    assert table.schema == description.schema
    return table.to_pydict(), description.notes


def test_columns_of_a_table_are_kept(tmp_path: Path) -> None:
    columns = {
        "image": images(0, 1, 2),
        "label": [3, None, 4],
        "width": [640, 641, 642],
        "tags": [["a"], [], None],
        "box": [{"x": 1.5}, {"x": 2.5}, None],
        "mask": [b"1", b"2", b"3"],
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=2)
    found, notes = described(tmp_path / "x.parquet")
    assert found == {
        "id": ["x/00000000", "x/00000001", "x/00000002"],
        "label": ["3", None, "4"],
        # Our own column has this name.
        "source_width": [640, 641, 642],
        "tags": [["a"], [], None],
        "box": [{"x": 1.5}, {"x": 2.5}, None],
    }
    assert notes == [f"{tmp_path / 'x.parquet'}: not kept beside the embeddings, bytes or of several types: mask"]
    part, _ = described(f"{tmp_path / 'x.parquet'}[1:]")
    assert part["source_width"] == [641, 642]


def test_tables_whose_columns_differ(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": images(0), "year": [1], "kind": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": images(1), "place": ["x"], "kind": [7]}), tmp_path / "b.parquet")
    found, notes = described(tmp_path)
    assert found["year"] == [1, None]
    assert found["place"] == [None, "x"]
    assert "kind" not in found
    assert notes[0].endswith("of several types: kind")


def test_webdataset_has_keys_captions_and_facts(tmp_path: Path) -> None:
    picture = encoded(scene(), "JPEG")
    tar_of(tmp_path / "s-0.tar", {"000.jpg": picture, "000.txt": b" a cat \n", "000.json": b'{"a": 1}'})
    tar_of(tmp_path / "s-1.tar", {"d/001.jpg": picture, "002.jpg": picture, "002.json": b"x" * 100_001})
    found, _ = described(tmp_path / "s-{0..1}.tar")
    assert found == {
        "id": ["s-0/000.jpg", "s-1/d/001.jpg", "s-1/002.jpg"],
        "label": found["label"],
        "key": ["000", "001", "002"],
        "caption": ["a cat", None, None],
        "json": ['{"a": 1}', None, None],
    }
    assert described(f"{tmp_path / 's-{0..1}.tar'}[1:]")[0]["key"] == ["001", "002"]
    tar_of(tmp_path / "plain.tar", {"a/1.jpg": picture, "b/2.jpg": picture})
    assert list(described(tmp_path / "plain.tar")[0]) == ["id", "label"]


def test_captions_beside_a_folder(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(encoded(scene(seed=number)))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "caption": ["a", "b"]}))
    assert described(tmp_path)[0]["caption"] == [None, "a\nb"]
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "9.png", "caption": "a"}))
    found, notes = described(tmp_path)
    assert "caption" not in found
    assert "no row is of a picture of this source" in notes[0]


def test_paths_for_clip_retrieval(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(encoded(scene()))
    assert described(tmp_path, npy=True)[0]["image_path"] == [str(tmp_path / "1.png")]
    assert described("digits[:1]", npy=True)[0]["image_path"] == ["digits/00000"]


def test_they_stand_beside_the_embeddings(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": images(0, 1), "year": [2025, 2026]}), tmp_path / "x.parquet")
    done = embed_source(open_source(str(tmp_path / "x.parquet")), MODEL, tmp_path / "out", Settings(variant="fp32"))
    assert done.notes == []
    table = pandas.read_parquet(tmp_path / "out")
    assert table["year"].tolist() == [2025, 2026]
    assert table["width"].tolist() == [64, 64]
