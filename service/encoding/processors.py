"""The image processors of transformers: the steps that their names stand for beside preprocessor_config.json's keys."""

from typing import Any, NamedTuple

# The key that names a processor; files of earlier versions have the second one.
TYPE_KEYS = ("image_processor_type", "feature_extractor_type")
# ConvNext's processor crops below this side and warps from it on.
_WARPED_FROM = 384
_CROP_PCT = 224 / 256


class _Processor(NamedTuple):
    """A processor's defaults, as of transformers 5.

    square: whether a `size` that is one number is both sides of a square; else it is the shortest edge.
    cropped: whether it crops if the file does not say.
    resample: Pillow's number of the filter if the file names none.
    """

    square: bool
    cropped: bool
    resample: int


_PROCESSORS = {
    "Beit": _Processor(True, False, 3),
    "Bit": _Processor(False, True, 3),
    "Blip": _Processor(True, False, 3),
    "CLIP": _Processor(False, True, 3),
    "ChineseCLIP": _Processor(False, True, 3),
    "ConvNext": _Processor(False, False, 3),
    "DINOv3ViT": _Processor(True, False, 2),
    "DeiT": _Processor(True, True, 3),
    "MobileNetV1": _Processor(False, True, 2),
    "MobileNetV2": _Processor(False, True, 2),
    "Siglip": _Processor(False, False, 3),
    "ViT": _Processor(True, False, 2),
}

# The processor of a model's type, for repositories whose preprocessor_config.json names none.
_OF_MODELS = {
    "beit": "Beit",
    "blip": "Blip",
    "clip": "CLIP",
    "clip_vision_model": "CLIP",
    "convnext": "ConvNext",
    "convnextv2": "ConvNext",
    "data2vec-vision": "Beit",
    "deit": "DeiT",
    "dinov2": "Bit",
    "dinov2_with_registers": "Bit",
    "dinov3_vit": "DINOv3ViT",
    "mobilenet_v1": "MobileNetV1",
    "mobilenet_v2": "MobileNetV2",
    "regnet": "ConvNext",
    "resnet": "ConvNext",
    "siglip": "Siglip",
    "siglip2": "Siglip",
    "siglip_vision_model": "Siglip",
    "swin": "ViT",
    "swinv2": "ViT",
    "vit": "ViT",
    "vit_mae": "ViT",
    "vit_msn": "ViT",
}


def processor_of(config: dict[str, Any]) -> str | None:
    """Return the name of the processor that a file names, without its endings: CLIP for CLIPImageProcessorFast."""
    named = next((str(config[key]) for key in TYPE_KEYS if config.get(key)), None)
    if named is None:
        return None
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        named = named.removesuffix(ending)
    return named


def with_processor(config: dict[str, Any], model_type: str | None) -> dict[str, Any]:
    """Return the keys with the processor of the model's type where the file names none and we know it."""
    if processor_of(config) is None and model_type in _OF_MODELS:
        return config | {TYPE_KEYS[0]: f"{_OF_MODELS[model_type]}ImageProcessor"}
    return config


def explicit(config: dict[str, Any]) -> dict[str, Any]:
    """Return preprocessor_config.json's keys with a processor's own rules and defaults written out.

    Args:
        config: the file's content; without the name of a processor it is returned as it is.

    Raises:
        ValueError: a processor whose steps we do not have.
        KeyError, TypeError: a key is missing or of the wrong type.

    Source: transformers 5.24, image_processing_*.py; tests compare pixels with both of its backends.
    """
    name = processor_of(config)
    if name is None:
        return config
    if name not in _PROCESSORS:
        named = next(config[key] for key in TYPE_KEYS if config.get(key))
        known = ", ".join(f"{known}ImageProcessor" for known in _PROCESSORS)
        raise ValueError(f"the steps of {named} are not among ours; we have those of {known}")
    processor = _PROCESSORS[name]
    config = {"do_center_crop": processor.cropped, "resample": processor.resample, **config}
    size = config["size"]
    if isinstance(size, int):
        size = {"height": size, "width": size} if processor.square else {"shortest_edge": size}
    if name == "ConvNext" and config.get("do_resize", True):
        side = size["shortest_edge"]
        warped = {"height": side, "width": side}
        if side >= _WARPED_FROM:
            size = warped
        elif not config["do_center_crop"]:
            edge = int(side / (config.get("crop_pct") or _CROP_PCT))
            return config | {"size": {"shortest_edge": edge}, "do_center_crop": True, "crop_size": warped}
    return config | {"size": size}
