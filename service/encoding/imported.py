"""ONNX encoders that others trained → models/NAME, without torch: of the hub, of a folder, or a bare graph."""

import json
import re
import sys
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from PIL import Image
from tokenizers import Tokenizer

from service import PixelArray
from service.encoding.card import (
    MODEL_FILE,
    POOLINGS,
    PREPROCESSOR_FILE,
    TEXT_FILE,
    Card,
    Output,
    Preprocessing,
    fingerprint,
)
from service.encoding.encoder import Encoder
from service.encoding.hub import HUB, Files, LocalFiles, open_folder, open_hub
from service.encoding.images import to_pixels
from service.encoding.layouts import (
    CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHTS,
    Layout,
    axes_of,
    choose,
    find_layout,
    read_graph,
    read_json,
    read_preprocessor,
)
from service.encoding.model_folder import check_new, write_model
from service.encoding.processors import with_processor
from service.encoding.text import TEXT_CONFIG_FILE, TextConfig, TextTower
from service.encoding.variants import Pictures, keep_good
from service.errors import InvalidModel, InvalidRequest

_SIDE = re.compile(r"(\d{1,4})(?:x(\d{1,4}))?", re.ASCII)
# Variants are compared with model.onnx on so many crops of the two photographs that scikit-learn brings along.
_CROPS, _PHOTOGRAPHS = 64, ("china.jpg", "flower.jpg")
# The space that pictures share with texts, by the output of the image tower; where its type matters, by that too.
_SHARED_POOLER = ("siglip", "siglip2")
# Tokens of a text where a repository does not say it: the defaults of transformers.
_MAX_LENGTHS = {"clip": 77, "siglip": 64, "siglip2": 64}
# Tokenizers without a limit tell a huge one.
_NO_LIMIT = 1_000_000


class Choices(NamedTuple):
    """Options of the verb, as the user writes them; None where left out.

    side: of a bare graph's pixels, or HEIGHTxWIDTH.
    mean, std: of its pixels in 0..1, one number or three.
    resize: length of the shortest edge before the crop.
    output: the output that is the embedding, with :class or :mean behind it for one of tokens.
    """

    side: str | None = None
    mean: str | None = None
    std: str | None = None
    resize: int | None = None
    output: str | None = None


def is_onnx(what: str) -> bool:
    """Whether a WHAT is for `import_onnx`: a repository of the hub, or a path."""
    return what.startswith(HUB) or "/" in what or what.endswith((".onnx", *WEIGHTS)) or Path(what).exists()


def import_onnx(what: str, out: Path, choices: Choices, overwrite: bool = False) -> None:
    """Write an ONNX encoder as a model folder; what was chosen is printed on stderr and lies in the card.

    Args:
        what: hf:ORG/NAME[@REVISION], a folder in the hub's layout, or an .onnx file.
        out: the folder.
        choices: about a bare graph; `output` for every WHAT.
        overwrite: whether an earlier encoder in `out` may be replaced.

    Raises:
        InvalidRequest: options that do not fit, or no such file.
        InvalidModel: nothing that we can serve, or a repository that cannot be read.
        InvalidOutput: `out` exists, or cannot be written, or the hub's cache cannot.

    Cost: the download, and opening the graph; with variants 64 pictures through each.
    """
    check_new(out, overwrite)
    bare = any(option is not None for option in choices[:4])
    if what.startswith(HUB) or Path(what).is_dir():
        if bare:
            raise InvalidRequest(
                f"{what}: has a {PREPROCESSOR_FILE}: --side, --mean, --std and --resize are for .onnx files"
            )
        _import_files(open_hub(what) if what.startswith(HUB) else open_folder(Path(what)), out, choices.output)
        return
    if what.endswith(WEIGHTS):
        raise InvalidRequest(
            f"{what}: expected ONNX; `lookalike import timm:NAME --weights {what}` reads those of timm's networks"
        )
    if not Path(what).is_file():
        hub = f"; a repository of the hub is written {HUB}{what}" if re.fullmatch(r"[\w.-]+/[\w.-]+", what) else ""
        raise InvalidRequest(f"{what}: no such folder or file{hub}")
    _import_file(Path(what), out, choices)


def _import_files(files: Files, out: Path, output: str | None) -> None:
    layout = find_layout(files)
    config = read_json(files, CONFIG_FILE, layout.graph)
    model_type = str(config["model_type"]) if "model_type" in config else None
    keys = with_processor(read_preprocessor(files, layout.graph), model_type)
    preprocessing = Preprocessing.from_config(keys, f"{files.what}: {PREPROCESSOR_FILE}")
    where = f"{files.what}: {layout.graph}"
    model = files.read(layout.graph)
    graph = read_graph(model, where)
    chosen = _named(output, graph, where) if output else choose(axes_of(graph), model_type, where)
    facts = {
        "method": "imported",
        "backbone": model_type or "unknown",
        "origin": files.origin,
        "file": layout.graph,
        "data": {"source": f"see {files.origin.partition('@')[0]}"},
    }
    if licence := _licence(files):
        facts["licence"] = licence
    card = _card(out, model, preprocessing, chosen)
    more = _text_tower(files, layout, config, card)
    quality: dict[str, dict[str, Any]] = {}
    graphs = {"fp32": model}
    if layout.variants:
        quality[MODEL_FILE] = {"judged_on": f"{_CROPS} crops of two photographs that come with scikit-learn"}
        pixels = _crops(preprocessing)
        graphs = keep_good(card, _read_variants(files, layout), Pictures(pixels, pixels, pixels, None), quality)
    _write(out, graphs, graph, card, facts, quality, more)


def _import_file(path: Path, out: Path, choices: Choices) -> None:
    model = LocalFiles(path.parent, str(path), path.name, (path.name,)).read(path.name)
    graph = read_graph(model, str(path))
    chosen = _named(choices.output, graph, str(path)) if choices.output else choose(axes_of(graph), None, str(path))
    preprocessing = Preprocessing.from_config(_keys(path, graph, choices), str(path))
    facts = {"method": "imported", "backbone": "unknown", "origin": path.name, "data": {"source": f"see {path.name}"}}
    _write(out, {"fp32": model}, graph, _card(out, model, preprocessing, chosen), facts, {}, {})


def _write(
    out: Path,
    graphs: dict[str, bytes],
    graph: onnx.GraphProto,
    card: Card,
    facts: dict[str, Any],
    quality: dict[str, dict[str, Any]],
    more: dict[str, bytes],
) -> None:
    output = card.facts["output"]
    pooled = f", {output['pooling']} of it" if output["pooling"] else ""
    say = [f"{facts['origin']}: the embedding is {output['name']}{pooled}"]
    if (batch := _fixed_batch(graph)) is not None:
        facts["batch"] = batch
        at_a_time = "one by one" if batch == 1 else f"{batch} at a time"
        say.append(f"the graph takes {batch} picture{'s' * (batch != 1)}, no more and no fewer: served {at_a_time}")
    if more:
        say.append("its text tower comes with it")
    write_model(out, graphs, card.preprocessing, facts | card.facts, quality, more=more)
    for sentence in say:
        print(sentence, file=sys.stderr)


def _card(out: Path, model: bytes, preprocessing: Preprocessing, output: Output) -> Card:
    facts = {"output": output._asdict()}
    return Card(out, out.name, fingerprint(model, preprocessing, output), model, preprocessing, facts)


def _named(wanted: str, graph: onnx.GraphProto, what: str) -> Output:
    """Return the output that the user names, as NAME or NAME:POOLING."""
    name, _, pooling = wanted.rpartition(":")
    axes = axes_of(graph)
    # Names of tensors may have a colon in them.
    if wanted in axes or pooling not in POOLINGS:
        name, pooling = wanted, ""
    if name not in axes:
        raise InvalidRequest(f"--output {wanted}: {what} has the outputs {', '.join(axes)}")
    if not pooling and axes[name] > 2:
        raise InvalidRequest(f"--output {wanted}: has {axes[name]} axes; write {name}:class or {name}:mean")
    return Output(name, pooling or None)


def _image_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    weights = {tensor.name for tensor in graph.initializer}
    return [one for one in graph.input if one.name not in weights and len(one.type.tensor_type.shape.dim) == 4]


def _fixed_batch(graph: onnx.GraphProto) -> int | None:
    dims = [one.type.tensor_type.shape.dim[0] for one in _image_inputs(graph)]
    return next((dim.dim_value for dim in dims if dim.HasField("dim_value")), None)


def _keys(path: Path, graph: onnx.GraphProto, choices: Choices) -> dict[str, Any]:
    """Return the keys of preprocessor_config.json for a bare graph."""
    inputs = _image_inputs(graph)
    if len(inputs) != 1:
        raise InvalidModel(f"{path}: expected one image input (N, 3, height, width), got {len(inputs)}")
    if choices.side is None:
        known = [dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim[2:]]
        if not all(known):
            raise InvalidRequest(f"{path}: expected --side, which this graph leaves open: a number, or HEIGHTxWIDTH")
        height, width = known
    elif match := _SIDE.fullmatch(choices.side):
        height, width = int(match[1]), int(match[2] or match[1])
    else:
        raise InvalidRequest(f"--side {choices.side}: expected a number of pixels, or HEIGHTxWIDTH")
    crop = {"height": height, "width": width}
    resize = choices.resize or (height if height == width else None)
    keys: dict[str, Any] = {"do_resize": True, "resample": 3, "size": crop}
    if resize is not None:
        keys |= {"size": {"shortest_edge": resize}, "do_center_crop": True, "crop_size": crop}
    if inputs[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8:
        if choices.mean or choices.std:
            raise InvalidRequest(f"{path}: takes uint8 pixels and normalises them itself; leave out --mean and --std")
        return keys | {"do_rescale": False, "do_normalize": False}
    if not choices.mean or not choices.std:
        raise InvalidRequest(f"{path}: expected --mean and --std, of pixels in 0..1, that the network was trained with")
    mean, std = _numbers("--mean", choices.mean), _numbers("--std", choices.std)
    return keys | {"do_rescale": True, "do_normalize": True, "image_mean": mean, "image_std": std}


def _numbers(option: str, text: str) -> list[float]:
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 3) or not np.isfinite(numbers).all() or max(map(abs, numbers)) > 2:
        raise InvalidRequest(f"{option} {text}: expected one number or three, of pixels in 0..1, as 0.485,0.456,0.406")
    return numbers * (3 // len(numbers))


def _read_variants(files: Files, layout: Layout) -> dict[str, bytes]:
    """Return the variants that are in one file; say which are not."""
    made = {}
    for variant, name in layout.variants.items():
        data = files.read(name)
        try:
            read_graph(data, name)
        except InvalidModel as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
        else:
            made[variant] = data
    return made


def _crops(preprocessing: Preprocessing) -> PixelArray:
    """Return the pixels (64, height, width, 3) of crops of two photographs, from a third of them to the whole."""
    generator = np.random.default_rng(0)
    pixels = []
    for name in _PHOTOGRAPHS:
        with (package_files("sklearn.datasets") / "images" / name).open("rb") as file, Image.open(file) as opened:
            photograph = opened.convert("RGB")
        for _ in range(_CROPS // len(_PHOTOGRAPHS)):
            width, height = (int(side * generator.uniform(0.33, 1)) for side in photograph.size)
            left = int(generator.integers(0, photograph.width - width + 1))
            top = int(generator.integers(0, photograph.height - height + 1))
            crop = photograph.crop((left, top, left + width, top + height))
            pixels.append(to_pixels(crop, preprocessing))
    return np.stack(pixels)


def _licence(files: Files) -> str | None:
    """Return the licence that the front matter of README.md names."""
    if "README.md" not in files.names:
        return None
    front = files.read("README.md").decode(errors="replace").split("---")[1:2]
    match = re.search(r"^license:[ \t]*([\w.+-]+)", front[0], re.MULTILINE) if front else None
    return match[1] if match else None


def _text_tower(files: Files, layout: Layout, config: dict[str, Any], card: Card) -> dict[str, bytes]:
    """Return the files of the text tower, or none where texts are not in the space of the pictures."""
    if layout.text is None:
        return {}
    output, model_type = card.facts["output"], config.get("model_type")
    shared = output["name"] == "image_embeds" or (output["name"] == "pooler_output" and model_type in _SHARED_POOLER)
    if not shared or layout.tokenizer is None:
        why = "it has no tokenizer.json" if shared else f"texts are not in the space of {output['name']}"
        print(f"{layout.text} is left out: {why}", file=sys.stderr)
        return {}
    where = f"{files.what}: {layout.text}"
    model, tokenizer = files.read(layout.text), files.read(layout.tokenizer)
    graph = read_graph(model, where)
    settings = read_json(files, TOKENIZER_CONFIG_FILE, layout.graph)
    text_config = _text_config(graph, tokenizer, settings, config, where)
    try:
        size = TextTower(model, tokenizer, text_config).encode(["a photograph"]).shape[1]
    except InvalidModel as error:
        raise InvalidModel(f"{where}: {error}") from error
    if size != (dimension := Encoder(card, "cpu").dimension):
        raise InvalidModel(f"{where}: gives {size} numbers a text, and {layout.graph} {dimension} numbers a picture")
    return {TEXT_FILE: model, TOKENIZER_FILE: tokenizer, TEXT_CONFIG_FILE: text_config.to_json()}


def _text_config(
    graph: onnx.GraphProto, tokenizer: bytes, settings: dict[str, Any], config: dict[str, Any], where: str
) -> TextConfig:
    """Return how texts become tokens, of tokenizer_config.json, config.json and the graph."""
    model_type = config.get("model_type")
    own = config.get("text_config") or {}
    tokens = [one.type.tensor_type.shape.dim for one in graph.input if one.name == "input_ids"]
    fixed = tokens[0][1].dim_value if tokens and len(tokens[0]) == 2 else 0
    lengths = [own.get("max_position_embeddings"), settings.get("model_max_length"), _MAX_LENGTHS.get(str(model_type))]
    told = [int(length) for length in lengths if isinstance(length, int | float) and 0 < length < _NO_LIMIT]
    if not fixed and not told:
        raise InvalidModel(f"{where}: neither {CONFIG_FILE} nor {TOKENIZER_CONFIG_FILE} tells the longest text")
    try:
        read = Tokenizer.from_str(tokenizer.decode())
        content = json.loads(tokenizer)
    # tokenizers raises a plain Exception.
    except Exception as error:
        raise InvalidModel(f"{where}: {TOKENIZER_FILE} cannot be read: {error}") from error
    padding = settings.get("pad_token")
    token = padding.get("content") if isinstance(padding, dict) else padding
    number = read.token_to_id(token) if isinstance(token, str) else own.get("pad_token_id")
    if not isinstance(number, int) or read.id_to_token(number) is None:
        raise InvalidModel(f"{where}: {TOKENIZER_CONFIG_FILE} names no padding token of {TOKENIZER_FILE}")
    small = bool(settings.get("do_lower_case")) or model_type in _SHARED_POOLER
    names = [one.name for one in graph.output]
    output = next((name for name in ("text_embeds", "pooler_output") if name in names), names[0])
    return TextConfig(
        max_length=fixed or min(told),
        padding="max_length" if fixed or model_type in _SHARED_POOLER else "longest",
        padding_side=str(settings.get("padding_side", "right")),
        pad_token=str(read.id_to_token(number)),
        pad_id=number,
        lowercase=small and '"Lowercase"' not in json.dumps(content.get("normalizer")),
        output=output,
    )
