"""The page's first file names what the first view needs."""

import re
from pathlib import Path

from tests.conftest import ROOT

PAGE = ROOT / "service" / "page"


def imported(module: Path) -> set[Path]:
    """Return all modules that one imports, and those that they import, without itself."""
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        one = waiting.pop()
        for name in re.findall(r'^import [^;]*?from "(\.[^"]*)";', one.read_text(), re.MULTILINE):
            path = (one.parent / name).resolve()
            if path not in found:
                found.add(path)
                waiting.append(path)
    return found


def test_all_modules_of_the_first_view_are_preloaded() -> None:
    preloaded = re.findall(r'rel="modulepreload" href="page/([^"]*)"', (PAGE / "index.html").read_text())
    assert len(preloaded) == len(set(preloaded))
    assert {(PAGE / name).resolve() for name in preloaded} == imported(PAGE / "page.js")
