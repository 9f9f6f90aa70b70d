"""POST /embed and POST /v1/embeddings: pictures → embeddings."""

import io
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
from fastapi import APIRouter, Request, Response

from service import FloatArray
from service.errors import each
from service.http import openai, schemas
from service.http.bodies import check_count, content_type, picture_of, read_pictures
from service.http.openapi import BODY, WORK, answers, body, json_body, picture_body
from service.http.routes.direct import DirectRoute
from service.http.routes.parameters import Fingerprint
from service.http.routes.state import NumPyJsonResponse, check_content_type, check_fingerprint, gallery_of, slots_of
from service.http.schemas import EncodingFormat, read_json

_NPY = "application/x-npy"

direct = APIRouter(route_class=DirectRoute, tags=["embeddings"])


@direct.post(
    "/embed",
    openapi_extra=body(picture_body(several=True) | json_body(schemas.EmbedBody)),
    responses=answers(
        schemas.Embeddings, *WORK, *BODY, 409, 422, more={_NPY: {"schema": {"type": "string", "format": "binary"}}}
    ),
)
async def embed(
    request: Request, encoding_format: EncodingFormat = "float", fingerprint: Fingerprint = None
) -> Response:
    """Embed pictures: one as the body, several as `file` fields, or JSON with base64 strings or data URIs.

    With `Accept: application/x-npy` the answer is a NumPy file, (N, D) float32.
    """
    gallery = gallery_of(request)
    pictures: Sequence[bytes | str]
    if content_type(request) == "application/json":
        asked = await read_json(request, gallery.settings, schemas.EMBED)
        pictures = asked.images
        encoding_format = asked.encoding_format if "encoding_format" in asked.model_fields_set else encoding_format
        fingerprint = fingerprint if asked.fingerprint is None else asked.fingerprint
    else:
        pictures, _ = await read_pictures(request, gallery.settings)
    check_fingerprint(gallery, fingerprint)
    check_count(len(pictures), gallery.settings)

    embeddings = await _embed(request, pictures)
    if _NPY in request.headers.get("accept", ""):
        buffer = io.BytesIO()
        np.save(buffer, embeddings)
        return Response(buffer.getvalue(), media_type=_NPY)
    return NumPyJsonResponse(
        {
            "model": gallery.card.name,
            "fingerprint": gallery.card.fingerprint,
            "dimension": gallery.encoder.dimension,
            "embeddings": schemas.listed(embeddings, encoding_format),
        }
    )


@direct.post(
    "/v1/embeddings",
    openapi_extra=body(json_body(schemas.OpenAIBody)),
    responses=answers(schemas.OpenAIEmbeddings, *WORK, *BODY, 404, 422, openai=True),
)
async def openai_embeddings(request: Request) -> Response:
    """Embed pictures for clients of OpenAI's API. Errors have its shape, too."""
    gallery = gallery_of(request)
    check_content_type(request, "application/json")
    asked = await read_json(request, gallery.settings, schemas.OPENAI)
    embeddings = await _embed(request, openai.pictures(asked, gallery))
    return NumPyJsonResponse(openai.answer(asked, gallery, embeddings))


async def _embed(request: Request, pictures: Sequence[bytes | str]) -> FloatArray:
    """Return the embeddings (N, D) of pictures, given as bytes or as base64; an error names every bad picture."""
    gallery = gallery_of(request)
    async with slots_of(request).place(request.receive) as place:
        begun = [gallery.embed_soon(picture_of(picture, gallery.settings)) for picture in pictures]
        await place.wait(begun)
    return np.array(each("picture", begun, Future.result))
