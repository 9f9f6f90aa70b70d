"""SOURCE → canvas → batches: decoded once by the service's function, bad pictures skipped, order by the seed."""

import io
import os
import resource
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from service import IntArray, PixelArray
from service.account import Failure
from service.encoding.card import square_preprocessing
from service.encoding.images import decode_pixels
from service.encoding.limits import Limits
from service.errors import InvalidSource
from service.sources import open_source
from service.sources.compact import Labels
from service.sources.source import Source
from tests.conftest import encoded, scene
from training import data
from training.checkpoint import Cursor
from training.data import (
    Canvas,
    Loaded,
    batches,
    epoch_order,
    names_checksum,
    open_training_source,
    sample,
    spread,
    to_luminance,
)

Paint = Callable[..., bytes]
Lay = Callable[..., Canvas]
CPU = torch.device("cpu")


@pytest.fixture
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def lay(run_folder: Path) -> Iterator[Lay]:
    """lay(source, side, channels) makes a canvas of the one run's folder; all are closed in the end."""
    made: list[Canvas] = []

    def make(source: Source, side: int = 8, channels: int = 1) -> Canvas:
        made.append(Canvas(source, square_preprocessing(side), channels, run_folder, CPU))
        return made[-1]

    yield make
    for canvas in made:
        canvas.close()


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No canvas is small, and the disk may be filled."""
    monkeypatch.setattr(data, "_SMALL", 0)
    monkeypatch.setattr(data, "_DISK_LEFT", 0)


def counted(source: Source) -> tuple[Source, list[int]]:
    """The source, and the positions read from it, in order of reading."""
    reads: list[int] = []

    def read(position: int) -> bytes:
        reads.append(position)
        return source.read(position)

    return replace(source, read=read), reads


def flawed(source: Source, *bad: int) -> Source:
    """The source with invalid bytes at some positions."""
    return replace(source, read=lambda position: b"no picture" if position in bad else source.read(position))


def in_blocks(source: Source, size: int) -> Source:
    """The source, declared to be cheap to read in blocks of so many pictures."""
    return replace(source, blocks=list(range(0, len(source), size)))


def too_large_to_keep(source: Source, monkeypatch: pytest.MonkeyPatch) -> Source:
    """The source, with more pictures after its own than any machine holds at 512 pixels a side."""
    # The limit keeps the canvas off the disk.
    monkeypatch.setattr(data, "_DISK_LEFT", 2**62)
    codes = np.full(20_000_000, len(source) - 1, np.uint8)
    codes[: len(source)] = np.arange(len(source))
    ids = cast("Sequence[str]", Labels(codes, source.ids))
    return Source(source.name, ids, lambda position: source.read(int(codes[position])), None)


def decoded(source: Source, side: int, channels: int) -> PixelArray:
    """All pixels (N, C, S, S), by the service's function one by one."""
    pixels = [decode_pixels(source.entry(n).data, square_preprocessing(side), Limits()) for n in range(len(source))]
    rgb: PixelArray = np.stack(pixels).transpose(0, 3, 1, 2)
    if channels == 3:
        return rgb
    shares = (rgb.astype(np.float64) * np.array([299, 587, 114])[:, None, None]).sum(1, keepdims=True)
    grey: PixelArray = np.floor(shares / 1000 + 0.5).astype(np.uint8)
    return grey


# Sources


@pytest.mark.parametrize("name", ["mnist/train", "mnist/test[:100]", "cifar10/test", "cifar10/train[:50%]"])
@pytest.mark.usefixtures("offline")
def test_a_set_that_is_not_there_offline_is_one_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSource) as caught:
        open_training_source(name, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{name.split('[')[0]} is not under {tmp_path} and cannot be downloaded: ")
    assert "--data-root" in message
    assert "\n" not in message


def test_other_sources_open_as_in_serving(tmp_path: Path, paint: Paint) -> None:
    picture = paint(tmp_path / "x" / "one.png")
    folder = open_training_source(str(tmp_path), tmp_path)
    assert folder.entry(0) == ("x/one.png", picture, "x")
    digits = open_training_source("digits[10:12]", tmp_path)
    assert list(digits.ids) == ["digits/00010", "digits/00011"]
    with pytest.raises(InvalidSource, match=r"cifar10/valid: no such source"):
        open_training_source("cifar10/valid", tmp_path)


def test_mnist_opens_from_torchvisions_layout(data_root: Path) -> None:
    assert open_training_source("mnist/train[:10]", data_root).labels == list("5041921314")
    source = open_training_source("mnist/test[9990:]", data_root)
    assert len(source) == 10
    assert source.ids[0] == "mnist/test/09990"


def test_a_spread_goes_from_end_to_end() -> None:
    assert spread(np.arange(100, 200), 4).tolist() == [100, 133, 166, 199]
    assert spread(np.arange(3), 4).tolist() == [0, 1, 2]


def test_a_sample_is_spread_over_a_source_and_over_few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = open_source("digits[:1000]")
    assert sample(digits, 4).tolist() == [0, 333, 666, 999]
    assert sample(digits, 2000).tolist() == list(range(1000))
    monkeypatch.setattr(data, "_BLOCKS_MIXED", 3)
    # There are 15 blocks, of which the last is short.
    chosen = sample(in_blocks(digits, 70), 100)
    assert len(set(chosen.tolist())) == 100
    assert sorted({position // 70 for position in chosen.tolist()}) == [0, 7, 14]


def test_the_checksum_of_the_names_tells_sources_apart() -> None:
    first, again, other = (names_checksum(open_source(name)) for name in ("digits[:9]", "digits[:9]", "digits[1:10]"))
    assert first == again != other
    assert names_checksum(open_source("digits[:8]")) != first


# Pixels


def odd_pictures(folder: Path) -> None:
    """Write a picture of each kind that is hard to decode, none of them square."""
    rgb = scene(40, 30, seed=1)
    deep = (np.asarray(rgb.convert("L")).astype(np.uint16) * 257) + 100  # (30, 40), 16 bit
    sideways = Image.Exif()
    # Orientation 6 turns the picture by 90 degrees.
    sideways[0x0112] = 6
    see_through = rgb.convert("RGBA")
    see_through.putalpha(scene(40, 30, seed=2).convert("L"))
    for name, content in {
        "a/plain.png": encoded(rgb),
        "b/grey.png": encoded(rgb.convert("L")),
        "c/rgba.png": encoded(see_through),
        "d/cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "e/sixteen.png": encoded(Image.fromarray(deep)),
        "f/palette.png": encoded(rgb.quantize(12)),
        "g/turned.jpg": encoded(rgb, "JPEG", exif=sideways),
        # The picture is large enough to be decoded at half its size.
        "h/large.jpg": encoded(scene(700, 600, seed=3), "JPEG"),
        "i/lossy.webp": encoded(scene(20, 90, seed=4), "WEBP"),
    }.items():
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_canvas_holds_the_services_pixels(channels: int, tmp_path: Path, lay: Lay) -> None:
    odd_pictures(tmp_path)
    source = open_source(str(tmp_path))
    assert len(source) == 9
    pixels, positions = lay(source, 16, channels).take(np.arange(9))
    assert pixels.dtype == torch.uint8
    assert positions.tolist() == list(range(9))
    np.testing.assert_array_equal(pixels.numpy(), decoded(source, 16, channels))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_canvas_on_disk_and_none_at_all_give_the_same_pixels(
    channels: int, tmp_path: Path, lay: Lay, on_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd_pictures(tmp_path)
    source = open_source(str(tmp_path))
    wanted = np.array([7, 0, 3, 8])
    kept = lay(source, 16, channels)
    assert kept.residence == "disk"
    np.testing.assert_array_equal(kept.take(wanted)[0].numpy(), decoded(source, 16, channels)[wanted])
    unkept = lay(too_large_to_keep(source, monkeypatch), 512, channels)
    assert unkept.residence == "nowhere"
    np.testing.assert_array_equal(unkept.take(wanted)[0].numpy(), decoded(source, 512, channels)[wanted])


def test_pixels_come_in_the_order_that_was_asked_for(lay: Lay) -> None:
    source = open_source("digits[:200]")
    # Position 3 is requested twice.
    canvas, wanted = lay(source), np.array([150, 3, 77, 3])
    # The pixels are first decoded, then kept.
    for _ in range(2):
        pixels, positions = canvas.take(wanted)
        assert positions.tolist() == wanted.tolist()
        np.testing.assert_array_equal(pixels.numpy(), decoded(source, 8, 1)[wanted])


def test_digits_at_their_own_size_come_through_exactly(lay: Lay) -> None:
    pixels, _ = lay(open_source("digits")).take(np.arange(1797))
    expected = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    np.testing.assert_array_equal(pixels[:, 0].numpy(), expected)


def test_every_grey_stays_what_it_was() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(to_luminance(np.repeat(grey[..., None], 3, axis=2)), grey)


def test_luminance_is_pillows_to_the_nearest_step() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    expected = np.stack([np.asarray(Image.fromarray(picture).convert("L"), np.int32) for picture in pixels])
    found = to_luminance(pixels)
    assert found.shape == (2, 64, 64)
    assert found.dtype == np.uint8
    difference = np.abs(found.astype(np.int32) - expected)
    assert difference.max() <= 1
    # Pillow rounds in 16 bits.
    assert (difference > 0).mean() < 0.01


# Decoded once


def test_in_memory_a_picture_is_read_once(lay: Lay) -> None:
    source, reads = counted(open_source("digits[:300]"))
    canvas = lay(source)
    assert canvas.residence == "memory"
    for wanted in (np.arange(0, 200), np.arange(100, 300), np.arange(300)[::-1]):
        canvas.take(wanted)
    assert Counter(reads) == dict.fromkeys(range(300), 1)


def test_on_disk_a_picture_is_read_once(lay: Lay, on_disk: None, run_folder: Path) -> None:
    source, reads = counted(open_source("digits[:300]"))
    canvas = lay(source)
    assert canvas.residence == "disk"
    assert (run_folder / "canvas.bin").stat().st_size == 300 * 64
    for wanted in (np.arange(0, 200), np.arange(100, 300), np.arange(300)[::-1]):
        canvas.take(wanted)
    assert Counter(reads) == dict.fromkeys(range(300), 1)


def test_kept_nowhere_a_picture_is_read_at_every_take(lay: Lay, monkeypatch: pytest.MonkeyPatch) -> None:
    source, reads = counted(open_source("digits[:9]"))
    canvas = lay(too_large_to_keep(source, monkeypatch), 512, 3)
    for _ in range(3):
        canvas.take(np.arange(4))
    assert Counter(reads) == dict.fromkeys(range(4), 3)


def test_nothing_is_read_before_it_is_wanted(lay: Lay) -> None:
    source, reads = counted(open_source("digits[:300]"))
    canvas = lay(source)
    assert not reads
    assert canvas.untouched() == 300
    canvas.take(np.array([5, 17]))
    assert sorted(reads) == [5, 17]
    assert canvas.untouched() == 298


def test_what_is_kept_nowhere_has_nothing_left_to_decode_once(lay: Lay, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lay(too_large_to_keep(open_source("digits[:9]"), monkeypatch), 512).untouched() == 0


@pytest.mark.parametrize("wanted", [[9], [8, 15], [9, 10, 3]])
def test_where_pictures_lie_in_blocks_the_first_touch_reads_its_block(
    wanted: list[int], tmp_path: Path, lay: Lay
) -> None:
    pictures = [{"bytes": encoded(scene(9, 9, seed)), "path": f"{seed:02d}.png"} for seed in range(20)]
    pq.write_table(pa.table({"image": pictures}), tmp_path / "a.parquet", row_group_size=8)
    source, reads = counted(open_source(str(tmp_path / "a.parquet")))
    assert source.blocks == [0, 8, 16]
    canvas = lay(source, 8, 3)
    pixels, positions = canvas.take(np.array(wanted))
    assert positions.tolist() == wanted
    np.testing.assert_array_equal(pixels.numpy(), decoded(source, 8, 3)[wanted])
    # decoded() has read all of them.
    del reads[-20:]
    blocks = {position // 8 for position in wanted}
    assert Counter(reads) == dict.fromkeys([n for n in range(20) if n // 8 in blocks], 1)
    reads.clear()
    # The last block is short.
    canvas.take(np.array([*range(8, 16), 19]))
    assert Counter(reads) == dict.fromkeys(range(16, 20), 1)


def test_two_threads_may_take_at_once(lay: Lay) -> None:
    """Online k-NN reads pixels while the next batch is being made."""
    source = open_source("digits[:600]")
    canvas, expected, wrong = lay(source), decoded(source, 8, 1), []

    def take(order: IntArray) -> None:
        for start in range(0, 600, 50):
            pixels, positions = canvas.take(order[start : start + 50])
            if len(positions) != 50 or not np.array_equal(pixels.numpy(), expected[positions]):
                wrong.append(positions)

    orders = [np.random.default_rng(seed).permutation(600) for seed in range(3)]
    threads = [threading.Thread(target=take, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Residence of the pixels


def test_a_small_canvas_is_in_memory_and_a_larger_one_on_disk(
    lay: Lay, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source("digits[:10]")  # 640 bytes
    monkeypatch.setattr(data, "_DISK_LEFT", 0)
    monkeypatch.setattr(data, "_SMALL", 640)
    assert lay(source).residence == "memory"
    assert not (run_folder / "canvas.bin").exists()
    monkeypatch.setattr(data, "_SMALL", 639)
    assert lay(source).residence == "disk"
    assert (run_folder / "canvas.bin").stat().st_size == 640


def test_where_the_disk_is_needed_for_checkpoints_memory_does(
    lay: Lay, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_SMALL", 0)
    monkeypatch.setattr(data, "_DISK_LEFT", 2**62)
    assert lay(open_source("digits[:10]")).residence == "memory"
    assert not (run_folder / "canvas.bin").exists()


def test_a_disk_that_will_not_take_the_canvas_is_left_for_memory(
    lay: Lay, on_disk: None, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_source("digits[:10]")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The canvas needs 2.5 MiB.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        canvas = lay(source, 512)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert canvas.residence == "memory"
    assert "in memory" in capsys.readouterr().err
    assert not (run_folder / "canvas.bin").exists()
    np.testing.assert_array_equal(canvas.take(np.arange(10))[0].numpy(), decoded(source, 512, 1))


def test_a_canvas_left_by_another_run_is_made_to_fit(lay: Lay, on_disk: None, run_folder: Path) -> None:
    (run_folder / "canvas.bin").write_bytes(b"\xff" * 5000)
    source = open_source("digits[:10]")
    canvas = lay(source)
    np.testing.assert_array_equal(canvas.take(np.arange(10))[0].numpy(), decoded(source, 8, 1))
    assert (run_folder / "canvas.bin").stat().st_size == 640


def test_its_size_and_place_are_said_in_one_line(
    lay: Lay, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_source("digits[:80]")
    lay(source, 128)
    assert capsys.readouterr().err == "digits[:80]: 80 pictures, 1 MiB decoded, in memory\n"
    monkeypatch.setattr(data, "_SMALL", 0)
    monkeypatch.setattr(data, "_DISK_LEFT", 0)
    lay(source, 128, 3)
    where = run_folder / "canvas.bin"
    assert capsys.readouterr().err == f"digits[:80]: 80 pictures, 4 MiB decoded, in {where}\n"
    lay(too_large_to_keep(source, monkeypatch), 512)
    line = capsys.readouterr().err
    assert line == "digits[:80]: 20000000 pictures, 5000000 MiB decoded, kept nowhere: decoded at each epoch\n"


def test_removing_a_canvas_removes_its_file_and_closing_does_not(lay: Lay, on_disk: None, run_folder: Path) -> None:
    canvas = lay(open_source("digits[:10]"))
    canvas.close()
    assert (run_folder / "canvas.bin").exists()
    canvas.remove()
    assert not (run_folder / "canvas.bin").exists()


# Bad pictures


def test_a_bad_picture_is_passed_over_and_named(tmp_path: Path, paint: Paint, lay: Lay, run_folder: Path) -> None:
    for number in range(60):
        paint(tmp_path / f"{number:02d}.png", seed=number)
    whole = decoded(open_source(str(tmp_path)), 8, 3)
    source = open_source(str(tmp_path))
    # This file is cut short.
    (tmp_path / "07.png").write_bytes((tmp_path / "07.png").read_bytes()[:100])
    (tmp_path / "31.png").write_bytes(b"")
    (tmp_path / "44.png").unlink()
    # 3 bad pictures of 60 are 5 %, the largest share allowed.
    canvas = lay(source, 8, 3)
    good = np.setdiff1d(np.arange(60), [7, 31, 44])
    # The bad pictures are first found, then known.
    for _ in range(2):
        pixels, positions = canvas.take(np.arange(60))
        np.testing.assert_array_equal(positions, good)
        np.testing.assert_array_equal(pixels.numpy(), whole[good])
    assert sorted(canvas.bad) == [7, 31, 44]
    canvas.list_bad(run_folder / "bad.txt")
    lines = (run_folder / "bad.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["07.png", "31.png", "44.png"]
    assert [line.split("\t")[1] for line in lines] == [canvas.bad[at].error for at in (7, 31, 44)]
    assert lines[0].startswith("07.png\tthe picture is damaged or cut short: ")
    assert lines[1] == "31.png\texpected the bytes of a picture, got none"
    assert lines[2].startswith("44.png\tcannot be read: ")


def test_the_list_of_bad_pictures_is_text_whatever_their_names(lay: Lay, run_folder: Path, tmp_path: Path) -> None:
    for name in (b"a.png", b"caf\xe9.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(encoded(scene()) if name == b"a.png" else b"")
    canvas = lay(open_source(str(tmp_path)))
    with pytest.raises(InvalidSource, match="1 of 2 pictures are bad"):
        canvas.take(np.arange(2))
    canvas.list_bad(run_folder / "bad.txt")
    assert (run_folder / "bad.txt").read_text() == "caf\\xe9.png\texpected the bytes of a picture, got none\n"


def test_without_bad_pictures_there_is_no_list(lay: Lay, run_folder: Path) -> None:
    canvas = lay(open_source("digits[:20]"))
    canvas.take(np.arange(20))
    canvas.list_bad(run_folder / "bad.txt")
    assert not (run_folder / "bad.txt").exists()


def test_a_bad_picture_is_not_read_twice(lay: Lay, monkeypatch: pytest.MonkeyPatch) -> None:
    source, reads = counted(flawed(open_source("digits[:40]"), 7))
    kept, unkept = lay(source), lay(too_large_to_keep(source, monkeypatch), 512)
    for canvas in (kept, unkept):
        for _ in range(3):
            assert canvas.take(np.array([6, 7, 8]))[1].tolist() == [6, 8]
    assert (kept.residence, unkept.residence) == ("memory", "nowhere")
    # Each canvas reads the bad picture once.
    assert reads.count(7) == 2


def test_more_than_a_twentieth_bad_ends_it_with_the_count_and_the_first(lay: Lay) -> None:
    with pytest.raises(InvalidSource) as caught:
        lay(flawed(open_source("digits[:40]"), 11, 3, 22)).take(np.arange(40))
    assert str(caught.value).startswith(
        "digits[:40]: 3 of 40 pictures are bad, more than 5%; mend or remove them. "
        "The first: digits/00003: not a picture that we take"
    )


def test_a_twentieth_bad_does_not_end_it(lay: Lay) -> None:
    assert len(lay(flawed(open_source("digits[:40]"), 11, 3)).take(np.arange(40))[1]) == 38


def test_nothing_but_bad_pictures(lay: Lay) -> None:
    with pytest.raises(InvalidSource, match="1 of 1 pictures are bad"):
        lay(flawed(open_source("digits[:1]"), 0)).take(np.arange(1))


def test_of_many_pictures_the_first_thousand_are_waited_for(lay: Lay) -> None:
    """Fifty bad ones at the very beginning may be the only ones."""
    canvas = lay(flawed(open_source("digits"), *range(51)))
    assert len(canvas.take(np.arange(100)[:50])[1]) == 0
    with pytest.raises(InvalidSource, match="51 of 51 pictures are bad"):
        canvas.take(np.array([50]))


def test_the_share_is_that_of_all_pictures_looked_at(lay: Lay) -> None:
    """80 of 1797 are 4.5 %; good and bad ones are decoded in one call."""
    canvas = lay(flawed(open_source("digits"), *range(0, 1600, 20)))
    assert len(canvas.take(np.arange(1797))[1]) == 1717


@pytest.mark.parametrize("touched_again", [[1], list(range(1000))])
def test_a_resumed_run_judges_by_all_that_the_earlier_one_saw(touched_again: list[int], lay: Lay) -> None:
    """Pixels in memory are lost with their run, but the count of 80 bad ones among 1797 is kept."""
    source = flawed(open_source("digits"), *range(0, 1600, 20))
    earlier = lay(source)
    # The good pictures of each part count when the next part is judged.
    for start in range(1796, -1, -50):
        earlier.take(np.arange(start, max(start - 50, -1), -1))
    resumed = lay(source)
    resumed.load_state(earlier.state())
    assert len(resumed.bad) == 80
    assert len(resumed.take(np.array(touched_again))[1]) == sum(position % 20 > 0 for position in touched_again)


# The canvas of a resumed run


def test_on_disk_a_resumed_run_reads_only_what_is_left(lay: Lay, on_disk: None) -> None:
    source = flawed(open_source("digits[:100]"), 30, 60)
    first = lay(source)
    first.take(np.arange(50))
    state = first.state()
    first.close()
    again, reads = counted(source)
    second = lay(again)
    second.load_state(state)
    assert second.untouched() == 50
    pixels, positions = second.take(np.arange(100))
    # A resumed canvas does not read even the bad picture again.
    assert sorted(reads) == list(range(50, 100))
    good = np.setdiff1d(np.arange(100), [30, 60])
    np.testing.assert_array_equal(positions, good)
    np.testing.assert_array_equal(pixels.numpy(), decoded(open_source("digits[:100]"), 8, 1)[good])
    assert sorted(second.bad) == [30, 60]


def test_in_memory_a_resumed_run_decodes_anew_and_knows_the_bad_ones(lay: Lay) -> None:
    source = flawed(open_source("digits[:100]"), 30, 60)
    first = lay(source)
    first.take(np.arange(50))
    again, reads = counted(source)
    second = lay(again)
    second.load_state(first.state())
    assert second.bad == first.bad
    assert second.take(np.arange(100))[1].tolist() == [n for n in range(100) if n not in (30, 60)]
    assert sorted(reads) == [n for n in range(100) if n != 30]


def test_bad_pictures_of_earlier_versions_are_taken_over(lay: Lay) -> None:
    canvas = lay(open_source("digits[:10]"))
    # They had the reasons alone.
    canvas.load_state(canvas.state() | {"bad": {3: "no picture"}})
    assert canvas.bad == {3: Failure("digits/00003", "no picture", "")}


def test_a_canvas_that_was_on_disk_and_is_in_memory_now_is_decoded_anew(
    lay: Lay, on_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source("digits[:100]")
    first = lay(source)
    first.take(np.arange(100))
    monkeypatch.setattr(data, "_SMALL", 2**20)
    second = lay(source)
    assert second.residence == "memory"
    second.load_state(first.state())
    np.testing.assert_array_equal(second.take(np.arange(100))[0].numpy(), decoded(source, 8, 1))


def test_a_canvas_whose_file_is_gone_is_decoded_anew(lay: Lay, on_disk: None, run_folder: Path) -> None:
    source = open_source("digits[:100]")
    first = lay(source)
    first.take(np.arange(100))
    state = first.state()
    first.remove()
    second = lay(source)
    second.load_state(state)
    np.testing.assert_array_equal(second.take(np.arange(100))[0].numpy(), decoded(source, 8, 1))


def test_the_state_goes_through_a_checkpoint(lay: Lay) -> None:
    canvas = lay(flawed(open_source("digits[:40]"), 9))
    canvas.take(np.arange(40))
    buffer = io.BytesIO()
    torch.save(canvas.state(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other = lay(canvas.source)
    other.load_state(state)
    assert other.bad == canvas.bad


# Batches


def taken(canvas: Canvas, count: int, size: int, seed: int = 0, cursor: Cursor | None = None) -> Iterator[Loaded]:
    return batches(canvas, np.arange(count), size, seed, cursor or Cursor())


@pytest.mark.parametrize(("count", "size"), [(10, 3), (12, 4), (5, 5)])
def test_an_epoch_takes_each_picture_at_most_once(count: int, size: int, lay: Lay) -> None:
    per_epoch = count // size
    order = taken(lay(open_source(f"digits[:{count}]")), count, size)
    epochs = [list(islice(order, per_epoch)) for _ in range(60)]
    for number, epoch in enumerate(epochs):
        assert all(batch.pixels.shape == (size, 1, 8, 8) for batch in epoch)
        assert all(batch.cursor.epoch == number for batch in epoch)
        positions = np.concatenate([batch.positions for batch in epoch]).tolist()
        assert len(set(positions)) == len(positions) == per_epoch * size
        assert set(positions) <= set(range(count))
    orders = [tuple(position for batch in epoch for position in batch.positions.tolist()) for epoch in epochs]
    # Each epoch has a new order.
    assert len(set(orders)) > 30
    # Each epoch leaves out other pictures.
    assert set().union(*orders) == set(range(count))


def test_a_batch_holds_the_pixels_of_its_positions(lay: Lay) -> None:
    source = open_source("digits[:50]")
    expected = decoded(source, 8, 1)
    for batch in islice(taken(lay(source), 50, 7), 20):
        np.testing.assert_array_equal(batch.pixels.numpy(), expected[batch.positions])


def test_only_the_named_positions_are_batched(lay: Lay) -> None:
    among = np.arange(0, 100, 3)
    drawn = islice(batches(lay(open_source("digits[:100]")), among, 10, 0, Cursor()), 9)
    assert {position for batch in drawn for position in batch.positions.tolist()} <= set(among.tolist())


def test_the_order_depends_on_seed_and_epoch_alone(lay: Lay) -> None:
    source = open_source("digits[:50]")
    used = lay(source)
    used.take(np.arange(0, 50, 2))
    first, second, other = taken(lay(source), 50, 7, 4), taken(used, 50, 7, 4), taken(lay(source), 50, 7, 5)
    epochs = [[batch.positions.tolist() for batch in islice(order, 14)] for order in (first, second, other)]
    assert epochs[0] == epochs[1] != epochs[2]
    third_epoch = taken(lay(source), 50, 7, 4, Cursor(1, 0))
    assert [batch.positions.tolist() for batch in islice(third_epoch, 7)] == epochs[0][7:]


def test_pictures_in_blocks_come_from_a_few_blocks_at_a_time_until_all_are_decoded(
    lay: Lay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_BLOCKS_MIXED", 3)
    canvas = lay(in_blocks(open_source("digits[:120]"), 10))
    among = np.setdiff1d(np.arange(120), [4, 55])
    first, again, second = (epoch_order(among, 0, epoch, canvas).tolist() for epoch in (0, 0, 1))
    assert first == again
    # A window has three blocks; two pictures are missing.
    windows = [first[start : start + 30] for start in range(0, 90, 30)]
    assert sorted(first) == sorted(second) == among.tolist()
    assert all(len({position // 10 for position in window}) <= 4 for window in windows)
    assert len({position // 10 for position in second[:30]}) > 6
    near = sum(abs(one - other) < 10 for one, other in pairwise(first))
    # The three blocks are mixed, not one after the other.
    assert near < 80
    assert epoch_order(among, 1, 0, canvas).tolist() != first


def test_pictures_in_blocks_that_are_kept_nowhere_come_so_in_every_epoch(
    lay: Lay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_BLOCKS_MIXED", 3)
    source = in_blocks(open_source("digits[:120]"), 10)
    canvas = lay(replace(too_large_to_keep(source, monkeypatch), blocks=source.blocks), 512)
    orders = [epoch_order(np.arange(120), 0, epoch, canvas).tolist() for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(120))
        assert all(len({n // 10 for n in order[start : start + 30]}) == 3 for start in range(0, 120, 30))
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("bad", [(), (3, 8, 31)])
@pytest.mark.parametrize("size", [None, 9])
def test_from_any_cursor_the_order_goes_on_as_it_would_have(bad: tuple[int, ...], size: int | None, lay: Lay) -> None:
    source = flawed(open_source("digits[:60]"), *bad)
    source = in_blocks(source, size) if size else source

    def facts(loaded: list[Loaded]) -> list[tuple[list[int], Cursor]]:
        return [(batch.positions.tolist(), batch.cursor) for batch in loaded]

    # These are three epochs.
    whole = facts(list(islice(taken(lay(source), 60, 8), 21)))
    for done, (_, cursor) in enumerate(whole[:17], start=1):
        rest = facts(list(islice(taken(lay(source), 60, 8, cursor=cursor), 4)))
        assert rest == whole[done : done + 4]


def test_batches_stay_whole_around_bad_pictures(lay: Lay) -> None:
    bad = (1, 20, 40, 79)
    order = taken(lay(flawed(open_source("digits[:80]"), *bad)), 80, 9)
    seen: dict[int, list[int]] = {}
    for batch in islice(order, 40):
        assert batch.pixels.shape[0] == len(batch.positions) == 9
        seen.setdefault(batch.cursor.epoch, []).extend(batch.positions.tolist())
    for positions in seen.values():
        assert len(set(positions)) == len(positions)
        assert not set(positions) & set(bad)


def test_bad_pictures_known_before_or_not_leave_the_same_order(lay: Lay) -> None:
    source = flawed(open_source("digits[:80]"), 1, 20, 40, 79)
    known = lay(source)
    known.take(np.arange(80))
    found_out, told = taken(lay(source), 80, 9), taken(known, 80, 9)
    for first, second in islice(zip(found_out, told, strict=False), 24):
        assert first.positions.tolist() == second.positions.tolist()
        assert first.cursor == second.cursor


def test_too_few_good_pictures_for_a_batch_are_one_sentence(lay: Lay) -> None:
    canvas = lay(flawed(open_source("digits[:20]"), 4))
    with pytest.raises(InvalidSource) as caught:
        next(taken(canvas, 20, 20))
    assert str(caught.value) == "digits[:20]: 19 pictures can be used, a batch needs 20"
    assert len(next(taken(canvas, 20, 19)).positions) == 19
