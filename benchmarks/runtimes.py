"""Measure what can run an encoder on this processor: onnxruntime and OpenVINO, in each arithmetic, interleaved.

.venv-openvino/bin/python -m benchmarks.runtimes --photos PHOTOS
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np

from benchmarks.encoders import build
from benchmarks.machine import describe
from service import PixelArray
from service.encoding.card import Card, read_card
from service.encoding.encoder import Encoder
from service.encoding.images import decode_pixels
from service.encoding.limits import Limits
from service.encoding.onnxruntime_graph import OnnxruntimeGraph
from service.encoding.openvino_graph import OpenvinoGraph, computes_bf16
from service.encoding.pretrained import default_encoder
from service.encoding.runtimes import Device, Graph
from service.sources import open_source

_BATCHES = (4, 16)
_PICTURES = 96
# Instructions that oneDNN, inside OpenVINO, may use at most; onnxruntime's own kernels do not read this.
_INSTRUCTIONS = {"all": "", "AVX-512 without bf16 and AMX": "AVX512_CORE_VNNI", "AVX2": "AVX2"}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", required=True, help="SOURCE of photographs")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.model:
        print(json.dumps(_measure(arguments.model, arguments.photos, arguments.turns)))
        return
    print(f"{describe()}\n")
    with tempfile.TemporaryDirectory() as work:
        models = {
            "photos, 224 px": (default_encoder(), arguments.photos),
            "ResNet-18, random weights, 224 px": (build("resnet18", Path(work)), arguments.photos),
            "mnist, 28 px": (Path("models/mnist"), "digits"),
        }
        for instructions, isa in _INSTRUCTIONS.items():
            print(f"OpenVINO may use {instructions}:\n\n| encoder | graph | batch 4 | batch 16 | cosine p1 | chosen |")
            print("|---|---|---:|---:|---:|---|")
            for name, (folder, pictures) in models.items():
                for row in _apart(folder, pictures, arguments.turns, isa):
                    print(f"| {name} | {' | '.join(row)} |", flush=True)
            print()


def _apart(folder: Path, photos: str, turns: int, isa: str) -> list[list[str]]:
    """Measure in a process of its own, because OpenVINO reads its instructions once."""
    command = [sys.executable, "-m", "benchmarks.runtimes", "--model", str(folder), "--photos", photos]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run(
        [*command, "--turns", str(turns)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    rows: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def _measure(folder: Path, photos: str, turns: int) -> list[list[str]]:
    """Return rows: graph, pictures/s of each batch (the median of the turns), cosine to fp32, whether it is chosen."""
    card = read_card(folder)
    pixels = _pixels(photos, card)
    graphs = _graphs(card)
    rates: dict[str, list[list[float]]] = {name: [[] for _ in _BATCHES] for name in graphs}
    for _ in range(turns):
        for name, graph in graphs.items():
            for at, size in enumerate(_BATCHES):
                graph.run(pixels[:size])
                begun, count = perf_counter(), 0
                while perf_counter() - begun < 0.5:
                    graph.run(pixels[:size])
                    count += size
                rates[name][at].append(count / (perf_counter() - begun))
    embeddings = {
        name: np.concatenate([graph.run(part) for part in np.split(pixels, 6)]) for name, graph in graphs.items()
    }
    expected = embeddings["onnxruntime fp32"]
    chosen = Encoder(card, "cpu", "auto", runtime="auto")
    rows = []
    for name in graphs:
        cosine = np.percentile((expected * embeddings[name]).sum(1), 1)
        taken = "yes" if name == f"{chosen.runtime} {chosen.variant}" else ""
        rows.append([name, *(f"{np.median(one):,.0f}" for one in rates[name]), f"{cosine:.5f}", taken])
    return rows


def _graphs(card: Card) -> dict[str, Graph]:
    model = OnnxruntimeGraph(card, "fp32", card.model, Device("cpu"))
    found: dict[str, Graph] = {
        "onnxruntime fp32": model,
        "openvino fp32": OpenvinoGraph(card, "fp32", card.model, model),
    }
    if computes_bf16():
        found["openvino bf16"] = OpenvinoGraph(card, "bf16", card.model, model)
    if "int8" in card.variants:
        graph = card.variants["int8"]
        int8 = OnnxruntimeGraph(card, "int8", graph, Device("cpu"))
        found |= {"onnxruntime int8": int8, "openvino int8": OpenvinoGraph(card, "int8", graph, int8)}
    return found


def _pixels(photos: str, card: Card) -> PixelArray:
    source = open_source(photos)
    places = np.linspace(0, len(source) - 1, _PICTURES).astype(int)
    return np.stack([decode_pixels(source.entry(int(at)).data, card.preprocessing, Limits()) for at in places])


if __name__ == "__main__":
    main()
