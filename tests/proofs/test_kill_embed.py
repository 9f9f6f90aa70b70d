"""kill -9 of `lookalike embed` at random moments, then --resume: the table of a run that nobody disturbed.

A round embeds a folder, or goes on with one whose pictures have changed since, in both formats. Its job is killed again
and again until it comes to its end; after each kill the rows that are there are checked, too.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas
import pytest

from tests.conftest import MODEL, ROOT, encoded, scene

pytestmark = pytest.mark.proof

# 200 in the long form.
KILLS = int(os.environ.get("LOOKALIKE_KILLS", "10"))
SEED = int(os.environ.get("LOOKALIKE_KILLS_SEED", "0"))
PICTURES = 1500
# The parts of a real job are larger; small ones make more moments at which a kill may do harm.
_PROGRAM = "import sys; from service.jobs import embed; embed._PART_ROWS = 100; import lookalike; lookalike.main()"


@pytest.mark.timeout(300 + 30 * KILLS)
def test_kills(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    folder = tmp_path / "pictures"
    for number in range(PICTURES):
        path = folder / f"{number % 7}" / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(scene(seed=number)))
    bad = folder / "3" / "bad.png"
    bad.write_bytes(b"no picture")
    kills = rounds = 0
    while kills < KILLS:
        npy = rounds % 2 == 1
        out = tmp_path / f"out-{npy}"
        if rounds >= 2:
            _change(folder, chance)
        began = time.perf_counter()
        expected = _undisturbed(folder, tmp_path / "fresh", npy)
        longest = time.perf_counter() - began
        while (code := _run(folder, out, npy, chance.uniform(0.2, 1) * longest)) == -signal.SIGKILL:
            kills += 1
            found = _rows(out, npy)
            # What is there at any moment is right, and there once.
            assert found.index.is_unique
            if found.empty:
                continue
            known = found.index.intersection(expected.index)
            same = found.loc[known, "digest"] == expected.loc[known, "digest"]
            pandas.testing.assert_frame_equal(found.loc[known][same], expected.loc[known][same])
        # The bad picture costs a row and exit code 1.
        assert code == 1
        found = _rows(out, npy)
        assert len(found) == len(expected)
        pandas.testing.assert_frame_equal(found.sort_index(), expected.sort_index())
        if rounds < 2:
            assert found.index.tolist() == expected.index.tolist()
        rounds += 1
    print(f"\n{kills} kills -9 in {rounds} rounds of {PICTURES} pictures: no row too many, none missing")


def _change(folder: Path, chance: random.Random) -> None:
    """Change, remove and add pictures, some fifty of each."""
    paths = sorted(folder.rglob("[0-9]*.png"))
    for path in chance.sample(paths, 50):
        path.write_bytes(encoded(scene(seed=chance.randrange(10**6))))
    for path in chance.sample(paths, 50):
        path.unlink()
    for _ in range(50):
        (folder / "1" / f"{chance.randrange(10**6):06}.png").write_bytes(encoded(scene(seed=chance.randrange(10**6))))


def _run(folder: Path, out: Path, npy: bool, seconds: float | None = None) -> int:
    """Run the job, kill it after some seconds, and return its exit code."""
    command = [sys.executable, "-c", _PROGRAM, "embed", str(folder), "--model", str(MODEL), "--out", str(out)]
    command += ["--resume", "--format", "npy" if npy else "parquet"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LOOKALIKE_VARIANT": "fp32"}
    job = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    try:
        _, said = job.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        job.kill()
        _, said = job.communicate()
    assert job.returncode in (1, -signal.SIGKILL), said.decode()
    return job.returncode


def _undisturbed(folder: Path, out: Path, npy: bool) -> pandas.DataFrame:
    shutil.rmtree(out, ignore_errors=True)
    assert _run(folder, out, npy) == 1
    return _rows(out, npy)


def _rows(out: Path, npy: bool) -> pandas.DataFrame:
    """Return all rows by id, with the embeddings as bytes."""
    parts = sorted((out / "metadata").glob("*.parquet"), key=_number) if npy else sorted(out.glob("*.parquet"))
    tables = []
    for part in parts:
        table = pandas.read_parquet(part)
        if npy:
            matrix = np.load(out / "img_emb" / f"img_emb_{_number(part)}.npy")
            # Only a kill between the two files of a part leaves others.
            if len(matrix) != len(table):
                continue
            table["embedding"] = [*matrix]
        table["embedding"] = [row.tobytes() for row in table["embedding"]]
        tables.append(table)
    empty = pandas.DataFrame({"id": [], "digest": []})
    return (pandas.concat(tables) if tables else empty).set_index("id")


def _number(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])
