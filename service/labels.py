"""Zero-shot labels: words and pictures in one space → the probability of each word for each picture.

Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, arXiv:2103.00020.
"""

from collections.abc import Sequence

import numpy as np

from service import FloatArray
from service.encoding.text import check_text
from service.errors import InvalidRequest, each

# What stands for the label in a template.
PLACE = "{label}"


def sentences(labels: Sequence[str], templates: Sequence[str], max_characters: int) -> list[str]:
    """Return the sentences of L labels in T templates, L · T texts: all of the first label, then of the second one.

    Args:
        labels: L texts that differ.
        templates: T texts with PLACE in them.
        max_characters: of a sentence, at most.

    Raises:
        InvalidRequest, TooLarge: as `check_text` of a label or of a sentence; or a label comes twice.
    """
    checked = each("label", labels, lambda label: check_text(label, max_characters))
    if len(set(checked)) < len(checked):
        raise InvalidRequest("labels: expected labels that differ, and one of them comes twice")
    return [check_text(template.replace(PLACE, label), max_characters) for label in checked for template in templates]


def mean_directions(embeddings: FloatArray, templates: int) -> FloatArray:
    """Return the embedding of each label: the mean of those of its sentences, made unit length.

    Args:
        embeddings: (L · T, D) of L2 norm 1, in the order of `sentences`.
        templates: T.

    Returns:
        (L, D) of L2 norm 1; zeros where the sentences of a label cancel each other.
    """
    means = embeddings.reshape(-1, templates, embeddings.shape[1]).mean(1)
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    return np.asarray(means / np.where(norms > 0, norms, 1), np.float32)


def classify(pictures: FloatArray, labels: FloatArray, logit_scale: float) -> tuple[FloatArray, FloatArray]:
    """Return the scores of labels for pictures, and their probabilities.

    Args:
        pictures: (N, D) of L2 norm 1.
        labels: (L, D) of L2 norm 1.
        logit_scale: the factor of the scores before the softmax, which is over the labels of a picture.

    Returns:
        scores: (N, L) cosines in [−1, 1].
        probabilities: (N, L); each row sums to 1.
    """
    scores = np.clip(pictures.astype(np.float64) @ labels.astype(np.float64).T, -1, 1)
    logits = logit_scale * scores
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return scores.astype(np.float32), (exponentials / exponentials.sum(1, keepdims=True)).astype(np.float32)
