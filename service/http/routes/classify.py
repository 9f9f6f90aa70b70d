"""POST /classify: pictures and labels → the probability of each label for each picture."""

from concurrent.futures import Future

import numpy as np
from fastapi import APIRouter, Request, Response

from service import FloatArray
from service.errors import each
from service.http import schemas
from service.http.bodies import check_text_count, picture_of
from service.http.openapi import BODY, WORK, answers, body, json_body
from service.http.routes.direct import DirectRoute
from service.http.routes.embed import encode
from service.http.routes.state import NumPyJsonResponse, check_content_type, check_fingerprint, gallery_of
from service.http.schemas import read_json
from service.labels import classify as classified
from service.labels import mean_directions, sentences
from service.queries import PictureQuery, TextQuery

direct = APIRouter(route_class=DirectRoute, tags=["classify"])


@direct.post(
    "/classify",
    openapi_extra=body(json_body(schemas.ClassifyBody)),
    responses=answers(schemas.Classified, *WORK, *BODY, 409, 422),
)
async def classify(request: Request) -> Response:
    """Name pictures with labels of yours, without training: a softmax over the scores of the labels as texts.

    The probabilities of a picture's labels sum to 1, also where none of them fits: its scores tell.
    """
    gallery = gallery_of(request)
    check_content_type(request, "application/json")
    asked = await read_json(request, gallery.settings, schemas.CLASSIFY)
    check_fingerprint(gallery, asked.fingerprint)
    _ = gallery.texts
    # Before any sentence is made: there may be a million labels.
    check_text_count(len(asked.labels) * len(asked.templates), gallery.settings)
    texts = sentences(asked.labels, asked.templates, gallery.settings.max_text_characters)
    pictures = [PictureQuery(picture_of(picture, gallery.settings)) for picture in asked.images]
    done = await encode(request, [*pictures, *map(TextQuery, texts)])
    seen = np.array(each("picture", done[: len(pictures)], Future.result))
    read = np.array(each("text", done[len(pictures) :], Future.result))
    directions = mean_directions(read, len(asked.templates))
    scores, probabilities = classified(seen, directions, gallery.card.logit_scale)
    return NumPyJsonResponse(
        {
            "model": gallery.card.name,
            "fingerprint": gallery.card.fingerprint,
            "logit_scale": gallery.card.logit_scale,
            "results": [{"labels": _ranked(asked.labels, *rows)} for rows in zip(scores, probabilities, strict=True)],
        }
    )


def _ranked(labels: list[str], scores: FloatArray, probabilities: FloatArray) -> list[dict[str, object]]:
    """Return the labels of a picture, the most probable first, equal ones in their order."""
    return [
        {"label": labels[number], "probability": probabilities[number], "score": scores[number]}
        for number in (-probabilities).argsort(kind="stable")
    ]
