"""The folder that `lookalike embed` writes, below a URL that fsspec writes, such as s3://bucket/embeddings."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pyarrow.parquet as pq

from service.account import Account
from service.errors import InvalidOutput, InvalidRequest
from service.jobs.parquet_parts import FAILURES, META, part_path, write_parquet
from service.jobs.part_folder import PartFolder
from service.sources.remote import filesystem, is_remote


def part_folder(out: Path | str, npy: bool = False) -> PartFolder:
    """Return the parts in a folder or below a URL.

    Raises:
        InvalidRequest: the format npy and a URL.
        InvalidOutput: no package here writes such URLs.
    """
    if not is_remote(str(out)):
        return PartFolder(Path(out), npy)
    if npy:
        raise InvalidRequest(f"{out}: the format npy is for folders; expected --format parquet with a URL")
    return RemoteParts(str(out))


class RemoteParts(PartFolder):
    """Parts as objects, each put as a whole. A store has no locks: one job at a time may write below a URL."""

    def __init__(self, url: str) -> None:
        try:
            self._files, self._root = filesystem(url)
        # Each store raises errors of its own.
        except Exception as error:
            raise InvalidOutput(f"{url}: cannot be written: {error}") from error
        super().__init__(Path(self._root))
        self.url = url

    def __enter__(self) -> Self:
        """Count the parts.

        Raises:
            InvalidOutput: there is something else below the URL, a part is missing, or it cannot be read.
        """
        try:
            # A listing that fsspec kept may be older than what another job wrote.
            self._files.invalidate_cache()
            names = [path.rpartition("/")[2] for path in self._files.find(self._root)]
        except FileNotFoundError:
            names = []
        except Exception as error:
            raise InvalidOutput(f"{self.url}: cannot be read: {error}") from error
        parts = sorted(name for name in names if name.startswith("part-"))
        strangers = [name for name in names if name not in (*parts, FAILURES)]
        if strangers:
            raise InvalidOutput(f"{self.url}: is not empty and not ours (it has {strangers[0]}); choose another --out")
        if parts != [part_path(self.folder, number).name for number in range(len(parts))]:
            raise InvalidOutput(f"{self.url}: a part is missing among {len(parts)}; choose another --out")
        self.count = len(parts)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def facts(self, number: int) -> dict[str, Any]:
        metadata = self.schema(number).metadata or {}
        if META not in metadata:
            raise InvalidOutput(f"{self._path(number)}: not a part that we wrote; choose another --out")
        return dict(json.loads(metadata[META]))

    def schema(self, number: int) -> Any:
        with self._opened(number) as file:
            return pq.read_schema(file)

    def read(self, number: int, columns: list[str]) -> Any:
        with self._opened(number) as file:
            return pq.read_table(file, columns=columns, use_threads=False)

    def write(self, number: int, table: Any) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            local = Path(scratch) / "part.parquet"
            write_parquet(table, local)
            self._put(self._path(number), local.read_bytes())
        self.count = max(self.count, number + 1)

    def list_left_out(self, account: Account) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            local = Path(scratch) / FAILURES
            account.save(local)
            path = f"{self._root}/{FAILURES}"
            if local.exists():
                self._put(path, local.read_bytes())
                account.listed_in = Path(path)
            else:
                self._remove(path)

    def _path(self, number: int) -> str:
        return f"{self._root}/{part_path(self.folder, number).name}"

    @contextmanager
    def _opened(self, number: int) -> Iterator[Any]:
        try:
            with self._files.open(self._path(number), "rb") as file:
                yield file
        except Exception as error:
            raise InvalidOutput(f"{self._path(number)}: cannot be read: {error}") from error

    def _put(self, path: str, content: bytes) -> None:
        try:
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(path, content)
        except Exception as error:
            raise InvalidOutput(f"{path}: cannot be written: {error}") from error

    def _remove(self, path: str) -> None:
        try:
            if self._files.exists(path):
                self._files.rm(path)
        except Exception as error:
            raise InvalidOutput(f"{path}: cannot be removed: {error}") from error
