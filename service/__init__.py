"""The serving room: image bytes → pixels → embedding → hits. Never imports torch or training."""

import math
import os
from contextlib import suppress
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


def memory_bytes() -> int:
    """Return how much memory this process may use: that of the machine, or less in a container with a limit."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    # Of control groups in their second and first version. A limit that is none is the word "max", or enormous.
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            found.append(int((Path("/sys/fs/cgroup") / name).read_text()))
    return min(found)
