"""lookalike whiten: a new encoder from an old one and pictures, written whole or not at all."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from service.encoding.card import read_card
from service.encoding.encoder import Encoder
from service.encoding.images import decode_pixels
from service.encoding.limits import Limits
from service.encoding.variants import embed_pixels
from service.encoding.voting import headline_accuracy
from service.encoding.whitening import learn_whitening, remove_whitening, without_whitening
from service.errors import InvalidModel, InvalidOutput, InvalidRequest, InvalidSource
from service.jobs.whiten import whiten
from service.settings import Settings
from service.sources import open_source
from service.sources.source import LeftOut, Source
from tests.conftest import MODEL, encoded, scene
from tests.service.jobs.test_embed import counts

SETTINGS = Settings(device="cpu")


@pytest.fixture(scope="module")
def digits() -> Source:
    return open_source("digits[:800]")


@pytest.fixture(scope="module")
def whitened(digits: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whitened") / "for-digits"
    assert counts(whiten(MODEL, digits, out, SETTINGS)) == (720, 0, 80, 0)
    return out


def test_the_new_encoder_is_the_old_one_and_what_numpy_learns(whitened: Path, digits: Source) -> None:
    card, bare = read_card(whitened), without_whitening(read_card(MODEL))
    assert card.name == "for-digits"
    assert card.facts["whitening"] == {
        # This is the fingerprint of models/mnist before its whitening.
        "of": "dd62e032364f059b0f6d2a9b85f73e00d66dc19c248dfc8a5585a92ba0a77d63",
        "source": "digits[:800]",
        "pictures": 720,
        "power": 0.5,
        "dimension": 256,
    }
    assert card.facts["data"] == read_card(MODEL).facts["data"]
    pixels = [decode_pixels(digits.entry(n).data, card.preprocessing, Limits()) for n in range(800)]
    before = embed_pixels(Encoder(bare, "cpu"), np.stack(pixels), "embedding")
    learnt = learn_whitening(np.delete(before, np.s_[5::10], axis=0), 0.5, 256)
    after = embed_pixels(Encoder(card, "cpu"), np.stack(pixels), "embedding")
    np.testing.assert_allclose(after, learnt.apply(before), atol=1e-4)
    assert abs(float(np.median(after @ after.T))) < 0.05 < float(np.median(before @ before.T))


@pytest.mark.slow("learns a whitening twice")
def test_it_is_bit_stable(whitened: Path, digits: Source, tmp_path: Path) -> None:
    whiten(MODEL, digits, tmp_path / "for-digits", SETTINGS)
    for file in ("model.onnx", "card.json"):
        assert (tmp_path / "for-digits" / file).read_bytes() == (whitened / file).read_bytes()


@pytest.mark.slow("learns a whitening twice")
def test_an_earlier_whitening_is_replaced(whitened: Path, digits: Source, tmp_path: Path) -> None:
    whiten(whitened, digits, tmp_path / "for-digits", SETTINGS)
    assert (tmp_path / "for-digits" / "model.onnx").read_bytes() == (whitened / "model.onnx").read_bytes()
    assert remove_whitening(without_whitening(read_card(whitened)).model) is None


@pytest.mark.slow("embeds all digits with two encoders and counts neighbours")
def test_it_names_more_digits_rightly(digits: Source, whitened: Path) -> None:
    rest = open_source("digits[800:]")
    assert digits.labels is not None
    assert rest.labels is not None

    def accuracy(encoder: Encoder) -> float:
        sides = [
            embed_pixels(
                encoder,
                np.stack([decode_pixels(s.entry(n).data, encoder.card.preprocessing, Limits()) for n in range(len(s))]),
                "embedding",
            )
            for s in (digits, rest)
        ]
        return headline_accuracy(sides[0], digits.labels.codes, sides[1], rest.labels.codes)  # type: ignore[union-attr]

    bare = without_whitening(read_card(MODEL))
    assert accuracy(Encoder(read_card(whitened), "cpu")) > accuracy(Encoder(bare, "cpu"))


def test_variants_are_measured_behind_it(whitened: Path) -> None:
    card = read_card(whitened)
    figures = card.facts["quality"]
    for variant, file in (("fp16", "model.fp16.onnx"), ("int8", "model.int8.onnx")):
        assert figures[file]["pictures"] == 80
        assert "knn" in figures[file]
        assert figures[file]["belongs"] == (variant in card.variants)
    assert Encoder(card, "cpu", "fp16").dimension == 256


def test_few_pictures_teach_the_mean_alone_and_too_few_nothing(tmp_path: Path) -> None:
    few = open_source("digits[:100]")
    few = Source(few.name, few.ids, few.read, few.labels, left_out=[LeftOut("b.raw", "RAW", True)])
    assert whiten(MODEL, few, tmp_path / "centred", SETTINGS).lost == 1
    told = read_card(tmp_path / "centred").facts["whitening"]
    assert (told["power"], told["dimension"], told["pictures"]) == (0.0, 256, 90)
    with pytest.raises(InvalidSource, match=r"digits\[:22\]: 20 pictures .*|19 pictures are too few to learn"):
        whiten(MODEL, open_source("digits[:21]"), tmp_path / "none", SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["centred", "centred.left_out.jsonl"]


def test_what_cannot_be_is_refused_and_leaves_nothing(whitened: Path, digits: Source, tmp_path: Path) -> None:
    with pytest.raises(InvalidOutput, match="is there already"):
        whiten(MODEL, digits, whitened, SETTINGS)
    with pytest.raises(InvalidRequest, match="--dimension: expected 1 to 256, got 257"):
        whiten(MODEL, digits, tmp_path / "out", SETTINGS, dimension=257)
    with pytest.raises(InvalidSource, match="90 pictures to learn on do not show 128 directions"):
        whiten(MODEL, open_source("digits[:100]"), tmp_path / "out", SETTINGS, 0.5, 128)
    with_text = Path(shutil.copytree(MODEL, tmp_path / "text"))
    (with_text / "text.onnx").write_bytes(b"a tower")
    with pytest.raises(InvalidModel, match="has a text tower"):
        whiten(with_text, digits, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


def test_an_encoder_is_overwritten_only_when_asked(digits: Source, tmp_path: Path) -> None:
    out = Path(shutil.copytree(MODEL, tmp_path / "out"))
    before = (out / "model.onnx").read_bytes()
    with pytest.raises(InvalidOutput, match="out: is there already; replace it with --overwrite"):
        whiten(MODEL, digits, out, SETTINGS)
    with pytest.raises(InvalidSource, match="too few"):
        whiten(MODEL, open_source("digits[:10]"), out, SETTINGS, overwrite=True)
    assert (out / "model.onnx").read_bytes() == before
    whiten(MODEL, open_source("digits[:100]"), out, SETTINGS, overwrite=True)
    assert read_card(out).facts["whitening"]["source"] == "digits[:100]"
    with pytest.raises(InvalidOutput, match="is not a model folder"):
        whiten(MODEL, digits, tmp_path, SETTINGS, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_pictures_that_are_all_alike_teach_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(40):
        (folder / f"{n}.png").write_bytes(encoded(scene()))
    with pytest.raises(InvalidModel, match="the same embedding"):
        whiten(MODEL, open_source(str(folder)), tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


def test_pictures_that_cannot_be_read_are_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(40):
        (folder / f"{n:02}.png").write_bytes(encoded(scene(seed=n)) if n % 10 else b"no picture")
    assert counts(whiten(MODEL, open_source(str(folder)), tmp_path / "out", SETTINGS)) == (32, 0, 4, 4)
    assert "skipped 20.png: not a picture that we take" in capsys.readouterr().err
    told = json.loads((tmp_path / "out" / "card.json").read_text())["whitening"]
    assert told["pictures"] == 32
    rows = [json.loads(line) for line in (tmp_path / "out.left_out.jsonl").read_text().splitlines()]
    assert [(row["id"], row["reason"]) for row in rows] == [
        (f"{n}0.png", "not a picture that we take") for n in range(4)
    ]
