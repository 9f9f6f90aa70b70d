"""Errors → answers: RFC 9457 problem+json, and OpenAI's shape below /v1."""

from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Scope

from service import metrics
from service.errors import LookalikeError

_RETRY_AFTER_S = {429: "1", 503: "5"}


def answer(scope: Scope, error: LookalikeError) -> JSONResponse:
    """Return the answer to a request that ended in an error of ours."""
    headers = {}
    if error.status in _RETRY_AFTER_S:
        headers["Retry-After"] = _RETRY_AFTER_S[error.status]
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    parts = [{"index": index, "code": part.code, "detail": str(part)} for index, part in error.parts]
    return problem(scope, error.status, error.code, str(error), parts, headers)


def failure(scope: Scope) -> JSONResponse:
    """Return the answer to a request that met an error of another kind."""
    return problem(scope, 500, "internal", "the service failed; its log tells more under this request_id")


def problem(
    scope: Scope,
    status: int,
    code: str,
    detail: str,
    parts: list[dict[str, Any]] | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """Return an error answer. No word of it is the client's."""
    metrics.errors.labels(code).inc()
    request_id = scope.get("state", {}).get("request_id", "")
    if scope["path"].startswith("/v1/"):
        kind = "server_error" if status >= 500 else "invalid_request_error"
        body: dict[str, Any] = {"error": {"message": detail, "type": kind, "param": None, "code": code}}
        return JSONResponse(body, status, headers)
    body = {
        "type": "about:blank",
        "title": code.replace("_", " ").capitalize(),
        "status": status,
        "detail": detail,
        "code": code,
        "request_id": request_id,
    }
    if parts:
        body["errors"] = parts
    return JSONResponse(body, status, headers, media_type="application/problem+json")
