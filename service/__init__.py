"""The serving room: image bytes → pixels → embedding → hits. Never imports torch or training."""

import os

import numpy as np
from numpy.typing import NDArray

# onnxruntime reads it when it starts; its wheels report usage unless they are told not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

PixelArray = NDArray[np.uint8]
FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
