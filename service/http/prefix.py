"""The path under which a proxy publishes this service: links and the OpenAPI document begin with it, routes do not."""

import re

from starlette.datastructures import Headers
from starlette.types import Scope

from service.settings import PREFIX, Settings


class Prefix:
    """Where the service lies below its proxy, by its settings and, if they trust it, by X-Forwarded-Prefix.

    Attributes:
        may_be: whether a request can have a prefix at all.
    """

    def __init__(self, settings: Settings) -> None:
        self._own = settings.root_path
        self._trusting = settings.trust_forwarded_prefix
        self.may_be = bool(self._own) or self._trusting

    def place(self, scope: Scope) -> Scope:
        """Return the scope of a request with `root_path`, and with a `path` that begins with it, as ASGI wants.

        A proxy either leaves the path that the settings name in the address, or removes it: both are taken. A proxy
        that sends X-Forwarded-Prefix has removed it.
        """
        root, path = self._forwarded(scope), scope["path"]
        if not root:
            root = self._own
            if path == root or path.startswith(root + "/"):
                path = path[len(root) :] or "/"
        return {**scope, "root_path": root, "path": root + path}

    def _forwarded(self, scope: Scope) -> str:
        if not self._trusting:
            return ""
        # Each of several proxies adds the part that it removed, the outermost first.
        parts = ",".join(Headers(scope=scope).getlist("x-forwarded-prefix")).split(",")
        prefix = "".join(part.strip().rstrip("/") for part in parts)
        # The prefix becomes a part of pages.
        return prefix if re.fullmatch(PREFIX, prefix) else ""


def route_path(scope: Scope) -> str:
    """Return the path of a request without its prefix: the path of a route."""
    root = scope.get("app_root_path", scope.get("root_path", ""))
    path: str = scope["path"]
    return path.removeprefix(root) if root else path
