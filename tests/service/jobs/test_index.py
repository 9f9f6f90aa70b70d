"""`lookalike index`: a source into a store."""

import json
import os
import shutil
from pathlib import Path
from unicodedata import normalize
from zipfile import ZipFile

import numpy as np
import pytest

from service.errors import InvalidRequest, ItemNotFound
from service.file_facts import FileFacts, Move
from service.gallery import Gallery
from service.jobs.index import index_source
from service.queries import PictureQuery
from service.sources import open_source
from service.sources.compact import Labels
from service.sources.source import LeftOut, Source
from tests.conftest import encoded, missing, scene
from tests.service.jobs.test_embed import counts


def folder_of(folder: Path, *seeds: int) -> Source:
    """A folder of pictures as a camera names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, seed in enumerate(seeds):
        (folder / f"IMG_{n:04d}.png").write_bytes(encoded(scene(seed=seed)))
    return open_source(str(folder))


def ids(gallery: Gallery) -> list[str]:
    return [item.id for item in gallery.store.scan(100)[0]]


def test_indexing_is_idempotent_and_sees_changes(tmp_path: Path, gallery: Gallery) -> None:
    folder = tmp_path / "pictures" / "scenes"
    folder.mkdir(parents=True)
    for n in range(3):
        (folder / f"{n}.png").write_bytes(encoded(scene(seed=n)))
    (folder / "bad.png").write_bytes(b"no picture")
    source = open_source(str(tmp_path / "pictures"))
    assert counts(index_source(source, gallery)) == (3, 0, 0, 1)
    assert counts(index_source(source, gallery)) == (0, 0, 3, 1)
    gallery.change_metadata("scenes/1.png", {"mine": 1})
    (folder / "1.png").write_bytes(encoded(scene(seed=9)))
    assert counts(index_source(source, gallery)) == (0, 1, 2, 1)
    assert gallery.store.count() == 3
    item = gallery.get("scenes/1.png")
    assert item.metadata == {"label": "scenes", "mine": 1}
    assert item.source == f"{tmp_path}/pictures/scenes/1.png"
    assert gallery.find([PictureQuery(encoded(scene(seed=9)))], 1)[0][0].id == "scenes/1.png"


def test_a_folder_keeps_its_pictures_and_the_store_their_paths(tmp_path: Path, gallery: Gallery) -> None:
    source = folder_of(tmp_path / "pictures", 1, 2, 3)
    index_source(source, gallery)
    assert [gallery.store.original(id) for id in ids(gallery)] == [None] * 3
    first, second, third = (tmp_path / "pictures" / id for id in ids(gallery))
    assert gallery.original(first.name) == first.read_bytes()
    second.write_bytes(encoded(scene(seed=9)))
    with pytest.raises(ItemNotFound, match=f"{second} has another by now"):
        gallery.original(second.name)
    third.unlink()
    with pytest.raises(ItemNotFound, match=f"cannot be read from {third}: No such file"):
        gallery.original(third.name)
    # A pipe would block the thread that opens it for reading.
    os.mkfifo(third)
    with pytest.raises(ItemNotFound, match="not an ordinary file"):
        gallery.original(third.name)


def test_a_path_is_found_in_whatever_form_the_disk_spells_it(tmp_path: Path, gallery: Gallery) -> None:
    folder = tmp_path / "pictures" / normalize("NFD", "Müller")
    folder.mkdir(parents=True)
    (folder / normalize("NFD", "é.png")).write_bytes(encoded(scene()))
    index_source(open_source(str(tmp_path / "pictures")), gallery)
    assert gallery.original(normalize("NFC", "Müller/é.png")) == encoded(scene())


def test_a_store_that_stands_alone_keeps_the_bytes(tmp_path: Path, gallery: Gallery) -> None:
    source = folder_of(tmp_path / "pictures", 1, 2)
    index_source(source, gallery)
    gallery.change_metadata("IMG_0000.png", {"mine": 1})
    assert counts(index_source(source, gallery, keep_originals=True)) == (0, 0, 2, 0)
    kept = [source.entry(position).data for position in range(2)]
    shutil.rmtree(tmp_path / "pictures")
    assert [gallery.original(id) for id in source.ids] == kept
    assert gallery.get("IMG_0000.png").metadata == {"mine": 1}


def test_an_archive_has_no_files_so_its_bytes_are_kept(tmp_path: Path, gallery: Gallery) -> None:
    with ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.writestr("a.png", encoded(scene()))
    index_source(open_source(str(tmp_path / "pictures.zip")), gallery)
    assert gallery.store.original("a.png") == encoded(scene())


def test_every_digit_finds_itself(gallery: Gallery) -> None:
    source = open_source("digits")
    index_source(source, gallery)
    assert gallery.store.count() == 1797
    begun = [gallery.embed_soon(source.entry(position).data) for position in range(len(source))]
    hits = gallery.store.search(np.stack([embedding.result() for embedding in begun]), 1)
    assert sum(found[0].id == id for found, id in zip(hits, source.ids, strict=True)) == 1797
    assert gallery.notice() is None


def test_photographs_in_a_digits_encoder_are_remarked_upon(gallery: Gallery, data_root: Path) -> None:
    photos = data_root / "photos"
    if not photos.is_dir():
        missing("no photographs: LOOKALIKE_TEST_DATA has no folder photos")
    index_source(open_source(str(photos)), gallery)
    notice = gallery.notice()
    assert notice is not None
    assert "trained on mnist/train" in notice
    assert f"`lookalike reindex --store {gallery.settings.store}`" in notice


def test_two_sources_of_the_same_names_stay_apart(tmp_path: Path, gallery: Gallery) -> None:
    first, second = folder_of(tmp_path / "2023", 0, 1, 2), folder_of(tmp_path / "2024", 3, 4, 5)
    assert counts(index_source(first, gallery)) == (3, 0, 0, 0)
    account = index_source(second, gallery)
    assert counts(account) == (3, 0, 0, 0)
    assert ids(gallery) == [f"IMG_000{n}.png" for n in range(3)] + [f"2024/IMG_000{n}.png" for n in range(3)]
    assert "begin with 2024/" in account.notes[0]
    assert f"from {tmp_path / '2023'}" in account.notes[0]
    # The next run, of a slice too, remembers the prefix; a picture that has changed replaces itself.
    (tmp_path / "2024" / "IMG_0001.png").write_bytes(encoded(scene(seed=9)))
    assert counts(index_source(open_source(f"{tmp_path}/2024[:2]"), gallery)) == (0, 1, 1, 0)
    assert counts(index_source(first, gallery)) == (0, 0, 3, 0)
    # A third folder of the same name gets another prefix.
    third = index_source(folder_of(tmp_path / "other" / "2024", 6), gallery)
    assert "begin with 2024-2/" in third.notes[0]
    assert ids(gallery)[-1] == "2024-2/IMG_0000.png"


def test_a_prefix_that_the_user_chose(tmp_path: Path, gallery: Gallery) -> None:
    first, second = folder_of(tmp_path / "a", 0, 1), folder_of(tmp_path / "b", 2, 1)
    index_source(first, gallery)
    assert counts(index_source(second, gallery, "mine/")) == (2, 0, 0, 0)
    assert ids(gallery)[2:] == ["mine/IMG_0000.png", "mine/IMG_0001.png"]
    assert counts(index_source(second, gallery)) == (0, 0, 2, 0)
    merged = index_source(second, gallery, "")
    assert counts(merged) == (0, 1, 1, 0)
    assert merged.notes == [f"1 of the replaced pictures came from {tmp_path / 'a'}, such as IMG_0000.png"]
    with pytest.raises(InvalidRequest, match="control characters"):
        index_source(second, gallery, "a\nb")


def test_a_source_that_has_moved_is_the_same_source(tmp_path: Path, gallery: Gallery) -> None:
    index_source(folder_of(tmp_path / "here", 0, 1, 2, 3), gallery)
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "there" / "IMG_0003.png").write_bytes(encoded(scene(seed=8)))
    account = index_source(open_source(str(tmp_path / "there")), gallery)
    assert counts(account) == (0, 1, 3, 0)
    assert "taken as moved" in account.notes[0]
    assert {item.source for item in gallery.store.scan(9)[0]} == {f"{tmp_path}/there/IMG_000{n}.png" for n in range(4)}


def record_as_typed(gallery: Gallery, source: Source) -> None:
    """Let the store record the sources of items as earlier versions did."""
    items = [gallery.get(id) for id in source.ids]
    gallery.store.move([Move(item.id, item.digest, item.id, f"here/{item.id}") for item in items])


def test_items_of_an_earlier_version_count_by_the_same_rule(tmp_path: Path, gallery: Gallery) -> None:
    source = folder_of(tmp_path / "here", 0, 1, 2)
    index_source(source, gallery)
    record_as_typed(gallery, source)
    assert counts(index_source(source, gallery)) == (0, 0, 3, 0)
    record_as_typed(gallery, source)
    account = index_source(folder_of(tmp_path / "others", 3, 4, 2), gallery)
    assert counts(account) == (3, 0, 0, 0)
    assert "others/" in account.notes[0]


def test_a_new_picture_of_a_known_source_that_collides_gets_the_prefix_alone(tmp_path: Path, gallery: Gallery) -> None:
    first, second = folder_of(tmp_path / "a", 0), folder_of(tmp_path / "b", 1)
    (tmp_path / "b" / "IMG_0000.png").rename(tmp_path / "b" / "own.png")
    index_source(first, gallery)
    index_source(open_source(str(tmp_path / "b")), gallery)
    folder_of(tmp_path / "b", 2)
    for expected in ((1, 0, 1, 0), (0, 0, 2, 0)):
        assert counts(index_source(open_source(str(tmp_path / "b")), gallery)) == expected
    assert ids(gallery) == ["IMG_0000.png", "own.png", "b/IMG_0000.png"]
    assert second.name == str(tmp_path / "b")


def test_what_the_source_left_out_is_counted_and_listed(gallery: Gallery) -> None:
    left_out = [LeftOut(".git/a.png", "hidden", False), LeftOut("b.heic", "HEIC", True)]
    source = Source(
        "folder", ["c.png"], lambda _: b"no picture", Labels.of([None]), left_out=left_out, notes=["a note"]
    )
    account = index_source(source, gallery)
    assert account.facts() == {
        "added": 0,
        "replaced": 0,
        "known": 0,
        "left_out": {"not a picture that we take": 1, "hidden": 1, "HEIC": 1},
        "lost": 2,
        "listed_in": str(gallery.settings.store / "left_out.jsonl"),
    }
    rows = [json.loads(line) for line in (gallery.settings.store / "left_out.jsonl").read_text().splitlines()]
    assert [(row["id"], row["lost"]) for row in rows] == [("c.png", True), (".git/a.png", False), ("b.heic", True)]
    assert account.notes == ["a note", "folder: 1 of 1 pictures have no label"]
    # The picture is mended, and nothing else is left out any more.
    mended = Source("folder", ["c.png"], lambda _: encoded(scene()), Labels.of([None]))
    assert index_source(mended, gallery).facts()["listed_in"] is None
    assert not (gallery.settings.store / "left_out.jsonl").exists()


def test_items_of_an_older_store_learn_what_their_files_say(tmp_path: Path, gallery: Gallery) -> None:
    source = folder_of(tmp_path / "pictures", 1, 2)
    path = tmp_path / "pictures" / "IMG_0000.png"
    os.utime(path, (10**9, 10**9))
    index_source(source, gallery)
    known = [gallery.get(id) for id in source.ids]
    assert known[0].facts == FileFacts(64, 48, path.stat().st_size, "PNG", "2001-09-09T01:46:40")
    assert known[0].mtime_ns == 10**18
    for item in known:
        gallery.store.move([Move(item.id, item.digest, item.id, item.source)])
    assert gallery.get(source.ids[0]).facts == FileFacts()
    sequence = gallery.store.sequence()
    assert counts(index_source(source, gallery)) == (0, 0, 2, 0)
    assert [gallery.get(id) for id in source.ids] == known
    assert gallery.store.sequence() == sequence + 2
    assert counts(index_source(source, gallery)) == (0, 0, 2, 0)
    assert gallery.store.sequence() == sequence + 2
