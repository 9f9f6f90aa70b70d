"""What the parts of an earlier `lookalike embed` hold of a source as it is now: kept, dropped, or embedded again."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from service import IntArray
from service.errors import InvalidOutput, LookalikeError
from service.jobs.description import Description
from service.jobs.parquet_parts import META
from service.jobs.part_folder import EMBEDDING, PartFolder
from service.jobs.reading import read_ahead
from service.sources.source import Source

# What was measured when a picture was embedded, beside its embedding.
MEASURED = pa.schema(
    {
        "width": pa.int32(),
        "height": pa.int32(),
        "digest": pa.string(),
        "size_bytes": pa.int64(),
        "modified": pa.timestamp("us", "UTC"),
    }
)
# Source ids become an Arrow array in pieces, which bounds the memory.
_IDS = 65_536


class Stamp(NamedTuple):
    """What tells cheaply that a picture has not changed; None for what its source does not tell.

    Attributes:
        size_bytes: of its file, if it has one of its own.
        modified: when its file, or the archive that holds it, was written last: microseconds since 1970.
    """

    size_bytes: int | None
    modified: int | None

    @classmethod
    def of(cls, source: Source, position: int) -> "Stamp":
        """Return the stamp of the picture at a position, as it is now."""
        try:
            status = source.place(position).stat() if source.place else None
        except (OSError, ValueError):
            status = None
        if status is None:
            return cls(None, None)
        return cls(status.st_size if source.in_files else None, status.st_mtime_ns // 1000)

    def agrees(self, size_bytes: int | None, modified: int | None) -> bool:
        """Return whether a picture with this stamp needs no second look."""
        return self.modified is not None and self.modified == modified and self.size_bytes in (None, size_bytes)


@dataclass
class Kept:
    """The outcome of `keep`.

    Attributes:
        todo: ascending positions of the pictures to embed.
        changed: those of them that had an embedding of other bytes.
        removed: the number of rows whose picture the source has no longer.
    """

    todo: Sequence[int]
    changed: frozenset[int] = frozenset()
    removed: int = 0


def keep(source: Source, parts: PartFolder, schema: Any, description: Description) -> Kept:
    """Bring the parts in step with a source as far as no picture has to be embedded.

    A row stays if its picture has the same id and size and time of change, or else the same bytes. All others leave.
    A kill at any moment leaves parts from which the same call goes on; they never hold an id twice.

    Args:
        source: the pictures.
        parts: of an earlier run, or none.
        schema: the columns that the parts are to have, embedding included.
        description: of the pictures.

    Raises:
        InvalidOutput: less than half of the rows are of this source, or a part cannot be read or written.
        InvalidSource: its other columns cannot be read.
    """
    if not parts.count:
        return Kept(range(len(source)))
    rows = _Rows(source, parts, schema, description)
    found = int((rows.positions >= 0).sum())
    if 2 * found < len(rows.positions):
        raise InvalidOutput(
            f"{parts.folder}: holds embeddings of another source: {found} of its {len(rows.positions)} pictures are in "
            f"{source.name}; choose another --out"
        )
    same, stamps = rows.compare()
    changed = frozenset(rows.positions[(rows.positions >= 0) & ~same].tolist())
    rows.rewrite(same, stamps, finished=not changed)
    done = np.zeros(len(source), bool)
    done[rows.positions[same]] = True
    return Kept(np.flatnonzero(~done).tolist(), changed, int((rows.positions < 0).sum()))


class _Rows:
    """All rows of the parts.

    Attributes:
        positions: (N,) of each row's picture in the source; −1 if there is none, or another row has it.
    """

    def __init__(self, source: Source, parts: PartFolder, schema: Any, description: Description) -> None:
        self._source, self._parts, self._schema, self._description = source, parts, schema, description
        small = [*description.own([]).column_names, *MEASURED.names]
        tables = []
        self._counts, self._usable = [], []
        for number in range(parts.count):
            have = parts.schema(number).names
            whole = parts.is_whole(number) and set(MEASURED.names) <= set(have)
            table = parts.read(number, [name for name in small if name in have])
            for name in set(small) - set(have):
                table = table.append_column(name, pa.nulls(len(table), schema.field(name).type))
            # Parts of an earlier version lack columns, and one that was killed while it was replaced lacks rows.
            self._usable.append(whole)
            self._counts.append(len(table) if whole else 0)
            tables.append(table.select(small).cast(pa.schema([schema.field(name) for name in small])))
        self._table = pa.concat_tables(
            [table if usable else table.slice(0, 0) for table, usable in zip(tables, self._usable, strict=True)]
        )
        self.positions = self._find()

    def _find(self) -> IntArray:
        if not len(self._table):
            return np.zeros(0, np.int64)
        ids = pa.chunked_array(
            [
                pa.array(
                    [id.encode("utf-8", "surrogateescape") for id in self._source.ids[at : at + _IDS]], pa.binary()
                )
                for at in range(0, len(self._source), _IDS)
            ]
        )
        found = pc.index_in(self._table["id"].cast(pa.binary()), value_set=ids.combine_chunks())
        positions = np.asarray(pc.fill_null(found, -1).to_numpy(), np.int64)
        first = np.zeros(len(positions), bool)
        first[np.unique(positions, return_index=True)[1]] = True
        return np.where(first, positions, -1)

    def compare(self) -> tuple[Any, dict[int, Stamp]]:
        """Return (N,) whether the picture of each row is the same, and the new stamps of those that had another one."""
        sizes, times = self._table["size_bytes"].to_pylist(), self._table["modified"].cast(pa.int64()).to_pylist()
        same = np.zeros(len(self.positions), bool)
        doubtful, stamps = [], {}
        for row, position in enumerate(self.positions.tolist()):
            if position >= 0:
                stamp = Stamp.of(self._source, position)
                same[row] = stamp.agrees(sizes[row], times[row])
                if not same[row]:
                    doubtful.append(row)
                    stamps[row] = stamp
        digests = self._table["digest"]

        def is_same(row: int) -> bool:
            data = self._source.entry(int(self.positions[row])).data
            return bool(hashlib.sha256(data).hexdigest() == digests[row].as_py())

        for chunk in read_ahead(doubtful, is_same):
            for row, outcome in chunk:
                # A picture that cannot be read now has no embedding now.
                same[row] = not isinstance(outcome, LookalikeError) and outcome
        renewed = {row: one for row, one in stamps.items() if same[row] and one.modified != times[row]}
        return same, renewed

    def rewrite(self, same: Any, stamps: dict[int, Stamp], finished: bool) -> None:
        """Write those parts again that lose rows, or whose rows the source describes otherwise.

        Args:
            same: (N,) the rows that stay.
            stamps: new stamps, by row.
            finished: whether parts that were all there still are; else the last part is written first.
        """
        starts = np.cumsum([0, *self._counts])
        outdated = ~same
        outdated[list(stamps)] = True
        outdated |= self._described_otherwise(same)
        last = self._parts.count - 1
        wanted = [
            number
            for number in range(self._parts.count)
            if outdated[starts[number] : starts[number + 1]].any() or not self._fits(number)
        ]
        was_finished = bool(self._parts.facts(last).get("last"))
        if was_finished and not finished:
            wanted = [last, *(number for number in wanted if number != last)]
        for number in wanted:
            rows = np.arange(starts[number], starts[number + 1])[same[starts[number] : starts[number + 1]]]
            table = self._part(number, rows, rows - starts[number], stamps)
            facts = self._parts.facts(number)
            facts["last"] = number == last and was_finished and finished
            self._parts.write(number, table.replace_schema_metadata({META: json.dumps(facts).encode()}))

    def _fits(self, number: int) -> bool:
        have = self._parts.schema(number)
        wanted = [field for field in self._schema if not (self._parts.npy and field.name == EMBEDDING)]
        return self._usable[number] and have.remove_metadata().equals(pa.schema(wanted))

    def _described_otherwise(self, same: Any) -> Any:
        """Return (N,) whether a row that stays has another label, caption or path now."""
        rows = np.flatnonzero(same)
        rows = rows[np.argsort(self.positions[rows], kind="stable")]
        now, earlier = self._description.own(self.positions[rows].tolist()), self._table.take(rows)
        differ = np.zeros(len(same), bool)
        for name in now.column_names:
            equal = pc.fill_null(pc.equal(now[name], earlier[name]), False)
            neither = pc.and_(pc.is_null(now[name]), pc.is_null(earlier[name]))
            differ[rows] |= ~pc.or_(equal, neither).to_numpy()
        return differ

    def _part(self, number: int, rows: IntArray, places: IntArray, stamps: dict[int, Stamp]) -> Any:
        """Return the rows of a part that stay, described again.

        Args:
            number: of the part.
            rows: (R,) numbers among all rows.
            places: (R,) numbers within the part.
        """
        if not len(rows):
            return self._schema.empty_table()
        order = np.argsort(self.positions[rows], kind="stable")
        rows, places = rows[order], places[order]
        columns = self._description.all(self.positions[rows].tolist())
        measured = self._parts.read(number, [EMBEDDING, *MEASURED.names]).take(places)
        times = measured["modified"].cast(pa.int64()).to_pylist()
        for place, row in enumerate(rows.tolist()):
            if row in stamps:
                times[place] = stamps[row].modified
        measured = measured.set_column(
            measured.column_names.index("modified"), "modified", pa.array(times, MEASURED.field("modified").type)
        )
        arrays = [(measured if name in measured.column_names else columns)[name] for name in self._schema.names]
        return pa.table(arrays, names=self._schema.names).cast(self._schema)
