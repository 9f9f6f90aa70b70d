"""Queries: each kind reaches the store in one way, from HTTP, command line and page alike."""

import base64
from functools import partial

import numpy as np
import pytest

from service.errors import InvalidQuery, InvalidRequest, ItemNotFound
from service.gallery import Gallery, Search
from service.http.bodies import from_base64
from service.queries import ItemQuery, PictureQuery, Query, VectorQuery
from tests.conftest import encoded, scene


def test_every_kind_of_query_finds_the_same_items(gallery: Gallery) -> None:
    pictures = [encoded(scene(seed=n)) for n in range(4)]
    for n, data in enumerate(pictures):
        gallery.add(f"p{n}", data, {})
    decode = partial(from_base64, base64.b64encode(pictures[1]).decode(), 10**6)
    vector = gallery.embed_soon(pictures[1]).result()
    queries: list[Query] = [PictureQuery(pictures[1]), PictureQuery(decode), VectorQuery((3 * vector).tolist())]
    first, *others = gallery.find(queries, 3)
    assert first[0].id == "p1"
    for hits in others:
        assert [hit.id for hit in hits] == [hit.id for hit in first]
        np.testing.assert_allclose([hit.score for hit in hits], [hit.score for hit in first], atol=1e-5)
    (by_item,) = gallery.find([ItemQuery("p1")], 2)
    assert [hit.id for hit in by_item] == [hit.id for hit in first[1:]]


def test_an_id_and_a_picture_in_base64_are_never_confused(gallery: Gallery) -> None:
    """Both are texts over HTTP. An id that is also valid base64 of a picture stays an id."""
    text = base64.b64encode(encoded(scene(2, 2))).decode()[:200]
    gallery.add(text, encoded(scene(seed=1)), {})
    assert gallery.find([ItemQuery(text)], 1) == [[]]
    with pytest.raises(InvalidRequest, match="expected base64"):
        gallery.find([PictureQuery(partial(from_base64, "some id", 100))], 1)


def test_an_id_is_normalised_where_it_is_looked_up(gallery: Gallery) -> None:
    gallery.add("caf\u00e9", encoded(scene()), {})
    assert gallery.find([ItemQuery("cafe\u0301")], 1) == [[]]


def test_every_bad_query_of_several_is_named(gallery: Gallery) -> None:
    gallery.add("p", encoded(scene()), {})
    with pytest.raises(ItemNotFound, match="query 1: no item has this id; 1 more of 3 failed, too") as caught:
        gallery.find([ItemQuery("p"), ItemQuery("q"), VectorQuery([1.0])], 1)
    assert [(number, type(error)) for number, error in caught.value.parts] == [(1, ItemNotFound), (2, InvalidQuery)]


def test_what_is_pending_is_what_the_encoder_computes(gallery: Gallery) -> None:
    data = encoded(scene())
    gallery.add("p", data, {})
    search = Search(gallery, [VectorQuery([1.0] * gallery.encoder.dimension), PictureQuery(data), ItemQuery("p")])
    (pending,) = search.pending
    np.testing.assert_allclose(pending.result(), gallery.embed_soon(data).result(), atol=1e-6)
    assert [len(hits) for hits in search.find(1)] == [1, 1, 0]


@pytest.mark.parametrize("largest", [1e308, 1.0, 1e-308, 5e-324])
def test_the_unit_vector_of_extreme_numbers_is_exact(largest: float) -> None:
    got = VectorQuery([largest, -largest, 0.0, largest]).unit(4)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, np.array([1, -1, 0, 1]) / np.sqrt(3), rtol=1e-6)
