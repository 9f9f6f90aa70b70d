"""Embeddings over HTTP: this service against its peers and limits, with the same pictures, client and encoder.

    python -m benchmarks.serve

The servers run one after another under the load of benchmarks/load.py. Each figure is the median of the turns. Client
and server share the machine. The rows of runtimes need OpenVINO: .venv-openvino/bin/python -m benchmarks.serve.
"""

import json
import signal
import statistics
import sys
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

import typer

from benchmarks import limits, load
from benchmarks.encoders import build
from benchmarks.machine import describe
from benchmarks.photos import photos
from benchmarks.servers import BARE, MEASURED, OURS, PEERS, TUNED, WITHOUT_AMX, Server, serving
from service.encoding import openvino_graph

_PICTURES_PER_FORM = 32
# The share of our own peak rate at which latencies are compared.
_SHARE = 0.7
# A second of warm-up and three of measurement lie within 5 s after the overload.
_RECOVERY_S = 4.0
# Without an int8 file, so that runtimes are compared and nothing else.
_PLAIN = "resnet18-plain"
_ENCODERS = {
    "tiny": ("tiny", "fp32"),
    "resnet18": ("resnet18", "fp32"),
    "resnet18-int8": ("resnet18", "int8"),
    "photos": ("photos", "fp32"),
    _PLAIN: ("resnet18", "fp32"),
}


class Shape(NamedTuple):
    """The load on a server.

    Attributes:
        pictures: the number in each request.
        open_loop: send at a fixed rate.
        recovery: measure shortly after an overload.
    """

    connections: int
    pictures: int = 1
    open_loop: bool = False
    recovery: bool = False


# A server gets its loads in this order.
_SHAPES = {
    "c=1": Shape(1),
    "c=16": Shape(16),
    "forms c=1": Shape(1, _PICTURES_PER_FORM),
    "forms c=4": Shape(4, _PICTURES_PER_FORM),
    "open": Shape(64, open_loop=True),
    "c=256": Shape(256),
    "c=1 after": Shape(1, recovery=True),
}


class Key(NamedTuple):
    """The names of an encoder, a server and a shape, which identify a figure."""

    encoder: str
    server: str
    shape: str


class Line(NamedTuple):
    """A line of the table of targets; kept is None for a line without a target."""

    what: str
    ours: str
    against: str
    ratio: str
    bar: str
    kept: bool | None


@dataclass(frozen=True)
class Row:
    """A group of targets: the measurements they need and the function that judges them.

    Attributes:
        limits: whether the machine's limits are measured beside them.
        openvino: whether the row says something only where OpenVINO is installed.
    """

    needs: Sequence[Key]
    judge: Callable[["Figures"], list[Line]]
    limits: bool = True
    openvino: bool = False


class Figures:
    """All measurements, one value a turn: results by Key, limits by encoder and name; and what ran, by Key."""

    def __init__(self) -> None:
        self.results: defaultdict[Key, list[load.Result]] = defaultdict(list)
        self.limits: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        self.ran: defaultdict[Key, list[str]] = defaultdict(list)

    def median(self, key: Key, what: str) -> float:
        """Return the median of a field of load.Result."""
        return float(statistics.median(getattr(result, what) for result in self.results[key]))

    def limit(self, encoder: str, name: str) -> float:
        """Return the median of a limit, in pictures/s."""
        return statistics.median(self.limits[encoder, name])

    def spread(self, encoder: str, name: str) -> str:
        """Return a limit with its minimum and maximum; a wide range shows that the machine was not quiet."""
        values = self.limits[encoder, name]
        return f"{self.limit(encoder, name):.0f} /s ({min(values):.0f} to {max(values):.0f})"

    def best_peer(self, encoder: str) -> tuple[str, float]:
        """Return the name and requests/s of the fastest peer."""
        return max(
            ((peer.name, self.median(Key(encoder, peer.name, "c=16"), "per_s")) for peer in PEERS),
            key=lambda pair: pair[1],
        )

    def cell(self, key: Key) -> str:
        """Return requests/s and p99 in words, or "" without a measurement."""
        if key not in self.results:
            return ""
        return f"{self.median(key, 'per_s'):.0f} req/s, p99 {self.median(key, 'p99_ms'):.0f} ms"

    def answers(self, key: Key) -> Counter[str]:
        """Return the number of answers by status and of unanswered requests by kind."""
        total: Counter[str] = Counter()
        for result in self.results[key]:
            total.update(result.statuses | result.errors)
        return total


# Targets ------------------------------------------------------------------------------------------

_OURS_AND_PEERS = (OURS, *PEERS)
_TINY16 = Key("tiny", OURS.name, "c=16")
_TINY1 = Key("tiny", OURS.name, "c=1")


def _tiny(figures: Figures) -> list[Line]:
    ours, (peer, theirs) = figures.median(_TINY16, "per_s"), figures.best_peer("tiny")
    return [
        _line("tiny encoder, c = 16, req/s", ours, theirs, 2.0, f"best peer: {peer}"),
        _beside_tuned(figures, "tiny"),
    ]


def _bare(figures: Figures) -> list[Line]:
    ours = figures.median(_TINY16, "per_s")
    bare = figures.median(Key("tiny", BARE.name, "c=16"), "per_s")
    p50, p99 = figures.median(_TINY1, "p50_ms"), figures.median(_TINY1, "p99_ms")
    return [
        _line("`lookalike serve` against bare uvicorn, c = 16, req/s", ours, bare, 0.70),
        Line("p99 at c = 1", f"{p99:.1f} ms", f"p50: {p50:.1f} ms", f"{p99 / p50:.2f}", "≤ 3 × p50", p99 <= 3 * p50),
    ]


def _resnet(figures: Figures) -> list[Line]:
    ours, (peer, theirs) = figures.median(Key("resnet18", OURS.name, "c=16"), "per_s"), figures.best_peer("resnet18")
    bare = figures.limit("resnet18", "bare loop")
    return [
        _line("ResNet-18 224 fp32, c = 16, req/s", ours, theirs, 1.1, f"best peer: {peer}"),
        _beside_tuned(figures, "resnet18"),
        _line("the same against a bare loop without HTTP", ours, bare, 0.90),
    ]


def _int8(figures: Figures) -> list[Line]:
    int8, fp32 = (figures.median(Key(name, OURS.name, "c=16"), "per_s") for name in ("resnet18-int8", "resnet18"))
    return [_line("ResNet-18 224 int8 against fp32, c = 16, req/s", int8, fp32, 2.0)]


def _p99(figures: Figures) -> list[Line]:
    keys = _keys("tiny", _OURS_AND_PEERS, "open")
    ours, *theirs = (figures.median(key, "p99_ms") for key in keys)
    # Refusals are fast, so every answer must be a 200.
    best, good = min(theirs), figures.answers(keys[0]).keys() == {"200"}
    what = "tiny encoder, p99 at 70 % of own peak"
    return [
        Line(what, f"{ours:.1f} ms", "", "", "≤ 25 ms", good and ours <= 25),
        Line(
            "the same, against every peer at that rate",
            f"{ours:.1f} ms",
            f"{best:.1f} ms",
            f"{ours / best:.2f}",
            "< 1",
            good and ours < best,
        ),
    ]


def _forms(figures: Figures) -> list[Line]:
    one, four = (_PICTURES_PER_FORM * figures.median(Key("tiny", OURS.name, f"forms c={c}"), "per_s") for c in (1, 4))
    alone, many = figures.median(_TINY1, "per_s"), figures.median(_TINY16, "per_s")
    return [
        _line("one request of 32, c = 1, against singles one after another, pictures/s", one, alone, 1.5),
        _line("requests of 32, c = 4, against singles, c = 16, pictures/s", four, many, 1.5),
    ]


def _overload(figures: Figures) -> list[Line]:
    peak, crowd = figures.median(_TINY16, "per_s"), Key("tiny", OURS.name, "c=256")
    before, after = (figures.median(_TINY1._replace(shape=shape), "p50_ms") for shape in ("c=1", "c=1 after"))
    answers = figures.answers(crowd)
    return [
        _line("256 connections against 16, goodput, req/s", figures.median(crowd, "per_s"), peak, 0.7),
        Line(
            "answers to 256 connections",
            _listed(answers),
            "",
            "",
            "only 200, 429, 503",
            answers.keys() <= {"200", "429", "503"},
        ),
        Line(
            "p50 at c = 1, within 5 s of that",
            f"{after:.1f} ms",
            f"before: {before:.1f} ms",
            f"{after / before:.2f}",
            "≤ 1.5",
            after <= 1.5 * before,
        ),
    ]


def _runtimes(figures: Figures) -> list[Line]:
    lines = []
    for encoder in _REAL:
        ours, own = (figures.median(Key(encoder, server.name, "c=16"), "per_s") for server in (MEASURED, OURS))
        peer, theirs = figures.best_peer(encoder)
        lines += [
            _line(f"{encoder}, runtime by measurement, c = 16, req/s", ours, theirs, 1.8, f"best peer: {peer}"),
            Line("the same beside our own onnxruntime", f"{ours:.0f}", f"{own:.0f}", f"{ours / own:.2f}", "", None),
        ]
    return lines


def _without_amx(figures: Figures) -> list[Line]:
    lines = []
    for encoder in _REAL:
        own = figures.median(Key(encoder, OURS.name, "c=16"), "per_s")
        for server in WITHOUT_AMX:
            ours = figures.median(Key(encoder, server.name, "c=16"), "per_s")
            lines.append(_line(f"{encoder}, {server.name}, c = 16, req/s", ours, own, 1.0, "our own onnxruntime"))
    return lines


def _listed(answers: Counter[str]) -> str:
    return ", ".join(f"{status}: {count}" for status, count in answers.items())


def _beside_tuned(figures: Figures, encoder: str) -> Line:
    ours, theirs = (figures.median(Key(encoder, server.name, "c=16"), "per_s") for server in (OURS, TUNED))
    return Line(f"the same beside {TUNED.name}", f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}", "", None)


def _line(what: str, ours: float, theirs: float, bar: float, name: str = "") -> Line:
    against = f"{theirs:.0f}" + (f" ({name})" if name else "")
    return Line(what, f"{ours:.0f}", against, f"{ours / theirs:.2f}", f"≥ {bar:.2f}", ours >= bar * theirs)


def _keys(encoder: str, servers: Sequence[Server], *shapes: str) -> list[Key]:
    return [Key(encoder, server.name, shape) for server in servers for shape in shapes]


# The encoders whose inference is nearly all of a request.
_REAL = ("photos", _PLAIN)
ROWS = {
    "tiny": Row(_keys("tiny", (*_OURS_AND_PEERS, TUNED), "c=16"), _tiny),
    "bare": Row([*_keys("tiny", (OURS, BARE), "c=16"), _TINY1], _bare),
    "resnet18": Row(_keys("resnet18", (*_OURS_AND_PEERS, TUNED), "c=16"), _resnet),
    "int8": Row([*_keys("resnet18", (OURS,), "c=16"), *_keys("resnet18-int8", (OURS,), "c=16")], _int8),
    "p99": Row([_TINY16, *_keys("tiny", _OURS_AND_PEERS, "open")], _p99),
    "forms": Row(_keys("tiny", (OURS,), "c=1", "c=16", "forms c=1", "forms c=4"), _forms),
    "overload": Row(_keys("tiny", (OURS,), "c=1", "c=16", "c=256", "c=1 after"), _overload),
    "runtimes": Row(
        [key for one in _REAL for key in _keys(one, (MEASURED, OURS, *PEERS), "c=16")], _runtimes, False, True
    ),
    "without-amx": Row(
        [key for one in _REAL for key in _keys(one, (OURS, *WITHOUT_AMX), "c=16")], _without_amx, False, True
    ),
}


# Measuring ----------------------------------------------------------------------------------------


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(ROWS)}; repeatable.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Length of a measurement, after 2 s of warm-up.")] = 10,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each server.")] = 2,
    work: Annotated[Path | None, typer.Option(help="Folder that keeps the encoders for the next run.")] = None,
) -> None:
    """Print the tables; exit code 1 when a target is missed."""
    if unknown := set(only or ()) - ROWS.keys():
        raise typer.BadParameter(f"no such row: {', '.join(unknown)}", param_hint="--only")
    there = [name for name, row in ROWS.items() if openvino_graph.is_installed() or not row.openvino]
    if absent := set(only or ()) - set(there):
        raise typer.BadParameter(f"{', '.join(absent)} needs OpenVINO: .venv-openvino has it", param_hint="--only")
    # SystemExit runs the context managers that end the servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows = [ROWS[name] for name in only or there]
    with _folder(work) as folder:
        figures = _measure(rows, seconds, turns, folder)
    _print_figures(figures)
    kept = _print_rows([line for row in rows for line in row.judge(figures)])
    raise typer.Exit(0 if kept else 1)


@contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    if work:
        work.mkdir(parents=True, exist_ok=True)
        yield work
    else:
        with TemporaryDirectory() as folder:
            yield Path(folder)


def _measure(rows: list[Row], seconds: float, turns: int, work: Path) -> Figures:
    needs = {key for row in rows for key in row.needs}
    encoders = [name for name in _ENCODERS if any(key.encoder == name for key in needs)]
    pictures = photos()
    sizes = [len(picture) for picture in pictures]
    print(f"\n{describe()}; {len(sizes)} JPEGs of 500×375 and {min(sizes)} to {max(sizes)} bytes; ", end="")
    print(f"{turns} turns of {seconds:g} s\n", flush=True)
    figures = Figures()
    for turn in range(turns):
        for encoder in encoders:
            name, variant = _ENCODERS[encoder]
            folder = build(name, work / encoder, ()) if encoder == _PLAIN else build(name, work)
            if any(row.limits and any(key.encoder == encoder for key in row.needs) for row in rows):
                _measure_limits(figures, encoder, folder, variant, pictures, min(seconds, 3))
            # Our server runs first and last alternately; its first result sets the open loop's rate.
            for server in (OURS, MEASURED, *WITHOUT_AMX, BARE, *PEERS, TUNED)[:: -1 if turn % 2 else 1]:
                shapes = [name for name in _SHAPES if Key(encoder, server.name, name) in needs]
                if not shapes:
                    continue
                with TemporaryDirectory() as temporary, serving(server, folder, variant, Path(temporary)) as port:
                    for name in shapes:
                        rate = _SHARE * figures.results[_TINY16][0].per_s if _SHAPES[name].open_loop else None
                        requests = _requests(server, pictures, _SHAPES[name], Path(temporary))
                        result = _ask(port, requests, _SHAPES[name], seconds, rate)
                        if not result.good:
                            raise RuntimeError(f"{server.name} embeds nothing: {result}")
                        figures.results[Key(encoder, server.name, name)].append(result)
                        figures.ran[Key(encoder, server.name, name)].append(_runs(server, port))
                        print(f"turn {turn + 1}: {encoder}, {server.name}, {name}: {result}", file=sys.stderr)
    return figures


def _measure_limits(
    figures: Figures, encoder: str, model: Path, variant: str, pictures: list[bytes], seconds: float
) -> None:
    figures.limits[encoder, "decoding alone, as the service does, 2 threads"].append(
        limits.decoding(model, pictures, seconds)
    )
    for batch in (16, 32):
        rate = limits.inference(model, variant, batch, seconds)
        figures.limits[encoder, f"onnxruntime alone, 2 threads, batch {batch}"].append(rate)
    figures.limits[encoder, "bare loop"].append(limits.bare_loop(model, variant, pictures, seconds))


def _runs(server: Server, port: int) -> str:
    """Return what runs the encoder of our own server, such as "OpenVINO bf16", or "" of another."""
    if server in PEERS or server is TUNED:
        return ""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/info") as answer:
        info = json.load(answer)
    return f"{info['provider'].removesuffix('ExecutionProvider')} {info['variant']}"


def _requests(server: Server, pictures: list[bytes], shape: Shape, folder: Path) -> list[Path]:
    """Write a server's requests as files: one for each picture, or four forms with different first pictures."""
    contents = [server.ask(picture) for picture in pictures]
    if shape.pictures > 1:
        contents = [
            load.form("/embed", "file", list(islice(cycle(pictures), first, first + shape.pictures)))
            for first in range(4)
        ]
    files = [folder / f"request-{number}-of-{shape.pictures}" for number in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    return files


def _ask(port: int, requests: list[Path], shape: Shape, seconds: float, rate: float | None) -> load.Result:
    if shape.recovery:
        return load.run(port, requests, shape.connections, _RECOVERY_S - 1, warm_up=1)
    return load.run(port, requests, shape.connections, seconds, rate=rate)


# Tables -------------------------------------------------------------------------------------------


def _print_figures(figures: Figures) -> None:
    """Print servers by encoders, limits by encoders, and all measurements."""
    encoders = list(dict.fromkeys(key.encoder for key in figures.results))
    print(f"| 16 connections | {' | '.join(encoders)} |\n|---|{'---|' * len(encoders)}")
    for server in (*PEERS, TUNED, BARE, OURS, MEASURED, *WITHOUT_AMX):
        cells = [figures.cell(Key(encoder, server.name, "c=16")) for encoder in encoders]
        if any(cells):
            print(f"| {server.name} | {' | '.join(cells)} |")
    for limit in dict.fromkeys(limit for _, limit in figures.limits):
        cells = [figures.spread(one, limit) if (one, limit) in figures.limits else "" for one in encoders]
        print(f"| limit: {limit} | {' | '.join(cells)} |")
    print("\n| encoder | server | runs | asked | req/s | p50, ms | p99, ms | answers | client, of a core |")
    print("|---|---|---|---|---:|---:|---:|---|---:|")
    for key in figures.results:
        per_s, p50, p99, share = (figures.median(key, what) for what in ("per_s", "p50_ms", "p99_ms", "client_share"))
        ran = ", ".join(dict.fromkeys(figures.ran[key]))
        print(f"| {key.encoder} | {key.server} | {ran} | {key.shape} | {per_s:.1f} | {p50:.1f} | {p99:.1f} ", end="")
        print(f"| {_listed(figures.answers(key))} | {share:.2f} |")
    print()


def _print_rows(lines: list[Line]) -> bool:
    print("| number to reach | ours | against | ratio | bar | |\n|---|---:|---|---:|---|---|")
    verdicts = {True: "kept", False: "MISSED", None: ""}
    for line in lines:
        print(f"| {' | '.join(line[:5])} | {verdicts[line.kept]} |")
    return all(line.kept is not False for line in lines)


if __name__ == "__main__":
    typer.run(main)
