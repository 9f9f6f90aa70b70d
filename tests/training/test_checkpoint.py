"""A run's checkpoint: read as it was written, and whole or not there, whatever the disk does."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from service.errors import InvalidOutput, InvalidRequest
from training.checkpoint import read_checkpoint, run_folder, write_checkpoint

CONTENT: dict[str, Any] = {
    "identity": {"source": "digits", "recipe": {"projection": [32, 16]}, "init": None, "minutes": 0.5},
    "step": 7,
    "total": None,
    "cursor": [1, 64],
    "loss": 1.25,
    "method": {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)},
    "canvas": {"state": torch.tensor([0, 1, 2], dtype=torch.uint8), "bad": {2: "no picture"}, "residence": "memory"},
}


@contextmanager
def largest_file(most_bytes: int) -> Iterator[None]:
    """A disk that is full after so many bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_run_lies_beside_its_model() -> None:
    assert run_folder(Path("models/cats")) == Path("models/cats.run")
    assert run_folder(Path("models/cats.v2")) == Path("models/cats.v2.run")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONTENT)
    found = read_checkpoint(tmp_path)
    assert found is not None
    assert {key: value for key, value in found.items() if key not in ("method", "canvas")} == {
        key: value for key, value in CONTENT.items() if key not in ("method", "canvas")
    }
    assert torch.equal(found["method"]["weight"], CONTENT["method"]["weight"])
    assert found["method"]["count"].shape == ()
    assert torch.equal(found["canvas"]["state"], CONTENT["canvas"]["state"])
    assert found["canvas"]["bad"] == {2: "no picture"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_later_one_takes_the_place_of_the_earlier(tmp_path: Path) -> None:
    for step in (7, 8):
        write_checkpoint(tmp_path, CONTENT | {"step": step})
    found = read_checkpoint(tmp_path)
    assert found is not None
    assert found["step"] == 8


@pytest.mark.parametrize("there", [True, False])
def test_where_there_is_none_there_is_none(there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
        (folder / ".checkpoint.pt").write_bytes(b"what a kill cut short")
    assert read_checkpoint(folder) is None


@pytest.mark.parametrize("most_bytes", [0, 1000, 900_000])
def test_a_full_disk_is_one_sentence_and_the_earlier_one_is_whole(most_bytes: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONTENT)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    larger = CONTENT | {"step": 8, "method": {"weight": torch.zeros(2**18)}}  # 1 MiB
    with largest_file(most_bytes), pytest.raises(InvalidOutput) as caught:
        write_checkpoint(tmp_path, larger)
    assert str(caught.value) == (
        f"{tmp_path / 'checkpoint.pt'}: a checkpoint of 1 MiB cannot be written: File too large; "
        "the earlier one, if any, is whole: mend this and go on with --resume"
    )
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    write_checkpoint(tmp_path, larger)  # mended
    found = read_checkpoint(tmp_path)
    assert found is not None
    assert found["step"] == 8


def test_a_first_one_that_finds_no_room_leaves_nothing(tmp_path: Path) -> None:
    with largest_file(1000), pytest.raises(InvalidOutput, match="cannot be written: File too large"):
        write_checkpoint(tmp_path, CONTENT | {"method": {"weight": torch.zeros(1000)}})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InvalidOutput, match="cannot be written: No such file or directory"):
        write_checkpoint(tmp_path / "gone", CONTENT)


def test_it_takes_its_place_when_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes are forced out before it is renamed, and the folder after: a power cut finds the one or the other."""
    forced: list[tuple[str, int | None]] = []
    really = os.fsync

    def fsync(number: int) -> None:
        really(number)
        path = Path(f"/proc/self/fd/{number}").readlink()
        now = read_checkpoint(tmp_path)
        forced.append((path.name, now["step"] if now else None))

    monkeypatch.setattr(os, "fsync", fsync)
    write_checkpoint(tmp_path, CONTENT)
    write_checkpoint(tmp_path, CONTENT | {"step": 8})
    temporary = "checkpoint.pt.tmp"
    assert forced == [(temporary, None), (tmp_path.name, 7), (temporary, 7), (tmp_path.name, 8)]


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, -1])
def test_a_damaged_one_is_one_sentence(kept: float, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONTENT)
    path = tmp_path / "checkpoint.pt"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if 0 < kept < 1 else int(kept)])
    with pytest.raises(InvalidRequest) as caught:
        read_checkpoint(tmp_path)
    assert str(caught.value).startswith(f"{path}: not a checkpoint that can be read: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{"conv1.weight": torch.zeros(3)}, [1, 2], torch.zeros(3)])
def test_weights_are_no_checkpoint(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(InvalidRequest, match=r"checkpoint\.pt: not a checkpoint of a pretraining run$"):
        read_checkpoint(tmp_path)


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    torch.save({"step": 1, "loss": Trap(tmp_path / "sprung")}, tmp_path / "checkpoint.pt")
    with pytest.raises(InvalidRequest, match="not a checkpoint that can be read"):
        read_checkpoint(tmp_path)
    assert not (tmp_path / "sprung").exists()
