"""Folders of embeddings are read as `lookalike embed` wrote them, or refused with one sentence."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.encoding.encoder import Encoder
from service.errors import InvalidSource
from service.jobs import embed
from service.jobs.embed import embed_source
from service.jobs.parquet_parts import EARLIER_FAILURES, META, Embeddings, open_embeddings, part_path, read_facts
from service.settings import Settings
from service.sources import open_source
from tests.conftest import MODEL, encoded, scene


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits[:100] in parts of 40, 40 and 20."""
    out = tmp_path_factory.mktemp("written") / "digits.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "_PART_ROWS", 40)
        embed_source(open_source("digits[:100]"), MODEL, out, Settings(variant="fp32"))
    return out


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def opened(name: Path | str) -> Embeddings:
    found = open_embeddings(str(name))
    assert found is not None
    return found


def rewrite(part: Path, **changed: Any) -> None:
    """Rewrite a part with other columns; a name that is no column becomes a fact."""
    table = pq.read_table(part)
    facts = json.loads(table.schema.metadata[META])
    for name, value in changed.items():
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, value)
        else:
            facts[name] = value
    pq.write_table(table.replace_schema_metadata({META: json.dumps(facts)}), part)


def test_what_was_written_is_read(written: Path, encoder: Encoder) -> None:
    found, table = opened(written), pandas.read_parquet(written)
    assert len(found) == 100
    assert list(found.ids) == table["id"].tolist()
    assert found.labels is not None
    assert list(found.labels) == table["label"].tolist()
    np.testing.assert_array_equal(found.rows, np.stack(table["embedding"].tolist()))
    assert found.rows.dtype == np.float32
    assert (found.fingerprint, found.variant) == (encoder.card.fingerprint, "fp32")


@pytest.mark.parametrize(
    ("slicing", "kept"), [("[:10]", slice(0, 10)), ("[70%:]", slice(70, 100)), ("[39:41]", slice(39, 41))]
)
def test_a_slice(slicing: str, kept: slice, written: Path) -> None:
    found, whole = opened(f"{written}{slicing}"), opened(written)
    assert list(found.ids) == list(whole.ids[kept])
    assert whole.labels is not None
    assert list(found.labels or []) == list(whole.labels[kept])
    np.testing.assert_array_equal(found.rows, whole.rows[kept])
    with pytest.raises(InvalidSource, match=r"the slice \[5:5\] of 100 pictures holds none"):
        open_embeddings(f"{written}[5:5]")


def test_other_names_are_not_of_embeddings(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"1"]}), tmp_path / "part-00000.parquet")
    assert read_facts(tmp_path / "part-00000.parquet") is None
    for name in (str(tmp_path), f"{tmp_path}[:3]", "digits", "mnist/test[:8]", str(tmp_path / "nothing")):
        assert open_embeddings(name) is None


def test_pictures_without_labels_and_parts_without_pictures(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(scene(seed=number)))
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embed, "_PART_ROWS", 1)
        embed_source(open_source(str(tmp_path)), MODEL, tmp_path / "out", Settings(variant="fp32"))
    found = opened(tmp_path / "out")
    assert list(found.ids) == ["0.png", "2.png"]
    assert found.labels is None
    assert found.rows.shape == (2, 128)


def test_a_job_that_has_not_ended(copy: Path) -> None:
    last = sorted(copy.glob("part-*"))[-1]
    last.unlink()
    with pytest.raises(InvalidSource, match=r"is not finished, its last part is not there"):
        open_embeddings(str(copy))
    # Earlier versions marked the end of a job by this file.
    (copy / EARLIER_FAILURES).touch()
    assert opened(copy).digests is not None


def test_a_part_that_is_missing(copy: Path) -> None:
    part_path(copy, 1).unlink()
    with pytest.raises(InvalidSource, match=r"expected part-00001.parquet next, found part-00002.parquet"):
        open_embeddings(str(copy))


def test_parts_of_two_encoders(copy: Path) -> None:
    rewrite(part_path(copy, 2), fingerprint="0" * 64)
    with pytest.raises(InvalidSource, match=r"part-00002.parquet: holds embeddings of another encoder than"):
        open_embeddings(str(copy))


def test_parts_of_two_variants_are_of_one_encoder(copy: Path) -> None:
    rewrite(part_path(copy, 2), variant="int8")
    assert opened(copy).variant == "fp32, int8"


@pytest.mark.parametrize("value", [np.nan, 2.0])
def test_embeddings_that_are_none(value: float, copy: Path) -> None:
    rows = np.full((40, 4), 0.5, np.float32)
    rewrite(part_path(copy, 1), embedding=pa.FixedSizeListArray.from_arrays(rows.ravel(), 4))
    rewrite(part_path(copy, 0), embedding=pa.FixedSizeListArray.from_arrays(rows.ravel(), 4))
    rewrite(part_path(copy, 2), embedding=pa.FixedSizeListArray.from_arrays(rows[:20].ravel(), 4))
    assert opened(copy).rows.shape == (100, 4)
    rows[7, 2] = value
    rewrite(part_path(copy, 1), embedding=pa.FixedSizeListArray.from_arrays(rows.ravel(), 4))
    with pytest.raises(InvalidSource, match=r"part-00001.parquet: damaged: expected embeddings of length 1"):
        open_embeddings(str(copy))


@pytest.mark.parametrize("number", [0, 1])
def test_a_part_cut_short_or_of_noise(number: int, copy: Path) -> None:
    part = part_path(copy, number)
    whole = part.read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    for data in (whole[:-200], whole[:3], b"", b"PAR1" + noise + b"PAR1", whole[:200] + noise + whole[5200:]):
        part.write_bytes(data)
        with pytest.raises(InvalidSource, match=rf"part-0000{number}.parquet: damaged: "):
            open_embeddings(str(copy))


def test_columns_of_another_kind(copy: Path) -> None:
    rewrite(part_path(copy, 1), embedding=pa.array([[1.0]] * 40))
    with pytest.raises(InvalidSource, match=r"part-00001.parquet: damaged: expected an id and a list of float32"):
        open_embeddings(str(copy))
