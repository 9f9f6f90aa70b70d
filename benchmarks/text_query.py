"""The latency of a search by words beside one by a vector, over HTTP at one connection, with a tiny text tower.

    python -m benchmarks.text_query

The store has scikit-learn's 1,797 digits under models/mnist. The text tower is a transformer with random weights: 2
layers of width 64, byte-level BPE of 1,000 tokens, texts of about 10 tokens. The limit is a search by a vector, which
skips the encoder. Of each kind there are 2,000 requests in rotation, so that no text is among the last 1,000 that the
service keeps; "kept" is one text again and again. The kinds take turns; figures are medians of the turns.
"""

import io
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from benchmarks import load
from benchmarks.machine import describe
from benchmarks.servers import OURS, serving
from service.encoding.card import read_card
from service.encoding.text import TextConfig, TextTower

_MODEL = Path(__file__).parents[1] / "models" / "mnist"
_DIMENSION, _WIDTH, _LAYERS, _TOKENS, _LONGEST = 128, 64, 2, 1000, 32
_REQUESTS, _K = 2000, 10
# A busy machine starts a service in minutes.
_PATIENCE_S = 600
_WORDS = ("a", "the", "red", "blue", "old", "tall", "seven", "digit", "bicycle", "street", "night", "photo", "of")


class _Texts(nn.Module):
    """A text tower that gives its embedding alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embeds: Tensor = self._model(input_ids=input_ids, attention_mask=attention_mask).text_embeds
        return embeds


def sentence(random: random.Random) -> str:
    """Return five to ten words, hardly ever the same."""
    return " ".join(random.choice(_WORDS) for _ in range(random.randint(5, 10)))


def write_tower(folder: Path) -> TextTower:
    """Write a text tower of random weights beside the image tower in a folder, and return it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TOKENS, special_tokens=["<pad>", "<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((_MODEL.parents[1] / "README.md").read_text().splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    torch.manual_seed(0)
    tower = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=_WIDTH,
            intermediate_size=4 * _WIDTH,
            num_hidden_layers=_LAYERS,
            num_attention_heads=4,
            max_position_embeddings=_LONGEST,
            projection_dim=_DIMENSION,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=1,
            attn_implementation="eager",
        )
    )
    example = torch.ones(2, 9, dtype=torch.int64)
    # torch takes a buffer, though its types say no.
    graph: Any = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            _Texts(tower).eval(),
            (example, torch.ones_like(example)),
            graph,
            input_names=["input_ids", "attention_mask"],
            output_names=["embedding"],
            dynamic_axes={name: {0: "N", 1: "T"} for name in ("input_ids", "attention_mask")},
            dynamo=False,
        )
    config = TextConfig(_LONGEST, "longest", "right", "<pad>", 0, False, "embedding")
    files = {
        "text.onnx": graph.getvalue(),
        "tokenizer.json": tokenizer.to_str().encode(),
        "text_config.json": config.to_json(),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return TextTower(files["text.onnx"], files["tokenizer.json"], config)


def write_requests(folder: Path) -> dict[str, list[Path]]:
    """Write the requests of each kind as files for the load client."""
    chance, numbers = random.Random(0), np.random.default_rng(0)
    kinds: dict[str, list[dict[str, Any]]] = {
        "a vector": [{"vector": row.round(4).tolist()} for row in numbers.normal(size=(_REQUESTS, _DIMENSION))],
        "words": [{"text": f"{sentence(chance)} {number}"} for number in range(_REQUESTS)],
        "kept words": [{"text": "an old photo of a red bicycle"}],
    }
    paths: dict[str, list[Path]] = {}
    for kind, bodies in kinds.items():
        paths[kind] = [folder / f"{kind.replace(' ', '-')}-{number}" for number in range(len(bodies))]
        for path, body in zip(paths[kind], bodies, strict=True):
            path.write_bytes(load.request("/search", "application/json", json.dumps(body | {"k": _K}).encode()))
    return paths


def main(
    seconds: Annotated[float, typer.Option(help="Length of a measurement.")] = 4,
    turns: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Print the table."""
    print(describe())
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        model = Path(shutil.copytree(_MODEL, folder / "model"))
        tower = write_tower(model)
        tokens = [int(tower.tokens([sentence(random.Random(number))])[1].sum()) for number in range(100)]
        megabytes = len((model / "text.onnx").read_bytes()) / 1e6
        print(f"text tower: {megabytes:.2f} MB, texts of {min(tokens)} to {max(tokens)} tokens; k = {_K}, 1 connection")
        (folder / "requests").mkdir()
        requests = write_requests(folder / "requests")
        index = [str(Path(sys.executable).with_name("lookalike")), "index", "digits", "--model", str(model)]
        subprocess.run([*index, "--store", str(folder / "store")], check=True, capture_output=True)
        results: dict[str, list[load.Result]] = {kind: [] for kind in requests}
        with serving(OURS, read_card(model).folder, "fp32", folder, _PATIENCE_S) as port:
            for _ in range(turns):
                for kind, paths in requests.items():
                    results[kind].append(load.run(port, paths, 1, seconds, 1))
    print("| search by | p50, ms (lowest to highest turn) | p99, ms | p50 / a vector's | other than 200 |")
    print("|---|---|---|---|---|")
    base = statistics.median(result.p50_ms for result in results["a vector"])
    for kind, found in results.items():
        p50s = [result.p50_ms for result in found]
        others = sum(count for result in found for status, count in result.statuses.items() if status != "200")
        print(
            f"| {kind} | {statistics.median(p50s):.2f} ({min(p50s):.2f} to {max(p50s):.2f}) "
            f"| {statistics.median(result.p99_ms for result in found):.2f} "
            f"| {statistics.median(p50s) / base:.2f} | {others or 'none'} |"
        )


if __name__ == "__main__":
    typer.run(main)
