"""Serving and training on one GPU: what a machine does in nine minutes, as one table.

    python -m benchmarks.gpu --data DIR

DIR has CIFAR-10's train.zip and test.zip, as for benchmarks.cifar10_gpu. Each part runs in a process of its own within
its time; one that fails leaves a sentence, and the others go on. Without a GPU the same parts run on the CPU with small
sizes, in three minutes: that proves the script, and its figures say nothing about a GPU.
"""

import contextlib
import math
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import psutil
import typer

from benchmarks.machine import describe
from benchmarks.photos import photos
from service import PixelArray, cores

if TYPE_CHECKING:
    from service.encoding.encoder import Encoder

_COLUMNS = ("what", "figure", "measured beside it", "what binds it")
# An event loop, a client or a GPU that is busy for so much of the time cannot do much more.
_BUSY = 0.9
_CLIENTS = 4


class Plan(NamedTuple):
    """The sizes and times of a run, in seconds where nothing else is said."""

    device: str
    variant: str
    batch: int
    measured_s: float
    workers: tuple[int, ...]
    connections: int
    training_minutes: float
    limits_s: dict[str, float]


# ResNet-50 is exported first, which takes half a minute. Training has 100 s beside it: to decode, to compile, for k-NN.
_GPU = Plan("cuda", "fp16", 64, 6, (1, 8), 256, 5, {"photos": 110, "resnet50": 110, "training": 430})
# onnxruntime computes float16 on a CPU by converting it, and the export of ResNet-50 takes too long.
_CPU = Plan("cpu", "fp32", 4, 1, (1, 2), 16, 0.25, {"photos": 60, "tiny": 60, "training": 60})
_CALLED = {
    "photos": "the default photo encoder",
    "resnet50": "ResNet-50, random weights",
    "tiny": "a small CNN, random weights",
}


def main(
    data: Annotated[Path | None, typer.Option(help="Folder with train.zip and test.zip of CIFAR-10.")] = None,
    part: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print the table, row by row."""
    plan = _GPU if _gpu_there() else _CPU
    if part:
        # SystemExit runs the context managers that end servers and remove folders.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        raise typer.Exit(_guarded(plan, part, data))
    print(f"{describe()}, {cores()} cores to be used")
    if plan is _CPU:
        print("\n**No GPU here: small sizes on the CPU. This proves that the script runs; no figure is of a GPU.**")
    print(f"\n| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}", flush=True)
    for name, limit_s in plan.limits_s.items():
        _run_apart(name, data, limit_s)


def _gpu_there() -> bool:
    import torch

    return torch.cuda.is_available()


def _run_apart(part: str, data: Path | None, limit_s: float) -> None:
    """Run a part in a process of its own, which prints its rows; end it and all below it after its time."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, *(["--data", str(data)] if data else [])]
    with subprocess.Popen(command) as child:
        try:
            code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            below = psutil.Process(child.pid).children(recursive=True)
            child.terminate()
            psutil.wait_procs([psutil.Process(child.pid)], timeout=25)
            for process in psutil.wait_procs(below, timeout=1)[1]:
                process.kill()
            child.kill()
            _row(f"{part}: ended after {limit_s:g} s, its time")
            return
    if code not in (0, 1):
        _row(f"{part}: its process ended with {code}")


def _guarded(plan: Plan, part: str, data: Path | None) -> int:
    """Run a part here; return 1 after a failure that a row tells."""
    try:
        with TemporaryDirectory() as work:
            if part == "training":
                _training(plan, data, Path(work))
            else:
                _serving(plan, part, Path(work))
    # Whatever is missing on a machine, the other parts go on.
    except Exception as error:
        told = " ".join(str(error).split())[-300:]
        _row(f"{part}: failed: {type(error).__name__}: {told}")
        return 1
    return 0


def _row(*cells: str) -> None:
    padded = (*cells, *[""] * (len(_COLUMNS) - len(cells)))
    print(f"| {' | '.join(padded)} |", flush=True)


# Serving ------------------------------------------------------------------------------------------


def _serving(plan: Plan, name: str, work: Path) -> None:
    from benchmarks import limits
    from benchmarks.encoders import build
    from service.encoding.card import read_card
    from service.encoding.encoder import Encoder
    from service.encoding.images import decode_pixels
    from service.encoding.limits import Limits

    folder = build(name, work, [plan.variant] if plan.variant != "fp32" else [])
    card, files = read_card(folder), photos()
    called = f"{_CALLED[name]}, {plan.variant}, batch {plan.batch}"
    decoded = [decode_pixels(file, card.preprocessing, Limits()) for file in files]
    pixels = [decoded[number % len(decoded)] for number in range(plan.batch)]

    model = card.variants.get(plan.variant, card.model)
    from_host, on_device = _onnxruntime(
        model, plan.device, np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2))
    )
    with _busy() as busy:
        rate = _rate(from_host, plan)
    _row(f"{called}: onnxruntime alone, pictures/s", f"{rate:,.0f}", busy())
    if on_device:
        with _busy() as busy:
            rate = _rate(on_device, plan)
        _row(f"{called}: the same, pixels and embeddings stay on the GPU, pictures/s", f"{rate:,.0f}", busy())
    del from_host, on_device

    alone = _encoder_alone(plan, called, Encoder(card, plan.device, plan.variant), pixels)

    threads = limits.decoding(folder, files, plan.measured_s / 2, cores())
    with ProcessPoolExecutor(cores(), get_context("spawn")) as pool:
        # The first call imports.
        list(pool.map(limits.decoding, *_each(folder, files, 0.1)))
        processes = sum(pool.map(limits.decoding, *_each(folder, files, plan.measured_s / 2)))
    _row(f"{_CALLED[name]}: decoding alone, {cores()} threads of one process, pictures/s", f"{threads:,.0f}")
    _row(f"{_CALLED[name]}: decoding alone, {cores()} processes, pictures/s", f"{processes:,.0f}")
    for workers in plan.workers:
        limit = {"the GPU" if plan.device == "cuda" else "the encoder": alone}
        limit["decoding"] = threads if workers == 1 else processes
        _http(plan, f"{_CALLED[name]}, {plan.variant}", folder, workers, files, limit, work)


def _encoder_alone(plan: Plan, called: str, encoder: "Encoder", pixels: list[PixelArray]) -> float:
    """Print the row of our own way to the GPU, and return its pictures/s."""
    with _busy() as busy:
        rate = _rate(lambda: encoder.encode(pixels), plan)
    _row(f"{called}: `Encoder` alone, pictures/s", f"{rate:,.0f}", f"{encoder.provider}; {busy()}")
    return rate


def _each(folder: Path, files: list[bytes], seconds: float) -> tuple[list[Any], ...]:
    """Return the arguments of limits.decoding for each process, which decodes on one thread."""
    return tuple([one] * cores() for one in (folder, files, seconds, 1))


def _onnxruntime(model: bytes, device: str, pixels: PixelArray) -> tuple[Callable[[], Any], Callable[[], Any] | None]:
    """Open a graph as onnxruntime's documentation does; return a run from host memory, and on a GPU one within it."""
    import onnxruntime as ort

    wanted = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    if device == "cuda":
        ort.preload_dlls()
    session = ort.InferenceSession(model, providers=[wanted])
    if session.get_providers()[0] != wanted:
        raise RuntimeError(f"onnxruntime runs on {session.get_providers()[0]}, expected {wanted}")
    name, output = session.get_inputs()[0].name, session.get_outputs()[0].name
    if device != "cuda":
        return lambda: session.run([output], {name: pixels}), None
    bound = session.io_binding()
    bound.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(pixels, "cuda", 0))
    bound.bind_output(output, "cuda")

    def within() -> None:
        session.run_with_iobinding(bound)
        bound.synchronize_outputs()

    return lambda: session.run([output], {name: pixels}), within


def _rate(run: Callable[[], Any], plan: Plan) -> float:
    """Return pictures/s of batches, after three to warm up."""
    for _ in range(3):
        run()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() < begun + plan.measured_s / 2:
        run()
        count += plan.batch
    return count / (time.perf_counter() - begun)


def _http(
    plan: Plan, called: str, folder: Path, workers: int, files: list[bytes], limit: dict[str, float], work: Path
) -> None:
    """Measure POST /embed under bare uvicorn, and print its row."""
    from benchmarks import load
    from benchmarks.servers import BARE, processor_s, running
    from tests.ports import free_port

    requests = [work / f"request-{number}" for number in range(len(files))]
    for path, file in zip(requests, files, strict=True):
        path.write_bytes(load.raw("/embed", file))
    port, log = free_port(), work / f"log-{workers}"
    environment = {
        "LOOKALIKE_MODEL": str(folder),
        "LOOKALIKE_DEVICE": plan.device,
        "LOOKALIKE_VARIANT": plan.variant,
        "LOOKALIKE_RUNTIME": "onnxruntime",
        "LOOKALIKE_NO_STORE": "true",
        # Of each worker; a refusal would not measure anything.
        "LOOKALIKE_MAX_WAITING": str(plan.connections),
    }
    # At this level each worker says when it is ready.
    command = BARE.command.replace("warning", "info").format(port=port).split()
    command += ["--workers", str(workers)]

    def ask(seconds: float) -> load.Result:
        return load.run(port, requests, plan.connections // _CLIENTS, seconds, warm_up=0)

    with running(command, f"http://127.0.0.1:{port}{BARE.ready}", environment, log) as server:
        # /info is answered by the first worker that is ready.
        while log.read_text().count("Application startup complete") < workers:
            time.sleep(0.1)
        with ThreadPoolExecutor(_CLIENTS) as clients:
            list(clients.map(ask, [2.0] * _CLIENTS))
            before = processor_s(server.pid)
            with _busy() as busy:
                results = list(clients.map(ask, [plan.measured_s] * _CLIENTS))
            # Clients start and wait a little beside their measurement, when the server idles.
            loops, others = (processor_s(server.pid) - before) / plan.measured_s
    rate, client = sum(one.per_s for one in results), max(one.client_share for one in results)
    p99 = max(one.p99_ms for one in results)
    refused = sum(count for one in results for status, count in one.statuses.items() if status != "200")
    told = f"{busy()}; cores: {loops:.1f} for event loops, {others:.1f} for decoding and Python beside them, "
    told += f"{sum(one.client_share for one in results):.1f} for {_CLIENTS} clients; p99 {p99:.0f} ms"
    told += f"; {refused} refused" if refused else ""
    taken = {f"{what} ({rate / most:.0%} of it alone)": rate / most for what, most in limit.items()}
    taken[f"the event loops ({loops / workers:.0%} of a core each)"] = loops / workers
    taken[f"the client ({client:.0%} of a core)"] = client
    used = (loops + others + sum(one.client_share for one in results)) / cores()
    taken[f"all cores ({used:.0%} busy)"] = used
    closest = max(taken, key=taken.__getitem__)
    bound = closest if taken[closest] >= _BUSY else f"nothing alone; nearest: {closest}"
    _row(f"{called}: `/embed`, bare uvicorn, {workers} `--no-store` workers, req/s", f"{rate:,.0f}", told, bound)


@contextlib.contextmanager
def _busy() -> Iterator[Callable[[], str]]:
    """Sample the GPU's utilisation during the block; yield what tells its mean afterwards, in words."""
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
    try:
        sampler = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        yield lambda: "GPU not sampled"
        return
    samples: list[float] = []

    def told() -> str:
        return f"GPU {np.mean(samples):.0f} % busy" if samples else "GPU not sampled"

    try:
        yield told
    finally:
        sampler.terminate()
        lines = sampler.communicate()[0].splitlines()
        samples += [float(line) for line in lines if line.strip().isdigit()]


# Training -----------------------------------------------------------------------------------------


def _training(plan: Plan, data: Path | None, work: Path) -> None:
    """Run benchmarks.cifar10_gpu for its minutes, and print its two rows; its own table goes to stderr."""
    from benchmarks.cifar10_gpu import build_recipe, knn_rows, pace, run

    if data is None:
        raise ValueError("no --data was given")
    on_gpu = plan.device == "cuda"
    if not on_gpu:
        data = _shrunk(data, work)
    backbone, batch = ("resnet18", 512) if on_gpu else ("small-cnn", 64)
    # Each k-NN of the whole set costs three seconds of the five minutes.
    recipe = build_recipe("simclr", 2, batch, 0.03, backbone, compile=on_gpu).model_copy(update={"knn_times": 4})
    with contextlib.redirect_stdout(sys.stderr):
        done = run(recipe, data, work / "state", plan.training_minutes, plan.training_minutes, plan.device)
    last = knn_rows(work / "state")[-1] if knn_rows(work / "state") else {"knn": math.nan, "step": 0}
    minutes = done.progress.seconds / 60
    called = f"SimCLR, {backbone}, CIFAR-10 (JPEG copy), {minutes:.1f} minutes, {done.progress.step:,} steps of {batch}"
    _row(f"{called}: views/s", f"{pace(done):,.0f}", "bar: 40,000; k-NN and saving included")
    beside = "dkobak: 83.2 after 100 epochs in 20 minutes on an A100, lossless pictures"
    _row(f"{called}: weighted 20-NN, %", f"{100 * last['knn']:.1f}", beside)


def _shrunk(data: Path, work: Path) -> Path:
    """Return a folder with 1,000 of the training and 200 of the test pictures."""
    folder = work / "data"
    folder.mkdir()
    for name, count in (("train.zip", 1000), ("test.zip", 200)):
        with zipfile.ZipFile(data / name) as all_of, zipfile.ZipFile(folder / name, "w") as some:
            names = [one for one in all_of.namelist() if not one.endswith("/")]
            for one in names[:: max(1, len(names) // count)]:
                some.writestr(one, all_of.read(one))
    return folder


if __name__ == "__main__":
    typer.run(main)
