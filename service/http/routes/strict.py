"""A route that refuses query parameters that it does not know: a misspelt one would change nothing, silently.

It is named in the OpenAPI document as its function is, and so are the functions of generated clients.
"""

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from service.errors import InvalidRequest
from service.names import unknown


class StrictRoute(APIRoute):
    """An APIRoute that answers 400 to an unknown query parameter, with the name of the nearest one.

    Routes outside the OpenAPI document are pages and metrics. A link to a page may have parameters of its own.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options | {"operation_id": endpoint.__name__})
        self._known = frozenset(field.alias for field in self.dependant.query_params)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Raises InvalidRequest for an unknown parameter."""
        if scope["query_string"] and self.include_in_schema and scope["method"] in (self.methods or ()):
            for name, _ in parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True):
                if name not in self._known:
                    raise InvalidRequest(f"the address: {unknown('a parameter', name, self._known)}")
        await super().handle(scope, receive, send)
