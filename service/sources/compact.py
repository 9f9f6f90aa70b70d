"""Sequences of str that hold a million names or labels in a few bytes each."""

from array import array
from collections.abc import Iterable, Sequence
from operator import eq
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.integer[Any]]


class Names(Sequence[str]):
    """Strings as one blob of bytes and their offsets in it.

    A slice is a view that shares the blob. Lone surrogates, which os.fsdecode makes of bytes that are not UTF-8,
    survive the round trip.

    Args:
        names: consumed one at a time.

    Cost: the bytes of the text, and 4 for each name (8 above 4 GiB of text); O(1) a lookup.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        blob, ends = bytearray(), array("q", [0])
        for name in names:
            blob += name.encode("utf-8", "surrogateescape")
            ends.append(len(blob))
        self._blob = bytes(blob)
        self._offsets = smallest(np.frombuffer(ends, np.int64), least=np.uint32)  # (N + 1,)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> str | Self:
        kept = range(len(self))[index]
        if isinstance(kept, int):
            return self._blob[self._offsets[kept] : self._offsets[kept + 1]].decode("utf-8", "surrogateescape")
        if kept.step != 1:
            return type(self)(self[position] for position in kept)
        view = type(self)()
        view._blob, view._offsets = self._blob, self._offsets[kept.start : kept.start + len(kept) + 1]
        return view

    def __eq__(self, other: object) -> bool:
        return _same(self, other)


class Labels(Sequence[str]):
    """Strings with few distinct values, stored as integer codes: label n is names[codes[n]].

    A slice is a view with the same names and the same codes. Codes of two sources are not comparable.

    Attributes:
        codes: (N,) unsigned, in the smallest dtype that holds them.
        names: the distinct labels in order of first occurrence; a slice may use only some of them.

    Cost: 1 byte a label up to 256 distinct labels, 2 up to 65,536.
    """

    def __init__(self, codes: Integers, names: Sequence[str]) -> None:
        self.codes = smallest(codes)
        self.names = tuple(names)

    @classmethod
    def of(cls, labels: Iterable[str]) -> Self:
        """Encode labels, consuming them one at a time."""
        codes, names = array("q"), dict[str, int]()
        codes.extend(names.setdefault(label, len(names)) for label in labels)
        return cls(np.frombuffer(codes, np.int64), tuple(names))

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> str | Self:
        if not isinstance(index, slice):
            return self.names[int(self.codes[index])]
        view = type(self)(self.codes[:0], self.names)
        view.codes = self.codes[index]
        return view

    def __eq__(self, other: object) -> bool:
        return _same(self, other)


def smallest(numbers: Integers, least: type[np.unsignedinteger[Any]] = np.uint8) -> Integers:
    """Return a copy of non-negative integers in the smallest unsigned dtype that holds them all."""
    return numbers.astype(np.result_type(np.min_scalar_type(int(numbers.max(initial=0))), least))


def _same(ours: Sequence[str], other: object) -> bool:
    """Return whether other is a sequence, such as a list, of the same strings."""
    if not isinstance(other, Sequence) or isinstance(other, str):
        return False
    return len(ours) == len(other) and all(map(eq, ours, other))
