"""`lookalike duplicates`: groups as text, JSON, CSV, a shell script or an HTML sheet, and the list for a removal."""

import base64
import csv
import html
import io
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from service.account import printable
from service.duplicates import Group, Preset, find_groups, threshold_of
from service.encoder_choice import find_model
from service.encoding.card import read_card
from service.errors import InvalidOutput, LookalikeError
from service.files import write_file
from service.jobs.removal import Staying, check_best
from service.originals import folders, own_file
from service.settings import Settings
from service.store.catalog import read_meta
from service.store.catalog_reader import CatalogReader
from service.store.layout import current

_COLUMNS = (
    "group",
    "keep",
    "id",
    "score",
    "exact",
    "width",
    "height",
    "size_bytes",
    "format",
    "date",
    "source",
    "reason",
)
# What a spreadsheet may take for the start of a formula, the full-width forms included.
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
# A sheet of more pictures opens in no browser.
_MOST_IN_A_SHEET = 1000

_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Duplicates</title>
<style>
 body { font: 14px sans-serif; margin: 1em }
 section { display: flex; flex-wrap: wrap; gap: 1em; border-top: 1px solid #ccc; padding: 1em 0 }
 figure { margin: 0; max-width: 14em; overflow-wrap: anywhere }
 .best { outline: 3px solid #2a7; outline-offset: 4px }
</style>
"""


@dataclass(frozen=True)
class Duplicates:
    """The groups of a store, to be shown and written.

    Attributes:
        store: its folder, for messages.
        folder: of its generation.
        threshold: least score of two pictures of a group.
        sequence: number of the last change of the store that they take into account.
        groups: the groups.
    """

    store: Path
    folder: Path
    threshold: float
    sequence: int
    groups: Sequence[Group]

    def shown(self) -> dict[str, Any]:
        """Return the groups as --json shows them."""
        groups = [group.shown() for group in self.groups]
        return {"threshold": self.threshold, "sequence": self.sequence, "groups": groups}

    def lines(self) -> Iterator[str]:
        """Yield lines for people."""
        for group in self.groups:
            yield f"{printable(group.best.item.id)}  keep: {group.reason}"
            for copy in group.rest:
                yield f"  {'same bytes' if copy.exact else f'{copy.score:.4f}'}  {printable(copy.item.id)}"

    def write(self, csv: Path | None, html: Path | None, script: Path | None, plan: Path | None) -> list[str]:
        """Write the files that are wanted, and return sentences about them and the groups.

        Raises:
            InvalidOutput: a file cannot be written.
            InvalidStore: the catalog cannot be read.
        """
        items = sum(len(group.copies) for group in self.groups)
        notes = [f"{self.store}: {len(self.groups)} groups of {items} pictures with scores from {self.threshold:g} on"]
        with closing(CatalogReader(self.folder)) as reader:
            if csv is not None:
                write_csv(self.groups, csv)
            if html is not None and (lacking := write_html(self.groups, reader, html)):
                notes.append(f"{html}: without the last {lacking} groups")
            if script is not None:
                count, left = write_script(self.groups, read_meta(self.folder), reader, script)
                notes.append(f"{script}: removes {count} files; {left} are left, each for the reason that it names")
            if plan is not None:
                count = write_plan(self.groups, plan)
                notes.append(f"{plan}: lists {count} items; nothing is removed; read it, then add --yes to remove them")
        return notes


def search(settings: Settings, preset: Preset, threshold: float | None) -> Duplicates:
    """Find the groups of the store that the settings name, with progress on stderr.

    Args:
        settings: name the store. A service may use it.
        preset: decides about the threshold if none is given.
        threshold: least score of two pictures of a group.

    Raises:
        InvalidModel, InvalidRequest, InvalidStore: as `find_groups` and `threshold_of`.
    """
    folder = current(settings.store)
    if threshold is None:
        facts = {} if preset == "exact" else read_card(find_model(settings)).facts
        threshold = threshold_of(preset, facts, folder)
    with tqdm(total=1, desc="comparing", disable=None, leave=False, bar_format="{desc} {percentage:3.0f} %") as bar:
        found = find_groups(folder, threshold, progress=lambda share: bar.update(share - bar.n))
        return Duplicates(settings.store, folder, threshold, found.sequence, [*found.groups])


def write_csv(groups: Sequence[Group], path: Path) -> None:
    """Write a row for each item. A cell that a spreadsheet would take for a formula begins with an apostrophe.

    Raises:
        InvalidOutput: the file cannot be written.
    """
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(_COLUMNS)
    for number, group in enumerate(groups, 1):
        for copy in group.copies:
            keep, reason = ("yes", group.reason) if copy is group.best else ("no", "")
            cells = (
                number,
                keep,
                copy.item.id,
                round(copy.score, 4),
                copy.exact,
                *copy.facts,
                copy.item.source,
                reason,
            )
            rows.writerow([*map(_harmless, cells)])
    _write(path, text.getvalue())


def _harmless(cell: Any) -> str:
    text = "" if cell is None else str(cell)
    # Some spreadsheets skip spaces and control characters before a formula.
    begins = text.lstrip("".join(map(chr, range(33))))
    return (
        "'" + text
        if (begins.startswith(_FORMULA) and not _is_number(text)) or (text[:1] in "\t\r\n" and text)
        else text
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def write_html(groups: Sequence[Group], reader: CatalogReader, path: Path) -> int:
    """Write a sheet with the thumbnails of the first 1,000 groups, and return how many it lacks.

    Raises:
        InvalidOutput: the file cannot be written.
        InvalidStore: the catalog cannot be read.
    """
    parts = [_HEAD, f"<h1>{len(groups)} groups</h1>\n"]
    lacking = max(0, len(groups) - _MOST_IN_A_SHEET)
    if lacking:
        parts.append(f"<p>The last {lacking} are not shown here.</p>\n")
    for group in groups[:_MOST_IN_A_SHEET]:
        parts.append("<section>\n")
        for copy in group.copies:
            best = copy is group.best
            data = base64.b64encode(reader.thumbnail(copy.item.id) or b"").decode()
            size = "" if copy.facts.width is None else f"{copy.facts.width}×{copy.facts.height} "
            said = [f"keep: {group.reason}" if best else "same bytes" if copy.exact else f"{copy.score:.4f}"]
            said += [f"{size}{copy.facts.format or ''}", copy.item.id]
            parts.append(f"<figure{' class=best' if best else ''}>")
            parts.append(f'<img alt="" src="data:image/webp;base64,{data}">' if data else "")
            parts.append(
                f"<figcaption>{'<br>'.join(html.escape(printable(one)) for one in said)}</figcaption></figure>\n"
            )
        parts.append("</section>\n")
    _write(path, "".join(parts))
    return lacking


def write_script(groups: Sequence[Group], facts: dict[str, str], reader: CatalogReader, path: Path) -> tuple[int, int]:
    """Write a shell script that removes the files of all but the best copies; return how many it removes and leaves.

    A file is removed only if `index` recorded it, its bytes are those that were indexed, and the best copy can be read.
    The script names every other one in a comment.

    Raises:
        InvalidOutput: the file cannot be written.
    """
    known, removed, left = folders(facts), 0, 0
    removing = {copy.item.id for group in groups for copy in group.rest}
    staying = Staying(reader, removing, {copy.item.digest for group in groups for copy in group.rest})
    lines = [
        "#!/bin/sh",
        "# Removes the files of all but the best copy of each group. Read it before you run it.",
        "set -eu",
    ]
    for group in groups:
        lines.append(f"# keep {printable(group.best.item.id)}: {printable(group.reason)}")
        for copy in group.rest:
            try:
                check_best(group.best.item, reader)
                file = own_file(copy.item, known)
                staying.check(file)
                lines.append(f"rm -- {shlex.quote(str(file))}")
                removed += 1
            except LookalikeError as error:
                left += 1
                lines.append(f"# not removed, {printable(copy.item.id)}: {printable(str(error))}")
    _write(path, "\n".join(lines) + "\n")
    return removed, left


def write_plan(groups: Sequence[Group], path: Path) -> int:
    """Write the list that `delete_rest` needs: a line of JSON for each item to remove. Return their number.

    Raises:
        InvalidOutput: the file cannot be written.
    """
    rows = [
        {
            "remove": copy.item.id,
            "digest": copy.item.digest,
            "keep": group.best.item.id,
            "keep_digest": group.best.item.digest,
            "score": round(copy.score, 4),
            "reason": group.reason,
            "file": copy.item.source,
        }
        for group in groups
        for copy in group.rest
    ]
    _write(path, "".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def _write(path: Path, text: str) -> None:
    try:
        # A source may have bytes that are not UTF-8.
        write_file(path, text.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise InvalidOutput(f"{path}: cannot be written: {error.strerror or error}") from error
