"""Write models/NAME: graphs, preprocessing, card and README, whole or not at all."""

import base64
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from service.encoding.card import CARD_FILE, PREPROCESSOR_FILE, TEXT_FILE, VARIANTS, Card, Preprocessing, fingerprint
from service.errors import InvalidOutput
from service.files import write_folder


def check_out(out: Path) -> None:
    """Check that a model may be written to `out`, and make its parent folder.

    Raises:
        InvalidOutput: `out` is a file, or a folder of something else; or its parent cannot be made.
    """
    if out.name in ("", ".."):
        raise InvalidOutput(f"{out}: expected a folder with a name of its own, such as models/mine")
    if out.exists() and not (out / CARD_FILE).exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise InvalidOutput(f"{out}: is there and is not a model folder; choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidOutput(f"{out}: the folder it is to lie in cannot be made: {error.strerror}") from error


def check_new(out: Path, overwrite: bool = False) -> None:
    """As check_out, but `out` may only be there if the user asked to `overwrite` it.

    The earlier model stays until `write_model` has the new one whole.

    Raises:
        InvalidOutput: as check_out; or `out` is there, and it was not asked to overwrite it.
    """
    check_out(out)
    if not overwrite and (out.exists() or out.is_symlink()):
        raise InvalidOutput(f"{out}: is there already; replace it with --overwrite, or choose another --out")


def write_model(
    out: Path,
    graphs: dict[str, bytes],
    preprocessing: Preprocessing,
    facts: dict[str, Any],
    quality: dict[str, Any],
    known_canary: str | None = None,
    name: str | None = None,
    more: dict[str, bytes] | None = None,
) -> None:
    """Write a model folder, whole or not at all; an earlier one is replaced.

    Args:
        out: the folder; its name is the encoder's.
        graphs: ONNX, by the name of the variant; "fp32" is model.onnx.
        preprocessing: goes beside them.
        facts: more entries of the card, such as method and data; `output` where the graph's names do not tell it.
        quality: the measurements of each file, by its name.
        known_canary: the canary's embedding as float32 in base64; None computes it here.
        name: the encoder's name; None for the folder's.
        more: other files of the encoder by name, such as those of its text tower.

    Raises:
        InvalidModel: a graph outside the contract.
        InvalidOutput: the folder cannot be written.
    """
    # Imported late: a machine that only trains has no onnxruntime.
    from service.encoding.encoder import Encoder, canary

    model = graphs["fp32"]
    bare = Card(
        out, name or out.name, "", model, preprocessing, {key: facts[key] for key in ("output",) if key in facts}
    )
    card = replace(bare, fingerprint=fingerprint(model, preprocessing, bare.output))
    encoder = Encoder(card, device="cpu")
    embedding = encoder.encode(canary(preprocessing.height, preprocessing.width)[None])[0]
    files = {VARIANTS[variant]: graph for variant, graph in graphs.items()} | (more or {})
    files[PREPROCESSOR_FILE] = (json.dumps(json.loads(preprocessing.canonical), indent=2) + "\n").encode()
    content = {
        "name": card.name,
        "dimension": encoder.dimension,
        "fingerprint": card.fingerprint,
        "sha256": {file: hashlib.sha256(data).hexdigest() for file, data in files.items()},
        "canary": known_canary or base64.b64encode(embedding.astype("<f4").tobytes()).decode(),
        "quality": quality,
        **facts,
    }
    files[CARD_FILE] = (json.dumps(content, indent=2) + "\n").encode()
    files["README.md"] = _readme(content).encode("utf-8", "surrogateescape")
    write_folder(files, out)


def _readme(content: dict[str, Any]) -> str:
    data = content.get("data", {})
    lines = [
        f"- method: {content.get('method')}",
        f"- data: {data.get('source')} ({data.get('pictures', 'unknown number of')} pictures)",
        *(f"- {key}: {content[key]}" for key in ("licence", "origin") if key in content),
        *([f"- whitening: {json.dumps(content['whitening'])}"] if "whitening" in content else []),
        f"- fingerprint: {content['fingerprint']}",
        *(f"- {file}: {json.dumps(figures)}" for file, figures in content["quality"].items()),
    ]
    taken = "pictures, and words for them," if TEXT_FILE in content["sha256"] else "pictures"
    about = f"{content['about']}\n\n" if "about" in content else ""
    return (
        f"# {content['name']}\n\nAn image encoder: {taken} to {content['dimension']} numbers of length 1.\n\n{about}"
        + "\n".join(lines)
        + "\n"
    )
