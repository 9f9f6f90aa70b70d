"""Backbones and the layers behind them: shapes, stems, grey, weights from files, and refusals with their messages."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from service.errors import InvalidRequest
from training.backbones import build_backbone, mlp

# Save stands for save(content) -> path.
Save = Any


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """save(content) writes a torch file and returns its name."""

    def write(content: Any) -> str:
        torch.save(content, tmp_path / "weights.pth")
        return str(tmp_path / "weights.pth")

    return write


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def embedded(module: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        embeddings: Tensor = module.eval()(x)
    return embeddings


@pytest.mark.parametrize(
    ("name", "channels", "side", "dimension"),
    [
        ("small-cnn", 1, 8, 256),
        ("small-cnn", 3, 28, 256),
        ("small-cnn", 3, 41, 256),
        ("mid-cnn", 1, 16, 256),
        ("mid-cnn", 3, 32, 256),
        ("resnet18", 1, 8, 512),
        ("resnet18", 3, 32, 512),
        ("resnet18", 1, 64, 512),
        ("mobilenet_v3_small", 3, 40, 1024),
        ("efficientnet_b0", 1, 32, 1280),
        ("shufflenet_v2_x0_5", 3, 64, 1024),
        ("convnext_tiny", 3, 32, 768),
        ("vit_b_32", 3, 32, 768),
        ("timm:test_efficientnet", 1, 32, 256),
        ("timm:test_vit", 3, 96, 64),
    ],
)
def test_a_backbone_gives_its_dimension(name: str, channels: int, side: int, dimension: int) -> None:
    backbone = build_backbone(name, channels, side)
    assert backbone.dimension == dimension
    # A new backbone is in training mode.
    assert all(module.training for module in backbone.module.modules())
    embeddings = embedded(backbone.module, noise(2, channels, side, side))
    assert embeddings.shape == (2, dimension)
    assert float((embeddings[0] - embeddings[1]).abs().max()) > 0


@pytest.mark.parametrize(("name", "channels", "side", "millions"), [("small-cnn", 1, 28, 12), ("mid-cnn", 3, 32, 75)])
def test_our_own_backbones_cost_what_they_say(name: str, channels: int, side: int, millions: int) -> None:
    backbone = build_backbone(name, channels, side)
    with FlopCounterMode(display=False) as counter:
        embedded(backbone.module, noise(1, channels, side, side))
    # A multiply-add is two operations.
    assert counter.get_total_flops() / 2e6 == pytest.approx(millions, rel=0.1)


def test_a_residual_block_adds_to_what_comes_in() -> None:
    torch.manual_seed(0)
    blocks = [m for m in build_backbone("mid-cnn", 3, 32).module.children() if hasattr(m, "layers")]
    assert len(blocks) == 2
    x = noise(4, 128, 5, 5)
    torch.testing.assert_close(blocks[0](x), x + blocks[0].get_submodule("layers")(x))


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "pools"), [(32, 3, 1, False), (63, 3, 1, False), (64, 7, 2, True)]
)
def test_resnet_keeps_small_pictures_large(side: int, kernel: int, stride: int, pools: bool) -> None:
    network = build_backbone("resnet18", 3, side).module
    stem = network.get_submodule("conv1")
    assert isinstance(stem, nn.Conv2d)
    assert stem.kernel_size == (kernel, kernel)
    assert stem.stride == (stride, stride)
    assert isinstance(network.get_submodule("maxpool"), nn.MaxPool2d) is pools


@pytest.mark.parametrize(("name", "side"), [("resnet18", 32), ("resnet18", 64), ("mobilenet_v3_small", 64)])
def test_a_grey_backbone_sees_what_its_rgb_one_sees_of_grey(name: str, side: int, save: Save) -> None:
    state = build_backbone(name, 3, side).module.state_dict()
    rgb, grey = (build_backbone(name, channels, side, save(state)) for channels in (3, 1))
    x = noise(2, 1, side, side)
    seen, expected = embedded(grey.module, x), embedded(rgb.module, x.expand(-1, 3, -1, -1))
    # The embeddings of untrained deep networks are small.
    scale = float(expected.abs().max())
    torch.testing.assert_close(seen / scale, expected / scale, rtol=0, atol=1e-4)
    assert float((seen[0] - seen[1]).abs().max()) > 1e-3 * scale


# Weights from a file.


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_weights_come_from_a_file_with_or_without_the_last_layer(
    name: str, headless: bool, wrapped: bool, save: Save
) -> None:
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None)
    state = network.state_dict()
    head = "fc" if name == "resnet18" else "classifier.3"
    if headless:
        state = {key: value for key, value in state.items() if not key.startswith(f"{head}.")}
        assert len(state) == len(network.state_dict()) - 2
    network.set_submodule(head, nn.Identity())
    torch.manual_seed(1)
    backbone = build_backbone(name, 3, 64, save({"state_dict": state, "epoch": 3} if wrapped else state))
    x = noise(2, 3, 64, 64)
    assert torch.equal(embedded(backbone.module, x), embedded(network, x))


@pytest.mark.parametrize(("name", "channels"), [("small-cnn", 1), ("mid-cnn", 3)])
def test_our_own_backbones_take_weights_from_a_file(name: str, channels: int, save: Save) -> None:
    earlier = build_backbone(name, channels, 32)
    later = build_backbone(name, channels, 32, save(earlier.module.state_dict()))
    x = noise(2, channels, 32, 32)
    assert torch.equal(embedded(later.module, x), embedded(earlier.module, x))


def test_without_a_file_weights_are_random() -> None:
    x = noise(2, 1, 8, 8)
    assert not torch.equal(*(embedded(build_backbone("small-cnn", 1, 8).module, x) for _ in range(2)))


def test_weights_that_are_missing_or_too_many_are_named(save: Save) -> None:
    state = build_backbone("small-cnn", 1, 8).module.state_dict()
    lacking = {key: value for key, value in state.items() if key != "3.weight"}
    with pytest.raises(InvalidRequest, match=r"weights\.pth: does not fit the backbone: it lacks 3\.weight$"):
        build_backbone("small-cnn", 1, 8, save(lacking))
    with pytest.raises(InvalidRequest, match=r"it has 99\.weight, the backbone does not$"):
        build_backbone("small-cnn", 1, 8, save(state | {"99.weight": torch.zeros(1)}))
    with pytest.raises(InvalidRequest, match=r"it lacks 0\.weight$"):
        build_backbone("small-cnn", 1, 8, save({}))


def test_a_last_layer_that_is_half_there_does_no_harm_and_another_missing_layer_does(save: Save) -> None:
    state = torchvision.models.mobilenet_v3_small(weights=None).state_dict()
    build_backbone("mobilenet_v3_small", 3, 64, save({k: v for k, v in state.items() if k != "classifier.3.bias"}))
    with pytest.raises(InvalidRequest, match=r"it lacks classifier\.0\.bias$"):
        lacking = {k: v for k, v in state.items() if k != "classifier.0.bias"}
        build_backbone("mobilenet_v3_small", 3, 64, save(lacking))


def test_weights_of_another_shape_are_named_in_one_line(save: Save) -> None:
    state = build_backbone("small-cnn", 3, 8).module.state_dict()
    with pytest.raises(InvalidRequest, match=r"does not fit the backbone: .*size mismatch for 0\.weight") as caught:
        build_backbone("small-cnn", 1, 8, save(state))
    assert "\n" not in str(caught.value)
    assert "stem" not in str(caught.value)


def test_a_resnets_usual_weights_are_refused_below_64_pixels_with_the_reason(save: Save) -> None:
    usual = save(torchvision.models.resnet18(weights=None).state_dict())
    with pytest.raises(InvalidRequest, match=r"size mismatch for conv1\.weight.*use a side of 64 or more$"):
        build_backbone("resnet18", 3, 63, usual)
    assert build_backbone("resnet18", 3, 64, usual).dimension == 512


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [torch.zeros(3)], {"weight": 3}, {"state_dict": {"weight": "heavy"}}, 5]
)
def test_what_is_not_tensors_by_name_is_refused(content: Any, save: Save) -> None:
    with pytest.raises(InvalidRequest, match=r"weights\.pth: not a state dict: expected tensors by name$"):
        build_backbone("small-cnn", 1, 8, save(content))


class Trap:
    """Unpickling one leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_file_of_another_kind_is_refused_and_never_run(save: Save, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    for name in (str(tmp_path / "text.pth"), str(tmp_path), save(Trap(tmp_path / "sprung"))):
        with pytest.raises(InvalidRequest, match=r"not a state dict that torch can read safely: \w+$"):
            build_backbone("small-cnn", 1, 8, name)
    assert not (tmp_path / "sprung").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"none\.pth: no such file; expected DEFAULT or a file with a state dict$"):
        build_backbone("resnet18", 3, 64, str(tmp_path / "none.pth"))


@pytest.mark.parametrize("name", ["small-cnn", "mid-cnn"])
def test_torchvision_has_no_weights_of_our_own_backbones(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name}: torchvision has no weights of it; --init DEFAULT is for"):
        build_backbone(name, 3, 32, "DEFAULT")


# Backbones that cannot be built.


@pytest.mark.parametrize("name", ["huge", "", "resnet", "fcn_resnet50", "quantized_resnet18", "r3d_18"])
def test_an_unknown_name_says_what_there_is(name: str) -> None:
    expected = f"^{name}: no such backbone; expected small-cnn, mid-cnn or a classification backbone .*resnet18"
    with pytest.raises(InvalidRequest, match=expected):
        build_backbone(name, 3, 32)


@pytest.mark.parametrize(
    ("name", "side"), [("vit_b_16", 40), ("alexnet", 8), ("inception_v3", 32), ("maxvit_t", 40), ("densenet121", 8)]
)
def test_a_side_that_does_not_fit_is_refused(name: str, side: int) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name} cannot take pictures of {side}x{side}: ") as caught:
        build_backbone(name, 3, side)
    assert "\n" not in str(caught.value)


# The layers of a head.


def layers(head: nn.Module) -> list[str]:
    """One word a layer: its kind and widths, and whether it has a bias, or a scale and shift, of its own."""
    words = []
    for layer in head.children():
        if isinstance(layer, nn.Linear):
            words.append(f"{layer.in_features}→{layer.out_features}{'+bias' if layer.bias is not None else ''}")
        elif isinstance(layer, nn.BatchNorm1d):
            words.append(f"norm {layer.num_features}{'+affine' if layer.affine else ''}")
        else:
            words.append(type(layer).__name__)
    return words


@pytest.mark.parametrize(
    ("widths", "options", "expected"),
    [
        # This is SimCLR's g.
        ((9, 7, 5), {}, ["9→7", "norm 7+affine", "ReLU", "7→5", "norm 5"]),
        ((9, 7, 7, 5), {}, ["9→7", "norm 7+affine", "ReLU", "7→7", "norm 7+affine", "ReLU", "7→5", "norm 5"]),
        # These are BYOL's g and q.
        ((9, 7, 5), {"last_norm": False}, ["9→7", "norm 7+affine", "ReLU", "7→5+bias"]),
        # This is MoCo v2's head.
        ((9, 7, 5), {"norm": False}, ["9→7+bias", "ReLU", "7→5+bias"]),
        ((9, 5), {}, ["9→5", "norm 5"]),
    ],
)
def test_mlp_has_these_layers(widths: tuple[int, ...], options: dict[str, bool], expected: list[str]) -> None:
    assert layers(mlp(*widths, **options)) == expected


def test_normed_outputs_have_mean_0_and_variance_1() -> None:
    with torch.inference_mode():
        z = mlp(20, 12, 5)(noise(64, 20))
    assert z.shape == (64, 5)
    torch.testing.assert_close(z.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(5), atol=1e-3, rtol=0)


def test_a_frozen_part_stays_in_eval_mode() -> None:
    module = build_backbone("timm:test_efficientnet", 3, 32, None, ["conv_stem", "bn1", "blocks.0"]).module
    copy = deepcopy(module).train()
    for network in (module, copy):
        learning = {name for name, weight in network.named_parameters() if weight.requires_grad}
        assert not [name for name in learning if name.startswith(("conv_stem", "bn1", "blocks.0"))]
        modes = {name: part.training for name, part in network.named_modules()}
        assert not any(modes[name] for name in ("conv_stem", "bn1", "blocks.0", "blocks.0.0.bn1"))
        assert modes["blocks.1"]
        assert modes["blocks.1.0.bn1"]


def test_frozen_statistics_stay_while_scales_learn() -> None:
    network = build_backbone("timm:test_efficientnet", 3, 32, None, ["bn1"], frozen_statistics=True).module.train()
    norms = [part for name, part in network.named_modules() if isinstance(part, nn.BatchNorm2d) and name != "bn1"]
    before = [norm.running_mean.clone() for norm in norms if norm.running_mean is not None]
    network(torch.randn(4, 3, 32, 32)).sum().backward()
    assert len(before) == len(norms) > 0
    for norm, mean in zip(norms, before, strict=True):
        assert norm.running_mean is not None and torch.equal(norm.running_mean, mean)
        assert norm.weight.grad is not None and network.training


def test_a_part_that_a_backbone_lacks_cannot_be_frozen() -> None:
    with pytest.raises(InvalidRequest, match=r"^frozen: 'layer9': the backbone has no such part"):
        build_backbone("resnet18", 3, 64, None, ["layer9"])


@pytest.mark.parametrize("classifier", [True, False])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_weights_of_timm_come_from_a_file(classifier: bool, ending: str, tmp_path: Path) -> None:
    network: Any = timm.create_model("test_vit", pretrained=False).eval()
    state = {key: value for key, value in network.state_dict().items() if classifier or not key.startswith("head.")}
    (save_file if ending == "safetensors" else torch.save)(state, tmp_path / f"weights.{ending}")
    backbone = build_backbone("timm:test_vit", 3, 160, str(tmp_path / f"weights.{ending}"))
    assert backbone.normalisation == ((0.5,) * 3, (0.5,) * 3)
    x = noise(2, 3, 160, 160)
    with torch.inference_mode():
        expected = network.forward_head(network.forward_features(x), pre_logits=True)
    torch.testing.assert_close(embedded(backbone.module, x), expected)
    # The positions of another side are resampled, so the weights fit it, too.
    assert build_backbone("timm:test_vit", 3, 96, str(tmp_path / f"weights.{ending}")).dimension == 64


def test_weights_that_lack_a_layer_of_timms_are_refused(save: Save) -> None:
    state = build_backbone("timm:test_vit", 3, 160).module.state_dict()
    del state["blocks.5.mlp.fc2.weight"]
    with pytest.raises(InvalidRequest, match=r"does not fit the backbone: it lacks blocks\.5\.mlp\.fc2\.weight$"):
        build_backbone("timm:test_vit", 3, 160, save(state))


def test_a_network_that_timm_lacks_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^timm:nonsense: timm [\d.]+ has no such network; expected a name"):
        build_backbone("timm:nonsense", 3, 64)


@pytest.mark.usefixtures("offline")
def test_timms_weights_need_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InvalidRequest, match=r"^timm:test_vit: timm cannot download its weights here: .* of DEFAULT$"):
        build_backbone("timm:test_vit", 3, 160, "DEFAULT")
