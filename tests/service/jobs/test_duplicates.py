"""What `lookalike duplicates` writes and removes, with ids and files that mean harm."""

import csv
import html
import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from service.duplicates import Copy, Group, find_groups
from service.errors import InvalidOutput, InvalidRequest
from service.file_facts import FileFacts
from service.gallery import Gallery
from service.jobs.duplicates import write_csv, write_html, write_plan, write_script
from service.jobs.index import index_source
from service.jobs.removal import delete_rest
from service.sources import open_source
from service.store import Item
from service.store.catalog import read_meta
from service.store.catalog_reader import CatalogReader
from service.store.embedded import EmbeddedStore
from tests.conftest import encoded, scene
from tests.service.store.test_embedded import D, card, item, unit

HOSTILE = (
    "$(touch hit)",
    "`touch hit`",
    "a'; touch hit; '",
    "-rf",
    "../../up",
    "a\nrm -- b",
    "=1+2",
    "<script>x</script>",
)


def made_of(ids: Sequence[str]) -> Group:
    """A group of items that no store has."""
    copies = [Copy(Item(id, {}, f"/none/{id}", "d", "fp32"), 0.9, False, FileFacts()) for id in ids]
    return Group(copies, "first added")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with three files of the same bytes and one of others; the names mean harm."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    same = encoded(scene(50, 40, seed=1))
    for name in ("$(touch hit).png", "-rf.png", "a'b.png"):
        (folder / name).write_bytes(same)
    (folder / "other.png").write_bytes(encoded(scene(50, 40, seed=2)))
    return folder


def groups_of(store: Path, threshold: float = 1) -> list[Group]:
    return [*find_groups(store, threshold).groups]


def script_of(store: Path, groups: Sequence[Group]) -> str:
    path = store.parent / "remove.sh"
    with closing(CatalogReader(store)) as reader:
        write_script(groups, read_meta(store), reader, path)
    return path.read_text()


def test_the_script_removes_all_but_the_best_and_runs_nothing_else(
    tmp_path: Path, pictures: Path, gallery: Gallery
) -> None:
    index_source(open_source(str(pictures)), gallery)
    script = script_of(tmp_path / "store", groups_of(tmp_path / "store"))
    assert script.count("\nrm -- ") == 2
    subprocess.run(["sh", tmp_path / "remove.sh"], cwd=tmp_path, check=True)
    assert sorted(path.name for path in pictures.iterdir()) == ["$(touch hit).png", "other.png"]
    assert not (tmp_path / "hit").exists()


def test_hostile_ids_stay_within_their_place(tmp_path: Path) -> None:
    EmbeddedStore(tmp_path / "store", card(), D).close()
    groups = [made_of(["best", *HOSTILE]), made_of([*reversed(HOSTILE)])]
    script = script_of(tmp_path / "store", groups)
    # Nothing was indexed, so no file is ours; every line is a comment.
    lines = script.splitlines()[2:]
    assert lines[0] == "set -eu"
    assert all(line.startswith("# ") for line in lines[1:])
    assert len(lines) == 1 + 2 + 8 + 7
    write_csv(groups, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [row["id"] for row in rows[1:9]] == [f"'{id}" if id[0] in "=-" else id for id in HOSTILE]
    with closing(CatalogReader(tmp_path / "store")) as reader:
        assert write_html(groups, reader, tmp_path / "sheet.html") == 0
    sheet = (tmp_path / "sheet.html").read_text()
    assert "<script" not in sheet
    assert html.escape("<script>x") in sheet
    assert "default-src 'none'" in sheet


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", " =", "\r", "\n=", "＝", "＠"])
def test_no_cell_begins_a_formula(tmp_path: Path, start: str) -> None:
    write_csv([made_of([f"{start}cmd", "b"])], tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["id"] == f"'{start}cmd"


def test_a_script_quotes_newlines(tmp_path: Path, gallery: Gallery) -> None:
    folder = tmp_path / "a\nrm -- b"
    folder.mkdir()
    for name in ("1.png", "2.png"):
        (folder / name).write_bytes(encoded(scene()))
    index_source(open_source(str(folder)), gallery)
    script = script_of(tmp_path / "store", groups_of(tmp_path / "store"))
    assert shlex.split(script[script.index("\nrm") :]) == ["rm", "--", str(folder / "2.png")]
    subprocess.run(["sh", tmp_path / "remove.sh"], cwd=tmp_path, check=True)
    assert [path.name for path in folder.iterdir()] == ["1.png"]


def reasons(gallery: Gallery, files: bool = True) -> dict[str, str]:
    """Delete all but the best of the groups that a list names; return why items were left, by id."""
    done = delete_rest(gallery.settings.store / "plan.jsonl", gallery.store, gallery.settings.store, files)
    return dict(done.left)


def plan(gallery: Gallery) -> Path:
    path = gallery.settings.store / "plan.jsonl"
    write_plan(groups_of(gallery.settings.store), path)
    return path


def test_items_are_removed_and_files_only_where_asked(tmp_path: Path, pictures: Path, gallery: Gallery) -> None:
    index_source(open_source(str(pictures)), gallery)
    plan(gallery)
    assert gallery.store.count() == 4
    done = delete_rest(tmp_path / "store" / "plan.jsonl", gallery.store, tmp_path / "store", files=False)
    assert (done.items, done.files, done.left) == (["-rf.png", "a'b.png"], [], [])
    assert len([*pictures.iterdir()]) == 4
    index_source(open_source(str(pictures)), gallery)
    plan(gallery)
    done = delete_rest(tmp_path / "store" / "plan.jsonl", gallery.store, tmp_path / "store", files=True)
    assert done.files == [str(pictures / name) for name in ("-rf.png", "a'b.png")]
    assert sorted(path.name for path in pictures.iterdir()) == ["$(touch hit).png", "other.png"]
    assert sorted(item.id for item in gallery.store.scan(9)[0]) == ["$(touch hit).png", "other.png"]


def test_a_file_that_has_changed_stays(pictures: Path, gallery: Gallery) -> None:
    index_source(open_source(str(pictures)), gallery)
    plan(gallery)
    (pictures / "-rf.png").write_bytes(b"precious")
    assert reasons(gallery) == {"-rf.png": "its file has other bytes by now"}
    assert (pictures / "-rf.png").read_bytes() == b"precious"
    assert gallery.store.get("-rf.png") is not None
    assert not (pictures / "a'b.png").exists()


def test_nothing_is_removed_where_the_best_copy_is_gone(pictures: Path, gallery: Gallery) -> None:
    index_source(open_source(str(pictures)), gallery)
    plan(gallery)
    (pictures / "$(touch hit).png").unlink()
    left = reasons(gallery)
    assert set(left) == {"-rf.png", "a'b.png"}
    assert all("the best copy, $(touch hit).png: its picture was not kept" in why for why in left.values())
    assert (pictures / "-rf.png").exists()


def test_a_link_is_not_followed(tmp_path: Path, pictures: Path, gallery: Gallery) -> None:
    outside = tmp_path / "outside.png"
    outside.write_bytes((pictures / "-rf.png").read_bytes())
    (pictures / "link.png").symlink_to(outside)
    index_source(open_source(str(pictures)), gallery)
    assert gallery.store.get("link.png") is not None
    plan(gallery)
    assert reasons(gallery) == {"link.png": "a link leads to it, so it may lie outside its source"}
    assert outside.exists()


def test_a_folder_that_became_a_link_is_not_followed(tmp_path: Path, pictures: Path, gallery: Gallery) -> None:
    index_source(open_source(str(pictures)), gallery)
    plan(gallery)
    pictures.rename(tmp_path / "elsewhere")
    pictures.symlink_to(tmp_path / "elsewhere")
    assert set(reasons(gallery)) == {"-rf.png", "a'b.png"}
    assert len([*(tmp_path / "elsewhere").iterdir()]) == 4


@pytest.mark.parametrize("source", ["../victim.png", "/victim.png", "sub/../../victim.png"])
def test_a_source_that_index_did_not_record_is_left(
    tmp_path: Path, pictures: Path, gallery: Gallery, source: str
) -> None:
    """As a Parquet file from a stranger may name it."""
    victim = tmp_path / "victim.png"
    victim.write_bytes((pictures / "-rf.png").read_bytes())
    index_source(open_source(str(pictures)), gallery)
    best = gallery.get("$(touch hit).png")
    path = str(victim) if source.startswith("/") else f"{pictures}/{source}"
    hostile = item("../victim.png", unit(gallery.encoder.dimension))
    gallery.store.add([replace(hostile, source=path, digest=best.digest)])
    plan(gallery)
    assert "in no folder whose files `index` recorded" in reasons(gallery)["../victim.png"]
    assert victim.exists()


def test_the_file_of_an_item_that_stays_is_not_removed(pictures: Path, gallery: Gallery) -> None:
    index_source(open_source(str(pictures)), gallery)
    # The same folder under other ids: each file is two items.
    index_source(open_source(str(pictures)), gallery, prefix="again")
    path = plan(gallery)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["keep"] for row in rows} == {"$(touch hit).png", "other.png"}
    left = reasons(gallery)
    assert left["again/$(touch hit).png"] == "its file is also that of $(touch hit).png, which stays"
    assert left["again/other.png"] == "its file is also that of other.png, which stays"
    assert sorted(file.name for file in pictures.iterdir()) == ["$(touch hit).png", "other.png"]


def test_a_list_removes_only_what_is_as_it_was(pictures: Path, gallery: Gallery) -> None:
    index_source(open_source(str(pictures)), gallery)
    plan(gallery)
    gallery.add("-rf.png", encoded(scene(seed=9)), {})
    assert reasons(gallery, files=False) == {"-rf.png": "it is not in the store any more, or has another picture"}
    assert gallery.store.get("a'b.png") is None


def test_what_was_told_apart_since_is_left(pictures: Path, gallery: Gallery) -> None:
    index_source(open_source(str(pictures)), gallery)
    plan(gallery)
    digest = gallery.get("-rf.png").digest
    gallery.store.dismiss([(digest, digest)])
    assert set(reasons(gallery, files=False)) == {"-rf.png", "a'b.png"}


def test_a_list_cannot_remove_both_copies(pictures: Path, gallery: Gallery) -> None:
    index_source(open_source(str(pictures)), gallery)
    path = plan(gallery)
    row = json.loads(path.read_text().splitlines()[0])
    back = row | {"remove": row["keep"], "keep": row["remove"]}
    path.write_text(json.dumps(row) + "\n" + json.dumps(back) + "\n")
    assert set(reasons(gallery, files=False)) == {row["remove"], row["keep"]}
    path.write_text(json.dumps(row | {"remove": row["keep"]}) + "\n")
    assert set(reasons(gallery, files=False)) == {row["keep"]}
    assert gallery.store.count() == 4


@pytest.mark.parametrize(
    "content", ["{", "[]\n", '{"remove": "a"}\n', '{"remove": 1, "digest": "", "keep": "", "keep_digest": ""}']
)
def test_a_list_that_is_none_removes_nothing(tmp_path: Path, gallery: Gallery, content: str) -> None:
    (tmp_path / "plan").write_text(content)
    with pytest.raises(InvalidRequest):
        delete_rest(tmp_path / "plan", gallery.store, tmp_path / "store", False)
    with pytest.raises(InvalidRequest, match="without --yes writes it"):
        delete_rest(tmp_path / "none", gallery.store, tmp_path / "store", False)


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidOutput, match="cannot be written"):
        write_csv([], tmp_path / "none" / "table.csv")


def test_a_sheet_shows_thumbnails_and_says_what_it_lacks(tmp_path: Path, gallery: Gallery) -> None:
    for id in "ab":
        gallery.add(id, encoded(scene()), {})
    groups = groups_of(tmp_path / "store")
    with closing(CatalogReader(tmp_path / "store")) as reader:
        assert write_html(groups * 1001, reader, tmp_path / "sheet.html") == 1
    sheet = (tmp_path / "sheet.html").read_text()
    assert len(re.findall('src="data:image/webp;base64,UklGR', sheet)) == 2000
    assert "The last 1 are not shown here." in sheet
