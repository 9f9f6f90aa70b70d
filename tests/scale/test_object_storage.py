"""`lookalike embed` from and to an object store that answers 500: now and then, or for good."""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import s3fs

from service.account import Account
from service.errors import InvalidSource, LookalikeError
from service.jobs.embed import embed_source
from service.settings import Settings
from service.sources.remote import open_remote
from tests.conftest import MODEL, encoded, scene
from tests.scale.unsteady_storage import Refusal, UnsteadyStorage, never, now_and_then

SOURCE, OUT = "s3://pictures/photos", "s3://pictures/out"
NAMES = [*(f"{number}.png" for number in range(6)), "without-ending"]


@pytest.fixture(autouse=True)
def photos(storage: UnsteadyStorage) -> None:
    """Seven pictures in the store, of which one has no ending: its first bytes are read when the source is opened."""
    files = s3fs.S3FileSystem()
    for number, name in enumerate(NAMES):
        files.pipe_file(f"pictures/photos/{name}", encoded(scene(seed=number)))


def embed() -> Account:
    """Embed as another process would: without the connections and listings of an earlier call."""
    s3fs.S3FileSystem.clear_instance_cache()
    return embed_source(open_remote(SOURCE), MODEL, OUT, Settings(variant="fp32"))


def verb(*options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "lookalike", "embed", SOURCE, "--out", OUT, "--model", str(MODEL), *options]
    return subprocess.run(command, capture_output=True, text=True)


def written(tmp_path: Path) -> list[str]:
    """The ids of the parts."""
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    files.get(f"{OUT}/part-*.parquet", str(tmp_path) + "/")
    return [id for path in sorted(tmp_path.glob("part-*")) for id in pq.read_table(path)["id"].to_pylist()]


def test_500_now_and_then_is_tried_again_and_the_rows_are_all_there(storage: UnsteadyStorage, tmp_path: Path) -> None:
    storage.refuse(now_and_then)
    done = embed()
    assert (done.added, done.bad) == (len(NAMES), 0)
    assert storage.refused > 3
    storage.refuse(never)
    assert written(tmp_path) == NAMES


@pytest.mark.parametrize(
    ("refuses", "sentence"),
    [
        (lambda request, _: request == "GET /pictures", "s3://pictures/photos: cannot be read"),
        (lambda request, _: request.endswith("/without-ending"), "photos/without-ending: cannot be read now"),
        (lambda request, _: request.endswith("/3.png"), "photos/3.png: cannot be read now"),
        (lambda request, _: request.startswith("PUT "), "out/part-00000.parquet: cannot be written"),
    ],
    ids=["listing", "first bytes", "picture", "writing"],
)
def test_500_for_good_ends_the_job_and_a_repeat_goes_on(
    refuses: Refusal, sentence: str, storage: UnsteadyStorage, tmp_path: Path
) -> None:
    storage.refuse(refuses)
    with pytest.raises(LookalikeError, match=sentence):
        embed()
    storage.refuse(never)
    # What is there is whole, and no picture is listed as damaged.
    assert not [path for path in s3fs.S3FileSystem(skip_instance_cache=True).find(OUT) if "part-" not in path]
    embed()
    assert written(tmp_path) == NAMES


def test_the_verb_says_it_in_a_sentence_and_keeps_the_parts(storage: UnsteadyStorage, tmp_path: Path) -> None:
    embed()
    storage.refuse(lambda request, _: "part-" in request and request.startswith("GET "))
    done = verb()
    assert done.returncode == 2
    assert done.stderr.startswith("lookalike: pictures/out/part-00000.parquet: cannot be read: ")
    assert len(done.stderr.splitlines()) == 1
    storage.refuse(never)
    assert written(tmp_path) == NAMES


def test_changed_pictures_that_cannot_be_read_now_keep_their_rows(storage: UnsteadyStorage, tmp_path: Path) -> None:
    embed()
    s3fs.S3FileSystem().pipe_file("pictures/photos/3.png", encoded(scene(seed=50)))
    storage.refuse(lambda request, _: request.endswith("/3.png"))
    with pytest.raises(InvalidSource, match=r"3\.png: cannot be read now"):
        embed()
    storage.refuse(never)
    assert written(tmp_path) == NAMES


def test_a_picture_that_is_gone_since_the_listing_is_listed_alone() -> None:
    source = open_remote(SOURCE)
    s3fs.S3FileSystem().rm("pictures/photos/3.png")
    done = embed_source(source, MODEL, OUT, Settings(variant="fp32"))
    assert (done.added, done.bad) == (len(NAMES) - 1, 1)
