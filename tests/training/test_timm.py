"""EfficientNet-Lite0 against timm's with the same weights, and on the ImageNet classes it was trained on."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from timm.data.imagenet_info import ImageNetInfo
from torch.nn import functional as F

from service import FloatArray, PixelArray
from service.encoding.images import decode_pixels
from service.encoding.limits import Limits
from service.encoding.pretrained import build_graphs, preprocessing, read_state, read_weights
from service.errors import InvalidRequest
from tests.conftest import missing
from training.backbones import build_backbone
from training.weights import LITE0
from training.weights import read_weights as read_backbone_weights


@pytest.fixture(scope="module")
def photos(data_root: Path) -> dict[str, PixelArray]:
    """Pixels of photographs, by the WordNet id of their subject."""
    files = sorted((data_root / "photos").glob("*.JPEG"))
    if not files:
        missing("no photographs: LOOKALIKE_TEST_DATA has no folder photos")
    return {file.name.split("_")[0]: decode_pixels(file.read_bytes(), preprocessing(), Limits()) for file in files}


@pytest.fixture(scope="module")
def features(photos: dict[str, PixelArray]) -> FloatArray:
    """The output of our graph before normalisation, (N, 1280)."""
    session = ort.InferenceSession(build_graphs()["fp32"], providers=["CPUExecutionProvider"])
    pixels = np.stack(list(photos.values())).transpose(0, 3, 1, 2)
    parts = [session.run(None, {"pixels": np.ascontiguousarray(part)})[0] for part in np.array_split(pixels, 8)]
    return np.concatenate(parts)


def theirs(name: str) -> str:
    """A weight's name in timm's network."""
    if name.startswith("_blocks."):
        _, block, part, kind = name.split(".")
        repeats, stage = (1, 2, 2, 3, 3, 4, 1), 0
        place = int(block)
        while place >= repeats[stage]:
            place, stage = place - repeats[stage], stage + 1
        parts = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
        parts |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
        # This stage has no expansion.
        if stage == 0:
            parts = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
        return f"blocks.{stage}.{place}.{parts[part]}.{kind}"
    whole = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    return re.sub(r"^[^.]+", lambda found: whole[found[0]], name)


def test_the_graph_is_timms(photos: dict[str, PixelArray], features: FloatArray) -> None:
    network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    state = {theirs(name): torch.from_numpy(value.copy()) for name, value in read_state(read_weights()).items()}
    network.load_state_dict(state)
    pixels = torch.from_numpy(np.stack(list(photos.values()))).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = torch.cat(
            [
                network.forward_head(network.forward_features((part.float() - 127) / 128), pre_logits=True)
                for part in torch.split(pixels, 25)
            ]
        )
    cosines = F.cosine_similarity(torch.from_numpy(features), expected)
    assert len(cosines) == len(photos)
    assert float(cosines.min()) > 0.9999


def test_the_backbone_of_a_run_is_our_graph(photos: dict[str, PixelArray], features: FloatArray) -> None:
    backbone = build_backbone(LITE0, 3, 224, "efficientnet-lite0")
    assert backbone.dimension == 1280
    assert backbone.normalisation is not None
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in backbone.normalisation)
    pixels = torch.from_numpy(np.stack(list(photos.values()))[:20]).permute(0, 3, 1, 2)
    with torch.inference_mode():
        ours = backbone.module.eval()((pixels / 255 - mean) / std)
    assert float(F.cosine_similarity(torch.from_numpy(features[:20]), ours).min()) > 0.9999


def test_every_weight_of_the_package_gets_timms_name() -> None:
    state = read_state(read_weights())
    found = read_backbone_weights(LITE0, "efficientnet-lite0").state
    assert set(found) == {theirs(name) for name in state}
    assert all(np.array_equal(found[theirs(name)].numpy(), value) for name, value in state.items())


def test_the_weights_of_the_package_fit_no_other_backbone() -> None:
    with pytest.raises(InvalidRequest, match=f"^efficientnet-lite0: weights of the backbone {LITE0}, not of resnet18$"):
        build_backbone("resnet18", 3, 64, "efficientnet-lite0")


def test_it_names_what_photographs_show(photos: dict[str, PixelArray], features: FloatArray) -> None:
    state = read_state(read_weights())
    named = (features @ state["_fc.weight"].T + state["_fc.bias"]).argmax(1)
    classes = ImageNetInfo().label_names()  # type: ignore[no-untyped-call]
    right = sum(classes[number] == wordnet for number, wordnet in zip(named, photos, strict=True))
    # 0.888 was measured: 111 of 125.
    assert right / len(photos) >= 0.88


def test_the_graph_is_within_the_standard() -> None:
    for model in build_graphs().values():
        onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
