"""Captions of a source's pictures: its own, or its labels through templates; and the tokens that they become."""

import re
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Generator, Tensor

from service import IntArray
from service.encoding.text import TextConfig
from service.errors import InvalidRequest, InvalidSource
from service.sources.source import Source
from training.methods import Captioned
from training.recipe import Text

_PAD, _START, _END = "<|pad|>", "<|start|>", "<|end|>"
# A word has two letters in a row, or one of a script whose words may be that short.
_WORD = re.compile(r"[^\W\d_]{2}|[^\W\d_\x00-\x7f]")
# Padding that tokenizer.json files of others name.
_PADDINGS = (_PAD, "<pad>", "[PAD]", "<|endoftext|>", "</s>")


# Of Captions: texts, groups, starts and numbers.
_Found = tuple[list[str], IntArray, IntArray, IntArray]


@dataclass(frozen=True)
class Captions:
    """The captions of N pictures, each distinct text stored once.

    Attributes:
        texts: M distinct texts.
        groups: (M,) int64; texts of one group say the same, as all those of one label do.
        starts: (N + 1,) int64; picture n has the captions numbers[starts[n] : starts[n + 1]].
        numbers: (K,) int64, positions in texts.
        of_labels: whether they come from labels.
        tokenizer: tokenizer.json.
        config: text_config.json.
    """

    texts: Sequence[str]
    groups: IntArray
    starts: IntArray
    numbers: IntArray
    of_labels: bool
    tokenizer: bytes
    config: TextConfig

    @property
    def counts(self) -> IntArray:
        """(N,) int64, how many captions each picture has."""
        return np.diff(self.starts)

    def checksum(self, before: int) -> int:
        """Return a checksum of texts and of which picture has which, that continues another one."""
        return zlib.crc32("\0".join(self.texts).encode(), zlib.crc32(self.numbers.tobytes(), before))

    def of(self, positions: IntArray) -> list[IntArray]:
        """Return the numbers of the texts of each of these pictures."""
        return [self.numbers[self.starts[at] : self.starts[at + 1]] for at in positions.tolist()]


def read_captions(source: Source, settings: Text) -> Captions:
    """Return the captions of a source: its own, or if it has none its labels through the recipe's templates.

    Raises:
        InvalidSource: it has neither; its labels are no words; or all captions say the same.
        InvalidRequest: as read_tokenizer.
    """
    own = source.captions() if source.captions is not None else []
    of_labels = not any(text.strip() for texts in own for text in texts)
    texts, groups, starts, numbers = _of_labels(source, settings) if of_labels else _own(own)
    used = np.unique(groups[np.unique(numbers)])
    if len(used) < 2:
        only = f": {texts[int(numbers[0])]!r}" if len(used) else ""
        raise InvalidSource(f"{source.name}: all captions say the same{only}; expected two different ones or more")
    where = f"its labels through {len(settings.templates)} templates" if of_labels else "the source"
    print(f"{len(texts)} different captions from {where}", file=sys.stderr)
    return Captions(texts, groups, starts, numbers, of_labels, *read_tokenizer(settings, texts))


def label_words(labels: Sequence[str], settings: Text, name: str) -> dict[str, tuple[str, ...]]:
    """Return the words of each label: those of the recipe, else the label itself with spaces for underscores.

    Args:
        labels: each once.
        settings: of the recipe.
        name: of the source, for the message.

    Raises:
        InvalidSource: a label is no word, and the recipe has none for it.
    """
    words = {label: settings.words.get(label) or (label.replace("_", " ").strip(),) for label in labels}
    odd = [label for label in labels if label not in settings.words and not _WORD.search(label)]
    if odd:
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise InvalidSource(
            f"{name}: its labels are no words: {', '.join(odd[:5])}{more}; expected words, as names of classes or "
            f'in the table text.words of the recipe, as in {odd[0]} = "seven"'
        )
    return words


def zero_shot_texts(words: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Return the texts of each class: its word in every template."""
    return [[template.replace("{label}", word) for template in templates] for word in words]


def _of_labels(source: Source, settings: Text) -> _Found:
    labels = source.labels
    if labels is None:
        raise InvalidSource(
            f"{source.name}: has neither captions nor labels; expected a column caption or text in Parquet, .txt "
            "members in WebDataset shards, metadata.jsonl or metadata.csv in a folder, or folders named for classes"
        )
    words = label_words(labels.used(), settings, source.name)
    texts: dict[str, int] = {}
    groups: list[int] = []
    of_label: list[list[int]] = []
    for group, label in enumerate(labels.names):
        own = [text for each in zero_shot_texts(words.get(label, ()), settings.templates) for text in each]
        for text in own:
            if text not in texts:
                texts[text] = len(texts)
                groups.append(group)
            elif groups[texts[text]] != group:
                other = labels.names[groups[texts[text]]]
                raise InvalidSource(f"{source.name}: the labels {other} and {label} have the same caption {text!r}")
        of_label.append(sorted({texts[text] for text in own}))
    of_label.append([])
    # A picture without a label has the number −1, and so the last list, which is empty.
    joined = [np.array(own, np.int64) for own in of_label]
    each = [joined[number] for number in labels.numbers.tolist()]
    starts = np.cumsum([0, *map(len, each)]).astype(np.int64)
    return list(texts), np.array(groups, np.int64), starts, np.concatenate(each)


def _own(captions: Sequence[Sequence[str]]) -> _Found:
    texts: dict[str, int] = {}
    counts, numbers = [0], []
    for own in captions:
        # A lone surrogate, which JSON may hold, has no bytes.
        cleaned = (text.encode("utf-8", "replace").decode().strip() for text in own)
        kept = [text for text in cleaned if text]
        numbers += [texts.setdefault(text, len(texts)) for text in kept]
        counts.append(len(kept))
    starts = np.cumsum(counts).astype(np.int64)
    return list(texts), np.arange(len(texts)), starts, np.array(numbers, np.int64)


def read_tokenizer(settings: Text, texts: Sequence[str]) -> tuple[bytes, TextConfig]:
    """Return tokenizer.json and text_config.json: of the recipe's tokenizer, or of a BPE that is learnt here.

    Args:
        settings: of the recipe.
        texts: the captions.

    Raises:
        InvalidRequest: the given file is no tokenizer, has more tokens than the recipe's vocabulary, or gives an empty
            text no token.
    """
    given = settings.tokenizer
    tokenizer = learn_tokenizer(texts, settings.vocabulary) if given is None else _given(given)
    most = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if most > settings.vocabulary:
        raise InvalidRequest(
            f"{given}: has {most} tokens, and the text tower of the recipe knows {settings.vocabulary}: "
            f"--set text.vocabulary={most}"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if not tokenizer.encode("").ids:
        raise InvalidRequest(f"{given}: gives an empty text no token; expected one that marks a text's start or end")
    pad = next((token for token in _PADDINGS if tokenizer.token_to_id(token) is not None), None)
    pad_id = 0 if pad is None else tokenizer.token_to_id(pad)
    # A text is read from left to right up to its last token, so any token may fill the places behind it.
    token = pad or str(tokenizer.id_to_token(0))
    config = TextConfig(settings.max_length, "longest", "right", token, int(pad_id or 0), False, "embedding")
    return tokenizer.to_str().encode(), config


def learn_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE of up to `vocabulary` tokens, learnt from texts in small letters.

    Any text of any script has tokens, and each text has a mark at its start and its end.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        show_progress=False,
        special_tokens=[_PAD, _START, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    marks = [(mark, int(tokenizer.token_to_id(mark) or 0)) for mark in (_START, _END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{_START} $A {_END}", special_tokens=marks)
    return tokenizer


def _given(file: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(Path(file).read_text("utf-8"))
    except OSError as error:
        raise InvalidRequest(f"{file}: cannot be read: {error.strerror}") from error
    # tokenizers raises a plain Exception.
    except Exception as error:
        raise InvalidRequest(f"{file}: not a tokenizer.json: {str(error)[:200]}") from error


class Texts:
    """The tokens of all captions on the run's device, from which each step draws one for each picture."""

    def __init__(self, captions: Captions, on: torch.device) -> None:
        config, read = captions.config, Tokenizer.from_str(captions.tokenizer.decode())
        read.enable_truncation(config.max_length)
        read.enable_padding(pad_id=config.pad_id, pad_token=config.pad_token)
        encoded = read.encode_batch(list(captions.texts))
        self._tokens = torch.tensor([one.ids for one in encoded], device=on)  # (M, T)
        self._mask = torch.tensor([one.attention_mask for one in encoded], device=on)  # (M, T)
        arrays = (captions.groups, captions.starts, captions.counts, captions.numbers)
        self._groups, self._starts, self._counts, self._numbers = (torch.from_numpy(one).to(on) for one in arrays)

    def draw(self, positions: Tensor, randomness: Generator) -> Captioned:
        """Return a random caption of each picture (N,); each has one or more."""
        share = torch.rand(len(positions), generator=randomness, device=positions.device)
        counts = self._counts[positions]
        # Rounding could give the number behind the last one.
        drawn = torch.minimum((share * counts).long(), counts - 1)
        numbers = self._numbers[self._starts[positions] + drawn]  # (N,)
        distinct, which = torch.unique(numbers, return_inverse=True)  # (M,), (N,)
        mask = self._mask[distinct]
        longest = int(mask.sum(1).max())
        return Captioned(self._tokens[distinct, :longest], mask[:, :longest], which, self._groups[numbers])
