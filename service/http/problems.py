"""Errors → answers: RFC 9457 problem+json, and OpenAI's shape below /v1."""

from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match
from starlette.types import Scope

from service import metrics
from service.errors import LookalikeError
from service.http.prefix import route_path


def add_handlers(app: FastAPI) -> None:
    """Let the app answer every error of its routes with a problem."""
    app.add_exception_handler(LookalikeError, _on_lookalike_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    # Starlette raises the error again once it is answered, and the guard logs it.
    app.add_exception_handler(Exception, _on_failure)


def answer(scope: Scope, error: LookalikeError) -> JSONResponse:
    """Return the answer to a request that ended in one of our errors."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    parts = [{"index": index, "code": part.code, "detail": str(part)} for index, part in error.parts]
    return problem(scope, error.status, error.code, str(error), parts, headers)


def failure(scope: Scope) -> JSONResponse:
    """Return the answer to a request that ended in any other error."""
    return problem(scope, 500, "internal", "the service failed; its log tells more under this request_id")


def problem(
    scope: Scope,
    status: int,
    code: str,
    detail: str,
    parts: list[dict[str, Any]] | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """Return an error answer, and count it. `detail` must not repeat text of the client."""
    metrics.errors.labels(code).inc()
    request_id = scope.get("state", {}).get("request_id", "")
    if route_path(scope).startswith("/v1/"):
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


async def _on_lookalike_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LookalikeError)
    return answer(request.scope, error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    # The second part of the place is the name of a parameter, which is our word.
    where = first["loc"][1] if len(first["loc"]) > 1 else "request"
    return problem(request.scope, 400, "invalid_request", f"{where}: {first['msg']}")


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code != 405:
        code = "unknown_route" if error.status_code == 404 else "http_error"
        return problem(
            request.scope, error.status_code, code, f"{error.detail}; {_docs(request.scope)} lists the routes"
        )
    methods = {
        method
        for route in request.app.routes
        if route.matches(request.scope)[0] is not Match.NONE
        for method in getattr(route, "methods", None) or ()
    }
    # The guard answers HEAD wherever GET is.
    allowed = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
    detail = f"expected one of the methods {allowed}; {_docs(request.scope)} lists the routes"
    return problem(request.scope, 405, "method_not_allowed", detail, headers={"Allow": allowed})


def _docs(scope: Scope) -> str:
    return f"{scope.get('app_root_path', scope.get('root_path', ''))}/docs"


async def _on_disconnect(_: Request, __: Exception) -> Response:
    # Nobody receives this answer; the log shows its status.
    return Response(status_code=499)


async def _on_failure(request: Request, _: Exception) -> Response:
    return failure(request.scope)
