"""A run's checkpoint: read as it was written, and whole or absent even after a disk error."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from service.errors import InvalidOutput, InvalidRequest
from training.checkpoint import (
    Checkpoint,
    Cursor,
    Identity,
    Progress,
    check_same,
    read_checkpoint,
    run_folder,
    write_checkpoint,
)
from training.recipe import Recipe


@pytest.fixture
def content(tiny_recipe: Recipe) -> Checkpoint:
    return Checkpoint(
        identity=Identity("digits", tiny_recipe, minutes=0.5),
        progress=Progress(7, None, 3.5, 0.25, Cursor(1, 64), 1.25),
        precision="float32",
        device="cpu",
        method={"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)},
        optimizer={"state": {0: {"step": torch.tensor(7.0)}}},
        random={"views": torch.arange(4, dtype=torch.uint8)},
        canvas={"state": torch.tensor([0, 1, 2], dtype=torch.uint8), "bad": {2: "no picture"}, "residence": "memory"},
        source_checksum=123,
        pictures=3,
        statistics={"mean": torch.tensor([0.5]), "std": torch.tensor([0.25]), "tones": [1.0]},
    )


def at(content: Checkpoint, step: int, **changes: Any) -> Checkpoint:
    return replace(content, progress=replace(content.progress, step=step), **changes)


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


def test_what_is_written_is_read(content: Checkpoint, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, content)
    found = read_checkpoint(tmp_path)
    assert found is not None
    for name in ("identity", "progress", "precision", "device", "source_checksum", "pictures", "compiled"):
        assert getattr(found, name) == getattr(content, name), name
    assert isinstance(found.progress.cursor, Cursor)
    assert torch.equal(found.method["weight"], content.method["weight"])
    assert found.method["count"].shape == ()
    assert torch.equal(found.random["views"], content.random["views"])
    assert torch.equal(found.canvas["state"], content.canvas["state"])
    assert found.canvas["bad"] == {2: "no picture"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_one_of_before_the_recipe_had_these_keys_is_read(content: Checkpoint, tmp_path: Path) -> None:
    """A run from before these keys can be resumed: its behaviour is now their default."""
    write_checkpoint(tmp_path, content)
    raw = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del raw["compiled"]
    for key in ("optimizer", "compile", "resident", "knn_times", "knn_bank"):
        del raw["identity"]["recipe"][key]
    torch.save(raw, tmp_path / "checkpoint.pt")
    found = read_checkpoint(tmp_path)
    assert found is not None and not found.compiled
    check_same(found.identity, content.identity, tmp_path)


def test_a_later_one_takes_the_place_of_the_earlier(content: Checkpoint, tmp_path: Path) -> None:
    for step in (7, 8):
        write_checkpoint(tmp_path, at(content, step))
    found = read_checkpoint(tmp_path)
    assert found is not None
    assert found.progress.step == 8


@pytest.mark.parametrize("there", [True, False])
def test_where_there_is_none_there_is_none(there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
        (folder / "checkpoint.pt.tmp").write_bytes(b"what a kill cut short")
    assert read_checkpoint(folder) is None


@pytest.mark.parametrize("most_bytes", [0, 1000, 900_000])
def test_a_full_disk_is_one_sentence_and_the_earlier_one_is_whole(
    most_bytes: int, content: Checkpoint, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, content)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    larger = at(content, 8, method={"weight": torch.zeros(2**18)})  # 1 MiB
    with largest_file(most_bytes), pytest.raises(InvalidOutput) as caught:
        write_checkpoint(tmp_path, larger)
    assert str(caught.value) == (
        f"{tmp_path / 'checkpoint.pt'}: a checkpoint of 1 MiB cannot be written: File too large; "
        "the earlier one, if any, is whole: mend this and go on with --resume"
    )
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    # The disk has room again.
    write_checkpoint(tmp_path, larger)
    found = read_checkpoint(tmp_path)
    assert found is not None
    assert found.progress.step == 8


def test_a_first_one_that_finds_no_room_leaves_nothing(content: Checkpoint, tmp_path: Path) -> None:
    with largest_file(1000), pytest.raises(InvalidOutput, match="cannot be written: File too large"):
        write_checkpoint(tmp_path, replace(content, method={"weight": torch.zeros(1000)}))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_is_one_sentence(content: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InvalidOutput, match="cannot be written: No such file or directory"):
        write_checkpoint(tmp_path / "gone", content)


def test_it_takes_its_place_when_it_is_on_the_disk(
    content: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is synced before it is renamed, and the folder after: a power cut leaves the old or the new one."""
    forced: list[tuple[str, int | None]] = []
    really = os.fsync

    def fsync(number: int) -> None:
        really(number)
        path = Path(f"/proc/self/fd/{number}").readlink()
        now = read_checkpoint(tmp_path)
        forced.append((path.name, now.progress.step if now else None))

    monkeypatch.setattr(os, "fsync", fsync)
    write_checkpoint(tmp_path, content)
    write_checkpoint(tmp_path, at(content, 8))
    temporary = "checkpoint.pt.tmp"
    assert forced == [(temporary, None), (tmp_path.name, 7), (temporary, 7), (tmp_path.name, 8)]


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, -1])
def test_a_damaged_one_is_one_sentence(kept: float, content: Checkpoint, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, content)
    path = tmp_path / "checkpoint.pt"
    written = path.read_bytes()
    path.write_bytes(written[: int(len(written) * kept) if 0 < kept < 1 else int(kept)])
    with pytest.raises(InvalidRequest) as caught:
        read_checkpoint(tmp_path)
    assert str(caught.value).startswith(f"{path}: not a checkpoint that can be read: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("other", [{"conv1.weight": torch.zeros(3)}, [1, 2], torch.zeros(3), {"step": 1}])
def test_weights_are_no_checkpoint(other: object, tmp_path: Path) -> None:
    torch.save(other, tmp_path / "checkpoint.pt")
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
