"""Sequences of str that hold a million names or labels in a few bytes each."""

from array import array
from collections.abc import Iterable, Sequence
from operator import eq
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from service import IntArray

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


class Labels(Sequence[str | None]):
    """Strings with few distinct values, stored as integer codes; None where a picture has no label.

    A slice is a view with the same names and the same codes. Codes of two sources are not comparable.

    Attributes:
        codes: (N,) unsigned, in the smallest dtype that holds them: positions in names; len(names) for no label.
        names: the distinct labels in order of first occurrence; a slice may use only some of them.

    Cost: 1 byte a label up to 255 distinct labels, 2 up to 65,535.
    """

    def __init__(self, codes: Integers, names: Sequence[str]) -> None:
        self.codes = smallest(codes)
        self.names = tuple(names)

    @classmethod
    def of(cls, labels: Iterable[str | None]) -> Self:
        """Encode labels, consuming them one at a time."""
        codes, names = array("q"), dict[str, int]()
        codes.extend(-1 if label is None else names.setdefault(label, len(names)) for label in labels)
        found = np.frombuffer(codes, np.int64)
        return cls(np.where(found < 0, len(names), found), tuple(names))

    @property
    def numbers(self) -> IntArray:
        """(N,) int64: positions in names, and −1 for no label."""
        codes = self.codes.astype(np.int64)
        codes[codes >= len(self.names)] = -1
        return codes

    @property
    def missing(self) -> int:
        """The number of pictures without a label."""
        return int((self.codes >= len(self.names)).sum())

    def used(self) -> list[str]:
        """Return the distinct labels that occur, in the order of names."""
        return [self.names[code] for code in np.unique(self.codes).tolist() if code < len(self.names)]

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, index: int) -> str | None: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> str | Self | None:
        if not isinstance(index, slice):
            code = int(self.codes[index])
            return self.names[code] if code < len(self.names) else None
        view = type(self)(self.codes[:0], self.names)
        view.codes = self.codes[index]
        return view

    def __eq__(self, other: object) -> bool:
        return _same(self, other)


def smallest(numbers: Integers, least: type[np.unsignedinteger[Any]] = np.uint8) -> Integers:
    """Return a copy of non-negative integers in the smallest unsigned dtype that holds them all."""
    return numbers.astype(np.result_type(np.min_scalar_type(int(numbers.max(initial=0))), least))


def _same(ours: Sequence[str | None], other: object) -> bool:
    """Return whether other is a sequence, such as a list, of the same members."""
    if not isinstance(other, Sequence) or isinstance(other, str):
        return False
    return len(ours) == len(other) and all(map(eq, ours, other))
