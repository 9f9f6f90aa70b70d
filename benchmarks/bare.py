"""Our app on uvicorn alone, without BentoML, as service/app.py sets it up: the difference is what BentoML costs."""

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from service import logs
from service.api import create_app
from service.gallery import open_gallery
from service.guard import Guard
from service.settings import Settings
from service.slots import Slots


@asynccontextmanager
async def _life(app: FastAPI) -> AsyncIterator[None]:
    settings = Settings()
    app.state.gallery = open_gallery(settings)
    app.state.slots = Slots(settings.max_waiting, settings.work_timeout_s)
    gc.collect()
    gc.freeze()
    yield
    app.state.slots.close()
    app.state.gallery.close()


def build() -> Guard:
    """Return the app for `uvicorn --factory`."""
    logs.write_json_lines()
    app = create_app()
    app.router.lifespan_context = _life
    return Guard(app)
