"""The shape of OpenAI's embeddings API, with texts or pictures as input, as `infinity` takes them, too."""

from typing import Any

from service import FloatArray
from service.errors import InvalidRequest, UnknownModel
from service.gallery import Gallery
from service.http.bodies import is_data_uri, picture_of
from service.http.schemas import OpenAIBody, listed
from service.queries import PictureQuery, TextQuery


def inputs(body: OpenAIBody, gallery: Gallery) -> list[PictureQuery | TextQuery]:
    """Return the pictures and texts of a request.

    `modality` says what all of them are. Without it, a data URI is a picture; everything else is a text where the
    encoder reads texts, and a picture in base64 where it does not.

    Raises:
        UnknownModel: another model than the encoder's name.
        InvalidRequest: dimensions other than the encoder's.
    """
    if body.model != gallery.card.name:
        raise UnknownModel(f"model: expected {gallery.card.name}, the one that runs here")
    if body.dimensions not in (None, gallery.encoder.dimension):
        raise InvalidRequest(f"dimensions: expected {gallery.encoder.dimension}")
    are_texts = gallery.reads_texts if body.modality is None else body.modality == "text"
    return [
        TextQuery(one)
        if are_texts and (body.modality is not None or not is_data_uri(one))
        else PictureQuery(picture_of(one, gallery.settings))
        for one in ([body.input] if isinstance(body.input, str) else body.input)
    ]


def answer(body: OpenAIBody, gallery: Gallery, embeddings: FloatArray) -> dict[str, Any]:
    """Return the answer of OpenAI's API for embeddings (N, D)."""
    rows = listed(embeddings, body.encoding_format)
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": number, "embedding": row} for number, row in enumerate(rows)],
        "model": gallery.card.name,
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
    }


def models(gallery: Gallery) -> dict[str, Any]:
    """Return the answer of OpenAI's API for its list of models."""
    model = {"id": gallery.card.name, "object": "model", "created": 0, "owned_by": "lookalike"}
    return {"object": "list", "data": [model]}
