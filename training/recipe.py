"""A recipe: what a pretraining run needs to know, as a TOML file, validated and frozen."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import InvalidRequest

SHIPPED = Path(__file__).parent / "recipes"

_Share = Annotated[float, Field(ge=0, le=1)]
_Width = Annotated[int, Field(ge=1)]


class Augmentation(BaseModel):
    """Strengths of the random changes that make a view; everything left at 0 is off. See augment.py.

    Attributes:
        crop_area: smallest share of the picture's area that a crop keeps; 1 keeps all of it.
        flip: probability of a left-right flip.
        rotation: largest angle, in degrees.
        scale: largest relative change of size, of each axis by itself.
        shear: largest shear, as a tangent.
        shift: largest shift, as a share of the side.
        elastic: largest local displacement, as a share of the side.
        stroke: probability of thicker or thinner strokes (bright on dark).
        jitter: probability of a change of brightness, contrast and saturation by up to jitter_strength, and of hue.
        hue: largest turn of the hue in a jittered view, as a share of the circle.
        grey: probability of losing all colour.
        blur: probability of a Gaussian blur of up to blur_radius.
        blur_radius: largest standard deviation of the blur, as a share of the side.
        solarise: probability of inverting all values above a half.
        erase: probability of a blank square of up to a third of the side.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    crop_area: Annotated[float, Field(gt=0, le=1)] = 1.0
    flip: _Share = 0.0
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.0
    shear: Annotated[float, Field(ge=0, le=2)] = 0.0
    shift: _Share = 0.0
    elastic: _Share = 0.0
    stroke: _Share = 0.0
    jitter: _Share = 0.0
    jitter_strength: _Share = 0.4
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    grey: _Share = 0.0
    blur: _Share = 0.0
    blur_radius: Annotated[float, Field(gt=0, le=0.25)] = 0.05
    solarise: _Share = 0.0
    erase: _Share = 0.0


class Recipe(BaseModel):
    """One pretraining run.

    Attributes:
        name: the recipe's name, from its file.
        side: S in pixels.
        channels: 1 trains on luminance alone, 3 on RGB.
        epochs: passes over the pictures, unless a time is given at the command line.
        batch_size: N pictures a step.
        learning_rate: AdamW's peak, after `warmup` steps (a tenth of a short run) and before the cosine down to 0.
        projection: hidden and output width of the projection head.
        temperature: τ of NT-Xent.
        seed: of weights, order and augmentation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    method: Literal["simclr"]
    backbone: Literal["small-cnn", "resnet18"]
    side: Annotated[int, Field(ge=8, le=512)]
    channels: Literal[1, 3]
    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=2)]
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    warmup: Annotated[int, Field(ge=0)]
    temperature: Annotated[float, Field(gt=0)]
    projection: tuple[_Width, _Width]
    seed: int = 0
    augmentation: Augmentation


def read_recipe(name: str) -> Recipe:
    """Read a shipped recipe by name, or a TOML file by path.

    Raises:
        InvalidRequest: no such recipe, TOML that does not parse, an unknown key or a value out of range.
    """
    path = Path(name) if name.endswith(".toml") else SHIPPED / f"{name}.toml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.toml")))
        raise InvalidRequest(f"{name}: no such recipe; expected a .toml file or one of: {shipped}")
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text())
        if "name" in content:
            raise InvalidRequest(f"{path}: name: the file's own name is the recipe's; leave the key out")
        return Recipe(name=path.stem, **content)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path}: not TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"{path}: {where}: {first['msg']}") from error
