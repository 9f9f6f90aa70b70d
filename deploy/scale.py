"""Cost and capacity of many pictures, from scale.json: `python deploy/scale.py` prints the tables of scale.md."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_COUNTS = {"10M": 10**7, "1B": 10**9, "100B": 10**11}
_DAY_S = 86_400
_MONTH_H = 730


class Model:
    """The figures of scale.json, and what follows from them.

    Attributes:
        encoders: measured facts of each encoder, by name.
    """

    def __init__(self, facts: dict[str, Any]) -> None:
        measured = dict(facts["measured"])
        self.encoders: dict[str, dict[str, Any]] = measured.pop("encoders")
        self._values = {name: float(one["value"]) for name, one in (measured | facts["assumed"]).items()}

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def core_day(self, encoder: str) -> float:
        """Return the pictures that a core embeds in a day, decoding included."""
        one = self.encoders[encoder]
        return float(one["pictures_per_s"] / one["cores"] * _DAY_S)

    def gpu_day(self, encoder: str) -> tuple[float, str]:
        """Return the pictures that a GPU with its cores embeds in a day, and what limits them."""
        depthwise = "EfficientNet" in encoder
        share = self["gpu_share_depthwise" if depthwise else "gpu_share"]
        encoded = self["gpu_training_mac_per_s"] * share / self.encoders[encoder]["mac"]
        decoded = self["decoded_per_core_s"] * self["cores_per_gpu"]
        return min(encoded, decoded) * _DAY_S, "decoding" if decoded < encoded else "the GPU"

    def index_bytes(self, dimension: int) -> dict[str, tuple[float, float]]:
        """Return bytes a vector in memory and on the SSD of a query node, by index type."""
        rest = self["metadata_bytes"]
        return {
            "FLAT": (4 * dimension + rest, 0),
            "HNSW": (4 * dimension + self["graph_bytes"] + rest, 0),
            "IVF_SQ8": (dimension + self["own_bytes"] + rest, 0),
            "IVF_PQ": (dimension / self["pq_divisor"] + self["own_bytes"] + rest, 0),
            "DISKANN": (dimension / self["diskann_divisor"] + rest, 4 * dimension + self["graph_bytes"]),
        }

    def vectors_a_node(self, memory: float, disk: float) -> float:
        """Return how many vectors of so many bytes fit on a query node."""
        fit = self["node_memory_bytes"] * self["node_share"] / memory
        return min(fit, self["node_ssd_bytes"] * self["node_share"] / disk) if disk else fit


def tables(model: Model) -> Iterator[str]:
    """Yield the lines of the tables of scale.md."""
    yield "| encoder | pictures a day and core | pictures a day and GPU | the GPU is limited by |"
    yield "|---|---:|---:|---|"
    for name in model.encoders:
        gpu, limit = model.gpu_day(name)
        yield f"| {name} | {_short(model.core_day(name))} | {_short(gpu)} | {limit} |"
    for dimension in sorted({one["dimension"] for one in model.encoders.values()}, reverse=True):
        yield ""
        yield f"| {dimension:,} dimensions | memory of a million, GB | SSD of a million, GB | vectors a node |"
        yield "|---|---:|---:|---:|"
        for name, (memory, disk) in model.index_bytes(dimension).items():
            fit = _short(model.vectors_a_node(memory, disk))
            yield f"| {name} | {memory / 1000:.2f} | {disk / 1000:.2f} | {fit} |"
    for label, count in _COUNTS.items():
        yield ""
        yield f"| {label} pictures, embedded in {model['days']:.0f} days | " + " | ".join(model.encoders) + " |"
        yield "|---|" + "---:|" * len(model.encoders)
        columns = [_worked(model, name, count) for name in model.encoders]
        for row in columns[0]:
            yield f"| {row} | " + " | ".join(column[row] for column in columns) + " |"


def _worked(model: Model, encoder: str, count: int) -> dict[str, str]:
    dimension = int(model.encoders[encoder]["dimension"])
    per_day = count / model["days"] / model["cluster_efficiency"]
    cores, gpus = per_day / model.core_day(encoder), per_day / model.gpu_day(encoder)[0]
    hours = model["days"] * 24
    stored = count * (model["picture_bytes"] + model["thumbnail_bytes"])
    rows = {
        "cores": f"{math.ceil(cores):,}",
        "or GPUs": f"{math.ceil(gpus):,}",
        "embedding once on cores, USD": _short(cores * hours * model["usd_core_hour"]),
        "on GPUs, USD": _short(gpus * hours * model["usd_gpu_hour"]),
        "read from object storage, Gbit/s": f"{count * model['picture_bytes'] * 8 / model['days'] / _DAY_S / 1e9:.2f}",
        "Parquet of embeddings, TB": f"{count * 4 * dimension / 1e12:,.2f}",
        "pictures and previews, TB": f"{stored / 1e12:,.1f}",
        "object storage a month, USD": _short((stored + count * 4 * dimension) / 1e9 * model["usd_gb_month"]),
    }
    for name in ("HNSW", "IVF_SQ8", "DISKANN"):
        fit = model.vectors_a_node(*model.index_bytes(dimension)[name])
        # A segment's replicas lie on different nodes.
        nodes = max(int(model["replicas"]), math.ceil(count * model["replicas"] / fit))
        cost = _short(nodes * _MONTH_H * model["usd_node_hour"])
        rows[f"Milvus, {name}: query nodes, USD a month"] = f"{nodes:,}, {cost}"
    return rows


def _short(value: float) -> str:
    """Return three digits and k, M, B or T."""
    for limit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{name}" if value < 999.5 * limit else f"{value / limit:.0f}{name}"
    return f"{value:.3g}"


def main() -> None:
    """Print the tables."""
    facts = json.loads(Path(__file__).with_suffix(".json").read_text())
    print("\n".join(tables(Model(facts))))


if __name__ == "__main__":
    main()
