"""What gzip takes and saves of the API's answers, and what the client costs to import.

.venv/bin/python -m benchmarks.answers
"""

import json
import resource
import subprocess
import sys
import time
import zlib
from collections.abc import Callable

import numpy as np
import orjson

_ROUNDS = 20
_MBIT = 1e6 / 8


def median_s(work: Callable[[], object]) -> float:
    """Return the median processor time of some calls, which other programs disturb less than the time of a clock."""
    times = []
    for _ in range(_ROUNDS):
        begin = time.thread_time()
        work()
        times.append(time.thread_time() - begin)
    return float(np.median(times))


def packed(body: bytes, level: int) -> bytes:
    """Return a body as gzip."""
    packer = zlib.compressobj(level, wbits=16 + zlib.MAX_WBITS)
    return packer.compress(body) + packer.flush()


def bodies() -> dict[str, bytes]:
    """Return answers of the API as they are for photographs: made up here, in their shapes and sizes."""
    draw = np.random.default_rng(0)
    words = ["sea", "holiday", "family", "2026", "Rome", "Oslo", "raw", "edited"]
    items = [
        {
            "id": f"Pictures/{2000 + n % 26}/{int(draw.integers(12)) + 1:02}/IMG_{n:05}.jpg",
            "metadata": {"label": str(draw.choice(words)), "stars": int(draw.integers(6)), "seen": bool(n % 2)},
        }
        for n in range(1000)
    ]
    rows = draw.standard_normal((32, 1280)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    hits = [item | {"score": float(score)} for item, score in zip(items[:10], draw.random(10), strict=True)]
    return {
        "`GET /images?limit=1000`": json.dumps({"items": items, "total": 10**6, "next": "1000"}).encode(),
        "`GET /images` of 100": json.dumps({"items": items[:100], "total": 10**6, "next": "100"}).encode(),
        "`/search`, 10 hits": json.dumps({"hits": hits}).encode(),
        "`/embed`, 32 × 1,280 numbers": orjson.dumps({"embeddings": list(rows)}, option=orjson.OPT_SERIALIZE_NUMPY),
    }


def import_ms(module: str) -> float:
    """Return the median processor time that a new process takes to import a module, less that of starting Python."""

    def run_s(statement: str) -> float:
        times = []
        for _ in range(_ROUNDS):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", statement], check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return float(np.median(times))

    return 1e3 * (run_s(f"import {module}") - run_s("pass"))


def main() -> None:
    """Print the tables."""
    print("| answer | bytes | level | gzip, bytes | gzip takes, ms | pays below, Mbit/s |")
    print("|---|---|---|---|---|---|")
    for name, body in bodies().items():
        for level in (1, 6):
            small = packed(body, level)
            takes = median_s(lambda body=body, level=level: packed(body, level))  # type: ignore[misc]
            pays = (len(body) - len(small)) / takes / _MBIT
            print(f"| {name} | {len(body):,} | {level} | {len(small):,} | {1e3 * takes:.2f} | {pays:,.0f} |")
    print("\n| import | ms |\n|---|---|")
    for module in ("numpy", "service.client", "httpx"):
        print(f"| `{module}` | {import_ms(module):.0f} |")


if __name__ == "__main__":
    main()
