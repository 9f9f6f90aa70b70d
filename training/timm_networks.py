"""Networks of timm by name, without their classifier. Source: Wightman, PyTorch Image Models."""

from typing import Any

import timm
from torch import nn

from service.errors import InvalidRequest
from training.weights import Normalisation, State, Weights, load_weights, read_weights

# What a backbone's name begins with.
TIMM = "timm:"


def build_timm_network(name: str, side: int, pretrained: bool = False) -> nn.Module:
    """Build a network of timm for RGB pictures whose output is its pooled features.

    Args:
        name: timm:NAME.
        side: S in pixels.
        pretrained: with timm's own weights, which it downloads once; the positions of a transformer are resampled.

    Raises:
        InvalidRequest: timm has no such network, not for this side, or cannot download its weights.
    """
    config = timm_config(name)
    # Only networks for one size take its number.
    options: dict[str, Any] = {"img_size": side} if config.fixed_input_size and side != config.input_size[-1] else {}
    try:
        network: nn.Module = timm.create_model(name.removeprefix(TIMM), pretrained=pretrained, num_classes=0, **options)
    # timm, its networks, and the libraries that download each raise their own exceptions.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if pretrained:
            raise InvalidRequest(
                f"{name}: timm cannot download its weights here: {reason}; "
                "fetch the file where there is a network and name it instead of DEFAULT"
            ) from error
        raise InvalidRequest(f"{name} cannot take pictures of {side}x{side}: {reason}") from error
    return network


def read_timm_weights(name: str, side: int, origin: str) -> Weights:
    """Read weights for a network of timm: as read_weights, with DEFAULT for timm's own, and without a classifier.

    Weights of a plain file have the normalisation that timm states for the network.

    Raises:
        InvalidRequest: as read_weights and build_timm_network.
        InvalidModel: as read_weights.
    """
    config = timm_config(name)
    own = Normalisation(tuple(config.mean), tuple(config.std))
    if origin == "DEFAULT":
        return Weights(build_timm_network(name, side, pretrained=True).state_dict(), own)
    state, known = read_weights(name, origin)
    classifiers = (config.classifier,) if isinstance(config.classifier, str) else config.classifier or ()
    state = {key: value for key, value in state.items() if key.rpartition(".")[0] not in classifiers}
    if config.fixed_input_size and known is None and side != config.input_size[-1]:
        state = _resampled(name, side, state, origin)
    return Weights(state, known or own)


def _resampled(name: str, side: int, state: State, origin: str) -> State:
    """Return a state for another side than a network's own: the positions of a transformer are resampled."""
    network: Any = build_timm_network(name, timm_config(name).input_size[-1])
    load_weights(network, state, origin)
    try:
        network.set_input_size(img_size=(side, side))
    # Not every network for one size has the method.
    except AttributeError as error:
        raise InvalidRequest(f"{name} cannot take pictures of {side}x{side}") from error
    return dict(network.state_dict())


def timm_config(name: str) -> Any:
    """Return timm's facts about the pretraining of timm:NAME: input_size, mean, std, crop_pct and so on.

    Raises:
        InvalidRequest: timm has no such network.
    """
    architecture = name.removeprefix(TIMM)
    if not timm.is_model(architecture):
        raise InvalidRequest(
            f"{name}: timm {timm.__version__} has no such network; expected a name that timm.list_models() returns, "
            "such as timm:resnet50 or timm:vit_small_patch14_dinov2"
        )
    return timm.models.get_pretrained_cfg(architecture) or timm.models.PretrainedCfg()
