"""Zero-shot labels against plain NumPy, and at their extremes."""

import math

import numpy as np
import pytest

from service import FloatArray
from service.errors import InvalidRequest, TooLarge
from service.labels import classify, mean_directions, sentences


def unit(*rows: list[float]) -> FloatArray:
    array = np.asarray(rows, np.float32)
    return np.asarray(array / np.linalg.norm(array, axis=1, keepdims=True))


def test_sentences_are_in_the_order_of_labels() -> None:
    made = sentences(["cat", "dog"], ["a {label}", "{label}!"], 10)
    assert made == ["a cat", "cat!", "a dog", "dog!"]


def test_a_label_that_is_no_word_is_named() -> None:
    with pytest.raises(InvalidRequest, match="label 1: expected words, got an empty text"):
        sentences(["cat", " "], ["a {label}"], 10)
    with pytest.raises(TooLarge, match="at most 10 characters, got 11"):
        sentences(["eightchr"], ["an {label}"], 10)
    with pytest.raises(InvalidRequest, match="one of them comes twice"):
        sentences(["cat", "dog", "cat"], ["{label}"], 10)


def test_a_label_is_the_mean_of_its_sentences() -> None:
    rows = unit([1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 3, 4])
    found = mean_directions(rows, 2)
    for label in range(2):
        total = [sum(float(rows[2 * label + part][axis]) for part in range(2)) for axis in range(3)]
        length = math.sqrt(sum(value * value for value in total))
        np.testing.assert_allclose(found[label], [value / length for value in total], atol=1e-6)
    assert not mean_directions(unit([1, 0], [-1, 0]), 2).any()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0, 1e6])
def test_probabilities_are_a_softmax_of_scaled_cosines(scale: float) -> None:
    pictures, labels = unit([1, 2, 2], [-1, 0, 0]), unit([1, 2, 2], [2, -1, 0], [0, 0, -1])
    scores, probabilities = classify(pictures, labels, scale)
    assert scores.max() <= 1
    for row, picture in enumerate(pictures):
        cosines = [sum(float(a) * float(b) for a, b in zip(picture, label, strict=True)) for label in labels]
        powers = [math.exp(scale * (one - max(cosines))) for one in cosines]
        np.testing.assert_allclose(scores[row], cosines, atol=1e-6)
        np.testing.assert_allclose(probabilities[row], [one / sum(powers) for one in powers], atol=1e-5)
        assert math.isclose(float(probabilities[row].sum()), 1, abs_tol=1e-6)
