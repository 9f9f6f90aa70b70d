"""`serve --no-store --workers 2` against one worker: pictures a second of POST /embed with the tiny encoder.

A second worker helps where the first one does not fill both cores: its event loop and its Python run on one core at a
time, and decoding and the encoder beside them. The table says how much processor time event loops and other threads
needed.
"""

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import load
from benchmarks.servers import processor_s
from tests.serving import running

_MODEL = "models/mnist"


def picture(side: int) -> bytes:
    """Return a PNG of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def main() -> None:
    """Print a line for each turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--connections", type=int, default=16)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        (folder / "request").write_bytes(load.raw("/embed", picture(28)))
        rates: dict[int, list[float]] = {1: [], 2: []}
        for turn in range(chosen.turns):
            for workers, own in rates.items():
                flags = ["--model", _MODEL, "--no-store", "--workers", str(workers)]
                with running(folder, *flags) as (server, address, _):
                    port = int(address.rpartition(":")[2])
                    load.run(port, [folder / "request"], chosen.connections, 2)
                    before = processor_s(server.pid)
                    result = load.run(port, [folder / "request"], chosen.connections, chosen.seconds, warm_up=0)
                    loops, others = (processor_s(server.pid) - before) / result.seconds
                    own.append(result.per_s)
                    print(
                        f"turn {turn}, {workers} workers: {result.per_s:.0f} pictures/s, p99 {result.p99_ms:.0f} ms, "
                        f"{loops:.2f} cores for event loops, {others:.2f} for decoding and encoder, "
                        f"{result.client_share:.2f} for the client; {result.statuses}",
                        flush=True,
                    )
        ratios = sorted(two / one for one, two in zip(rates[1], rates[2], strict=True))
        print(f"2 workers against 1: {ratios[len(ratios) // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
