"""MNIST's small protocol: our recipe within the wall time of another program, one after the other on this machine.

The other program trains on MNIST and prints its k-NN accuracy last, as "… accuracy: 0.1234". Our wall time includes
start, reading, training and export.
"""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from benchmarks.machine import describe

_START_AND_EXPORT_S = 25.0
_LOOKALIKE = Path(sys.executable).with_name("lookalike")


def main(
    against: Annotated[str, typer.Option(help="Command of the other program.")],
    data_root: Annotated[Path, typer.Option(help="Folder with MNIST/raw.")] = Path("data"),
    recipe: Annotated[str, typer.Option(help="Our recipe.")] = "mnist-simclr",
) -> None:
    """Print a table of both programs' wall time and k-NN accuracy."""
    begun = time.perf_counter()
    peer = subprocess.run(shlex.split(against), capture_output=True, text=True)
    allowed = time.perf_counter() - begun
    found = re.findall(r"(?i)accuracy:\s*([01]\.\d+)", peer.stdout)
    if peer.returncode or not found:
        raise SystemExit(
            f"{against}: expected an accuracy in its output, got exit code {peer.returncode}: {peer.stderr}"
        )
    with TemporaryDirectory() as folder:
        out = Path(folder) / "mnist"
        minutes = max(0.1, (allowed - _START_AND_EXPORT_S) / 60)
        root = ["--data-root", str(data_root)]
        begun = time.perf_counter()
        command = ["pretrain", "mnist/train", "--recipe", recipe, "--minutes", f"{minutes:.3f}", "--out", str(out)]
        subprocess.run([_LOOKALIKE, *command, *root], check=True)
        spent = time.perf_counter() - begun
        command = ["evaluate", str(out), "--bank", "mnist/test[:8000]", "--queries", "mnist/test[8000:]", "--json"]
        report = subprocess.run([_LOOKALIKE, *command, *root], check=True, capture_output=True)
        figures = json.loads(report.stdout)
    print(f"\n{describe()}\n")
    print("| program | wall time, s | 5-NN, bank `mnist/test[:8000]`, queries `mnist/test[8000:]` |\n|---|---|---|")
    print(f"| {Path(shlex.split(against)[-1]).name} | {allowed:.0f} | {float(found[-1]):.4f} |")
    print(f"| `lookalike pretrain --recipe {recipe}` | {spent:.0f} | {figures['figures']['k5']:.4f} |")
    print(f"| raw pixels | | {figures['baselines']['raw_pixels']['k5']:.4f} |")


if __name__ == "__main__":
    typer.run(main)
