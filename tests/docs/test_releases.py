"""Releases: the version stands in one place, and CHANGELOG.md has a section for each."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

from packaging.version import Version

from service import __version__
from tests.conftest import ROOT

HEADINGS = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_each_version_has_a_section_of_the_changelog() -> None:
    sections = [re.fullmatch(r"(\d+\.\d+\.\d+) – (unreleased|20\d\d-\d\d-\d\d)", heading) for heading in HEADINGS]
    assert all(sections), HEADINGS
    versions = [section[1] for section in sections if section]
    assert versions[0] == __version__
    assert versions == sorted(set(versions), key=Version, reverse=True)
    # Only the version that is being worked on has no date.
    assert all(section[2] != "unreleased" for section in sections[1:] if section)


def test_the_installed_version_is_that_of_the_code() -> None:
    assert importlib.metadata.version("lookalike") == __version__


def test_the_code_tells_its_version_where_it_is_not_installed(tmp_path: Path) -> None:
    """As in a bento: the code lies in a folder, and no installed package has its name."""
    program = (
        "import importlib.metadata\n"
        "real = importlib.metadata.distribution\n"
        "def distribution(name):\n"
        "    if name == 'lookalike': raise importlib.metadata.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "importlib.metadata.distribution = distribution\n"
        "from service.http.routes import create_app\n"
        "print(create_app().version)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{__version__}\n"
