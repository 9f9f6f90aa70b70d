"""The serving room: image bytes → pixels → embedding → hits. Never imports torch or training."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

# The only place where the version stands: a bento and an image of the code have no installed package to ask.
__version__ = "0.1.0"

# onnxruntime reads this variable when it starts; its wheels report usage unless it is set.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from service.arrays import FloatArray as FloatArray
    from service.arrays import IntArray as IntArray
    from service.arrays import PixelArray as PixelArray
else:

    def __getattr__(name: str) -> object:
        """Import NumPy when a type of array is first asked for: `lookalike --help` needs none."""
        if name not in ("FloatArray", "IntArray", "PixelArray"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from service import arrays

        return getattr(arrays, name)


def commit() -> str | None:
    """Return the commit that the image was built from; None outside an image, where nothing records it."""
    return os.environ.get("LOOKALIKE_COMMIT") or None


def release() -> str:
    """Return version and commit in words."""
    return f"{__version__} (commit {known})" if (known := commit()) else __version__


def cores() -> int:
    """Return how many cores this process may keep busy: its affinity, capped by its container's share of time."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(count, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        # There is no such control group, or its quota is the word "max".
        return count
