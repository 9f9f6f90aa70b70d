"""Thousands of odd folders, zips, tars, tables and pictures against a plain reading of them.

Every case comes from its number, so the number in a message reproduces it. `tests/proofs/wild/` makes the cases:
`trees` and `archives` make the sources, `pictures` the picture files, and `reference` says what is right.
"""

import json
import os
import re
import shutil
from collections import Counter
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from starlette.testclient import TestClient

from service.encoding.encoder import Encoder
from service.encoding.images import decode
from service.encoding.limits import Limits
from service.errors import InvalidSource, LookalikeError
from service.gallery import Gallery
from service.jobs.index import index_source
from service.settings import Settings
from service.sources import open_source
from service.sources.source import Source
from service.store.embedded import EmbeddedStore
from tests.conftest import MODEL
from tests.proofs.wild.archives import Archive, archive
from tests.proofs.wild.pictures import SEED, Picture, picture
from tests.proofs.wild.reference import (
    CONTROL,
    Expected,
    Found,
    composed,
    digest,
    expected,
    follow,
    mistakes,
    row_mistakes,
)
from tests.proofs.wild.trees import linked_folder, tree, write_folder

pytestmark = pytest.mark.proof

# 50,000 in the long form: half of them pictures, three eighths archives, an eighth folders.
CASES = int(os.environ.get("LOOKALIKE_CASES", "2000"))
# No JPEG comes back smaller than it is stored.
_FULL_SIZE = 5_000
_SHOWN = 20


@pytest.mark.timeout(3600)
def test_pictures_look_as_a_person_sees_them() -> None:
    _report("picture", {number: _wrong_pixels(picture(number)) for number in range(CASES // 2)})


@pytest.mark.timeout(3600)
def test_archives_give_what_is_in_them(tmp_path: Path) -> None:
    _report("archive", {number: _wrong_archive(archive(number), tmp_path / "a") for number in range(CASES * 3 // 8)})


@pytest.mark.timeout(3600)
def test_folders_give_what_is_in_them(tmp_path: Path) -> None:
    _report("folder", {number: _wrong_folder(number, tmp_path / "f") for number in range(CASES // 8)})


@pytest.mark.timeout(3600)
def test_index_stores_and_counts_what_sources_give(tmp_path: Path, encoder: Encoder) -> None:
    settings = Settings(store=tmp_path / "store", model=MODEL)
    store = EmbeddedStore(settings.store, encoder.card, encoder.dimension)
    with closing(Gallery(encoder, store, settings)) as gallery:
        wrong = {}
        for number in range(CASES // 80):
            path = _write(archive(number), tmp_path / "a")
            found = _opened(path)
            wrong[number] = [] if isinstance(found, str) else _wrong_index(open_source(str(path)), found, gallery)
            shutil.rmtree(tmp_path / "a")
    _report("archive", wrong)


@pytest.mark.timeout(3600)
def test_zips_over_http_give_what_is_in_them(tmp_path: Path) -> None:
    wrong = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_DO_NOT_TRACK", "True")
        from service.app import make_service

        app = make_service(Settings(store=tmp_path / "store", model=MODEL)).to_asgi()
        with TestClient(app) as client:
            for number in range(CASES // 20):
                made = archive(number)
                if isinstance(made.right, Expected) and made.source.endswith(".zip"):
                    wrong[number] = _wrong_answer(made, made.right, client)
    _report("archive", wrong)


def _wrong_pixels(drawn: Picture) -> list[str]:
    try:
        pixels = np.asarray(decode(drawn.data, _FULL_SIZE, Limits()), np.float64)
    except LookalikeError as error:
        return [] if drawn.optional else [f"{drawn.name}: {error}"]
    if pixels.shape != drawn.seen.shape:
        return [f"{drawn.name}: expected {drawn.seen.shape}, got {pixels.shape}"]
    difference = np.abs(pixels - drawn.seen).mean()
    return [f"{drawn.name}: the mean difference is {difference:.2f} of 255"] if difference > drawn.most else []


def _wrong_archive(made: Archive, folder: Path) -> list[str]:
    found = _opened(_write(made, folder))
    shutil.rmtree(folder)
    if isinstance(found, str) or isinstance(made.right, str):
        asked = made.right if isinstance(made.right, str) else "it to be read"
        refused = isinstance(found, str) and isinstance(made.right, str) and made.right in found
        return [] if refused else [f"{made.name}: expected {asked!r}, got {found}"]
    ours = row_mistakes(made.right, found) if isinstance(made.right, list) else mistakes(made.right, found)
    if made.says and not any(re.search(made.says, note) for note in found.notes):
        ours.append(f"no note says {made.says!r}")
    return [f"{made.name}: {mistake}" for mistake in ours]


def _wrong_index(source: Source, found: Found, gallery: Gallery) -> list[str]:
    """Index a source twice, compare the store and both counts with what the source gives, and empty the store."""
    first, again = index_source(source, gallery), index_source(source, gallery)
    taken, named = len(found.taken), len(found.left)
    said = []
    for account, counts in ((first, (taken, 0, 0, named)), (again, (0, 0, taken, named))):
        got = account.added, account.replaced, account.known, sum(account.facts()["left_out"].values())
        if got != counts:
            said.append(f"{source.name}: expected (added, replaced, known, left out) {counts}, got {got}")
    stored = {item.id: (item.metadata.get("label"), item.digest) for item in gallery.store.scan(1000)[0]}
    if stored != found.taken:
        said.append(f"{source.name}: the store has {stored}, expected {found.taken}")
    for id in stored:
        gallery.store.remove(id)
    return said


def _wrong_answer(made: Archive, right: Expected, client: TestClient) -> list[str]:
    """Send a zip, and compare the lines of the answer with what is in it."""
    answer = client.post("/images", content=made.files[made.source], headers={"content-type": "application/zip"})
    if answer.status_code != 200:
        return [f"{made.name}: {answer.status_code} {answer.text}"]
    lines = [json.loads(line) for line in answer.text.splitlines()]
    taken = {line["id"] for line in lines if line["status"] in (200, 201)}
    refused = Counter(composed(line["id"] or "") for line in lines if line["status"] >= 400)
    said = []
    if taken != right.taken.keys():
        said.append(f"{made.name}: expected {sorted(right.taken)}, got {sorted(taken)}")
    # One of several members with a path is new, and those behind it replace it.
    if max(Counter(line["id"] for line in lines if line["status"] == 201).values(), default=0) > 1:
        said.append(f"{made.name}: an id is new twice")
    for id, (_, digests) in right.taken.items():
        if digest(client.get(f"/images/{quote(id)}/content").content) not in digests:
            said.append(f"{made.name}: {id!r} has the bytes of another member")
    lost = [(path, why) for path, why, lost in right.left if lost]
    said += [
        f"{made.name}: no line names {path!r}" for path, why in lost if why != CONTROL and not refused[composed(path)]
    ]
    # A line repeats no id that cannot be one.
    if refused[""] != sum(why == CONTROL for _, why in lost):
        said.append(f"{made.name}: {refused['']} lines without an id")
    return said


def _write(made: Archive, folder: Path) -> Path:
    """Write an archive's files, and return its SOURCE."""
    folder.mkdir()
    for name, data in made.files.items():
        (folder / name).write_bytes(data)
    return folder / made.source


def _wrong_folder(number: int, folder: Path) -> list[str]:
    generator = np.random.default_rng([SEED, number])
    folder.mkdir()
    root = folder / "root"
    if number % 3 == 0:
        right = linked_folder(generator, root, folder / "outside")
    else:
        members = tree(generator)
        write_folder(members, root)
        right = expected(members)
    found = _opened(root)
    shutil.rmtree(folder)
    return [f"folder: expected it to be read, got {found}"] if isinstance(found, str) else mistakes(right, found)


def _opened(path: Path) -> Found | str:
    """Return what a source gives, or the message of its refusal."""
    try:
        return follow(open_source(str(path)))
    except InvalidSource as error:
        return str(error)


def _report(what: str, wrong: dict[int, list[str]]) -> None:
    """Fail with the first mistakes, and with the number of cases that have one."""
    bad = {number: said for number, said in wrong.items() if said}
    print(f"{what}: {len(wrong)} cases, {len(bad)} wrong")
    shown = [f"{what} {number} of seed {SEED}: {said[0]}" for number, said in bad.items()][:_SHOWN]
    assert not bad, f"{len(bad)} of {len(wrong)} cases are wrong:\n" + "\n".join(shown)
