"""The report as files: its figures against scikit-learn and plain loops, its refusals and leftovers."""

import base64
import io
import json
import re
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix

from service.errors import InvalidOutput
from training.evaluate import Evaluation, Rows, evaluate
from training.report import FILES, check_folder, choose_queries, palette, sample_scores, scatter, write_report

QUERIES = 197


@pytest.fixture(scope="module")
def evaluation(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return evaluate(tiny_model, "digits[:600]", "digits[1600:]", tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folder(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of digits, in a folder whose parents did not exist before."""
    folder = tmp_path_factory.mktemp("report") / "new" / "digits"
    write_report(folder, evaluation)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text("utf-8")


def first(evaluation: Evaluation, count: int) -> Evaluation:
    """The same evaluation of the first queries only."""
    queries = evaluation.queries
    kept = replace(
        queries,
        ids=queries.ids[:count],
        labels=queries.labels[:count],
        embeddings=queries.embeddings[:count],
        pixels=None if queries.pixels is None else queries.pixels[:count],
    )
    found = {name: getattr(evaluation, name)[:count] for name in ("neighbours", "scores", "predicted")}
    return replace(evaluation, queries=kept, **found)


def pictures(page: str) -> list[Image.Image]:
    """All pictures of a page, the sheet of thumbnails last."""
    found = re.findall(r"data:image/webp;base64,([\w+/=]+)", page)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_report_json_is_the_evaluations_and_scikit_learns_confusions(folder: Path, evaluation: Evaluation) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    report = json.loads((folder / "report.json").read_text(), parse_constant=refuse)
    confusion = report.pop("confusion")
    assert report == evaluation.report
    expected = confusion_matrix(evaluation.queries.labels, evaluation.predicted, labels=range(10))
    assert confusion == {"classes": [str(digit) for digit in range(10)], "counts": expected.tolist()}
    assert 0 < np.trace(expected) < QUERIES


def test_the_page_says_every_figure_and_count(page: str, evaluation: Evaluation) -> None:
    rows = re.findall(r'<th scope="row">([^<]+)<span.*?</tr>', page, re.DOTALL)
    assert [rows[0], len(rows)] == ["20-NN, weighted", len(evaluation.report["figures"])]
    for figures in (evaluation.report["figures"], *evaluation.report["baselines"].values()):
        for name, figure in figures.items():
            text = format(figure, ".1f" if name == "effective_rank" else ".4f").replace("-", "−")
            assert f'<td class="number">{text}</td>' in page
    counts = confusion_matrix(evaluation.queries.labels, evaluation.predicted)
    cells = re.findall(r'<td(?: class="wrong")? style.*?>(?:<span class="soft">)?([·\d]+)<', page)
    assert cells == [str(count) if count else "·" for count in counts.ravel()]


def test_the_page_asks_for_nothing(page: str) -> None:
    code = re.sub(r"data:image/svg\+xml,[^\"]*|<!--.*?-->", "", page)
    assert not re.findall(r"https?:|[\"'(=]//|@import|<link[^>]*stylesheet", code)
    assert {address[:5] for address in re.findall(r"(?:src|href)=\"?([^\"\s>]+)", code)} <= {"data:", ""}


def test_tsne_png_has_every_class_in_its_colour(folder: Path, evaluation: Evaluation) -> None:
    with Image.open(folder / "tsne.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (1200, 900))
        seen = {bytes(colour).hex() for colour in np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)}
    # The legend's dots are opaque.
    assert {colour[1:] for colour in palette(10)} <= seen


def test_the_sheet_holds_every_query_in_its_place(page: str, evaluation: Evaluation) -> None:
    sheet = np.asarray(pictures(page)[-1].convert("RGB"))
    assert evaluation.queries.pixels is not None
    columns = sheet.shape[1] // 8
    for number, expected in enumerate(evaluation.queries.pixels):
        row, column = divmod(number, columns)
        np.testing.assert_array_equal(sheet[8 * row :, 8 * column :][:8, :8], expected)


@pytest.mark.slow("draws a report of large pictures")
def test_pictures_of_large_encoders_are_shrunk(evaluation: Evaluation, tmp_path: Path) -> None:
    def enlarged(rows: Rows) -> Rows:
        assert rows.pixels is not None
        colours = np.asarray([255, 200, 100]) / 255
        pixels = (np.repeat(np.repeat(rows.pixels[:600], 28, 1), 28, 2) * colours).astype(np.uint8)
        return replace(rows, pixels=pixels)

    few = first(evaluation, 20)
    write_report(tmp_path / "r", replace(few, bank=enlarged(few.bank), queries=enlarged(few.queries)))
    *shown, sheet = pictures((tmp_path / "r" / "report.html").read_text())
    assert {picture.size for picture in shown} == {(96, 96)}
    assert sheet.size == (5 * 48, 4 * 48)


@pytest.mark.slow("computes t-SNE twice")
def test_t_sne_keeps_classes_together_and_repeats(evaluation: Evaluation) -> None:
    rows, labels = evaluation.queries.embeddings, evaluation.queries.labels
    places = scatter(rows)
    assert places.shape == (QUERIES, 2)
    assert [places.min(), places.max()] == [0, 1]
    distances = np.linalg.norm(places[:, None] - places, axis=2)
    np.fill_diagonal(distances, 9)
    # Chance is 0.1.
    assert (labels[distances.argmin(1)] == labels).mean() > 0.6
    np.testing.assert_array_equal(places, scatter(rows))


def test_embeddings_that_are_all_one_still_make_a_report(evaluation: Evaluation, tmp_path: Path) -> None:
    def collapsed(rows: Rows) -> Rows:
        return replace(rows, embeddings=np.eye(8, dtype=np.float32)[[0] * len(rows.ids)])

    few = first(evaluation, 20)
    flat = replace(few, bank=collapsed(few.bank), queries=collapsed(few.queries), scores=np.ones_like(few.scores))
    write_report(tmp_path / "r", flat)
    assert "nan" not in re.sub(r"base64,[\w+/=]+", "", (tmp_path / "r" / "report.html").read_text())


@pytest.mark.parametrize("own_class", [True, False])
def test_sampled_scores_are_of_all_such_pairs(own_class: bool, evaluation: Evaluation) -> None:
    queries, bank = evaluation.queries, evaluation.bank
    # No query of class 3 has a match in this bank.
    lacking = replace(bank, labels=np.where(bank.labels == 3, 4, bank.labels))
    cosines = queries.embeddings @ bank.embeddings.T
    chosen = (queries.labels[:, None] == lacking.labels) == own_class
    means = [cosines[row][mask].mean() for row, mask in enumerate(chosen) if mask.any()]
    sampled = sample_scores(replace(evaluation, bank=lacking), own_class)
    assert 0.8 * 20_000 < len(sampled) <= 20_000
    assert float(sampled.mean()) == pytest.approx(float(np.mean(means)), abs=0.01)
    allowed = np.unique(cosines[chosen].round(4))
    assert np.isin(sampled.round(4), np.concatenate([allowed, allowed - 1e-4, allowed + 1e-4]).round(4)).mean() > 0.999


def test_misses_come_surest_first_and_hits_from_every_class(evaluation: Evaluation) -> None:
    hits, misses, shares = choose_queries(evaluation)
    labels, predicted = evaluation.queries.labels, evaluation.predicted
    for query in (0, 50, 150):
        votes: dict[int, float] = {}
        for place, score in zip(evaluation.neighbours[query], evaluation.scores[query], strict=True):
            label = int(evaluation.bank.labels[place])
            votes[label] = votes.get(label, 0) + float(np.exp(score / 0.07))
        assert shares[query] == pytest.approx(votes[int(predicted[query])] / sum(votes.values()), rel=1e-4)
    wrong = np.flatnonzero(labels != predicted)
    assert len(misses) == min(24, len(wrong))
    assert set(misses) <= set(wrong.tolist())
    assert min(shares[misses]) >= max([shares[query] for query in wrong if query not in misses], default=0) - 1e-3
    assert (np.diff(shares[misses]) < 1e-3).all()
    assert (labels[hits] == predicted[hits]).all()
    assert len(set(hits)) == 12
    assert set(labels[hits]) == set(labels[labels == predicted])


def test_strips_show_eight_neighbours_by_score(page: str, evaluation: Evaluation) -> None:
    query = choose_queries(evaluation)[1][0]
    strip = page.partition('<li class="strip">')[2].partition('<li class="strip">')[0]
    names = [evaluation.bank.ids[place] for place in evaluation.neighbours[query, :8]]
    assert re.findall(r'<li title="([^"]+)"', strip) == names
    assert re.findall(r'"score">([\d.]+)<', strip) == [f"{score:.3f}" for score in evaluation.scores[query, :8]]
    matches = evaluation.bank.labels[evaluation.neighbours[query, :8]] == evaluation.queries.labels[query]
    assert re.findall(r'"frame (\w+)"', strip) == ["match" if match else "mismatch" for match in matches]
    alts = [f"{evaluation.queries.ids[query]}, {evaluation.classes[evaluation.queries.labels[query]]}"]
    alts += [f"{evaluation.bank.ids[at]}, {evaluation.bank.labels[at]}" for at in evaluation.neighbours[query, :8]]
    assert re.findall(r'alt="([^"]+)"', strip) == alts


def test_without_pictures_ids_stand_in_their_place(evaluation: Evaluation, tmp_path: Path) -> None:
    few = first(evaluation, 20)
    bare = replace(few, bank=replace(few.bank, pixels=None), queries=replace(few.queries, pixels=None))
    report = evaluation.report | {"baselines": None}
    write_report(tmp_path / "r", replace(bare, report=report))
    page = (tmp_path / "r" / "report.html").read_text()
    assert pictures(page) == []
    assert f'<span class="no-picture">{few.bank.ids[few.neighbours[0, 0]]}</span>' in page
    assert "raw pixels</th>" not in page
    assert "embeddings were given, not pictures." in page


def test_few_queries_make_no_map(evaluation: Evaluation, tmp_path: Path) -> None:
    write_report(tmp_path / "r", first(evaluation, 9))
    assert {path.name for path in (tmp_path / "r").iterdir()} == FILES - {"tsne.png", "left_out.jsonl"}
    page = (tmp_path / "r" / "report.html").read_text()
    assert "A map needs 10 queries or more; there are 9." in page
    assert "<script" not in page
    write_report(tmp_path / "r", first(evaluation, 10))
    assert {path.name for path in (tmp_path / "r").iterdir()} == FILES - {"left_out.jsonl"}


def test_many_classes_show_the_pairs_most_confused(evaluation: Evaluation, tmp_path: Path) -> None:
    def split(rows: Rows) -> Rows:
        return replace(rows, labels=4 * rows.labels + np.arange(len(rows.ids)) % 4)

    names = [f"{digit}{letter}" for digit in range(10) for letter in "abcd"]
    queries, bank = split(evaluation.queries), split(evaluation.bank)
    predicted = bank.labels[evaluation.neighbours[:, 0]]
    many = replace(evaluation, classes=names, queries=queries, bank=bank, predicted=predicted)
    write_report(tmp_path / "r", many)
    page = (tmp_path / "r" / "report.html").read_text()
    assert 'class="matrix"' not in page
    counts = confusion_matrix(queries.labels, predicted, labels=range(40))
    assert json.loads((tmp_path / "r" / "report.json").read_text())["confusion"]["counts"] == counts.tolist()
    rows = re.findall(r"<tr><td>(\w+)</td><td>(\w+)</td><td class=\"number\">(\d+)</td>", page)
    assert len(rows) == 30
    assert all(counts[names.index(own), names.index(named)] == int(count) for own, named, count in rows)
    np.fill_diagonal(counts, 0)
    assert [int(count) for *_, count in rows] == sorted(counts.ravel().tolist(), reverse=True)[:30]
    with Image.open(tmp_path / "r" / "tsne.png") as picture:
        assert picture.size == (1200, 900)


@pytest.mark.parametrize("count", [2, 10, 11, 20, 21, 100])
def test_colours_differ(count: int) -> None:
    colours = palette(count)
    assert len(set(colours)) == count
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)


def test_names_of_all_kinds_can_be_written(evaluation: Evaluation, tmp_path: Path) -> None:
    odd = ["$x^{$", "_a", "caf\udce9", "a\nb", "\x00", "犬", "\u2028", "x" * 300, "</script>", "{{ 7 * 7 }}"]
    few = first(evaluation, 20)
    ids = [f"{name}/{number}" for number, name in enumerate(odd + odd)]
    report = few.report | {"model": "$\\frac{\udcff$"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(tmp_path / "r", replace(few, classes=odd, queries=replace(few.queries, ids=ids), report=report))
    page = (tmp_path / "r" / "report.html").read_text("utf-8")
    assert "caf\\udce9" in page
    assert page.count("</script>") == 1
    assert "{{ 7 * 7 }}" in page
    assert json.loads((tmp_path / "r" / "report.json").read_text("utf-8"))["confusion"]["classes"] == odd


def test_an_earlier_report_is_replaced_and_nothing_is_left_beside(evaluation: Evaluation, tmp_path: Path) -> None:
    write_report(tmp_path / "r", first(evaluation, 20))
    old = (tmp_path / "r" / "report.html").read_bytes()
    write_report(tmp_path / "r", first(evaluation, 30))
    assert (tmp_path / "r" / "report.html").read_bytes() != old
    write_report(tmp_path / "r", first(evaluation, 20))
    assert (tmp_path / "r" / "report.html").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_an_empty_folder_and_a_new_one_are_taken(tmp_path: Path) -> None:
    check_folder(tmp_path)
    check_folder(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize(
    ("files", "where", "words"),
    [
        ({"r": "a file"}, "r", "is a file"),
        ({"r/notes.txt": ""}, "r", "holds more than an earlier report"),
        ({"r/report.html": ""}, "r", "holds more than an earlier report"),
        ({"r/report.json": "{}"}, "r", "holds more than an earlier report"),
        ({"r/report.json": '{"fingerprint": ""}', "r/notes.txt": ""}, "r", "holds more than an earlier report"),
        ({"a": "a file"}, "a/r", "cannot be written"),
        ({}, "..", "a name of its own"),
        ({}, "/proc/r", "cannot be written"),
    ],
)
def test_another_things_place_is_refused(files: dict[str, str], where: str, words: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(InvalidOutput, match=words):
        check_folder(tmp_path / where)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(files)


def test_a_disk_that_fills_leaves_the_earlier_report(evaluation: Evaluation, tmp_path: Path) -> None:
    write_report(tmp_path / "r", first(evaluation, 20))
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    with files_of_at_most(20_000), pytest.raises(InvalidOutput, match=r"r: cannot be written: File too large"):
        write_report(tmp_path / "r", first(evaluation, 30))
    assert {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


@contextmanager
def files_of_at_most(count: int) -> Iterator[None]:
    """Make the kernel refuse longer files, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
