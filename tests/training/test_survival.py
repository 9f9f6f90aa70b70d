"""kill -9 at random moments: only the work after the last checkpoint is lost, and the end is the same.

LOOKALIKE_KILLS sets the number of kills, 3 by default; LOOKALIKE_KILLS_SEED their moments.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from service.encoding.card import read_card
from tests.conftest import ROOT
from training.checkpoint import read_checkpoint
from training.pretrain import pretrain
from training.recipe import read_recipe

KILLS = int(os.environ.get("LOOKALIKE_KILLS", "3"))
SEED = int(os.environ.get("LOOKALIKE_KILLS_SEED", "0"))
# At this interval, a checkpoint is being written about half of the time.
CHECKPOINT_MINUTES = 0.001
SOURCE = "digits[:600]"
CHANGES = (
    "precision=float32",
    # MoCo's queue, pointer and momentum encoder must survive, too.
    "method=moco",
    "moco.queue=256",
    "moco.splits=2",
    "batch_size=32",
    # An epoch has 17 steps.
    f"epochs={4 + 3 * KILLS}",
)


def losses(folder: Path) -> dict[int, float]:
    """The logged loss by step; a line that a kill cut short may stand at the end."""
    found: dict[int, float] = {}
    path = folder / "log.jsonl"
    *whole, _ = path.read_text().split("\n") if path.exists() else [""]
    for line in whole:
        content: dict[str, Any] = json.loads(line)
        if "loss" in content:
            assert content["step"] not in found
            found[content["step"]] = content["loss"]
    assert list(found) == sorted(found)
    return found


def step(folder: Path) -> int:
    """The checkpoint's step; a checkpoint is readable or absent."""
    found = read_checkpoint(folder)
    return found.progress.step if found else 0


def assert_equal(first: Any, second: Any, where: str) -> None:
    if isinstance(first, Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_equal(first[key], second[key], f"{where}.{key}")
    else:
        assert first == second, where


@pytest.mark.slow("kills a training run three times and runs it once more undisturbed, each in a process of its own")
# The limit guards against a hang; two idle cores take a twentieth of it.
@pytest.mark.timeout(900 + 120 * KILLS)
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_been(tiny_recipe_file: Path, tmp_path: Path) -> None:
    straight, out, errors = tmp_path / "straight" / "model", tmp_path / "killed" / "model", tmp_path / "stderr.txt"
    pretrain(SOURCE, read_recipe(str(tiny_recipe_file), CHANGES), straight, None, "cpu", tmp_path)
    expected = torch.load(straight.with_name("model.run") / "checkpoint.pt", weights_only=True)

    folder = out.with_name("model.run")
    command = [sys.executable, "-m", "lookalike", "pretrain", SOURCE, "--recipe", str(tiny_recipe_file), "--resume"]
    command += [word for change in CHANGES for word in ("--set", change)]
    command += ["--out", str(out), "--device", "cpu", "--checkpoint-minutes", str(CHECKPOINT_MINUTES)]

    @contextmanager
    def started() -> Iterator["subprocess.Popen[bytes]"]:
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        with errors.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=one_thread, stdout=file, stderr=file, start_new_session=True
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    chance, reached = random.Random(SEED), 0
    for _ in range(KILLS):
        # Goals are in steps, so that on any machine each kill falls into training and leaves some for the next.
        begun = max(losses(folder), default=0)
        goal = begun + chance.uniform(0, 0.8 / KILLS) * expected["total"]
        with started() as process:
            while (now := max(losses(folder), default=0)) <= begun or now < goal:
                assert process.poll() is None, errors.read_text()
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 0.1))
            before = step(folder)
            os.killpg(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, errors.read_text()

        assert step(folder) >= before >= reached
        reached = step(folder)
        losses(folder)
        assert [found.name for found in out.parent.iterdir()] == ["model.run"]
    assert 0 < reached < expected["total"]

    with started() as process:
        assert process.wait() == 0, errors.read_text()
    found = torch.load(folder / "checkpoint.pt", weights_only=True)
    for key in ("step", "total", "cursor", "loss", "method", "optimizer", "random"):
        assert_equal(found[key], expected[key], key)
    watched, resumed = losses(straight.with_name("model.run")), losses(folder)
    assert set(range(20, expected["total"], 20)) <= watched.keys() <= resumed.keys()
    assert {number: resumed[number] for number in watched} == watched
    assert read_card(out).fingerprint == read_card(straight).fingerprint
    assert sorted(found.name for found in out.parent.iterdir()) == ["model", "model.run"]
    names = [found.name for found in folder.iterdir() if not found.name.startswith("events.out.tfevents.")]
    assert sorted(names) == ["checkpoint.pt", "log.jsonl"]
