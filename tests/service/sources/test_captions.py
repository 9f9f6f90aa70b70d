"""Captions beside pictures: metadata files, .txt members of WebDataset shards, columns of Parquet; slices keep them."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.errors import InvalidSource
from service.sources import open_source
from service.sources.source import Source, select
from tests.conftest import encoded, scene

PICTURE = encoded(scene(8, 8))


def captions_of(source: Source) -> dict[str, list[str]]:
    assert source.captions is not None
    return {id: list(own) for id, own in zip(source.ids, source.captions(), strict=True)}


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


ROWS = [
    {"file_name": "a.png", "text": "a cat"},
    {"file_name": "b.png", "caption": ["a dog", "a hound"], "text": "not this one"},
    {"file_name": "gone.png", "text": "not there"},
]
JSONL = "\n".join(map(json.dumps, ROWS)) + "\n\n"
PICTURES: dict[str, bytes | str] = dict.fromkeys(("a.png", "b.png", "c.png"), PICTURE)
EXPECTED = {"a.png": ["a cat"], "b.png": ["a dog", "a hound"], "c.png": []}


def test_a_folder_has_the_captions_of_its_metadata_jsonl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert captions_of(open_source(str(write(tmp_path, PICTURES | {"metadata.jsonl": JSONL})))) == EXPECTED
    assert "1 pictures of metadata.jsonl are not there, such as 'gone.png'" in capsys.readouterr().err
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, ROWS[:2])))
    captions_of(open_source(str(tmp_path)))
    assert not capsys.readouterr().err


def test_a_folder_has_the_captions_of_a_metadata_csv_in_each_part(tmp_path: Path) -> None:
    csv = '\ufefffile_name,text\r\na.png,"a ""cat"",\nlying"\r\n'
    files: dict[str, bytes | str] = {"train/a.png": PICTURE, "val/a.png": PICTURE, "train/metadata.csv": csv}
    files |= {"val/metadata.csv": "file_name,caption\na.png,another\na.png,and again\n"}
    assert captions_of(open_source(str(write(tmp_path, files)))) == {
        "train/a.png": ['a "cat",\nlying'],
        "val/a.png": ["another", "and again"],
    }


def test_a_zip_has_them_too(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (PICTURES | {"metadata.jsonl": JSONL}).items():
            archive.writestr(name, content)
    assert captions_of(open_source(str(tmp_path / "x.zip"))) == EXPECTED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"file_name": "a.png", "text": 7}', "metadata.jsonl: cannot be read as captions: line 1: expected a text or"),
        ('{"text": "x"}', "line 1: expected the path of a picture in file_name"),
        ('\n{"file_name"', "cannot be read as captions"),
        ("[]", "line 1: expected a JSON object"),
        (b"\xff\xfe", "cannot be read as captions"),
        ('{"file_name": "z.png", "text": "x"}', "no row is of a picture of this source; z.png"),
    ],
)
def test_metadata_that_is_damaged_is_refused_when_captions_are_asked_for(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    source = open_source(str(write(tmp_path, PICTURES | {"metadata.jsonl": content})))
    with pytest.raises(InvalidSource) as refused:
        captions_of(source)
    assert message in str(refused.value)


def tar_of(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_shards_have_the_captions_of_their_txt_members(tmp_path: Path) -> None:
    tar_of(tmp_path / "s-0.tar", {"000.jpg": PICTURE, "000.txt": b"  a cat \n", "000.json": b"{}", "001.jpg": PICTURE})
    tar_of(tmp_path / "s-1.tar", {"./000.txt": "größer".encode(), "./000.input.jpg": PICTURE, "002.txt": b"none"})
    source = open_source(str(tmp_path / "s-{0..1}.tar"))
    assert captions_of(source) == {"s-0/000.jpg": ["a cat"], "s-0/001.jpg": [], "s-1/000.input.jpg": ["größer"]}


def test_a_caption_of_megabytes_is_refused(tmp_path: Path) -> None:
    tar_of(tmp_path / "s.tar", {"000.jpg": PICTURE, "000.txt": b"x" * 100_001})
    with pytest.raises(InvalidSource, match="a caption of 100001 bytes; expected at most 100000"):
        captions_of(open_source(str(tmp_path / "s.tar")))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"caption": ["a", None, ""], "text": ["x", "y", "z"]}, [["a"], [], []]),
        ({"text": [["a", "b"], None, ["c", None]]}, [["a", "b"], [], ["c"]]),
        ({"caption": [1, 2, 3], "text": ["x", "y", "z"]}, [["x"], ["y"], ["z"]]),
        ({"caption": [1, 2, 3]}, None),
        ({}, None),
    ],
)
def test_a_table_has_the_captions_of_its_column(
    tmp_path: Path, columns: dict[str, list[object]], expected: list[list[str]] | None
) -> None:
    pq.write_table(pa.table({"image": [PICTURE] * 3, **columns}), tmp_path / "x.parquet", row_group_size=2)
    source = open_source(str(tmp_path / "x.parquet"))
    if expected is None:
        assert source.captions is None
        return
    assert list(captions_of(source).values()) == expected
    sliced = open_source(str(tmp_path / "x.parquet") + "[1:]")
    assert list(captions_of(sliced).values()) == expected[1:]
    chosen = select(source, np.array([0, 2]))
    assert list(captions_of(chosen).values()) == [expected[0], expected[2]]


def test_a_folder_without_metadata_has_none(tmp_path: Path) -> None:
    assert open_source(str(write(tmp_path, PICTURES))).captions is None
