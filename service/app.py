"""The BentoML service: our HTTP app is mounted at /; see docs/decisions/0001.

BentoML imports this module in its workers and in their parent, which only watches them. What a worker alone needs is
imported when it starts: the parent then starts a second sooner and needs half the memory.
"""

from functools import cache
from typing import TYPE_CHECKING

import bentoml
from bentoml._internal.configuration.containers import BentoMLContainer
from starlette.types import ASGIApp, Receive, Scope, Send

from service import metrics
from service.http import logs
from service.lifetime import correct_the_parent
from service.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from service.http.guard import Guard

_BENTOML_OWN = ("/livez", "/readyz", "/healthz", "/schema.json")


# BentoML has no types, so mypy sees its Service as Any.
class Fronted(bentoml.Service):  # type: ignore[misc]
    """A service whose requests bypass BentoML's own middleware.

    BentoML's tracing opens three spans a request even if nobody collects them, and its timeout keeps 5 KB of every
    request until a timer fires (docs/decisions/0010). If BentoML's configuration names an exporter of traces, requests
    pass through both.
    """

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        """Return the app that BentoML's worker hands to uvicorn."""
        from service.http.guard import Guard
        from service.http.prefix import route_path
        from service.http.routes import own_every_path

        theirs = super().to_asgi(is_main)
        ours = own_every_path(self.inner.app())
        traced = BentoMLContainer.tracing.exporter_type.get() is not None

        async def front(scope: Scope, receive: Receive, send: Send) -> None:
            if traced or scope["type"] != "http" or route_path(scope) in _BENTOML_OWN:
                await theirs(scope, receive, send)
            else:
                await ours(scope, receive, send)

        guard = Guard(front, self.inner.settings)
        self.inner.guard = guard
        return guard


def make_service(settings: Settings) -> bentoml.Service:
    """Return the BentoML service of one gallery; the gallery is opened when a worker starts.

    A worker holds the gallery's index in its memory, and a store has one writer: with a store there is one worker.
    BentoML's access log writes paths as clients send them, and its metrics have a label for every path that was ever
    asked for: ours replace both (docs/decisions/0009). BentoML's timeout applies to traced requests only; it covers
    our own two, for the body and for the work.
    """
    metrics.configure(settings.workers)
    chosen = settings

    class Lookalike:
        """One gallery, opened when the worker starts and closed when it stops."""

        settings: Settings = chosen
        guard: "Guard"

        def __init__(self) -> None:
            from service.worker import Worker

            self._worker = Worker(self.app(), self.settings, self.guard)

        @staticmethod
        @cache
        def app() -> "FastAPI":
            from service.http.routes import create_app

            return create_app()

        def __is_ready__(self) -> bool:
            return self._worker.is_ready()

        @bentoml.on_shutdown  # type: ignore[untyped-decorator]
        def close(self) -> None:
            self._worker.close()

    @cache
    def owner() -> ASGIApp:
        from service.http.routes import own_every_path

        return own_every_path(Lookalike.app())

    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        await owner()(scope, receive, send)

    return bentoml.asgi_app(mounted, path="/")(
        bentoml.service(
            name="lookalike",
            service_class=Fronted,
            workers=settings.workers,
            traffic={"timeout": settings.body_timeout_s + settings.work_timeout_s + 2},
            logging={"access": {"enabled": False}},
            metrics={"enabled": False},
        )(Lookalike)
    )


logs.write_json_lines()
correct_the_parent()
Lookalike = make_service(Settings())
