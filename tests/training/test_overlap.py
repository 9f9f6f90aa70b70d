"""Queries that the bank holds too."""

import numpy as np

from training.overlap import Identities, find_overlap

ROWS = np.eye(4, dtype=np.float32)


def test_an_overlap_is_found_by_content_and_by_id() -> None:
    bank = Identities("here", ["a", "b", "c", "d"], ["1", "2", "1", "3"], ROWS)
    elsewhere = Identities("there", ["a", "x"], ["1", "9"], ROWS[:2])
    found = find_overlap(bank, elsewhere)
    assert {query: own.tolist() for query, own in found.items()} == {0: [0, 2]}
    same = Identities("here", ["b", "x"], ["1", "9"], ROWS[:2])
    assert {query: own.tolist() for query, own in find_overlap(bank, same).items()} == {0: [0, 1, 2]}
    assert find_overlap(bank, Identities("there", ["a"], ["9"], ROWS[:1])) == {}


def test_equal_embeddings_stand_for_digests_that_are_not_known() -> None:
    bank = Identities("here", ["a", "b", "c", "d"], None, ROWS)
    found = find_overlap(bank, Identities("there", ["x", "y"], ["1", "2"], np.stack([ROWS[2], -ROWS[0]])))
    assert {query: own.tolist() for query, own in found.items()} == {0: [2]}
