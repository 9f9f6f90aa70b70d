"""The shape of OpenAI's embeddings API, with pictures as input, as `infinity` takes them, too."""

from typing import Any

from service import FloatArray
from service.errors import InvalidRequest, UnknownModel
from service.gallery import Gallery
from service.http.bodies import check_count
from service.http.schemas import OpenAIBody, listed


def pictures(body: OpenAIBody, gallery: Gallery) -> list[str]:
    """Return the pictures of a request, in base64 or as data URIs.

    Raises:
        UnknownModel: another model than the encoder's name.
        InvalidRequest: dimensions other than the encoder's.
        TooLarge: more than max_images.
    """
    if body.model != gallery.card.name:
        raise UnknownModel(f"model: expected {gallery.card.name}, the one that runs here")
    if body.dimensions not in (None, gallery.encoder.dimension):
        raise InvalidRequest(f"dimensions: expected {gallery.encoder.dimension}")
    texts = [body.input] if isinstance(body.input, str) else body.input
    check_count(len(texts), gallery.settings)
    return texts


def answer(body: OpenAIBody, gallery: Gallery, embeddings: FloatArray) -> dict[str, Any]:
    """Return the answer of OpenAI's API for embeddings (N, D)."""
    rows = listed(embeddings, body.encoding_format)
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": number, "embedding": row} for number, row in enumerate(rows)],
        "model": gallery.card.name,
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
    }
