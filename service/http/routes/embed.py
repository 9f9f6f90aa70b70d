"""POST /embed and POST /v1/embeddings: pictures or texts → embeddings."""

import io
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
from fastapi import APIRouter, Request, Response

from service import FloatArray
from service.errors import each
from service.http import openai, schemas
from service.http.bodies import check_count, check_text_count, content_type, picture_of, read_pictures
from service.http.openapi import BODY, NPY, WORK, answers, body, json_body, picture_body
from service.http.routes.direct import DirectRoute
from service.http.routes.parameters import Fingerprint
from service.http.routes.state import NumPyJsonResponse, check_content_type, check_fingerprint, gallery_of, slots_of
from service.http.routes.strict import StrictRoute
from service.http.schemas import EmbedTextsBody, EncodingFormat, read_json
from service.queries import PictureQuery, TextQuery

direct = APIRouter(route_class=DirectRoute, tags=["embeddings"])
router = APIRouter(route_class=StrictRoute, tags=["embeddings"])


@direct.post(
    "/embed",
    openapi_extra=body(picture_body(several=True) | json_body(schemas.EmbedBody, schemas.EmbedTextsBody)),
    responses=answers(
        schemas.Embeddings, *WORK, *BODY, 409, 422, more={NPY: {"schema": {"type": "string", "format": "binary"}}}
    ),
)
async def embed(
    request: Request, encoding_format: EncodingFormat = "float", fingerprint: Fingerprint = None
) -> Response:
    """Embed pictures: one as the body, several as `file` fields, or JSON with base64 strings or data URIs; or texts.

    With `Accept: application/x-npy` the answer is a NumPy file, (N, D) float32.
    """
    gallery = gallery_of(request)
    settings = gallery.settings
    inputs: Sequence[PictureQuery | TextQuery]
    if content_type(request) == "application/json":
        asked = await read_json(request, settings, schemas.EMBED)
        if isinstance(asked, EmbedTextsBody):
            inputs = [TextQuery(text) for text in asked.texts]
        else:
            inputs = [PictureQuery(picture_of(picture, settings)) for picture in asked.images]
        encoding_format = asked.encoding_format if "encoding_format" in asked.model_fields_set else encoding_format
        fingerprint = fingerprint if asked.fingerprint is None else asked.fingerprint
    else:
        inputs = [PictureQuery(data) for data in (await read_pictures(request, settings))[0]]
    check_fingerprint(gallery, fingerprint)

    embeddings = await _embed(request, inputs)
    if NPY in request.headers.get("accept", ""):
        buffer = io.BytesIO()
        np.save(buffer, embeddings)
        return Response(buffer.getvalue(), media_type=NPY)
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
    openapi_extra=body(json_body(schemas.OpenAIBody, schemas.OpenAITextBody)),
    responses=answers(schemas.OpenAIEmbeddings, *WORK, *BODY, 404, 422, openai=True),
)
async def openai_embeddings(request: Request) -> Response:
    """Embed pictures or texts for clients of OpenAI's API, as many as a body may hold. Errors have its shape, too."""
    gallery = gallery_of(request)
    check_content_type(request, "application/json")
    asked = await read_json(request, gallery.settings, schemas.OPENAI)
    done = await _encode_all(request, openai.inputs(asked, gallery))
    return NumPyJsonResponse(openai.answer(asked, gallery, done))


@router.get("/v1/models", responses=answers(schemas.OpenAIModels, *WORK, openai=True))
async def openai_models(request: Request) -> Response:
    """List the one model that runs here, for clients of OpenAI's API."""
    return NumPyJsonResponse(openai.models(gallery_of(request)))


async def _encode_all(request: Request, inputs: Sequence[PictureQuery | TextQuery]) -> FloatArray:
    """Return the embeddings (N, D) of any number of pictures and texts, a part of them at a time.

    Each part has a slot and a timeout of its own, so other requests come between. The first part with a bad member ends
    the request, and its error names all of that part.
    """
    settings = gallery_of(request).settings
    # Decoded pictures are a thousand times larger than the smallest files of them.
    most = settings.max_images if any(isinstance(one, PictureQuery) for one in inputs) else settings.max_texts
    parts = []
    for start in range(0, len(inputs), most):
        parts.append(await _embed(request, inputs[start : start + most], start))
    return np.concatenate(parts)


async def _embed(request: Request, inputs: Sequence[PictureQuery | TextQuery], first: int = 0) -> FloatArray:
    """Return the embeddings (N, D) of pictures and texts; an error names every bad one. Raises as `encode`.

    Args:
        request: the request.
        inputs: N of them.
        first: the place of the first one in the request.
    """
    done = await encode(request, inputs)
    texts = sum(isinstance(one, TextQuery) for one in inputs)
    what = "picture" if not texts else "text" if texts == len(inputs) else "member"
    return np.array(each(what, done, Future.result, first))


async def encode(request: Request, inputs: Sequence[PictureQuery | TextQuery]) -> "list[Future[FloatArray]]":
    """Embed pictures and texts in a slot, and return their futures, which are done.

    Raises:
        TooLarge: more of them than a request may have.
        NoTextTower: texts, and the encoder reads none.
        InvalidRequest, TooLarge: as Gallery.embed_text_soon; the error names every bad text.
    """
    gallery = gallery_of(request)
    texts = sum(isinstance(one, TextQuery) for one in inputs)
    check_count(len(inputs) - texts, gallery.settings)
    check_text_count(texts, gallery.settings)
    if texts:
        _ = gallery.texts

    def begin(one: PictureQuery | TextQuery) -> "Future[FloatArray]":
        return gallery.embed_text_soon(one.text) if isinstance(one, TextQuery) else gallery.embed_soon(one.data)

    async with slots_of(request).place(request.receive) as place:
        begun = each("text", inputs, begin)
        await place.wait(begun)
    return begun
