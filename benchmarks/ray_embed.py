"""`lookalike embed --ray local` beside `lookalike embed`, both on this machine.

    python -m benchmarks.ray_embed PHOTOS [--count 5000]

The folder PHOTOS is copied until it has so many files. The two take turns. What starts (encoders, actors) is left out:
a run of few pictures is timed as well, and the pace is that of the pictures between the two. It needs .venv-scale.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import ray
import typer

from service.encoding.pretrained import default_encoder
from service.jobs.embed import Engine, embed_source, embedded
from service.jobs.ray_embed import Origin, connect, on_ray
from service.settings import Settings

_FEW = 256
_BAR = 0.85


def main(photos: Path, count: Annotated[int, typer.Option()] = 5000, turns: Annotated[int, typer.Option()] = 3) -> None:
    """Print pictures a second of both, and their ratio."""
    files = sorted(path for path in photos.rglob("*") if path.is_file())
    model = default_encoder()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pictures"
        folder.mkdir()
        for number in range(count):
            source = files[number % len(files)]
            (folder / f"{number:06d}{source.suffix}").write_bytes(source.read_bytes())
        # Ray gives its workers a niceness of 15 otherwise, so any other job on the machine would decide.
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
        connect("local")
        paces: dict[str, list[float]] = {"embed": [], "embed --ray local": []}
        for turn in range(turns):
            for name, paced in paces.items():
                name_of = {part: f"{folder}[:{part}]" for part in (_FEW, count)}
                seconds = {}
                for part, source_name in name_of.items():
                    origin = Origin(source_name, Path("data"))
                    engine: Engine = on_ray(origin) if "ray" in name else embedded
                    begun = time.perf_counter()
                    out = Path(scratch) / f"{turn}-{part}-{'ray' in name}"
                    done = embed_source(origin.open(), model, out, Settings(variant="fp32"), engine=engine)
                    seconds[part] = time.perf_counter() - begun
                    assert done.added == part
                paced.append((count - _FEW) / (seconds[count] - seconds[_FEW]))
        ray.shutdown()
    print(f"| {count:,} photographs, the default encoder, fp32 | pictures/s, median of {turns} |\n|---|---:|")
    for name, paced in paces.items():
        print(f"| `{name}` | {statistics.median(paced):.1f} |")
    ratio = statistics.median(b / a for a, b in zip(*paces.values(), strict=True))
    print(f"| ratio, expected ≥ {_BAR} | {ratio:.2f}{'' if ratio >= _BAR else ', missed'} |")


if __name__ == "__main__":
    typer.run(main)
