"""The locked image tower: an encoder as it is served, whose space a text tower learns."""

from pathlib import Path
from typing import TYPE_CHECKING

from service.encoding.card import MODEL_FILE, read_card
from service.encoding.pretrained import EFFICIENTNET_LITE0, default_encoder
from service.errors import InvalidRequest

if TYPE_CHECKING:
    from service.encoding.encoder import Encoder


def open_locked(init: str | None, out: Path | None = None) -> "Encoder":
    """Open the encoder that --init names, on the CPU and in float32.

    Args:
        init: efficientnet-lite0 for the default encoder, a model's folder, or the folder OUT.run of a run.
        out: the model folder to be written, which must be another one.

    Raises:
        InvalidRequest: it names none, or the folder that is to be written.
        InvalidModel: the encoder cannot be read.
    """
    # Imported late: a machine that only trains has no onnxruntime.
    from service.encoding.encoder import Encoder

    expected = f"expected {EFFICIENTNET_LITE0} or the folder of an encoder, such as models/mnist"
    if init is None:
        raise InvalidRequest(f"backbone locked: --init names the encoder that texts are learnt for: {expected}")
    folder = default_encoder() if init == EFFICIENTNET_LITE0 else Path(init)
    if not (folder / MODEL_FILE).exists() and folder.name.endswith(".run"):
        folder = folder.with_name(folder.name.removesuffix(".run"))
    if not (folder / MODEL_FILE).exists():
        raise InvalidRequest(f"--init {init}: holds no {MODEL_FILE}; {expected}")
    if out is not None and out.exists() and out.samefile(folder):
        raise InvalidRequest(f"--out {out}: is the encoder of --init itself; name another folder")
    return Encoder(read_card(folder), device="cpu")
