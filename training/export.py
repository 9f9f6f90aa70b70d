"""Checkpoint → models/NAME: ONNX with its preprocessing and card, checked against torch on real pictures."""

import base64
import hashlib
import json
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.card import CARD_FILE, MODEL_FILE, PREPROCESSOR_FILE, VARIANTS, Card, Preprocessing, fingerprint
from service.errors import InvalidModel, InvalidOutput
from training.augment import luminance
from training.variants import Pictures, judge, to_int8

_CHECKED_PICTURES = 256
_LEAST_COSINE = 0.9999


class Encoder(nn.Module):
    """What is exported: uint8 pixels (N, 3, S, S) → unit embeddings (N, D) float32, normalised inside the graph."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, mean: Tensor, std: Tensor, channels: int) -> None:
        """Wrap a backbone; mean and std are (C,) for pixels in 0..1, channels 1 has the graph take luminance."""
        super().__init__()
        self.backbone = backbone
        self.channels = channels
        self.precision = torch.float32
        self.register_buffer("mean", mean.reshape(1, -1, 1, 1).clone())
        self.register_buffer("std", std.reshape(1, -1, 1, 1).clone())

    def forward(self, pixels: Tensor) -> Tensor:
        values = pixels.float() / 255  # (N, 3, S, S)
        if self.channels == 1:
            values = luminance(values)  # (N, 1, S, S)
        h = self.backbone(((values - self.mean) / self.std).to(self.precision))
        return F.normalize(h.float(), dim=1)

    def in_float16(self) -> "Encoder":
        """Return a copy whose backbone computes in float16; it takes the same pixels and gives float32."""
        copy = Encoder(deepcopy(self.backbone).half(), self.mean, self.std, self.channels)
        copy.precision = torch.float16
        return copy.eval()


def square_preprocessing(side: int, shortest_edge: int | None = None, resample: int = 3) -> Preprocessing:
    """The preprocessing of our exports: the shortest edge to S, or to what is named, then the central S × S."""
    config = {
        "do_resize": True,
        "size": {"shortest_edge": shortest_edge or side},
        "resample": resample,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": False,
        "do_normalize": False,
    }
    return Preprocessing.from_config(config, "export")


def export(
    encoder: Encoder, pictures: Pictures | None, preprocessing: Preprocessing, facts: dict[str, Any], out: Path
) -> None:
    """Write a model folder, whole or not at all: model.onnx, the variants that are good enough, and the card.

    Args:
        encoder: trained.
        pictures: real ones to check the export with; None checks with random pixels and makes no variants.
        preprocessing: goes beside the graph.
        facts: for the card: method, data and whatever else is known of the run.
        out: the folder; an earlier model there is replaced.

    Raises:
        InvalidModel: onnxruntime's embeddings are not torch's (cosine below 0.9999 at batch 1 or 64).
        InvalidOutput: as check_out.
    """
    encoder = encoder.cpu().eval()
    side = preprocessing.side
    check_out(out)
    model = to_onnx(encoder, side)
    card = Card(out, out.name, fingerprint(model, preprocessing), model, preprocessing, {})
    pixels = pictures.calibration[:_CHECKED_PICTURES] if pictures else _random_pixels(side)
    quality: dict[str, dict[str, Any]] = {
        MODEL_FILE: {"pictures": len(pixels)}
        | {f"least_cosine_to_torch_batch_{size}": compare(encoder, card, pixels, size) for size in (1, 64)}
    }
    files = {
        MODEL_FILE: model,
        PREPROCESSOR_FILE: (json.dumps(json.loads(preprocessing.canonical), indent=2) + "\n").encode(),
    }
    if pictures:
        made = {"fp16": to_onnx(encoder.in_float16(), side), "int8": to_int8(model, pictures.calibration)}
        quality |= judge(card, made, pictures)
        for variant, graph in made.items():
            file = VARIANTS[variant]
            if quality[file]["belongs"]:
                files[file] = graph
            else:
                print(f"{file} is not written: it is too far from {MODEL_FILE}: {json.dumps(quality[file])}")
    with torch.inference_mode():
        dimension = encoder(torch.zeros(1, 3, side, side, dtype=torch.uint8)).shape[1]
    content = {
        "name": out.name,
        "dimension": dimension,
        "fingerprint": card.fingerprint,
        "sha256": {file: hashlib.sha256(data).hexdigest() for file, data in files.items()},
        "canary": _canary_embedding(card),
        "quality": quality,
        **facts,
    }
    files[CARD_FILE] = (json.dumps(content, indent=2) + "\n").encode()
    files["README.md"] = _readme(content).encode("utf-8", "surrogateescape")
    write_folder(files, out)


def write_folder(files: dict[str, bytes], out: Path) -> None:
    """Write files, by name, as a folder, whole or not at all; an earlier one stays until the new one has its place."""
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        folder, earlier = Path(temporary) / out.name, Path(temporary) / "earlier"
        folder.mkdir()
        for file, data in files.items():
            (folder / file).write_bytes(data)
        if out.exists():
            out.rename(earlier)
        try:
            folder.rename(out)
        except OSError:
            if earlier.exists():
                earlier.rename(out)
            raise


def check_out(out: Path) -> None:
    """Make sure that a model may be written to `out`, and make the folder that it is to lie in.

    Raises:
        InvalidOutput: a file, or a folder of something else, is there; or its parent cannot be made.
    """
    if out.name in ("", ".."):
        raise InvalidOutput(f"{out}: expected a folder with a name of its own, such as models/mine")
    if out.exists() and not (out / CARD_FILE).exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise InvalidOutput(f"{out}: is there and is not a model folder; choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidOutput(f"{out}: the folder it is to lie in cannot be made: {error.strerror}") from error


def compare(encoder: Encoder, card: Card, pixels: np.ndarray[Any, Any], batch: int) -> float:
    """Return the least cosine between torch's embeddings and onnxruntime's of the same pixels.

    Raises:
        InvalidModel: it is below 0.9999.
    """
    # Here, not above: a machine that only trains has no onnxruntime.
    from service.encoder import Encoder as OnnxEncoder

    served = OnnxEncoder(card, device="cpu")
    least = 1.0
    for start in range(0, len(pixels), batch):
        chunk = pixels[start : start + batch]  # (N, S, S, 3)
        with torch.inference_mode():
            expected = encoder(torch.from_numpy(chunk).permute(0, 3, 1, 2)).numpy()
        least = min(least, float((expected * served.encode(chunk)).sum(1).min()))
    if least < _LEAST_COSINE:
        raise InvalidModel(
            f"the export differs from torch: cosine {least:.6f} at batch {batch}, expected ≥ {_LEAST_COSINE}"
        )
    return round(least, 7)


def to_onnx(encoder: Encoder, side: int) -> bytes:
    """Return the ONNX graph of an encoder, for any batch size."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL_FILE
        torch.onnx.export(
            encoder,
            (torch.zeros(2, 3, side, side, dtype=torch.uint8),),
            str(path),
            input_names=["pixels"],
            output_names=["embedding"],
            dynamic_shapes={"pixels": {0: torch.export.Dim("N")}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        return path.read_bytes()


def _canary_embedding(card: Card) -> str:
    """The embedding by which a service knows that its encoder still works, in base64 of float32."""
    from service.encoder import Encoder as OnnxEncoder
    from service.encoder import canary

    embedding = OnnxEncoder(card, device="cpu").encode(canary(card.preprocessing.side)[None])[0]
    return base64.b64encode(embedding.astype("<f4").tobytes()).decode()


def _random_pixels(side: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (128, side, side, 3), dtype=np.uint8)


def _readme(content: dict[str, Any]) -> str:
    data = content.get("data", {})
    measured = "".join(f"- {file}: {json.dumps(figures)}\n" for file, figures in content["quality"].items())
    return (
        f"# {content['name']}\n\n"
        f"An image encoder: pictures to {content['dimension']} numbers of length 1.\n\n"
        f"- method: {content.get('method')}\n"
        f"- data: {data.get('source')} ({data.get('pictures', 'unknown number of')} pictures)\n"
        f"- fingerprint: {content['fingerprint']}\n"
        f"{measured}"
    )
