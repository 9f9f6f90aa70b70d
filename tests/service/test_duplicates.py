"""Groups of duplicates: who belongs together, who is best and why, and what a user has told apart."""

import io
import itertools
import struct
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.duplicates import Group, find_groups, link, threshold_of
from service.errors import InvalidModel, InvalidRequest
from service.file_facts import FileFacts
from service.gallery import Gallery
from service.jobs.index import index_source
from service.sources import open_source
from service.store.embedded import EmbeddedStore
from tests.conftest import encoded, scene
from tests.heif import heic
from tests.service.store.test_embedded import D, card, item, unit


def groups(folder: Path, threshold: float = 0.9) -> list[Group]:
    return [*find_groups(folder, threshold).groups]


def ids(folder: Path, threshold: float = 0.9) -> list[set[str]]:
    return [{copy.item.id for copy in group.copies} for group in groups(folder, threshold)]


def at(degrees: float) -> np.ndarray:
    """A unit vector in a plane, by its angle: the score of two is the cosine of their difference."""
    vector = np.zeros(D, np.float32)
    vector[:2] = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return vector


def joined_slowly(scores: np.ndarray, threshold: float, apart: set[tuple[int, int]]) -> set[frozenset[int]]:
    """Join the nearest pair of all that may be joined, again and again."""
    groups = [frozenset([n]) for n in range(len(scores))]
    while True:
        best = max(
            (
                (max(scores[a, b] for a in one for b in other), one, other)
                for one, other in itertools.combinations(groups, 2)
                if all(scores[a, b] >= threshold and (a, b) not in apart for a in one for b in other)
            ),
            default=None,
            key=lambda found: found[0],
        )
        if best is None:
            return {group for group in groups if len(group) > 1}
        groups = [group for group in groups if group not in best[1:]] + [best[1] | best[2]]


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_those_of_a_slow_loop(seed: int) -> None:
    vectors, threshold = unit(30, 4, seed=seed), 0.6
    scores = vectors @ vectors.T
    first, second = np.nonzero(np.triu(scores >= threshold, 1))
    order = np.argsort(-scores[first, second])
    near = [*zip(first[order].tolist(), second[order].tolist(), strict=True)]
    apart = near[: 3 * seed : 3]
    ours = {frozenset(group) for group in link(vectors, near, threshold, apart)}
    assert ours == joined_slowly(scores, threshold, {*apart, *((b, a) for a, b in apart)})
    assert len(ours) > 3
    assert all(scores[a, b] >= threshold for group in ours for a, b in itertools.combinations(group, 2))


def test_a_chain_of_small_steps_joins_no_strangers(tmp_path: Path) -> None:
    with closing(EmbeddedStore(tmp_path, card(), D)) as store:
        # Each is 10 degrees from the next; a score of 0.9 is 25 degrees.
        store.add([item(str(n), at(10 * n)) for n in range(12)])
    found = groups(tmp_path)
    assert sum(len(group.copies) for group in found) == 12
    for group in found:
        angles = [int(copy.item.id) * 10 for copy in group.copies]
        assert max(angles) - min(angles) <= 25


def test_exact_copies_need_no_scores(tmp_path: Path, gallery: Gallery) -> None:
    one, other = encoded(scene(seed=1)), encoded(scene(seed=2))
    for id, data in (("a", one), ("b", other), ("c", one), ("d", one)):
        gallery.add(id, data, {})
    found = groups(tmp_path / "store", 1)
    assert [[(copy.item.id, copy.exact, copy.score) for copy in group.copies] for group in found] == [
        [("a", True, 1.0), ("c", True, 1.0), ("d", True, 1.0)]
    ]
    assert found[0].reason == "first added"


def test_the_best_copy_has_the_most_pixels_then_bytes_then_the_oldest_date(tmp_path: Path, gallery: Gallery) -> None:
    large, small = scene(160, 120, seed=1), scene(160, 120, seed=1).resize((80, 60))
    gallery.add("small", encoded(small), {})
    gallery.add("large", encoded(large, "JPEG", quality=95), {})
    gallery.add("pressed", encoded(large, "JPEG", quality=60), {})
    (group,) = groups(tmp_path / "store", 0.5)
    assert [copy.item.id for copy in group.copies] == ["large", "small", "pressed"]
    assert group.reason == "most pixels, 160×120"
    gallery.remove("small")
    (group,) = groups(tmp_path / "store", 0.5)
    assert (group.best.item.id, group.reason[:12]) == ("large", "largest file")
    gallery.add("again", encoded(large, "JPEG", quality=95), {})
    (group,) = groups(tmp_path / "store", 0.5)
    assert group.reason.endswith("bytes; first added of 2 that are equal")
    assert group.best.item.id == "large"


def test_of_equal_files_the_oldest_is_the_best(tmp_path: Path, gallery: Gallery) -> None:
    def taken(date: str) -> bytes:
        exif = Image.Exif()
        exif[0x0132] = date
        buffer = io.BytesIO()
        scene().save(buffer, "JPEG", exif=exif)
        return buffer.getvalue()

    gallery.add("new", taken("2020:05:06 07:08:09"), {})
    gallery.add("old", taken("2010:05:06 07:08:09"), {})
    (group,) = groups(tmp_path / "store", 0.5)
    assert (group.best.item.id, group.reason) == ("old", "oldest, 2010-05-06T07:08:09")


def test_facts_come_from_the_indexed_file_where_the_store_keeps_no_bytes(tmp_path: Path, gallery: Gallery) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(encoded(scene(50, 40)))
    (pictures / "b.png").write_bytes(encoded(scene(50, 40)))
    index_source(open_source(str(pictures)), gallery)
    (group,) = groups(tmp_path / "store", 1)
    status = (pictures / "a.png").stat()
    date = datetime.fromtimestamp(status.st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    assert group.best.facts == FileFacts(50, 40, status.st_size, "PNG", date)
    (pictures / "a.png").unlink()
    (group,) = groups(tmp_path / "store", 1)
    assert (group.best.item.id, group.copies[1].facts) == ("b.png", FileFacts())


def test_pictures_that_are_told_apart_never_share_a_group(tmp_path: Path) -> None:
    with closing(EmbeddedStore(tmp_path, card(), D)) as store:
        store.add([item("a", at(0)), item("b", at(1)), item("c", at(3))])
        assert ids(tmp_path) == [{"a", "b", "c"}]
        store.dismiss([("digest of b", "digest of a")])
        assert ids(tmp_path) == [{"b", "c"}]
        # The same picture under another name is told apart, too.
        store.remove("a")
        store.add([item("a", at(0))])
        assert ids(tmp_path) == [{"b", "c"}]
        store.dismiss([("digest of b", "digest of c"), ("digest of c", "digest of a")])
        assert ids(tmp_path) == []
        store.dismiss([("digest of a", "digest of b")], dismissed=False)
        assert ids(tmp_path) == [{"a", "b"}]


def test_exact_copies_that_are_told_apart_stand_for_one(tmp_path: Path, gallery: Gallery) -> None:
    data = encoded(scene(60, 50))
    gallery.add("a", data, {})
    gallery.add("b", data, {})
    digest = gallery.get("a").digest
    gallery.store.dismiss([(digest, digest)])
    assert ids(tmp_path / "store", 1) == []
    gallery.add("c", encoded(scene(60, 50).resize((120, 100))), {})
    assert ids(tmp_path / "store", 0.5) == [{"a", "c"}]


def test_groups_come_in_the_order_of_adding(tmp_path: Path) -> None:
    with closing(EmbeddedStore(tmp_path, card(), D)) as store:
        store.add([item(f"{n}{letter}", unit(D, seed=n)) for letter in "ab" for n in (3, 1, 2)])
    found = groups(tmp_path, 0.999)
    assert [group.best.item.id for group in found] == ["3a", "1a", "2a"]


@pytest.mark.parametrize("threshold", [0, -1, 1.1, float("nan")])
def test_thresholds_that_cannot_be(tmp_path: Path, threshold: float) -> None:
    with pytest.raises(InvalidRequest, match="threshold: expected a number above 0 and up to 1"):
        find_groups(tmp_path, threshold)


def test_an_empty_store_has_no_groups(tmp_path: Path) -> None:
    EmbeddedStore(tmp_path, card(), D).close()
    assert ids(tmp_path) == ids(tmp_path, 1) == []


def test_presets_take_the_cards_thresholds_or_the_strangers_of_the_store(tmp_path: Path) -> None:
    with closing(EmbeddedStore(tmp_path, card(), D)) as store:
        store.add([item(str(n), at(30 * (n % 12))) for n in range(120)])
    facts = {"duplicates": {"near": 0.8, "alike": 0.6}}
    assert [threshold_of(preset, facts, tmp_path) for preset in ("exact", "near", "alike")] == [1, 0.8, 0.6]
    near, alike = (threshold_of(preset, {}, tmp_path) for preset in ("near", "alike"))
    scores = np.cos(np.radians(30 * np.subtract.outer(np.arange(12), np.arange(12)))).ravel()
    strangers = float(np.median(scores))
    assert abs(near - (strangers + 0.75 * (1 - strangers))) < 0.2
    assert strangers < alike < near < 1
    for bad in (0.0, "0.8", None, True, 2):
        with pytest.raises(InvalidModel, match=r"duplicates\.near: expected a number"):
            threshold_of("near", {"duplicates": {"near": bad}}, tmp_path)


def tiff(order: str, big: bool, at_the_end: bool) -> bytes:
    """A TIFF of 70,000×3 pixels without any: its header and directory, which may stand behind other bytes."""
    place, entry = ("Q", "HHQ") if big else ("I", "HHI")
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}H", 43 if big else 42)
    head += struct.pack(f"{order}HH", 8, 0) if big else b""
    filling = b"x" * 300_000 if at_the_end else b""
    at = len(head) + struct.calcsize(f"{order}{place}") + len(filling)
    width, height = (struct.pack(order + kind, value) for kind, value in (("I", 70_000), ("H", 3)))
    entries = b"".join(
        struct.pack(f"{order}{entry}", tag, type, 1) + value.ljust(struct.calcsize(f"{order}{place}"), b"\0")
        for tag, type, value in ((256, 4, width), (257, 3, height))
    )
    return head + struct.pack(order + place, at) + filling + struct.pack(f"{order}{'Q' if big else 'H'}", 2) + entries


def test_width_and_height_come_from_the_header(tmp_path: Path) -> None:
    for format in ("TIFF", "AVIF"):
        data = encoded(scene(50, 40), format)
        assert FileFacts.of_data(data)[:4] == (50, 40, len(data), format)
    # As stored: the container says how to turn it.
    assert FileFacts.of_data(heic(grid=(2, 3, 130, 100)))[:2] == (130, 100)
    for order in "<>":
        for big in (False, True):
            for at_the_end in (False, True):
                data = tiff(order, big, at_the_end)
                assert FileFacts.of_data(data)[:4] == (70_000, 3, len(data), "TIFF")
                (tmp_path / "a.tif").write_bytes(data)
                assert FileFacts.of_source(str(tmp_path / "a.tif"))[:2] == (70_000, 3)
                # Of a file that is cut short nothing is known, whatever is missing.
                for length in range(8, len(data) if not at_the_end else 20):
                    assert FileFacts.of_data(data[:length])[0] in (None, 70_000)
    whole = heic()
    for length in range(12, len(whole), 7):
        assert FileFacts.of_data(whole[:length])[0] in (None, 64)


def test_damaged_files_have_no_size(tmp_path: Path) -> None:
    data = encoded(scene(50, 40))
    assert FileFacts.of(data[:20], 20)[:4] == (None, None, 20, "PNG")
    assert FileFacts.of(b"", 0) == FileFacts(None, None, 0, None, None)
    (tmp_path / "folder").mkdir()
    for source in (None, str(tmp_path / "folder"), str(tmp_path / "none"), "a\0b", "/dev/null"):
        assert FileFacts.of_source(source) == FileFacts()
