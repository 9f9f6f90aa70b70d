"""A model folder is read whole and checked, or refused in one sentence."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from service.encoding.card import (
    PREPROCESSOR_FILE,
    TEXT_FILES,
    VARIANTS,
    Preprocessing,
    fingerprint,
    read_card,
    suits,
)
from service.errors import InvalidModel
from tests.conftest import MODEL, ROOT


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def test_the_shipped_card_is_whole() -> None:
    card = read_card(MODEL)
    assert card.name == "mnist"
    assert card.fingerprint == card.facts["fingerprint"] == fingerprint(card.model, card.preprocessing)
    assert card.facts["data"]["source"] == "mnist/train"
    assert card.preprocessing.side == 28


def test_the_fingerprint_names_weights_and_preprocessing() -> None:
    card = read_card(MODEL)
    config = json.loads(card.preprocessing.canonical)
    reordered = Preprocessing.from_config(dict(reversed(config.items())), "test")
    assert fingerprint(card.model, reordered) == card.fingerprint
    assert fingerprint(card.model, Preprocessing.from_config(config | {"resample": 2}, "test")) != card.fingerprint
    assert fingerprint(card.model + b"\0", card.preprocessing) != card.fingerprint


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"nowhere: no such model folder; expected a folder with model\.onnx"):
        read_card(tmp_path / "nowhere")
    with pytest.raises(InvalidModel, match=r"model\.onnx: cannot be read: No such file"):
        read_card(tmp_path)


# All files that an encoder can have: the one of MNIST has half precision, the one of digits reads words.
FILES = [
    (encoder, file)
    for encoder in ("mnist", "digits")
    for file in sorted(json.loads((ROOT / "models" / encoder / "card.json").read_text())["sha256"])
]


def test_every_file_of_an_encoder_is_among_them() -> None:
    assert {file for _, file in FILES} == {*VARIANTS.values(), *TEXT_FILES, PREPROCESSOR_FILE}


@pytest.mark.parametrize(("encoder", "file"), FILES)
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_changed_byte_is_found(encoder: str, file: str, place: float, tmp_path: Path) -> None:
    model = Path(shutil.copytree(ROOT / "models" / encoder, tmp_path / "model"))
    data = bytearray((model / file).read_bytes())
    expected = hashlib.sha256(data).hexdigest()
    data[round(place * (len(data) - 1))] ^= 1
    found = hashlib.sha256(data).hexdigest()
    (model / file).write_bytes(data)
    with pytest.raises(InvalidModel) as error:
        read_card(model)
    says = f"{model / file}: damaged: sha256 is {found[:12]}…, card.json says {expected[:12]}…"
    assert str(error.value) == says


@pytest.mark.parametrize("file", ["model.onnx", PREPROCESSOR_FILE, *TEXT_FILES])
def test_a_file_without_a_checksum_is_refused(file: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(ROOT / "models" / "digits", tmp_path / "model"))
    card = json.loads((model / "card.json").read_text())
    del card["sha256"][file]
    (model / "card.json").write_text(json.dumps(card))
    with pytest.raises(InvalidModel, match=rf"{file}: card\.json has the sha256 of other files, but not of this one"):
        read_card(model)


def test_json_that_does_not_parse(model: Path) -> None:
    (model / "card.json").write_text("{")
    with pytest.raises(InvalidModel, match=r"card\.json: not JSON"):
        read_card(model)
    (model / "card.json").write_text("[]")
    with pytest.raises(InvalidModel, match="expected a JSON object, not list"):
        read_card(model)


def test_a_model_without_a_card_is_taken_as_it_is(model: Path) -> None:
    for file in ("card.json", "model.fp16.onnx", "model.int8.onnx"):
        (model / file).unlink()
    card = read_card(model)
    assert card.name == "model"
    assert card.facts == {}


HUGGING_FACE: dict[str, Any] = {
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
}


def test_hugging_face_keys_are_read() -> None:
    preprocessing = Preprocessing.from_config(HUGGING_FACE, "test")
    assert (preprocessing.side, preprocessing.resize, preprocessing.resample) == (224, 256, 3)
    assert preprocessing.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"size": {}}, "the key 'width' is missing"),
        ({"size": {"shortest_edge": 0}}, "a side must be a whole number"),
        ({"size": {"shortest_edge": 100}}, "smaller than crop_size"),
        ({"crop_size": {"height": 10, "width": 257}}, "size 256 is smaller than crop_size 257x10"),
        ({"do_center_crop": False}, "needs do_center_crop"),
        ({"do_pad": True}, "do_pad is not supported"),
        ({"image_std": [1, 1, 0]}, "no zero"),
        ({"resample": 9}, "resample must be 0..5"),
    ],
)
def test_preprocessing_that_we_cannot_apply(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidModel, match=says):
        Preprocessing.from_config(HUGGING_FACE | change, "test")


def test_suits_names_the_data_and_the_way_out() -> None:
    card, store = read_card(MODEL), Path("a store")
    assert suits(card, card.facts["data"]["tones"], store) is None
    assert suits(card, None, store) is None
    bright_colours = [0.0] * 14 + [0.5, 0.5]
    said = str(suits(card, bright_colours, store))
    assert "trained on mnist/train" in said
    assert "`lookalike reindex --store 'a store'`" in said


def with_variant(model: Path, tmp_path: Path, **figures: float) -> Path:
    """A copy of the model folder whose int8 file is a copy of model.onnx, with the given measurement."""
    out = tmp_path / "varied"
    shutil.copytree(model, out)
    shutil.copy(out / "model.onnx", out / "model.int8.onnx")
    card = json.loads((out / "card.json").read_text())
    card["sha256"]["model.int8.onnx"] = hashlib.sha256((out / "model.int8.onnx").read_bytes()).hexdigest()
    card["quality"]["model.int8.onnx"] = figures
    (out / "card.json").write_text(json.dumps(card))
    return out


def test_a_variant_belongs_that_was_measured_to(model: Path, tmp_path: Path) -> None:
    card = read_card(with_variant(model, tmp_path, cosine_p1=0.99))
    assert card.variants["int8"] == card.model
    assert card.fingerprint == read_card(model).fingerprint


@pytest.mark.parametrize("figures", [{}, {"cosine_p1": 0.9899}])
def test_a_variant_that_is_too_far_or_unmeasured_is_refused(
    model: Path, tmp_path: Path, figures: dict[str, float]
) -> None:
    with pytest.raises(InvalidModel, match=r"model\.int8\.onnx: card\.json has not measured it"):
        read_card(with_variant(model, tmp_path, **figures))


def test_a_foreign_variant_is_refused(model: Path) -> None:
    shutil.copy(model / "model.onnx", model / "model.fp16.onnx")
    card = json.loads((model / "card.json").read_text())
    card["sha256"].pop("model.fp16.onnx", None)
    (model / "card.json").write_text(json.dumps(card))
    with pytest.raises(InvalidModel, match=r"model\.fp16\.onnx: card\.json has not measured it"):
        read_card(model)


def test_a_missing_or_damaged_variant_is_refused(model: Path, tmp_path: Path) -> None:
    varied = with_variant(model, tmp_path, cosine_p1=1.0)
    (varied / "model.int8.onnx").write_bytes(b"short")
    with pytest.raises(InvalidModel, match=r"model\.int8\.onnx: damaged"):
        read_card(varied)
    (varied / "model.int8.onnx").unlink()
    with pytest.raises(InvalidModel, match=r"model\.int8\.onnx: cannot be read: No such file"):
        read_card(varied)
