"""The HTTP app and its routes, one APIRouter module for each subject."""

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from service.bands import Bands
from service.grouping import Groupings
from service.http import openapi, problems
from service.http.page_files import PageFiles
from service.http.routes import classify, duplicates, embed, info, items, map, overview, search
from service.maps import Maps


def create_app() -> FastAPI:
    """Return the HTTP app. Its caller sets `app.state.gallery` and `app.state.slots` before the first request."""
    app = FastAPI(
        title="Lookalike",
        version=info.VERSIONS["lookalike"],
        description="Image similarity search. Errors are application/problem+json.",
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
        # Not include_router: it matches every request twice, once for the router and once for the route.
        routes=[
            *embed.direct.routes,
            *search.direct.routes,
            *classify.direct.routes,
            *embed.router.routes,
            *items.pictures.routes,
            *items.router.routes,
            *overview.router.routes,
            *duplicates.router.routes,
            *map.router.routes,
            *info.router.routes,
        ],
    )
    app.state.groupings, app.state.maps, app.state.bands = Groupings(), Maps(), Bands()
    # The scripts of /docs, from a package instead of another host.
    app.mount("/swagger", StaticFiles(packages=[("fastapi_swagger", "resources")]), name="swagger")
    app.mount("/page", PageFiles(directory=info.PAGE), name="page")
    openapi.describe(app)
    problems.add_handlers(app)
    return app


def own_every_path(app: ASGIApp) -> ASGIApp:
    """Return an ASGI app that hands every path to `app` and notes which of its routes answered.

    BentoML offers a Starlette app only the paths that the app knows and answers the others with pages of its own; it
    offers a plain callable all of them. The scope loses BentoML's router, so that `app` sets its own route there.
    """

    async def owner(scope: Scope, receive: Receive, send: Send) -> None:
        inner = {key: value for key, value in scope.items() if key != "router"}
        try:
            await app(inner, receive, send)
        finally:
            scope["state"]["route"] = getattr(inner.get("route"), "path_format", "other")

    return owner
