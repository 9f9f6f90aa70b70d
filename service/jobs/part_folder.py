"""The folder that `lookalike embed` writes: numbered parts, each there as a whole or not at all.

In the format parquet, part-00000.parquet and so on are tables with a column `embedding`. In the format npy, the layout
of clip-retrieval, img_emb/img_emb_0.npy holds the embeddings of the rows of metadata/metadata_0.parquet.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from service.account import Account
from service.errors import InvalidOutput, InvalidSource
from service.files import replace_file
from service.jobs.parquet_parts import FAILURES, META, part_path, read_facts, write_parquet

_TABLES, _MATRICES = "metadata", "img_emb"
EMBEDDING = "embedding"


class PartFolder:
    """The parts in a folder, in order, while one process writes them. A context that holds the folder's lock.

    Attributes:
        folder: is made if it is missing.
        npy: whether the format is npy.
        count: the number of parts.
    """

    def __init__(self, folder: Path, npy: bool = False) -> None:
        self.folder, self.npy, self.count = folder, npy, 0
        self._guard = -1

    def __enter__(self) -> Self:
        """Lock the folder, and count its parts.

        Raises:
            InvalidOutput: it holds something else, lacks a part, another process writes it, or it cannot be used.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise InvalidOutput(f"{self.folder}: is a file; --out names a folder of Parquet parts")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check()
            # Closing the descriptor releases the lock, as does the end of the process.
            self._guard = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._guard)
            raise InvalidOutput(f"{self.folder}: another `lookalike embed` writes it; wait for its end") from error
        except OSError as error:
            raise InvalidOutput(f"{self.folder}: cannot be used: {error.strerror or error}") from error
        try:
            self.count = self._count()
        except BaseException:
            os.close(self._guard)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._guard)

    def facts(self, number: int) -> dict[str, Any]:
        """Return the facts that a part holds about itself. Raises InvalidOutput if we did not write it."""
        path = self._table_path(number)
        try:
            facts = read_facts(path)
        except InvalidSource as error:
            raise InvalidOutput(f"{path}: not a part that we wrote; choose another --out") from error
        if facts is None:
            raise InvalidOutput(f"{path}: not a part that we wrote; choose another --out")
        return facts

    def schema(self, number: int) -> Any:
        """Return the columns of a part, without the embedding in the format npy; its metadata are the facts."""
        return pq.read_schema(self._table_path(number))

    def type(self, number: int) -> Any:
        """Return the type of a part's embeddings: a list of a fixed number of float32 or float16."""
        if not self.npy:
            return self.schema(number).field(EMBEDDING).type
        matrix = self._matrix(number)
        return pa.list_(pa.from_numpy_dtype(matrix.dtype), matrix.shape[1])

    def is_whole(self, number: int) -> bool:
        """Return whether the two files of a part belong together: only a kill between them leaves others."""
        if not self.npy:
            return True
        try:
            return bool(len(self._matrix(number)) == pq.read_metadata(self._table_path(number)).num_rows)
        except (OSError, ValueError):
            return False

    def read(self, number: int, columns: list[str]) -> Any:
        """Return columns of a part as a pa.Table. Raises InvalidOutput if it is damaged."""
        path = self._table_path(number)
        try:
            with pq.ParquetFile(path) as file:
                wanted = [name for name in columns if not (self.npy and name == EMBEDDING)]
                table = file.read(wanted, use_threads=False)
            if self.npy and EMBEDDING in columns:
                matrix = self._matrix(number)
                rows = pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1])
                table = table.append_column(EMBEDDING, rows).select(columns)
            return table
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise InvalidOutput(f"{path}: cannot be read: {error}") from error

    def write(self, number: int, table: Any) -> None:
        """Write a part, or replace it.

        Args:
            number: of the part; `count` for the next one.
            table: its rows, with a column `embedding`, and the facts in its schema's metadata.

        Raises:
            InvalidOutput: it cannot be written.
        """
        if self.npy:
            rows = table[EMBEDDING].combine_chunks()
            matrix = rows.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), rows.type.list_size)
            path = self.folder / _MATRICES / f"{_MATRICES}_{number}.npy"
            try:
                path.parent.mkdir(exist_ok=True)
                with replace_file(path) as temporary, temporary.open("wb") as file:
                    np.save(file, matrix)
            except OSError as error:
                raise InvalidOutput(f"{path}: cannot be written: {error.strerror or error}") from error
            table = table.drop_columns([EMBEDDING])
        write_parquet(table, self._table_path(number))
        self.count = max(self.count, number + 1)

    def mark_finished(self) -> None:
        """Write into the last part that all others are there."""
        number = self.count - 1
        table = self.read(number, [*self.schema(number).names, *([EMBEDDING] if self.npy else [])])
        facts = self.facts(number) | {"last": True}
        self.write(number, table.replace_schema_metadata({META: json.dumps(facts).encode()}))

    def list_left_out(self, account: Account) -> None:
        """Write what a job left out beside the parts."""
        account.save(self.folder / FAILURES)

    def _table_path(self, number: int) -> Path:
        return self.folder / _TABLES / f"{_TABLES}_{number}.parquet" if self.npy else part_path(self.folder, number)

    def _matrix(self, number: int) -> Any:
        matrix = np.load(self.folder / _MATRICES / f"{_MATRICES}_{number}.npy", mmap_mode="r", allow_pickle=False)
        if matrix.ndim != 2:
            raise ValueError(f"expected rows of numbers, got {matrix.shape}")
        return matrix

    def _check(self) -> None:
        parts = (_MATRICES, _TABLES) if self.npy else (".parquet", ".parquet.tmp")
        ours = (*parts, FAILURES, f"{FAILURES}.tmp")
        strangers = [
            path.name
            for path in self.folder.iterdir()
            if not (path.name in ours if self.npy else path.name.endswith(ours))
        ]
        if strangers:
            raise InvalidOutput(
                f"{self.folder}: is not empty and not ours (it has {strangers[0]}); choose another --out"
            )

    def _count(self) -> int:
        """Return the number of parts. What a killed process left of a part is removed."""
        for temporary in self.folder.rglob("*.tmp"):
            temporary.unlink()
        count = 0
        while self._table_path(count).exists():
            self.facts(count)
            count += 1
        found = len([*self._table_path(0).parent.glob(f"{_TABLES}_*.parquet" if self.npy else "part-*.parquet")])
        if found != count:
            raise InvalidOutput(
                f"{self.folder}: {self._table_path(count).name} is missing among {found} parts; choose another --out"
            )
        return count
