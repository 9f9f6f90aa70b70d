"""The serving room: image bytes → pixels → embedding → hits. Never imports torch or training."""

import math
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# onnxruntime reads it when it starts; its wheels report usage unless they are told not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

PixelArray = NDArray[np.uint8]
FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


def cores() -> int:
    """Return how many cores this process may keep busy: of its affinity, and of its container's share of time."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(count, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such group, or "max"
        return count
