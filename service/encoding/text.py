"""Words → unit embeddings: the text tower of an image-text encoder, by onnxruntime and tokenizers alone."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

from service import FloatArray, IntArray, cores
from service.errors import InvalidModel, NoEmbedding

TEXT_CONFIG_FILE = "text_config.json"
_INPUTS = ("input_ids", "attention_mask")
_TYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}


class TextConfig(NamedTuple):
    """text_config.json: how texts become the input of text.onnx.

    max_length: tokens of a text, its marks included; longer ones are cut.
    padding: "max_length" fills every text up to that, "longest" up to the longest of its batch.
    padding_side: "right" or "left".
    pad_token, pad_id: the token that fills, and its number.
    lowercase: whether texts are written in small letters before they are tokenised; tokenizer.json may do so itself.
    output: the output (N, D) of the graph that is the embedding.
    """

    max_length: int
    padding: str
    padding_side: str
    pad_token: str
    pad_id: int
    lowercase: bool
    output: str

    @classmethod
    def from_json(cls, data: bytes) -> "TextConfig":
        """Read text_config.json. Raises InvalidModel."""
        try:
            config = cls(**json.loads(data))
            if config.max_length < 1 or config.padding not in ("max_length", "longest"):
                raise ValueError("max_length below 1, or another padding than max_length and longest")
        except (ValueError, TypeError) as error:
            raise InvalidModel(f"{TEXT_CONFIG_FILE}: not a configuration of a text tower: {error}") from error
        return config

    def to_json(self) -> bytes:
        """Return the file's content."""
        return (json.dumps(self._asdict(), indent=2) + "\n").encode()


class TextTower:
    """A text encoder whose embeddings lie in the space of an image encoder. One thread at a time may call it."""

    def __init__(self, model: bytes, tokenizer: bytes, config: TextConfig) -> None:
        """Open graph and tokenizer.

        Args:
            model: text.onnx.
            tokenizer: tokenizer.json.
            config: text_config.json.

        Raises:
            InvalidModel: one of them cannot be read, or the graph takes anything but tokens and their mask.
        """
        self.config = config
        options = ort.SessionOptions()
        options.intra_op_num_threads = cores()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer.decode())
            self._tokenizer.enable_truncation(config.max_length)
            self._tokenizer.enable_padding(
                direction=config.padding_side,
                pad_id=config.pad_id,
                pad_token=config.pad_token,
                length=config.max_length if config.padding == "max_length" else None,
            )
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        # Both libraries raise classes of their own.
        except Exception as error:
            raise InvalidModel(f"the text tower cannot be loaded: {str(error).partition(chr(10))[0]}") from error
        self._types: dict[str, Any] = {}
        for node in self._session.get_inputs():
            if node.name not in _INPUTS or node.type not in _TYPES:
                raise InvalidModel(
                    f"the text tower takes {node.name} of {node.type}; expected {' and '.join(_INPUTS)}, whole numbers"
                )
            self._types[node.name] = _TYPES[node.type]
        outputs = [node.name for node in self._session.get_outputs()]
        if config.output not in outputs:
            raise InvalidModel(f"the text tower has no output {config.output}; it has {', '.join(outputs)}")
        self._check_vocabulary()

    def _check_vocabulary(self) -> None:
        """Make sure that the graph knows the greatest token of its tokenizer.

        Raises:
            InvalidModel: it fails on that token, and not on the tokens of a text.
        """
        ids, mask = self.tokens(["a"])
        if not ids.size:
            return
        greatest = max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self._run(ids, mask)
        ids[0, 0] = greatest
        try:
            self._run(ids, mask)
        except InvalidModel as error:
            raise InvalidModel(
                f"the text tower does not know token {greatest} of its tokenizer, which has more tokens than the graph"
            ) from error

    def _run(self, ids: IntArray, mask: IntArray) -> FloatArray:
        """Return the output of the graph for tokens (N, T) with their mask. Raises InvalidModel if it fails."""
        given = dict(zip(_INPUTS, (ids, mask), strict=True))
        try:
            (raw,) = self._session.run(
                [self.config.output], {name: given[name].astype(type) for name, type in self._types.items()}
            )
        # onnxruntime raises a class of its own for every status.
        except Exception as error:
            raise InvalidModel(f"the text tower fails: {str(error).partition(chr(10))[0][:300]}") from error
        return np.asarray(raw, np.float32)

    def tokens(self, texts: Sequence[str]) -> tuple[IntArray, IntArray]:
        """Return the tokens (N, T) of N texts, and their mask (N, T): 1 for a token, 0 for padding."""
        texts = [text.lower() for text in texts] if self.config.lowercase else list(texts)
        encoded = self._tokenizer.encode_batch(texts)
        return (
            np.asarray([one.ids for one in encoded], np.int64),
            np.asarray([one.attention_mask for one in encoded], np.int64),
        )

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Embed texts.

        Returns:
            (N, D) float32, rows of L2 norm 1.

        Raises:
            InvalidModel: the graph failed, or its output is not (N, D).
            NoEmbedding: a row of its output is zero or not finite.
        """
        embeddings = self._run(*self.tokens(texts))
        if embeddings.ndim != 2 or len(embeddings) != len(texts):
            raise InvalidModel(f"the text tower gives {embeddings.shape}, expected (N, D)")
        norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or not norms.all():
            raise NoEmbedding("the text tower gives this text no embedding: zero or not finite")
        return np.asarray(embeddings / norms, np.float32)
