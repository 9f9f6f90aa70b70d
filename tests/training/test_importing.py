"""Networks of torchvision and timm, exported as they are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch.nn import functional

from service.encoding.card import read_card
from service.encoding.encoder import Encoder
from service.encoding.images import decode, to_pixels
from service.encoding.limits import Limits
from service.errors import InvalidOutput, InvalidRequest, LookalikeError
from tests.conftest import encoded, scene
from training.importing import import_backbone


@pytest.mark.slow("exports a network of 224x224 pixels and compares 128 embeddings twice")
def test_a_state_file_becomes_an_encoder_that_equals_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v3_small(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    import_backbone("mobilenet_v3_small", str(tmp_path / "weights.pth"), tmp_path / "imported")

    encoder = Encoder(read_card(tmp_path / "imported"), device="cpu")
    assert encoder.dimension == 1024
    assert encoder.card.facts["method"] == "imported"
    # The card's data says nothing about suitable pictures, because the training data is unknown.
    assert "tones" not in encoder.card.facts["data"]

    picture = scene(400, 300)
    pixels = to_pixels(decode(encoded(picture), 224, Limits()), encoder.card.preprocessing)
    tensor = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    network.classifier[-1] = torch.nn.Identity()
    with torch.inference_mode():
        expected = functional.normalize(network((tensor - mean[:, None, None]) / std[:, None, None]), dim=1).numpy()
    assert float((encoder.encode([pixels]) * expected).sum()) > 0.9999


@pytest.mark.slow("exports two networks and compares 128 embeddings twice each")
# A class token at bicubic, and pooled features at bilinear.
@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "test_efficientnet.r160_in1k"])
def test_a_network_of_timm_has_its_own_preprocessing(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network: Any = timm.create_model(name, pretrained=False).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    import_backbone(f"timm:{name}", str(tmp_path / "weights.pth"), tmp_path / "imported")

    encoder = Encoder(read_card(tmp_path / "imported"), device="cpu")
    config = resolve_data_config(model=network)  # type: ignore[no-untyped-call]
    transform: Any = create_transform(**config)
    for size in ((400, 300), (210, 333)):
        picture = scene(*size)
        pixels = to_pixels(decode(encoded(picture), 160, Limits()), encoder.card.preprocessing)
        with torch.inference_mode():
            features = network.forward_features(transform(picture)[None])
            expected = functional.normalize(network.forward_head(features, pre_logits=True), dim=1).numpy()
        assert float((encoder.encode([pixels]) * expected).sum()) >= 0.9999


def test_a_prefix_names_torchvision(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"^nowhere\.pth: no such file"):
        import_backbone("torchvision:resnet18", "nowhere.pth", tmp_path / "imported")
    with pytest.raises(InvalidRequest, match=r"^resnet19: no such backbone"):
        import_backbone("torchvision:resnet19", "nowhere.pth", tmp_path / "imported")
    with pytest.raises(InvalidRequest, match=r"^timm:resnet19: timm .* has no such network"):
        import_backbone("timm:resnet19", "nowhere.pth", tmp_path / "imported")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that hold no weights for a resnet18."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "text.pth").write_text("no weights")
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state | {"conv1.weight": torch.zeros(1)}, folder / "other.pth")
    torch.save({key: value for key, value in state.items() if key != "conv1.weight"}, folder / "lacking.pth")
    torch.save(state | {"extra": torch.zeros(1)}, folder / "more.pth")
    torch.save(torch.zeros(3), folder / "tensor.pth")
    return folder


@pytest.mark.parametrize(
    ("backbone", "weights", "says"),
    [
        ("nonsense", "DEFAULT", "^nonsense: no such backbone; expected .*resnet18"),
        ("resnet18", "nowhere.pth", r"^nowhere\.pth: no such file; expected DEFAULT or a file with a state dict$"),
        ("resnet18", "text.pth", r"^text\.pth: not a state dict that torch can read safely: \w+$"),
        ("resnet18", "other.pth", r"^other\.pth: does not fit the backbone: .*size mismatch for conv1\.weight"),
        ("resnet18", "lacking.pth", r"^lacking\.pth: does not fit the backbone: it lacks conv1\.weight$"),
        ("resnet18", "more.pth", r"^more\.pth: does not fit the backbone: it has extra, the backbone does not$"),
        ("resnet18", "tensor.pth", r"^tensor\.pth: not a state dict: expected tensors by name$"),
    ],
)
def test_what_is_refused(
    backbone: str, weights: str, says: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    with pytest.raises(InvalidRequest, match=says):
        import_backbone(backbone, weights, tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_a_folder_that_is_no_model_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    # The refusal comes before any weights are read.
    with pytest.raises(InvalidOutput, match="thesis: is there and is not a model folder"):
        import_backbone("resnet18", str(tmp_path / "nowhere.pth"), tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


@pytest.mark.usefixtures("offline")
def test_a_download_that_fails_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        LookalikeError, match=r"^resnet18: torchvision cannot download its weights here: .* name it instead of DEFAULT$"
    ):
        import_backbone("resnet18", "DEFAULT", tmp_path / "imported")
