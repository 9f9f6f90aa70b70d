"""Checkpoint → models/NAME: ONNX with its preprocessing and card, checked against torch on real pictures."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.card import CARD_FILE, MODEL_FILE, PREPROCESSOR_FILE, Card, Preprocessing, fingerprint
from service.errors import InvalidModel, InvalidOutput, LookalikeError
from service.images import Limits, decode_pixels
from service.sources import Source
from training.augment import luminance

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
        self.register_buffer("mean", mean.reshape(1, -1, 1, 1).clone())
        self.register_buffer("std", std.reshape(1, -1, 1, 1).clone())

    def forward(self, pixels: Tensor) -> Tensor:
        values = pixels.float() / 255  # (N, 3, S, S)
        if self.channels == 1:
            values = luminance(values)  # (N, 1, S, S)
        return F.normalize(self.backbone((values - self.mean) / self.std), dim=1)


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
    encoder: Encoder, source: Source | None, preprocessing: Preprocessing, facts: dict[str, Any], out: Path
) -> None:
    """Write a model folder, whole or not at all.

    Args:
        encoder: trained.
        source: real pictures to check the export with; None checks with random pixels.
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
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        _write_onnx(encoder, side, folder / MODEL_FILE)
        model = (folder / MODEL_FILE).read_bytes()
        card = Card(folder, out.name, fingerprint(model, preprocessing), model, preprocessing, {})
        pixels = _real_pixels(source, preprocessing) if source else _random_pixels(side)
        quality = {"pictures": len(pixels)} | {
            f"least_cosine_to_torch_batch_{size}": compare(encoder, card, pixels, size) for size in (1, 64)
        }
        with torch.inference_mode():
            dimension = encoder(torch.zeros(1, 3, side, side, dtype=torch.uint8)).shape[1]
        (folder / PREPROCESSOR_FILE).write_text(json.dumps(json.loads(preprocessing.canonical), indent=2) + "\n")
        content = {
            "name": out.name,
            "dimension": dimension,
            "fingerprint": card.fingerprint,
            "sha256": {
                file: hashlib.sha256((folder / file).read_bytes()).hexdigest()
                for file in (MODEL_FILE, PREPROCESSOR_FILE)
            },
            "quality": {MODEL_FILE: quality},
            **facts,
        }
        (folder / CARD_FILE).write_text(json.dumps(content, indent=2) + "\n")
        (folder / "README.md").write_text(_readme(content))
        earlier = Path(temporary) / "earlier"  # stays whole beside the new one until that has its place
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


def _write_onnx(encoder: Encoder, side: int, path: Path) -> None:
    example = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    torch.onnx.export(
        encoder,
        (example,),
        str(path),
        input_names=["pixels"],
        output_names=["embedding"],
        dynamic_shapes={"pixels": {0: torch.export.Dim("N")}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def _real_pixels(source: Source, preprocessing: Preprocessing) -> np.ndarray[Any, Any]:
    """Pixels of up to 256 pictures spread over the source; bad ones are passed over, as in training."""
    pixels = []
    for position in np.linspace(0, len(source) - 1, min(len(source), _CHECKED_PICTURES)).astype(int).tolist():
        try:
            pixels.append(decode_pixels(source.entry(position).data, preprocessing, Limits()))
        except LookalikeError:
            continue
    return np.stack(pixels)


def _random_pixels(side: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (128, side, side, 3), dtype=np.uint8)


def _readme(content: dict[str, Any]) -> str:
    data = content.get("data", {})
    return (
        f"# {content['name']}\n\n"
        f"An image encoder: pictures to {content['dimension']} numbers of length 1.\n\n"
        f"- method: {content.get('method')}\n"
        f"- data: {data.get('source')} ({data.get('pictures', 'unknown number of')} pictures)\n"
        f"- fingerprint: {content['fingerprint']}\n"
        f"- export: {content['quality'][MODEL_FILE]}\n"
    )
