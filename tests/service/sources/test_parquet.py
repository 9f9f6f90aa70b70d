"""Parquet files with the bytes of pictures, as on the Hugging Face Hub."""

import json
import re
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.errors import InvalidSource, UndecodablePicture
from service.jobs.embed import embed_source
from service.settings import Settings
from service.sources import open_source
from service.sources.parquet import RowGroups
from tests.conftest import MODEL, ROOT
from tests.service.sources.test_files import read_all

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def images(numbers: Sequence[int], path: str | None = "{:03}.jpg") -> Any:
    """The `image` column of pictures whose bytes are only their number."""
    rows = [{"bytes": b"picture %d" % n, "path": path and path.format(n)} for n in numbers]
    return pa.array(rows, STRUCT)


def write(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None, rows: int = 1000) -> Path:
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path


def classes(*names: str) -> dict[str, Any]:
    return {"names": list(names), "_type": "ClassLabel"}


def test_a_set_in_hugging_faces_layout(tmp_path: Path) -> None:
    features = {"image": {"_type": "Image"}, "label": classes("cat", "dog")}
    for shard, numbers in enumerate((range(5), range(5, 9))):
        columns = {"image": images(numbers), "label": [n % 2 for n in numbers]}
        write(tmp_path / "data" / f"train-{shard:05}-of-00002.parquet", columns, features, rows=2)
    (tmp_path / "README.md").write_text("a card")
    expected = [(f"{n:03}.jpg", b"picture %d" % n, ("cat", "dog")[n % 2]) for n in range(9)]
    source = open_source(str(tmp_path))
    assert read_all(source) == expected
    assert source.blocks == [0, 2, 4, 5, 7]
    assert read_all(open_source(f"{tmp_path}/data/train-{{00000..00001}}-of-00002.parquet")) == expected
    part = open_source(f"{tmp_path}/data[3:8]")
    assert read_all(part) == expected[3:8]
    assert part.blocks == [0, 1, 2, 4]
    assert read_all(open_source(f"{tmp_path}/data/train-00001-of-00002.parquet")) == expected[5:]


@pytest.mark.parametrize("path", [None, "same.jpg", ""])
def test_rows_are_numbered_where_their_paths_do_not_tell_them_apart(tmp_path: Path, path: str | None) -> None:
    for part in ("test", "train"):
        write(tmp_path / part / "0.parquet", {"image": images(range(2), path)})
    ids = [f"{part}/0/{row:08}" for part in ("test", "train") for row in (0, 1)]
    assert list(open_source(str(tmp_path)).ids) == ids
    assert list(open_source(f"{tmp_path}/test/0.parquet").ids) == ["0/00000000", "0/00000001"]


def test_one_path_in_two_files_numbers_both(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": images([1, 2])})
    write(tmp_path / "b.parquet", {"image": images([2, 3])})
    assert list(open_source(str(tmp_path)).ids) == ["a/00000000", "a/00000001", "b/00000000", "b/00000001"]
    assert list(open_source(str(tmp_path / "b.parquet")).ids) == ["002.jpg", "003.jpg"]


@pytest.mark.parametrize(
    ("columns", "features", "labels"),
    [
        ({"label": ["b", "a", "b"]}, None, ["b", "a", "b"]),
        ({"label": [7, 2, 7]}, None, ["7", "2", "7"]),
        ({"label": pa.array(["b", "a", "b"]).dictionary_encode()}, None, ["b", "a", "b"]),
        ({"label": [1, 0, 1]}, {"label": classes("cat", "dog")}, ["dog", "cat", "dog"]),
        ({"label": [1, 0, 1]}, {"label": {"_type": "Value"}}, ["1", "0", "1"]),
        ({"labels": [1, 0, 1]}, {"labels": classes("cat", "dog")}, ["dog", "cat", "dog"]),
        ({"label": ["x", "y", "z"], "kind": [0, 0, 0]}, {"kind": classes("cat")}, ["x", "y", "z"]),
        ({"fine": [0, 1, 0], "coarse": [0, 0, 0]}, {"fine": classes("a", "b"), "coarse": classes("c")}, None),
        ({"labels": [1, 0, 1]}, None, None),
        ({"label": [1, None, 1]}, None, ["1", None, "1"]),
        ({"label": ["a", None, ""]}, None, ["a", None, None]),
        ({"label": pa.array([None, "a", None]).dictionary_encode()}, None, [None, "a", None]),
        ({"label": ["Mu\u0308ller", "Müller", "x"]}, None, ["Müller", "Müller", "x"]),
        ({"label": [1, -1, 1]}, {"label": classes("cat", "dog")}, ["dog", None, "dog"]),
        ({"label": [1, 2, 0]}, {"label": classes("cat", "dog")}, ["dog", None, "cat"]),
        ({"label": [-1, -1, -1]}, {"label": classes("cat", "dog")}, None),
        ({"label": pa.array([None] * 3, pa.string())}, None, None),
        ({"label": [1, -1, 1]}, None, ["1", "-1", "1"]),
        ({"label": [0.5, 1.0, 2.0]}, None, None),
        ({"label": [[1], [2], [3]]}, None, None),
        ({}, {"label": classes("cat")}, None),
    ],
)
def test_labels(
    tmp_path: Path, columns: dict[str, Any], features: dict[str, Any] | None, labels: list[str | None] | None
) -> None:
    source = open_source(str(write(tmp_path / "a.parquet", {"image": images(range(3)), **columns}, features)))
    assert source.labels == labels if labels else source.labels is None


@pytest.mark.parametrize("column", [[0.0, 1.0, 2.0], [[1], [2], [3]], [True, False, True]])
def test_a_column_that_cannot_be_a_label_is_named(tmp_path: Path, column: list[Any]) -> None:
    source = open_source(str(write(tmp_path / "a.parquet", {"image": images(range(3)), "label": column})))
    assert source.labels is None
    assert len(source.notes) == 1
    assert re.fullmatch(r"the column label \(.+\) is not taken for labels: .*", source.notes[0])


def test_ids_are_composed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": pa.array([{"bytes": b"a", "path": "Cafe\u0301.jpg"}], STRUCT)})
    assert list(open_source(str(path)).ids) == ["Café.jpg"]
    twins = [{"bytes": b"a", "path": path} for path in ("Cafe\u0301.jpg", "Café.jpg")]
    write(path, {"image": pa.array(twins, STRUCT)})
    assert list(open_source(str(path)).ids) == ["a/00000000", "a/00000001"]


def test_metadata_that_is_not_as_it_should_be_is_passed_over(tmp_path: Path) -> None:
    for metadata in (
        b"no json",
        b"[]",
        b'{"info": {"features": [1]}}',
        b'{"info": {"features": {"label": {"_type": 3}}}}',
    ):
        table = pa.table({"image": images([0]), "label": [0]}).replace_schema_metadata({b"huggingface": metadata})
        pq.write_table(table, tmp_path / "a.parquet")
        assert open_source(str(tmp_path / "a.parquet")).labels == ["0"]


def test_labels_of_files_whose_numbers_mean_different_names(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": images([0, 1]), "label": [0, 1]}, {"label": classes("cat", "dog")})
    write(tmp_path / "b.parquet", {"image": images([2, 3]), "label": [0, 1]}, {"label": classes("dog", "owl")})
    assert open_source(str(tmp_path)).labels == ["cat", "dog", "dog", "owl"]
    write(tmp_path / "c.parquet", {"image": images([4])})
    assert open_source(str(tmp_path)).labels == ["cat", "dog", "dog", "owl", None]


def other(*data: bytes, type: Any = None) -> Any:
    return pa.array(data, type or pa.binary())


@pytest.mark.parametrize(
    "columns",
    [
        {"image": other(b"yes"), "mask": other(b"no")},
        {"img": other(b"yes"), "mask": other(b"no")},
        {"picture": other(b"yes", type=pa.large_binary()), "id": ["1"]},
        {"bytes": other(b"yes"), "thumbnail": other(b"no")},
        {"image": pa.array([{"bytes": b"yes"}]), "mask": pa.array([{"bytes": b"no"}])},
        {"img": pa.array([{"bytes": b"yes"}]), "mask": pa.array([{"bytes": b"no"}])},
        {"photo": pa.array([{"bytes": b"yes", "size": 3}]), "hash": other(b"no")},
    ],
)
def test_the_column_of_pictures(tmp_path: Path, columns: dict[str, Any]) -> None:
    source = open_source(str(write(tmp_path / "a.parquet", columns)))
    assert read_all(source) == [("a/00000000", b"yes", None)]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"text": ["a"], "label": [1]}, r"expected a column of pictures: .* found text \(string\), label \(int64\)"),
        ({"one": other(b"a"), "two": other(b"b")}, r"named image where there are several; found one \(binary\), two"),
        ({"image": ["a path"]}, r"found image \(string\)"),
        ({"image": pa.array([], STRUCT)}, "holds no picture; its Parquet files have no row"),
    ],
)
def test_tables_without_a_picture(tmp_path: Path, columns: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidSource, match=says):
        open_source(str(write(tmp_path / "a.parquet", columns)))


def test_a_file_among_others_without_the_column_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": images([0])})
    write(tmp_path / "b.parquet", {"text": ["x"]})
    with pytest.raises(InvalidSource, match=r"b\.parquet: expected a column of pictures"):
        open_source(str(tmp_path))


def test_our_own_embeddings_are_no_pictures(tmp_path: Path) -> None:
    embed_source(open_source("digits[:3]"), MODEL, tmp_path / "out.parquet", Settings())
    with pytest.raises(InvalidSource, match=r"part-00000\.parquet: holds embeddings that `lookalike embed` wrote"):
        open_source(str(tmp_path / "out.parquet"))


def test_files_that_are_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": images(range(100))})
    data = path.read_bytes()
    for damaged in (b"", b"no parquet", data[: len(data) // 2], data[:-1], data[:-8] + b"\xff\xff\xff\x7fPAR1"):
        path.write_bytes(damaged)
        with pytest.raises(InvalidSource, match=r"a\.parquet: not a Parquet file that can be read: .") as caught:
            open_source(str(path))
        assert "\n" not in str(caught.value)


def test_bytes_that_are_null_or_damaged_are_errors_of_their_pictures(tmp_path: Path) -> None:
    rows = [{"bytes": b"a" * 100, "path": "a"}, {"bytes": None, "path": "b"}, None, {"bytes": b"d" * 99, "path": "d"}]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": pa.array(rows, STRUCT)}), path, row_group_size=3, compression="snappy")
    source = open_source(str(path))
    assert [source.entry(0).data, source.entry(3).data] == [b"a" * 100, b"d" * 99]
    for position in (1, 2):
        with pytest.raises(UndecodablePicture, match="cannot be read: there are no bytes in its row"):
            source.entry(position)
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(data)
    source = open_source(str(path))
    with pytest.raises(UndecodablePicture, match=r"cannot be read: ."):
        source.entry(0)
    assert source.entry(3).data == b"d" * 99


def test_many_threads_read_at_once(tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path / "a.parquet", {"image": images(range(500))}, rows=7)))
    order = np.random.default_rng(0).permutation(500).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, order)) == [b"picture %d" % n for n in order]


def test_two_threads_load_a_row_group_once() -> None:
    loads: list[int] = []

    def load(group: int) -> Any:
        loads.append(group)
        time.sleep(0.05)
        return pa.array([group])

    held = RowGroups(load, 1000)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: held[n % 2][0].as_py(), range(32)))
    assert found == [0, 1] * 16
    assert sorted(loads) == [0, 1]


def test_what_was_asked_for_last_is_held_up_to_a_size() -> None:
    loads: list[int] = []

    def load(group: int) -> Any:
        loads.append(group)
        return pa.array(range(1000 if group == 9 else 10))  # 80 or 8000 bytes

    held = RowGroups(load, 250)
    for group in (0, 1, 2, 0, 3, 0, 2, 1):
        assert len(held[group]) == 10
    # Group 3 evicted group 1, the least recently used.
    assert loads == [0, 1, 2, 3, 1]
    loads.clear()
    assert len(held[9]) == len(held[9]) == 1000
    assert len(held[1]) == 10
    assert loads == [9, 1]


def test_a_load_that_failed_is_tried_again() -> None:
    answers = iter([OSError("not now"), pa.array([1])])

    def load(group: int) -> Any:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    held = RowGroups(load, 100)
    with pytest.raises(OSError, match="not now"):
        held[0]
    assert held[0].to_pylist() == [1]


@pytest.mark.parametrize("path", ["photographs/of/this/and/that/{:010}.jpg", None])
def test_many_pictures_hold_little(tmp_path: Path, path: str | None) -> None:
    many = 20_000
    columns = {"image": images(range(many), path), "label": [n % 300 for n in range(many)]}
    write(tmp_path / "train-00000-of-00001.parquet", columns)
    del columns
    open_source(str(tmp_path))
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    source = open_source(str(tmp_path))
    held = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - arrow
    tracemalloc.stop()
    assert len(source) == many
    assert held / many <= 60


def test_arrow_is_loaded_for_parquet_alone(tmp_path: Path) -> None:
    (tmp_path / "1.png").touch()
    program = f"""
import sys
from service.sources import open_source
open_source({str(tmp_path)!r})
assert "pyarrow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
