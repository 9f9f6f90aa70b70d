"""`lookalike embed --ray`: on a cluster of two nodes on this machine it writes what one process writes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
import s3fs
from ray.cluster_utils import Cluster

from service.encoding.encoder import Encoder
from service.errors import InvalidOutput, InvalidRequest, InvalidSource
from service.jobs.embed import Embeddings, embed_source
from service.jobs.parquet_parts import FAILURES
from service.jobs.ray_embed import Origin, connect, on_ray
from service.settings import Settings
from service.sources import open_source
from service.sources.remote import open_remote
from service.sources.source import Source
from tests.conftest import MODEL, ROOT, encoded, scene
from tests.scale.unsteady_storage import UnsteadyStorage, never, now_and_then

DATA = Path("data")
# "auto" takes the variant that is fastest now, and they differ in the third digit.
FP32 = Settings(variant="fp32")


@pytest.fixture(scope="module")
def objects() -> Iterator[UnsteadyStorage]:
    with UnsteadyStorage() as server:
        yield server


@pytest.fixture(scope="module")
def address(objects: UnsteadyStorage) -> Iterator[str]:
    """Of a cluster of two nodes with a core each; this process is connected to it."""
    with pytest.MonkeyPatch.context() as patch:
        # Workers find the store of objects by the environment of this process.
        for name, value in {**objects.environment, "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0"}.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        connect(cluster.address)
        yield cluster.address
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve pictures of two labels, and one that is damaged."""
    for number in range(12):
        path = tmp_path / "photos" / ("a", "b")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(scene(seed=number)))
    (tmp_path / "photos" / "a" / "bad.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def rows(out: Path) -> dict[str, Any]:
    """Each row without its embedding, by id, in order; and the embeddings."""
    table = pq.read_table(out)
    embeddings = np.stack(table["embedding"].to_numpy())
    return {"rows": table.drop_columns(["embedding"]).to_pylist(), "embeddings": embeddings}


def assert_same(out: Path, other: Path) -> None:
    mine, expected = rows(out), rows(other)
    assert mine["rows"] == expected["rows"]
    # Other threads may add in another order.
    np.testing.assert_allclose(mine["embeddings"], expected["embeddings"], atol=1e-5)


def test_a_repeat_embeds_what_is_new_or_has_changed_and_lists_failures_as_ever(
    address: str, photos: Path, tmp_path: Path
) -> None:
    origin, out, local = Origin(str(photos), DATA), tmp_path / "ray", tmp_path / "local"
    done = embed_source(origin.open(), MODEL, out, FP32, engine=on_ray(origin))
    embed_source(origin.open(), MODEL, local, FP32)
    assert (done.added, done.bad) == (12, 1)
    assert_same(out, local)
    assert (out / FAILURES).read_text() == (local / FAILURES).read_text()
    (photos / "b" / "new.png").write_bytes(encoded(scene(seed=50)))
    (photos / "a" / "0.png").write_bytes(encoded(scene(seed=51)))
    done = embed_source(origin.open(), MODEL, out, FP32, engine=on_ray(origin))
    embed_source(origin.open(), MODEL, local, FP32)
    # The damaged one is tried again.
    assert (done.added, done.replaced, done.known, done.bad) == (1, 1, 11, 1)
    assert_same(out, local)


def test_a_run_that_was_stopped_goes_on(address: str, tmp_path: Path) -> None:
    source, origin, out = open_source("digits[:300]"), Origin("digits[:300]", DATA), tmp_path / "out"

    def stopped(*arguments: Any) -> Generator[Embeddings]:
        with closing(on_ray(origin)(*arguments)) as chunks:
            yield next(chunks)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_source(source, MODEL, out, FP32, engine=stopped)
    written = len(rows(out)["rows"])
    assert 0 < written < 300
    done = embed_source(source, MODEL, out, FP32, engine=on_ray(origin))
    assert (done.added, done.known) == (300 - written, written)
    embed_source(source, MODEL, tmp_path / "local", FP32)
    assert_same(out, tmp_path / "local")


def test_after_a_worker_is_killed_the_rows_are_all_there(address: str, tmp_path: Path) -> None:
    source, origin, killed = open_source("digits"), Origin("digits", DATA), []

    def killing(source: Source, encoder: Encoder, settings: Settings, todo: Sequence[int]) -> Generator[Embeddings]:
        with closing(on_ray(origin)(source, encoder, settings, todo)) as chunks:
            yield next(chunks)
            killed.append(next(one for one in psutil.process_iter(["cmdline"]) if is_worker(one)).pid)
            os.kill(killed[0], signal.SIGKILL)
            yield from chunks

    done = embed_source(source, MODEL, tmp_path / "ray", FP32, engine=killing)
    assert killed
    assert (done.added, done.bad) == (len(source), 0)
    embed_source(source, MODEL, tmp_path / "local", FP32)
    assert_same(tmp_path / "ray", tmp_path / "local")


def is_worker(process: psutil.Process) -> bool:
    """Whether it is an actor of ours, of the cluster of this test."""
    try:
        mine = {process.pid, *(one.pid for one in process.parents())}
        return "_Worker" in " ".join(process.info["cmdline"] or []) and os.getpid() in mine
    except psutil.Error:
        return False


def test_pictures_and_parts_may_lie_in_a_store_of_objects_that_answers_500_now_and_then(
    address: str, objects: UnsteadyStorage, photos: Path, tmp_path: Path
) -> None:
    files = s3fs.S3FileSystem()
    files.put(str(photos), "pictures/photos", recursive=True)
    origin, out = Origin("s3://pictures/photos", DATA), "s3://pictures/embeddings"
    assert list(open_remote(origin.name).ids) == list(open_source(str(photos)).ids)
    objects.refuse(now_and_then)
    done = embed_source(origin.open(), MODEL, out, FP32, engine=on_ray(origin))
    objects.refuse(never)
    assert (done.added, done.bad) == (12, 1)
    assert objects.refused > 3
    files.get(out, str(tmp_path / "fetched"), recursive=True)
    embed_source(open_source(str(photos)), MODEL, tmp_path / "local", FP32)
    mine, expected = rows(tmp_path / "fetched" / "part-00000.parquet"), rows(tmp_path / "local" / "part-00000.parquet")
    for row in (*mine["rows"], *expected["rows"]):
        # The store has times of its own.
        assert row.pop("modified") is not None
    assert mine["rows"] == expected["rows"]
    failures = [json.loads(line)["id"] for line in files.cat_file(f"{out}/{FAILURES}").splitlines()]
    assert failures == ["a/bad.png"]
    # A repeat knows them by size and time, and reads none again but the damaged one.
    again = embed_source(origin.open(), MODEL, out, FP32)
    assert (again.added, again.known, again.bad) == (0, 12, 1)
    files.rm("pictures/photos/a/bad.png")
    assert embed_source(origin.open(), MODEL, out, FP32).bad == 0
    assert not files.exists(f"{out}/{FAILURES}")


def test_500_for_good_of_the_store_of_objects_ends_the_job(
    address: str, objects: UnsteadyStorage, photos: Path
) -> None:
    s3fs.S3FileSystem().put(str(photos), "pictures/unsteady", recursive=True)
    origin = Origin("s3://pictures/unsteady", DATA)
    source = origin.open()
    objects.refuse(lambda request, _: request.endswith("/7.png"))
    with pytest.raises(InvalidRequest, match=r"Ray: pictures/unsteady/b/7\.png: cannot be read now"):
        embed_source(source, MODEL, "s3://pictures/parts", FP32, engine=on_ray(origin))
    objects.refuse(never)


def test_a_url_that_holds_something_else_is_refused(address: str, photos: Path) -> None:
    files = s3fs.S3FileSystem()
    files.mkdir("taken")
    files.pipe_file("taken/out/letter.txt", b"dear")
    with pytest.raises(InvalidOutput, match=r"not ours \(it has letter.txt\)"):
        embed_source(open_source(str(photos)), MODEL, "s3://taken/out", FP32)
    with pytest.raises(InvalidRequest, match="format npy is for folders"):
        embed_source(open_source(str(photos)), MODEL, "s3://taken/other", FP32, npy=True)
    with pytest.raises(InvalidSource, match="holds no picture"):
        open_remote("s3://taken/nothing")
    with pytest.raises(InvalidSource, match="cannot be read: ValueError: Protocol not known"):
        open_remote("nosuch://bucket")


def test_a_node_that_has_other_pictures_stops_the_job_with_a_sentence(address: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"Ray: .*has other pictures on a node"):
        embed_source(
            open_source("digits[:100]"), MODEL, tmp_path / "out", FP32, engine=on_ray(Origin("digits[100:200]", DATA))
        )


def test_the_verb_embeds_on_a_cluster_and_names_what_is_wrong(address: str, tmp_path: Path) -> None:
    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        verb = [
            sys.executable,
            "-m",
            "lookalike",
            "embed",
            *arguments,
            "--model",
            str(MODEL),
            "--out",
            str(tmp_path / "out"),
        ]
        return subprocess.run(verb, capture_output=True, text=True, input="")

    done = run("digits[:100]", "--ray", address)
    assert done.returncode == 0, done.stderr
    assert "100 pictures embedded now" in done.stderr
    refused = run("-", "--ray", address)
    assert refused.returncode == 2
    assert "every node can open" in refused.stderr
    nowhere = run("digits[:100]", "--ray", "nonsense")
    assert nowhere.returncode == 2
    assert "--ray nonsense: no Ray cluster there" in nowhere.stderr
