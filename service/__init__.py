"""The serving room: image bytes → pixels → embedding → hits. Never imports torch or training."""

import numpy as np
from numpy.typing import NDArray

PixelArray = NDArray[np.uint8]
FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
