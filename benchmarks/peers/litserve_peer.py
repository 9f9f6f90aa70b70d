"""A peer: LitServe with batches of up to 16 and no wait for them to fill, its default and its fastest setting here.

The picture comes in a form, which was faster here than base64 in JSON. One worker is the default; two were slower on
two cores.
"""

import os

import litserve
import numpy as np
import onnxruntime as ort
from PIL import Image

from service import FloatArray, PixelArray

_SIDE = int(os.environ["PEER_SIDE"])


class Embedding(litserve.LitAPI):  # type: ignore[misc]
    """Decodes, runs and encodes a batch in one process; HTTP runs in another."""

    def setup(self, _: str) -> None:
        """Open the session."""
        self.session = ort.InferenceSession(os.environ["PEER_MODEL"], providers=["CPUExecutionProvider"])

    def decode_request(self, request: litserve.Request) -> PixelArray:
        """Return pixels (3, S, S) of a request; LitServe passes only its form."""
        picture = Image.open(request["image"].file).convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
        return np.asarray(picture).transpose(2, 0, 1)

    def batch(self, inputs: list[PixelArray]) -> PixelArray:
        """Return one batch (N, 3, S, S)."""
        return np.stack(inputs)

    def predict(self, x: PixelArray) -> FloatArray:
        """Return embeddings (N, D)."""
        return np.asarray(self.session.run(None, {"pixels": x})[0])

    def unbatch(self, output: FloatArray) -> list[FloatArray]:
        """Return the rows of a batch."""
        return list(output)

    def encode_response(self, output: FloatArray) -> dict[str, list[float]]:
        """Return an embedding as JSON."""
        return {"embedding": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Embedding(max_batch_size=16, api_path="/embed"), accelerator="cpu")
    server.run("127.0.0.1", port=int(os.environ["PEER_PORT"]), log_level="warning", generate_client_file=False)
