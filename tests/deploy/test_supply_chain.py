"""What we depend on: no version with a known vulnerability, and no licence that Apache-2.0 cannot live with."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version

import pytest
from packaging.version import Version

from requirements.licences import HEAD, LOCK, PAGE, licence, locked
from tests.conftest import ROOT

LOCKS = {path.name: locked(path) for path in sorted((ROOT / "requirements").glob("*.txt"))}
FILE = tomllib.loads((ROOT / "requirements" / "floors.toml").read_text())
FLOORS: dict[str, list[str]] = FILE["floors"]
UNFIXED: dict[str, list[str]] = FILE["unfixed"]
ADVISORY = re.compile(r"CVE-20\d\d-\d{4,}|PYSEC-20\d\d-\d+|GHSA(-[23456789cfghjmpqrvwx]{4}){3}")
# LGPL: linked dynamically, in files that can be replaced. MPL: unchanged files.
ALLOWED = {
    *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSD-3-Clause-Clear", "CC0-1.0", "ISC", "LGPL-3.0-only"),
    *("MIT", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Zlib"),
}


def test_there_are_locks_to_check() -> None:
    assert len(LOCKS) >= 9
    assert all(len(lock) > 20 for lock in LOCKS.values())


@pytest.mark.parametrize("lock", LOCKS)
def test_no_package_is_below_its_floor(lock: str) -> None:
    below = {
        package: f"{locked_at} < {FLOORS[package][0]}: {FLOORS[package][1]}"
        for package, locked_at in LOCKS[lock].items()
        if package in FLOORS and Version(locked_at) < Version(FLOORS[package][0])
    }
    assert not below


@pytest.mark.parametrize("package", [*FLOORS, *UNFIXED])
def test_each_line_of_the_floors_is_complete(package: str) -> None:
    at, advisory, why = (FLOORS | UNFIXED)[package]
    assert str(Version(at)) == at
    assert ADVISORY.fullmatch(advisory)
    assert len(why) > 10
    # A line about a package that is gone is to be removed.
    assert any(package in lock for lock in LOCKS.values())


def test_the_floors_are_sorted() -> None:
    assert list(FLOORS) == sorted(FLOORS)


@pytest.mark.parametrize("package", UNFIXED)
def test_an_unfixed_vulnerability_is_that_of_the_locked_version(package: str) -> None:
    assert {lock[package] for lock in LOCKS.values() if package in lock} == {UNFIXED[package][0]}
    assert package not in FLOORS


def listed() -> dict[str, tuple[str, str]]:
    """Return the version and the licence of each package on the page."""
    rows = [line.strip("|").split("|") for line in PAGE.read_text().partition(HEAD)[2].splitlines()]
    return {package.strip(): (at.strip(), terms.strip()) for package, at, terms in rows}


def test_the_licences_are_those_of_the_lock() -> None:
    assert {package: at for package, (at, _) in listed().items()} == LOCKS[LOCK.name], "run `make lock`"


def test_the_licences_are_those_that_the_packages_state() -> None:
    checked = 0
    for package, (at, terms) in listed().items():
        try:
            # The sets of other environments may have another version.
            if version(package) != at:
                continue
        except PackageNotFoundError:
            continue
        assert licence(package) == terms, package
        checked += 1
    assert checked > 60


@pytest.mark.parametrize("package", sorted(listed()))
def test_each_licence_is_allowed(package: str) -> None:
    terms = listed()[package][1]
    assert set(re.findall(r"[\w.-]+", terms)) - {"AND", "OR"} <= ALLOWED, terms


def test_the_image_has_no_package_without_a_licence() -> None:
    assert set(LOCKS["image-cpu.txt"]) <= set(listed())
