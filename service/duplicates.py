"""Groups of near-identical items: exact copies by digest, near ones by the scores of their embeddings.

The diameter of a group is capped: each two of its pictures have a score of at least the threshold, so no chain of small
steps joins strangers (docs/decisions/0030). Two pictures that a user has told apart never share a group.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from service import FloatArray, IntArray
from service.errors import InvalidModel, InvalidRequest
from service.file_facts import HEAD_BYTES, FileFacts
from service.store import Item
from service.store.catalog_reader import CatalogReader
from service.store.maintenance import load_index
from service.store.near_pairs import Pairs, near_pairs, vectors_of

Preset = Literal["exact", "near", "alike"]
PRESETS: tuple[Preset, ...] = ("exact", "near", "alike")
# An encoder's card may name the thresholds of its presets.
_FACT = "duplicates"
# Without that, a preset's threshold lies so far of the way from the median score of two strangers to 1. The shares are
# those of the encoder for photographs (benchmarks/duplicates.py).
_SHARES = {"near": 0.75, "alike": 0.6}
_STRANGERS = 2000
# Vectors that are in memory at once, unless a single component has more.
_VECTORS_AT_ONCE = 20_000
# Formats that keep every pixel as it was come first.
_LOSSLESS = ("PNG", "TIFF", "BMP")


class Copy(NamedTuple):
    """An item of a group.

    Attributes:
        item: the item.
        score: the cosine to the group's best copy, 1 for the best copy itself.
        exact: whether its file has the same bytes as the best copy's.
        facts: of its file, as far as they are known.
    """

    item: Item
    score: float
    exact: bool
    facts: FileFacts

    def shown(self) -> dict[str, Any]:
        """Return the copy as JSON shows it."""
        own = {"id": self.item.id, "score": round(self.score, 4), "exact": self.exact}
        return own | {"digest": self.item.digest, "source": self.item.source} | self.facts._asdict()


@dataclass(frozen=True)
class Group:
    """Two or more items that show the same.

    Attributes:
        copies: the best copy, then the others in the order of adding.
        reason: why the first is the best one, in a few words.
    """

    copies: Sequence[Copy]
    reason: str

    @property
    def best(self) -> Copy:
        """The copy to keep."""
        return self.copies[0]

    @property
    def rest(self) -> Sequence[Copy]:
        """The other copies."""
        return self.copies[1:]

    def shown(self) -> dict[str, Any]:
        """Return the group as JSON shows it."""
        items = [copy.shown() for copy in self.copies]
        return {"best": self.best.item.id, "reason": self.reason, "items": items}


@dataclass
class Found:
    """The groups of a store.

    Attributes:
        groups: in the order of adding of their first items.
        sequence: number of the last change of the store that they take into account.
        pairs: what they were made from, to be updated after changes; None for exact copies alone.
    """

    groups: Iterator[Group]
    sequence: int
    pairs: Pairs | None


def find_groups(
    folder: Path,
    threshold: float,
    earlier: Pairs | None = None,
    progress: Callable[[float], object] = lambda _: None,
) -> Found:
    """Find the groups of a store, beside the process that may be changing it.

    Args:
        folder: of the store's current generation.
        threshold: least score of two pictures of a group, in (0, 1]; 1 for exact copies alone, by their digests.
        earlier: the pairs of an earlier state at the same threshold: only what has changed is searched then.
        progress: is called with the share that is done, in [0, 1].

    Raises:
        InvalidRequest: a threshold out of range, or so low that it joins most of the store.
        InvalidStore: there is no store, or it is damaged.

    Cost: as `near_pairs`, and the start of each file in a group is read. Memory of the index, 50 bytes an item, and of
        the pairs.
    """
    if not 0 < threshold <= 1:
        raise InvalidRequest(f"threshold: expected a number above 0 and up to 1, got {threshold:g}")
    reader = CatalogReader(folder)
    sequence = reader.sequence()
    pairs = None
    if threshold < 1:
        loaded = load_index(folder, reader, read_only=True)
        sequence = loaded.sequence
        keys = _representatives(reader)[0]
        pairs = near_pairs(loaded.index, reader, threshold, keys, sequence, earlier, progress)
        del loaded
    return Found(_groups(reader, pairs, threshold), sequence, pairs)


def _groups(reader: CatalogReader, pairs: Pairs | None, threshold: float) -> Iterator[Group]:
    """Yield the groups that pairs make with exact copies, and close the reader."""
    try:
        copies = _representatives(reader)[1]
        told_apart = reader.dismissed()
        members = [] if pairs is None else [*_linked(reader, pairs, threshold, told_apart)]
        in_pairs = {key for group in members for key in group}
        members += [[key] for key in copies if key not in in_pairs]
        for group in sorted(members, key=min):
            made = _group(reader, group, copies, told_apart)
            if made is not None:
                yield made
    finally:
        reader.close()


def _representatives(reader: CatalogReader) -> tuple[IntArray, dict[int, list[int]]]:
    """Return the first key of each digest, in order, and by it all keys of a digest that has several."""
    keys, hashes = reader.digests()
    order = np.lexsort((keys, hashes))
    begins = np.flatnonzero(np.r_[True, hashes[order][1:] != hashes[order][:-1]]) if len(keys) else np.empty(0, int)
    lengths = np.diff(np.r_[begins, len(keys)])
    copies = {}
    for begin, length in zip(begins[lengths > 1].tolist(), lengths[lengths > 1].tolist(), strict=True):
        several = keys[order[begin : begin + length]].tolist()
        copies[several[0]] = several
    return np.sort(keys[order[begins]]), copies


def _linked(
    reader: CatalogReader, pairs: Pairs, threshold: float, told_apart: set[tuple[str, str]]
) -> Iterator[list[int]]:
    """Yield groups of two keys or more, of different digests, in which every two reach the threshold."""
    components = _components(pairs)
    batch: list[IntArray] = []
    size = 0
    for number, places in enumerate(components):
        batch.append(places)
        size += 2 * len(places)
        if size < _VECTORS_AT_ONCE and number < len(components) - 1:
            continue
        every = np.concatenate(batch)
        keys, vectors = vectors_of(reader, np.unique(np.concatenate([pairs.first[every], pairs.second[every]])))
        digests = {key: item.digest for key, item in reader.items_of(keys)} if told_apart else {}
        for own in batch:
            yield from _link_component(pairs, own, keys, vectors, threshold, digests, told_apart)
        batch, size = [], 0


def _link_component(
    pairs: Pairs,
    places: IntArray,
    keys: IntArray,
    vectors: FloatArray,
    threshold: float,
    digests: dict[int, str],
    told_apart: set[tuple[str, str]],
) -> Iterator[list[int]]:
    """Yield the groups of one connected component, whose pairs are at these places."""
    places = places[np.argsort(-pairs.scores[places], kind="stable")]
    first, second = pairs.first[places], pairs.second[places]
    own = np.unique(np.concatenate([first, second]))
    # A key that was removed meanwhile is in no group.
    own = own[np.isin(own, keys)]
    apart = []
    if told_apart:
        of_digest = {digests[key]: number for number, key in enumerate(own.tolist())}
        apart = [(of_digest[a], of_digest[b]) for a, b in told_apart if a in of_digest and b in of_digest]
    there = np.isin(first, own) & np.isin(second, own)
    near = zip(np.searchsorted(own, first[there]).tolist(), np.searchsorted(own, second[there]).tolist(), strict=True)
    for group in link(vectors[np.searchsorted(keys, own)], near, threshold, apart):
        yield own[group].tolist()


def link(
    vectors: FloatArray, near: Iterable[tuple[int, int]], threshold: float, apart: Iterable[tuple[int, int]] = ()
) -> list[list[int]]:
    """Join vectors into groups, the nearest pair first, so that each two vectors of a group reach the threshold.

    Two groups that may not be joined stay apart however they grow, so each two are compared once.

    Args:
        vectors: (N, D) unit rows.
        near: pairs of rows that reach the threshold, best first.
        threshold: least score of two vectors of a group.
        apart: pairs of rows that must not share a group.

    Returns:
        Groups of two rows or more.

    Cost: O(N² · D) in a single dense group. Memory O(N), and of the scores between two groups.
    Source: Kruskal, On the shortest spanning subtree of a graph, 1956 (the order); the cap is that of complete linkage.
    """
    root = list(range(len(vectors)))
    groups: dict[int, list[int]] = {}
    barred: defaultdict[int, set[int]] = defaultdict(set)

    def bar(one: int, other: int) -> None:
        barred[one].add(other)
        barred[other].add(one)

    for a, b in apart:
        bar(a, b)
    for a, b in near:
        one, other = root[a], root[b]
        if one == other or other in barred[one]:
            continue
        ours, theirs = groups.get(one, [one]), groups.get(other, [other])
        if len(ours) + len(theirs) > 2 and _least_score(vectors, ours, theirs) < threshold:
            bar(one, other)
            continue
        if len(ours) < len(theirs):
            one, other, ours, theirs = other, one, theirs, ours
        groups[one] = ours + theirs
        groups.pop(other, None)
        for row in theirs:
            root[row] = one
        for enemy in barred.pop(other, ()):
            barred[enemy].discard(other)
            bar(one, enemy)
    return [sorted(group) for group in groups.values()]


def _least_score(vectors: FloatArray, ours: list[int], theirs: list[int]) -> float:
    return float((vectors[ours] @ vectors[theirs].T).min())


def _components(pairs: Pairs) -> list[IntArray]:
    """Return the places of the pairs of each connected component."""
    root: dict[int, int] = {}

    def find(key: int) -> int:
        while (above := root.setdefault(key, key)) != key:
            root[key] = root[above]
            key = root[key]
        return key

    for a, b in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
        root[find(b)] = find(a)
    names = np.asarray([find(a) for a in pairs.first.tolist()], np.int64)
    order = np.argsort(names, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(names[order])) + 1) if len(order) else []


# The best copy ------------------------------------------------------------------------------------


def _group(
    reader: CatalogReader, keys: list[int], copies: dict[int, list[int]], told_apart: set[tuple[str, str]]
) -> Group | None:
    """Return a group of the items that have the digests of these keys; None if fewer than two are left."""
    rows = dict(reader.items_of(np.sort(np.asarray([one for key in keys for one in copies.get(key, [key])]))))
    for key in keys:
        digest = rows[key].digest if key in rows else ""
        for other in copies.get(key, [key])[1:]:
            # `copies` goes by a hash of the digest. Exact copies that are told apart are one picture here, of which
            # the first item stands for all.
            if other in rows and (rows[other].digest != digest or (digest, digest) in told_apart):
                del rows[other]
    if len(rows) < 2:
        return None
    facts = {key: _facts(reader, item) for key, item in rows.items()}
    order = sorted(rows, key=lambda key: (*(-value for value, _ in _merits(facts[key])), key))
    best = order[0]
    reason = _reason([facts[key] for key in order])
    several = len({item.digest for item in rows.values()}) > 1
    scores = _scores(reader, best, list(rows)) if several else {}
    ordered = [best, *sorted(key for key in rows if key != best)]
    same = rows[best].digest
    made = []
    for key in ordered:
        exact = rows[key].digest == same
        made.append(Copy(rows[key], 1.0 if exact else scores.get(key, 0.0), exact, facts[key]))
    return Group(made, reason)


def _facts(reader: CatalogReader, item: Item) -> FileFacts:
    """Return what is known of an item's file."""
    head = reader.original_head(item.id, HEAD_BYTES)
    return FileFacts.of_source(item.source) if head is None else FileFacts.of(*head)


def _scores(reader: CatalogReader, best: int, keys: list[int]) -> dict[int, float]:
    found, vectors = vectors_of(reader, np.asarray(keys, np.int64))
    place = np.searchsorted(found, best)
    scores = np.clip(vectors @ vectors[place], -1, 1)
    return dict(zip(found.tolist(), scores.tolist(), strict=True))


def _merits(facts: FileFacts) -> list[tuple[float, str]]:
    """Return what speaks for a file, the weightiest first: a number, larger is better, and its name."""
    pixels = -1 if facts.width is None or facts.height is None else facts.width * facts.height
    size = -1 if facts.size_bytes is None else facts.size_bytes
    lossless = -1 if facts.format is None else int(facts.format in _LOSSLESS)
    # Dates compare as texts do; an early one is better.
    date = -np.inf if facts.date is None else -float(facts.date.translate(_DIGITS_ONLY) or 0)
    return [(pixels, "pixels"), (size, "bytes"), (lossless, "format"), (date, "date")]


_DIGITS_ONLY = dict.fromkeys(map(ord, "-:T Z"))


def _reason(ranked: list[FileFacts]) -> str:
    """Return what the first of some files has before the others, which stand behind it in order."""
    best = ranked[0]
    said = {
        "pixels": f"most pixels, {best.width}×{best.height}",
        "bytes": f"largest file, {best.size_bytes} bytes",
        "format": f"lossless format, {best.format}",
        "date": f"oldest, {best.date}",
    }
    merits = [_merits(facts) for facts in ranked]
    equal = sum(one == merits[0] for one in merits)
    also = f"first added of {equal} that are equal" if equal > 1 else ""
    for number, (own, name) in enumerate(merits[0]):
        if any(other[number][0] != own for other in merits):
            return f"{said[name]}; {also}" if also else said[name]
    return "first added"


# Thresholds ---------------------------------------------------------------------------------------


def threshold_of(preset: Preset, facts: dict[str, Any], folder: Path) -> float:
    """Return the threshold of a preset.

    Args:
        preset: exact for the same bytes; near for the same picture resized, compressed or mirrored; alike for copies
            that were also cropped, turned, written on or made grey.
        facts: the encoder's card. Its "duplicates" may name the thresholds of near and alike.
        folder: of the store's generation, whose strangers' scores decide if the card names none.

    Raises:
        InvalidModel: the card's thresholds are not numbers in (0, 1].
        InvalidStore: the catalog cannot be read.
    """
    if preset == "exact":
        return 1.0
    named = facts.get(_FACT)
    if named is not None:
        value = named.get(preset) if isinstance(named, dict) else None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
            raise InvalidModel(f"card.json: {_FACT}.{preset}: expected a number above 0 and up to 1")
        return float(value)
    reader = CatalogReader(folder)
    try:
        keys = np.random.default_rng(0).permutation(reader.keys())[:_STRANGERS]
        vectors = vectors_of(reader, keys)[1]
    finally:
        reader.close()
    if len(vectors) < 2:
        return _SHARES[preset]
    vectors = np.random.default_rng(0).permutation(vectors)
    strangers = float(np.median(np.einsum("nd,nd->n", vectors[1:], vectors[:-1])))
    return round(strangers + _SHARES[preset] * (1 - strangers), 3)
