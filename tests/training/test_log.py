"""The log: JSON lines that parse and ascend, events that TensorBoard reads, and nothing twice after a resumption."""

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.log import Log


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def events(folder: Path, tag: str) -> list[tuple[int, float]]:
    """TensorBoard's steps and values under a tag."""
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def write(folder: Path, after: int, *steps: int) -> None:
    log = Log(folder, after)
    for step in steps:
        log.write(step, loss=1 / step)
    log.close()


def test_a_line_holds_a_steps_values(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    log.write(20, seconds=1.23456789, loss=0.5, pictures_per_s=12345678.0)
    log.write(21, knn=0.75)
    log.close()
    assert lines(tmp_path) == [
        {"step": 20, "seconds": 1.23457, "loss": 0.5, "pictures_per_s": 12345700.0},
        {"step": 21, "knn": 0.75},
    ]


def test_a_line_is_on_the_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    log.write(20, loss=0.5)
    # A kill loses no written line.
    assert lines(tmp_path) == [{"step": 20, "loss": 0.5}]
    log.close()


def test_tensorboard_reads_the_events(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    for step in (20, 40):
        log.write(step, loss=10 / step)
    log.write(40, knn=0.25)
    log.close()
    assert events(tmp_path, "loss") == [(20, 0.5), (40, 0.25)]
    assert events(tmp_path, "knn") == [(40, 0.25)]


def test_a_resumed_run_takes_back_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 2, 3, 4, 5)
    write(tmp_path, 3, 4)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    # Step 5 of the first run is left out.
    assert [step for step, _ in events(tmp_path, "loss")] == [1, 2, 3, 4]


def test_a_line_that_a_kill_cut_short_goes(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 2, 3)
    path = tmp_path / "log.jsonl"
    whole = path.read_text()
    for cut in range(1, len(whole.splitlines()[-1])):
        # The cuts remove from the line break alone to all but the brace.
        path.write_text(whole[:-cut])
        write(tmp_path, 3, 4)
        assert [line["step"] for line in lines(tmp_path)] == ([1, 2, 3, 4] if cut == 1 else [1, 2, 4])


def test_a_new_run_begins_a_new_log(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 2, 3)
    (tmp_path / "checkpoint.pt").write_bytes(b"not the log's")
    write(tmp_path, 0, 1)
    assert [line["step"] for line in lines(tmp_path)] == [1]
    assert [step for step, _ in events(tmp_path, "loss")] == [1]
    assert (tmp_path / "checkpoint.pt").exists()


def test_a_resumed_run_without_its_log_begins_one(tmp_path: Path) -> None:
    write(tmp_path, 3, 4, 5)
    assert [line["step"] for line in lines(tmp_path)] == [4, 5]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diagnostic_that_is_no_number_leaves_lines_that_json_has_words_for(value: float, tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    log.write(20, loss=0.5, positive_cosine=value)
    log.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse)["loss"] == 0.5
