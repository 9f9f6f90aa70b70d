"""README is executed: its commands print the output that it shows; every verb, route and file of the tree is in it."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from playwright.sync_api import Browser

from lookalike import cli, store_cli
from service.http.routes import create_app
from tests.conftest import ROOT, missing
from tests.serving import LOOKALIKE, serving
from training.methods import METHODS

README = (ROOT / "README.md").read_text()


# In the order of the columns in README's table of figures.
OTHERS = ("raw_pixels", "without_whitening", "random_encoder")


class Block(NamedTuple):
    """A fenced block of README: its language, the mark behind it (no-test, mnist or none), and its text."""

    kind: str
    mark: str
    text: str


BLOCKS = [Block(*match) for match in re.findall(r"^```(\w+)[ ]?([\w-]*)\n(.*?)^```$", README, re.M | re.S)]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Return the port of a digits gallery, indexed and served by the real commands as `make serve` does."""
    with serving(tmp_path_factory.mktemp("readme"), "digits", ROOT / "models" / "digits") as url:
        yield int(url.rpartition(":")[2])


def test_the_table_of_methods_has_each_of_them_once() -> None:
    table = README.split("| `method` | learns from | source |")[1].split("\n\n")[0]
    listed = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(listed) == sorted(METHODS)


def matches(expected: Any, actual: Any) -> bool:
    """Compare JSON: numbers to a thousandth; … in a text stands for any characters, as a key for any other keys."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        # "…" stands for further keys that are not shown.
        if expected.get("…") == "…":
            return all(name in actual and matches(expected[name], actual[name]) for name in expected if name != "…")
        return set(expected) == set(actual) and all(matches(expected[key], actual[key]) for key in expected)
    if isinstance(expected, list) and isinstance(actual, list):
        return len(expected) == len(actual) and all(map(matches, expected, actual))
    if isinstance(expected, str) and isinstance(actual, str):
        return re.fullmatch(".*".join(map(re.escape, expected.split("…"))), actual, re.S) is not None
    if isinstance(expected, float):
        return isinstance(actual, float) and abs(expected - actual) < 1e-3
    return bool(expected == actual)


def run_js(browser: Browser, port: int, text: str) -> str:
    """Run a snippet as the body of an async function in a page of the service; return its result as JSON."""
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{port}/")
    found = page.evaluate(f"async () => {{ {text} }}")
    page.close()
    return json.dumps(found)


@pytest.mark.slow("indexes and serves a gallery, and runs every command against it")
def test_the_commands_answer_what_the_readme_says(port: int, tmp_path: Path, browser: Browser) -> None:
    ran: Counter[str] = Counter()
    for block, answer in zip(BLOCKS, [*BLOCKS[1:], Block("", "", "")], strict=True):
        if block.kind not in ("sh", "python", "js") or block.mark:
            continue
        text = block.text.replace("127.0.0.1:3000", f"127.0.0.1:{port}")
        if block.kind == "js":
            printed = run_js(browser, port, text)
        else:
            command = ["bash", "-ec", text] if block.kind == "sh" else [sys.executable, "-c", text]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
            printed = done.stdout
        ran[block.kind] += 1
        if answer.kind == "json":
            assert matches(json.loads(answer.text), json.loads(printed)), f"{block.text}\nanswered\n{printed}"
        elif answer.kind == "text":
            assert matches(answer.text, printed), f"{block.text}\nanswered\n{printed}"
    assert ran["sh"] >= 12
    assert (ran["python"], ran["js"]) == (2, 1)


@pytest.mark.slow("embeds ten thousand digits")
def test_the_figures_of_the_shipped_encoder(data_root: Path) -> None:
    """The evaluate commands print the table that the README shows, and it is at least as good as promised."""
    (block,) = [block for block in BLOCKS if block.mark == "mnist"]
    figures = []
    # The second, of 60,000 and 10,000 pictures, takes minutes: `make figures`.
    for line in block.text.splitlines()[: None if os.environ.get("LOOKALIKE_FIGURES") else 1]:
        command: list[str | Path] = [LOOKALIKE, *shlex.split(line)[1:], "--data-root", data_root, "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        report = json.loads(done.stdout)
        row = [report["figures"]["k5"], *(report["baselines"][name]["k5"] for name in OTHERS)]
        figures.append(row)
        shown = " | ".join(f"{figure:.4f}" for figure in row)
        assert f"| {shown} |" in README, f"{line}\nprinted {shown}"
    assert figures[0][0] >= 0.980
    assert figures[0][1] == 0.9660
    assert all(row[0] >= 0.991 for row in figures[1:])


def test_every_verb_is_in_the_readme() -> None:
    names = {command.name or command.callback.__name__ for command in cli.registered_commands if command.callback}
    assert names == {
        "pretrain",
        "export",
        "import",
        "evaluate",
        "embed",
        "index",
        "reindex",
        "search",
        "duplicates",
        "serve",
        "info",
        "whiten",
        "try",
        "doctor",
    }
    names |= {
        f"store {command.name or command.callback.__name__}"
        for command in store_cli.registered_commands
        if command.callback
    }
    verbs = {"check", "export", "import", "backup", "restore", "rollback", "prune"}
    assert {f"store {verb}" for verb in verbs} <= names
    for name in names:
        assert re.search(rf"`lookalike {name} ", README), name


def test_every_route_is_in_the_readme() -> None:
    paths = create_app().openapi()["paths"]
    routes = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    routes |= {"GET /livez", "GET /readyz", "GET /metrics", "GET /docs", "GET /openapi.json"}
    assert len(routes) >= 13
    for route in routes:
        assert re.search(rf"`{re.escape(route)}[`?]", README), route


def test_the_tree_in_the_readme_is_the_tree() -> None:
    tree = README.split("## How it is laid out")[1]
    for folder in ("service", "training"):
        for path in (ROOT / folder).glob("**/*.py"):
            if path.parent.name in ("routes", "methods"):
                continue
            if path.name != "__init__.py":
                assert path.name in tree, path


def test_every_link_leads_to_a_file_and_a_heading() -> None:
    for document in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("models/*.md")]:
        for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
            if "://" in target:
                continue
            name, _, heading = target.partition("#")
            path = document.parent / name if name else document
            assert path.exists(), f"{document}: {target}"
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if heading else []
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not heading or heading in anchors, f"{document}: {target}"


def test_nothing_of_this_machine_is_committed() -> None:
    """No host of a package index and no absolute path in the files that git tracks."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not tracked:
        missing("not a git checkout: clone the project to test what git tracks")
    forbidden = [str(ROOT), "/simp" + "le/"]
    for name in filter(None, tracked.split("\0")):
        path = ROOT / name
        if path.suffix in (".onnx", ".png") or not path.is_file():
            continue
        text = path.read_text(errors="replace")
        for word in forbidden:
            assert word not in text, f"{name} has {word}"
