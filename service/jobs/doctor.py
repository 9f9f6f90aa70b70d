"""`lookalike doctor`: what a report of a problem should say of a machine, an encoder and a store."""

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import onnxruntime as ort
from pydantic import SecretStr

from service import cores, release
from service.encoder_choice import choose_model
from service.encoding.apart import why_no_sandbox
from service.encoding.batcher import Batcher
from service.encoding.card import Card, read_card
from service.encoding.encoder import Encoder, canary
from service.encoding.openvino_graph import is_installed
from service.encoding.text import open_text_tower
from service.errors import LookalikeError
from service.settings import Settings
from service.store.catalog import FILE
from service.store.catalog_reader import CatalogReader
from service.store.check import examine as check
from service.store.layout import current, generation

_PACKAGES = (
    "bentoml",
    "fastapi",
    "pillow",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "faiss-cpu",
    "apsw",
    "pyarrow",
    "tokenizers",
    "torch",
    "torchvision",
    "timm",
)
# Instructions that decide how fast an encoder is on a CPU.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8", "asimd", "i8mm")
_PICTURES = 16


class Line(NamedTuple):
    """A line of the page: what it is about, what was found, and whether that is a problem."""

    about: str
    found: str
    problem: bool = False


def examine(settings: Settings, paths: bool = False) -> Iterator[Line]:
    """Yield the lines of the page. Nothing is changed, and a service may use the store meanwhile.

    Args:
        settings: name the encoder and the store; the store's own encoder, else the default for photographs.
        paths: show paths. Otherwise a path is its last part.

    Cost: seconds, and the time to read the store once.
    """
    for line in _examine(settings):
        found = line.found if paths else _without_paths(line.found, settings)
        # An exception may have many lines.
        yield line._replace(found=" ".join(found.split()))


def _examine(settings: Settings) -> Iterator[Line]:
    yield from _machine(settings)
    for name in sorted(settings.model_fields_set):
        value = getattr(settings, name)
        yield Line("setting", f"{name} = {'(hidden)' if isinstance(value, SecretStr) else value}")
    card = None
    try:
        card = read_card(choose_model(settings)[0])
        yield from _encoder(card, settings)
    except (LookalikeError, OSError) as error:
        yield Line("encoder", str(error), problem=True)
    try:
        yield from _store(settings, card)
    except (LookalikeError, OSError) as error:
        yield Line("store", str(error), problem=True)


def _machine(settings: Settings) -> Iterator[Line]:
    versions = {"lookalike": release()} | {name: _version(name) for name in _PACKAGES}
    yield Line("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version))
    yield Line("python", f"{platform.python_version()} on {platform.platform()}")
    model, flags = _processor()
    yield Line("processor", f"{cores()} cores of {model}; {' '.join(flags) or 'no instructions that we look for'}")
    yield Line("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB")
    folder = next(part for part in (settings.store.absolute(), *settings.store.absolute().parents) if part.is_dir())
    disk = shutil.disk_usage(folder)
    yield Line("disk", f"{disk.free / 1e9:.1f} of {disk.total / 1e9:.1f} GB free where the store is", disk.free < 1e9)
    openvino = ["OpenVINO"] if is_installed() else []
    yield Line("runtimes", ", ".join([*ort.get_available_providers(), *openvino]))
    why = why_no_sandbox()
    kept = "in a sandbox" if why is None else f"without a sandbox: {why}"
    yield Line("pictures", f"TIFF, AVIF and HEIF are decoded {kept}", problem=why is not None)


def _encoder(card: Card, settings: Settings) -> Iterator[Line]:
    encoder = Encoder(card, settings.device, settings.variant, runtime=settings.runtime)
    yield Line("encoder", f"{card.name}, {encoder.dimension} numbers a picture, fingerprint {card.fingerprint[:12]}…")
    pixels = [canary(card.preprocessing.height, card.preprocessing.width)] * _PICTURES
    start = time.perf_counter()
    with closing(Batcher(encoder.lanes, encoder.max_batch)) as batcher:
        for outcome in batcher.embed(pixels):
            if isinstance(outcome, LookalikeError):
                raise outcome
    rate = _PICTURES / (time.perf_counter() - start)
    variants = ", ".join(("fp32", *card.variants))
    yield Line("encoder", f"all files as its card says, {variants}")
    yield Line("encoder", f"{encoder.variant} by {encoder.provider} runs, {rate:.0f} pictures/s")
    if open_text_tower(card, encoder.dimension) is not None:
        yield Line("encoder", "reads words")


def _store(settings: Settings, card: Card | None) -> Iterator[Line]:
    folder = current(settings.store)
    if not (folder / FILE).exists():
        yield Line("store", f"{settings.store}: none there yet")
        return
    catalog = CatalogReader(folder)
    try:
        count, meta = len(catalog.keys()), catalog.meta
    finally:
        catalog.close()
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    yield Line(
        "store",
        f"{count} items of the encoder {meta['model']}, fingerprint {meta['fingerprint'][:12]}…, "
        f"generation {generation(settings.store)}, schema {meta['schema']}, {size / 1e6:.1f} MB",
    )
    if card is not None and card.fingerprint != meta["fingerprint"]:
        yield Line("store", "another encoder built it, so this one cannot search it; `lookalike reindex`", problem=True)
    problems = [Line("store", problem, problem=True) for problem in check(folder)]
    yield from problems or [Line("store", "all of it was read, no problem found")]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> tuple[str, list[str]]:
    """Return the processor's name and those of its instructions that we look for."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    known = facts.get("flags", facts.get("Features", "")).split()
    return facts.get("model name", platform.machine()), [name for name in _INSTRUCTIONS if name in known]


def _without_paths(text: str, settings: Settings) -> str:
    """Return a text in which the last part of a path stands for the path."""
    for path in (settings.store, settings.model, settings.api_keys_file, Path.cwd(), Path("~").expanduser()):
        if path is not None:
            for spelled in {str(path.absolute()), str(path)} - {".", "/"}:
                text = text.replace(spelled, path.name or "…")
    return text
