"""What was measured as the fastest way to run an encoder, kept in the store's folder for the next start."""

import hashlib
import json
import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from service import cores
from service.encoding import openvino_graph
from service.encoding.card import Card
from service.encoding.encoder import Encoder
from service.encoding.onnxruntime_graph import VERSION, cuda_gpus
from service.errors import InvalidModel
from service.files import write_file
from service.settings import Settings

FILE = "runtime.json"


def open_encoder(settings: Settings, card: Card) -> Encoder:
    """Open an encoder as the settings ask, without a measurement where an earlier one still counts.

    Raises:
        InvalidModel: as Encoder.
    """
    known = settings.measured or ("" if settings.no_store else _read(settings, card))
    if known:
        # What ran then may fail now, and another may not.
        with suppress(InvalidModel):
            return Encoder(card, settings.device, settings.variant, runtime=settings.runtime, measured=known)
    return Encoder(card, settings.device, settings.variant, runtime=settings.runtime)


def keep_choice(settings: Settings, encoder: Encoder) -> None:
    """Keep what was measured when an encoder was opened for a CPU. Call it when the store is there.

    A folder that cannot be written stays as it is, and the next start measures again.
    """
    if settings.no_store or settings.read_only or not encoder.compared or encoder.provider == "CUDAExecutionProvider":
        return
    content = json.dumps(_facts(settings, encoder.card) | {"choice": encoder.choice}, indent=1)
    with suppress(OSError):
        write_file(settings.folder / FILE, f"{content}\n".encode())


def _read(settings: Settings, card: Card) -> str:
    """Return the choice (Encoder.choice) that was measured under the same conditions, or ""."""
    try:
        kept = json.loads((settings.folder / FILE).read_bytes())
        choice = str(kept.pop("choice"))
        whole = re.fullmatch("[0-9a-f]{64}:(onnxruntime|openvino):[a-z0-9]+", choice)
        return choice if whole and kept == _facts(settings, card) else ""
    # Nothing was kept, or the file is damaged.
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return ""


def _facts(settings: Settings, card: Card) -> dict[str, Any]:
    """Return all that a measurement depends on."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "instructions": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "gpus": cuda_gpus(),
        "onnxruntime": VERSION,
        "openvino": openvino_graph.version() if openvino_graph.is_installed() else "",
        "encoder": card.fingerprint,
        "variants": {name: hashlib.sha256(graph).hexdigest() for name, graph in sorted(card.variants.items())},
        "asked": [settings.device, settings.runtime, settings.variant],
    }


def _processor() -> str:
    """Return the processor's name and a checksum of its instructions; virtual machines give many the same name."""
    lines: list[str] = []
    with suppress(OSError):
        # Of the first core.
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    # x86 and ARM name them differently.
    instructions = found.get("flags") or found.get("Features") or platform.machine()
    told = hashlib.sha256(" ".join(sorted(instructions.split())).encode()).hexdigest()[:12]
    return f"{found.get('model name') or platform.processor()} ({told})"
