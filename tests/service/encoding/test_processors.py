"""Our pixels are those of transformers' image processors, in both of its backends, for what each name stands for."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from numpy.typing import NDArray
from PIL import Image

from service import PixelArray
from service.encoding.card import Preprocessing
from service.encoding.images import decode, decode_pixels, to_pixels
from service.encoding.limits import Limits
from service.encoding.processors import explicit, with_processor
from service.errors import InvalidModel
from tests.conftest import encoded

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
# A side so large that no JPEG is decoded at a part of its size.
NO_DRAFT = 10_000
SQUARE = {"height": 224, "width": 224}

# preprocessor_config.json as it stands in repositories of these families, of this year and of the first ones.
CONFIGS: dict[str, dict[str, Any]] = {
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "crop_size": SQUARE,
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 256},
        **IMAGENET,
    },
    "clip": {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "crop_size": 224,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 3,
        "size": 224,
        **CLIP,
    },
    "siglip": {
        "image_processor_type": "SiglipImageProcessor",
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": SQUARE,
        **HALF,
    },
    "siglip2": {
        "image_processor_type": "SiglipImageProcessor",
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "resample": 2,
        "size": SQUARE,
        **HALF,
    },
    "resnet": {
        "feature_extractor_type": "ConvNextFeatureExtractor",
        "crop_pct": 0.875,
        "do_normalize": True,
        "do_resize": True,
        "resample": 3,
        "size": 224,
        **IMAGENET,
    },
    "resnet bilinear": {
        "image_processor_type": "ConvNextImageProcessor",
        "crop_pct": 0.95,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "resample": 2,
        "size": {"shortest_edge": 224},
        **IMAGENET,
    },
    "convnext 384": {"image_processor_type": "ConvNextImageProcessor", "resample": 3, "size": 384, **IMAGENET},
    "vit": {"feature_extractor_type": "ViTFeatureExtractor", "do_normalize": True, "size": 224, **HALF},
    "deit": {
        "feature_extractor_type": "DeiTFeatureExtractor",
        "size": 256,
        "crop_size": 224,
        "resample": 3,
        **IMAGENET,
    },
    "beit": {"image_processor_type": "BeitImageProcessor", "size": SQUARE, "do_center_crop": False, **HALF},
    "dinov3": {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": SQUARE, **IMAGENET},
    "mobilenet": {"image_processor_type": "MobileNetV2ImageProcessor", "crop_size": SQUARE, "size": 256, **HALF},
    "not square": {"image_processor_type": "ViTImageProcessor", "size": {"height": 256, "width": 128}, **HALF},
}


def processor(config: dict[str, Any], backend: str) -> Any:
    name = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
    name = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
    made = getattr(transformers, name + ("Pil" if backend == "pil" else ""))
    keys = {key: value for key, value in config.items() if not key.endswith("_type")}
    return made(**keys)


def theirs(config: dict[str, Any], backend: str, picture: Image.Image) -> NDArray[np.float32]:
    """Return transformers' pixels (3, height, width) in 0..255, with its normalisation undone."""
    values = processor(config, backend)(picture, return_tensors="np")["pixel_values"][0]
    mean, std = (np.asarray(config[key]).reshape(3, 1, 1) for key in ("image_mean", "image_std"))
    return np.asarray((values * std + mean) * 255, np.float32)


def distance(pixels: PixelArray, other: NDArray[np.float32]) -> float:
    assert pixels.transpose(2, 0, 1).shape == other.shape
    return float(np.abs(pixels.transpose(2, 0, 1) - other).mean())


def photographs(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "photos").iterdir()) if path.suffix == ".JPEG"]


def rough(seed: int) -> Image.Image:
    """A picture with detail at every pixel, and of odd sides: a crop that is one pixel off is far away."""
    random = np.random.default_rng(seed)
    width, height = (int(side) for side in random.integers(401, 700, 2))
    coarse = Image.fromarray(random.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("family", CONFIGS)
def test_pixels_are_those_of_transformers(family: str) -> None:
    config = CONFIGS[family]
    preprocessing = Preprocessing.from_config(config, family)
    pictures = [rough(seed) for seed in range(4)]
    ours = [to_pixels(picture, preprocessing) for picture in pictures]
    backends = ["torchvision"] if family == "dinov3" else ["pil", "torchvision"]
    for backend in backends:
        far = [distance(one, theirs(config, backend, picture)) for one, picture in zip(ours, pictures, strict=True)]
        assert max(far) < 0.3, backend


@pytest.mark.slow("125 photographs through transformers' processors, in two backends, for six families")
@pytest.mark.parametrize("family", ["dinov2", "clip", "siglip", "siglip2", "resnet", "resnet bilinear"])
def test_pixels_of_real_photographs_are_theirs(family: str, data_root: Path) -> None:
    preprocessing = Preprocessing.from_config(CONFIGS[family], family)
    for backend in ("pil", "torchvision"):
        whole, served = [], []
        for data in photographs(data_root):
            # transformers ignores colour profiles, so it gets our picture in sRGB.
            picture = decode(data, NO_DRAFT, Limits())
            expected = theirs(CONFIGS[family], backend, picture)
            whole.append(distance(to_pixels(picture, preprocessing), expected))
            # As the service does it: a large JPEG is decoded at a half or a quarter of its size.
            served.append(distance(decode_pixels(data, preprocessing, Limits()), expected))
        assert np.mean(served) < 0.03
        assert max(whole) < 0.3
        assert max(served) < 0.5


def test_names_of_processors_without_ours_are_refused() -> None:
    for name in ("MobileViTImageProcessor", "EfficientNetImageProcessor", "Siglip2ImageProcessor", "Mine"):
        with pytest.raises(InvalidModel, match=f"the steps of {name} are not among ours; we have those of Beit"):
            Preprocessing.from_config({"image_processor_type": name, "size": SQUARE, **HALF}, "test")


def test_a_file_without_a_name_gets_its_models_processor() -> None:
    file = {"size": 224, **HALF}
    assert with_processor(file, "vit")["image_processor_type"] == "ViTImageProcessor"
    assert with_processor(CONFIGS["clip"], "vit") == CONFIGS["clip"]
    assert with_processor(file, "unheard-of") == file
    assert explicit(file) == file


def test_a_large_shortest_edge_gets_a_large_draft() -> None:
    picture, config = rough(0), CONFIGS["dinov2"] | {"size": {"shortest_edge": 512}}
    large = picture.resize((4 * picture.width, 4 * picture.height), Image.Resampling.BICUBIC)
    preprocessing = Preprocessing.from_config(config, "test")
    assert (preprocessing.side, preprocessing.decoded_side) == (224, 448)
    assert Preprocessing.from_config(CONFIGS["dinov2"], "test").decoded_side == 224
    data = encoded(large, "JPEG", quality=95)
    expected = theirs(config, "pil", Image.open(io.BytesIO(data)))
    assert distance(decode_pixels(data, preprocessing, Limits()), expected) < 0.5
