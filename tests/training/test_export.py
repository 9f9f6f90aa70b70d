"""An exported folder fulfils the contract, is checked against torch, and appears whole or not at all."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from service.encoding.card import Card, read_card, square_preprocessing
from service.encoding.encoder import Encoder as ServedEncoder
from service.encoding.images import decode, to_pixels
from service.encoding.limits import Limits
from service.encoding.variants import Pictures
from service.errors import InvalidModel, InvalidOutput
from service.sources import open_source
from training.backbones import build_backbone
from training.encoder import Encoder
from training.export import compare, export

SIDE = 8
FILES = {"model.onnx", "model.fp16.onnx", "model.int8.onnx", "preprocessor_config.json", "card.json", "README.md"}
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])


def toy(seed: int = 0) -> Encoder:
    """One linear layer: quick to export, easy to compute by hand."""
    torch.manual_seed(seed)
    return Encoder(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 16)), MEAN, STD, 3)


def random_pixels(count: int, seed: int = 0) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def session(tiny_card: Card) -> ort.InferenceSession:
    return ort.InferenceSession(tiny_card.model, providers=["CPUExecutionProvider"])


def test_the_graph_takes_pixels_and_gives_embeddings(session: ort.InferenceSession) -> None:
    (pixels,), (embedding,) = session.get_inputs(), session.get_outputs()
    assert (pixels.name, pixels.type) == ("pixels", "tensor(uint8)")
    # The batch size is free.
    assert isinstance(pixels.shape[0], str)
    assert pixels.shape[1:] == [3, SIDE, SIDE]
    assert (embedding.name, embedding.type) == ("embedding", "tensor(float)")


def test_a_graph_names_no_file_of_the_machine_that_exported_it(tiny_model: Path) -> None:
    for graph in tiny_model.glob("*.onnx"):
        assert b'.py"' not in graph.read_bytes(), graph.name


@pytest.mark.parametrize("count", [1, 2, 64, 65])
def test_embeddings_have_length_one_at_any_batch(count: int, session: ort.InferenceSession) -> None:
    pixels = random_pixels(count).transpose(0, 3, 1, 2)
    (embeddings,) = session.run(["embedding"], {"pixels": np.ascontiguousarray(pixels)})
    assert embeddings.shape == (count, 256)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


def test_a_picture_is_embedded_alike_in_any_company(session: ort.InferenceSession) -> None:
    pixels = np.ascontiguousarray(random_pixels(64).transpose(0, 3, 1, 2))
    (together,) = session.run(None, {"pixels": pixels})
    alone = np.concatenate([session.run(None, {"pixels": pixels[n : n + 1]})[0] for n in range(64)])
    np.testing.assert_allclose(alone, together, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_a_grey_encoder_sees_luminance_alone(tiny_card: Card) -> None:
    encoder = ServedEncoder(tiny_card, "cpu")
    red = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    red[:, 2:6, 3:5, 0] = 200
    grey = np.zeros_like(red)
    # The luminance of red 200 is 0.299 · 200.
    grey[:, 2:6, 3:5] = 60
    blue = np.roll(red, 2, axis=3)
    assert float((encoder.encode(red) * encoder.encode(grey)).sum()) > 0.9999
    assert float((encoder.encode(red) * encoder.encode(blue)).sum()) < 0.999


def test_the_folder_says_what_it_holds(tiny_model: Path) -> None:
    card = json.loads((tiny_model / "card.json").read_text())
    assert set(tree(tiny_model)) == FILES
    assert set(card["sha256"]) == FILES - {"card.json", "README.md"}
    for file, expected in card["sha256"].items():
        assert hashlib.sha256((tiny_model / file).read_bytes()).hexdigest() == expected
    assert card["name"] == "tiny"
    assert card["dimension"] == 256
    quality = card["quality"]["model.onnx"]
    assert quality["pictures"] == 256
    assert 0.9999 <= quality["least_cosine_to_torch_batch_1"] <= 1
    assert 0.9999 <= quality["least_cosine_to_torch_batch_64"] <= 1
    assert card["fingerprint"] in (tiny_model / "README.md").read_text()
    # A server of another user can read it.
    assert tiny_model.stat().st_mode & 0o055 == 0o055


def test_preprocessing_leaves_rescaling_to_the_graph(tiny_model: Path) -> None:
    config = json.loads((tiny_model / "preprocessor_config.json").read_text())
    assert config["do_rescale"] is False
    assert config["do_normalize"] is False
    assert config["crop_size"] == {"height": SIDE, "width": SIDE}
    assert config["size"] == {"shortest_edge": SIDE}


def test_the_service_takes_the_folder(tiny_model: Path) -> None:
    card = read_card(tiny_model)
    assert card.fingerprint == card.facts["fingerprint"]
    assert card.preprocessing == square_preprocessing(SIDE)
    encoder = ServedEncoder(card, "cpu")
    assert encoder.dimension == 256
    picture = decode(open_source("digits").entry(3).data, SIDE, Limits())
    embedding = encoder.encode(to_pixels(picture, card.preprocessing)[None])
    assert embedding.shape == (1, 256)


def test_compare_finds_an_encoder_that_is_not_the_exported_one(tiny_card: Card) -> None:
    torch.manual_seed(1)
    other = Encoder(build_backbone("small-cnn", 1, SIDE).module, MEAN[:1], STD[:1], 1).eval()
    with pytest.raises(InvalidModel, match=r"the export differs from torch: cosine -?0\.\d+ at batch 64"):
        compare(other, tiny_card, random_pixels(65), 64)


@pytest.mark.slow("exports an encoder")
def test_compare_finds_one_picture_that_differs_in_any_batch(tmp_path: Path) -> None:
    """A graph and its torch twin that agree on dark pictures only."""

    class Clipped(nn.Module):
        def __init__(self, limit: float) -> None:
            super().__init__()
            self.limit = limit

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return values.clamp(max=self.limit).flatten(1)[:, :16] + 0.1

    export(
        Encoder(Clipped(0.5), torch.zeros(3), torch.ones(3), 3),
        None,
        square_preprocessing(SIDE),
        {},
        tmp_path / "clipped",
    )
    card = read_card(tmp_path / "clipped")
    twin = Encoder(Clipped(1.0), torch.zeros(3), torch.ones(3), 3).eval()
    dark = random_pixels(65) // 2
    assert compare(twin, card, dark, 64) > 0.9999
    for position in (0, 63, 64):
        pixels = dark.copy()
        pixels[position, :, ::2] = 255
        with pytest.raises(InvalidModel, match="the export differs from torch"):
            compare(twin, card, pixels, 64)


def test_an_encoder_is_exported_as_numpy_computes_it_in_place_of_an_earlier_one(tmp_path: Path) -> None:
    out = tmp_path / "models" / "toy"
    export(toy(0), None, square_preprocessing(SIDE), {"method": "first"}, out)
    (out / "stray.txt").write_text("not the new model's")
    first = read_card(out)
    encoder = toy(1)
    # Export must switch the encoder to evaluation.
    encoder.train()
    some = random_pixels(20)
    export(encoder, Pictures(some, some, some, None), square_preprocessing(SIDE), {"method": "second"}, out)
    second = read_card(out)
    assert (first.facts["method"], second.facts["method"]) == ("first", "second")
    assert first.fingerprint != second.fingerprint
    assert first.facts["quality"]["model.onnx"]["pictures"] == 128
    assert second.facts["quality"]["model.onnx"]["pictures"] == 20
    assert set(tree(tmp_path)) == {f"models/toy/{file}" for file in FILES}
    # No empty folder is left over either.
    assert [path.name for path in out.parent.iterdir()] == ["toy"]
    assert not encoder.training

    linear = encoder.backbone.get_submodule("1")
    assert isinstance(linear, nn.Linear)
    pixels = random_pixels(3)
    values = pixels.transpose(0, 3, 1, 2) / 255.0
    values = (values - MEAN.double().numpy().reshape(3, 1, 1)) / STD.double().numpy().reshape(3, 1, 1)
    weight, bias = linear.weight.detach().double().numpy(), linear.bias.detach().double().numpy()
    expected = values.reshape(3, -1) @ weight.T + bias
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(ServedEncoder(second, "cpu").encode(pixels), expected, atol=1e-5)


def test_what_is_no_model_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "notes").write_text("years of work")
    for name in ("thesis", "notes"):
        with pytest.raises(InvalidOutput, match=f"{name}: is there and is not a model folder"):
            export(toy(), None, square_preprocessing(SIDE), {}, tmp_path / name)
    assert tree(tmp_path) == {"thesis/chapter.txt": b"years of work", "notes": b"years of work"}


@pytest.mark.slow("exports an encoder twice")
def test_a_failure_leaves_the_earlier_model_and_nothing_else(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    out.mkdir()
    for file, content in tree(tiny_model).items():
        (out / file).write_bytes(content)
    before = tree(tmp_path)
    broken = toy()
    with torch.no_grad():
        broken.mean.fill_(math.nan)
    with pytest.raises(InvalidModel, match="not finite"):
        export(broken, None, square_preprocessing(SIDE), {}, out)
    with pytest.raises(InvalidModel, match="not finite"):
        export(broken, None, square_preprocessing(SIDE), {}, tmp_path / "new")
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
