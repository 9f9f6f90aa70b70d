"""What became of every file, row and member that a job saw: counted on stderr, and listed in a file."""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from service.errors import InvalidOutput, LookalikeError
from service.files import replace_file
from service.sources.source import LeftOut, Source

LEFT_OUT = "left_out.jsonl"
# So many names of each kind are shown on stderr; the file has all of them.
_SHOWN = 3
# What an error of one picture says about its kind, by the error's code.
_REASONS = {
    "empty_picture": "empty",
    "unsupported_format": "not a picture that we take",
    "too_large": "over a limit",
    "undecodable_picture": "damaged or unreadable",
    # Earlier versions of `embed` kept no codes.
    "": "damaged or unreadable",
    "no_embedding": "without an embedding",
}
_OTHERWISE = "not valid"


def left_out_beside(out: Path) -> Path:
    """Return the list of what a job left out that made the model folder `out`: OUT.left_out.jsonl, beside it."""
    return out.with_name(f"{out.name}.{LEFT_OUT}")


class Failure(NamedTuple):
    """A picture or row that could not be taken: its id in the source, the error's sentence and its code."""

    id: str
    error: str
    code: str = ""

    @classmethod
    def of(cls, id: str, error: LookalikeError) -> "Failure":
        """Return the failure of the picture with this id."""
        return cls(id, str(error), error.code)

    @property
    def reason(self) -> str:
        """A short text that all failures of its kind share."""
        return _REASONS.get(self.code, _OTHERWISE)


@dataclass
class Account:
    """What became of every file, row and member that a job saw.

    Attributes:
        added: taken now.
        replaced: taken now, in place of another picture of the same id.
        known: there already.
        failures: what could not be read, embedded or stored.
        left_out: what the sources saw and did not take for another reason.
        notes: sentences for the user.
        listed_in: the file that `save` wrote; None before, and if nothing was left out.
    """

    added: int = 0
    replaced: int = 0
    known: int = 0
    failures: list[Failure] = field(default_factory=list)
    left_out: list[Sequence[LeftOut]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    listed_in: Path | None = None

    @classmethod
    def of(cls, source: Source) -> "Account":
        """Begin the account of a source, with what the source itself left out."""
        notes = list(source.notes)
        if source.labels is not None and source.labels.missing:
            notes.append(f"{source.name}: {source.labels.missing} of {len(source)} pictures have no label")
        return cls(left_out=[source.left_out], notes=notes)

    def __add__(self, other: "Account") -> "Account":
        """Return the account of two sources together."""
        return Account(
            self.added + other.added,
            self.replaced + other.replaced,
            self.known + other.known,
            self.failures + other.failures,
            self.left_out + other.left_out,
            self.notes + other.notes,
        )

    @property
    def bad(self) -> int:
        """The number of pictures that could not be read, embedded or stored."""
        return len(self.failures)

    @property
    def lost(self) -> int:
        """The number of pictures, or what may be pictures, that the user wanted and did not get."""
        return self.bad + sum(one.lost for one in chain(*self.left_out))

    def facts(self) -> dict[str, Any]:
        """Return the account as `--json` prints it."""
        return {
            "added": self.added,
            "replaced": self.replaced,
            "known": self.known,
            "left_out": dict(self._counts().most_common()),
            "lost": self.lost,
            "listed_in": None if self.listed_in is None else str(self.listed_in),
        }

    def report(self) -> None:
        """Print on stderr what was left out, by reason, and the notes."""
        for reason, count in self._counts().most_common():
            names = islice((row["id"] for row in self._rows() if row["reason"] == reason), _SHOWN)
            more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
            print(f"left out, {reason}: {count} ({', '.join(names)}{more})", file=sys.stderr)
        if self.listed_in is not None:
            print(f"what was left out is listed in {self.listed_in}", file=sys.stderr)
        for note in self.notes:
            print(f"note: {note}", file=sys.stderr)

    def save(self, path: Path) -> None:
        """Write a line of JSON (id, reason, error, lost) for all that was left out.

        Without anything left out it removes an earlier list.

        Raises:
            InvalidOutput: the file cannot be written.
        """
        try:
            if not self.failures and not any(self.left_out):
                path.unlink(missing_ok=True)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows())
        except OSError as error:
            raise InvalidOutput(f"{path}: cannot be written: {error.strerror or error}") from error
        self.listed_in = path

    def _rows(self) -> Iterator[dict[str, Any]]:
        for failure in self.failures:
            error = printable(failure.error)
            yield {"id": printable(failure.id), "reason": failure.reason, "error": error, "lost": True}
        for one in chain(*self.left_out):
            yield {"id": printable(one.name), "reason": one.reason, "error": None, "lost": one.lost}

    def _counts(self) -> "Counter[str]":
        """Return the number of what was left out by reason."""
        return Counter(row["reason"] for row in self._rows())


def printable(name: str) -> str:
    r"""Return a name as text for people: bytes that are not UTF-8 and control characters as \x…, as in caf\xe9.jpg."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
