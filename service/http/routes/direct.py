"""A route for the hot path: without a query string, it calls its endpoint before FastAPI looks for parameters."""

import inspect
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from fastapi import Request, Response
from fastapi.params import Depends
from fastapi.routing import APIRoute
from pydantic.fields import FieldInfo
from starlette.types import Receive, Scope, Send

from service.http.routes.strict import StrictRoute


class DirectRoute(StrictRoute):
    """A StrictRoute that calls `endpoint(request)` if the URL has no query string.

    FastAPI solves dependencies and parameters for every request, which takes a tenth of the time of a small encoder.
    The endpoint of a direct route takes a Request, returns a Response, and gives every query parameter a default in its
    signature: without a query string there is nothing to solve. A request with a query string goes FastAPI's whole way.

    Opt in with `APIRouter(route_class=DirectRoute)`.

    Raises:
        TypeError: at registration, for an endpoint or an option that a direct call would ignore.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        for reason in _obstacles(self):
            raise TypeError(
                f"{path}: DirectRoute cannot serve {self.name}, because {reason}; register it as an APIRoute"
            )
        self._call: Callable[[Request], Awaitable[Response]] = endpoint

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        # include_router(dependencies=...) adds to a route that was checked without them.
        included = "effective_route_context" in scope.get("fastapi", ())
        if scope["query_string"] or included or scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)
        else:
            response = await self._call(Request(scope, receive, send))
            await response(scope, receive, send)


def _obstacles(route: APIRoute) -> Iterator[str]:
    """Yield each reason why a direct call of the endpoint would differ from FastAPI's."""
    solved = route.dependant
    if solved.dependencies:
        yield "it has dependencies"
    for kind, fields in (
        ("path", solved.path_params),
        ("header", solved.header_params),
        ("cookie", solved.cookie_params),
        ("body", solved.body_params),
    ):
        for field in fields:
            yield f"{field.name} is a {kind} parameter"
    for injected in (
        solved.response_param_name,
        solved.background_tasks_param_name,
        solved.security_scopes_param_name,
        solved.http_connection_param_name,
        solved.websocket_param_name,
    ):
        if injected is not None:
            yield f"{injected} is injected by FastAPI"
    if route.max_body_size is not None:
        yield "it has a max_body_size"
    if route.response_field is not None:
        yield "it has a response model"
    if not inspect.iscoroutinefunction(route.endpoint):
        yield "it is not an async function"

    signature = inspect.signature(route.endpoint, eval_str=True)
    parameters = list(signature.parameters.values())
    if (
        not parameters
        or parameters[0].annotation is not Request
        or parameters[0].kind is inspect.Parameter.KEYWORD_ONLY
    ):
        yield "its first parameter is not a Request"
    for parameter in parameters[1:]:
        # The endpoint would get a default of Query(10) as it stands: a Query, not 10.
        if parameter.default is parameter.empty or isinstance(parameter.default, FieldInfo | Depends):
            yield f"{parameter.name} has no plain default"
    returned = signature.return_annotation
    if not (isinstance(returned, type) and issubclass(returned, Response)):
        yield "it is not annotated to return a Response"
