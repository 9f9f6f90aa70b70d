"""Build, catch up, switch: a generation copies the items of the one before it and records its progress."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest

from service.errors import InvalidRequest, InvalidStore, Outcome, UndecodablePicture
from service.generations import Add, Lineage, build, catch_up, prune, switch, take_up, written
from service.items import NewPicture
from service.store.catalog import read_meta
from service.store.catalog_reader import CatalogReader
from service.store.embedded import EmbeddedStore
from service.store.layout import current, lock, publish
from tests.service.store.test_embedded import D, card, item, unit


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Closes the stores that a test opens."""
    with ExitStack() as stack:
        yield stack


def put(store: EmbeddedStore, id: str, data: bytes, **metadata: object) -> None:
    """Add an item whose image file is these bytes."""
    new = item(id, unit(D, seed=len(data)), **metadata)
    store.add([replace(new, digest=hashlib.sha256(data).hexdigest(), original=data)])


def adding(store: EmbeddedStore) -> Add:
    """Return a function that embeds bytes by their length, with another encoder; b"bad" is no picture."""

    def add(pictures: Sequence[NewPicture[bytes]]) -> list[Outcome[bool]]:
        outcomes: list[Outcome[bool]] = []
        for one in pictures:
            if one.picture == b"bad":
                outcomes.append(UndecodablePicture("no picture"))
            else:
                outcomes.append(store.get(one.id) is None)
                put(store, one.id, one.picture, **one.metadata)
        return outcomes

    return add


def contents(store: EmbeddedStore) -> dict[str, object]:
    return {found.id: found.metadata for found in store.scan(999)[0]}


def built(opened: ExitStack, home: Path, first: EmbeddedStore) -> EmbeddedStore:
    """Build the second generation."""
    second = opened.enter_context(closing(EmbeddedStore(home / "generation-2", card("second"), D)))
    with closing(CatalogReader(first.folder)) as earlier:
        build(second, earlier, home, adding(second), lambda _: None)
    return second


def test_a_generation_catches_up_and_takes_the_place_of_the_first(home: Path, opened: ExitStack) -> None:
    first = opened.enter_context(closing(EmbeddedStore(home, card("first"), D)))
    for n in range(150):
        put(first, f"p{n}", bytes(n + 1), n=n)
    first.remove("p7")
    second = built(opened, home, first)
    assert contents(second) == contents(first)
    assert Lineage.of(second) == Lineage("", 151, served=False)
    assert Lineage.of(first) is None

    put(first, "new", b"new")
    put(first, "p3", bytes(300), n=3)
    first.set_metadata("p4", lambda _: {"n": "changed"})
    first.remove("p5")
    catch_up(second, home, adding(second))
    assert contents(second) == contents(first)
    assert Lineage.of(second) == Lineage("", 155, served=False)

    put(first, "last", b"last")

    def add(pictures: Sequence[NewPicture[bytes]]) -> list[Outcome[bool]]:
        # The first pass has read this item already, so only a second pass copies the change.
        if pictures:
            first.set_metadata("p0", lambda _: {"n": "meanwhile"})
        return adding(second)(pictures)

    switch(first, second, home, add, read_only=False)
    assert contents(second) == contents(first)
    assert contents(second)["p0"] == {"n": "meanwhile"}
    with pytest.raises(InvalidStore, match="replaced by one of another encoder"):
        put(first, "late", b"late")
    publish(home, second.folder)
    assert current(home) == home / "generation-2"
    first.close()
    # The second generation holds the lock of the first.
    with pytest.raises(InvalidStore, match="in use by process"):
        lock(home)


def test_a_build_that_was_interrupted_goes_on_where_it_stopped(home: Path, opened: ExitStack) -> None:
    first = opened.enter_context(closing(EmbeddedStore(home, card("first"), D)))
    for n in range(5):
        put(first, f"p{n}", bytes(n + 1))
    second = built(opened, home, first)
    put(first, "p9", bytes(9))
    second.close()
    added: list[str] = []
    with (
        closing(EmbeddedStore(home / "generation-2", card("second"), D)) as again,
        closing(CatalogReader(home)) as earlier,
    ):

        def add(pictures: Sequence[NewPicture[bytes]]) -> list[Outcome[bool]]:
            added.extend(one.id for one in pictures)
            return adding(again)(pictures)

        build(again, earlier, home, add, lambda _: None)
        assert added == ["p9"]
        assert again.count() == 6


def test_a_bad_picture_is_named_and_the_others_are_taken_over(home: Path, opened: ExitStack) -> None:
    first = opened.enter_context(closing(EmbeddedStore(home, card("first"), D)))
    for id, data in (("a", b"1"), ("b", b"bad"), ("c", b"333")):
        put(first, id, data)
    second = opened.enter_context(closing(EmbeddedStore(home / "generation-2", card("second"), D)))
    with (
        closing(CatalogReader(home)) as earlier,
        pytest.raises(InvalidStore, match="1 items cannot be embedded again; b: no picture"),
    ):
        build(second, earlier, home, adding(second), lambda _: None)
    assert list(contents(second)) == ["a", "c"]
    # The lineage is reset, so that the next run compares all items again.
    assert Lineage.of(second) == Lineage("", -1, served=False)


@pytest.mark.parametrize(
    ("facts", "lineage"),
    [
        ({}, None),
        ({"earlier": "", "follows": "31"}, Lineage("", 31)),
        ({"earlier": "generation-2", "follows": "7"}, Lineage("generation-2", 7)),
        # An earlier version left this when its job was interrupted.
        ({"earlier": ""}, Lineage("", -1)),
    ],
)
def test_lineages_of_stores_that_are_there(home: Path, facts: dict[str, str], lineage: Lineage | None) -> None:
    store = EmbeddedStore(home, card(), D)
    store.note(facts)
    assert Lineage.of(store) == lineage
    if lineage is not None:
        replace(lineage, caught_up_to=40).save(store)
        assert read_meta(home)["follows"] == "40"
    store.close()


def test_a_store_whose_earlier_generation_was_deleted_stays_as_it_is(home: Path) -> None:
    store = EmbeddedStore(home / "generation-3", card(), D)
    Lineage("generation-2", 5).save(store)
    catch_up(store, home, adding(store))
    assert Lineage.of(store) == Lineage("generation-2", 5)
    store.close()


def test_changes_go_to_the_earlier_generation_until_the_next_is_taken_up(home: Path, opened: ExitStack) -> None:
    first = opened.enter_context(closing(EmbeddedStore(home, card("first"), D)))
    with pytest.raises(InvalidStore, match="no store there"):
        written(home / "elsewhere")
    put(first, "a", b"a")
    assert written(home) == home
    second = built(opened, home, first)
    publish(home, second.folder)
    # Both hold the same items, and yet the next change goes to the first.
    assert written(home) == home
    switch(first, second, home, adding(second), read_only=False)
    assert written(home) == home / "generation-2"
    assert Lineage.of(second) == Lineage("", 1)


def test_an_item_that_is_removed_during_a_build_does_not_end_it(home: Path, opened: ExitStack) -> None:
    first = opened.enter_context(closing(EmbeddedStore(home, card("first"), D)))
    put(first, "a", b"a")
    put(first, "b", b"b")
    second = opened.enter_context(closing(EmbeddedStore(home / "generation-2", card("second"), D)))

    class Shrinking(CatalogReader):
        """A service removes each item right after it was listed."""

        def original(self, id: str) -> bytes | None:
            first.remove(id)
            return super().original(id)

    with closing(Shrinking(home)) as earlier:
        build(second, earlier, home, adding(second), lambda _: None)
    assert second.count() == 0


def test_prune_leaves_the_current_generation_alone(home: Path, opened: ExitStack) -> None:
    secret = b"deleted later " * 5000
    first = EmbeddedStore(home, card("first"), D)
    put(first, "a", b"a")
    put(first, "gone", secret)
    second = built(opened, home, first)
    publish(home, second.folder)
    with pytest.raises(InvalidRequest, match="has not taken up generation-2 yet; send it SIGHUP"):
        prune(home)
    put(first, "b", b"bb")
    first.close()
    with pytest.raises(InvalidRequest, match="generation-2 lacks the last changes; start the service"):
        prune(home)
    catch_up(second, home, adding(second))
    take_up(second)
    second.remove("gone")
    # Nobody builds this one any more, and a process holds that one.
    EmbeddedStore(home / "generation-3", card("third"), D).close()
    opened.enter_context(closing(EmbeddedStore(home / "generation-4", card("fourth"), D)))
    removed = prune(home)
    assert [one.number for one in removed] == [1, 3]
    assert removed[0].size > len(secret)
    assert sorted(path.name for path in home.iterdir()) == ["CURRENT", "LOCK", "generation-2", "generation-4"]
    assert sorted(contents(second)) == ["a", "b"]
    put(second, "c", b"c")
    second.close()
    with closing(EmbeddedStore(home, card("second"), D)) as again:
        assert sorted(contents(again)) == ["a", "b", "c"]
        catch_up(again, home, adding(again))
    assert prune(home) == []


def test_a_store_of_one_generation_has_nothing_to_prune(home: Path) -> None:
    with pytest.raises(InvalidStore, match="no store there"):
        prune(home)
    EmbeddedStore(home, card("first"), D).close()
    assert prune(home) == []
    assert current(home) == home


def test_a_published_generation_that_no_process_has_opened_is_pruned_to(home: Path, opened: ExitStack) -> None:
    first = EmbeddedStore(home, card("first"), D)
    put(first, "a", b"a")
    second = built(opened, home, first)
    publish(home, second.folder)
    first.close()
    # No process holds the store, and nothing has changed since.
    assert [one.number for one in prune(home)] == [1]
    assert contents(second) == {"a": {}}
