"""Small, randomly initialised models of transformers, exported as their repositories on the hub have them."""

import io
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from tests.service.encoding.test_processors import CONFIGS

# Of the pixels: that of CONFIGS.
SIDE = 224
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    # The trace of the other implementations depends on the size of the batch.
    "attn_implementation": "eager",
}
VISION = {**TOWER, "image_size": SIDE, "patch_size": 32}


class Family(NamedTuple):
    """A model beside its repository.

    files: of the repository.
    config: its preprocessor_config.json.
    embed: pixel_values (N, 3, S, S) → (N, D), as transformers gives them.
    tokenizer: of transformers, or None.
    embed_texts: texts → (N, D), or None.
    """

    files: dict[str, bytes]
    config: dict[str, Any]
    embed: Callable[[Tensor], Tensor]
    tokenizer: Any = None
    embed_texts: Callable[[list[str]], Tensor] | None = None


class _Outputs(nn.Module):
    """A model that returns some of its outputs as a tuple."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.model(*inputs)
        return tuple(found[name] for name in self.names)


def exported(model: nn.Module, inputs: dict[str, Tensor], outputs: list[str], fixed: bool = False) -> bytes:
    """Return a model as ONNX, as optimum exports it.

    Args:
        model: of transformers.
        inputs: examples, by name.
        outputs: names of its outputs.
        fixed: whether the size of the batch is that of the examples, and no other.
    """
    axes = {name: {0: "N"} if name == "pixel_values" else {0: "N", 1: "T"} for name in inputs}
    # torch takes a buffer, though its types say no.
    buffer: Any = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            # The exporter gives the mode back that it found.
            _Outputs(model, outputs).eval(),
            tuple(inputs.values()),
            buffer,
            input_names=[*inputs],
            output_names=outputs,
            dynamic_axes=None if fixed else axes,
            dynamo=False,
        )
    return bytes(buffer.getvalue())


def pixels(count: int = 2) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))}


def tokens(masked: bool) -> dict[str, Tensor]:
    ids = torch.ones(2, 64 if not masked else 9, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if masked else {"input_ids": ids}


def repository(graphs: dict[str, bytes], config: dict[str, Any], model_config: Any, **more: str) -> dict[str, bytes]:
    """Return the files of a repository, with weights and code that nobody may read or run."""
    texts = {
        "preprocessor_config.json": json.dumps(config),
        "config.json": model_config.to_json_string(use_diff=False),
        "README.md": "---\nlicense: mit\ntags:\n- vision\n---\n# A model\n",
        "modeling_evil.py": "raise SystemExit('code of a repository was run')",
        "pytorch_model.bin": "a pickle",
        **more,
    }
    return {f"onnx/{name}.onnx": graph for name, graph in graphs.items()} | {
        name: text.encode() for name, text in texts.items()
    }


def dinov2() -> Family:
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**VISION))
    graph = exported(model, pixels(), ["last_hidden_state"])
    config = CONFIGS["dinov2"]
    return Family(
        repository({"model": graph}, config, model.config), config, lambda x: model(x).last_hidden_state[:, 0]
    )


def resnet() -> Family:
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 32], "depths": [1, 1, 1], "layer_type": "basic"}
    model = transformers.ResNetModel(transformers.ResNetConfig(**sizes)).eval()
    graph = exported(model, pixels(), ["last_hidden_state", "pooler_output"])
    config = CONFIGS["resnet"]
    return Family(
        repository({"model": graph}, config, model.config), config, lambda x: model(x).pooler_output[:, :, 0, 0]
    )


def clip() -> Family:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    text = {
        **TOWER,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "max_position_embeddings": 77,
    }
    text |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {**VISION, "projection_dim": 24}
    config_of_both = transformers.CLIPConfig(text_config={**text, "projection_dim": 24}, vision_config=vision)
    images = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision))
    texts = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**text, projection_dim=24)).eval()
    graphs = {
        "vision_model": exported(images, pixels(), ["image_embeds", "last_hidden_state"]),
        "text_model": exported(texts, tokens(masked=True), ["text_embeds", "last_hidden_state"]),
    }
    config = CONFIGS["clip"]

    def embed_texts(sentences: list[str]) -> Tensor:
        found = tokenizer(sentences, padding=True, truncation=True, max_length=77, return_tensors="pt")
        embeds: Tensor = texts(**found).text_embeds
        return embeds

    files = repository(graphs, config, config_of_both, **tokenizer_files(tokenizer))
    return Family(files, config, lambda x: images(x).image_embeds, tokenizer, embed_texts)


def siglip() -> Family:
    torch.manual_seed(0)
    tokenizer = siglip_tokenizer()
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "projection_size": 32}
    model = transformers.SiglipModel(
        transformers.SiglipConfig(text_config=text, vision_config=VISION, attn_implementation="eager")
    ).eval()
    graphs = {
        "vision_model": exported(model.vision_model, pixels(), ["last_hidden_state", "pooler_output"]),
        "text_model": exported(model.text_model, tokens(masked=False), ["last_hidden_state", "pooler_output"]),
    }
    config = CONFIGS["siglip"]

    def embed_texts(sentences: list[str]) -> Tensor:
        found = tokenizer(sentences, padding="max_length", truncation=True, max_length=64, return_tensors="pt")
        embeds: Tensor = model.text_model(found["input_ids"]).pooler_output
        return embeds

    files = repository(graphs, config, model.config, **tokenizer_files(tokenizer))
    return Family(files, config, lambda x: model.vision_model(x).pooler_output, tokenizer, embed_texts)


FAMILIES = {"dinov2": dinov2, "clip": clip, "siglip": siglip, "resnet": resnet}


def clip_tokenizer() -> Any:
    """A tokenizer as CLIP's, whose vocabulary are the bytes, alone and at the end of a word, and a few pairs."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    merges = [("a", "t</w>"), ("t", "h"), ("th", "e</w>")]
    marks = ["<|startoftext|>", "<|endoftext|>"]
    words = [*characters, *[f"{one}</w>" for one in characters], *["".join(pair) for pair in merges], *marks]
    return transformers.CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=merges)


def siglip_tokenizer() -> Any:
    """A tokenizer as SigLIP 2's, whose vocabulary are bytes and small letters."""
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    words = [*marks, *[f"<0x{byte:02X}>" for byte in range(256)], "▁", *"abcdefghijklmnopqrstuvwxyz", "at"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return transformers.Siglip2Tokenizer(vocab=vocabulary, merges=[("a", "t")], padding_side="right")


def tokenizer_files(tokenizer: Any) -> dict[str, str]:
    """Return the files of a tokenizer as transformers saves them."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {
            path.name: path.read_text()
            for path in Path(folder).iterdir()
            if path.name in ("tokenizer.json", "tokenizer_config.json")
        }
