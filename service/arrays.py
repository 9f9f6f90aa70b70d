"""The types of the arrays that pass between the rooms; `from service import FloatArray` gives them."""

import numpy as np
from numpy.typing import NDArray

PixelArray = NDArray[np.uint8]
FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
