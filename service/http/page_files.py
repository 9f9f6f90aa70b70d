"""The files of the page, with gzip for scripts and style sheets: a third of them remains."""

import functools
import gzip
import os
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.staticfiles import NotModifiedResponse, StaticFiles
from starlette.types import Scope

from service.http.compression import takes_gzip

_TEXTS = (".js", ".css")


class PageFiles(StaticFiles):
    """A folder of files. Each is packed once, with its first request."""

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        """Return the answer with a file, or 304 to a client that has it."""
        plain = super().file_response(full_path, stat_result, scope, status_code)
        path, asked = Path(full_path), Headers(scope=scope)
        if path.suffix not in _TEXTS:
            return plain
        plain.headers["Vary"] = "Accept-Encoding"
        if not takes_gzip(asked.get("accept-encoding", "")):
            return plain
        # Packed and plain bytes are two things, and have two tags.
        tag = f'{plain.headers["etag"][:-1]}-gzip"'
        headers = {"ETag": tag, "Vary": "Accept-Encoding", "Content-Encoding": "gzip"}
        content = _packed(path, stat_result.st_mtime_ns)
        packed = Response(content, status_code, headers, plain.media_type)
        return NotModifiedResponse(packed.headers) if self.is_not_modified(packed.headers, asked) else packed


@functools.cache
def _packed(path: Path, mtime_ns: int) -> bytes:  # noqa: ARG001 - a changed file is packed again
    return gzip.compress(path.read_bytes(), mtime=0)
