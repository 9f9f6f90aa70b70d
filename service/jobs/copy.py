"""`lookalike store copy`: all items of a store in a folder to Milvus, or back; a second run resumes the first."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from tqdm import tqdm

from service.encoder_choice import find_model
from service.encoding.card import read_card
from service.errors import InvalidRequest, InvalidStore
from service.gallery import open_store
from service.settings import Settings
from service.store import Item, NewItem, Store
from service.store.catalog_reader import CatalogReader
from service.store.layout import current
from service.store.milvus import MilvusStore
from service.store.milvus_address import parse_address
from service.store.milvus_connection import recorded_facts

_AT_ONCE = 1000
# Facts about the store that go with its items.
_FACTS = ("prefixes", "folders")
_SAMPLED = 100
# Of the cosine of a vector with itself, in float32.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Copied:
    """What a copy did.

    Attributes:
        written, known: items that were written, and that were there already, equal in all fields.
        more: items that the target has beyond those of the source.
        dismissed: pairs that are no duplicates to the user, which Milvus does not keep.
        bare: items that the source has with pictures, and the target without: it has no place for them.
    """

    written: int
    known: int
    more: int
    dismissed: int
    bare: int


class Source:
    """The store that is copied: a folder, which a service may serve, or a collection of Milvus.

    Attributes:
        facts: of the store.
        dismissed: number of pairs that are no duplicates to the user.
    """

    def __init__(self, settings: Settings, opened: ExitStack) -> None:
        """Open the store of the settings.

        Raises:
            InvalidStore: there is none, or it cannot be read.
        """
        self._reader: CatalogReader | None = None
        self._milvus: MilvusStore | None = None
        self.dismissed = 0
        if settings.folder == settings.store:
            self._reader = opened.enter_context(closing(CatalogReader(current(settings.store))))
            self.facts = self._reader.meta
            self.dismissed = len(self._reader.dismissed()) // 2
            return
        address = parse_address(settings.store)
        assert address is not None
        facts = recorded_facts(address, settings.milvus_token.get_secret_value())
        if facts is None:
            raise InvalidStore(f"{address}: no such collection")
        store = open_store(settings, read_card(find_model(settings)), int(facts["dimension"]))
        assert isinstance(store, MilvusStore)
        self._milvus, self.facts = opened.enter_context(closing(store)), facts

    def count(self) -> int:
        """Return the number of items."""
        if self._milvus is not None:
            return self._milvus.count()
        assert self._reader is not None
        return len(self._reader.keys())

    def batches(self) -> Iterator[list[NewItem]]:
        """Yield all items in the order of adding, so many at once."""
        if self._milvus is not None:
            yield from self._milvus.batches(_AT_ONCE)
            return
        assert self._reader is not None
        last = 0
        while rows := self._reader.scan(_AT_ONCE, last):
            last = rows[-1][0]
            keys = np.asarray([key for key, _ in rows], np.int64)
            vectors = {
                int(key): vector
                for found, chunk in self._reader.vectors(keys)
                for key, vector in zip(found, chunk, strict=True)
            }
            pictures = self._reader.pictures(keys)
            # An item that was removed meanwhile has neither.
            yield [
                NewItem(**_fields(item), embedding=vectors[key], thumbnail=pictures[key][0], original=pictures[key][1])
                for key, item in rows
                if key in vectors and key in pictures
            ]


def copy(source: Settings, target: Settings) -> Copied:
    """Copy all items, and check the copy: the number of items, and a search for each of a sample.

    Items that are there already and equal are passed over, so a copy that was interrupted goes on. Nothing is removed.

    Args:
        source, target: the stores; one is a folder, the other on Milvus. The target is made if it is not there.

    Raises:
        InvalidRequest: both are of the same kind.
        StoreMismatch: the target holds embeddings of another encoder.
        InvalidStore: a store cannot be read or written, or the check failed.
    """
    if (source.folder == source.store) == (target.folder == target.store):
        raise InvalidRequest(
            "expected a folder and an address of Milvus; `lookalike store backup` copies a folder to another"
        )
    with ExitStack() as opened:
        origin = Source(source, opened)
        card = read_card(find_model(source))
        store = open_store(target, card, int(origin.facts["dimension"]))
        opened.callback(store.close)
        store.note({name: origin.facts[name] for name in _FACTS if name in origin.facts})
        written = known = bare = 0
        sample: list[NewItem] = []
        rng = np.random.default_rng(0)
        total = origin.count()
        # Nothing is looked up in a store that is empty.
        is_new = store.count() == 0
        share = _SAMPLED / max(total, 1)
        with tqdm(total=total, desc="copying", unit=" items", mininterval=1) as progress:
            for batch in origin.batches():
                fresh = batch if is_new else _fresh(batch, store)
                store.add(fresh)
                written, known = written + len(fresh), known + len(batch) - len(fresh)
                bare += sum(bool(item.thumbnail or item.original) for item in batch) if _is_bare(target) else 0
                sample += [item for item, drawn in zip(batch, rng.random(len(batch)), strict=True) if drawn < share]
                progress.update(len(batch))
        store.settle()
        more = store.count() - written - known
        if more < 0:
            raise InvalidStore(f"the copy has {-more} items less than the source; run it again")
        _check(sample, store)
    return Copied(written, known, more, origin.dismissed if isinstance(store, MilvusStore) else 0, bare)


def _fresh(batch: Sequence[NewItem], store: Store) -> list[NewItem]:
    """Return the items of a batch that the target lacks, or has otherwise."""
    ids = [item.id for item in batch]
    if isinstance(store, MilvusStore):
        have = store.known(ids)
    else:
        have = {id: item for id in ids if (item := store.get(id)) is not None}
    return [item for item in batch if have.get(item.id) != Item(**_fields(item))]


def _check(sample: Sequence[NewItem], store: Store) -> None:
    """Search for the embeddings of items. Raises InvalidStore: one is not found with the score 1."""
    for start in range(0, len(sample), _SAMPLED):
        items = sample[start : start + _SAMPLED]
        found = store.search(np.stack([item.embedding for item in items]), 10)
        for item, hits in zip(items, found, strict=True):
            # Beyond ten copies of one picture the others count.
            alike = [hit.id for hit in hits if hit.score >= 1 - _ROUNDING]
            if not alike or (item.id not in alike and len(alike) < len(hits)):
                raise InvalidStore(f"the copy of {item.id} is not found by its embedding; run it again")


def _is_bare(target: Settings) -> bool:
    return target.folder != target.store and not target.pictures


def _fields(item: Item) -> dict[str, Any]:
    return {field.name: getattr(item, field.name) for field in fields(Item)}
