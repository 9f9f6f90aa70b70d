"""EfficientNet-Lite0 without torch: always the same bytes, and no call in a pickle is executed."""

import collections
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.encoding import pretrained
from service.encoding.card import read_card, suits
from service.encoding.encoder import Encoder
from service.encoding.images import decode_pixels, tones
from service.encoding.limits import Limits
from service.encoding.pretrained import (
    build_graphs,
    default_encoder,
    efficientnet_lite0,
    import_efficientnet_lite0,
    read_numbers,
    read_state,
    read_weights,
)
from service.errors import InvalidModel, InvalidOutput
from service.sources import open_source
from tests.conftest import missing

FLOAT32 = np.dtype(np.float32)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder."""
    out = tmp_path_factory.mktemp("made") / "photos"
    import_efficientnet_lite0(out)
    return out


def test_it_is_one_fixed_file(photos: Path, tmp_path: Path) -> None:
    import_efficientnet_lite0(tmp_path / "again")
    for path in photos.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    card = read_card(photos)
    assert card.fingerprint == "b2ad02d4fe91e3feb403a615613f852a6483bec4fcf2d7c952397f5453144205"
    assert (card.name, card.facts["licence"], card.facts["dimension"]) == ("photos", "Apache-2.0", 1280)
    assert set(card.variants) == {"fp16"}


def test_it_embeds_as_its_card_tells(photos: Path) -> None:
    for variant in ("fp32", "fp16"):
        encoder = Encoder(read_card(photos), "cpu", variant)
        embedding = encoder.probe()
        assert encoder.dimension == 1280
        assert float(embedding @ encoder.card.canary) > 0.9999  # type: ignore[operator]


def test_photographs_suit_it_in_any_tone_and_digits_do_not(photos: Path, data_root: Path, tmp_path: Path) -> None:
    card, folder = read_card(photos), data_root / "photos"
    if not folder.is_dir():
        missing("no photographs: LOOKALIKE_TEST_DATA has no folder photos")

    def pixels(name: str, count: int) -> Any:
        source = open_source(name, data_root)
        positions = np.linspace(0, len(source) - 1, count).astype(int)
        return np.stack([decode_pixels(source.entry(int(p)).data, card.preprocessing, Limits()) for p in positions])

    colour = pixels(str(folder), 60)
    grey = np.repeat(colour.mean(3, keepdims=True).astype(np.uint8), 3, 3)
    for seen in (colour, grey, colour // 3, 255 - colour // 4):
        assert suits(card, tones(seen), tmp_path) is None
    for digits in ("digits", "mnist/test"):
        said = suits(card, tones(pixels(digits, 60)), tmp_path)
        assert said is not None
        assert f"`lookalike reindex --model models/digits --store {tmp_path}`" in said


def test_the_default_is_made_once_and_made_again_where_it_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = default_encoder()
    made = (folder / "model.onnx").stat().st_mtime_ns
    assert default_encoder() == folder
    assert (folder / "model.onnx").stat().st_mtime_ns == made
    facts = json.loads((folder / "card.json").read_text())
    # An earlier version may have recorded another checksum.
    facts["sha256"]["model.onnx"] = "0" * 64
    (folder / "card.json").write_text(json.dumps(facts))
    assert read_card(default_encoder()).fingerprint == facts["fingerprint"]


def test_what_is_at_out_stays(photos: Path, tmp_path: Path) -> None:
    before = sorted(path.stat().st_mtime_ns for path in photos.iterdir())
    with pytest.raises(InvalidOutput, match="is there already"):
        import_efficientnet_lite0(photos)
    assert sorted(path.stat().st_mtime_ns for path in photos.iterdir()) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidOutput, match="cannot be made"):
        import_efficientnet_lite0(tmp_path / "file" / "photos")


def test_weights_that_are_missing_or_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_PACKAGE", "efficientnet_lite9_pytorch_model")
    with pytest.raises(InvalidModel, match=r"are missing: expected .* of the package efficientnet-lite9-pytorch-model"):
        read_weights()
    package = tmp_path / "another_lite"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('this was run')")
    (package / pretrained._FILE).write_bytes(b"other weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(pretrained, "_PACKAGE", "another_lite")
    with pytest.raises(InvalidModel, match="expected a file with sha256 579344248a93…, got"):
        import_efficientnet_lite0(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_graph_that_comes_out_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_EPSILON", 1e-5)
    with pytest.raises(InvalidModel, match=r"comes out with sha256 .* install the locked requirements"):
        import_efficientnet_lite0(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_of_other_shapes_are_refused() -> None:
    state = read_state(read_weights())
    assert len(build_graphs()) == 2
    with pytest.raises(InvalidModel, match=r"_conv_head\.weight: expected 1280x320x1x1, got 1280x320"):
        efficientnet_lite0(state | {"_conv_head.weight": np.zeros((1280, 320), np.float32)}, FLOAT32)
    del state["_bn0.bias"]
    with pytest.raises(InvalidModel, match=r"_bn0\.bias: expected 32, got nothing"):
        efficientnet_lite0(state, FLOAT32)


class Call:
    """A function that a pickle would call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def legacy(tensors: bytes, keys: list[str] | None = None, storages: bytes = b"") -> bytes:
    """A state file as torch wrote it, around the pickle of its tensors."""
    facts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join([*facts, tensors, pickle.dumps(keys or [], 2), storages])


def tensor(
    shape: str = "K\x02K\x02\x86", strides: str = "K\x02K\x01\x86", offset: str = "K\x00", length: int = 4
) -> bytes:
    """The pickle of {"w": a float tensor}, with opcodes as torch writes them."""
    return (
        b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n"
        + b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04NtQ"
        + (offset + shape + strides).encode("latin-1")
        + b"\x89ccollections\nOrderedDict\n)Rt\x52s."
    )


NUMBERS = np.arange(4, dtype="<f4")
STORAGE = struct.pack("<q", 4) + NUMBERS.tobytes()


def test_a_state_file_is_read_as_torch_wrote_it() -> None:
    state = read_state(legacy(tensor(), ["0"], STORAGE))
    assert {name: value.tolist() for name, value in state.items()} == {"w": [[0, 1], [2, 3]]}
    transposed = read_state(legacy(tensor(strides="K\x01K\x02\x86"), ["0"], STORAGE))
    assert transposed["w"].tolist() == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (legacy(pickle.dumps(Call(os.system, "touch ran"), 2)), r"asks for (posix|nt)\.system, expected tensors alone"),
        (legacy(pickle.dumps(Call(eval, "open('ran', 'w')"), 2)), r"asks for __builtin__\.eval"),
        (legacy(pickle.dumps(Call(getattr, "", "x"), 2)), "getattr"),
        (legacy(pickle.dumps({"w": collections.Counter()}, 2)), r"collections\.Counter"),
        (pickle.dumps(Call(os.system, "touch ran"), 2), "system"),
        (pickle.dumps(1), "magic number"),
        (b"", "not a state file that we read"),
        (b"PK\x03\x04 a zip, as newer versions write", "not a state file that we read"),
        (legacy(tensor(), ["0"], STORAGE[:-1]), "storage 0 is cut short"),
        (legacy(tensor(), ["0"], struct.pack("<q", 5) + NUMBERS.tobytes()), "storage 0 is cut short"),
        (legacy(tensor(offset="K\x01"), ["0"], STORAGE), "beyond its storage"),
        (legacy(tensor(offset="J\xfc\xff\xff\xff"), ["0"], STORAGE), "beyond its storage"),
        (legacy(tensor(strides="K\x02J\xff\xff\xff\xff\x86"), ["0"], STORAGE), "beyond its storage"),
        (legacy(tensor(shape="K\x09K\x02\x86"), ["0"], STORAGE), "beyond its storage"),
        (legacy(tensor()), "beyond its storage"),
        (legacy(tensor(), ["1"], STORAGE), "not a state file that we read"),
        (legacy(tensor().replace(b"storage", b"stowage"), ["0"], STORAGE), "asks for 'stowage'"),
    ],
)
def test_a_file_that_is_damaged_or_wants_more_than_tensors_is_refused(
    data: bytes, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidModel, match=says):
        read_state(data)
    assert not (tmp_path / "ran").exists()


def test_the_shipped_numbers_are_of_the_shipped_graphs() -> None:
    assert set(read_numbers()["sha256"]) == {"model.onnx", "model.fp16.onnx"}
