"""`lookalike embed --ray`: Ray Data embeds the pictures, in actors on all nodes; this process writes the parts.

    positions ─Ray Data─▶ actors: read, decode, encode ─in order─▶ embed.py, which writes, resumes and lists failures

An actor is one per GPU, or one per core where no node has a GPU. Each opens the source for itself, and gets the encoder
from Ray's object store. Ray repeats what a lost worker had in hand.
"""

import json
import logging
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from service.encoding.card import read_card
from service.encoding.encoder import Encoder
from service.errors import InvalidRequest, InvalidSource, LookalikeError
from service.jobs.embed import Embeddings, Engine, Measured, embedded
from service.settings import Settings
from service.sources import open_source
from service.sources.remote import is_remote, open_remote
from service.sources.source import Source

# Pictures that an actor takes at a time: few enough to spread over all, and enough to hide the hand-over.
_FEWEST, _MOST = 64, 1024
_TURNS = 8
# Of the rows that come back, so many are taken at a time.
_ROWS = 256


@dataclass(frozen=True)
class Origin:
    """How a worker opens the source.

    Attributes:
        name: SOURCE as the user wrote it.
        data_root: of named sets.
        image_key: as in open_source.
    """

    name: str
    data_root: Path
    image_key: str | None = None

    def open(self) -> Source:
        """Open the source."""
        return (
            open_remote(self.name) if is_remote(self.name) else open_source(self.name, self.data_root, self.image_key)
        )


def connect(address: str) -> None:
    """Connect to a Ray cluster, or start one.

    Args:
        address: "local" for a cluster on this machine that ends with this process; "auto" for the running one; or the
            address of one.

    Raises:
        InvalidRequest: there is no such cluster.
    """
    import ray

    try:
        ray.init(
            address, log_to_driver=False, logging_level="ERROR", include_dashboard=False if address == "local" else None
        )
    # Ray raises ConnectionError, ValueError and errors of gRPC.
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidRequest(
            f"--ray {address}: no Ray cluster there: {reason}; expected local, auto, or an address as 10.0.0.1:6379"
        ) from error


def on_ray(origin: Origin) -> Engine:
    """Return the engine that embeds on the cluster that `connect` found."""

    def embed(source: Source, encoder: Encoder, settings: Settings, todo: Sequence[int]) -> Generator[Embeddings]:
        import ray
        from ray.data import ActorPoolStrategy, DataContext

        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        actors = gpus or cpus
        context = DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        # It reports the plan of each run, and that there is no progress bar; this job has one of its own.
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        content = ray.put(_content(encoder))
        rows = max(_FEWEST, min(_MOST, len(todo) // (actors * _TURNS)))
        blocks = [_positions(source, todo[start : start + rows]) for start in range(0, len(todo), rows)]
        if not blocks:
            return
        found = ray.data.from_arrow(blocks).map_batches(
            _Worker,
            batch_size=rows,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors),
            num_gpus=1 if gpus else 0,
            num_cpus=max(1, cpus // gpus) if gpus else 1,
            fn_constructor_args=(origin, content, encoder.variant, encoder.runtime, settings, bool(gpus)),
        )
        try:
            for batch in found.iter_batches(batch_size=_ROWS, batch_format="pyarrow"):
                yield _outcomes(batch)
        except ray.exceptions.RayError as error:
            raise InvalidRequest(f"Ray: {_reason(error)}") from error

    return embed


class _Worker:
    """An actor: a source, an encoder, and the local engine."""

    def __init__(self, origin: Origin, content: Any, variant: str, runtime: str, settings: Settings, gpu: bool) -> None:
        import ray

        self._folder = tempfile.TemporaryDirectory(prefix="lookalike-")
        for name, data in ray.get(content).items():
            path = Path(self._folder.name) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        card = read_card(Path(self._folder.name))
        self._encoder = Encoder(card, "cuda" if gpu else "cpu", variant, None if gpu else 1, runtime)
        self._origin, self._settings = origin, settings
        self._source: Source | None = None

    def __call__(self, batch: Any) -> Any:
        positions, dimension = batch["position"].to_pylist(), self._encoder.dimension
        try:
            source = self._open(positions, batch["id"].to_pylist())
            chunks = list(embedded(source, self._encoder, self._settings, positions))
            return _table([one for chunk in chunks for one in chunk], dimension)
        # It concerns all pictures. Ray would repeat what raises, and pass on more than the sentence.
        except LookalikeError as error:
            return _table([(position, error) for position in positions], dimension, str(error))

    def _open(self, positions: Sequence[int], ids: Sequence[bytes]) -> Source:
        """Return the source, if it has these ids at these positions."""
        if self._source is None:
            self._source = self._origin.open()
        source = self._source
        for position, id in zip(positions, ids, strict=True):
            if position >= len(source) or _stored(source.ids[position]) != id:
                raise InvalidSource(f"{source.name}: has other pictures on a node, or changed meanwhile")
        return source


def _content(encoder: Encoder) -> dict[str, bytes]:
    """Return the files of an encoder's folder, by their paths in it."""
    folder = encoder.card.folder
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _reason(error: BaseException) -> str:
    """Return the last line of an error that Ray passed on, which is what its worker said."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _stored(id: str) -> bytes:
    return id.encode("utf-8", "surrogateescape")


def _positions(source: Source, positions: Sequence[int]) -> Any:
    ids = pa.array([_stored(source.ids[at]) for at in positions], pa.binary())
    return pa.table({"position": pa.array(positions, pa.int64()), "id": ids})


def _table(outcomes: Embeddings, dimension: int, fatal: str | None = None) -> Any:
    """Return outcomes as a table; `error` is a JSON list of sentence and code, or null, and `fatal` ends the job."""
    nothing = (np.zeros(dimension, np.float32), Measured(0, 0, "", 0, None))
    good = [nothing if isinstance(one, LookalikeError) else one for _, one in outcomes]
    errors = [json.dumps([str(one), one.code]) if isinstance(one, LookalikeError) else None for _, one in outcomes]
    rows = np.stack([row for row, _ in good]).astype(np.float32)
    measured = {name: [getattr(one, name) for _, one in good] for name in Measured._fields}
    return pa.table(
        {
            "position": pa.array([position for position, _ in outcomes], pa.int64()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), dimension),
            "error": pa.array(errors, pa.string()),
            "fatal": pa.array([fatal] * len(outcomes), pa.string()),
            **{
                name: pa.array(values, pa.string() if name == "digest" else pa.int64())
                for name, values in measured.items()
            },
        }
    )


def _outcomes(table: Any) -> Embeddings:
    """Return what `_table` made a table of. Raises InvalidRequest if it ends the job."""
    fatal = next((one for one in table["fatal"].to_pylist() if one), None)
    if fatal:
        raise InvalidRequest(f"Ray: {fatal}")
    columns = table["embedding"].combine_chunks()
    rows = np.asarray(columns.flatten(), np.float32).reshape(len(table), -1)
    measured = zip(*(table[name].to_pylist() for name in Measured._fields), strict=True)
    found: list[tuple[int, Any]] = []
    positions, errors = table["position"].to_pylist(), table["error"].to_pylist()
    for position, row, values, told in zip(positions, rows, measured, errors, strict=True):
        found.append((position, _Told(*json.loads(told)) if told else (row, Measured(*values))))
    return found


class _Told(LookalikeError):
    """An error of a picture, as a worker told it."""

    def __init__(self, sentence: str, code: str) -> None:
        super().__init__(sentence)
        self.code = code
