"""The BentoML service: life cycle and health. Our HTTP app is mounted at /; see docs/decisions/0001."""

import logging

import bentoml
from starlette.types import Receive, Scope, Send

from service.api import create_app
from service.gallery import open_gallery
from service.settings import Settings

log = logging.getLogger("bentoml")
app = create_app()


async def own_every_path(scope: Scope, receive: Receive, send: Send) -> None:
    """Hand every path to our app.

    BentoML offers a Starlette app only the paths it knows and answers the others with pages of its
    own; a plain callable is offered them all. Without BentoML's router in the scope, ours names the routes.
    """
    await app({key: value for key, value in scope.items() if key != "router"}, receive, send)


# One worker: the gallery's index lives in its memory, and its store has one writer.
@bentoml.service(name="lookalike", workers=1)
@bentoml.asgi_app(own_every_path, path="/")
class Lookalike:
    """One gallery, opened when the worker starts and closed when it stops."""

    def __init__(self) -> None:
        settings = Settings()
        self.gallery = open_gallery(settings)
        app.state.gallery = self.gallery
        log.info(
            "serving %d pictures from %s with the encoder %s (%s) on %s",
            self.gallery.store.count(),
            settings.store,
            self.gallery.card.name,
            self.gallery.encoder.variant,
            self.gallery.encoder.provider,
        )
        if notice := self.gallery.notice():
            log.warning(notice)

    def __is_ready__(self) -> bool:
        """Ready is: a picture goes all the way to the index and back."""
        self.gallery.probe()
        return True

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """Let go of the store."""
        self.gallery.close()
