"""A recipe: the settings of a pretraining run, a TOML file, validated and frozen."""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from service.encoding.card import Preprocessing, square_preprocessing
from service.errors import InvalidRequest

SHIPPED = Path(__file__).parent / "recipes"

MethodName = Literal[
    "simclr",
    "moco",
    "byol",
    "simsiam",
    "dino",
    "barlow",
    "vicreg",
    "supcon",
    "clusters",
    "triplet",
    "margin",
    "infonce",
    "clip",
]
# The backbone that is an encoder of --init, as it is: locked-image tuning, Zhai et al., arXiv:2111.07991.
LOCKED = "locked"
# What a recipe with it need not say: its encoder does. Values only fill the place.
_OF_LOCKED: dict[str, Any] = {"side": 8, "channels": 3, "views": 1, "augmentation": {}}
# Tokens that a vocabulary of byte-level BPE has before the first merge: 256 bytes, padding, start and end.
LEAST_VOCABULARY = 259

PRESETS: dict[str, dict[str, float]] = {
    # SimCLR's, with BYOL's solarisation.
    "photos": {
        "crop_area": 0.2,
        "flip": 0.5,
        "jitter": 0.8,
        "jitter_strength": 0.4,
        "hue": 0.1,
        "grey": 0.2,
        "blur": 0.5,
        "solarise": 0.1,
    },
    # A blur would erase a picture of 32 pixels.
    "small-photos": {"crop_area": 0.2, "flip": 0.5, "jitter": 0.8, "jitter_strength": 0.4, "hue": 0.1, "grey": 0.2},
    # Bright strokes on dark: no flip and no colour, small warps instead.
    "glyphs": {
        "rotation": 15,
        "scale": 0.3,
        "shear": 0.3,
        "shift": 0.08,
        "elastic": 0.06,
        "stroke": 0.5,
        "erase": 0.3,
    },
}

_Share = Annotated[float, Field(ge=0, le=1)]
_Area = Annotated[float, Field(gt=0, le=1)]
_Momentum = Annotated[float, Field(ge=0, lt=1)]
_Positive = Annotated[float, Field(gt=0)]
_Weight = Annotated[float, Field(ge=0)]
_Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Augmentation(_Section):
    """Strengths of the random changes that make a view; a change left at 0 is off. See augment.py.

    Attributes:
        preset: defaults by name, from PRESETS; keys beside it take precedence.
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

    preset: Literal["photos", "small-photos", "glyphs"] | None = None
    crop_area: _Area = 1.0
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

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, content: Any) -> Any:
        preset = content.get("preset") if isinstance(content, dict) else None
        return {**PRESETS.get(preset, {}), **content} if isinstance(preset, str) else content


class SimCLR(_Section):
    """temperature: τ of NT-Xent."""

    temperature: _Positive = 0.2


class MoCo(_Section):
    """temperature: τ. momentum: m of the key encoder. queue: K keys. splits: groups with batch norms of their own."""

    temperature: _Positive = 0.2
    momentum: _Momentum = 0.99
    queue: _Count = 4096
    splits: _Count = 8


class BYOL(_Section):
    """predictor: hidden width of q. momentum: τ_base, from which the target's momentum rises to 1; lower it in runs of
    a few hundred steps, to 0.8 for 200."""

    momentum: _Momentum = 0.99
    predictor: _Count = 256


class SimSiam(_Section):
    """predictor: hidden width of h, a bottleneck."""

    predictor: _Count = 64


class Dino(_Section):
    """Multi-crop: the teacher sees the recipe's `views`, the student these and local views.

    Attributes:
        local_views: L, how many local views each picture has.
        local_side: their side in pixels; half of the recipe's if left out.
        local_area: smallest and largest share of the picture's area that a local view shows. That of a global view is
            `augmentation.crop_area` to 1.
        prototypes: K, outputs of the last layer.
        temperature: τ_s of the student.
        teacher_temperature: τ_t of the teacher, at first and after `teacher_warmup`, in between on a line.
        teacher_warmup: share of the run.
        frozen: share of the run, at its beginning, in which the last layer does not learn.
        centering: "mean", a running mean of the teacher's outputs, or "sinkhorn", the centre with which each batch uses
            all prototypes equally (DINOv2).
        center_momentum: m of the running mean.
        momentum: λ_base, from which the teacher's momentum rises to 1.
    """

    local_views: Annotated[int, Field(ge=0, le=32)] = 4
    local_side: Annotated[int, Field(ge=4, le=512)] | None = None
    local_area: tuple[_Area, _Area] = (0.05, 0.4)
    prototypes: Annotated[int, Field(ge=2)] = 1024
    temperature: _Positive = 0.1
    teacher_temperature: tuple[_Positive, _Positive] = (0.04, 0.04)
    teacher_warmup: _Share = 0.3
    frozen: _Share = 0.01
    centering: Literal["mean", "sinkhorn"] = "mean"
    center_momentum: _Momentum = 0.9
    momentum: _Momentum = 0.99

    @field_validator("local_area")
    @classmethod
    def _check_order(cls, areas: tuple[float, float]) -> tuple[float, float]:
        if areas[0] > areas[1]:
            raise PydanticCustomError("order", "expected the smallest share and then the largest")
        return areas


class Barlow(_Section):
    """lambd: λ, the weight of the redundancy term."""

    lambd: _Positive = 0.0051


class VICReg(_Section):
    """lambd, mu, nu: λ, μ, ν, the weights of invariance, variance and covariance."""

    lambd: _Weight = 25.0
    mu: _Weight = 25.0
    nu: _Weight = 1.0


class SupCon(_Section):
    """temperature: τ. labelled: share of each batch that is drawn from the pictures with a label, again and again if
    they are few; 0 draws each picture once an epoch. Needs labels of some pictures."""

    temperature: _Positive = 0.1
    labelled: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Clusters(_Section):
    """clusters: k of k-means. every: E epochs between two clusterings; SimCLR until the first. temperature: τ."""

    clusters: Annotated[int, Field(ge=2)] = 100
    every: _Count = 1
    temperature: _Positive = 0.2


class Triplet(_Section):
    """margin: between the distances of normalised embeddings, 0..2. mining: see losses.triplet. Needs labels."""

    margin: _Positive = 0.2
    mining: Literal["hard", "semi-hard"] = "semi-hard"


class Margin(_Section):
    """margin: m, the distance of normalised embeddings, 0..2, beyond which unlike pairs have no loss. Needs labels."""

    margin: _Positive = 1.0


class InfoNCE(_Section):
    """temperature: τ. Negatives are the batch's pictures of other labels. Needs labels."""

    temperature: _Positive = 0.1


class Clip(_Section):
    """Pictures and texts in one space.

    Attributes:
        loss: softmax is CLIP's, sigmoid SigLIP's.
        dimension: P of that space; with a locked backbone it is the encoder's own.
        temperature: τ at first; it learns, and is 0.01 or more.
        bias: b of the sigmoid at first; it learns.
    """

    loss: Literal["softmax", "sigmoid"] = "softmax"
    dimension: _Count = 128
    temperature: Annotated[float, Field(ge=0.01)] = 0.07
    bias: float = -10.0


class Text(_Section):
    """The text tower of `clip`, and the captions that it learns from where the source has none of its own.

    Attributes:
        width, layers, heads: of the transformer.
        max_length: tokens of a text, start and end included; longer ones are cut.
        vocabulary: tokens that the tower knows. A byte-level BPE of up to so many is learnt from the captions.
        tokenizer: a tokenizer.json to take in its place.
        templates: captions of a picture by its label; {label} stands for the label's words.
        words: of a label, where the label itself is no word, as in 7 = ["seven", "7"]. Zero-shot takes the first.
    """

    width: _Count = 128
    layers: _Count = 2
    heads: _Count = 4
    max_length: Annotated[int, Field(ge=3, le=512)] = 32
    vocabulary: Annotated[int, Field(ge=LEAST_VOCABULARY)] = 2048
    tokenizer: str | None = None
    templates: Annotated[tuple[str, ...], Field(min_length=1)] = ("a photo of a {label}",)
    words: dict[str, Annotated[tuple[str, ...], Field(min_length=1)]] = {}

    @field_validator("words", mode="before")
    @classmethod
    def _one_word(cls, words: Any) -> Any:
        if not isinstance(words, dict):
            return words
        return {label: [word] if isinstance(word, str) else word for label, word in words.items()}

    @model_validator(mode="after")
    def _check_text(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of the {self.heads} heads, not {self.width}")
        without = [template for template in self.templates if "{label}" not in template]
        if without:
            raise ValueError(f"templates: expected {{label}} in each, not {without[0]!r}")
        if any(not word.strip() for words in self.words.values() for word in words):
            raise ValueError("words: expected a word for each label, not an empty text")
        return self


class Recipe(_Section):
    """One pretraining run.

    Attributes:
        name: the recipe's name, from its file.
        method: the paper. Its settings are the table of the same name; tables of other methods are ignored.
        backbone: small-cnn, mid-cnn, a classification backbone of torchvision.models by name, or timm:NAME; or locked:
            the encoder that --init names, as it is, for clip. Its recipe leaves side, channels, views
            and augmentation out.
        frozen: paths of the backbone's modules and parameters that do not learn; their batch norms stay in eval mode.
        frozen_statistics: the backbone's batch norms keep the statistics of the weights that the run begins with, and
            learn only scale and shift. For pretrained weights in short runs.
        side: S in pixels.
        shortest_edge: of a picture after resizing, before the crop of S; None for S. The exported encoder does the
            same.
        view_side: side of the views in pixels, at most S; None for S. Random crops show things larger than whole
            pictures do, so smaller views cost less and are nearer to what the encoder will see.
        channels: 1 trains on luminance alone, 3 on RGB.
        mean, std: subtracted from pixels in 0..1, and divided by, for each channel. None takes those that the
            backbone's weights were trained with, and for random weights those of the pictures.
        epochs: passes over the pictures; a time given at the command line replaces it.
        batch_size: N pictures, which are compared with one another.
        views: V of each picture; clip does with 1.
        accumulate: batches whose gradients make one step.
        optimizer: adamw, sgd or lars.
        momentum: of sgd and lars. nesterov: of sgd.
        learning_rate: the optimizer's peak, after `warmup` steps (a tenth of a short run) and before the cosine to 0.
        backbone_rate: share of the learning rate for the backbone's last layer.
        layer_decay: share of the next layer's learning rate for each layer before it.
        decay_norms: weight decay acts on biases and on scales and shifts of norms, too; never under lars.
        ema: momentum of an average of the backbone's weights, which is exported in their place; 0 for none.
        projection: hidden and output width of the projection head; clip has none.
        precision: auto takes bfloat16 if it is measured to be faster.
        compile: compile the backbone if a trial measures that to be faster.
        resident: decode all pictures before the first step and keep their pixels on the device.
        variants: graphs in other arithmetic that are exported beside model.onnx if they are close enough to it.
        knn_times: how often in the run the held-out pictures are classified by k-NN.
        knn_bank: training pictures that vote in it, at most.
        seed: of weights, order and augmentation.
    """

    name: str
    method: MethodName
    backbone: str
    frozen: tuple[str, ...] = ()
    frozen_statistics: bool = False
    side: Annotated[int, Field(ge=8, le=512)]
    shortest_edge: Annotated[int, Field(ge=8, le=1024)] | None = None
    view_side: Annotated[int, Field(ge=8, le=512)] | None = None
    channels: Literal[1, 3]
    mean: tuple[float, ...] | None = None
    std: tuple[_Positive, ...] | None = None
    epochs: _Count
    batch_size: Annotated[int, Field(ge=2)]
    views: Annotated[int, Field(ge=1, le=16)] = 2
    accumulate: _Count = 1
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    momentum: _Momentum = 0.9
    nesterov: bool = False
    learning_rate: _Positive
    backbone_rate: _Positive = 1.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    weight_decay: _Weight
    decay_norms: bool = True
    ema: _Momentum = 0.0
    warmup: Annotated[int, Field(ge=0)]
    projection: tuple[_Count, _Count] = (256, 128)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    resident: bool = False
    variants: tuple[Literal["fp16", "int8"], ...] = ("fp16", "int8")
    knn_times: _Count = 5
    knn_bank: Annotated[int, Field(ge=20)] = 4000
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    augmentation: Augmentation
    simclr: SimCLR = SimCLR()
    moco: MoCo = MoCo()
    byol: BYOL = BYOL()
    simsiam: SimSiam = SimSiam()
    dino: Dino = Dino()
    barlow: Barlow = Barlow()
    vicreg: VICReg = VICReg()
    supcon: SupCon = SupCon()
    clusters: Clusters = Clusters()
    triplet: Triplet = Triplet()
    margin: Margin = Margin()
    infonce: InfoNCE = InfoNCE()
    clip: Clip = Clip()
    text: Text = Text()

    @property
    def local_side(self) -> int:
        """Side of the local views in pixels."""
        return self.dino.local_side or self.side // 2

    @property
    def preprocessing(self) -> Preprocessing:
        """How a picture becomes pixels, in training and of the exported encoder."""
        return square_preprocessing(self.side, self.shortest_edge)

    @model_validator(mode="before")
    @classmethod
    def _leave_to_locked(cls, content: Any) -> Any:
        locked = isinstance(content, dict) and content.get("backbone") == LOCKED
        return {**_OF_LOCKED, **content} if locked else content

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        if self.method != "clip":
            if self.views < 2:
                raise ValueError(f"views: {self.method} compares views of a picture: expected 2 or more")
            if self.backbone == LOCKED:
                raise ValueError(f"backbone: locked is for clip, not for {self.method}, which trains pictures alone")
        elif self.ema:
            raise ValueError("ema: averages the backbone alone, and clip's text tower learns with it: leave it out")
        return self

    @model_validator(mode="after")
    def _check_pixels(self) -> Self:
        if self.shortest_edge and self.shortest_edge < self.side:
            raise ValueError(f"shortest_edge: expected {self.side} or more, the side, not {self.shortest_edge}")
        if self.view_side and self.view_side > self.side:
            raise ValueError(f"view_side: expected {self.side} or less, the side, not {self.view_side}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std: expected both or neither")
        if self.mean and self.std and not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std: expected {self.channels} numbers each, one a channel")
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise ValueError("nesterov: is for the optimizer sgd with momentum")
        return self

    def facts(self) -> dict[str, Any]:
        """Return the settings that the run depends on: all but the tables of other methods, and what has no effect."""
        others = set(MethodName.__args__) - {self.method}  # type: ignore[attr-defined]
        others |= {"projection"} if self.method == "clip" else {"text"}
        if self.backbone == LOCKED:
            others |= set(_OF_LOCKED)
        return self.model_dump(mode="json", exclude=others)


def read_recipe(name: str, changes: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name, or a TOML file by path.

    Args:
        name: of the recipe, or a path that ends in .toml.
        changes: "key=value" each, with a TOML value or a bare word; "table.key=value" for a key of a table.

    Raises:
        InvalidRequest: no such recipe, TOML that does not parse, an unknown key or a value out of range.
    """
    path = Path(name) if name.endswith(".toml") else SHIPPED / f"{name}.toml"
    if not path.is_file():
        shipped = sorted(file.stem for file in SHIPPED.glob("*.toml"))
        raise InvalidRequest(f"{name}: no such recipe; expected a .toml file or one of: {', '.join(shipped)}")
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path}: not TOML: {error}") from error
    if "name" in content:
        raise InvalidRequest(f"{path}: name: the file's own name is the recipe's; leave the key out")
    for change in changes:
        _change(content, change)
    try:
        return Recipe.model_validate({"name": path.stem, **content})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise InvalidRequest(f"{path}: {where}: unknown key{_nearest(where)}") from error
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidRequest(f"{path}: {where}{': ' if where else ''}{message}") from error


def _change(content: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    key = key.strip()
    if not equals or key not in _keys():
        problem = "expected key=value" if not equals else f"unknown key{_nearest(key)}"
        raise InvalidRequest(f"--set {change}: {problem}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        # As in --set method=byol: a shell removes the quotes.
        value = text.strip()
    *table, leaf = key.split(".")
    inner = content.setdefault(table[0], {}) if table else content
    if not isinstance(inner, dict):
        raise InvalidRequest(f"--set {change}: {table[0]} is a table, and the recipe has {inner!r} there")
    inner[leaf] = value


def _keys() -> list[str]:
    keys = []
    for name, field in Recipe.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += [f"{name}.{leaf}" for leaf in kind.model_fields]
        elif name != "name":
            keys.append(name)
    return keys


def _nearest(key: str) -> str:
    """Return a hint at the known key most like an unknown one, in its own table or another."""
    keys = _keys()
    near = difflib.get_close_matches(key, keys, 1) or [
        known for known in keys if known.rpartition(".")[2] == key.rpartition(".")[2]
    ]
    if not near:
        leaves = {known.rpartition(".")[2]: known for known in keys}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], leaves, 1)]
    return f"; did you mean {near[0]}?" if near else f"; the keys are {', '.join(keys)}"
