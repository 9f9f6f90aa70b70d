"""Pictures and words end to end: a tiny CLIP of digits, and a text tower for a locked encoder of the same."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.encoding.card import read_card
from service.encoding.encoder import Encoder
from service.encoding.images import decode_pixels
from service.encoding.limits import OWN_FILES
from service.encoding.text import TextConfig, TextTower, open_text_tower
from service.errors import InvalidModel, InvalidOutput, InvalidRequest, InvalidSource
from service.sources import open_source
from tests.test_json import assert_as_promised
from tests.test_lookalike import run
from tests.training.test_pretrain import pressing
from training import pretrain as loop
from training.backbones import build_backbone
from training.captions import learn_tokenizer
from training.checkpoint import Checkpoint, read_checkpoint, run_folder
from training.evaluate import evaluate
from training.pretrain import export_run, pretrain
from training.recipe import Recipe, read_recipe
from training.zero_shot import class_embeddings, labels_as_text, pair_recalls, zero_shot

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RECIPE = """
method = "clip"
backbone = "small-cnn"
side = 8
channels = 1
views = 1
epochs = 6
batch_size = 64
learning_rate = 3e-3
weight_decay = 1e-4
warmup = 4
precision = "float32"
variants = ["int8"]
seed = 0

[clip]
dimension = 32

[text]
width = 32
layers = 1
heads = 2
max_length = 16
vocabulary = 320
templates = ["{label}", "a handwritten {label}"]

[text.words]
%s
[augmentation]
shift = 0.08
""" % "".join(f'{number} = ["{name}", "{number}"]\n' for number, name in enumerate(NAMES))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    path = tmp_path_factory.mktemp("recipe") / "words.toml"
    path.write_text(RECIPE)
    return read_recipe(str(path))


@pytest.fixture(scope="module")
def words(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a CLIP that learnt the first 1,400 digits and their words."""
    out = tmp_path_factory.mktemp("words") / "words"
    pretrain("digits[:1400]", recipe, out, None, "cpu", out.parent)
    return out


def changed(recipe: Recipe, **values: object) -> Recipe:
    return Recipe.model_validate(recipe.model_dump() | values)


def locked_recipe(recipe: Recipe, **values: object) -> Recipe:
    kept = {key: value for key, value in recipe.model_dump().items() if key not in ("side", "channels", "augmentation")}
    return Recipe.model_validate(kept | {"backbone": "locked", "epochs": 30} | values)


@pytest.fixture(scope="module")
def locked(recipe: Recipe, words: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tiny_model, which has no text tower, with one that learnt its space."""
    out = tmp_path_factory.mktemp("locked") / "locked"
    pretrain("digits[:1400]", locked_recipe(recipe), out, None, "cpu", out.parent, str(tiny_model))
    return out


def card_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "card.json").read_text())
    return content


def test_words_find_digits_that_no_run_saw(words: Path) -> None:
    report = evaluate(words, "digits[:1400]", "digits[1400:]", words, "fp32", as_text=()).report
    assert report["zero_shot"]["accuracy"] > 0.85
    assert report["zero_shot"]["accuracy"] > report["figures"]["k5"] - 0.08
    assert report["zero_shot"]["templates"] == ["{label}", "a handwritten {label}"]
    # Each picture's most alike word, by hand.
    tower, encoder, source = opened_tower(words), Encoder(read_card(words), "cpu"), open_source("digits")
    texts = np.stack([tower.encode([name, f"a handwritten {name}"]).mean(0) for name in NAMES])
    right = 0
    for position in range(1400, 1797):
        entry = source.entry(position)
        row = encoder.encode([decode_pixels(entry.data, encoder.card.preprocessing, OWN_FILES)])[0]
        right += entry.label == str(np.argmax(texts / np.linalg.norm(texts, axis=1, keepdims=True) @ row))
    assert report["zero_shot"]["accuracy"] == round(right / 397, 4)


def test_other_templates_are_other_texts(words: Path) -> None:
    report = evaluate(
        words, "digits[:1400]", "digits[1400:]", words, "fp32", as_text=["xylophone {label} zebra"]
    ).report
    assert report["zero_shot"]["templates"] == ["xylophone {label} zebra"]
    assert report["zero_shot"]["accuracy"] < 0.9


def test_the_folder_is_within_the_contract_and_the_card_tells_the_text_tower(words: Path) -> None:
    card = card_of(words)
    config = TextConfig.from_json((words / "text_config.json").read_bytes())
    tower = TextTower((words / "text.onnx").read_bytes(), (words / "tokenizer.json").read_bytes(), config)
    assert config.output == "embedding"
    assert tower.encode(["seven", "", "東京", "🙂" * 100]).shape == (4, card["dimension"]) == (4, 32)
    assert {"text.onnx", "tokenizer.json", "text_config.json"} <= set(card["sha256"])
    assert 1 < card["logit_scale"] <= 100
    assert "logit_bias" not in card
    assert "whitening" not in card
    # The recipe wants one variant alone.
    assert [path.name for path in sorted(words.glob("model.*"))] == ["model.int8.onnx", "model.onnx"]
    assert card["text"]["words"] == {str(number): name for number, name in enumerate(NAMES)}
    figures = card["quality"]["text.onnx"]
    assert figures["least_cosine_to_torch_batch_1"] >= 0.9999
    assert figures["least_cosine_to_torch_batch_64"] >= 0.9999
    assert figures["pictures"] == card["data"]["held_out"] == 70
    assert figures["zero_shot"] > 0.85
    for name in ("text_to_image", "image_to_text"):
        recalls = [figures[f"{name}_recall_at_{k}"] for k in (1, 5, 10)]
        assert 0.6 < recalls[0] <= recalls[1] <= recalls[2] <= 1


@pytest.mark.slow("exports an encoder once more")
def test_a_checkpoint_exports_the_same_encoder(words: Path, tmp_path: Path) -> None:
    export_run(run_folder(words), tmp_path / "again", tmp_path)
    for file in ("tokenizer.json", "text_config.json", "text.onnx"):
        assert (tmp_path / "again" / file).read_bytes() == (words / file).read_bytes()
    assert card_of(tmp_path / "again")["quality"]["text.onnx"] == card_of(words)["quality"]["text.onnx"]


@pytest.mark.slow("trains and exports another encoder")
def test_the_sigmoid_form_learns_too_and_tells_its_bias(recipe: Recipe, tmp_path: Path) -> None:
    sigmoid = changed(recipe, clip={"loss": "sigmoid", "dimension": 32, "temperature": 0.1})
    pretrain("digits[:1400]", sigmoid, tmp_path / "out", None, "cpu", tmp_path)
    card = card_of(tmp_path / "out")
    assert card["logit_bias"] < 0
    assert card["quality"]["text.onnx"]["zero_shot"] > 0.8


def test_the_backbone_of_a_run_with_words_begins_another_run(words: Path) -> None:
    file = run_folder(words) / "checkpoint.pt"
    module = build_backbone("small-cnn", 1, 8, str(file)).module
    trained = read_checkpoint(run_folder(words))
    assert trained is not None
    for key, value in module.state_dict().items():
        assert torch.equal(value, trained.method[f"backbone.0.{key}"]), key


# Locked-image tuning


@pytest.mark.slow("trains and exports a text tower")
def test_a_locked_encoder_stays_as_it_is_and_gets_words(locked: Path, tiny_model: Path) -> None:
    before, after = card_of(tiny_model), card_of(locked)
    for file in ("model.onnx", "preprocessor_config.json"):
        assert (locked / file).read_bytes() == (tiny_model / file).read_bytes()
    # A store of the earlier folder goes on with this one.
    assert after["fingerprint"] == before["fingerprint"]
    assert (after["method"], after["data"]) == (before["method"], before["data"])
    assert {key: after["quality"][key] for key in before["quality"]} == before["quality"]
    assert after["text"]["method"] == "clip"
    assert after["text"]["data"]["source"] == "digits[:1400]"
    assert after["text"]["run"]["init"] == str(tiny_model)
    report = evaluate(locked, "digits[:1400]", "digits[1400:]", locked, "fp32", as_text=()).report
    assert report["zero_shot"]["accuracy"] > report["figures"]["linear_probe"] - 0.15
    assert report["zero_shot"]["accuracy"] > 0.7


@pytest.mark.slow("trains and exports a text tower")
def test_each_picture_is_encoded_once(
    recipe: Recipe, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = Encoder.encode

    def counted(self: Encoder, pixels: Any) -> Any:
        encoded.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(Encoder, "encode", counted)
    pretrain("digits[:300]", locked_recipe(recipe, epochs=3), tmp_path / "out", None, "cpu", tmp_path, str(tiny_model))
    # One more is the canary of the folder that is written.
    assert sum(encoded) == 301


@pytest.mark.slow("trains and exports three text towers")
def test_a_locked_run_goes_on_where_it_stopped(recipe: Recipe, tiny_model: Path, tmp_path: Path) -> None:
    short = locked_recipe(recipe, epochs=3)
    arguments: tuple[Any, ...] = (None, "cpu", tmp_path, str(tiny_model))
    pretrain("digits[:300]", short, tmp_path / "straight", *arguments)
    original = loop.train

    def interrupted(*given: Any) -> Checkpoint:
        return partial(original, session_s=0.0)(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", interrupted)
        pretrain("digits[:300]", short, tmp_path / "broken", *arguments)
    stopped = read_checkpoint(tmp_path / "broken.run")
    assert stopped is not None
    assert stopped.progress.step == 1
    partial(pretrain, resume=True)("digits[:300]", short, tmp_path / "broken", *arguments)
    assert (tmp_path / "broken" / "text.onnx").read_bytes() == (tmp_path / "straight" / "text.onnx").read_bytes()


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (None, "backbone locked: --init names the encoder that texts are learnt for: expected efficientnet-lite0 or"),
        ("none", "--init none: holds no model.onnx; expected efficientnet-lite0 or the folder of an encoder"),
    ],
)
def test_a_locked_backbone_needs_an_encoder(init: str | None, message: str, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message)):
        pretrain("digits[:300]", locked_recipe(recipe), tmp_path / "out", None, "cpu", tmp_path, init)
    assert not list(tmp_path.iterdir())


def test_an_encoder_is_not_written_over_itself(recipe: Recipe, tiny_model: Path, tmp_path: Path) -> None:
    own = shutil.copytree(tiny_model, tmp_path / "own")
    with pytest.raises((InvalidRequest, InvalidOutput), match="is the encoder of --init itself"):
        pretrain("digits[:300]", locked_recipe(recipe), own, None, "cpu", tmp_path, str(own), overwrite=True)
    assert read_card(own).fingerprint == read_card(tiny_model).fingerprint


# What is refused


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("digits[:300]", {"text": {}}, "digits[:300]: its labels are no words: 0, 1, 2, 3, 4 and 5 more; expected"),
        ("digits[:1]", {}, "digits[:1]: all captions say the same"),
    ],
)
def test_captions_that_are_none_are_refused_in_a_sentence(
    source: str, settings: dict[str, object], message: str, recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(InvalidSource, match=re.escape(message)):
        pretrain(source, changed(recipe, **settings), tmp_path / "out", None, "cpu", tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "simclr", "views": 1}, "views: simclr compares views of a picture: expected 2 or more"),
        ({"method": "simclr", "views": 2, "backbone": "locked"}, "backbone: locked is for clip, not for simclr"),
        ({"ema": 0.9}, "ema: averages the backbone alone"),
        ({"text": {"templates": ["a photo"]}}, "templates: expected {label} in each, not 'a photo'"),
        ({"text": {"width": 30, "heads": 4}}, "width: expected a multiple of the 4 heads, not 30"),
        ({"text": {"words": {"7": [" "]}}}, "words: expected a word for each label, not an empty text"),
        ({"text": {"vocabulary": 100}}, "greater than or equal to 259"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, object], message: str, recipe: Recipe) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        changed(recipe, **changes)


@pytest.mark.slow("trains and exports another encoder")
def test_pictures_without_a_caption_are_counted_and_left_out(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digits, folder = open_source("digits[:80]"), tmp_path / "digits"
    folder.mkdir()
    rows = []
    for position in range(80):
        entry = digits.entry(position)
        (folder / f"{position:02}.png").write_bytes(entry.data)
        rows.append(
            json.dumps({"file_name": f"{position:02}.png", "text": f"the digit {NAMES[int(entry.label or 0)]}"})
        )
    (folder / "metadata.jsonl").write_text("\n".join(rows[:72]))
    small = changed(recipe, batch_size=32, epochs=1)
    account = pretrain(str(folder), small, tmp_path / "out", None, "cpu", tmp_path)
    assert (account.added, account.facts()["left_out"]["without a caption"]) == (72, 8)
    assert "8 pictures without a caption are left out" in capsys.readouterr().err
    assert card_of(tmp_path / "out")["quality"]["text.onnx"].keys() == {
        "texts", "least_cosine_to_torch_batch_1", "least_cosine_to_torch_batch_64"
    }  # fmt: skip


def test_a_run_is_not_gone_on_with_by_other_captions_or_another_encoder(
    recipe: Recipe, tiny_model: Path, tmp_path: Path
) -> None:
    folder, digits = tmp_path / "digits", open_source("digits[:40]")
    folder.mkdir()
    for position in range(40):
        (folder / f"{position:02}.png").write_bytes(digits.read(position))

    def write(words: Callable[[int], str]) -> None:
        rows = (json.dumps({"file_name": f"{number:02}.png", "text": words(number)}) for number in range(40))
        (folder / "metadata.jsonl").write_text("\n".join(rows))

    own = shutil.copytree(tiny_model, tmp_path / "own")
    short = locked_recipe(recipe, epochs=50, batch_size=16)
    arguments: tuple[Any, ...] = (str(folder), short, tmp_path / "out", None, "cpu", tmp_path, str(own))
    write(lambda number: f"number {number}")
    with pytest.raises(KeyboardInterrupt), pressing(3):
        pretrain(*arguments)
    write(lambda number: f"number {number // 2}")
    with pytest.raises(InvalidSource, match="its pictures or captions are not those that the run began with"):
        partial(pretrain, resume=True)(*arguments)
    write(lambda number: f"number {number}")
    another_preprocessing(own)
    with pytest.raises(InvalidRequest, match="is not the encoder that the run began with"):
        partial(pretrain, resume=True)(*arguments)


def opened_tower(folder: Path) -> TextTower:
    """Open the text tower of an encoder of 32 numbers."""
    tower = open_text_tower(read_card(folder), 32)
    assert tower is not None
    return tower


def another_preprocessing(folder: Path) -> None:
    """Make the encoder in a folder another one: its pictures are resized otherwise."""
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | {"resample": 0}))
    (folder / "card.json").unlink()
    for variant in folder.glob("model.*.onnx"):
        variant.unlink()


def test_a_tokenizer_of_more_tokens_than_its_graph_is_refused_at_the_start(words: Path, tmp_path: Path) -> None:
    own = shutil.copytree(words, tmp_path / "own")
    (own / "tokenizer.json").write_text(learn_tokenizer(["many more words than the graph ever knew"] * 9, 340).to_str())
    graph, config = (own / "text.onnx").read_bytes(), TextConfig.from_json((own / "text_config.json").read_bytes())
    more = learn_tokenizer([chr(97 + one) * 2 + chr(97 + two) * 3 for one in range(26) for two in range(26)], 400)
    assert more.get_vocab_size() > 320
    with pytest.raises(InvalidModel, match="the tokenizer has 400 tokens, and the text tower fails"):
        TextTower(graph, more.to_str().encode(), config)


def test_zero_shot_needs_a_text_tower(tiny_model: Path) -> None:
    with pytest.raises(InvalidModel, match="has no text tower; expected an encoder that `lookalike pretrain` trained"):
        evaluate(tiny_model, "digits[:1400]", "digits[1400:]", tiny_model, as_text=())


def test_the_command_prints_zero_shot(words: Path) -> None:
    arguments = ["evaluate", str(words), "--bank", "digits[:200]", "--queries", "digits[1700:]", "--labels-as-text"]
    found = json.loads(run(*arguments, "--json").stdout)
    assert_as_promised("evaluate", found)
    assert found["zero_shot"]["classes"] == 10
    assert "by the words of 10 labels alone" in run(*arguments, "--template", "the {label}").stdout
    refused = run(*arguments, "--template", "the label")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--template the label: expected {label} in it" in refused.stderr


# Figures


def test_class_embeddings_are_means_of_unit_rows(words: Path) -> None:
    tower = opened_tower(words)
    found = class_embeddings(tower, [["seven", "a seven", "7"], ["eight"]])
    mean = tower.encode(["seven", "a seven", "7"]).mean(0)
    np.testing.assert_allclose(found, [mean / np.linalg.norm(mean), tower.encode(["eight"])[0]], atol=1e-6)


def test_recalls_are_those_of_a_loop() -> None:
    random = np.random.default_rng(0)
    rows, texts = (random.normal(size=(count, 5)).astype(np.float32) for count in (30, 12))
    belong = random.random((12, 30)) < 0.05
    belong[np.arange(30) % 12, np.arange(30)] = True
    found = pair_recalls(rows, texts, belong)
    for k in (1, 5, 10):
        hits = [belong[m, sorted(range(30), key=lambda n: -float(texts[m] @ rows[n]))[:k]].any() for m in range(12)]
        assert found[f"text_to_image_recall_at_{k}"] == round(float(np.mean(hits)), 4)
        hits = [belong[sorted(range(12), key=lambda m: -float(texts[m] @ rows[n]))[:k], n].any() for n in range(30)]
        assert found[f"image_to_text_recall_at_{k}"] == round(float(np.mean(hits)), 4)


def test_zero_shot_is_the_share_whose_class_is_nearest() -> None:
    classes = np.eye(3, dtype=np.float32)
    rows = np.array([[0.9, 0.1, 0], [0.1, 0.9, 0], [0, 0.8, 0.6], [0, 0, 1]], np.float32)
    assert zero_shot(rows, np.array([0, 1, 2, 2]), classes) == 0.75


def test_labels_that_are_no_words_and_towers_of_another_dimension_are_refused(words: Path) -> None:
    card, rows = read_card(words), np.eye(2, 32, dtype=np.float32)
    bare = replace(card, facts={key: value for key, value in card.facts.items() if key != "text"})
    with pytest.raises(InvalidSource, match="its labels are no words: 7, 8"):
        labels_as_text(bare, rows, np.array([0, 1]), ["7", "8"])
    with pytest.raises(InvalidModel, match="gives 32 numbers a text, and the image tower 2 numbers a picture"):
        labels_as_text(card, np.eye(2, dtype=np.float32), np.array([0, 1]), ["7", "8"])
