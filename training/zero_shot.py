"""Figures of an image-text encoder: labels named by their words alone, and pairs of pictures and texts found again."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from service import FloatArray, IntArray
from service.encoding.card import Card
from service.encoding.text import TextTower, open_text_tower
from service.errors import InvalidModel
from training.captions import label_words, zero_shot_texts
from training.recipe import Text

_BATCH = 64
_PLACES = (1, 5, 10)


def check_reads_texts(card: Card) -> None:
    """Make sure that an encoder has a text tower.

    Raises:
        InvalidModel: it has none.
    """
    if card.text is None:
        raise InvalidModel(
            f"{card.folder}: has no text tower; expected an encoder that `lookalike pretrain` trained with "
            "clip, or one as `lookalike import hf:Xenova/clip-vit-base-patch32` brings it"
        )


def labels_as_text(
    card: Card, rows: FloatArray, labels: IntArray, classes: Sequence[str], templates: Sequence[str] = ()
) -> dict[str, Any]:
    """Return how well pictures are named by the words of their labels alone.

    Args:
        card: of an encoder with a text tower. Its fact `text`, if it has one, gives words to labels that are none, and
            templates.
        rows: (N, D), unit embeddings of the pictures.
        labels: (N,), positions in classes.
        classes: K labels.
        templates: {label} stands for the label's words; those of the card if empty, else "a photo of a {label}".

    Returns:
        accuracy, classes and templates.

    Raises:
        InvalidModel: it has no text tower, or one of another dimension.
        InvalidSource: a label is no word, and the card has none for it.
    """
    check_reads_texts(card)
    tower, told = open_text_tower(card, rows.shape[1]), card.facts.get("text") or {}
    assert tower is not None
    used = tuple(templates) or tuple(told.get("templates", ())) or ("a photo of a {label}",)
    words = label_words(classes, Text(words=told.get("words", {})), "zero-shot")
    embeddings = class_embeddings(tower, zero_shot_texts([words[label][0] for label in classes], used))
    return {
        "accuracy": round(zero_shot(rows, labels, embeddings), 4),
        "classes": len(classes),
        "templates": list(used),
    }


def embed_texts(tower: TextTower, texts: Sequence[str]) -> FloatArray:
    """Return unit embeddings (M, D) of M > 0 texts."""
    starts = range(0, len(texts), _BATCH)
    return np.concatenate([tower.encode(texts[start : start + _BATCH]) for start in starts])


def class_embeddings(tower: TextTower, texts: Sequence[Sequence[str]]) -> FloatArray:
    """Return a unit embedding (K, D) of each of K classes: the mean of those of its texts.

    Source: Radford et al., arXiv:2103.00020, section 3.1.4, prompt ensembling.
    """
    means = np.stack([embed_texts(tower, own).mean(0) for own in texts])
    return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True), np.float32)


def zero_shot(rows: FloatArray, labels: IntArray, classes: FloatArray) -> float:
    """Return the share of pictures whose class has the embedding most like theirs.

    Args:
        rows: (N, D), unit embeddings of the pictures.
        labels: (N,), positions in classes.
        classes: (K, D), as of class_embeddings.
    """
    return float(((rows @ classes.T).argmax(1) == labels).mean())


def pair_recalls(
    rows: FloatArray, texts: FloatArray, belong: "np.ndarray[tuple[int, int], np.dtype[np.bool_]]"
) -> dict[str, float]:
    """Return recall at 1, 5 and 10, of pictures by texts and of texts by pictures.

    It is the share of queries with one that belongs to them among the first k.

    Args:
        rows: (N, D), unit embeddings of the pictures.
        texts: (M, D), unit embeddings of distinct texts.
        belong: (M, N), which belong together; each text and each picture has one or more.
    """
    scores = texts @ rows.T  # (M, N)
    found: dict[str, float] = {}
    for name, one, right in (("text_to_image", scores, belong), ("image_to_text", scores.T, belong.T)):
        ranked = np.take_along_axis(right, (-one).argsort(1, kind="stable")[:, : max(_PLACES)], 1)
        found |= {f"{name}_recall_at_{k}": round(float(ranked[:, :k].any(1).mean()), 4) for k in _PLACES}
    return found
