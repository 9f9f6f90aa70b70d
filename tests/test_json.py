"""docs/json.md: the documented keys are those that the commands print."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import lookalike
from service.sources import open_source
from tests.conftest import MODEL, ROOT
from tests.test_lookalike import run

_ROWS = re.findall(r"^\| `([a-z ]+)` \| (.*) \| (.*) \|$", (ROOT / "docs" / "json.md").read_text(), re.MULTILINE)
ALWAYS = {verb: set(re.findall(r"`([^`]+)`", always)) for verb, always, _ in _ROWS}
MAYBE = {verb: set(re.findall(r"`([^`]+)`", maybe)) - {"card.json", "--sync"} for verb, _, maybe in _ROWS}


def keys(content: Any, path: str = "") -> Iterator[str]:
    """Every key of nested objects, as the page writes them."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield f"{path}{key}"
            yield from keys(value, f"{path}{key}.")
    elif isinstance(content, list):
        for value in content:
            yield from keys(value, f"{path.removesuffix('.')}[].")


def assert_as_promised(verb: str, content: Any) -> None:
    have = set(keys(content))
    assert ALWAYS[verb] <= have, ALWAYS[verb] - have
    names = tuple(key.removesuffix("*") for key in MAYBE[verb] if key.endswith(".*"))
    unknown = {key for key in have - ALWAYS[verb] - MAYBE[verb] if not key.startswith(names)}
    assert not unknown


def test_the_page_has_every_verb_with_json() -> None:
    def verbs(command: Any, name: str = "") -> Iterator[str]:
        for key, verb in getattr(command, "commands", {}).items():
            yield from verbs(verb, f"{name} {key}".strip())
        if any("--json" in option.opts for option in command.params):
            yield name

    assert set(verbs(typer.main.get_command(lookalike.cli))) == set(ALWAYS)


def test_search(tmp_path: Path) -> None:
    store, picture = tmp_path / "store", tmp_path / "seven.png"
    assert run("index", "digits[:20]", "--model", MODEL, "--store", store).returncode == 0
    picture.write_bytes(open_source("digits").entry(7).data)
    assert_as_promised("search", json.loads(run("search", picture, "--store", store, "--json").stdout))


def test_doctor(tmp_path: Path) -> None:
    assert_as_promised("doctor", json.loads(run("doctor", "--store", tmp_path / "none", "--json").stdout))


def test_duplicates(tmp_path: Path) -> None:
    store, pictures = tmp_path / "store", tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a.png", "b.png"):
        (pictures / name).write_bytes(open_source("digits").entry(7).data)
    assert run("index", pictures, "--model", MODEL, "--store", store).returncode == 0
    command = ("duplicates", "--store", store, "--preset", "exact", "--json")
    assert_as_promised("duplicates", json.loads(run(*command).stdout))
    assert run(*command, "--delete-rest", tmp_path / "list").returncode == 0
    done = json.loads(run(*command, "--delete-rest", tmp_path / "list", "--yes").stdout)
    assert done == {"items": ["b.png"], "files": [], "left": []}


def test_verbs_that_account_for_what_they_saw(tmp_path: Path) -> None:
    store, pictures, out = tmp_path / "store", tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    (pictures / "good.png").write_bytes(open_source("digits").entry(7).data)
    (pictures / "bad.png").write_bytes(b"no picture")
    done = run("index", pictures, "--model", MODEL, "--store", store, "--json")
    assert done.returncode == 1
    content = json.loads(done.stdout)
    assert_as_promised("index", content)
    assert (content["added"], content["left_out"]) == (1, {"not a picture that we take": 1})
    assert "left out, not a picture that we take: 1 (bad.png)" in done.stderr
    done = run("embed", pictures, "--model", MODEL, "--out", out, "--json")
    assert_as_promised("embed", json.loads(done.stdout))
    done = run("store", "import", out, "--store", tmp_path / "copy", "--model", MODEL, "--json")
    assert_as_promised("store import", json.loads(done.stdout))
    assert json.loads(done.stdout)["listed_in"] is None


def test_index_that_follows_a_folder(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "good.png").write_bytes(open_source("digits").entry(7).data)
    command = ("index", pictures, "--model", MODEL, "--store", tmp_path / "store", "--sync", "--json")
    content = json.loads(run(*command, "--dry-run").stdout)
    assert_as_promised("index", content)
    assert (content["dry_run"], content["changes"]["added"]) == (True, ["good.png"])
    assert json.loads(run(*command).stdout)["added"] == 1
    (pictures / "good.png").rename(pictures / "renamed.png")
    (pictures / "bad.png").write_bytes(b"no picture")
    done = run(*command)
    assert done.returncode == 1
    content = json.loads(done.stdout)
    assert_as_promised("index", content)
    assert content["changes"]["renamed"] == [{"id": "good.png", "to": "renamed.png"}]
    assert content["failures"][0]["id"] == "bad.png"


def test_info_of_every_encoder_that_comes_along() -> None:
    for model in sorted(path.parent for path in (ROOT / "models").glob("*/model.onnx")):
        assert_as_promised("info", json.loads(run("info", model, "--json").stdout))


@pytest.mark.slow("evaluates an encoder beside all its baselines")
def test_evaluate() -> None:
    pytest.importorskip("torch")
    command = ("evaluate", MODEL, "--bank", "digits[:60]", "--queries", "digits[60:80]", "--json")
    content = json.loads(run(*command).stdout)
    assert_as_promised("evaluate", content)
    assert all(set(figures) == set(content["figures"]) for figures in content["baselines"].values())
