"""Near-duplicates on distorted copies of photographs: our encoder and groups, beside perceptual hashes.

python -m benchmarks.duplicates PHOTOS [--model DIR] [--peers PYTHON]

Each photograph is distorted in nine ways. A copy is found if its score with its own original reaches a threshold; it is
a false hit if it reaches it with another's. Of every method the table shows recall at the threshold with the most of it
at a precision of 0.99, and the best F1 at any threshold. --peers names the Python of an environment that has imagededup
(PHash, DHash, and its CNN where its weights can be had) or at least imagehash.
"""

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageOps

from service import FloatArray
from service.duplicates import link
from service.encoding.card import read_card
from service.encoding.encoder import Encoder
from service.encoding.images import decode, decode_pixels
from service.encoding.limits import OWN_FILES
from service.encoding.pretrained import default_encoder
from service.sources import open_source

_PRECISION = 0.99


def _cropped(picture: Image.Image, share: float) -> Image.Image:
    """Return the middle of a picture with this share of its width and height."""
    width, height = (max(1, round(side * share)) for side in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _written_on(picture: Image.Image) -> Image.Image:
    written = picture.copy()
    text = "A caption in large letters\nthat covers the lower third"
    ImageDraw.Draw(written).text(
        (picture.width * 0.05, picture.height * 0.66), text, "white", font_size=picture.height * 0.11, stroke_width=2,
        stroke_fill="black",
    )  # fmt: skip
    return written


def _screenshot(picture: Image.Image) -> Image.Image:
    """Return a picture as a screenshot shows it: a bar above, a border around."""
    bordered = ImageOps.expand(picture, border=round(0.06 * picture.width), fill=(32, 33, 36))
    ImageDraw.Draw(bordered).rectangle((0, 0, bordered.width, round(0.05 * bordered.height)), fill=(222, 225, 230))
    return bordered


DISTORTIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "resize to a half": lambda picture: picture.resize((max(1, picture.width // 2), max(1, picture.height // 2))),
    "crop to 80 % of each side": lambda picture: _cropped(picture, 0.8),
    "crop to 50 % of each side": lambda picture: _cropped(picture, 0.5),
    "JPEG 30": lambda picture: picture,
    "rotate 5°": lambda picture: picture.rotate(5, Image.Resampling.BICUBIC, expand=True),
    "grey": lambda picture: picture.convert("L").convert("RGB"),
    "mirrored": ImageOps.mirror,
    "text overlay": _written_on,
    "screenshot border": _screenshot,
}


class Measured(NamedTuple):
    """How well a method tells copies from strangers.

    Attributes:
        recall: share of copies found at the lowest threshold with a precision of 0.99, over all and by distortion.
        threshold: that threshold.
        f1: the best at any threshold, and at which.
    """

    recall: float
    by_distortion: list[float]
    threshold: float
    f1: float
    f1_threshold: float


def measure(scores: FloatArray) -> Measured:
    """Measure a method.

    Args:
        scores: (P, V, P) of each photograph's copies in V ways with each original; larger is more alike.
    """
    photographs = len(scores)
    own = np.eye(photographs, dtype=bool)[:, None].repeat(scores.shape[1], 1)
    true, false = np.sort(scores[own])[::-1], np.sort(scores[~own])
    # At each true score as the threshold: how many of both kinds reach it.
    hits = np.searchsorted(-true, -true, side="right")
    strangers = len(false) - np.searchsorted(false, true, side="left")
    precision, recall = hits / (hits + strangers), hits / len(true)
    good = np.flatnonzero(precision >= _PRECISION)
    at = good[np.argmax(recall[good])] if len(good) else 0
    f1 = 2 * precision * recall / (precision + recall)
    reached = scores[own].reshape(photographs, -1) >= true[at]
    best = int(np.argmax(f1))
    return Measured(
        float(recall[at]) if len(good) else 0.0,
        [float(share) for share in reached.mean(0)],
        float(true[at]),
        float(f1[best]),
        float(true[best]),
    )


def main(
    photos: Annotated[str, typer.Argument(help="SOURCE of photographs, each of something else.")],
    model: Annotated[
        Path | None, typer.Option(help="Folder of the encoder; the one for photographs if left out.")
    ] = None,
    peers: Annotated[Path | None, typer.Option(help="Python of an environment with imagededup or imagehash.")] = None,
) -> None:
    """Print the table."""
    card = read_card(model or default_encoder())
    encoder = Encoder(card, "cpu", "fp32")
    files = _files(photos)
    embeddings = np.stack(
        [
            np.stack([encoder.encode(decode_pixels(file, card.preprocessing, OWN_FILES)[None])[0] for file in row])
            for row in files
        ]
    )  # (P, 1 + V, D)
    measured = {f"lookalike, {card.name}": measure(embeddings[:, 1:] @ embeddings[:, 0].T)}
    if peers is not None:
        measured |= {name: measure(scores) for name, scores in _peers(peers, files).items()}
    print(
        f"{len(files)} photographs × {len(DISTORTIONS)} distortions; recall where the precision is {_PRECISION} or more"
    )
    print("| " + " | ".join(["distortion", *measured]) + " |")
    print("|---" * (1 + len(measured)) + "|")
    for number, name in enumerate(DISTORTIONS):
        print("| " + " | ".join([name, *(f"{one.by_distortion[number]:.3f}" for one in measured.values())]) + " |")
    ones = measured.values()
    print("| " + " | ".join(["**all**", *(f"**{one.recall:.3f}** at {one.threshold:.3f}" for one in ones)]) + " |")
    print("| " + " | ".join(["best F1", *(f"{one.f1:.3f} at {one.f1_threshold:.3f}" for one in ones)]) + " |")
    _print_linkage(embeddings)


def _files(photos: str) -> list[list[bytes]]:
    """Return for each photograph its own file and those of its distorted copies."""
    source = open_source(photos)
    made = []
    for position in range(len(source)):
        data = source.entry(position).data
        picture = decode(data, 4096, OWN_FILES)
        copies = [_jpeg(distort(picture), 30 if name == "JPEG 30" else 90) for name, distort in DISTORTIONS.items()]
        made.append([data, *copies])
    return made


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _print_linkage(embeddings: FloatArray) -> None:
    """Print precision and recall of pairs within groups, by how groups are made of pairs."""
    rows = embeddings.reshape(-1, embeddings.shape[-1])
    photograph = np.repeat(np.arange(len(embeddings)), embeddings.shape[1])
    scores = np.triu(rows @ rows.T, 1)
    same = np.triu(photograph[:, None] == photograph, 1)
    print(
        "\nPairs that share a group, of all pairs of pictures of the same photograph: precision / recall, largest group"
    )
    print("| threshold | connected components | star around the most connected | cap on the diameter |")
    print("|---|---|---|---|")
    for threshold in (0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4):
        first, second = np.nonzero(scores >= threshold)
        order = np.argsort(-scores[first, second], kind="stable")
        near = [*zip(first[order].tolist(), second[order].tolist(), strict=True)]
        ways = (
            link(rows, near, -1.0),
            _stars(scores + scores.T, threshold),
            link(rows, near, threshold),
        )
        cells = []
        for groups in ways:
            pairs = np.zeros(scores.shape, bool)
            for group in groups:
                pairs[np.ix_(group, group)] = True
            pairs = np.triu(pairs, 1)
            precision, recall = (pairs & same).sum() / max(1, pairs.sum()), (pairs & same).sum() / same.sum()
            cells.append(f"{precision:.4f} / {recall:.3f}, {max(map(len, groups), default=0)}")
        print("| " + " | ".join([f"{threshold:.2f}", *cells]) + " |")


def _stars(scores: FloatArray, threshold: float) -> list[list[int]]:
    """Return groups of a picture and all free ones that are near to it, the picture with the most of these first."""
    near = scores >= threshold
    free = np.ones(len(scores), bool)
    groups = []
    for centre in np.argsort(-near.sum(1), kind="stable").tolist():
        if free[centre]:
            group = [centre, *np.flatnonzero(near[centre] & free).tolist()]
            free[group] = False
            groups.append(group)
    return groups


# Runs in the environment of the peers; prints the names of its methods, and writes their scores.
_PEER = """
import json, sys
from pathlib import Path
import numpy as np
folder = Path(sys.argv[1])
files = sorted(folder.glob("*.jpg"))
count, ways = json.loads(sys.argv[2])

def hamming(hashes):
    bits = np.stack([np.asarray(one).ravel() for one in hashes]).astype(bool).reshape(count, ways, -1)
    return -(bits[:, 1:, None] != bits[None, None, :, 0]).sum(-1).astype(np.float32)

def bits(text):
    return [int(bit) for character in text for bit in f"{int(character, 16):04b}"]

try:
    from imagededup.methods import CNN, DHash, PHash
    for name, method in (("imagededup PHash", PHash()), ("imagededup DHash", DHash())):
        np.save(folder / f"{name}.npy", hamming([bits(method.encode_image(str(file))) for file in files]))
    try:
        cnn = CNN(verbose=False)
        rows = np.stack([cnn.encode_image(str(file))[0] for file in files])
        rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).reshape(count, ways, -1)
        np.save(folder / "imagededup CNN.npy", (rows[:, 1:] @ rows[:, 0].T).astype(np.float32))
    except Exception as error:
        print(f"imagededup's CNN is left out: {error}", file=sys.stderr)
except ImportError as error:
    print(f"imagehash in place of imagededup: {error}", file=sys.stderr)
    import imagehash
    from PIL import Image
    for name, method in (("imagehash phash", imagehash.phash), ("imagehash dhash", imagehash.dhash)):
        np.save(folder / f"{name}.npy", hamming([method(Image.open(file)).hash for file in files]))
"""


def _peers(python: Path, files: list[list[bytes]]) -> dict[str, FloatArray]:
    """Return scores (P, V, P) of other programs' methods by name, computed in their own environment."""
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(file for row in files for file in row):
            (Path(folder) / f"{number:06d}.jpg").write_bytes(data)
        shape = json.dumps([len(files), len(files[0])])
        subprocess.run([python, "-c", _PEER, folder, shape], check=True, stdout=sys.stderr)
        return {path.stem: np.load(path) for path in sorted(Path(folder).glob("*.npy"))}


if __name__ == "__main__":
    typer.run(main)
