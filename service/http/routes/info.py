"""GET /info, GET /metrics, the demo page and /docs."""

import asyncio
import importlib.metadata
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import faiss
import onnxruntime
from fastapi import APIRouter, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse

from service import __version__, commit, metrics
from service.encoding.openvino_graph import is_installed
from service.errors import LookalikeError
from service.gallery import Gallery
from service.http import schemas
from service.http.openapi import WORK, answers
from service.http.query_bodies import QUERY_KINDS
from service.http.routes.state import gallery_of, work
from service.http.routes.strict import StrictRoute

PAGE = Path(__file__).parents[2] / "page"
_PAGE = (PAGE / "index.html").read_text()
_NO_STORE = (PAGE / "no_store.html").read_text()
VERSIONS = {
    "lookalike": __version__,
    **{name: importlib.metadata.version(name) for name in ("bentoml", "pillow", "fastapi", "apsw")},
    "onnxruntime": onnxruntime.__version__,
    **({"openvino": importlib.metadata.version("openvino")} if is_installed() else {}),
    "faiss": faiss.__version__,
}
# Of the encoder's card: how it came about, how good it was at its export, and who may use it.
_CARD = ("method", "licence", "origin", "data", "quality")
# Of the preprocessing, beside its sizes.
_PREPROCESSING = ("resize", "resample", "rescale", "mean", "std")

router = APIRouter(route_class=StrictRoute, tags=["service"])


@router.get("/", include_in_schema=False)
async def page(request: Request) -> Response:
    """Return the page, or without a store one that says so.

    Their links are relative; below a proxy's path they do not depend on a slash at its end.
    """
    shown = _NO_STORE if gallery_of(request).settings.no_store else _PAGE
    root = request.scope.get("root_path", "")
    return HTMLResponse(shown.replace("<head>", f'<head>\n  <base href="{root}/">') if root else shown)


@router.get("/docs", include_in_schema=False)
async def docs() -> HTMLResponse:
    """Return Swagger's page. Its links are relative, so a proxy may publish it below any path."""
    return get_swagger_ui_html(
        title="Lookalike: Swagger UI",
        openapi_url="openapi.json",
        swagger_js_url="swagger/swagger-ui-bundle.js",
        swagger_css_url="swagger/swagger-ui.css",
        swagger_favicon_url="swagger/favicon-32x32.png",
        swagger_ui_parameters={"tryItOutEnabled": True, "persistAuthorization": True, "displayRequestDuration": True},
    )


@router.get("/metrics", include_in_schema=False)
async def prometheus(request: Request) -> Response:
    """Return the metrics for Prometheus. It takes no slot, so it answers while all of them are occupied."""
    gallery = gallery_of(request)
    if not gallery.settings.no_store:
        await asyncio.to_thread(_tell_store, gallery)
    return Response(await asyncio.to_thread(metrics.report), headers={"Content-Type": metrics.CONTENT_TYPE})


def _tell_store(gallery: Gallery) -> None:
    # While a store cannot be read, the metrics say so, and the others are there all the same.
    with suppress(LookalikeError):
        metrics.tell_store("lookalike_items", gallery.store.count())
    if not gallery.settings.read_only:
        metrics.tell_store("lookalike_store_writable", gallery.store.writable)
    with suppress(LookalikeError):
        if (disk := gallery.store.disk_state()) is not None:
            metrics.tell_store("lookalike_store_disk_bytes", disk.size_bytes)
            metrics.tell_store("lookalike_store_disk_free_bytes", disk.free_bytes)
            metrics.tell_store("lookalike_snapshot_timestamp_seconds", disk.snapshot_at_s)
            metrics.tell_store("lookalike_snapshot_due", disk.snapshot_due)


@router.get("/info", responses=answers(schemas.Info, *WORK))
async def get_info(request: Request) -> Response:
    """Describe this service: encoder, embedding space, gallery, limits, versions."""
    return await work(request, lambda: JSONResponse(_info(gallery_of(request))))


def _info(gallery: Gallery) -> dict[str, Any]:
    settings, preprocessing = gallery.settings, gallery.card.preprocessing
    return {
        "model": gallery.card.name,
        "fingerprint": gallery.card.fingerprint,
        "dimension": gallery.encoder.dimension,
        "count": None if settings.no_store else gallery.store.count(),
        "variant": gallery.encoder.variant,
        "provider": gallery.encoder.provider,
        "card": {name: gallery.card.facts[name] for name in _CARD if name in gallery.card.facts},
        "preprocessing": preprocessing.sizes | {k: v for k, v in asdict(preprocessing).items() if k in _PREPROCESSING},
        "queries": list(QUERY_KINDS if gallery.reads_texts else (kind for kind in QUERY_KINDS if kind != "text")),
        "text": _text(gallery),
        "notice": None if settings.no_store else gallery.notice(),
        "limits": {
            name: getattr(settings, name)
            for name in type(settings).model_fields
            if name.startswith("max_") or name.endswith("_timeout_s")
        },
        "versions": VERSIONS,
        "commit": commit(),
    }


def _text(gallery: Gallery) -> dict[str, Any] | None:
    if not gallery.reads_texts:
        return None
    return {"max_tokens": gallery.texts.tower.config.max_length, "logit_scale": gallery.card.logit_scale}
