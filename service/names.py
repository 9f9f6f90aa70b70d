"""A name that nobody knows → a sentence that names the nearest known one."""

import difflib
from collections.abc import Collection

# The nearest name of a longer one would be found just as slowly as it is useless.
_LONGEST = 40


def unknown(kind: str, name: str, known: Collection[str]) -> str:
    """Return what to say about an unknown name. It repeats our names alone, never the client's.

    Args:
        kind: what the name is, such as "a parameter".
        name: as the client wrote it.
        known: the names that exist in its place.
    """
    if not known:
        return f"{kind} that is not known here, where there are none"
    near = difflib.get_close_matches(name[:_LONGEST].lower(), known, 1)
    expected = f"the nearest is {near[0]}" if near else f"expected {_one_of(sorted(known))}"
    return f"{kind} that is not known here; {expected}"


def _one_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
