"""Captions of labels and of the source, the tokenizer that is learnt from them, and the draw of each step."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from service.errors import InvalidRequest, InvalidSource
from service.sources.compact import Labels, Names
from service.sources.source import Source
from training.captions import Texts, label_words, learn_tokenizer, read_captions, read_tokenizer
from training.recipe import Text

CPU = torch.device("cpu")
SMALL = Text(vocabulary=300)


def source_of(labels: Sequence[str | None] | None, captions: Sequence[Sequence[str]] | None = None) -> Source:
    count = len(labels or captions or ())
    known = None if labels is None else Labels.of(labels)
    own = None if captions is None else lambda: captions
    return Source("pictures", Names(map(str, range(count))), lambda _: b"", known, captions=own)


def texts_by_picture(source: Source, settings: Text = SMALL) -> list[list[str]]:
    found = read_captions(source, settings)
    return [[found.texts[number] for number in own.tolist()] for own in found.of(np.arange(len(source)))]


def test_labels_become_captions_through_every_template_and_word() -> None:
    settings = Text(
        vocabulary=300, templates=("{label}", "the digit {label}"), words={"7": ("seven", "7"), "8": ("eight",)}
    )
    source = source_of(["7", "great_grey_owl", None, "8"])
    found = read_captions(source, settings)
    assert found.of_labels
    assert found.counts.tolist() == [4, 2, 0, 2]
    assert [sorted(own) for own in texts_by_picture(source, settings)] == [
        ["7", "seven", "the digit 7", "the digit seven"],
        ["great grey owl", "the digit great grey owl"],
        [],
        ["eight", "the digit eight"],
    ]
    # Whatever the template and the word, all captions of a label are one group.
    assert [set(found.groups[own].tolist()) for own in found.of(np.array([0, 1, 3]))] == [{0}, {1}, {2}]


def test_a_sources_own_captions_come_before_its_labels_and_equal_texts_are_one_group() -> None:
    captions = [["a cat", "a grey cat "], ["a\ud800dog"], [], [" ", ""], ["a cat"]]
    source = source_of(["x", "y", "x", "y", "x"], captions)
    assert texts_by_picture(source) == [["a cat", "a grey cat"], ["a?dog"], [], [], ["a cat"]]
    found = read_captions(source, SMALL)
    assert not found.of_labels
    assert sorted(found.groups.tolist()) == [0, 1, 2]


def test_captions_all_empty_leave_the_labels() -> None:
    assert texts_by_picture(source_of(["cat", "dog"], [[], [""]])) == [["a photo of a cat"], ["a photo of a dog"]]


@pytest.mark.parametrize(
    ("labels", "captions", "message"),
    [
        (["7", "8"], None, "pictures: its labels are no words: 7, 8; expected words, as names of classes or"),
        (["n01440764", "n01514859"], None, "its labels are no words: n01440764, n01514859"),
        (["cat", "cat"], None, "pictures: all captions say the same; expected"),
        (None, [["a cat"], ["a cat"], []], "pictures: all captions say the same: 'a cat'; expected two different ones"),
        (None, [["one"]], "all captions say the same"),
        (None, [[], []], "pictures: has neither captions nor labels; expected a column caption or text in Parquet"),
        (["a_b cat", "a b_cat"], None, "the labels a_b cat and a b_cat have the same caption 'a photo of a a b cat'"),
    ],
)
def test_captions_that_teach_nothing_are_refused(
    labels: list[str | None] | None, captions: list[list[str]] | None, message: str
) -> None:
    with pytest.raises(InvalidSource) as refused:
        read_captions(source_of(labels, captions), SMALL)
    assert message.partition("; expected two")[0].removesuffix("; expected") in str(refused.value)


@pytest.mark.parametrize("label", ["ox", "猫", "tench_n0144", "Größe", "a red 7"])
def test_words_of_all_kinds_are_words(label: str) -> None:
    assert label_words([label], SMALL, "x") == {label: (label.replace("_", " "),)}


# The tokenizer


TEXTS = ["a photo of a cat", "a photo of a dog", "seven", "a handwritten seven"]


def test_the_learnt_tokenizer_has_tokens_for_any_text_and_marks_both_ends() -> None:
    tokenizer = learn_tokenizer(TEXTS, 300)
    start, end = tokenizer.token_to_id("<|start|>"), tokenizer.token_to_id("<|end|>")
    for text in ("", "seven", "SEVEN ", "東京", "🙂 Ωß", "\0"):
        ids = tokenizer.encode(text).ids
        assert (ids[0], ids[-1]) == (start, end)
        assert max(ids) < tokenizer.get_vocab_size() <= 300
    assert tokenizer.encode("SEVEN ").ids == tokenizer.encode("seven").ids
    # The whole word is one token by its frequency, and another script is its bytes.
    assert len(tokenizer.encode("seven").ids) == 3
    assert tokenizer.decode(tokenizer.encode("東京 cat").ids).strip() == "東京 cat"


def test_the_same_captions_give_the_same_tokenizer() -> None:
    assert learn_tokenizer(TEXTS, 290).to_str() == learn_tokenizer(TEXTS, 290).to_str()
    assert learn_tokenizer(TEXTS, 290).to_str() != learn_tokenizer(TEXTS[:2], 290).to_str()


def test_a_given_tokenizer_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(learn_tokenizer(["quite other words"], 270).to_str())
    tokenizer, config = read_tokenizer(Text(vocabulary=300, tokenizer=str(file)), TEXTS)
    assert json.loads(tokenizer) == json.loads(file.read_text())
    assert (config.pad_token, config.pad_id, config.max_length, config.output) == ("<|pad|>", 0, 32, "embedding")


def test_a_tokenizer_with_more_tokens_than_the_tower_knows_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(learn_tokenizer(TEXTS, 290).to_str())
    with pytest.raises(InvalidRequest, match=r"has 288 tokens, and the text tower of the recipe knows 280: --set text"):
        read_tokenizer(Text(vocabulary=280, tokenizer=str(file)), TEXTS)


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read: No such file"):
        read_tokenizer(Text(tokenizer=str(tmp_path / "none.json")), TEXTS)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InvalidRequest, match=r"other.json: not a tokenizer.json"):
        read_tokenizer(Text(tokenizer=str(tmp_path / "other.json")), TEXTS)
    (tmp_path / "bare.json").write_text(Tokenizer(models.BPE({"a": 0}, [])).to_str())
    with pytest.raises(InvalidRequest, match="gives an empty text no token"):
        read_tokenizer(Text(tokenizer=str(tmp_path / "bare.json")), TEXTS)


# The draw


def test_each_step_draws_one_of_a_pictures_own_captions_at_random() -> None:
    captions = [["a cat", "two cats", "grey cats"], ["a dog"], [], ["a dog", "a hound"]]
    found = read_captions(source_of(None, captions), SMALL)
    texts, randomness = Texts(found, CPU), torch.Generator().manual_seed(0)
    read = Tokenizer.from_str(found.tokenizer.decode())
    seen: list[set[str]] = [set() for _ in captions]
    for _ in range(60):
        tokens, mask, which, groups = texts.draw(torch.tensor([0, 1, 3, 0]), randomness)
        # The same text is encoded once, and no longer than the longest of the batch.
        assert len({tuple(row) for row in tokens.tolist()}) == len(tokens)
        assert int(mask.sum(1).max()) == tokens.shape[1]
        words = [read.decode(tokens[row].tolist()).strip() for row in which.tolist()]
        for picture, word in zip((0, 1, 3, 0), words, strict=True):
            seen[picture].add(word)
        assert [found.texts[group] for group in groups.tolist()] == words
    assert seen == [set(own) for own in captions]


def test_the_draw_repeats_with_its_randomness() -> None:
    found = read_captions(source_of(None, [["one cat", "two cats"]] * 8 + [["a dog"]]), SMALL)
    texts, positions = Texts(found, CPU), torch.arange(9)
    first, second, other = (texts.draw(positions, torch.Generator().manual_seed(seed)).groups for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
