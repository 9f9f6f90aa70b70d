"""Texts become embeddings of the pictures' space, or an error in words; broken text towers are refused at the start."""

import threading
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import REGISTRY

from service import FloatArray
from service.encoding.card import TEXT_FILES, Card, TextFiles, read_card
from service.encoding.encoder import Encoder
from service.encoding.text import TextConfig, TextEncoder, TextTower, check_text, open_text_tower
from service.errors import InvalidModel, InvalidRequest, NoEmbedding, TooLarge
from tests.colours import CONFIG, NAMES, as_json, text_graph, tokenizer, write_colours

ODD = [
    "\0",
    "red \0 red",
    "مرحبا أحمر",
    "שלום",
    "🚲",
    "👨‍👩‍👧‍👦 red",
    "e\u0301",
    "\ufeffred",
    "\u202ered",
    "a" * 10_000,
]


def tower(**changed: Any) -> TextTower:
    return TextTower(
        changed.get("graph", text_graph()), changed.get("words", tokenizer()), changed.get("config", CONFIG)
    )


def expected(text: str) -> FloatArray:
    """The sum of the colours of the first eight words, in plain NumPy."""
    rows = [NAMES.get(word, NAMES["[UNK]"]) for word in text.lower().split()[:8]]
    total = np.sum(rows, axis=0)
    return np.asarray(total / np.linalg.norm(total), np.float32)


TEXTS = ["red", "A red and BLUE thing", "green green blue", "red " * 9 + "blue blue blue"]


@pytest.mark.parametrize("batch", ["N", 1, 3])
def test_texts_are_embedded_together_as_each_alone(batch: int | str) -> None:
    opened = tower(graph=text_graph(batch=batch))
    assert opened.fixed_batch == (None if batch == "N" else batch)
    together = opened.encode(TEXTS)
    assert together.shape == (4, 4) and together.dtype == np.float32
    for text, row in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(row, expected(text), atol=1e-6)
        np.testing.assert_allclose(opened.encode([text])[0], row, atol=1e-6)


def test_texts_of_all_scripts_have_an_embedding() -> None:
    opened = tower()
    for text in ODD:
        assert abs(np.linalg.norm(opened.encode([check_text(text, 10_000)])) - 1) < 1e-6


def test_a_text_without_a_direction_harms_no_other() -> None:
    encoder = TextEncoder(tower())
    texts = ["red", "nothing", "blue", "nothing at all"]
    futures = [encoder.embed_soon(text) for text in texts]
    np.testing.assert_allclose(futures[0].result(10), expected("red"), atol=1e-6)
    np.testing.assert_allclose(futures[2].result(10), expected("blue"), atol=1e-6)
    with pytest.raises(NoEmbedding, match="gives this text no embedding: zero or not finite"):
        futures[1].result(10)
    encoder.close()


def test_a_text_without_tokens_is_an_error_in_words() -> None:
    with pytest.raises(NoEmbedding, match="finds no word that it knows in this text"):
        tower().encode(["   "])


def test_a_word_that_the_tokenizer_cannot_read_is_an_error_in_words() -> None:
    words = tokenizer().replace(b'"unk_token":"[UNK]"', b'"unk_token":"[GONE]"')
    assert words != tokenizer()
    config = CONFIG._replace(max_length=1)
    # The canary text has an unknown word.
    with pytest.raises(InvalidModel, match="the tokenizer of the encoder cannot read this text"):
        tower(words=words, config=config)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("", InvalidRequest, "expected words, got an empty text"),
        (" \n\u3000", InvalidRequest, "expected words, got an empty text"),
        ("\ud83d bicycle", InvalidRequest, "expected whole characters, got half of one"),
        ("a" * 10_001, TooLarge, "expected a text of at most 10000 characters, got 10001"),
    ],
)
def test_texts_that_are_refused(text: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        check_text(text, 10_000)


def test_the_last_thousand_texts_are_kept() -> None:
    opened = tower()
    batches: list[int] = []
    encode = opened.encode

    def count(texts: Any) -> FloatArray:
        batches.append(len(texts))
        return encode(texts)

    opened.encode = count  # type: ignore[method-assign]
    encoder = TextEncoder(opened)
    first = encoder.embed_soon("red").result(10)
    assert np.array_equal(encoder.embed_soon("red").result(10), first)
    assert sum(batches) == 1
    for number in range(999):
        encoder.embed_soon(f"red {number}").result(10)
    # A text that is asked for again is among the latest.
    encoder.embed_soon("red").result(10)
    encoder.embed_soon("blue").result(10)
    assert sum(batches) == 1001
    encoder.embed_soon("red").result(10)
    assert sum(batches) == 1001
    encoder.embed_soon("red 0").result(10)
    assert sum(batches) == 1002
    encoder.close()


def test_texts_that_wait_share_a_batch_and_those_that_nobody_wants_are_skipped() -> None:
    opened = tower()
    batches: list[list[str]] = []
    busy, free = threading.Event(), threading.Event()
    encode = opened.encode

    def hold(texts: Any) -> FloatArray:
        busy.set()
        free.wait(10)
        batches.append(list(texts))
        return encode(texts)

    opened.encode = hold  # type: ignore[method-assign]
    encoder = TextEncoder(opened)
    first = encoder.embed_soon("red")
    assert busy.wait(10)
    later: list[Future[FloatArray]] = [encoder.embed_soon(text) for text in ("green", "blue", "white")]
    assert later[1].cancel()
    free.set()
    assert all(np.isfinite(one.result(10)).all() for one in (first, later[0], later[2]))
    assert batches == [["red"], ["green", "white"]]
    with pytest.raises(CancelledError):
        later[1].result(10)
    encoder.close()


def test_texts_are_counted_as_texts() -> None:
    def count(name: str) -> float:
        return REGISTRY.get_sample_value(name) or 0

    names = ["lookalike_text_batch_size_sum", "lookalike_text_seconds_count", "lookalike_batch_size_sum"]
    encoder = TextEncoder(tower())
    before = [count(name) for name in names]
    encoder.embed_soon("red").result(10)
    encoder.close()
    assert [count(name) - earlier for name, earlier in zip(names, before, strict=True)] == [1, 1, 0]
    assert count("lookalike_texts_waiting") == 0


def test_a_folder_has_its_text_tower_or_none(tmp_path: Path) -> None:
    folder = write_colours(tmp_path / "colours")
    card = read_card(folder)
    assert card.text == TextFiles(*((folder / name).read_bytes() for name in TEXT_FILES))
    opened = open_text_tower(card, Encoder(card, "cpu").dimension)
    assert opened is not None and opened.dimension == 4
    for name in TEXT_FILES:
        (folder / name).unlink()
    with pytest.raises(InvalidModel, match=r"text\.onnx: cannot be read"):
        read_card(folder)
    (folder / "card.json").unlink()
    assert open_text_tower(read_card(folder), 4) is None


@pytest.mark.parametrize("name", TEXT_FILES)
def test_a_part_of_a_text_tower_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = write_colours(tmp_path / "colours")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data + b" ")
    with pytest.raises(InvalidModel, match=rf"{name}: damaged: sha256 is"):
        read_card(folder)
    (folder / name).unlink()
    (folder / "card.json").unlink()
    with pytest.raises(InvalidModel, match=rf"colours: has [\w. ]+, but no {name}$"):
        read_card(folder)


BROKEN: dict[str, dict[str, bytes]] = {
    "has 10 tokens, and the text tower fails for the last of them": {"tokenizer": tokenizer("late")},
    "the text tower gives 5 numbers a text, and the image tower 4 numbers a picture": {"text": text_graph(dimension=5)},
    "the text tower cannot be loaded": {"text": b"no graph"},
    "cannot be loaded: expected ident": {"tokenizer": b"no tokenizer"},
    "text_config.json: not a configuration of a text tower": {"config": b"[]"},
    "has no output sentence; it has embedding": {"config": as_json(CONFIG, output="sentence")},
    "the text tower fails": {"text": text_graph(length=5)},
    "max_length below 1": {"config": as_json(CONFIG, max_length=0)},
}


@pytest.mark.parametrize("says", BROKEN)
def test_a_broken_text_tower_is_refused_at_the_start(says: str, tmp_path: Path) -> None:
    card = read_card(write_colours(tmp_path / "colours", None, **BROKEN[says]))
    with pytest.raises(InvalidModel, match=says) as caught:
        open_text_tower(card, 4)
    assert str(tmp_path / "colours") in str(caught.value)


def test_a_probe_notices_a_tower_that_has_changed() -> None:
    opened = tower()
    opened.probe()
    other = tower(graph=text_graph(), words=tokenizer())
    other._known = -opened._known
    with pytest.raises(InvalidModel, match="embeds a text otherwise than at the start"):
        other.probe()


@pytest.mark.parametrize("scale", [0, -1, "100", True, float("inf"), None])
def test_a_card_with_a_wrong_logit_scale_is_refused(scale: Any) -> None:
    card = Card(Path("m"), "m", "", b"", None, {"logit_scale": scale})  # type: ignore[arg-type]
    with pytest.raises(InvalidModel, match="logit_scale: expected a positive number"):
        _ = card.logit_scale


def test_the_logit_scale_is_the_cards_or_that_of_clip() -> None:
    assert Card(Path("m"), "m", "", b"", None, {}).logit_scale == 100  # type: ignore[arg-type]
    assert Card(Path("m"), "m", "", b"", None, {"logit_scale": 12.5}).logit_scale == 12.5  # type: ignore[arg-type]


def test_a_config_with_any_other_padding_is_refused() -> None:
    with pytest.raises(InvalidModel, match="another padding"):
        TextConfig.from_json(as_json(CONFIG, padding="none"))
