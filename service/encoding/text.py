"""Words → unit embeddings: the text tower of an image-text encoder, by onnxruntime and tokenizers alone."""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from service import FloatArray, IntArray, cores, metrics
from service.encoding.batcher import Batcher
from service.encoding.card import TEXT_FILES, Card
from service.errors import InvalidModel, InvalidRequest, NoEmbedding, TooLarge

TEXT_CONFIG_FILE = TEXT_FILES[2]
_INPUTS = ("input_ids", "attention_mask")
_TYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
# Its embedding is compared with the one at the start, to see that the tower still works.
_CANARY = "a photograph"
_LEAST_OWN_COSINE = 0.9999
# Larger batches are no faster per text on a CPU, and every caller in them waits longer.
_LARGEST_BATCH = 16
# A graph of so few bytes takes a fraction of a millisecond for a text.
_SMALL_BYTES = 8_000_000
# Embeddings of the latest texts that are kept.
_KEPT = 1000


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
    """A text encoder whose embeddings lie in the space of an image encoder, on the CPU. Opening it embeds a text.

    Attributes:
        config: how texts become tokens.
        fixed_batch: the only number of texts that the graph takes, or None if it takes any.
        dimension: D.
    """

    def __init__(self, model: bytes, tokenizer: bytes, config: TextConfig) -> None:
        """Open graph and tokenizer.

        Args:
            model: text.onnx.
            tokenizer: tokenizer.json.
            config: text_config.json.

        Raises:
            InvalidModel: one of them cannot be read, the graph takes anything but tokens and their mask, or the
                tokenizer has tokens that the graph does not know.
        """
        self.config = config
        # Imported late: a machine that only trains has no onnxruntime.
        import onnxruntime as ort

        options = ort.SessionOptions()
        # To wake a second thread takes longer than it saves a small tower.
        options.intra_op_num_threads = 1 if len(model) < _SMALL_BYTES else cores()
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
        sizes = {node.shape[0] for node in self._session.get_inputs() if isinstance(node.shape[0], int)}
        if len(sizes) > 1:
            raise InvalidModel(f"the text tower takes batches of {sorted(sizes)} at once; expected one size")
        self.fixed_batch: int | None = sizes.pop() if sizes else None
        outputs = [node.name for node in self._session.get_outputs()]
        if config.output not in outputs:
            raise InvalidModel(f"the text tower has no output {config.output}; it has {', '.join(outputs)}")
        self._known = self._embed_canary()
        self.dimension = len(self._known)
        self._check_vocabulary()

    def tokens(self, texts: Sequence[str]) -> tuple[IntArray, IntArray]:
        """Return the tokens (N, T) of N texts, and their mask (N, T): 1 for a token, 0 for padding.

        Raises:
            NoEmbedding: the tokenizer cannot read a text, or finds no token in any of them.
        """
        texts = [text.lower() for text in texts] if self.config.lowercase else list(texts)
        try:
            encoded = self._tokenizer.encode_batch(texts)
        # tokenizers raises a plain Exception.
        except Exception as error:
            raise NoEmbedding("the tokenizer of the encoder cannot read this text") from error
        if not len(encoded[0].ids):
            raise NoEmbedding("the tokenizer of the encoder finds no word that it knows in this text")
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
            NoEmbedding: a row of its output is zero or not finite, or a text has no tokens.
        """
        with metrics.text_seconds.time():
            return self._embed(*self.tokens(texts))

    def probe(self) -> None:
        """Embed a text that was embedded when the tower was opened. Raises InvalidModel if it is another now."""
        if not float(self._embed_canary() @ self._known) >= _LEAST_OWN_COSINE:
            raise InvalidModel("the text tower embeds a text otherwise than at the start")

    def _embed_canary(self) -> FloatArray:
        try:
            embeddings = self._embed(*self.tokens([_CANARY]))
        except NoEmbedding as error:
            raise InvalidModel(str(error)) from error
        return np.asarray(embeddings[0])

    def _check_vocabulary(self) -> None:
        """Raise InvalidModel if the graph fails for the largest token of the tokenizer."""
        tokens, mask = self.tokens([_CANARY])
        largest = max(self._tokenizer.get_vocab().values())
        tokens[0, 0] = largest
        try:
            self._embed(tokens, mask)
        except NoEmbedding:
            pass
        except InvalidModel as error:
            raise InvalidModel(
                f"the tokenizer has {largest + 1} tokens, and the text tower fails for the last of them: {error}"
            ) from error

    def _embed(self, tokens: IntArray, mask: IntArray) -> FloatArray:
        """Return the embeddings (N, D) of tokens (N, T), in batches of the size that the graph fixes, or in one."""
        size = self.fixed_batch or len(tokens)
        # The last batch is filled with the last text.
        filled = [*range(len(tokens)), *[len(tokens) - 1] * (-len(tokens) % size)]
        parts = [filled[start : start + size] for start in range(0, len(filled), size)]
        embeddings = np.concatenate([self._run(tokens[part], mask[part]) for part in parts])[: len(tokens)]
        norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or not norms.all():
            raise NoEmbedding("the text tower gives this text no embedding: zero or not finite")
        return np.asarray(embeddings / norms, np.float32)

    def _run(self, tokens: IntArray, mask: IntArray) -> FloatArray:
        given = dict(zip(_INPUTS, (tokens, mask), strict=True))
        try:
            (raw,) = self._session.run(
                [self.config.output], {name: given[name].astype(type) for name, type in self._types.items()}
            )
        # onnxruntime raises a class of its own for every status.
        except Exception as error:
            raise InvalidModel(f"the text tower fails: {str(error).partition(chr(10))[0][:300]}") from error
        embeddings = np.asarray(raw, np.float32)
        if embeddings.ndim != 2 or len(embeddings) != len(tokens):
            raise InvalidModel(f"the text tower gives {embeddings.shape}, expected (N, D)")
        return embeddings


class TextEncoder:
    """A text tower for many callers: texts share batches, and the embeddings of the last thousand are kept.

    Every method may be called from any thread.

    Attributes:
        tower: the text tower.
    """

    def __init__(self, tower: TextTower) -> None:
        """Start the thread that runs the tower."""
        self.tower = tower
        batch = tower.fixed_batch or _LARGEST_BATCH
        self._kept: OrderedDict[str, FloatArray] = OrderedDict()
        self._keeping = threading.Lock()
        self._batcher = Batcher([self._encode], batch, metrics.texts_waiting, metrics.text_batch_size)

    def embed_soon(self, text: str) -> "Future[FloatArray]":
        """Begin to embed a text, without blocking.

        Args:
            text: as `check_text` returns it.

        Returns:
            A future of the embedding (D,), of L2 norm 1; its errors are those of TextTower.encode. If it is cancelled
            before its batch begins, the text is skipped.
        """
        future: Future[FloatArray] = Future()
        with self._keeping:
            kept = self._kept.get(text)
            if kept is not None:
                self._kept.move_to_end(text)
        if kept is not None:
            future.set_result(kept)
        else:
            self._batcher.submit(text, future)
        return future

    def close(self) -> None:
        """Embed all texts that wait, then end the thread."""
        self._batcher.close()

    def _encode(self, texts: Sequence[str]) -> FloatArray:
        """Embed a batch and keep its embeddings, before any caller of it goes on."""
        embeddings = self.tower.encode(texts)
        with self._keeping:
            self._kept.update(zip(texts, embeddings, strict=True))
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return embeddings


def open_text_tower(card: Card, dimension: int) -> TextTower | None:
    """Return the text tower of an encoder, or None if it has none.

    Args:
        card: the verified model folder.
        dimension: D of its image tower.

    Raises:
        InvalidModel: as TextTower and TextConfig.from_json; or its embeddings have another dimension.
    """
    if card.text is None:
        return None
    try:
        tower = TextTower(card.text.model, card.text.tokenizer, TextConfig.from_json(card.text.config))
    except InvalidModel as error:
        raise InvalidModel(f"{card.folder}: {error}") from error
    if tower.dimension != dimension:
        raise InvalidModel(
            f"{card.folder}: the text tower gives {tower.dimension} numbers a text, and the image tower "
            f"{dimension} numbers a picture; expected as many"
        )
    return tower


def check_text(text: str, max_characters: int) -> str:
    """Return a text to embed, unchanged.

    Raises:
        InvalidRequest: it is empty or blank, or has half a character (a lone surrogate).
        TooLarge: it is longer.
    """
    if len(text) > max_characters:
        raise TooLarge(f"expected a text of at most {max_characters} characters, got {len(text)}")
    if not text.strip():
        raise InvalidRequest("expected words, got an empty text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest("expected whole characters, got half of one") from error
    return text
