"""Our app on uvicorn without BentoML; the difference is the cost of BentoML."""

from starlette.types import Receive, Scope, Send

from service.app import app, open_service, own_every_path
from service.http.guard import Guard
from service.settings import Settings


async def _serve(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await own_every_path(scope, receive, send)
        return
    # All other messages belong to the lifespan protocol.
    while True:
        if (await receive())["type"] == "lifespan.startup":
            open_service(Settings())
            await send({"type": "lifespan.startup.complete"})
        else:
            app.state.slots.close()
            app.state.gallery.close()
            await send({"type": "lifespan.shutdown.complete"})
            return


guarded = Guard(_serve)
