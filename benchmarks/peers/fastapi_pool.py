"""A peer: plain FastAPI and onnxruntime, each request on a thread of Starlette's pool.

This is plain FastAPI at its fastest: the body is the picture itself, not a form, and uvicorn runs on uvloop and
httptools. PEER_THREADS sets onnxruntime's threads; its default, 0, is one spinning thread a core.
"""

import io
import os
from typing import Any

import numpy as np
import onnxruntime as ort
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image
from starlette.concurrency import run_in_threadpool

_SIDE = int(os.environ["PEER_SIDE"])

app = FastAPI()
options = ort.SessionOptions()
options.intra_op_num_threads = int(os.environ.get("PEER_THREADS", "0"))
session = ort.InferenceSession(os.environ["PEER_MODEL"], options, providers=["CPUExecutionProvider"])


@app.get("/health")
async def health() -> str:
    """Answer once the server is up."""
    return "ok"


@app.post("/embed")
async def embed(request: Request) -> JSONResponse:
    """Embed the picture in the body."""
    return await run_in_threadpool(_embed, await request.body())


def _embed(data: bytes) -> JSONResponse:
    picture = Image.open(io.BytesIO(data)).convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture).transpose(2, 0, 1)[np.newaxis]  # (1, 3, S, S)
    embeddings: Any = session.run(None, {"pixels": pixels})[0]
    return JSONResponse({"embedding": embeddings[0].tolist()})
