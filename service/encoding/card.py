"""models/NAME as data: the preprocessing beside the weights, and the card with the encoder's facts."""

import base64
import hashlib
import json
import math
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from service import FloatArray
from service.encoding.processors import explicit, processor_of
from service.errors import InvalidModel

MODEL_FILE = "model.onnx"
# The graphs of one encoder in different arithmetic, by the names that users write.
VARIANTS = {"fp32": MODEL_FILE, "fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}
# Names of a graph's output that mark the embedding; without them it is the only 2-D output.
OUTPUTS = ("embedding", "image_embeds")
# Distances between tone histograms, as `suits` compares them.
_UNLIKE, _ALIKE = 0.6, 0.45
# A variant belongs to the encoder if 99 pictures in 100 have this cosine to model.onnx.
LEAST_VARIANT_COSINE = 0.99
PREPROCESSOR_FILE = "preprocessor_config.json"
CARD_FILE = "card.json"
# The text tower of an image-text encoder: its graph, and the other files, without which it is none.
TEXT_FILE = "text.onnx"
TEXT_FILES = (TEXT_FILE, "tokenizer.json", "text_config.json")
# The factor of cosines before the softmax of zero-shot labels, where the card tells none: that of CLIP, trained to the
# end of its range.
_LOGIT_SCALE = 100.0
POOLINGS = ("class", "mean")


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes pixels, read from the Hugging Face image-processor keys.

    Attributes:
        height, width: of the pixels that the encoder takes.
        resize: (width, height) to resize to, or the length of the shortest edge, or None.
        resample: Pillow's number of the filter (2 bilinear, 3 bicubic).
        floors: whether the offset of the crop is rounded down, as by transformers; else half pixels go to the even
            number, as by torchvision.
        rescale: factor for a float graph input; None leaves 0..255.
        mean, std: per channel, for a float graph input after rescaling; None leaves it.
        canonical: sorted JSON of the whole file, one ingredient of the fingerprint.
    """

    height: int
    width: int
    resize: tuple[int, int] | int | None
    resample: int
    floors: bool
    rescale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    canonical: str

    @property
    def side(self) -> int:
        """S, the longer side of the pixels: the side of their square, nearly always."""
        return max(self.height, self.width)

    @property
    def sizes(self) -> dict[str, int]:
        """The side of the square, or height and width, as users see them."""
        return {"side": self.side} if self.height == self.width else {"height": self.height, "width": self.width}

    @property
    def decoded_side(self) -> int:
        """The side that `images.decode` is to serve: a draft then has 1.75 times the resized picture's edge or more."""
        edge = max(self.resize) if isinstance(self.resize, tuple) else self.resize or 0
        return max(self.side, math.ceil(0.875 * edge))

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str) -> "Preprocessing":
        """Read the keys of preprocessor_config.json; where they name a processor of transformers, as that reads them.

        Raises:
            InvalidModel: a key is missing, of the wrong type, or asks for a step that we do not have.
        """
        try:
            return cls._read(config)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
            raise InvalidModel(f"{where}: not a preprocessing that we can apply: {reason}") from error

    @classmethod
    def _read(cls, file: dict[str, Any]) -> "Preprocessing":
        config = explicit(file)
        resize = _resize(config["size"]) if config.get("do_resize", True) else None
        if config.get("do_center_crop", False):
            crop = config["crop_size"]
            width, height = (crop, crop) if isinstance(crop, int) else (crop["width"], crop["height"])
        elif isinstance(resize, tuple):
            width, height = resize
        else:
            raise ValueError("needs do_center_crop, or a size of width and height")
        for step in ("do_pad", "do_flip_channel_order", "rescale_offset"):
            if config.get(step, False):
                raise ValueError(f"{step} is not supported")
        width, height = _side(width), _side(height)
        least = resize if isinstance(resize, tuple) else (resize, resize)
        if any(edge is not None and edge < side for edge, side in zip(least, (width, height), strict=True)):
            raise ValueError(f"size {resize} is smaller than crop_size {width}x{height}")
        normalize = config.get("do_normalize", True)
        std = tuple(float(value) for value in config["image_std"]) if normalize else None
        mean = tuple(float(value) for value in config["image_mean"]) if normalize else None
        if normalize and (len(mean or ()) != 3 or len(std or ()) != 3 or not all(std or ())):
            raise ValueError("image_mean and image_std need three numbers, image_std no zero")
        rescale = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else None
        resample = int(config.get("resample", 2))
        if not 0 <= resample <= 5:
            raise ValueError(f"resample must be 0..5, not {resample}")
        canonical = json.dumps(file, sort_keys=True, separators=(",", ":"))
        floors = processor_of(file) is not None
        return cls(height, width, resize, resample, floors, rescale, mean, std, canonical)


def _resize(size: Any) -> tuple[int, int] | int:
    """Return the (width, height) or the shortest edge that the key `size` asks for."""
    if isinstance(size, int):
        return _side(size)
    if "shortest_edge" in size:
        return _side(size["shortest_edge"])
    return _side(size["width"]), _side(size["height"])


def _side(value: object) -> int:
    if not isinstance(value, int) or not 1 <= value <= 4096:
        raise ValueError(f"a side must be a whole number of pixels from 1 to 4096, not {value!r}")
    return value


class TextFiles(NamedTuple):
    """The bytes of TEXT_FILES, which were verified."""

    model: bytes
    tokenizer: bytes
    config: bytes


class Output(NamedTuple):
    """The output of a graph that becomes the embedding.

    name: the output's.
    pooling: None for an output (N, D); "class" takes row 0 of tokens (N, T, D); "mean" averages tokens (N, T, D), or
        the places of a feature map (N, D, H, W).
    """

    name: str
    pooling: str | None = None


@dataclass(frozen=True)
class Card:
    """An encoder's folder, read and verified.

    Attributes:
        folder: the folder it was read from, absolute.
        name: the encoder's name.
        fingerprint: sha256 (hex) over model.onnx and the canonical preprocessing: the embedding space.
        model: the bytes of model.onnx that were verified.
        preprocessing: how pictures become pixels for it.
        facts: card.json as written by export; {} for an encoder that came without one.
        variants: the bytes of model.onnx's variants by name, verified and measured as well.
        text: the text tower, verified as well; None for an encoder of pictures alone.
    """

    folder: Path
    name: str
    fingerprint: str
    model: bytes
    preprocessing: Preprocessing
    facts: dict[str, Any]
    variants: dict[str, bytes] = field(default_factory=dict)
    text: TextFiles | None = None

    @property
    def output(self) -> Output | None:
        """The output that the card names, or None if the graph's own names tell.

        Raises:
            InvalidModel: the card's entry is not the name of an output and a pooling.
        """
        entry = self.facts.get("output")
        if entry is None:
            return None
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("name"), str)
            or entry.get("pooling") not in (None, *POOLINGS)
        ):
            raise InvalidModel(
                f"{self.folder / CARD_FILE}: output: expected a name, and a pooling of {' or '.join(POOLINGS)} or null"
            )
        return Output(entry["name"], entry.get("pooling"))

    @property
    def canary(self) -> FloatArray | None:
        """The embedding (D,) of the canary picture that the card records from the export, or None.

        Raises:
            InvalidModel: the card's entry is not float32 numbers in base64.
        """
        text = self.facts.get("canary")
        try:
            return None if text is None else np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)
        except (ValueError, TypeError) as error:
            raise InvalidModel(f"{self.folder / CARD_FILE}: canary: expected float32 numbers in base64") from error

    @property
    def logit_scale(self) -> float:
        """The factor of cosines before the softmax over zero-shot labels; 100 where the card tells none.

        Raises:
            InvalidModel: the card's entry is not a positive number.
        """
        scale = self.facts.get("logit_scale", _LOGIT_SCALE)
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
            raise InvalidModel(f"{self.folder / CARD_FILE}: logit_scale: expected a positive number")
        return float(scale)


def square_preprocessing(
    side: int, shortest_edge: int | None = None, resample: int = 3, squash: bool = False
) -> Preprocessing:
    """Return the preprocessing of our encoders: resize the shortest edge, then crop the central square.

    Pixels go into the graph as uint8; the graph normalises them.

    Args:
        side: S, in pixels.
        shortest_edge: its length after resizing; S if None.
        resample: Pillow's number of the filter.
        squash: resize both edges to that length, whatever the picture's shape.
    """
    edge = shortest_edge or side
    config = {
        "do_resize": True,
        "size": {"height": edge, "width": edge} if squash else {"shortest_edge": edge},
        "resample": resample,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": False,
        "do_normalize": False,
    }
    return Preprocessing.from_config(config, "export")


def choose_output(outputs: dict[str, int], named: Output | None = None) -> Output | None:
    """Return the output that is the embedding, or None.

    Args:
        outputs: the number of axes of each of a graph's outputs, by name.
        named: the one that the card names, if it names one.
    """
    if named is not None:
        return named if named.name in outputs else None
    for name in OUTPUTS:
        if name in outputs:
            return Output(name)
    flat = [name for name, axes in outputs.items() if axes == 2]
    return Output(flat[0]) if len(flat) == 1 else None


def fingerprint(model: bytes, preprocessing: Preprocessing, output: Output | None = None) -> str:
    """Return the sha256 (hex) that names the embedding space of a model, its preprocessing and the output it names."""
    chosen = "" if output is None else json.dumps(output)
    return hashlib.sha256(hashlib.sha256(model).digest() + (preprocessing.canonical + chosen).encode()).hexdigest()


def read_card(folder: Path) -> Card:
    """Read a model folder and check it against its own card.

    Raises:
        InvalidModel: missing folder or file, JSON that does not parse, a checksum that differs or is missing, a variant
            that the card has not measured to be the same encoder, or a part of a text tower without the rest.

    Cost: reads and hashes all files of the encoder once. A server does it before it starts, and in each worker.
    """
    if not folder.is_dir():
        raise InvalidModel(f"{folder}: no such model folder; expected a folder with {MODEL_FILE}")
    files = {file: _read(folder / file) for file in (MODEL_FILE, PREPROCESSOR_FILE)}
    files |= {file: _read(folder / file) for file in (*VARIANTS.values(), *TEXT_FILES) if (folder / file).exists()}
    facts = _parse(_read(folder / CARD_FILE), folder / CARD_FILE) if (folder / CARD_FILE).exists() else {}
    _verify(folder, files, facts.get("sha256", {}))
    config = _parse(files[PREPROCESSOR_FILE], folder / PREPROCESSOR_FILE)
    preprocessing = Preprocessing.from_config(config, str(folder / PREPROCESSOR_FILE))
    name = str(facts.get("name") or folder.resolve().name)
    card = Card(folder.resolve(), name, "", files[MODEL_FILE], preprocessing, facts)
    own = fingerprint(card.model, preprocessing, card.output)
    if facts.get("fingerprint", own) != own:
        raise InvalidModel(f"{folder}: fingerprint is {own[:12]}…, {CARD_FILE} says {facts['fingerprint'][:12]}…")
    variants = {name: files[file] for name, file in VARIANTS.items() if name != "fp32" and file in files}
    for name in variants:
        if not _belongs(VARIANTS[name], facts):
            raise InvalidModel(
                f"{folder / VARIANTS[name]}: {CARD_FILE} has not measured it to be {MODEL_FILE} in other arithmetic; "
                "remove it, or write the encoder again with `lookalike export --overwrite`"
            )
    return replace(card, fingerprint=own, variants=variants, text=_text_files(folder, files))


def _verify(folder: Path, files: dict[str, bytes], sums: dict[str, str]) -> None:
    """Compare files with the sha256 that the card has of each. A card without any is that of an encoder of others.

    Raises:
        InvalidModel: a file differs, is missing, or has no sum. Variants have a check of their own.
    """
    for file, expected in sums.items():
        data = files[file] if file in files else _read(folder / file)
        if (actual := hashlib.sha256(data).hexdigest()) != expected:
            raise InvalidModel(
                f"{folder / file}: damaged: sha256 is {actual[:12]}…, {CARD_FILE} says {str(expected)[:12]}…"
            )
    for file in (MODEL_FILE, PREPROCESSOR_FILE, *TEXT_FILES):
        if sums and file in files and file not in sums:
            raise InvalidModel(f"{folder / file}: {CARD_FILE} has the sha256 of other files, but not of this one")


def _text_files(folder: Path, files: dict[str, bytes]) -> TextFiles | None:
    present = [file for file in TEXT_FILES if file in files]
    missing = [file for file in TEXT_FILES if file not in files]
    if present and missing:
        raise InvalidModel(f"{folder}: has {' and '.join(present)}, but no {' and no '.join(missing)}")
    return TextFiles(*(files[file] for file in present)) if present else None


def digest(card: Card, dimension: int) -> dict[str, Any]:
    """Return the facts that `lookalike info` shows: identity and sizes, then all other entries of the card.

    Args:
        card: the encoder's.
        dimension: D, as its graph gives it.
    """
    shown = {"name": card.name, "fingerprint": card.fingerprint, "dimension": dimension}
    shown |= card.preprocessing.sizes
    return shown | {key: value for key, value in card.facts.items() if key not in (*shown, "canary")}


def _belongs(file: str, facts: dict[str, Any]) -> bool:
    """Whether the card says that a variant's file was measured and is close enough to model.onnx."""
    cosine = facts.get("quality", {}).get(file, {}).get("cosine_p1", 0)
    return file in facts.get("sha256", {}) and float(cosine) >= LEAST_VARIANT_COSINE


def suits(card: Card, gallery_tones: list[float] | None, store: Path) -> str | None:
    """Return a warning that a gallery's pictures are unlike the encoder's training pictures, or None.

    Tone histograms (see images.tones) are compared by total variation: 0 for equal ones, 1 for disjoint ones. The
    distance from MNIST is 0.31 for scikit-learn's digits, 0.58 for photographs at a third of their brightness, 0.76 for
    photographs, 0.74 for photographs in grey, and 0.79 for CIFAR-10.

    Args:
        card: its `data` holds the tones that the encoder was trained on, or the tones that it does not suit.
        gallery_tones: the tones of the gallery's pictures; None or empty gives no warning.
        store: the store's folder, for the command that the warning recommends.
    """
    data = card.facts.get("data", {})
    if not gallery_tones:
        return None
    trained, unsuited = data.get("tones"), data.get("unsuited")
    if trained and _distance(trained, gallery_tones) >= _UNLIKE:
        return (
            f"The encoder {card.name} was trained on {data.get('source', 'other pictures')}, and these pictures look "
            "unlike those: expect poor matches. "
            f"`lookalike reindex --store {shlex.quote(str(store))}` gives them the encoder for photographs."
        )
    if unsuited and _distance(unsuited["tones"], gallery_tones) < _ALIKE:
        return (
            f"The encoder {card.name} was trained on photographs, and these pictures look like {unsuited['name']}: "
            f"expect poor matches. `lookalike reindex --model {unsuited['instead']} --store {shlex.quote(str(store))}` "
            "gives them another encoder."
        )
    return None


def _distance(one: list[float], other: list[float]) -> float:
    return math.fsum(abs(a - b) for a, b in zip(one, other, strict=True)) / 2


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidModel(f"{path}: cannot be read: {error.strerror}") from error


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds. Raises InvalidModel, which names the file."""
    try:
        content = json.loads(data)
    except ValueError as error:
        raise InvalidModel(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidModel(f"{path}: expected a JSON object, not {type(content).__name__}")
    return content
