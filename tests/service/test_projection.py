"""Maps against plain NumPy: principal axes by an SVD, places by a slow loop; and what t-SNE is to show."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from service import FloatArray
from service.errors import InvalidRequest
from service.projection import check_method, colours, default_method, place, principal_axes, project, scaled, tsne
from service.store.catalog_reader import CatalogReader
from service.store.embedded import EmbeddedStore
from tests.service.store.test_embedded import D, card, item, unit


def store_of(folder: Path, vectors: FloatArray) -> CatalogReader:
    with closing(EmbeddedStore(folder, card(), D)) as store:
        store.add([item(f"{n}", vector) for n, vector in enumerate(vectors)])
    return CatalogReader(folder)


def groups(count: int, each: int) -> FloatArray:
    """Unit vectors around a few directions, those of a direction one after the other."""
    centres = unit(count, D, seed=1).repeat(each, 0)
    vectors = centres + 0.1 * np.random.default_rng(2).normal(size=centres.shape)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def test_principal_axes_are_those_of_an_svd() -> None:
    vectors = unit(1000, 24) * np.linspace(1, 0.2, 24, dtype=np.float32) + 3
    chunks = ((np.arange(len(part)), part) for part in np.array_split(vectors, 7))
    mean, axes = principal_axes(chunks, 24)
    assert np.allclose(mean, vectors.mean(0), atol=1e-5)
    by_svd = np.linalg.svd(vectors.astype(np.float64) - vectors.mean(0, np.float64))[2].T
    assert np.allclose(np.abs((by_svd * axes).sum(0)), 1, atol=1e-4)
    assert (np.take_along_axis(axes, np.abs(axes).argmax(0)[None], 0) > 0).all()


def test_the_map_by_pca_is_that_of_an_svd(tmp_path: Path) -> None:
    vectors = groups(4, 30)
    with closing(store_of(tmp_path, vectors)) as reader:
        made = project(reader, "pca")
    assert (made.keys.tolist(), made.sequence, made.method) == (list(range(1, 121)), 120, "pca")
    left, sizes, _ = np.linalg.svd(vectors.astype(np.float64) - vectors.mean(0, np.float64), full_matrices=False)
    plane = left[:, :2] * sizes[:2]
    ours = made.positions.astype(np.float64)
    # Up to the direction of each axis, the middle and one scale.
    scale = 65535 / np.ptp(plane, axis=0).max()
    for axis in range(2):
        expected = (plane[:, axis] - (plane[:, axis].min() + plane[:, axis].max()) / 2) * scale
        got = ours[:, axis] - 65535 / 2
        assert min(np.abs(got - expected).max(), np.abs(got + expected).max()) < 3


def test_tsne_puts_groups_apart_and_tells_its_progress(tmp_path: Path) -> None:
    told: list[float] = []
    with closing(store_of(tmp_path, groups(5, 40))) as reader:
        made = project(reader, "t-sne", told.append)
        again = project(reader, "t-sne")
    assert made.method == "t-sne"
    assert np.array_equal(made.positions, again.positions)
    places = made.positions.astype(np.float64)
    assert (places.max(0) - places.min(0)).max() == 65535
    nearest = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(nearest, np.inf)
    assert (np.arange(200) // 40 == nearest.argmin(1) // 40).all()
    assert told == sorted(told)
    assert len([share for share in told if 0.05 < share < 0.85]) > 10


def test_items_beyond_the_most_lie_among_their_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.projection._MOST_OF_TSNE", 100)
    told: list[float] = []
    with closing(store_of(tmp_path, groups(5, 40))) as reader:
        made = project(reader, "t-sne", told.append)
    assert made.keys.tolist() == list(range(1, 201))
    places = made.positions.astype(np.float64)
    middles = np.stack([np.median(places[start : start + 40], axis=0) for start in range(0, 200, 40)])
    nearest = np.linalg.norm(places[:, None] - middles[None], axis=2).argmin(1)
    assert (nearest == np.arange(200) // 40).all()
    assert told == sorted(told)
    assert told[-1] == 1


def test_placement_equals_a_slow_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.projection._BLOCK", 7)
    vectors, placed = unit(50, D), unit(40, D, seed=1)
    places = np.random.default_rng(3).normal(size=(40, 2)).astype(np.float32)
    expected = []
    for vector in vectors:
        scored = sorted(((float(vector @ other), number) for number, other in enumerate(placed)), reverse=True)[:5]
        total = sum(max(score, 1e-6) for score, _ in scored)
        expected.append(sum(max(score, 1e-6) / total * places[number] for score, number in scored))
    assert np.allclose(place(vectors, placed, places), expected, atol=1e-5)
    # Fewer placed ones than neighbours.
    assert np.allclose(place(vectors[:1], placed[:1], places[:1]), places[0])


@pytest.mark.parametrize("method", ["pca", "t-sne"])
@pytest.mark.parametrize("count", [0, 1, 2, 9, 11])
def test_a_store_of_any_size_has_a_map(tmp_path: Path, count: int, method: str) -> None:
    with closing(store_of(tmp_path, unit(count, D) if count else np.empty((0, D), np.float32))) as reader:
        made = project(reader, method)  # type: ignore[arg-type]
    assert made.positions.shape == (count, 2)
    assert made.keys.tolist() == list(range(1, count + 1))
    if count == 1:
        assert np.abs(made.positions.astype(int) - 32768).max() <= 1
    if count == 2:
        assert sorted(made.positions[:, 0].tolist()) == [0, 65535]


@pytest.mark.parametrize("method", ["pca", "t-sne"])
def test_vectors_that_are_all_the_same_lie_in_the_middle(tmp_path: Path, method: str) -> None:
    with closing(store_of(tmp_path, unit(D)[None].repeat(30, 0))) as reader:
        made = project(reader, method)  # type: ignore[arg-type]
    assert np.abs(made.positions.astype(int) - 32768).max() <= 1


def test_tsne_takes_vectors_of_a_line() -> None:
    plane = tsne(np.linspace(0, 1, 40, dtype=np.float32)[:, None])
    assert np.isfinite(plane).all()
    assert plane.shape == (40, 2)


def test_both_axes_have_one_scale() -> None:
    assert scaled(np.asarray([[0, 0], [4, 1], [2, 2]])).tolist() == [[0, 16384], [65535, 32768], [32768, 49151]]


def test_without_scikit_learn_there_is_pca(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_method() == "t-sne"
    assert check_method("t-sne") == "t-sne"
    monkeypatch.setattr("service.projection.find_spec", lambda _: None)
    assert default_method() == "pca"
    assert check_method("pca") == "pca"
    with pytest.raises(InvalidRequest, match="pip install scikit-learn"):
        check_method("t-sne")


def test_colours_are_the_most_frequent_values(tmp_path: Path) -> None:
    values = ["a", "b", "b", 1, 1.0, True, True, True, None, ["a"], {"a": 1}]
    with closing(EmbeddedStore(tmp_path, card(), D)) as store:
        metadata = [{} if value is None else {"label": value, "other": n} for n, value in enumerate(values)]
        store.add(
            [item(f"{n}", vector, **one) for n, (vector, one) in enumerate(zip(unit(11, D), metadata, strict=True))]
        )
    with closing(CatalogReader(tmp_path)) as reader:
        keys = reader.keys()
        found = colours(reader, keys, "label", 3)
        assert (found.values, found.codes.tolist()) == ([True, "b", "a"], [3, 2, 2, 0, 0, 1, 1, 1, 0, 0, 0])
        every = colours(reader, keys, "label", 60)
        assert [(type(value), value) for value in every.values] == [
            (bool, True),
            (str, "b"),
            (str, "a"),
            (int, 1),
            (float, 1.0),
        ]
        # Items that the map does not have yet count for nothing.
        some = colours(reader, keys[:3], "label", 60)
        assert (some.values, some.codes.tolist()) == (["b", "a"], [2, 1, 1])
        assert colours(reader, keys, "none", 60).values == []
        assert colours(reader, keys[:0], "label", 60).codes.tolist() == []
