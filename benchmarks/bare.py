"""Our app on uvicorn without BentoML; the difference is the cost of BentoML."""

from starlette.types import Receive, Scope, Send

from service.http.guard import Guard
from service.http.routes import create_app, own_every_path
from service.settings import Settings
from service.worker import open_service

_settings, _app = Settings(), create_app()
_owner = own_every_path(_app)


async def _serve(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await _owner(scope, receive, send)
        return
    # All other messages belong to the lifespan protocol.
    while True:
        if (await receive())["type"] == "lifespan.startup":
            open_service(_app, _settings)
            await send({"type": "lifespan.startup.complete"})
        else:
            _app.state.slots.close()
            _app.state.gallery.close()
            await send({"type": "lifespan.shutdown.complete"})
            return


guarded = Guard(_serve, _settings)
