"""A peer: BentoML with typed pictures, adaptive batches of up to 16, and the default of one worker."""

import os

import bentoml
import numpy as np
import onnxruntime as ort
from PIL import Image
from PIL.Image import Image as Picture

_SIDE = int(os.environ["PEER_SIDE"])


@bentoml.service
class Peer:
    """A service whose pictures BentoML decodes before `embed` receives them."""

    def __init__(self) -> None:
        self.session = ort.InferenceSession(os.environ["PEER_MODEL"], providers=["CPUExecutionProvider"])

    @bentoml.api(batchable=True, max_batch_size=16)  # type: ignore[untyped-decorator]
    def embed(self, pictures: list[Picture]) -> list[list[float]]:
        """Return one embedding for each picture."""
        small = [picture.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR) for picture in pictures]
        pixels = np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in small])  # (N, 3, S, S)
        embeddings: list[list[float]] = self.session.run(None, {"pixels": pixels})[0].tolist()
        return embeddings
