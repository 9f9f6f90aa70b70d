"""Several files as one source: patterns such as train-{000..009}.tar, and names that tell the files apart."""

import math
import os
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from service.errors import InvalidSource

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_FILES = 100_000


def expand(pattern: str) -> list[Path]:
    """Return the files that a pattern names: ten for train-{000..009}.tar, none without an {A..B}.

    Raises:
        InvalidSource: one of the files does not exist.
    """
    # re.split alternates: text, first, last, text, first, last, text.
    texts = _RANGE.split(pattern)
    spans = [_span(first, last) for first, last in zip(texts[1::3], texts[2::3], strict=True)]
    if not spans:
        return []
    count = math.prod(len(numbers) for numbers, _ in spans)
    if not 1 <= count <= _MOST_FILES:
        raise InvalidSource(f"{pattern}: names {count} files; expected 1 to {_MOST_FILES}, as in {{000..009}}")
    paths = []
    for numbers in product(*(numbers for numbers, _ in spans)):
        filled = zip(numbers, spans, texts[3::3], strict=True)
        paths.append(Path(texts[0] + "".join(f"{number:0{width}d}{text}" for number, (_, width), text in filled)))
    missing = [path for path in paths if not path.is_file()]
    if len(missing) == count:
        raise InvalidSource(f"{pattern}: none of its {count} files is there; looked for {paths[0]} to {paths[-1]}")
    if missing:
        others = f", nor are {len(missing) - 1} others" if len(missing) > 1 else ""
        raise InvalidSource(f"{pattern}: {missing[0]} is not there{others}; the pattern names {count} files")
    return paths


def stems(paths: Sequence[Path]) -> list[str]:
    """Return paths relative to the common parent folder, without their suffixes: they tell the files apart."""
    shared = os.path.commonpath([path.parent for path in paths])
    return [Path(os.path.relpath(path, shared)).with_suffix("").as_posix() for path in paths]


def _span(first: str, last: str) -> tuple[range, int]:
    """Return the numbers of {first..last} and the width to pad them to: 0 unless a bound has a leading zero."""
    padded = any(len(bound) > 1 and bound.startswith("0") for bound in (first, last))
    return range(int(first), int(last) + 1), max(len(first), len(last)) if padded else 0
