"""The text tower of a run → text.onnx, checked against torch, with its tokenizer and the figures of held-out pairs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from service import FloatArray, IntArray
from service.encoding.card import TEXT_FILE
from service.encoding.layouts import TOKENIZER_FILE
from service.encoding.text import TEXT_CONFIG_FILE, TextTower
from service.errors import InvalidModel, InvalidSource
from service.sources.source import Source
from training.captions import Captions, label_words, zero_shot_texts
from training.methods.clip import CLIP
from training.onnx_graph import to_graph
from training.recipe import Text
from training.text_encoder import TextEncoder, UnitText
from training.zero_shot import class_embeddings, embed_texts, pair_recalls, zero_shot

_CHECKED_TEXTS = 256
_LEAST_COSINE = 0.9999
# Texts that no captions are like: other scripts, many tokens, none.
_ODD = ("", "Größe 7, ÄÖÜ", "東京の夜", "🙂" * 40, "word " * 200)


class TextSide(NamedTuple):
    """The text tower of an image-text encoder.

    Attributes:
        files: text.onnx, tokenizer.json and text_config.json.
        quality: the measurements of text.onnx, for the card.
        facts: for the card: logit_scale, and logit_bias of the sigmoid; and `text`, how labels become texts.
    """

    files: dict[str, bytes]
    quality: dict[str, Any]
    facts: dict[str, Any]


def export_text(
    method: CLIP, captions: Captions, source: Source, settings: Text, rows: FloatArray, positions: IntArray
) -> TextSide:
    """Export the text tower of a method, and measure it on held-out pairs.

    Args:
        method: trained.
        captions: of the source.
        source: its labels, if they are words, are named by zero-shot.
        settings: of the recipe.
        rows: (n, D), unit embeddings of the held-out pictures; of none no figures are made.
        positions: (n,), of these pictures in the source.

    Raises:
        InvalidModel: onnxruntime's embeddings differ from torch's (cosine below 0.9999 at batch 1 or 64).
    """
    encoder = UnitText(method.text).cpu().eval()
    model = text_to_onnx(method.text, settings.max_length)
    tower = TextTower(model, captions.tokenizer, captions.config)
    checked = [*captions.texts[:_CHECKED_TEXTS], *_ODD]
    quality: dict[str, Any] = {"texts": len(checked)}
    quality |= {f"least_cosine_to_torch_batch_{size}": compare_text(encoder, tower, checked, size) for size in (1, 64)}
    words = _words(source, settings)
    if len(positions):
        quality |= {"pictures": len(positions)} | _figures(tower, captions, source, words, settings, rows, positions)
    facts = method.scales() | {
        "text": {"templates": list(settings.templates), "words": {label: own[0] for label, own in words.items()}}
    }
    files = {
        TEXT_FILE: model,
        TOKENIZER_FILE: captions.tokenizer,
        TEXT_CONFIG_FILE: captions.config.to_json(),
    }
    return TextSide(files, quality, facts)


def text_to_onnx(encoder: TextEncoder, max_length: int) -> bytes:
    """Return the ONNX graph of a text tower, for any batch size and up to so many tokens."""
    # Two tensors: the exporter takes one that is given twice for one input.
    example = torch.ones(2, 3, dtype=torch.int64)
    shape = {0: torch.export.Dim("N"), 1: torch.export.Dim("T", max=max_length)}
    return to_graph(
        UnitText(encoder).cpu().eval(), {"input_ids": example, "attention_mask": torch.ones_like(example)}, shape
    )


def compare_text(encoder: UnitText, tower: TextTower, texts: Sequence[str], batch: int) -> float:
    """Return the least cosine between torch's and onnxruntime's embeddings of the same texts.

    Raises:
        InvalidModel: it is below 0.9999.
    """
    least = 1.0
    for start in range(0, len(texts), batch):
        chunk = texts[start : start + batch]
        with torch.inference_mode():
            expected = encoder(*(torch.from_numpy(part) for part in tower.tokens(chunk))).numpy()
        least = min(least, float((expected * tower.encode(chunk)).sum(1).min()))
    if least < _LEAST_COSINE:
        raise InvalidModel(
            f"{TEXT_FILE} differs from torch: cosine {least:.6f} at batch {batch}, expected ≥ {_LEAST_COSINE}"
        )
    return round(least, 7)


def _words(source: Source, settings: Text) -> dict[str, tuple[str, ...]]:
    """Return the words of the source's labels; none where it has no labels, or these are no words."""
    try:
        return label_words(source.labels.used(), settings, source.name) if source.labels is not None else {}
    except InvalidSource:
        return {}


def _figures(
    tower: TextTower,
    captions: Captions,
    source: Source,
    words: dict[str, tuple[str, ...]],
    settings: Text,
    rows: FloatArray,
    positions: IntArray,
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    own = captions.of(positions)
    distinct = np.unique(np.concatenate(own))
    groups, index = np.unique(captions.groups[distinct], return_inverse=True)
    member = np.zeros((len(positions), len(groups)), bool)
    for row, numbers in enumerate(own):
        member[row, np.searchsorted(groups, captions.groups[numbers])] = True
    texts = embed_texts(tower, [captions.texts[number] for number in distinct.tolist()])
    found |= pair_recalls(rows, texts, member[:, index].T)
    if source.labels is not None and words:
        place = {label: at for at, label in enumerate(words)}
        named = np.array([place.get(source.labels[at] or "", -1) for at in positions.tolist()])
        classes = class_embeddings(tower, zero_shot_texts([one[0] for one in words.values()], settings.templates))
        labelled = named >= 0
        if labelled.any():
            found["zero_shot"] = round(zero_shot(rows[labelled], named[labelled], classes), 4)
    return found
