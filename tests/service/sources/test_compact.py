"""Names and labels in few bytes, with the behaviour of lists of str."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.sources.compact import Labels, Names, smallest

# File names may be any bytes, decoded with surrogates.
ON_DISK = st.binary(max_size=20).map(lambda data: data.decode("utf-8", "surrogateescape"))
BOUNDS = st.none() | st.integers(-12, 12)
SLICES = st.builds(slice, BOUNDS, BOUNDS, st.none() | st.sampled_from([1, 2, -1, -3]))


@given(st.lists(ON_DISK, max_size=10), SLICES, SLICES)
@example(["é", "", "caf\udce9.png"], slice(1, None), slice(None))
def test_names_are_like_a_list(texts: list[str], first: slice, second: slice) -> None:
    names = Names(texts)
    assert len(names) == len(texts)
    assert list(names) == texts
    assert [names[n] for n in range(-len(texts), len(texts))] == texts + texts
    assert list(names[first]) == texts[first]
    assert list(names[first][second]) == texts[first][second]
    assert isinstance(names[first], Names)
    with pytest.raises(IndexError):
        names[len(texts)]
    with pytest.raises(IndexError):
        names[-len(texts) - 1]


@given(st.lists(st.none() | ON_DISK, max_size=10), SLICES, SLICES)
def test_labels_are_like_a_list(texts: list[str | None], first: slice, second: slice) -> None:
    labels = Labels.of(texts)
    assert len(labels) == len(texts)
    assert list(labels) == texts
    assert [labels[n] for n in range(-len(texts), len(texts))] == texts + texts
    assert labels.names == tuple(dict.fromkeys(text for text in texts if text is not None))
    assert [None if number < 0 else labels.names[number] for number in labels.numbers] == texts
    assert labels.missing == texts.count(None)
    assert labels[first].used() == [name for name in labels.names if name in texts[first]]
    part = labels[first][second]
    assert list(part) == texts[first][second]
    assert part.names == labels.names
    with pytest.raises(IndexError):
        labels[len(texts)]


def test_a_slice_shares_the_memory_of_the_whole() -> None:
    labels = Labels.of(str(n % 7) for n in range(1000))
    assert np.shares_memory(labels[10:900].codes, labels.codes)
    names = Names(f"{n:040}" for n in range(1000))
    tracemalloc.start()
    part = names[10:900]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert list(part[:2]) == [f"{10:040}", f"{11:040}"]
    # A copy would take 35,600 bytes for the text alone.
    assert peak < 2_000  # bytes


@pytest.mark.parametrize(("kinds", "dtype"), [(1, np.uint8), (256, np.uint8), (257, np.uint16), (65_537, np.uint32)])
def test_codes_are_as_small_as_their_number_allows(kinds: int, dtype: type) -> None:
    labels = Labels.of(str(n) for n in range(kinds))
    assert labels.codes.dtype == dtype
    assert labels[-1] == str(kinds - 1)


def test_numbers_above_four_bytes_are_kept_whole() -> None:
    assert smallest(np.array([0, 2**32])).tolist() == [0, 2**32]


def test_equal_to_the_same_strings_and_to_nothing_else() -> None:
    for made in (Names("aba"), Labels.of("aba")):
        assert made == ["a", "b", "a"]
        assert made == made[:]
        assert made != ["a", "b"]
        assert made != ["a", "b", "b"]
        assert made != "aba"
        assert made != 3
