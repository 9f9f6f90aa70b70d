"""SOURCE → canvas: decoded by the service's own function, bad pictures passed over, batches without repeats."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from service.errors import InvalidSource
from service.images import Limits, decode, to_pixels, tones
from service.sources import open_source
from training.data import batches, decode_canvas, open_training_source, to_luminance
from training.export import square_preprocessing

Paint = Callable[..., bytes]


def test_the_canvas_holds_the_services_pixels(tmp_path: Path, paint: Paint) -> None:
    files = {
        "a.png": paint(tmp_path / "a.png", 40, 30, seed=1),
        "b/wide.jpg": paint(tmp_path / "b" / "wide.jpg", 20, 90, seed=2),
        "c.jpg": paint(tmp_path / "c.jpg", 700, 600, seed=3),  # large enough to be decoded at half its size
        "d.webp": paint(tmp_path / "d.webp", 9, 9, seed=4),
    }
    preprocessing = square_preprocessing(16)
    served = np.stack([to_pixels(decode(data, 16, Limits()), preprocessing) for data in files.values()])
    source = open_source(str(tmp_path))
    assert list(source.ids) == list(files)
    canvas = decode_canvas(source, preprocessing, 3)
    assert canvas.pixels.dtype == torch.uint8
    assert canvas.pixels.shape == (4, 3, 16, 16)
    np.testing.assert_array_equal(canvas.pixels.permute(0, 2, 3, 1).numpy(), served)
    assert canvas.tones == pytest.approx(tones(served), abs=2e-4)
    assert sum(canvas.tones) == pytest.approx(1, abs=1e-3)


def test_digits_at_their_own_size_come_through_exactly() -> None:
    canvas = decode_canvas(open_source("digits"), square_preprocessing(8), 1)
    expected = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    np.testing.assert_array_equal(canvas.pixels[:, 0].numpy(), expected)


def test_every_grey_stays_what_it_was() -> None:
    grey = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    assert torch.equal(to_luminance(grey.expand(3, 16, 16)), grey)


def test_luminance_is_pillows_to_the_nearest_step() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).convert("L"), np.int32)
    found = to_luminance(torch.from_numpy(pixels).permute(2, 0, 1))
    assert found.shape == (1, 64, 64)
    difference = np.abs(found[0].numpy().astype(np.int32) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01  # Pillow rounds in 16 bits


def test_a_bad_picture_is_passed_over_and_named(
    tmp_path: Path, paint: Paint, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(20):
        paint(tmp_path / f"{number:02d}.png", seed=number)
    good = decode_canvas(open_source(str(tmp_path)), square_preprocessing(8), 3)
    (tmp_path / "07.png").write_bytes((tmp_path / "07.png").read_bytes()[:100])  # cut short
    canvas = decode_canvas(open_source(str(tmp_path)), square_preprocessing(8), 3)  # 1 of 20: 5 %, not over
    assert torch.equal(canvas.pixels, torch.cat([good.pixels[:7], good.pixels[8:]]))
    assert "skipped 07.png: the picture is damaged" in capsys.readouterr().err


def test_too_many_bad_pictures_end_it(tmp_path: Path, paint: Paint) -> None:
    for number in range(20):
        paint(tmp_path / f"{number:02d}.png", seed=number)
    (tmp_path / "03.png").write_bytes(b"")
    (tmp_path / "11.png").write_bytes(b"no picture")
    with pytest.raises(InvalidSource, match="2 of 20 pictures are bad"):
        decode_canvas(open_source(str(tmp_path)), square_preprocessing(8), 3)


def test_nothing_but_bad_pictures(tmp_path: Path) -> None:
    (tmp_path / "only.png").write_bytes(b"no picture")
    with pytest.raises(InvalidSource, match="1 of 1 pictures are bad"):
        decode_canvas(open_source(str(tmp_path)), square_preprocessing(8), 1)


@pytest.mark.parametrize(("count", "size"), [(10, 3), (12, 4), (5, 5)])
def test_an_epoch_takes_each_picture_at_most_once(count: int, size: int) -> None:
    per_epoch = count // size
    order = batches(count, size, torch.Generator().manual_seed(0))
    epochs = [list(islice(order, per_epoch)) for _ in range(60)]
    for epoch in epochs:
        assert all(batch.shape == (size,) for batch in epoch)
        positions = torch.cat(epoch).tolist()
        assert len(set(positions)) == per_epoch * size
        assert set(positions) <= set(range(count))
    assert len({tuple(torch.cat(epoch).tolist()) for epoch in epochs}) > 30  # a new order each time
    seen = {position for epoch in epochs for batch in epoch for position in batch.tolist()}
    assert seen == set(range(count))  # the rest that is left out is another each time


def test_the_same_seed_gives_the_same_order() -> None:
    first, second = (batches(50, 7, torch.Generator().manual_seed(4)) for _ in range(2))
    for _ in range(20):
        assert torch.equal(next(first), next(second))


@pytest.mark.parametrize("name", ["mnist/train", "mnist/test[:100]", "cifar10/test", "cifar10/train[:50%]"])
def test_a_set_that_is_not_there_offline_is_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for scheme in ("http_proxy", "https_proxy"):  # a port where nobody listens: no network, on any machine
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")
        monkeypatch.setenv(scheme.upper(), "http://127.0.0.1:9")
    for scheme in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(scheme, raising=False)
    with pytest.raises(InvalidSource) as caught:
        open_training_source(name, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{name.split('[')[0]} is not under {tmp_path} and cannot be downloaded: ")
    assert "--data-root" in message
    assert "\n" not in message


def test_other_sources_open_as_in_serving(tmp_path: Path, paint: Paint) -> None:
    data = paint(tmp_path / "x" / "one.png")
    folder = open_training_source(str(tmp_path), tmp_path)
    assert folder.entry(0) == ("x/one.png", data, "x")
    digits = open_training_source("digits[10:12]", tmp_path)
    assert list(digits.ids) == ["digits/00010", "digits/00011"]
    with pytest.raises(InvalidSource, match=r"cifar10/valid: no such source"):
        open_training_source("cifar10/valid", tmp_path)


def test_mnist_opens_from_torchvisions_layout(data_root: Path) -> None:
    assert open_training_source("mnist/train[:10]", data_root).labels == list("5041921314")
    source = open_training_source("mnist/test[9990:]", data_root)
    assert len(source) == 10
    assert source.ids[0] == "mnist/test/09990"
