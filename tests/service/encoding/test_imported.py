"""Encoders of the hub, of a folder and bare graphs become model folders that embed as transformers does."""

import io
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from PIL import Image

from service import FloatArray
from service.encoding.card import read_card
from service.encoding.encoder import Encoder
from service.encoding.images import decode_pixels
from service.encoding.imported import Choices, import_onnx
from service.encoding.layouts import choose
from service.encoding.limits import Limits
from service.encoding.model_folder import write_model
from service.encoding.text import TEXT_CONFIG_FILE, TextConfig, TextTower
from service.encoding.whitening import Whitening, append_whitening, without_whitening
from service.errors import InvalidModel, InvalidOutput, InvalidRequest, LookalikeError
from tests.conftest import encoded, scene
from tests.service.encoding.families import FAMILIES, SIDE, Family, exported, pixels, repository
from tests.service.encoding.hub import Repositories, commit_of, local_hub, run_imports
from tests.service.encoding.test_encoder import flat_graph, normalised
from tests.service.encoding.test_processors import theirs

# Latin, Cyrillic, Arabic, Devanagari and Chinese.
WORDS = ["a RED bicycle", "красный велосипед", "دراجة حمراء", "लाल साइकिल", "红色的自行车"]
TEXTS = [f"{one}, {two} {number}" for number, one in enumerate(WORDS * 8) for two in WORDS]
BARE = Choices(mean="0.5", std="0.5")


@pytest.fixture(scope="module")
def families() -> dict[str, Family]:
    return {name: make() for name, make in FAMILIES.items()}


class Hub(NamedTuple):
    """The local hub: its address, what was asked, and the folder with the encoders that were imported from it."""

    address: str
    asked: list[str]
    folder: Path
    said: dict[str, str]


@pytest.fixture(scope="module")
def hub(families: dict[str, Family], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    repositories = {f"org/{name}": family.files for name, family in families.items()} | broken_ones(families)
    with local_hub(repositories) as (address, asked):
        commands = [[f"hf:org/{name}", "--out", f"models/{name}"] for name in families]
        done = run_imports(folder, address, *commands)
        assert [code for code, _ in done] == [0] * len(done), done
        yield Hub(address, asked, folder, {name: said for name, (_, said) in zip(families, done, strict=True)})


def broken_ones(families: dict[str, Family]) -> Repositories:
    clip, dinov2 = families["clip"].files, families["dinov2"].files
    graph = dinov2["onnx/model.onnx"]
    bare = {name: data for name, data in dinov2.items() if not name.endswith(".onnx")}
    proto = onnx.load_from_string(graph)
    big = next(one for one in proto.graph.initializer if len(one.raw_data) > 1000)
    onnx.external_data_helper.set_external_data(big, "model.onnx_data")
    big.ClearField("raw_data")
    big.data_location = TensorProto.EXTERNAL
    narrow = flat_graph(TensorProto.INT64, "input_ids", ("text_embeds",), side=2)
    return {
        "org/weights": bare,
        "org/two": dinov2 | {"other/model.onnx": graph},
        "org/external": bare | {"onnx/model.onnx": proto.SerializeToString()},
        "org/damaged": bare | {"onnx/model.onnx": graph[:999]},
        "org/small": bare | {"onnx/model_q4.onnx": graph},
        "org/bare": {"model.onnx": graph},
        "org/listed": dinov2 | {"preprocessor_config.json": b"[]"},
        "org/both": bare | {"model.onnx": flat_graph(outputs=("other", "logits"), side=SIDE)},
        "org/classes": bare | {"model.onnx": flat_graph(outputs=("logits",), side=SIDE)},
        "org/words": clip | {"onnx/text_model.onnx": narrow},
        "org/lengths": clip | {"onnx/vision_model.onnx": flat_graph(side=SIDE)},
    }


def pictures() -> list[bytes]:
    return [encoded(scene(300, 261, seed)) for seed in range(6)] + [encoded(scene(280, 390, seed)) for seed in range(6)]


def their_embeddings(family: Family, files: list[bytes]) -> Any:
    """Return transformers' embeddings of pictures, by its own image processor and its own model."""
    made = []
    for data in files:
        picture = Image.open(io.BytesIO(data))
        values = theirs(family.config, "torchvision", picture) / 255
        mean, std = (np.reshape(family.config[key], (3, 1, 1)) for key in ("image_mean", "image_std"))
        made.append(torch.tensor((values - mean) / std, dtype=torch.float32))
    with torch.no_grad():
        return normalised(family.embed(torch.stack(made)).numpy())


def our_embeddings(folder: Path, files: list[bytes], variant: str = "fp32") -> FloatArray:
    encoder = Encoder(read_card(folder), "cpu", variant)
    return encoder.encode([decode_pixels(data, encoder.card.preprocessing, Limits()) for data in files])


@pytest.mark.parametrize("name", FAMILIES)
def test_it_embeds_as_transformers_does(name: str, hub: Hub, families: dict[str, Family]) -> None:
    files = pictures()
    ours, expected = our_embeddings(hub.folder / "models" / name, files), their_embeddings(families[name], files)
    assert (ours * expected).sum(1).min() >= 0.9999
    # Pictures are told apart, so the cosine says something.
    assert (expected @ expected.T).min() < 0.999


@pytest.mark.parametrize(
    ("name", "output", "pooling"),
    [
        ("dinov2", "last_hidden_state", "class"),
        ("clip", "image_embeds", None),
        ("siglip", "pooler_output", None),
        ("resnet", "pooler_output", "mean"),
    ],
)
def test_the_card_pins_commit_file_and_output(name: str, output: str, pooling: str | None, hub: Hub) -> None:
    facts = read_card(hub.folder / "models" / name).facts
    assert facts["origin"] == f"hf:org/{name}@{commit_of(f'org/{name}')}"
    assert facts["output"] == {"name": output, "pooling": pooling}
    assert facts["licence"] == "mit"
    assert facts["file"] == f"onnx/{'vision_' if name in ('clip', 'siglip') else ''}model.onnx"
    assert f"the embedding is {output}" in hub.said[name]
    assert ("its text tower comes with it" in hub.said[name]) == (name in ("clip", "siglip"))


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_texts_are_tokenised_and_embedded_as_by_transformers(name: str, hub: Hub, families: dict[str, Family]) -> None:
    family, folder = families[name], hub.folder / "models" / name
    config = TextConfig.from_json((folder / TEXT_CONFIG_FILE).read_bytes())
    tower = TextTower((folder / "text.onnx").read_bytes(), (folder / "tokenizer.json").read_bytes(), config)
    assert len(TEXTS) == 200
    filling = {"clip": True, "siglip": "max_length"}[name]
    assert (config.max_length, config.padding) == {"clip": (77, "longest"), "siglip": (64, "max_length")}[name]
    for texts in (TEXTS, ["a cat"], ["", "A CAT sat"]):
        expected = family.tokenizer(texts, padding=filling, truncation=True, max_length=config.max_length)
        tokens, mask = tower.tokens(texts)
        assert np.array_equal(tokens, np.asarray(expected["input_ids"]))
        assert np.array_equal(mask, np.asarray(expected["attention_mask"]))
    assert family.embed_texts is not None
    with torch.no_grad():
        embeddings = normalised(family.embed_texts(TEXTS).numpy())
    assert (tower.encode(TEXTS) * embeddings).sum(1).min() >= 0.9999
    assert tower.encode(TEXTS[:1]).shape[1] == Encoder(read_card(folder), "cpu").dimension


def test_texts_are_in_small_letters_where_the_tokenizer_leaves_it(families: dict[str, Family], tmp_path: Path) -> None:
    source, family = folder_of(families["siglip"], tmp_path / "downloaded"), families["siglip"]
    tokenizer = json.loads((source / "tokenizer.json").read_bytes())
    kept = [one for one in tokenizer["normalizer"]["normalizers"] if one["type"] != "Lowercase"]
    tokenizer["normalizer"]["normalizers"] = kept
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    import_onnx(str(source), tmp_path / "out", Choices())
    config = TextConfig.from_json((tmp_path / "out" / TEXT_CONFIG_FILE).read_bytes())
    assert config.lowercase
    graph, words = ((tmp_path / "out" / name).read_bytes() for name in ("text.onnx", "tokenizer.json"))
    expected = family.tokenizer(["A CAT"], padding="max_length", max_length=64)
    assert np.array_equal(TextTower(graph, words, config).tokens(["A CAT"])[0], np.asarray(expected["input_ids"]))


def test_nothing_but_json_readme_and_graphs_is_fetched(hub: Hub) -> None:
    fetched = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert {"vision_model.onnx", "text_model.onnx", "preprocessor_config.json", "tokenizer.json"} <= fetched
    assert not fetched & {"pytorch_model.bin", "modeling_evil.py"}


REFUSED = {
    "hf:org/nowhere": "hf:org/nowhere: http://127.0.0.1:PORT has no such repository, or shows it only to those",
    "hf:org/clip@v3": "hf:org/clip@v3: the repository has no such revision",
    "hf:org/gated": "is gated: accept its terms at http://127.0.0.1:PORT/org/gated, then set HF_TOKEN",
    "hf:org/private": "has no such repository, or shows it only to those who may read it (HF_TOKEN)",
    "hf:org/forbidden": "answers 403: the token in use may not read it (HF_TOKEN)",
    "hf:org": "expected hf:ORG/NAME, with @REVISION behind it",
    "hf:org/../clip": "expected hf:ORG/NAME",
    "hf:org/weights": "has no ONNX graph, only pytorch_model.bin: take it from timm, as in `lookalike import timm:",
    "hf:org/two": "has several graphs that could be meant, onnx/model.onnx, other/model.onnx: download",
    "hf:org/external": "onnx/model.onnx: keeps weights in external data files, which we do not read",
    "hf:org/damaged": "onnx/model.onnx: is not an ONNX file, or a damaged one",
    "hf:org/small": "has its graph in reduced arithmetic alone, onnx/model_q4.onnx",
    "hf:org/bare": "has no preprocessor_config.json: import model.onnx as a file, with --side, --mean and --std",
    "hf:org/listed": "preprocessor_config.json: expected a JSON object, not list",
    "hf:org/both": "cannot tell which output is the embedding, of other, logits; logits are scores of classes",
    "hf:org/classes": "cannot tell which output is the embedding, of logits; logits are scores of classes",
    "hf:org/words": "onnx/text_model.onnx: ",
    "hf:org/lengths": "text_model.onnx: gives 24 numbers a text, and onnx/vision_model.onnx 150528 numbers a picture",
}


def test_each_refusal_is_one_sentence_and_exit_code_2(hub: Hub, tmp_path: Path) -> None:
    done = run_imports(tmp_path, hub.address, *([what, "--out", "models/new"] for what in REFUSED))
    for (what, says), (code, said) in zip(REFUSED.items(), done, strict=True):
        assert code == 2, (what, said)
        assert says.replace("http://127.0.0.1:PORT", hub.address) in said, what
        assert said.count("\n") == 1, said
    assert not list((tmp_path / "models").iterdir())


def test_offline_it_takes_what_the_cache_has(hub: Hub, tmp_path: Path) -> None:
    cache = str(hub.folder / "cache")
    known, pinned, new, unknown = run_imports(
        tmp_path,
        hub.address,
        ["hf:org/clip", "--out", "clip"],
        [f"hf:org/siglip@{commit_of('org/siglip')}", "--out", "siglip"],
        ["hf:org/clip@v2", "--out", "v2"],
        ["hf:org/nowhere", "--out", "nowhere"],
        HF_HUB_OFFLINE="1",
        HF_HOME=cache,
    )
    assert (known[0], pinned[0]) == (0, 0), known[1] + pinned[1]
    for name in ("clip", "siglip"):
        assert (tmp_path / name / "card.json").read_bytes() == (hub.folder / "models" / name / "card.json").read_bytes()
    for code, said in (new, unknown):
        assert code == 2
        assert "HF_HUB_OFFLINE is set, and the cache has not all that is needed" in said
    (unreachable,) = run_imports(tmp_path, "http://127.0.0.1:9", ["hf:org/clip", "--out", "closed"])
    assert unreachable[0] == 2
    assert "http://127.0.0.1:9 cannot be reached" in unreachable[1]
    assert not (tmp_path / "closed").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_leaves_nothing_half_written(hub: Hub, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=200k tmpfs {small} 2> /dev/null") != 0:
        pytest.skip("this machine mounts no small disk")
    try:
        cached, written = (
            run_imports(tmp_path, hub.address, ["hf:org/clip", "--out", out], HF_HOME=str(cache))[0]
            for out, cache in (("clip", small), (str(small / "clip"), hub.folder / "cache"))
        )
        assert cached[0] == written[0] == 2
        assert "hf:org/clip: cannot be downloaded: No space left on device; make room, or set HF_HOME" in cached[1]
        assert "small/clip: cannot be written: No space left on device" in written[1]
        assert not (tmp_path / "clip").exists()
        assert not (small / "clip").exists()
    finally:
        os.system(f"umount {small}")


def folder_of(family: Family, folder: Path, **more: bytes) -> Path:
    """Write a family's repository as a folder, with more files beside its graph."""
    for name, data in {**family.files, **{f"onnx/{name}.onnx": graph for name, graph in more.items()}}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_a_folder_of_the_same_layout_gives_the_same_space(
    hub: Hub, families: dict[str, Family], tmp_path: Path
) -> None:
    source = folder_of(families["dinov2"], tmp_path / "downloaded")
    import_onnx(str(source), tmp_path / "out", Choices())
    assert read_card(tmp_path / "out").fingerprint == read_card(hub.folder / "models" / "dinov2").fingerprint


def test_another_output_is_another_space(hub: Hub, families: dict[str, Family], tmp_path: Path) -> None:
    source = str(folder_of(families["dinov2"], tmp_path / "downloaded"))
    import_onnx(source, tmp_path / "mean", Choices(output="last_hidden_state:mean"))
    mean, taken = read_card(tmp_path / "mean"), read_card(hub.folder / "models" / "dinov2")
    assert mean.model == taken.model
    assert mean.fingerprint != taken.fingerprint
    files = pictures()
    cosines = (our_embeddings(tmp_path / "mean", files) * our_embeddings(taken.folder, files)).sum(1)
    assert cosines.max() < 0.99
    with pytest.raises(InvalidRequest, match=r"has 3 axes; write last_hidden_state:class or last_hidden_state:mean"):
        import_onnx(source, tmp_path / "none", Choices(output="last_hidden_state"))
    with pytest.raises(InvalidRequest, match=r"--output nothing: .* has the outputs last_hidden_state"):
        import_onnx(source, tmp_path / "none", Choices(output="nothing"))
    assert not (tmp_path / "none").exists()


def test_a_text_tower_stays_out_where_pictures_are_elsewhere(
    families: dict[str, Family], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder_of(families["clip"], tmp_path / "downloaded")
    import_onnx(str(source), tmp_path / "out", Choices(output="last_hidden_state:class"))
    assert "text_model.onnx is left out: texts are not in the space of last_hidden_state" in capsys.readouterr().err
    (source / "tokenizer.json").unlink()
    import_onnx(str(source), tmp_path / "out", Choices(), overwrite=True)
    assert "text_model.onnx is left out: it has no tokenizer.json" in capsys.readouterr().err
    assert not (tmp_path / "out" / "text.onnx").exists()


def test_variants_are_taken_only_where_they_pass_our_measure(
    families: dict[str, Family], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    graph = families["siglip"].files["onnx/vision_model.onnx"]
    (tmp_path / "whole.onnx").write_bytes(graph)
    quantize_dynamic(tmp_path / "whole.onnx", tmp_path / "int8.onnx", weight_type=QuantType.QUInt8)
    half = convert_float_to_float16(onnx.load_from_string(graph), keep_io_types=False).SerializeToString()
    source = folder_of(
        families["siglip"],
        tmp_path / "downloaded",
        vision_model_fp16=half,
        vision_model_quantized=(tmp_path / "int8.onnx").read_bytes(),
    )
    import_onnx(str(source), tmp_path / "out", Choices())
    card = read_card(tmp_path / "out")
    assert [*card.variants] == ["fp16", "int8"]
    assert card.facts["quality"]["model.fp16.onnx"]["cosine_p1"] > 0.9999
    assert 0.99 <= card.facts["quality"]["model.int8.onnx"]["cosine_p1"] < 0.9999
    assert card.facts["quality"]["model.onnx"]["judged_on"].startswith("64 crops of two photographs")
    files = pictures()
    assert (our_embeddings(tmp_path / "out", files, "fp16") * our_embeddings(tmp_path / "out", files)).sum(
        1
    ).min() > 0.999
    (source / "onnx" / "vision_model_quantized.onnx").write_bytes(other_siglip())
    (source / "onnx" / "vision_model_fp16.onnx").write_bytes(half[:999])
    capsys.readouterr()
    import_onnx(str(source), tmp_path / "out", Choices(), overwrite=True)
    said = capsys.readouterr().err
    assert "model.int8.onnx is not written: it is too far from model.onnx" in said
    assert "onnx/vision_model_fp16.onnx is left out" in said
    assert not read_card(tmp_path / "out").variants


def other_siglip() -> bytes:
    torch.manual_seed(1)
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE, patch_size=32
    )
    return exported(transformers.SiglipVisionModel(config), pixels(), ["last_hidden_state", "pooler_output"])


def test_a_fixed_batch_of_one_is_served_one_by_one_and_said(
    families: dict[str, Family], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=32,
            attn_implementation="eager",
        )
    )
    graph = exported(model, pixels(1), ["last_hidden_state", "pooler_output"], fixed=True)
    config = {"feature_extractor_type": "ViTFeatureExtractor", "size": SIDE, **BARE_KEYS}
    family = Family(
        repository({"model": graph}, config, model.config), config, lambda x: model(x).last_hidden_state[:, 0]
    )
    import_onnx(str(folder_of(family, tmp_path / "downloaded")), tmp_path / "out", Choices())
    assert "takes 1 picture, no more and no fewer: served one by one" in capsys.readouterr().err
    assert read_card(tmp_path / "out").facts["batch"] == 1
    assert Encoder(read_card(tmp_path / "out"), "cpu").max_batch == 1
    files = pictures()
    # A ViT's pooler was often never trained, so the class token is taken.
    assert (our_embeddings(tmp_path / "out", files) * their_embeddings(family, files)).sum(1).min() >= 0.9999


BARE_KEYS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def bare_graph(path: Path, type: int, height: int = 8, width: int = 4, batch: int | str = "N") -> Path:
    """Write a graph whose embedding is its flattened input."""
    nodes = [
        helper.make_node("Cast", ["pixels"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["cast"], ["features"]),
    ]
    inputs = [helper.make_tensor_value_info("pixels", type, [batch, 3, height, width])]
    outputs = [helper.make_tensor_value_info("features", TensorProto.FLOAT, [batch, 3 * height * width])]
    model = helper.make_model(
        helper.make_graph(nodes, "bare", inputs, outputs), opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("type", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8])
@pytest.mark.parametrize("batch", ["N", 3])
def test_a_bare_graph_of_another_shape_and_type(tmp_path: Path, type: int, batch: int | str) -> None:
    path = bare_graph(tmp_path / "bare.onnx", type, batch=batch)
    choices = Choices(side="8x4") if type == TensorProto.UINT8 else BARE._replace(side="8x4")
    import_onnx(str(path), tmp_path / "out", choices)
    card = read_card(tmp_path / "out")
    assert (card.preprocessing.height, card.preprocessing.width) == (8, 4)
    picture = scene(40, 80)
    values = np.asarray(picture.resize((4, 8), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(np.float64)
    expected = normalised((values if type == TensorProto.UINT8 else (values / 255 - 0.5) / 0.5)[None])
    ours = our_embeddings(tmp_path / "out", [encoded(picture)] * 5)
    assert ours.shape == (5, 96)
    assert np.allclose(ours, expected, atol=1e-3 if type == TensorProto.FLOAT16 else 1e-6)


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        (Choices(), "expected --mean and --std, of pixels in 0..1"),
        (BARE._replace(side="4x4"), r"input pixels is \['N', 3, 8, 4\], preprocessing gives 3x4x4"),
        (BARE._replace(side="big"), "--side big: expected a number of pixels, or HEIGHTxWIDTH"),
        (BARE._replace(mean="127"), r"--mean 127: expected one number or three, of pixels in 0\.\.1"),
        (BARE._replace(std="0"), "image_std no zero"),
        (BARE._replace(resize=5), "size 5 is smaller than crop_size 4x8"),
        (BARE._replace(output="other"), "--output other: .* has the outputs features"),
    ],
)
def test_options_of_a_bare_graph_that_do_not_fit(tmp_path: Path, choices: Choices, says: str) -> None:
    path = bare_graph(tmp_path / "bare.onnx", TensorProto.FLOAT)
    with pytest.raises(LookalikeError, match=says):
        import_onnx(str(path), tmp_path / "out", choices)
    assert not (tmp_path / "out").exists()


def test_paths_that_are_no_encoder(tmp_path: Path) -> None:
    uint8 = bare_graph(tmp_path / "bare.onnx", TensorProto.UINT8)
    (tmp_path / "weights.bin").write_bytes(b"a pickle")
    for what, choices, says in (
        (str(uint8), BARE, "takes uint8 pixels and normalises them itself; leave out --mean and --std"),
        (str(tmp_path / "weights.bin"), Choices(), "expected ONNX; `lookalike import timm:NAME --weights"),
        ("models/nowhere/", Choices(), "no such folder or file"),
        ("org/name", Choices(), "a repository of the hub is written hf:org/name"),
        (str(tmp_path), BARE, "--side, --mean, --std and --resize are for .onnx files"),
    ):
        with pytest.raises(InvalidRequest, match=says):
            import_onnx(what, tmp_path / "out", choices)
    (tmp_path / "out").mkdir()
    with pytest.raises(InvalidOutput, match="is there already"):
        import_onnx(str(uint8), tmp_path / "out", Choices())


def test_outputs_are_chosen_by_the_models_type() -> None:
    both = {"last_hidden_state": 3, "pooler_output": 2}
    assert choose(both, "dinov2", "test") == ("pooler_output", None)
    assert choose(both, "vit", "test") == ("last_hidden_state", "class")
    assert choose({"last_hidden_state": 3}, "swin", "test") == ("last_hidden_state", "mean")
    assert choose({"last_hidden_state": 4}, "resnet", "test") == ("last_hidden_state", "mean")
    assert choose({"logits": 2, "image_embeds": 2}, "clip", "test") == ("image_embeds", None)
    assert choose({"features": 2, "last_hidden_state": 3}, None, "test") == ("features", None)
    with pytest.raises(InvalidModel, match="as in --output last_hidden_state:class or last_hidden_state:mean"):
        choose({"last_hidden_state": 3}, "unheard-of", "test")


@pytest.mark.parametrize("name", ["dinov2", "resnet"])
def test_a_pooled_output_can_be_whitened_and_be_bare_again(name: str, hub: Hub, tmp_path: Path) -> None:
    card = read_card(hub.folder / "models" / name)
    mean = np.random.default_rng(0).normal(0, 0.1, Encoder(card, "cpu").dimension).astype(np.float32)
    whitened = append_whitening(card.model, Whitening(mean, None), card.output)
    write_model(tmp_path / "out", {"fp32": whitened}, card.preprocessing, {"method": "imported"}, {})
    files = pictures()
    plain = our_embeddings(card.folder, files)
    assert np.allclose(our_embeddings(tmp_path / "out", files), Whitening(mean, None).apply(plain), atol=1e-5)
    bare = without_whitening(read_card(tmp_path / "out"))
    again = Encoder(bare, "cpu").encode([decode_pixels(data, bare.preprocessing, Limits()) for data in files])
    assert np.allclose(again, plain, atol=1e-6)
    assert without_whitening(card).output == card.output


def test_a_card_with_a_wrong_output_is_refused(hub: Hub) -> None:
    card = read_card(hub.folder / "models" / "dinov2")
    for entry in ("pooler", {"name": "last_hidden_state", "pooling": "max"}, {"pooling": "mean"}):
        wrong = replace(card, facts=json.loads(json.dumps({"output": entry})))
        with pytest.raises(InvalidModel, match="output: expected a name, and a pooling of class or mean or null"):
            Encoder(wrong, "cpu")
    with pytest.raises(InvalidModel, match="expected an output named other; it has last_hidden_state"):
        Encoder(replace(card, facts={"output": {"name": "other"}}), "cpu")
