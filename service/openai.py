"""POST /v1/embeddings: pictures in the shape that OpenAI's clients and infinity's users send."""

from typing import Any

from service.bodies import check_count, from_base64
from service.errors import InvalidRequest, UnknownModel, each
from service.gallery import Gallery
from service.schemas import OpenAIBody, listed


def embed(body: OpenAIBody, gallery: Gallery) -> dict[str, Any]:
    """Embed what an OpenAI client sent.

    Raises:
        UnknownModel; InvalidRequest: dimensions other than the encoder's; and as Gallery.embed.
    """
    if body.model != gallery.card.name:
        raise UnknownModel(f"model: expected {gallery.card.name}, the one that runs here")
    if body.dimensions not in (None, gallery.encoder.dimension):
        raise InvalidRequest(f"dimensions: expected {gallery.encoder.dimension}")
    texts = [body.input] if isinstance(body.input, str) else body.input
    check_count(len(texts), gallery.settings)
    images = each("picture", texts, lambda text: from_base64(text, gallery.settings.max_image_bytes))
    rows = listed(gallery.embed(images), body.encoding_format)
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": number, "embedding": row} for number, row in enumerate(rows)],
        "model": gallery.card.name,
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
    }
