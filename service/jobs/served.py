"""The jobs of a store that is being served: `index`, `store import` and `store export` through the service."""

import hashlib
import json
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from service import items
from service.account import LEFT_OUT, Account, Failure, printable
from service.client import Client
from service.client.uploader import ahead
from service.client.wire import EmbeddedUpload, Included, ServedItem, Upload
from service.encoding.card import read_card
from service.errors import InvalidRequest, ItemNotFound, LookalikeError, Outcome, StoreMismatch, attempt
from service.file_facts import FileFacts
from service.jobs.naming import PREFIXES, Collection, Naming, choose_names, prefix_of
from service.jobs.reading import progress, read_ahead
from service.jobs.transfer import chunks_of, export_row, parquet_files, write_export
from service.rows import item_of_row
from service.sources import origin_of
from service.sources.source import Source
from service.store import Item, Known, NewItem

_FACTS: tuple[Included, ...] = ("digest", "source", "variant")
# What a sync compares, and names need.
_OF_FILES: tuple[Included, ...] = (*_FACTS, "file")
# Items of one file of an export, which have their pictures.
_ROWS_PER_PART = 1024


class ServedItems:
    """The items of a service as they were at the start of a job, without embeddings: naming.Items over HTTP.

    Attributes:
        dimension: D of an embedding.
        fingerprint, model: of the encoder.
        noted: the facts that `note` was told. The service has no place for them; see `facts`.
    """

    def __init__(self, client: Client, origin: str = "") -> None:
        """List all items.

        Args:
            client: of the service.
            origin: of the source whose pictures are to be named.

        Cost: a request for every 1,000 items, and their metadata in memory.
        """
        facts = client.info()
        self.dimension, self.fingerprint, self.model = int(facts["dimension"]), facts["fingerprint"], facts["model"]
        self._limits, self._origin = facts["limits"], origin
        self._items = {
            one.id: Item(
                one.id,
                one.metadata,
                one.source,
                one.digest or "",
                one.variant or "",
                facts=one.facts or FileFacts(),
                mtime_ns=one.mtime_ns,
            )
            for one in client.items(include=_OF_FILES)
        }

    @property
    def store(self) -> "ServedItems":
        """The items."""
        return self

    def check_id(self, id: str) -> str:
        """Return an id in composed form. Raises InvalidRequest as `items.check_id`."""
        return items.check_id(id, int(self._limits["max_id_bytes"]))

    def check_metadata(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return metadata unchanged. Raises InvalidRequest as `items.check_metadata`."""
        return items.check_metadata(metadata, int(self._limits["max_metadata_bytes"]))

    def get(self, id: str) -> Item | None:
        """Return an item, or None."""
        return self._items.get(id)

    def count(self) -> int:
        """Return the number of items."""
        return len(self._items)

    def facts(self) -> dict[str, str]:
        """Return the prefix of the source, which its items have in front of the ids of their sources."""
        begins = f"{self._origin}/"
        prefix, everywhere = prefix_of(
            (item.source.removeprefix(begins), item.id)
            for item in self._items.values()
            if item.source is not None and item.source.startswith(begins)
        )
        return {PREFIXES: json.dumps({self._origin: [prefix, everywhere]})} if prefix else {}

    def below(self, origin: str) -> list[Known]:
        """Return the items that came from a source; see Store.below."""
        begins = f"{origin}/"
        return [
            Known(one.source.removeprefix(begins), one.id, one.digest, one.facts.size_bytes, one.mtime_ns)
            for one in self._items.values()
            if one.source is not None and one.source.startswith(begins)
        ]

    def stamps(self, origin: str) -> dict[str, tuple[int | None, int | None]]:
        """Return bytes and times of change of the pictures of a source, by their paths in it."""
        return {one.path: one[3:] for one in self.below(origin)}

    def close(self) -> None:
        """Do nothing: the client is its owner's."""

    def note(self, facts: dict[str, str]) -> None:
        """Pass over facts: `facts` finds them again in the items."""


def index_served(source: Source, client: Client, prefix: str | None, listed: Path) -> Account:
    """Add a source's pictures to a store through its service, except those that it has with the same bytes.

    As `index_source`, with these differences: pictures have the limits of the service, and the pictures of a folder
    stay in their files if the service reads them under the same paths, else the store keeps copies.

    Args:
        source: the pictures.
        client: of the service.
        prefix: begins their ids; see `naming.choose_names`.
        listed: the file that lists what was left out.

    Raises:
        ServiceError: the service refuses, or cannot be reached.
        InvalidRequest: the prefix cannot begin an id.
    """
    known = ServedItems(client, origin_of(source.name))
    account = send_pictures(source, client, choose_names(source, known, prefix), known)
    account.save(listed)
    return account


def send_pictures(source: Source, client: Client, naming: Naming, known: Collection) -> Account:
    """Do what `index_served` does, with names that are chosen already, and list nothing.

    Args:
        source: the pictures.
        client: of the service.
        naming: their names.
        known: the items of the service.
    """
    account = Account.of(source)
    account.notes += naming.notes
    sent: deque[tuple[int, bool]] = deque()
    with progress("indexing", len(source), 0) as bar:

        def fail(position: int, error: LookalikeError) -> None:
            account.failures.append(Failure.of(source.ids[position], error))
            bar.write(f"skipped {printable(source.ids[position])}: {error}", file=sys.stderr)

        def uploads() -> Iterator[Upload]:
            for chunk in read_ahead(range(len(source)), lambda position: _upload(source, position, naming, known)):
                for position, outcome in chunk:
                    if isinstance(outcome, Upload):
                        sent.append((position, known.store.get(outcome.id) is not None))
                        yield outcome
                        continue
                    if isinstance(outcome, LookalikeError):
                        fail(position, outcome)
                    else:
                        account.known += 1
                    bar.update()

        for added in client.add(uploads()):
            position, replaces = sent.popleft()
            if added.error is not None:
                fail(position, added.error)
            elif replaces:
                account.replaced += 1
            else:
                account.added += 1
            bar.update()
    return account


def _upload(source: Source, position: int, naming: Naming, known: Collection) -> Upload | None:
    """Return what to send for a picture; None if the service has it with the same bytes and from the same place."""
    entry = source.entry(position)
    digest = hashlib.sha256(entry.data).hexdigest()
    id, came_from = naming.id_of(entry.id, digest, known), naming.source_of(entry.id)
    item = known.store.get(id)
    # The service records another place only with the picture.
    if item is not None and item.digest == digest and (item.source == came_from or not naming.moved):
        return None
    label = None if entry.label is None else {"label": entry.label}
    metadata = label if item is None or label is None else item.metadata | label
    return Upload(id, entry.data, metadata, came_from)


def import_served(source: Path, client: Client, listed: Path) -> Account:
    """Add or replace the items of Parquet files through a service; rows as `transfer.import_items` takes them.

    Args:
        source: a file, or a folder of files.
        client: of the service.
        listed: the file that lists what was left out.

    Raises:
        InvalidSource: as `transfer.import_items`.
        StoreMismatch, ServiceError: another encoder made the embeddings, or the service cannot be reached.
    """
    known = ServedItems(client)
    paths = parquet_files(source, known.fingerprint, known.model)
    account = Account()
    sent: deque[str] = deque()
    digests: dict[str, str] = {}

    def uploads() -> Iterator[EmbeddedUpload]:
        for path in paths:
            row = 0
            for rows in chunks_of(path, known.dimension):
                for number, content in enumerate(rows, row):
                    name = f"{path.name}, row {number}" if content["id"] is None else str(content["id"])
                    item = attempt(item_of_row, content, known)
                    if isinstance(item, LookalikeError):
                        account.failures.append(Failure.of(name, item))
                        continue
                    have = known.get(item.id)
                    if digests.get(item.id, "" if have is None else have.digest) == item.digest:
                        account.known += 1
                        continue
                    digests[item.id] = item.digest
                    sent.append(name)
                    yield _embedded(item, have)
                row += len(rows)

    for added in client.add_embedded(uploads(), known.fingerprint):
        name = sent.popleft()
        if added.error is not None:
            account.failures.append(Failure.of(name, added.error))
        elif added.is_new:
            account.added += 1
        else:
            account.replaced += 1
    account.save(listed)
    return account


def _embedded(item: NewItem, have: Item | None) -> EmbeddedUpload:
    metadata: dict[str, Any] | None = item.metadata
    if item.keep_metadata:
        metadata = (have.metadata if have is not None else {}) | item.metadata
    digest = item.digest if len(item.digest) == 64 else None
    return EmbeddedUpload(
        item.id, item.embedding, metadata, item.source, digest, item.variant, item.thumbnail or None, item.original
    )


def export_served(client: Client, out: Path) -> tuple[int, list[Failure]]:
    """Write all items of a service into a folder of Parquet parts, as `transfer.export_store` does.

    Returns:
        The number of items, and those whose `original` is missing because its bytes are not where they were.

    Raises:
        InvalidOutput: `out` exists and is not empty, or cannot be written.
        ServiceError: the service cannot be reached.
    """
    facts = client.info()
    failures: list[Failure] = []

    def read(item: ServedItem) -> tuple[ServedItem, bytes | None, Outcome[bytes | None]]:
        thumbnail = client.thumbnail(item.id)
        return item, thumbnail, None if thumbnail is None else attempt(client.content, item.id)

    def rows() -> Iterator[dict[str, Any]]:
        for item, thumbnail, original in ahead(client.items(include=(*_FACTS, "embedding")), read, 8):
            if isinstance(original, LookalikeError):
                raise original
            if thumbnail is not None and original is None:
                failures.append(Failure.of(item.id, ItemNotFound("the service has no bytes of its picture any more")))
            if item.embedding is None:
                continue
            own = Item(item.id, item.metadata, item.source, item.digest or "", item.variant or "")
            yield export_row(own, item.embedding, thumbnail, original)

    def parts() -> Iterator[tuple[list[dict[str, Any]], bool]]:
        part: list[dict[str, Any]] = []
        for row in rows():
            if len(part) == _ROWS_PER_PART:
                yield part, False
                part = []
            part.append(row)
        yield part, True

    known = {"source": client.url, "fingerprint": facts["fingerprint"]}
    return write_export(out, int(facts["dimension"]), known, parts()), failures


def find_duplicates(client: Client, preset: str, threshold: float | None, as_json: bool) -> Iterator[str]:
    """Yield lines about the groups that a service finds, or its answer as one line of JSON; progress on stderr.

    Raises:
        ServiceError: the service refuses, or cannot be reached.
    """
    with tqdm(total=1, desc="comparing", disable=None, leave=False, bar_format="{desc} {percentage:3.0f} %") as bar:
        found = client.duplicates(preset, threshold, lambda share: bar.update(share - bar.n))
    if as_json:
        yield json.dumps({"threshold": found.threshold, "sequence": found.sequence, "groups": found.groups})
        return
    for group in found.groups:
        best, *rest = group["items"]
        yield f"{printable(best['id'])}  keep: {group['reason']}"
        for copy in rest:
            yield f"  {'same bytes' if copy['exact'] else format(copy['score'], '.4f')}  {printable(copy['id'])}"


def left_out_of(store: Path | None, verb: str) -> Path:
    """Return the file that lists what a verb left out: in the store, or without one in .lookalike."""
    return Path(".lookalike") / f"{verb}.{LEFT_OUT}" if store is None else store / LEFT_OUT


def check_choices(client: Client, model: Path | None, keep_originals: bool = False) -> None:
    """Check options that a running service has decided already.

    Args:
        client: of the service.
        model: folder of the encoder that the user names, or None.
        keep_originals: whether the user wants copies of all pictures.

    Raises:
        InvalidRequest: keep_originals.
        StoreMismatch: another encoder runs there.
        ServiceError: the service cannot be reached.
    """
    if keep_originals:
        raise InvalidRequest("--keep-originals: a running service decides by its own settings; leave the option out")
    if model is None:
        return
    facts = client.info()
    if read_card(model).fingerprint != facts["fingerprint"]:
        said = f"{client.url}: serves the encoder {facts['model']}, not that of {model}"
        raise StoreMismatch(f"{said}; leave --model out")
