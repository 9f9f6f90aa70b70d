"""The offline job: figures against plain NumPy and scikit-learn, correct baselines, refusals."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

import lookalike
from service.encoding.card import Card, read_card, square_preprocessing
from service.encoding.encoder import Encoder as ServedEncoder
from service.encoding.variants import embed_pixels
from service.encoding.voting import headline_accuracy, vote
from service.errors import InvalidModel, InvalidSource, UndecodablePicture
from service.jobs.embed import embed_source
from service.settings import Settings
from service.sources import open_source
from tests.service.sources.test_files import tarred
from training.backbones import build_backbone
from training.data import open_training_source
from training.encoder import Encoder
from training.evaluate import (
    Evaluation,
    centred,
    evaluate,
    measure,
    nearest_pixels,
    randomised,
    read_pixels,
)
from training.export import export
from training.figures import alignment, effective_rank, linear_probe, uniformity

BANK, QUERIES = "digits[:1000]", "digits[1000:]"
FIGURES = {
    *("k5", "k10", "weighted_k20", "weighted_k200", "linear_probe", "recall_at_1", "recall_at_5", "recall_at_10"),
    *("map_at_r", "r_precision", "alignment", "uniformity", "effective_rank"),
}


@pytest.fixture(scope="module")
def evaluation(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return evaluate(tiny_model, BANK, QUERIES, tmp_path_factory.mktemp("data"), "fp32")


@pytest.fixture(scope="module")
def report(evaluation: Evaluation) -> dict[str, Any]:
    return evaluation.report


@pytest.fixture(scope="module")
def embedded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of `lookalike embed digits`."""
    out = tmp_path_factory.mktemp("embedded") / "digits.parquet"
    embed_source(open_source("digits"), tiny_model, out, Settings(variant="fp32"))
    return out


def test_the_report_has_its_keys_and_figures(report: dict[str, Any], tiny_card: Card) -> None:
    others = ("raw_pixels", "without_whitening", "random_encoder")
    rows = [report["figures"], *(report["baselines"][name] for name in others)]
    assert report == {
        "model": "tiny",
        "fingerprint": tiny_card.fingerprint,
        "variant": "fp32",
        "bank": {"source": BANK, "pictures": 1000, "left_out": {}},
        "queries": {"source": QUERIES, "pictures": 797, "left_out": {}, "in_bank": 0},
        "figures": rows[0],
        "baselines": dict(zip(others, rows[1:], strict=True)),
    }
    assert json.loads(json.dumps(report)) == report
    assert all(set(row) == FIGURES for row in rows)
    for key in FIGURES:
        # The rows differ because they measure different embeddings.
        assert len({row[key] for row in rows}) >= 2, key
    for key in FIGURES - {"alignment", "uniformity", "effective_rank"}:
        # Each figure beats chance, 0.1.
        assert all(0.15 < row[key] < 1 for row in rows), key
    assert all(0 < row["alignment"] < -row["uniformity"] < 4 for row in rows[:1])


def test_the_evaluation_is_what_the_report_says(evaluation: Evaluation, tiny_card: Card) -> None:
    source, bank, queries = open_source("digits"), evaluation.bank, evaluation.queries
    assert source.labels is not None
    assert evaluation.classes == [str(digit) for digit in range(10)]
    assert [*bank.ids, *queries.ids] == list(source.ids)
    assert [evaluation.classes[code] for code in (*bank.labels, *queries.labels)] == list(source.labels)
    assert bank.pixels is not None
    np.testing.assert_array_equal(bank.pixels, read_pixels(open_source(BANK), tiny_card.preprocessing))
    scores = queries.embeddings @ bank.embeddings.T
    np.testing.assert_array_equal(evaluation.neighbours, np.argsort(-scores, axis=1, kind="stable")[:, :20])
    np.testing.assert_allclose(evaluation.scores, -np.sort(-scores, axis=1)[:, :20], atol=1e-6)
    accuracy = float((evaluation.predicted == queries.labels).mean())
    assert round(accuracy, 4) == evaluation.report["figures"]["weighted_k20"]
    assert evaluation.notes() == []


@pytest.mark.slow("evaluates an encoder six times")
def test_a_picture_does_not_vote_for_itself(
    tiny_model: Path, embedded: Path, tmp_path: Path, evaluation: Evaluation
) -> None:
    """Found by its id in the same source, and by its content in another; whether pictures or embeddings are given."""
    source = open_source("digits[:60]")
    for position in range(60):
        folder = tmp_path / "copies" / str((source.labels or [])[position])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{position}.png").write_bytes(source.entry(position).data)
    for bank, queries in (
        ("digits[:60]", "digits[:60]"),
        ("digits[:60]", str(tmp_path / "copies")),
        (f"{embedded}[:60]", f"{embedded}[:60]"),
        (f"{embedded}[:60]", str(tmp_path / "copies")),
    ):
        found = evaluate(tiny_model, bank, queries, tmp_path, "fp32")
        assert found.report["queries"]["in_bank"] == 60
        assert "60 of 60 queries are in the bank, too" in found.notes()[0]
        assert found.scores.max() < 1 - 1e-6
        assert found.report["figures"]["k5"] < 1
        assert found.report["figures"]["linear_probe"] is None
    half = evaluate(tiny_model, "digits[:1000]", "digits[980:1020]", tmp_path, "fp32")
    assert half.report["queries"]["in_bank"] == 20
    # Those that are not in the bank have the neighbours that they have in the bank without the others.
    np.testing.assert_array_equal(half.neighbours[20:], evaluation.neighbours[:20])
    assert not np.any(half.neighbours[:20] == np.arange(980, 1000)[:, None])
    assert half.report["figures"]["linear_probe"] is not None
    with pytest.raises(InvalidSource, match="only 19 of its 20 pictures can vote on a query that is in the bank, too"):
        evaluate(tiny_model, "digits[:20]", "digits[:20]", tmp_path, "fp32")


def test_geometry_is_of_the_queries_and_the_rank_of_the_bank(evaluation: Evaluation) -> None:
    bank, queries, figures = evaluation.bank, evaluation.queries, evaluation.report["figures"]
    assert figures["alignment"] == round(alignment(queries.embeddings, queries.labels) or 0, 4)
    assert figures["uniformity"] == round(uniformity(queries.embeddings), 4)
    assert figures["effective_rank"] == round(effective_rank(bank.embeddings), 4)
    probe = linear_probe(bank.embeddings, bank.labels, queries.embeddings, queries.labels)
    assert figures["linear_probe"] == round(probe, 4)


def test_the_headline_is_the_one_that_training_logs(evaluation: Evaluation, report: dict[str, Any]) -> None:
    bank, queries = evaluation.bank, evaluation.queries
    assert bank.pixels is not None
    assert queries.pixels is not None
    for row, rows in (
        (report["figures"], (bank.embeddings, queries.embeddings)),
        (report["baselines"]["raw_pixels"], (centred(bank.pixels), centred(queries.pixels))),
    ):
        expected = headline_accuracy(rows[0], bank.labels, rows[1], queries.labels)
        assert row["weighted_k20"] == pytest.approx(expected, abs=1.5 / 797)


def test_raw_pixels_are_scikit_learns_neighbours(report: dict[str, Any]) -> None:
    bank, queries = open_source(BANK), open_source(QUERIES)
    preprocessing = square_preprocessing(8)
    sklearn = KNeighborsClassifier(n_neighbors=5, algorithm="brute")
    sklearn.fit(read_pixels(bank, preprocessing).reshape(1000, -1).astype(np.float64), bank.labels)
    accuracy = sklearn.score(read_pixels(queries, preprocessing).reshape(797, -1).astype(np.float64), queries.labels)
    assert report["baselines"]["raw_pixels"]["k5"] == round(accuracy, 4)


def test_the_encoders_figure_is_scikit_learns_on_its_embeddings(report: dict[str, Any], tiny_card: Card) -> None:
    bank, queries = open_source(BANK), open_source(QUERIES)
    encoder = ServedEncoder(tiny_card, "cpu")
    sklearn = KNeighborsClassifier(n_neighbors=5, algorithm="brute", metric="cosine")
    sklearn.fit(encoder.encode(read_pixels(bank, tiny_card.preprocessing)), bank.labels)
    accuracy = sklearn.score(encoder.encode(read_pixels(queries, tiny_card.preprocessing)), queries.labels)
    # One near tie may fall either way.
    assert report["figures"]["k5"] == pytest.approx(accuracy, abs=1.5 / 797)


@pytest.mark.parametrize("grey", [(), ("bank",), ("queries",), ("bank", "queries")])
def test_nearest_pixels_is_the_order_of_all_distances(grey: tuple[str, ...]) -> None:
    random = np.random.default_rng(0)
    bank, queries = (random.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8) for count in (300, 40))
    for name, pixels in (("bank", bank), ("queries", queries)):
        if name in grey:
            pixels[...] = pixels[..., :1]
    difference = queries.reshape(40, 1, -1).astype(np.int64) - bank.reshape(1, 300, -1)
    expected = np.argsort((difference**2).sum(2), axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(nearest_pixels(bank, queries, 5), expected)


@pytest.mark.parametrize("count", [1, 50, 129])
def test_embed_leaves_no_picture_out(count: int, tiny_card: Card) -> None:
    encoder = ServedEncoder(tiny_card, "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    np.testing.assert_allclose(embed_pixels(encoder, pixels, "all"), encoder.encode(pixels), atol=1e-5)


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path, paint: Callable[..., bytes]) -> None:
    for number in range(6):
        paint(tmp_path / "a" / f"{number}.png", seed=number)
    (tmp_path / "a" / "4.png").write_bytes((tmp_path / "a" / "4.png").read_bytes()[:60])
    with pytest.raises(UndecodablePicture, match=r"a/4\.png: the picture is damaged"):
        read_pixels(open_source(str(tmp_path)), square_preprocessing(8))


def test_a_bank_too_small_to_vote_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidSource, match=r"digits\[:19\]: 19 pictures cannot vote among 20; .* 20 or more"):
        evaluate(tiny_model, "digits[:19]", QUERIES, tmp_path)
    found = evaluate(tiny_model, "digits[:199]", "digits[1700:]", tmp_path)
    rows = [found.report["figures"], *found.report["baselines"].values()]
    assert [row["weighted_k200"] for row in rows] == [None] * 4
    assert all(value is not None for key, value in rows[0].items() if key != "weighted_k200")
    (note,) = found.notes()
    assert "weighted_k200 is left out: it needs a bank of 200 pictures, not 199" in note


@pytest.mark.parametrize("role", ["bank", "queries"])
def test_pictures_that_no_figure_can_be_made_of_are_refused(
    role: str, tiny_model: Path, tmp_path: Path, paint: Callable[..., bytes]
) -> None:
    for number in range(20):
        paint(tmp_path / "loose" / f"{number}.png", seed=number)
        paint(tmp_path / "one" / "cat" / f"{number}.png", seed=number)
    for source, refusal in (
        (str(tmp_path / "loose"), "has no labels"),
        (str(tmp_path / "one"), "expected pictures of two classes or more, all are of 'cat'"),
        ("digits[5:5]", "holds none"),
    ):
        sources = {"bank": BANK, "queries": QUERIES} | {role: source}
        with pytest.raises(InvalidSource, match=refusal):
            evaluate(tiny_model, sources["bank"], sources["queries"], tmp_path)


def test_pictures_without_a_label_are_left_out_and_counted(
    tiny_model: Path, tmp_path: Path, paint: Callable[..., bytes]
) -> None:
    columns: dict[str, list[Any]] = {"image": [], "label": []}
    for number in range(36):
        columns["image"].append(paint(tmp_path / "set" / f"{number:02}.png", height=9, width=9, seed=number))
        columns["label"].append([None, "a", "b"][number % 3])
    pq.write_table(pa.table(columns), tmp_path / "set.parquet")
    found = evaluate(tiny_model, str(tmp_path / "set.parquet"), str(tmp_path / "set.parquet"), tmp_path)
    assert found.classes == ["a", "b"]
    assert [id[-2:] for id in found.queries.ids] == [f"{number:02}" for number in range(36) if number % 3]
    assert [found.classes[label] for label in found.bank.labels] == ["a", "b"] * 12
    assert found.report["bank"]["left_out"] == found.report["queries"]["left_out"] == {"without a label": 12}


def test_pictures_of_all_sizes_and_a_class_that_the_bank_lacks(
    tiny_model: Path, tmp_path: Path, paint: Callable[..., bytes]
) -> None:
    for number in range(24):
        paint(tmp_path / "bank" / "ab"[number % 2] / f"{number}.png", height=5 + number, width=30 - number, seed=number)
        paint(tmp_path / "queries" / "abc"[number % 3] / f"{number}.png", height=9, width=40, seed=number)
    found = evaluate(tiny_model, str(tmp_path / "bank"), str(tmp_path / "queries"), tmp_path)
    assert found.classes == ["a", "b", "c"]
    assert not (found.predicted == 2).any()
    assert any("8 queries are of classes that the bank does not have (c)" in note for note in found.notes())
    known = found.queries.labels != 2
    bank, queries = found.bank, found.queries
    rest = measure("rest", bank.embeddings, bank.labels, queries.embeddings[known], queries.labels[known]).figures
    figures = found.report["figures"]
    for key in ("map_at_r", "r_precision"):
        assert figures[key] == rest[key]
    for key in ("k5", "weighted_k20", "linear_probe", "recall_at_1"):
        assert figures[key] == pytest.approx((rest[key] or 0) * 16 / 24, abs=1e-4)


def test_embeddings_give_the_figures_of_their_pictures(
    embedded: Path, tiny_model: Path, evaluation: Evaluation, tmp_path: Path
) -> None:
    both = evaluate(tiny_model, f"{embedded}[:1000]", f"{embedded}[1000:]", tmp_path)
    assert both.report["figures"] == pytest.approx(evaluation.report["figures"], abs=2e-3)
    assert both.report["baselines"] is None
    assert both.report["bank"] == {"source": f"{embedded}[:1000]", "pictures": 1000, "left_out": {}}
    assert both.report["variant"] == "fp32"
    assert both.bank.pixels is None
    assert list(both.queries.ids) == list(evaluation.queries.ids)
    assert "raw pixels and the other encoders are left out" in both.notes()[0]
    mixed = evaluate(tiny_model, f"{embedded}[:1000]", QUERIES, tmp_path, "fp32")
    assert mixed.report["figures"] == pytest.approx(evaluation.report["figures"], abs=2e-3)
    assert mixed.report["baselines"] is None
    assert mixed.queries.pixels is not None


def test_embeddings_of_another_encoder_are_refused(embedded: Path, tiny_card: Card, tmp_path: Path) -> None:
    other = read_card(Path("models/mnist"))
    with pytest.raises(InvalidSource, match=f"encoder {tiny_card.fingerprint}, not of mnist, {other.fingerprint}"):
        evaluate(other.folder, "digits[:20]", str(embedded), tmp_path)


def test_a_variant_that_is_not_there_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="has no variant fp64"):
        evaluate(tiny_model, BANK, QUERIES, tmp_path, "fp64")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """run("evaluate", …) is the command line: exit code, stdout, stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["lookalike", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            lookalike.main()
        return int(end.value.code or 0), *capsys.readouterr()

    return command


def test_the_command_prints_a_table(
    run: Callable[..., tuple[int, str, str]], tiny_model: Path, report: dict[str, Any]
) -> None:
    command = ("evaluate", tiny_model, "--bank", BANK, "--queries", QUERIES, "--variant", "fp32")
    heading, columns, *rows = run(*command)[1].splitlines()
    assert heading == f"1000 of {BANK} vote on 797 of {QUERIES}; variant fp32"
    assert columns.split() == ["tiny", "raw", "pixels", "without", "whitening", "random", "encoder"]
    assert {row.split()[0] for row in rows} == FIGURES
    assert {"k5", "weighted_k20"} < {row.split()[0] for row in rows[:4]}
    for row in rows:
        key, *shown = row.split()
        measured = [report["figures"][key], *(figures[key] for figures in report["baselines"].values())]
        assert [float(figure) for figure in shown] == pytest.approx(measured, abs=2e-3)


def test_the_command_says_what_is_left_out(
    run: Callable[..., tuple[int, str, str]], tiny_model: Path, embedded: Path
) -> None:
    command = ("evaluate", tiny_model, "--bank", f"{embedded}[:50]", "--queries", f"{embedded}[50:]")
    code, table, notes = run(*command)
    assert code == 0
    assert [row.split()[1:] for row in table.splitlines() if row.startswith("weighted_k200")] == [["-"]]
    assert "note: weighted_k200 is left out: it needs a bank of 200 pictures, not 50\n" in notes
    assert "note: raw pixels and the other encoders are left out" in notes
    found = json.loads(run(*command, "--json")[1])
    assert found["baselines"] is found["figures"]["weighted_k200"] is None
    assert set(found["figures"]) == FIGURES


def test_the_command_lists_what_is_left_out_beside_its_figures(
    run: Callable[..., tuple[int, str, str]],
    tiny_model: Path,
    tmp_path: Path,
    paint: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number in range(48):
        folder = tmp_path / ("bank", "queries")[number // 24] / "ab"[number % 2]
        paint(folder / f"{number:02}.png", height=9, width=9, seed=number)
    raw = [tmp_path / side / "a" / "raw.cr2" for side in ("bank", "queries")]
    for file in raw:
        file.write_bytes(b"a camera's own format")
    monkeypatch.chdir(tmp_path)
    command = ("evaluate", tiny_model, "--bank", "bank", "--queries", "queries", "--json")
    code, printed, said = run(*command)
    listed = Path(".lookalike", "evaluate.left_out.jsonl")
    found = json.loads(printed)
    assert (code, found["lost"], found["listed_in"]) == (1, 2, str(listed))
    assert f"what was left out is listed in {listed}\n" in said
    assert [json.loads(line)["id"] for line in listed.read_text().splitlines()] == ["a/raw.cr2"] * 2
    # Where nothing can be written, the figures are printed all the same.
    shutil.rmtree(".lookalike")
    Path(".lookalike").write_text("a file")
    code, printed, said = run(*command)
    assert (code, json.loads(printed)["listed_in"]) == (1, None)
    assert f"note: {listed}: cannot be written: " in said
    Path(".lookalike").unlink()
    for file in raw:
        file.unlink()
    assert json.loads(run(*command)[1])["lost"] == 0
    assert not Path(".lookalike").exists()


def test_the_command_takes_the_picture_under_a_key_within_limits(
    run: Callable[..., tuple[int, str, str]],
    tiny_model: Path,
    tmp_path: Path,
    paint: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    files = []
    for number in range(48):
        data = [paint(tmp_path / f"{at}.png", height=9, width=9, seed=2 * number + at) for at in (0, 1)]
        files += [(f"{number:02}.{key}", one) for key, one in zip(("input.png", "mask.png"), data, strict=True)]
        files.append((f"{number:02}.cls", b"ab"[number % 2 : number % 2 + 1]))
    tar = tarred(tmp_path / "set.tar", files)
    command = ("evaluate", tiny_model, "--bank", f"{tar}[:24]", "--queries", f"{tar}[24:]")
    assert "no picture under the key depth" in run(*command, "--image-key", "depth")[2]
    assert "another picture of its sample: input.png: 96 (" in run(*command, "--image-key", "mask")[2]
    monkeypatch.setenv("LOOKALIKE_MAX_PIXELS", "10")
    code, _, said = run(*command)
    assert (code, "the limit is 10 pixels (LOOKALIKE_MAX_PIXELS)" in said) == (2, True)


def test_the_command_refuses_in_one_sentence(
    run: Callable[..., tuple[int, str, str]], tiny_model: Path, embedded: Path, tmp_path: Path
) -> None:
    (tmp_path / "part-00000.parquet").write_bytes((embedded / "part-00000.parquet").read_bytes()[:-100])
    for bank, refusal in (
        (tmp_path, f"{tmp_path}/part-00000.parquet: damaged: "),
        ("digits[:4]", "digits[:4]: 4 pictures cannot vote among 20; "),
        (f"{embedded}[4:4]", f"{embedded}[4:4]: the slice [4:4] of 1797 pictures holds none"),
    ):
        code, table, sentence = run("evaluate", tiny_model, "--bank", bank, "--queries", QUERIES)
        assert (code, table) == (2, "")
        assert sentence.startswith(f"lookalike: {refusal}")
        assert sentence.count("\n") == 1


def checked_random_encoder(card: Card, backbone: nn.Module) -> None:
    """The card's encoder untrained: other weights, of He's variance for the torch network's own fan-in."""
    drawn = randomised(card)
    assert drawn == randomised(card)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(drawn).graph.initializer}
    trained = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(card.model).graph.initializer
    }
    assert {name: value.shape for name, value in values.items()} == {name: v.shape for name, v in trained.items()}
    convolutions = {name: m for name, m in backbone.named_modules() if isinstance(m, nn.Conv2d)}
    assert convolutions
    for name, module in convolutions.items():
        weights = values[f"backbone.{name}.weight"]
        assert weights.shape == tuple(module.weight.shape)
        fan_in = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
        assert float(weights.std()) == pytest.approx(np.sqrt(2 / fan_in), rel=0.1)
        assert np.abs(weights - trained[f"backbone.{name}.weight"]).max() > 0.01

    pixels = read_pixels(open_source("digits[:200]"), card.preprocessing)
    random = ServedEncoder(replace(card, model=drawn, facts={}), "cpu")
    before, after = ServedEncoder(card, "cpu").encode(pixels), random.encode(pixels)
    assert after.shape == before.shape
    assert float((before * after).sum(1).max()) < 0.95
    # The embeddings are not one point.
    assert float(after.std(0).mean()) > 0.1 / np.sqrt(after.shape[1])
    assert float((after @ after.T).min()) < 0.95


def test_a_random_small_cnn(tiny_card: Card) -> None:
    checked_random_encoder(tiny_card, build_backbone("small-cnn", 1, 8).module)


@pytest.mark.slow("exports a resnet")
def test_a_random_resnet(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", 3, 8).module
    # Running statistics are as after training, not the identity of a new batch norm.
    with torch.no_grad():
        for _ in range(5):
            backbone(torch.randn(16, 3, 8, 8))
    export(
        Encoder(backbone, torch.full((3,), 0.3), torch.full((3,), 0.3), 3),
        None,
        square_preprocessing(8),
        {},
        tmp_path / "resnet",
    )
    checked_random_encoder(read_card(tmp_path / "resnet"), backbone)


@pytest.mark.parametrize(
    ("kind", "shape", "transposed"),
    [("MatMul", (800, 50), False), ("Gemm", (800, 50), False), ("Gemm", (50, 800), True)],
)
def test_matrices_and_biases_are_drawn_by_their_fan_in(
    kind: str, shape: tuple[int, int], transposed: bool, tiny_card: Card
) -> None:
    weights = numpy_helper.from_array(np.full(shape, 7, np.float32), "w")
    biases = [numpy_helper.from_array(np.full(50, 7, np.float32), "b")] if kind == "Gemm" else []
    node = helper.make_node(kind, ["x", "w", *(bias.name for bias in biases)], ["y"])
    if transposed:
        node.attribute.append(helper.make_attribute("transB", 1))
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", d]) for n, d in (("x", 800), ("y", 50)))
    model = helper.make_model(helper.make_graph([node], "g", [x], [y], [weights, *biases]))
    graph = onnx.load_from_string(randomised(replace(tiny_card, model=model.SerializeToString()))).graph
    drawn = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert float(drawn["w"].std()) == pytest.approx(np.sqrt(2 / 800), rel=0.03)
    assert abs(float(drawn["w"].mean())) < 0.002
    if biases:
        assert not drawn["b"].any()


def test_raw_mnist_under_the_small_protocol_is_0_9660(data_root: Path) -> None:
    bank = open_training_source("mnist/test[:8000]", data_root)
    queries = open_training_source("mnist/test[8000:]", data_root)
    preprocessing = square_preprocessing(28)
    found = nearest_pixels(read_pixels(bank, preprocessing), read_pixels(queries, preprocessing), 5)
    assert bank.labels is not None
    assert queries.labels is not None
    assert (vote(np.asarray(bank.labels)[found]) == np.asarray(queries.labels)).mean() == 0.9660
